"""Runs the one-process reference inside a process of its own, and measures how far it moves under a nudge.

Knows the reference by name and nothing of laws, ranks or megatron-core.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch

from fuzz.case import Case
from toy_models import reference

ULP = {"float64": 2.0**-52, "float32": 2.0**-23}


@lru_cache(maxsize=4)
def _run(case: Case) -> dict[str, Any]:
    return reference.run(case)


def run(progress: Callable[[str], None], case: Case) -> dict[str, Any]:
    """The truth for a case, under the keys of `docs/ppo.md`."""
    progress("reference")
    return _run(case)


def movement(progress: Callable[[str], None], case: Case) -> dict[str, Any]:
    """Numbers `moved/KEY`: the greatest change of each tensor when every weight moves by one unit in the last place.

    The rollouts keep their tokens.
    """
    progress("movement")
    base = _run(case)
    rollouts = [[base["tensors"][f"{i}/{name}"] for i in _iterations(base)] for name in ("tokens", "mask")]
    moved = reference.run(case, ULP[case.precision], *rollouts)
    return {"numbers": _moved(base["tensors"], moved["tensors"]) | _moved(base["numbers"], moved["numbers"])}


def _iterations(base: Mapping[str, Any]) -> range:
    return range(sum(key.endswith("/tokens") for key in base["tensors"]))


def _moved(base: Mapping[str, Any], nudged: Mapping[str, Any]) -> dict[str, float]:
    return {f"moved/{key}": _gap(value, nudged[key]) for key, value in base.items() if "/margin" not in key}


def _gap(before: Any, after: Any) -> float:
    gap = torch.as_tensor(before, dtype=torch.float64) - torch.as_tensor(after, dtype=torch.float64)
    return float(gap.abs().max()) if gap.numel() else 0.0
