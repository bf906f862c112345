"""The truth for a case: the PPO iteration of `docs/ppo.md` on one process, float64, transformers and loops.

Knows no megatron, no process group, no sharding and nothing of `toy_models.ppo`. A layout reaches it only as
data: the padded width, and the partition of rows into micro-batches, on which the balance losses depend.
Always float64 without downcasts, whatever the precision of the case: only the system runs in float32.

Shapes: R rows, P longest prompt, J longest response, W padded width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from toy_models import reference_update as update
from toy_models.batching import partition, shards
from toy_models.families import Tensors, from_hf
from toy_models.precision import keep_float64
from toy_models.reference_model import Pass, forward, initial, initial_biases, parted, routing_gap, tokens_per_expert
from toy_models.reference_rollout import Responses, evaluated, forced_responses, rollout, sampling_margin
from toy_models.reference_update import Trained
from toy_models.weights import ROLES, is_frozen


@dataclass
class Experience:
    """What one rollout gives to its updates, [R, J], zero where masked out; `optimizer_steps` counts up."""

    responses: Responses
    old_logp: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    optimizer_steps: int = 0


@dataclass
class Run:
    """A case being run: the models so far and what was observed."""

    case: Any
    frozen: dict[str, Tensors]
    trained: dict[str, Trained]
    tensors: dict[str, torch.Tensor]
    numbers: dict[str, float]
    facts: dict[str, Any]
    clip_nudges: tuple[float, float] = (0.0, 0.0)
    logit_nudge: float = 0.0


def run(
    case: Any,
    nudge: float = 0.0,
    tokens: Sequence[torch.Tensor] | None = None,
    mask: Sequence[torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
    clip_nudges: tuple[float, float] = (0.0, 0.0),
    logit_nudge: float = 0.0,
) -> dict[str, dict[str, Any]]:
    """Run `case.program`; {"tensors", "numbers", "facts"} under the keys of `docs/ppo.md`.

    `nudge` multiplies every initial weight by 1 + nudge or 1 - nudge. `tokens` [R, P + J] and `mask` [R, J],
    one of each per iteration, force the rollouts, so that a nudged run keeps the tokens of the first.
    `dtype` float32 is for measuring rounding only. `clip_nudges` multiply clip coefficients by 1 + the first in a
    model's even steps, by 1 + the second in its odd ones. `logit_nudge` moves the gradients of the actor's logits, up
    for even and down for odd tokens, by that share of what a softmax's backward pass subtracts from itself.
    """
    with keep_float64(dtype == torch.float64):  # which would leave the weights of a float32 run float64
        now, experience, iteration = _start(case, nudge, dtype), None, -1
        now.clip_nudges, now.logit_nudge = clip_nudges, logit_nudge
        for operation in case.program:
            name = type(operation).__name__
            if name == "Rollout":
                iteration += 1
                given = None if tokens is None or mask is None else (tokens[iteration], mask[iteration])
                experience = _rollout(now, iteration, given)
            elif name == "Update" and experience is not None:
                _update(now, iteration, experience)
            else:
                raise ValueError(f"program={case.program}: the reference cannot run {name} here")
    return {"tensors": now.tensors, "numbers": now.numbers, "facts": now.facts}


def _start(case: Any, nudge: float, dtype: torch.dtype) -> Run:
    state = {role: initial(case.model, role, case.seed, case.precision, nudge, dtype) for role in ROLES}
    rates = {"actor": case.ppo.lr, "critic": case.ppo.critic_lr}
    biases = {role: initial_biases(case.model, role, case.seed, dtype) for role in ROLES}
    trained = {role: Trained(state.pop(role), rate, biases=biases.pop(role)) for role, rate in rates.items()}
    state = {role: weights | biases[role] for role, weights in state.items()}
    return Run(case, state, trained, {}, {}, {})


def _weights(now: Run, role: str) -> Tensors:
    """With the routers' biases."""
    return now.trained[role].weights | now.trained[role].biases if role in now.trained else now.frozen[role]


def token_logp(z_RWV: torch.Tensor, of: Responses, temperature: float) -> torch.Tensor:
    """log_softmax(z/τ) at every response position, [R, J, V]."""
    return torch.log_softmax(of.at_predictions(z_RWV) / temperature, dim=-1)


