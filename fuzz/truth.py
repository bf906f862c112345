"""Runs the one-process reference inside a process of its own, and measures how far it moves under a nudge.

Knows the reference by name and nothing of laws, ranks or megatron-core.
"""

import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch

from fuzz.case import Case
from toy_models import reference

ULP = {"float64": 2.0**-52, "float32": 2.0**-23}
ROUNDED = 2.0**-24  # the relative error of a number that was rounded to float32


@lru_cache(maxsize=4)
def _run(case: Case) -> dict[str, Any]:
    return reference.run(case)


def run(progress: Callable[[str], None], case: Case) -> dict[str, Any]:
    """The truth for a case, under the keys of `docs/ppo.md`."""
    progress("reference")
    began = time.perf_counter()
    return _run(case) | {"seconds": {"reference": time.perf_counter() - began}}


def movement(progress: Callable[[str], None], case: Case) -> dict[str, Any]:
    """Numbers `moved/KEY`: how far each tensor moves when everything moves by one unit in the last place.

    The greatest of four: every weight moved up or down, the same turned around, the reference itself computed in
    float32 (for float64 scaled by the ratio of the units), which moves intermediate results too, so that it sees
    cancellation that weights alone do not, and the gradients of the actor's logits moved by the rounding of the softmax
    (`reference_update.softmax_rounding`), which none of these moves where a policy is all but certain. Where gradients
    are clipped also of two with the clip coefficients moved by float32's rounding, as megatron-core accumulates their
    norm in float32 in any precision: all alike, which moves SGD most, and in turns, since Adam does not feel a factor
    common to all steps. The rollouts keep their tokens.
    """
    progress("movement")
    base, ulp = _run(case), ULP[case.precision]
    tokens, mask = ([base["tensors"][f"{i}/{name}"] for i in _iterations(base)] for name in ("tokens", "mask"))
    runs = [(reference.run(case, sign * ulp, tokens, mask), 1.0) for sign in (1, -1)]
    runs.append((reference.run(case, 0.0, tokens, mask, dtype=torch.float32), ulp / ULP["float32"]))
    runs.append((reference.run(case, 0.0, tokens, mask, logit_nudge=ulp), 1.0))
    for second in (ROUNDED, -ROUNDED) if case.ppo.max_norm else ():
        runs.append((reference.run(case, 0.0, tokens, mask, clip_nudges=(ROUNDED, second)), 1.0))
    gaps = [{key: gap * share for key, gap in _gaps(base, moved).items()} for moved, share in runs]
    return {"numbers": {f"moved/{key}": max(gap[key] for gap in gaps) for key in gaps[0]}}


def _iterations(base: Mapping[str, Any]) -> range:
    return range(sum(key.endswith("/tokens") for key in base["tensors"]))


def _gaps(base: Mapping[str, Any], nudged: Mapping[str, Any]) -> dict[str, float]:
    pairs = [(k, v, nudged[kind][k]) for kind in ("tensors", "numbers") for k, v in base[kind].items()]
    return {key: _gap(before, after) for key, before, after in pairs if "/margin" not in key}


def _gap(before: Any, after: Any) -> float:
    gap = torch.as_tensor(before, dtype=torch.float64) - torch.as_tensor(after, dtype=torch.float64)
    return float(gap.abs().max()) if gap.numel() else 0.0
