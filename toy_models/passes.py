"""Forward passes of the trainer on megatron-core: rows through a role's schedule, answers on all ranks.

Knows the roles of `toy_models.megatron`; knows no PPO. Shapes: R rows of this DP rank, W padded width, T greatest
response. Only the last stage of a pipeline sees outputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from toy_models import batching
from toy_models.megatron import Role
from toy_models.releases import P2PCommunicator, ProcessGroupCollection, own_share, schedule_of


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

    def to(self, device: Any) -> "Rollout":
        """The same on a device; itself where it is there."""
        names = ("tokens_RW", "mask_RT", "prompts_R", "responses_R")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    @property
    def states_RT(self) -> torch.Tensor:
        """Sequence position from which response token j is predicted, P + j - 1; clamped where there is none."""
        steps = torch.arange(self.mask_RT.shape[1], device=self.mask_RT.device)
        return (self.prompts_R[:, None] + steps - 1).clamp(max=self.tokens_RW.shape[1] - 2)


def _step(batches: Any, module: torch.nn.Module, read: Callable, role: Role) -> tuple[torch.Tensor, Callable]:
    """megatron's forward_step_func: next micro-batch through a model chunk, and how to read the last one's output."""
    batch: Rollout = next(batches)
    positions_RW = _positions(batch).expand_as(batch.tokens_RW)
    inputs = {"input_ids": batch.tokens_RW, "position_ids": positions_RW, "padding_mask": _padding(batch, role)}
    own = own_share(inputs, role.groups.cp)
    gpt = module.module if role.optimizer else module
    if role.switches.decoder_input and role.optimizer and gpt.pre_process:  # type: ignore[union-attr]
        own["decoder_input"] = gpt.embedding(own["input_ids"], own["position_ids"])  # type: ignore[union-attr,operator]
    return module(attention_mask=None, **own), partial(read, batch)


def _positions(batch: Rollout) -> torch.Tensor:
    return torch.arange(batch.tokens_RW.shape[1], device=batch.tokens_RW.device)


def _padding(batch: Rollout, role: Role) -> torch.Tensor | None:
    """True where a row has ended [R, W], as GPTModel asks for; or nowhere; or None."""
    ends_R1 = (batch.prompts_R + batch.responses_R)[:, None]
    marked = {"padding": _positions(batch) >= ends_R1, "all_false": ends_R1 < 0}
    return (
        marked[role.switches.padding_mask].expand_as(batch.tokens_RW) if role.switches.padding_mask in marked else None
    )


def scheduled(role: Role, batches: Sequence[Rollout], read: Callable, *, forward_only: bool) -> list[Any]:
    """What `read` returns beside the loss, per micro-batch; nothing on all stages but the last."""
    layout, iterators = role.layout, [iter(batches) for _ in role.chunks]
    schedule = schedule_of(layout.pp, layout.vpp if layout.vpp > 1 else None)
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


def evaluate(
    case: Any, role: Role, rollout: Rollout, read: Callable[[Rollout, torch.Tensor], Any], *shape: int
) -> torch.Tensor:
    """What `read` says of every row, [R, *shape], on all ranks: forward only, in eval mode, without autograd."""

    def reading(batch: Rollout, output: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return output.new_zeros(()), read(batch, output)

    rollout, dtype = rollout.to(torch.cuda.current_device()), role.config.params_dtype
    for chunk in role.chunks:
        if chunk.training:
            chunk.eval()
    with torch.no_grad():
        found = [x for some in _passes(case, rollout) for x in scheduled(role, some, reading, forward_only=True)]
        own = torch.cat(found) if found else rollout.mask_RT.new_empty(len(rollout.rows), *shape, dtype=dtype)
        whole = everywhere(own.contiguous(), role.groups.cp if found else None, role.groups.pp)
        return whole if role.config.sequence_parallel else _of_first(whole, role.groups.tp)


def _of_first(own: torch.Tensor, tp: dist.ProcessGroup) -> torch.Tensor:
    """What the first TP rank has: without sequence parallelism experts compute each rank's copy of a token apart, and
    the copies differ by rounding, by which replicas of the actor would come to differ.
    """
    if tp.size() > 1:
        dist.broadcast(own, dist.get_process_group_ranks(tp)[0], group=tp)
    return own


def everywhere(own: torch.Tensor, sharing: dist.ProcessGroup | None, stages: dist.ProcessGroup) -> torch.Tensor:
    """Summed over those that share it, on the last stage; from there to all stages."""
    if sharing is not None and sharing.size() > 1:
        dist.all_reduce(own, group=sharing)
    if stages.size() > 1:
        dist.broadcast(own, dist.get_process_group_ranks(stages)[-1], group=stages)
    return own
