"""One PPO iteration on megatron-core, as plain functions: rollout, experience, advantages, updates.

Written from `docs/ppo.md`, which has every formula. Knows the four roles of `toy_models.megatron`; knows nothing of the
fuzzer or of the reference. Shapes: R rows of this DP rank, W padded width, T greatest response, V vocabulary. Only the
last stage of a pipeline sees outputs; under context parallelism C = W/CP of the positions are a rank's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.utils import get_batch_on_this_cp_rank

from toy_models import batching
from toy_models.megatron import Role

Roles = Mapping[str, Role]
# Newer versions also cut sequences of which each has a CP size of its own, and ask whether to.
NO_HYBRID = {"is_hybrid_cp": False} if "is_hybrid_cp" in signature(get_batch_on_this_cp_rank).parameters else {}
Watch = Callable[[str, Role, int, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Rollout:
    """Sequences of this DP rank's rows, `rows` naming them: tokens_RW, mask_RT (1 where sampled), lengths in tokens.

    `groups` are the process groups that share them.
    """

    groups: ProcessGroupCollection
    rows: tuple[int, ...]
    tokens_RW: torch.Tensor
    mask_RT: torch.Tensor
    prompts_R: torch.Tensor
    responses_R: torch.Tensor

    def take(self, wanted: Sequence[int]) -> "Rollout":
        """The same for some of the rows."""
        at = [self.rows.index(row) for row in wanted]
        parts = (self.tokens_RW, self.mask_RT, self.prompts_R, self.responses_R)
        return Rollout(self.groups, tuple(wanted), *(part[at] for part in parts))

    @property
    def states_RT(self) -> torch.Tensor:
        """Sequence position from which response token j is predicted, P + j - 1; clamped where there is none."""
        steps = torch.arange(self.mask_RT.shape[1])
        return (self.prompts_R[:, None] + steps - 1).clamp(max=self.tokens_RW.shape[1] - 2)


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


# ---- forward passes -------------------------------------------------------------------------------------------


def _step(batches: Any, module: torch.nn.Module, read: Callable, role: Role) -> tuple[torch.Tensor, Callable]:
    """megatron's forward_step_func: next micro-batch through a model chunk, and how to read the last one's output."""
    batch: Rollout = next(batches)
    positions_RW = torch.arange(batch.tokens_RW.shape[1]).expand_as(batch.tokens_RW)
    inputs = {"input_ids": batch.tokens_RW, "position_ids": positions_RW, "padding_mask": _padding(batch, role)}
    own = get_batch_on_this_cp_rank(inputs, cp_group=role.groups.cp, **NO_HYBRID)
    gpt = module.module if role.optimizer else module
    if role.switches.decoder_input and role.optimizer and gpt.pre_process:  # type: ignore[union-attr]
        own["decoder_input"] = gpt.embedding(own["input_ids"], own["position_ids"])  # type: ignore[union-attr,operator]
    return module(attention_mask=None, **own), partial(read, batch)


def _padding(batch: Rollout, role: Role) -> torch.Tensor | None:
    """True where a row has ended [R, W], as GPTModel asks for; or nowhere; or None."""
    ends_R1 = (batch.prompts_R + batch.responses_R)[:, None]
    marked = {"padding": torch.arange(batch.tokens_RW.shape[1]) >= ends_R1, "all_false": ends_R1 < 0}
    return (
        marked[role.switches.padding_mask].expand_as(batch.tokens_RW) if role.switches.padding_mask in marked else None
    )


def _schedule(role: Role, batches: Sequence[Rollout], read: Callable, *, forward_only: bool) -> list[Any]:
    """What `read` returns beside the loss, per micro-batch; nothing on all stages but the last."""
    layout, iterators = role.layout, [iter(batches) for _ in role.chunks]
    schedule = get_forward_backward_func(layout.pp, layout.vpp if layout.vpp > 1 else None)
    return schedule(  # type: ignore[no-any-return]
        forward_step_func=partial(_step, read=read, role=role),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=role.chunks if len(iterators) > 1 else role.chunks[0],
        num_microbatches=len(batches),
        seq_length=batches[0].tokens_RW.shape[1],
        micro_batch_size=len(batches[0].rows),
        forward_only=forward_only,
        **_explicit(role),
    )


def _explicit(role: Role) -> dict[str, Any]:
    """The groups as arguments of a schedule, where they are not to be taken from parallel_state."""
    if role.switches.groups == "global":
        return {}
    return {"pg_collection": role.groups, "p2p_communicator": P2PCommunicator(role.groups.pp, role.config)}


def _passes(case: Any, rollout: Rollout) -> list[list[Rollout]]:
    """All rows at once; as they are trained for virtual stages, whose schedule needs several micro-batches, and where
    experts have a capacity: whom they drop depends on which rows run together.
    """
    if case.layout.vpp == 1 and not case.model.capacity:
        return [[rollout]]
    dp_rank, parts = rollout.groups.dp.rank(), batching.partition(case.layout, case.batch, case.ppo)
    return [[rollout.take(micro) for micro in shares[dp_rank]] for shares in parts.micro]


def _evaluate(
    case: Any, role: Role, rollout: Rollout, read: Callable[[Rollout, torch.Tensor], Any], *shape: int
) -> torch.Tensor:
    """What `read` says of every row, [R, *shape], on all ranks: forward only, in eval mode, without autograd."""

    def reading(batch: Rollout, output: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return output.new_zeros(()), read(batch, output)

    for chunk in role.chunks:
        if chunk.training:
            chunk.eval()
    with torch.no_grad():
        found = [x for some in _passes(case, rollout) for x in _schedule(role, some, reading, forward_only=True)]
        own = torch.cat(found) if found else torch.empty(len(rollout.rows), *shape, dtype=role.config.params_dtype)
        whole = _everywhere(own.contiguous(), role.groups.cp if found else None, role.groups.pp)
        return whole if role.config.sequence_parallel else _of_first(whole, role.groups.tp)


def _of_first(own: torch.Tensor, tp: dist.ProcessGroup) -> torch.Tensor:
    """What the first TP rank has: without sequence parallelism experts compute each rank's copy of a token apart, and
    the copies differ by rounding, by which replicas of the actor would come to differ.
    """
    if tp.size() > 1:
        dist.broadcast(own, dist.get_process_group_ranks(tp)[0], group=tp)
    return own


def _everywhere(own: torch.Tensor, sharing: dist.ProcessGroup | None, stages: dist.ProcessGroup) -> torch.Tensor:
    """Summed over those that share it, on the last stage; from there to all stages."""
    if sharing is not None and sharing.size() > 1:
        dist.all_reduce(own, group=sharing)
    if stages.size() > 1:
        dist.broadcast(own, dist.get_process_group_ranks(stages)[-1], group=stages)
    return own


def _own(batch: Rollout, at_RT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of these sequence positions are this context-parallel rank's own, and where among them they lie."""
    cp = batch.groups.cp
    places = batching.chunk_positions(batch.tokens_RW.shape[1], cp.size(), cp.rank())
    where_W = torch.full(batch.tokens_RW.shape[1:], -1)
    where_W[places] = torch.arange(len(places))
    return where_W[at_RT] >= 0, where_W[at_RT].clamp(min=0)


