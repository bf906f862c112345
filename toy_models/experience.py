"""What the update learns from: log-probabilities, values, scores, rewards, advantages and returns of a rollout.

Written from `docs/ppo.md`, which has every formula. Knows no optimizer. Shapes: R rows of this DP rank, T greatest
response.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from toy_models import readings
from toy_models.megatron import Role
from toy_models.passes import Rollout, evaluate

Roles = Mapping[str, Role]


@dataclass(frozen=True)
class Experience:
    """What the update learns from: a rollout, and tensors [R, T] (scores [R]) aligned with its rows."""

    rollout: Rollout
    old_logp: torch.Tensor
    ref_logp: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    def at(self, name: str, wanted: Sequence[int]) -> torch.Tensor:
        index = [self.rollout.rows.index(row) for row in wanted]
        return getattr(self, name)[index]  # type: ignore[no-any-return]


def token_rewards(experience: Mapping[str, torch.Tensor], rollout: Rollout, kl_coef: float) -> torch.Tensor:
    """In-reward KL penalty on the mask, plus the score at the last token of each row; [R, T]."""
    rewards = -kl_coef * (experience["old_logp"] - experience["ref_logp"])
    last = (rollout.responses_R - 1)[:, None]
    return rewards.scatter_add(1, last, experience["scores"][:, None])


def gae(
    rewards_RT: torch.Tensor, values_RT: torch.Tensor, mask_RT: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns over the masked-in positions; holes are skipped, not stepped through."""
    advantages = torch.zeros_like(rewards_RT)
    carried, following = torch.zeros_like(rewards_RT[:, 0]), torch.zeros_like(rewards_RT[:, 0])
    for j in reversed(range(rewards_RT.shape[1])):
        delta = rewards_RT[:, j] + gamma * following - values_RT[:, j]
        carried = torch.where(mask_RT[:, j], delta + gamma * lam * carried, carried)
        following = torch.where(mask_RT[:, j], values_RT[:, j], following)
        advantages[:, j] = torch.where(mask_RT[:, j], carried, 0.0)
    return advantages, torch.where(mask_RT, advantages + values_RT, 0.0)


def global_sum(tensor: torch.Tensor, dp: dist.ProcessGroup) -> torch.Tensor:
    total = tensor.sum()
    dist.all_reduce(total, group=dp)
    return total


def whiten(advantages_RT: torch.Tensor, mask_RT: torch.Tensor, dp: dist.ProcessGroup) -> torch.Tensor:
    """Mean 0 and variance 1 over the masked-in tokens of the whole batch, on all DP ranks."""
    count = global_sum(mask_RT.to(advantages_RT.dtype), dp)
    mean = global_sum(torch.where(mask_RT, advantages_RT, 0.0), dp) / count
    centred = torch.where(mask_RT, advantages_RT - mean, 0.0)
    variance = global_sum(centred**2, dp) / count
    return centred / (variance + 1e-8).sqrt()


def gather_experience(case: Any, roles: Roles, rollout: Rollout) -> Experience:
    """Log-probs, values and scores of a rollout with today's weights, all rows at once; then rewards and advantages."""
    logp = partial(readings.token_logp, temperature=case.ppo.temperature)
    reads: dict[str, tuple[str, Callable[[Rollout, torch.Tensor], Any]]] = {
        "old_logp": ("actor", logp),
        "ref_logp": ("reference", logp),
        "values": ("critic", readings.token_values),
        "scores": ("reward", readings.last_score),
    }
    tokens = {name: rollout.mask_RT.shape[1:] for name in ("old_logp", "ref_logp", "values")}
    found = {
        name: evaluate(case, roles[role], rollout, read, *tokens.get(name, ())) for name, (role, read) in reads.items()
    }
    found["rewards"] = token_rewards(found, rollout, case.ppo.kl_coef)
    settings = (case.ppo.gamma, case.ppo.lam)
    found["advantages"], found["returns"] = gae(found["rewards"], found["values"], rollout.mask_RT, *settings)
    if case.ppo.whiten:
        found["advantages"] = whiten(found["advantages"], rollout.mask_RT, rollout.groups.dp)
    return Experience(rollout, **found)
