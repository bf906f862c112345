"""Laws that compare a case with its twin: the same case once more, or with one thing changed that must not matter."""

from collections.abc import Sequence

import torch

from fuzz.case import Case, Observation, Violation, twin_of
from fuzz.laws.compare import BOUNDS, Finding, bound_of, differs
from fuzz.laws.pieces import group
from fuzz.tensors import grouped

DISPATCH = "/dispatch/"
ORDERED = 2  # ranks whose sum does not hang on its order


def _same(mine: Observation, other: Observation) -> bool:
    """Whether all tensors are the same, group by group."""
    groups = grouped(mine.tensors).groups
    return all(torch.equal(group(mine, name).flat, group(other, name).flat) for name in groups)


def _unequal(mine: Observation, other: Observation) -> Finding | None:
    if dict(mine.numbers) != dict(other.numbers):
        key = next(k for k, v in mine.numbers.items() if other.numbers.get(k) != v)
        numbers = repr(mine.numbers[key]), repr(other.numbers.get(key))
        return Finding(f"rank {mine.rank}, {key}", *numbers, f"{key} differs between a case and its twin")
    for key, tensor in () if _same(mine, other) else mine.tensors.items():
        if not torch.equal(tensor, other.tensors[key]):
            worst = int((tensor.double() - other.tensors[key].double()).abs().flatten().argmax())
            numbers = repr(float(tensor.flatten()[worst])), repr(float(other.tensors[key].flatten()[worst]))
            witness = f"rank {mine.rank}, {key}, flat element {worst}"
            return Finding(witness, *numbers, f"{key} differs between a case and its twin")
    return None


def a_case_run_twice_is_bitwise_the_same(
    case: Case, ranks: Sequence[Observation], twins: Sequence[Observation], reference: Observation
) -> int:
    """The same case once more in the same ranks gives the same bits."""
    if case.twin != "again":
        return 0
    for mine, other in zip(ranks, twins, strict=True):
        found = _unequal(mine, other)
        if found:
            raise Violation(case, "a case run twice is bitwise the same", *found)
    return len(ranks)


def switches_that_must_not_matter_do_not(
    case: Case, ranks: Sequence[Observation], twins: Sequence[Observation], reference: Observation
) -> int:
    """How stages talk, what they free, whence groups come and who embeds: the same bits as without any of it.

    To rounding on NCCL with three ranks or more: in which order it adds depends on where in a buffer an element lies.
    """
    if case.twin != "plain_switches" or twin_of(case).switches == case.switches:
        return 0
    for mine, other in zip(ranks, twins, strict=True):
        rounded = mine.facts.get("backend") == "nccl" and len(ranks) > ORDERED
        found = _apart(case, mine, other, reference) if rounded else _unequal(mine, other)
        if found:
            raise Violation(case, "switches that must not matter do not", *found)
    return len(ranks)


def _apart(case: Case, mine: Observation, other: Observation, reference: Observation) -> Finding | None:
    clipped = "clipped" if case.ppo.max_norm else "gradient"
    for key, tensor in mine.tensors.items():
        if DISPATCH in key or key not in reference.tensors:
            continue
        scale = max(float(reference.tensors[key].abs().max()), 1e-3)
        bound = 2 * bound_of(reference, key, BOUNDS[case.precision][clipped], scale)  # both may err
        worst = differs(tensor, other.tensors[key], scale, bound)
        if worst:
            gap, where = worst
            numbers = f"{float(other.tensors[key][where]):.15g}", f"{float(tensor[where]):.15g}"
            said = f"{key} differs by {gap:.2e} from its twin's; the bound is {bound:.1e}"
            return Finding(f"rank {mine.rank}, {key}, element {list(where)}", *numbers, said)
    return None


def the_dispatchers_agree(
    case: Case, ranks: Sequence[Observation], twins: Sequence[Observation], reference: Observation
) -> int:
    """alltoall and allgather give the same rollouts, gradients and weights, to rounding."""
    if case.twin != "other_dispatcher":
        return 0
    for mine, other in zip(ranks, twins, strict=True):
        found = _apart(case, mine, other, reference)
        if found:
            raise Violation(case, "the dispatchers agree", *found)
    return len(ranks)