def trained(batch: Rollout) -> torch.Tensor:
    """The response tokens [R, T] that were sampled and are predicted from positions of this rank's own."""
    return batch.mask_RT & _own(batch, batch.states_RT)[0]


def _at_states(batch: Rollout, x_RC: torch.Tensor) -> torch.Tensor:
    """What stands where each response token is predicted [R, T], zero where masked or another rank's."""
    own, index = _own(batch, batch.states_RT)
    return torch.where(batch.mask_RT & own, x_RC.gather(1, index), 0.0)


def token_logp(batch: Rollout, logits_RCV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities [R, T] of the response tokens from vocab-parallel logits, zero where masked."""
    own = {"labels": batch.tokens_RW.roll(-1, dims=1)}
    own = get_batch_on_this_cp_rank(own, cp_group=batch.groups.cp, **NO_HYBRID)
    scaled = (logits_RCV / temperature).transpose(0, 1).contiguous()
    return _at_states(batch, -vocab_parallel_cross_entropy(scaled, own["labels"].t().contiguous()).t())


def token_entropy(batch: Rollout, logits_RCV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Entropies [R, T] of the sampling distributions from vocab-parallel logits, zero where masked.

    As a sum of -p·log p: log(total) - moment/total loses all digits where a policy is all but certain.
    """
    scaled, tp = logits_RCV / temperature, batch.groups.tp
    top = scaled.detach().amax(-1)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tp)
    shifted = scaled - top[..., None]
    total = reduce_from_tensor_model_parallel_region(shifted.exp().sum(-1), tp)
    total = copy_to_tensor_model_parallel_region(total, tp)  # each rank goes on with its part of the vocabulary
    logp = shifted - total.log()[..., None]
    return _at_states(batch, -reduce_from_tensor_model_parallel_region((logp.exp() * logp).sum(-1), tp))