def chosen(logp_RJV: torch.Tensor, of: Responses) -> torch.Tensor:
    """The log-probs of the responses' own tokens [R, J], zero where masked out."""
    return of.masked(logp_RJV.gather(-1, of.targets[..., None]).squeeze(-1))


@torch.no_grad()
def _rollout(now: Run, iteration: int, given: tuple[torch.Tensor, torch.Tensor] | None) -> Experience:
    case, actor = now.case, _weights(now, "actor")
    responses = forced_responses(case, *given) if given else rollout(case, actor, iteration)
    passes = {role: evaluated(case, role, _weights(now, role), responses.sequences) for role in ROLES}
    z_RWV = passes["actor"].output
    margin = sampling_margin(case, responses, z_RWV, iteration)
    experience, seen = _experience(case, responses, {role: one.output for role, one in passes.items()})
    seen |= {"tokens": responses.tokens, "mask": responses.mask, "logits": z_RWV, "margin/rollout": margin}
    now.tensors |= {f"{iteration}/{name}": tensor for name, tensor in seen.items()}
    gaps = [routing_gap(case.model, *passes.values()), *responses.routing]
    now.numbers[f"{iteration}/margin/routing"] = min(gaps)
    now.facts[f"{iteration}/tokens_per_expert"] = tokens_per_expert(case.model, passes["actor"])
    return experience


def _experience(case: Any, of: Responses, outputs: Tensors) -> tuple[Experience, Tensors]:
    old_logp, ref_logp = (
        chosen(token_logp(outputs[role], of, case.ppo.temperature), of) for role in ("actor", "reference")
    )
    values = of.masked(of.at_predictions(outputs["critic"]))
    scores = of.at_last_tokens(outputs["reward"])
    rewards = of.masked(-case.ppo.kl_coef * (old_logp - ref_logp))
    for row, count in enumerate(of.counts):
        rewards[row, count - 1] += scores[row]
    advantages, returns = advantages_and_returns(case.ppo, rewards, values, of.mask)
    seen = {
        "old_logp": old_logp, "ref_logp": ref_logp, "values": values, "rewards": rewards, "scores": scores,
        "advantages": advantages, "returns": returns,
    }  # fmt: skip
    return Experience(of, old_logp, values, advantages, returns), seen


