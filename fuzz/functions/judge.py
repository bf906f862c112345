"""One call from its values to its verdict: right, refused as it should be, a known finding, or a violation.

Knows trials, laws of liveness, what functions promise and known findings; no megatron-core, no Hypothesis.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fuzz.case import Observation, Violation
from fuzz.functions import known
from fuzz.functions.call import Call
from fuzz.functions.families import promise_of
from fuzz.functions.inputs import dtype_of
from fuzz.functions.known import ALIKE, CHECK, INPUTS, VALUES
from fuzz.functions.promise import Check, Doubt, Promise, Refused, Seen
from fuzz.laws.liveness import collectives_run_in_lock_step, every_rank_finishes
from fuzz.trial import Trials

OUTCOMES = RIGHT, REFUSED, KNOWN, UNJUDGED, VIOLATED = "right", "refused", "known findings", "unjudged", "violations"
KINDS = ("ValueError", "AssertionError", "RuntimeError", "NotImplementedError", "CheckpointingException")


@dataclass(frozen=True)
class Verdict:
    """What became of a call: one of OUTCOMES, and the violation if any; `known` is the id of the finding."""

    call: Call
    outcome: str
    violation: Violation | None = None
    known: str = ""


def judge(trials: Trials, call: Call, step_around: bool = True) -> Verdict:
    """Make a call and judge it; what is a known finding is no violation, unless `step_around` is off.

    A call that is known to hang or to kill is not made: each would cost a pool of processes.
    """
    if step_around and (entry := known.fatal(call)):
        return Verdict(call, KNOWN, None, entry)
    seen = trials.call(call)
    if any(rank.outcome == "starved" for rank in seen):
        return Verdict(call, UNJUDGED)
    try:
        outcome = _outcome(call, seen)
    except Violation as violation:
        entry = known.met(call, violation) if step_around else ""
        return Verdict(call, KNOWN if entry else VIOLATED, None if entry else violation, entry)
    return Verdict(call, outcome)


def _outcome(call: Call, seen: Sequence[Observation]) -> str:
    """RIGHT, REFUSED or UNJUDGED; raises the Violation."""
    refusals = [rank.facts.get("refusal") for rank in seen]
    if any(refusals):
        _check_refusals(call, refusals, seen)
        return REFUSED
    collectives_run_in_lock_step(call, seen, seen[0])  # type: ignore[arg-type]
    every_rank_finishes(call, seen, seen[0])  # type: ignore[arg-type]
    promise = promise_of(call.function)
    try:
        truth = promise.truth(call, [promise.inputs(call, rank) for rank in range(call.world)])
    except Doubt:
        return UNJUDGED
    except Refused as why:
        _raise(call, VALUES, "all ranks", f"refused: {why}", "a result", f"accepts what it does not promise: {why}")
    for rank, expected in zip(seen, truth, strict=True):
        _check_rank(call, promise, rank, expected)
    return RIGHT


def _raise(call: Call, law: str, where: str, expected: str, observed: str, sentence: str) -> None:
    name = call.function
    raise Violation(call, law, f"{name}, {where}", expected, observed, f"{name}: {sentence}")  # type: ignore[arg-type]


# ---- refusals --------------------------------------------------------------------------------------------------


def _check_refusals(call: Call, refusals: list[Mapping[str, Any] | None], seen: Sequence[Observation]) -> None:
    rank, first = next((rank, found) for rank, found in enumerate(refusals) if found)
    told = f"{first['exception']}: {first['message']} at {first['place']}"
    purposeful = first["check"] and first["exception"] in KINDS and first["message"]
    if not purposeful:
        _raise(call, CHECK, f"rank {rank}", "a result, or a check that says why", told, f"fails deep inside: {told}")
    others = [found and (found["exception"], found["place"]) for found in refusals]
    if len(set(others)) > 1:
        apart = next(r for r, other in enumerate(others) if other != others[rank])
        theirs = str(refusals[apart] and others[apart]) if seen[apart].outcome == "done" else seen[apart].outcome
        _raise(call, ALIKE, f"ranks {rank} and {apart}", told, theirs, f"rank {rank} refuses, rank {apart} does not")


# ---- results ---------------------------------------------------------------------------------------------------


def _check_rank(call: Call, promise: Promise, rank: Observation, expected: Seen) -> None:
    seen: Seen = {**rank.tensors, **rank.facts}
    for key, truth in expected.items():
        if seen.get(key) is None and torch.is_tensor(truth) and key.startswith("grad/") and not truth.any():
            continue  # no gradient is one of zeros
        if key not in seen:
            _raise(call, VALUES, f"rank {rank.rank}, {key}", _said(truth), "nothing", f"{key} is missing")
        if told := _differ(seen[key], truth, promise, call):
            element, wanted, found, why = told
            where = f"rank {rank.rank}, {key}{element}"
            _raise(call, VALUES, where, wanted, found, f"{key} on rank {rank.rank} {why}")
    extra = {key for key in seen if key.startswith("out")} - set(expected)
    assert not extra, f"{call.function} returned {sorted(extra)}, which nothing judges"
    changed = [name for name in seen["changed"] if name not in promise.changes]
    if changed:
        where = f"rank {rank.rank}, {changed[0]}"
        _raise(call, INPUTS, where, "as it was", "written to", f"{changed[0]} is written to on rank {rank.rank}")


def _said(value: Any) -> str:
    return f"{str(value.dtype)[6:]} {list(value.shape)}" if torch.is_tensor(value) else repr(value)


def _differ(mine: Any, truth: Any, promise: Promise, call: Call) -> tuple[str, str, str, str] | None:
    """Which element, what was expected, what was seen, and in words; None where they agree."""
    if isinstance(truth, Check):
        why = truth.wrong(mine)
        return ("", "see the sentence", _said(mine), why) if why else None
    if not (torch.is_tensor(mine) and torch.is_tensor(truth)):
        return _plain(mine, truth, promise.rounding)
    if mine.dtype != truth.dtype or mine.shape != truth.shape:
        return "", _said(truth), _said(mine), f"is {_said(mine)}, not {_said(truth)}"
    if torch.equal(mine, truth):
        return None
    one, other = mine.double(), truth.double()
    gap = (one - other).abs().nan_to_num(nan=torch.inf)
    gap[(one == other) | (one.isnan() & other.isnan())] = 0.0
    if float(gap.max()) <= promise.rounding * _unit(mine.dtype, promise, call) * _scale(other, promise):
        return None
    at = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
    return f", element {list(at)}", str(truth[at].item()), str(mine[at].item()), f"is wrong at {list(at)}"


def _unit(dtype: torch.dtype, promise: Promise, call: Call) -> float:
    """One in the last place of 1."""
    if not dtype.is_floating_point:
        return 0.0
    worked_in = [torch.float32] * promise.single + [dtype_of(call.dtype)] * promise.coarse
    return max(torch.finfo(one).eps for one in (dtype, *worked_in))


def _scale(truth: torch.Tensor, promise: Promise) -> float:
    finite = truth[truth.isfinite()]
    return max(promise.floor, float(finite.abs().max()) if finite.numel() else 0.0)


def _plain(mine: Any, truth: Any, rounding: float) -> tuple[str, str, str, str] | None:
    """Numbers and other plain values; a number is float32's where it is rounded."""
    if type(mine) is type(truth) and (mine == truth or (mine != mine and truth != truth)):
        return None
    if isinstance(mine, float) and isinstance(truth, float) and rounding:
        near = abs(mine - truth) <= rounding * torch.finfo(torch.float32).eps * abs(truth)
        return None if near else ("", repr(truth), repr(mine), "is another number")
    return "", _said(truth), _said(mine), f"is {_said(mine)}, not {_said(truth)}"
