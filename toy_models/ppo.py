"""PPO's update on megatron-core, as plain functions: losses, optimizer steps, metrics.

Written from `docs/ppo.md`, which has every formula. Knows the four roles of `toy_models.megatron`; knows nothing of the
fuzzer or of the reference. Shapes: R rows of this DP rank, T greatest response, V vocabulary; under context parallelism
C = W/CP of the positions are a rank's own.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from toy_models import batching, readings
from toy_models.experience import Experience, Roles, global_sum
from toy_models.megatron import Role
from toy_models.passes import Rollout, everywhere, scheduled

Watch = Callable[[str, Role, int, Mapping[str, Any]], None]


def _reduced(sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().sum() for name, tensor in sums.items()}


def _actor_loss(
    case: Any, experience: Experience, scale: float, batch: Rollout, logits_RCV: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Any]]:
    ppo, mask = case.ppo, readings.trained(batch)
    advantages, old = experience.at("advantages", batch.rows), experience.at("old_logp", batch.rows)
    entropy = readings.token_entropy(batch, logits_RCV, ppo.temperature)
    logp = readings.token_logp(batch, logits_RCV, ppo.temperature)
    ratio = torch.where(mask, logp - old, 0.0).exp()
    clipped = ratio.clamp(1 - ppo.clip_eps, 1 + ppo.clip_eps)
    policy = torch.where(mask, torch.maximum(-advantages * ratio, -advantages * clipped), 0.0)
    loss = (policy - ppo.entropy_coef * entropy).sum() * scale
    sums = {
        "policy_loss": policy,
        "entropy": entropy,
        "approx_kl": torch.where(mask, old - logp, 0.0),
        "clip_fraction": (mask & ((ratio - 1).abs() > ppo.clip_eps)).to(loss.dtype),
    }
    return loss, {"sums": _reduced(sums), "rows": batch.rows, "logp": logp.detach()}


def _critic_loss(
    case: Any, experience: Experience, scale: float, batch: Rollout, output_RC1: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Any]]:
    clip, mask = case.ppo.value_clip, readings.trained(batch)
    returns, old = experience.at("returns", batch.rows), experience.at("values", batch.rows)
    values = readings.token_values(batch, output_RC1)
    clipped = old + (values - old).clamp(-clip, clip)
    loss = torch.where(mask, 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), 0.0)
    sums = {"value_loss": loss, "value_clip_fraction": (mask & ((values - old).abs() > clip)).to(loss.dtype)}
    return loss.sum() * scale, {"sums": _reduced(sums)}


def _counted(loss: Callable, batch: Rollout, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """The loss with its number of tokens, by which megatron divides gradients when it has all of them."""
    total, report = loss(batch, output)
    return total, readings.trained(batch).sum().int(), report


LOSSES = {"actor": _actor_loss, "critic": _critic_loss}
METRICS = {
    "actor": ("policy_loss", "entropy", "approx_kl", "clip_fraction"),
    "critic": ("value_loss", "value_clip_fraction"),
}


def _metrics(role: Role, reports: Sequence[Mapping[str, Any]], tokens: torch.Tensor) -> dict[str, float]:
    """Sums over this rank's micro-batches, over DP and CP, per masked-in token of the mini-batch; on all stages."""
    names = METRICS[role.name]
    totals = tokens.new_zeros(len(names))
    for report in reports:
        totals += torch.stack([report["sums"][name] for name in names])
    everywhere(totals, role.groups.dp_cp if role.last else None, role.groups.pp)
    return dict(zip(names, (totals / tokens).tolist(), strict=True))


def _train(
    case: Any, role: Role, experience: Experience, rows: Sequence[Sequence[int]], watch: Watch, step: int
) -> dict:
    """One optimizer step of one role on one mini-batch; its metrics.

    `watch` sees gradients, what the step did, and weights: those of the last step where gathers overlap.
    """
    assert role.optimizer and role.scheduler
    batches = [experience.rollout.take(micro) for micro in rows]
    tokens = global_sum(torch.cat([batch.mask_RT for batch in batches]).to(experience.values.dtype), role.groups.dp)
    # The schedule divides by the number of micro-batches and DDP averages over DP; the loss is per token of both.
    scale = 1.0 if role.switches.per_token else len(batches) * role.groups.dp.size() / float(tokens)
    for chunk in role.chunks:
        chunk.train()
        chunk.zero_grad_buffer()  # type: ignore[operator]
    role.optimizer.zero_grad()
    loss: Callable[..., Any] = partial(LOSSES[role.name], case, experience, scale)
    loss = partial(_counted, loss) if role.switches.per_token else loss
    reports = scheduled(role, batches, loss, forward_only=False)
    if role.switches.overlap_gather and step > 0:
        watch("weights", role, step - 1, {})  # gathered by this forward pass
    watch("gradients", role, step, {})
    _, norm, zeros = role.optimizer.step()
    role.scheduler.step(1)
    metrics = _metrics(role, reports, tokens) | {f"{role.name}_norm": float(norm)}
    if role.switches.count_zeros:
        metrics[f"{role.name}_zeros"] = float(zeros)
    watch("stepped", role, step, {**metrics, "reports": reports})
    if not role.switches.overlap_gather:
        watch("weights", role, step, {})
    return metrics


def update(case: Any, roles: Roles, experience: Experience, watch: Watch) -> list[dict[str, float]]:
    """All epochs over all mini-batches, one optimizer step of actor and critic each; metrics of every step."""
    parts = batching.partition(case.layout, case.batch, case.ppo)
    dp_rank = roles["actor"].groups.dp.rank()
    trained, history = [roles[name] for name in ("actor", "critic")], []
    for role in trained:
        role.wake()
    for step in range(case.ppo.epochs * case.ppo.mini_batches):
        rows = parts.micro[step % case.ppo.mini_batches][dp_rank]
        metrics: dict[str, float] = {}
        for role in trained:
            metrics |= _train(case, role, experience, rows, watch, step)
        history.append(metrics)
    for role in trained:
        role.rest()
        if role.switches.overlap_gather:
            watch("weights", role, step, {})
    return history