def advantages_and_returns(
    ppo: Any, rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE over the masked-in positions of each row [R, J], holes skipped; advantages whitened if asked."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for row in range(values.shape[0]):
        next_value = next_advantage = 0.0
        for j in reversed(mask[row].nonzero().flatten().tolist()):
            value = values[row, j].item()
            delta = rewards[row, j].item() + ppo.gamma * next_value - value
            next_value, next_advantage = value, delta + ppo.gamma * ppo.lam * next_advantage
            advantages[row, j], returns[row, j] = next_advantage, next_advantage + value
    return (whitened(advantages, mask) if ppo.whiten else advantages), returns


def whitened(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean 0 and population variance 1 over all masked-in positions of the batch."""
    inside = advantages[mask.bool()]
    mean = inside.sum() / inside.numel()
    variance = ((inside - mean) ** 2).sum() / inside.numel()
    return torch.where(mask.bool(), (advantages - mean) / (variance + 1e-8).sqrt(), 0.0)


def _update(now: Run, iteration: int, experience: Experience) -> None:
    for _ in range(now.case.ppo.epochs):
        for mini in partition(now.case.layout, now.case.batch, now.case.ppo).micro:
            micro_batches = [micro for share in mini for micro in share]
            _optimizer_step(now, f"{iteration}/{experience.optimizer_steps}", experience, micro_batches)
            experience.optimizer_steps += 1


def _forward_mini_batch(now: Run, leaves: Tensors, of: Responses, micro_batches: list[tuple[int, ...]]) -> list[Pass]:
    """One pass per micro-batch, computed apart only where tokens are routed together."""
    model, masked = now.case.model, now.case.switches.padding_mask == "padding"
    if model.routes_together:
        cut = partial(shards, now.case.layout, width=of.sequences.shape[1])
        passes = [forward(model, leaves, of.sequences[list(rows)], cut(len(rows))) for rows in micro_batches]
    else:
        whole = forward(model, leaves, of.sequences[[row for rows in micro_batches for row in rows]])
        passes = parted(whole, [len(rows) for rows in micro_batches])
    pairs = zip(micro_batches, passes, strict=True)
    return [one._replace(padding=of.padding[list(rows)]) if masked else one for rows, one in pairs]


def _optimizer_step(now: Run, key: str, experience: Experience, micro_batches: list[tuple[int, ...]]) -> None:
    rows = [row for micro in micro_batches for row in micro]
    gaps = []
    for role, losses in (("actor", _actor_loss), ("critic", _critic_loss)):
        model = now.trained[role]
        leaves = {name: w.detach().requires_grad_() for name, w in model.weights.items()}
        passes = _forward_mini_batch(now, leaves | model.biases, experience.responses, micro_batches)
        loss, gap = losses(now, key, experience, rows, torch.cat([one.output for one in passes]))
        grads = update.gradients(loss + update.balance_loss(now.case.model, now.case.layout, passes), leaves)
        gaps += [gap, routing_gap(now.case.model, *passes)]
        model.biases = update.moved_biases(now.case.model, model.biases, passes)
        _apply(now, key, role, grads)
    now.numbers[f"{key}/margin"] = min(gaps)


def _actor_loss(
    now: Run, key: str, experience: Experience, rows: list[int], z: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """The actor's loss without balance losses, and how close a ratio came to the clip bound."""
    ppo, of = now.case.ppo, experience.responses.of_rows(rows)
    logp_all, kept = token_logp(z, of, ppo.temperature), of.mask.bool()
    logp, entropy = chosen(logp_all, of), -(logp_all.exp() * logp_all).sum(-1)[kept].mean()
    old_logp, advantages = experience.old_logp[rows], experience.advantages[rows]
    ratio = (logp - old_logp).exp()[kept]
    policy_loss = update.clipped_policy_loss(ppo, ratio, advantages[kept]).mean()
    distance = (ratio.detach() - 1).abs()
    now.tensors[f"{key}/logp"] = logp.detach()
    now.numbers |= {
        f"{key}/policy_loss": policy_loss.item(),
        f"{key}/entropy": entropy.item(),
        f"{key}/approx_kl": (old_logp - logp)[kept].mean().item(),
        f"{key}/clip_fraction": (distance > ppo.clip_eps).double().mean().item(),
    }
    nudged = now.logit_nudge * update.softmax_rounding(ppo, logp_all[kept], advantages[kept])
    loss = policy_loss - ppo.entropy_coef * entropy + nudged
    return loss, update.smallest((distance - ppo.clip_eps).abs())


def _critic_loss(
    now: Run, key: str, experience: Experience, rows: list[int], outputs: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """The critic's loss without balance losses, and how close a value came to changing a clip branch."""
    ppo, of = now.case.ppo, experience.responses.of_rows(rows)
    kept = of.mask.bool()
    v, old, returns = (
        of.at_predictions(outputs)[kept],
        experience.values[rows][kept],
        experience.returns[rows],
    )
    value_loss = update.clipped_value_loss(ppo, v, old, returns[kept]).mean()
    distance = (v.detach() - old).abs()
    now.numbers |= {
        f"{key}/value_loss": value_loss.item(),
        f"{key}/value_clip_fraction": (distance > ppo.value_clip).double().mean().item(),
    }
    gap = update.smallest((distance - ppo.value_clip).abs())
    return value_loss, min(gap, update.value_branch_gap(ppo, v.detach(), old, returns[kept]))


def _apply(now: Run, key: str, role: str, grads: Tensors) -> None:
    """Clip, step and observe one model."""
    ppo, model = now.case.ppo, now.trained[role]
    grads = {name: grad for name, grad in grads.items() if not is_frozen(ppo.frozen, name)}
    total = update.norm(grads.values())
    coefficient = update.clip_coefficient(ppo.max_norm, total) * (1 + now.clip_nudges[model.steps % 2])
    update.step(ppo, model, {name: grad * coefficient for name, grad in grads.items()})
    now.numbers[f"{key}/{role}_norm"] = total
    now.tensors |= {f"{key}/{role}/expert_bias/{name}": bias for name, bias in model.biases.items()}
    for kind, named in {"grad": grads, "weight": model.weights, **model.moments}.items():
        canonical = from_hf(now.case.model, named)
        now.tensors |= {f"{key}/{role}/{kind}/{name}": tensor for name, tensor in canonical.items()}