def token_values(batch: Rollout, output_RC1: torch.Tensor) -> torch.Tensor:
    """The critic's values [R, T] of the states before the response tokens, zero where masked."""
    return _at_states(batch, output_RC1.squeeze(-1))


def _at_last(batch: Rollout, x_RCF: torch.Tensor) -> torch.Tensor:
    """What stands at the last token of each row [R, F]; zero where that is another rank's."""
    own, index = _own(batch, (batch.prompts_R + batch.responses_R - 1)[:, None])
    return torch.where(own, x_RCF.gather(1, index[..., None].expand(-1, 1, x_RCF.shape[2])).squeeze(1), 0.0)


def last_score(batch: Rollout, output_RC1: torch.Tensor) -> torch.Tensor:
    """The reward model's output [R] at the last token of each row."""
    return _at_last(batch, output_RC1).squeeze(1)


# ---- rollout --------------------------------------------------------------------------------------------------


def _prompts(case: Any, groups: ProcessGroupCollection, iteration: int) -> Rollout:
    batch, pad = case.batch, batching.pad_token(case.model, case.batch)
    rows = batching.partition(case.layout, batch, case.ppo).rows_of(groups.dp.rank())
    prompts = batching.prompt_tokens(case.model, batch, case.seed, iteration)
    tokens = torch.full((len(rows), batching.padded_width(case.layout, batch)), pad)
    for i, row in enumerate(rows):
        tokens[i, : len(prompts[row])] = torch.tensor(prompts[row])
    lengths = torch.tensor([len(prompts[row]) for row in rows])
    mask = torch.zeros(len(rows), batch.response, dtype=torch.bool)
    return Rollout(groups, rows, tokens, mask, lengths, torch.zeros_like(lengths))


def sample(logits_RV: torch.Tensor, uniforms: Sequence[float], temperature: float) -> torch.Tensor:
    """Inverse CDF in float64: the first token whose cumulative probability exceeds the uniform."""
    probabilities = torch.softmax(logits_RV.double() / temperature, dim=-1)
    exceeds = probabilities.cumsum(-1) > torch.tensor(uniforms, dtype=torch.float64)[:, None]
    last = logits_RV.shape[1] - 1 - (probabilities > 0).flip(1).int().argmax(1)
    first = torch.where(exceeds.any(1), exceeds.int().argmax(1), last)
    return torch.minimum(first, last)


def _last_logits(batch: Rollout, logits_RCV: torch.Tensor) -> torch.Tensor:
    return gather_from_tensor_model_parallel_region(_at_last(batch, logits_RCV).contiguous(), batch.groups.tp)


