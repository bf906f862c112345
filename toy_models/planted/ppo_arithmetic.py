"""Bugs of rollout, log-probs, values and advantages, re-introduced in the trainer. Each function is one.

The first line says what breaks, the second where it comes from, the third the smallest layout that shows it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from toy_models import batching, experience, ppo, readings, sampling
from toy_models.planted.rewrite import rewrite, wrap
from toy_models.releases import own_share

# ---- rollout and log-probs -------------------------------------------------------------------------------------


def sampled_without_temperature() -> None:
    """Tokens are sampled at temperature 1, whatever is configured.

    huggingface/trl#4159 and volcengine/verl#3133: temperature missing in one pass.
    minimal: world=1
    """
    rewrite(sampling, "sample", ("logits_RV.double() / temperature", "logits_RV.double()"))


def end_tokens_are_not_trained() -> None:
    """The response mask is what is not padding: with one token for both, the end token is never learnt.

    huggingface/trl#6357, volcengine/verl#213: pad and end token confused.
    minimal: world=1
    """

    def around(original: Callable, case: Any, *args: Any) -> Any:
        rollout = original(case, *args)
        responses = rollout.tokens_RW.gather(1, (rollout.states_RT + 1))
        rollout.mask_RT.logical_and_(responses != batching.pad_token(case.model, case.batch))
        return rollout

    wrap(sampling, "roll_out", around)


def observed_tokens_are_trained() -> None:
    """The response mask takes the environment's tokens for the actor's.

    volcengine/verl#2543, commit 96b730bbe: attention mask used as response mask.
    minimal: world=1
    """
    old = "rollout.mask_RT[i, position] = observed is None"
    rewrite(sampling, "_put", (old, "rollout.mask_RT[i, position] = True"))


def log_probs_without_temperature() -> None:
    """Log-probs are those of temperature 1, while tokens are sampled at another.

    volcengine/verl#3133, commit 5deb8cc9a.
    minimal: world=1
    """
    rewrite(readings, "token_logp", ("(logits_RCV / temperature)", "logits_RCV"))


def labels_are_not_shifted() -> None:
    """The log-prob of a token is read from the logits of that very token, which predict the next one.

    Adapted from volcengine/verl#4250, commit 10175743f: labels that are rolled wrongly.
    minimal: world=1
    """
    rewrite(readings, "token_logp", ("batch.tokens_RW.roll(-1, dims=1)", "batch.tokens_RW"))


def update_without_temperature() -> None:
    """Only the update forgets the temperature: the ratio is not 1 before the first step.

    volcengine/verl#3133, commit 5deb8cc9a, in the other pass.
    minimal: world=1
    """
    old = "token_logp(batch, logits_RCV, ppo.temperature)"
    rewrite(ppo, "_actor_loss", (old, "token_logp(batch, logits_RCV, 1.0)"))
    ppo.LOSSES["actor"] = ppo._actor_loss


def rows_not_put_back() -> None:
    """Old log-probs and advantages come from the first rows of the batch, whichever rows are trained.

    NovaSky-AI/SkyRL#2043 and #2096: outputs that are not put back into their order.
    minimal: world=1
    """
    old = "index = [self.rollout.rows.index(row) for row in wanted]"
    rewrite(experience.Experience, "at", (old, "index = list(range(len(wanted)))"))


def log_sum_exp_from_the_own_maximum_on() -> None:
    """Old log-probs are normalised by each TP rank relative to its own maximum: ranks differ by rounding.

    No upstream commit; the class of volcengine/verl#6280, log-probs that depend on who computes them.
    minimal: world=2 tp=2
    """
    wrap(readings, "token_logp", _own_log_probs)


def _own_log_probs(original: Callable, batch: Any, logits_RCV: torch.Tensor, temperature: float) -> torch.Tensor:
    if torch.is_grad_enabled():
        return original(batch, logits_RCV, temperature)  # type: ignore[no-any-return]
    group, scaled = batch.groups.tp, logits_RCV / temperature
    parts = [torch.empty_like(scaled) for _ in range(group.size())]
    dist.all_gather(parts, scaled.contiguous(), group=group)
    top = scaled.amax(-1, keepdim=True)
    total = sum((part - top).exp().sum(-1, keepdim=True) for part in parts)
    logp_RCV = torch.cat(parts, -1) - top - torch.log(total)  # type: ignore[arg-type]
    labels = {"labels": batch.tokens_RW.roll(-1, dims=1)}
    labels = own_share(labels, batch.groups.cp)["labels"]
    return readings._at_states(batch, logp_RCV.gather(2, labels[..., None]).squeeze(2))


# ---- values, rewards, advantages -------------------------------------------------------------------------------


def values_one_late() -> None:
    """A value is read at the response token itself instead of at the state before it.

    volcengine/verl#1850, commit aa11dd19b: the critic's mask off by one.
    minimal: world=1
    """

    def around(original: Callable, batch: Any, output_RC1: torch.Tensor) -> torch.Tensor:
        own, index = readings._own(batch, batch.states_RT + 1)
        return torch.where(batch.mask_RT & own, output_RC1.squeeze(-1).gather(1, index), 0.0)

    wrap(readings, "token_values", around)


def values_not_masked() -> None:
    """Values of padding and of the environment's tokens go into advantages and returns.

    alibaba/ROLL#447, volcengine/verl#50, commit c7534db2d.
    minimal: world=1
    """

    def around(original: Callable, batch: Any, output_RC1: torch.Tensor) -> torch.Tensor:
        return original(replace(batch, mask_RT=torch.ones_like(batch.mask_RT)), output_RC1)  # type: ignore[no-any-return]

    wrap(readings, "token_values", around)


def scores_read_at_padding() -> None:
    """The reward is read at the last column, not at the last token of each row.

    volcengine/verl#1411, commit a43ead6f8: the wrong tokens are scored.
    minimal: world=1
    """

    def around(original: Callable, batch: Any, output_RC1: torch.Tensor) -> torch.Tensor:
        whole = torch.full_like(batch.responses_R, batch.tokens_RW.shape[1])
        return original(replace(batch, responses_R=whole - batch.prompts_R), output_RC1)  # type: ignore[no-any-return]

    wrap(readings, "last_score", around)


def kl_penalty_is_a_bonus() -> None:
    """The in-reward KL penalty has the wrong sign.

    volcengine/verl#179, commit a65c9157b.
    minimal: world=1
    """
    rewrite(experience, "token_rewards", ("rewards = -kl_coef *", "rewards = kl_coef *"))


def gae_steps_through_holes() -> None:
    """The environment's tokens are steps of their own in GAE: discounted, with a TD error.

    volcengine/verl#2337, commit 033286685.
    minimal: world=1
    """
    carried = "carried = torch.where(mask_RT[:, j], delta + gamma * lam * carried, carried)"
    following = "following = torch.where(mask_RT[:, j], values_RT[:, j], following)"
    stepping = (carried, "carried = delta + gamma * lam * carried"), (following, "following = values_RT[:, j]")
    rewrite(experience, "gae", *stepping)


def whitened_per_dp_rank() -> None:
    """Advantages are whitened with the moments of the own DP rank's rows.

    The invariant of volcengine/verl's distributed masked mean (utils/torch_functional.py), left out.
    minimal: world=2
    """

    def around(original: Callable, advantages: torch.Tensor, *others: Any) -> torch.Tensor:
        whole = experience.global_sum
        experience.global_sum = lambda tensor, dp: tensor.sum()
        try:
            return original(advantages, *others)  # type: ignore[no-any-return]
        finally:
            experience.global_sum = whole

    wrap(experience, "whiten", around)


def whitening_mean_unmasked() -> None:
    """The mean of whitening is over all cells, the variance over the masked-in ones.

    NovaSky-AI/SkyRL#1305 and #1782.
    minimal: world=1
    """
    old = "mean = global_sum(torch.where(mask_RT, advantages_RT, 0.0), dp) / count"
    new = "mean = global_sum(advantages_RT, dp) / global_sum(torch.ones_like(advantages_RT), dp)"
    rewrite(experience, "whiten", (old, new))
