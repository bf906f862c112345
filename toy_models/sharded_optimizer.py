"""What a rank holds of gradients and states under megatron's distributed optimizer: a range of each parameter.

Knows how that optimizer keeps its ranges; knows nothing of models, of canonical names or of other ranks.
"""

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

OWNED = "owned"
STATES = ("exp_avg", "exp_avg_sq")


def state(optimizer: MegatronOptimizer, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor | None:
    """Shaped as the parameter: 'owned' says which elements this rank has, a state is zero where it has none."""
    if kind not in (OWNED, *STATES):
        return None
    whole = parameter.new_zeros(parameter.numel(), dtype=torch.bool if kind == OWNED else parameter.dtype)
    for inner in optimizer.chained_optimizers:
        at = _place(inner, parameter)
        if at is not None:
            part = inner._get_model_param_range_map(parameter)["param"]
            whole[part.start : part.end] = True if kind == OWNED else _kept(inner, at, kind)
    return whole.view(parameter.shape)


def _place(inner: Any, parameter: torch.nn.Parameter) -> tuple[int, int] | None:
    """Group and index of a parameter of which this rank has a part."""
    if parameter not in getattr(inner, "model_param_gbuf_map", {}):
        return None
    groups = enumerate(inner.model_fp32_groups)
    return next((i, j) for i, group in groups for j, other in enumerate(group) if other is parameter)


def _kept(inner: Any, at: tuple[int, int], kind: str) -> torch.Tensor:
    shard = inner.shard_fp32_groups[at[0]][at[1]]
    return inner.optimizer.state[shard][kind]  # type: ignore[no-any-return]
