"""What has other names or arguments in older or newer releases of megatron-core than in 0.16.1, in one place.

Supported are those of `fuzz.known`; the others are for `bisect`. Knows signatures of megatron-core and nothing else.
What a release cannot do ends in TypeError.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank

try:
    from megatron.core.process_groups_config import ProcessGroupCollection
except ImportError:  # 0.14 and older
    from megatron.core.process_groups_config import ModelCommProcessGroups as ProcessGroupCollection
try:
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
except ImportError:  # 0.13 and older
    P2PCommunicator = None

__all__ = (
    "P2PCommunicator",
    "ProcessGroupCollection",
    "groups_of_parallel_state",
    "own_share",
    "schedule_of",
    "tp_of",
    "unless_usual",
)
_CUT = signature(get_batch_on_this_cp_rank).parameters
_SIZES = signature(get_forward_backward_func).parameters


def own_share(batch: Mapping[str, torch.Tensor | None], cp: torch.distributed.ProcessGroup) -> dict[str, Any]:
    """What this CP rank has of a micro-batch; what is None is left out, since 0.15 and older take no padding mask.

    0.15 and older take the group from parallel_state; from 0.17 on sequences may have CP sizes of their own.
    """
    given = {name: x for name, x in batch.items() if x is not None}
    if "cp_group" not in _CUT:
        return get_batch_on_this_cp_rank(given)  # type: ignore[no-any-return,call-arg]
    hybrid = {"is_hybrid_cp": False} if "is_hybrid_cp" in _CUT else {}
    return get_batch_on_this_cp_rank(given, cp_group=cp, **hybrid)  # type: ignore[no-any-return]


def schedule_of(pp: int, vpp: int | None) -> Callable[..., Any]:
    """The schedule for so many stages; TypeError where a release asks parallel_state, which has others."""
    if _SIZES:
        return get_forward_backward_func(pp, vpp)
    found = parallel_state.get_pipeline_model_parallel_world_size()
    if found != pp:
        raise TypeError(f"this release takes the schedule from parallel_state: {found} stages there, not pp={pp}")
    return get_forward_backward_func()


def unless_usual(**options: tuple[Any, Any]) -> dict[str, Any]:
    """Options that differ from what is usual, given as (value, usual value): older releases lack some of them."""
    return {name: value for name, (value, usual) in options.items() if value != usual}


def tp_of(gpt: torch.nn.Module) -> torch.distributed.ProcessGroup:
    """The TP group of a model, which 0.14 and older keep under another name or take from parallel_state."""
    groups = getattr(gpt, "pg_collection", None) or getattr(gpt, "model_comm_pgs", None)
    return groups.tp if groups else parallel_state.get_tensor_model_parallel_group()


def groups_of_parallel_state() -> ProcessGroupCollection:
    """The process groups of this rank; 0.14 and older leave data parallelism out."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if not hasattr(groups, "dp"):
        groups.dp = parallel_state.get_data_parallel_group()
        groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return groups