def _put(case: Any, rollout: Rollout, drawn_R: torch.Tensor, position: int, iteration: int, forced: Mapping) -> None:
    """Append one token, in place, to every row that has not sampled the end nor met its limit."""
    limits = batching.response_limits(case.batch, case.seed)
    for i, row in enumerate(rollout.rows):
        if not _goes_on(case, rollout, i, position, limits[row]):
            continue
        observed = batching.forced_token(case.model, case.batch, case.seed, iteration, row, position)
        token = forced.get((row, position), int(drawn_R[i])) if observed is None else observed
        rollout.tokens_RW[i, rollout.prompts_R[i] + position] = token
        rollout.mask_RT[i, position] = observed is None
        rollout.responses_R[i] = position + 1


def _goes_on(case: Any, rollout: Rollout, i: int, position: int, limit: int) -> bool:
    if rollout.responses_R[i] < position or position >= limit:
        return False
    last = rollout.tokens_RW[i, rollout.prompts_R[i] + position - 1]
    ended = position > 0 and bool(rollout.mask_RT[i, position - 1]) and last == batching.end_token(case.model)
    return not ended


def roll_out(case: Any, actor: Role, iteration: int, forced: Mapping[tuple[int, int], int]) -> Rollout:
    """Sample responses from the sharded actor. `forced` (row, position) -> token overrides single samples.

    All ranks call the model equally often: experts serve the rows of other DP ranks, so a rank whose rows have
    ended goes on until the longest row of all has.
    """
    rollout = _prompts(case, actor.groups, iteration)
    for position in range(max(batching.response_limits(case.batch, case.seed))):
        logits_RV = _evaluate(case, actor, rollout, _last_logits, case.model.vocab)
        uniforms = [batching.uniform("sample", case.seed, iteration, row, position) for row in rollout.rows]
        _put(case, rollout, sample(logits_RV, uniforms, case.ppo.temperature), position, iteration, forced)
    return rollout


# ---- experience -----------------------------------------------------------------------------------------------


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


def _global_sum(tensor: torch.Tensor, dp: dist.ProcessGroup) -> torch.Tensor:
    total = tensor.sum()
    dist.all_reduce(total, group=dp)
    return total


def whiten(advantages_RT: torch.Tensor, mask_RT: torch.Tensor, dp: dist.ProcessGroup) -> torch.Tensor:
    """Mean 0 and variance 1 over the masked-in tokens of the whole batch, on all DP ranks."""
    count = _global_sum(mask_RT.to(advantages_RT.dtype), dp)
    mean = _global_sum(torch.where(mask_RT, advantages_RT, 0.0), dp) / count
    centred = torch.where(mask_RT, advantages_RT - mean, 0.0)
    variance = _global_sum(centred**2, dp) / count
    return centred / (variance + 1e-8).sqrt()


def gather_experience(case: Any, roles: Roles, rollout: Rollout) -> Experience:
    """Log-probs, values and scores of a rollout with today's weights, all rows at once; then rewards and advantages."""
    logp = partial(token_logp, temperature=case.ppo.temperature)
    reads: dict[str, tuple[str, Callable[[Rollout, torch.Tensor], Any]]] = {
        "old_logp": ("actor", logp),
        "ref_logp": ("reference", logp),
        "values": ("critic", token_values),
        "scores": ("reward", last_score),
    }
    tokens = {name: rollout.mask_RT.shape[1:] for name in ("old_logp", "ref_logp", "values")}
    found = {
        name: _evaluate(case, roles[role], rollout, read, *tokens.get(name, ())) for name, (role, read) in reads.items()
    }
    found["rewards"] = token_rewards(found, rollout, case.ppo.kl_coef)
    settings = (case.ppo.gamma, case.ppo.lam)
    found["advantages"], found["returns"] = gae(found["rewards"], found["values"], rollout.mask_RT, *settings)
    if case.ppo.whiten:
        found["advantages"] = whiten(found["advantages"], rollout.mask_RT, rollout.groups.dp)
    return Experience(rollout, **found)


