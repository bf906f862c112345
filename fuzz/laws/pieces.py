"""Pieces of many tensors at once: where the elements that a rank holds stand among those of the reference's tensors.

A group (`fuzz.tensors`) of a rank, say all gradients of the actor in one step, is one flat tensor, and so is the
reference's. Between the two lies an index, which the shard map gives once. Knows the shard map; judges nothing.
"""

from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch

from fuzz.case import Case, Observation
from fuzz.tensors import Group, Shapes, grouped
from toy_models import weights
from toy_models.spec import Layout, MoEModel


class Places(NamedTuple):
    """Of every element of a rank's group: where it stands in the reference's group, and in which tensor of that."""

    at: torch.Tensor
    tensor: torch.Tensor


def group(observation: Observation, name: str) -> Group:
    """All tensors of a group that was observed, in float64."""
    return grouped(observation.tensors).flat(name)


@lru_cache(maxsize=1024)
def due(model: MoEModel, layout: Layout, role: str, rank: int, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the tensors of which a rank has a part."""
    held = weights.held(model, layout, role, rank)
    return tuple(name for name in names if name in held)


def places(case: Case, role: str, rank: int, mine: Group, whole: Group) -> Places | None:
    """None where the rank's tensors are not those, or not of those shapes, that the shard map says."""
    return _places(case.model, case.layout, role, rank, mine.shapes, whole.shapes)


@lru_cache(maxsize=1024)
def _places(model: MoEModel, layout: Layout, role: str, rank: int, mine: Shapes, whole: Shapes) -> Places | None:
    held, order = weights.held(model, layout, role, rank), {name: i for i, (name, _) in enumerate(whole)}
    if {name for name, _ in mine} != order.keys() & held.keys():
        return None
    starts = list(accumulate((prod(shape) for _, shape in whole), initial=0))
    slices = [torch.arange(prod(whole[order[n]][1])).view(whole[order[n]][1])[held[n]] for n, _ in mine]
    if [tuple(part.shape) for part in slices] != [shape for _, shape in mine]:
        return None
    at = [part.reshape(-1) + starts[order[name]] for part, (name, _) in zip(slices, mine, strict=True)]
    which = [torch.full((len(part),), order[name]) for part, (name, _) in zip(at, mine, strict=True)]
    nothing = torch.zeros(0, dtype=torch.int64)
    return Places(torch.cat([nothing, *at]), torch.cat([nothing, *which]))


@lru_cache(maxsize=256)
def owners(shapes: Shapes) -> torch.Tensor:
    """Of every element of a group, in which tensor it stands."""
    return torch.arange(len(shapes)).repeat_interleave(torch.tensor([prod(shape) for _, shape in shapes]))
