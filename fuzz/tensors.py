"""Tensors by name as they travel from a rank: those with the same beginning of a name and type are one piece of memory.

Names are paths, `0/1/actor/grad/model.norm.weight`; what stands before the last '/' is their group. A case has
thousands of small tensors, and laws look at whole groups far more often than at one: `flat` is one view of many.

Knows names and torch; nothing of files, ranks or cases.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch

Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # names without their group's, and shapes, in order


class Run(NamedTuple):
    """Tensors of one group and type; in memory one follows the other."""

    group: str
    shapes: Shapes


class Group(NamedTuple):
    """All tensors of a group, one behind the other, in float64."""

    shapes: Shapes
    flat: torch.Tensor

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.shapes)

    def of(self, names: tuple[str, ...]) -> torch.Tensor:
        """Those of these names alone; KeyError where one is missing."""
        if names == self.names:
            return self.flat
        parts = self.flat.split([math.prod(shape) for _, shape in self.shapes])
        named = dict(zip(self.names, parts, strict=True))
        return torch.cat([named[name] for name in names])


class Tensors(Mapping[str, torch.Tensor]):
    """Named tensors, of each Run in one piece; a tensor is a view, made when it is asked for."""

    def __init__(self, runs: Sequence[tuple[Run, torch.Tensor]]) -> None:
        self._runs = runs
        self._groups: dict[str, Group] = {}

    @cached_property
    def _places(self) -> dict[str, tuple[torch.Tensor, int, tuple[int, ...]]]:
        """Of every name the piece, the first element in it, and the shape."""
        found = {}
        for run, piece in self._runs:
            at, prefix = 0, f"{run.group}/" if run.group else ""
            for name, shape in run.shapes:
                found[prefix + name] = piece, at, shape
                at += math.prod(shape)
        return found

    def __getitem__(self, name: str) -> torch.Tensor:
        piece, at, shape = self._places[name]
        return piece[at : at + math.prod(shape)].view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    @cached_property
    def groups(self) -> dict[str, Shapes]:
        """Names and shapes of every group."""
        found: dict[str, Shapes] = {}
        for run, _ in self._runs:
            found[run.group] = found.get(run.group, ()) + run.shapes
        return found

    def flat(self, group: str) -> Group:
        """All tensors of a group; an empty Group where there are none."""
        if group not in self._groups:
            pieces = [piece.to(torch.float64) for run, piece in self._runs if run.group == group]
            flat = pieces[0] if len(pieces) == 1 else torch.cat([torch.zeros(0, dtype=torch.float64), *pieces])
            self._groups[group] = Group(self.groups.get(group, ()), flat)
        return self._groups[group]


def laid_out(tensors: Mapping[str, torch.Tensor]) -> list[tuple[Run, torch.Tensor]]:
    """The Runs of named tensors, each with its elements in one piece."""
    split = [(*name.rpartition("/")[::2], tensor.detach().cpu()) for name, tensor in tensors.items()]
    found = []
    for (group, _), members in groupby(split, key=lambda one: (one[0], one[2].dtype)):
        _, names, some = zip(*members, strict=True)
        run = Run(group, tuple((name, tuple(tensor.shape)) for name, tensor in zip(names, some, strict=True)))
        found.append((run, torch.cat([tensor.reshape(-1) for tensor in some])))
    return found


def grouped(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The same tensors as groups, where they are not yet."""
    return tensors if isinstance(tensors, Tensors) else Tensors(laid_out(tensors))