# ---- update ---------------------------------------------------------------------------------------------------


def _reduced(sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().sum() for name, tensor in sums.items()}


def _actor_loss(
    case: Any, experience: Experience, scale: float, batch: Rollout, logits_RCV: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Any]]:
    ppo, mask = case.ppo, trained(batch)
    advantages, old = experience.at("advantages", batch.rows), experience.at("old_logp", batch.rows)
    entropy = token_entropy(batch, logits_RCV, ppo.temperature)
    logp = token_logp(batch, logits_RCV, ppo.temperature)
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
    clip, mask = case.ppo.value_clip, trained(batch)
    returns, old = experience.at("returns", batch.rows), experience.at("values", batch.rows)
    values = token_values(batch, output_RC1)
    clipped = old + (values - old).clamp(-clip, clip)
    loss = torch.where(mask, 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), 0.0)
    sums = {"value_loss": loss, "value_clip_fraction": (mask & ((values - old).abs() > clip)).to(loss.dtype)}
    return loss.sum() * scale, {"sums": _reduced(sums)}


LOSSES = {"actor": _actor_loss, "critic": _critic_loss}
METRICS = {
    "actor": ("policy_loss", "entropy", "approx_kl", "clip_fraction"),
    "critic": ("value_loss", "value_clip_fraction"),
}


def _metrics(role: Role, reports: Sequence[Mapping[str, Any]], tokens: torch.Tensor) -> dict[str, float]:
    """Sums over this rank's micro-batches, over DP and CP, per masked-in token of the mini-batch; on all stages."""
    names = METRICS[role.name]
    totals = torch.zeros(len(names), dtype=tokens.dtype)
    for report in reports:
        totals += torch.stack([report["sums"][name] for name in names])
    _everywhere(totals, role.groups.dp_cp if role.last else None, role.groups.pp)
    return dict(zip(names, (totals / tokens).tolist(), strict=True))


def _train(
    case: Any, role: Role, experience: Experience, rows: Sequence[Sequence[int]], watch: Watch, step: int
) -> dict:
    """One optimizer step of one role on one mini-batch; its metrics. `watch` sees gradients, then what the step did."""
    assert role.optimizer and role.scheduler
    batches = [experience.rollout.take(micro) for micro in rows]
    tokens = _global_sum(torch.cat([batch.mask_RT for batch in batches]).to(experience.values.dtype), role.groups.dp)
    # The schedule divides by the number of micro-batches and DDP averages over DP; the loss is per token of both.
    scale = len(batches) * role.groups.dp.size() / float(tokens)
    for chunk in role.chunks:
        chunk.train()
        chunk.zero_grad_buffer()  # type: ignore[operator]
    role.optimizer.zero_grad()
    loss = partial(LOSSES[role.name], case, experience, scale)
    reports = _schedule(role, batches, loss, forward_only=False)
    watch("gradients", role, step, {})
    _, norm, _ = role.optimizer.step()
    role.scheduler.step(1)
    metrics = _metrics(role, reports, tokens) | {f"{role.name}_norm": float(norm)}
    watch("stepped", role, step, {**metrics, "reports": reports})
    return metrics


def update(case: Any, roles: Roles, experience: Experience, watch: Watch) -> list[dict[str, float]]:
    """All epochs over all mini-batches, one optimizer step of actor and critic each; metrics of every step."""
    parts = batching.partition(case.layout, case.batch, case.ppo)
    dp_rank = roles["actor"].groups.dp.rank()
    history = []
    for step in range(case.ppo.epochs * case.ppo.mini_batches):
        rows = parts.micro[step % case.ppo.mini_batches][dp_rank]
        metrics: dict[str, float] = {}
        for name in ("actor", "critic"):
            metrics |= _train(case, roles[name], experience, rows, watch, step)
        history.append(metrics)
    return history
