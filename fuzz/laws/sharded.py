"""What a distributed optimizer shares out among replicas: put together for the laws, and judged to be a partition.

A rank says of which elements it has the gradient and the state (`owned/ROLE/NAME`); what it holds of the others is
nobody's. Knows nothing of how megatron cuts them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from fuzz.case import Case, Observation, Violation
from fuzz.laws.compare import STATES, TRAINED, Finding, holders, steps
from fuzz.tensors import grouped
from toy_models.coordinates import groups


def _shared_out(case: Case, ranks: Sequence[Observation]) -> Iterator[tuple[str, str, list[int], torch.Tensor]]:
    """Role, name, the ranks that share a slice of it out, and of each which elements it owns [ranks, ...]."""
    for role in TRAINED:
        for (name, *_), holding in holders(case, role).items():
            key = f"owned/{role}/{name}"
            for members in _sharing(case, name, holding):
                if all(key in ranks[member].tensors for member in members):
                    yield role, name, members, torch.stack([ranks[member].tensors[key] for member in members])


def _sharing(case: Case, name: str, holding: Sequence[int]) -> list[list[int]]:
    """Of the ranks that hold a slice those of each data-parallel group: replicas over TP do not share, but repeat."""
    data = groups(case.layout, "edp" if ".experts." in name else "dp-cp")
    return [found for group in data if (found := [rank for rank in group if rank in holding])]


def whole(case: Case, ranks: Sequence[Observation]) -> Sequence[Observation]:
    """The same observations with every gradient and state whole on each rank that holds its slice."""
    if not ranks or not case.switches.distributed:
        return ranks
    found: list[dict[str, torch.Tensor]] = [dict(rank.tensors) for rank in ranks]
    for role, name, members, owned in _shared_out(case, ranks):
        for key in (f"{s.key}/{role}/{kind}/{name}" for s in steps(case) for kind in ("grad", *STATES["adam"])):
            if all(key in ranks[member].tensors for member in members):
                parts = torch.stack([ranks[member].tensors[key] for member in members])
                joined = parts.gather(0, owned.int().argmax(0, keepdim=True))[0]
                for member in members:
                    found[member][key] = joined
    return [replace(rank, tensors=grouped(tensors)) for rank, tensors in zip(ranks, found, strict=True)]


def every_element_has_one_owner(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Of the ranks of a data-parallel group exactly one has the gradient and the state of each element."""
    judged = 0
    for role, name, members, owned in _shared_out(case, ranks) if case.switches.distributed else ():
        owners = owned.sum(0)
        if not bool((owners == 1).all()):
            at = int((owners != 1).flatten().int().argmax())
            number = int(owners.flatten()[at])
            said = f"element {at} of {name} of the {role} is updated by {number} of the ranks {members}"
            finding = Finding(f"ranks {members}, {role}, {name}", "1", str(number), said)
            raise Violation(case, "every element has one owner", *finding)
        judged += len(members) > 1
    return judged
