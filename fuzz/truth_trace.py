"""Runs the traced reference inside a process of its own, and measures how far each module moves under a nudge.

Knows the traced reference by name and nothing of laws, ranks or megatron-core. As `fuzz.truth`, module by module.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fuzz.case import Case
from fuzz.truth import ULP
from toy_models import reference_trace


def run(progress: Callable[[str], None], case: Case) -> dict[str, Any]:
    """The reference's first step by module, and numbers `moved/KEY`: by how much each tensor moves under a nudge.

    That is the greatest of three: all weights one unit in the last place up or down, the same turned around, and the
    step computed in float32 (for float64 scaled by the ratio of the units). The rollout keeps its tokens.
    """
    progress("traced reference")
    base, ulp = reference_trace.run(case), ULP[case.precision]
    given = base["tensors"]["0/tokens"], base["tensors"]["0/mask"]
    moved = [_gaps(base, reference_trace.run(case, sign * ulp, given), 1.0) for sign in (1, -1)]
    moved.append(_gaps(base, reference_trace.run(case, 0.0, given, torch.float32), ulp / ULP["float32"]))
    return {**base, "numbers": base["numbers"] | {f"moved/{key}": max(m[key] for m in moved) for key in moved[0]}}


def _gaps(base: Mapping[str, Any], moved: Mapping[str, Any], share: float) -> dict[str, float]:
    pairs = [(k, v, moved[kind][k]) for kind in ("tensors", "numbers") for k, v in base[kind].items()]
    return {key: share * _gap(before, after) for key, before, after in pairs if "margin" not in key}


def _gap(before: Any, after: Any) -> float:
    gap = torch.as_tensor(before, dtype=torch.float64) - torch.as_tensor(after, dtype=torch.float64)
    return float(gap.abs().max()) if gap.numel() else 0.0
