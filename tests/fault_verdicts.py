"""The right verdict for every fault of `tests.faults`, as data, and what is wrong with one that was given."""

import re
from collections.abc import Mapping, Sequence

from fuzz.trial import Verdict
from tests.faults import Fault, Fired

CAUSES = {  # the rank that has it is to blame, whatever became of the others
    "exception": r"raised RuntimeError at (megatron/core/|.*tests/faults\.py:)",
    "exit": r"died of exit code 7$",
    "segfault": r"died of SIGSEGV$",
    "kill": r"died of SIGKILL$",
    "memory": r"ran out of memory$",
    "loop": r"hangs in _loop of faults\.py$",
}
WAITED_OR_ENDED = r"(waited in \w+.* on \{[\d,]+\}( of \w+)? at \S+:\d+(, in \w+ of mappings\.py:\d+)?|ended in \w+)"
DEATHS = ("exit", "segfault", "kill")
OUT_OF_STEP = ("mismatch", "missing")
KEPT_FROM_RUNNING = ("stop", "starve")
UNEXPLAINED = ("loop", *KEPT_FROM_RUNNING)  # the record cannot say why: judged at the patience
LOST_ONCE = "a rank was lost once, and not when the case ran again"


def wrong(fault: Fault, verdict: Verdict, fired: Sequence[Fired], healthy: Mapping[str, int]) -> str:
    """What is not as it must be, in words; '' where all is. `healthy`: what the laws check in this case."""
    if said := _not_fired(fault, verdict, fired):
        return said
    if fault.once or fault.kind == "pause":
        return _not_passed(fault, verdict, healthy)
    if fault.kind in KEPT_FROM_RUNNING:
        return _not_inconclusive(fault, verdict)
    if verdict.violation is None:
        return f"no law was broken; doubts: {verdict.doubts}"
    return _not_out_of_step(fault, verdict) if fault.kind in OUT_OF_STEP else _not_blamed(fault, verdict, fired[-1])


def _not_fired(fault: Fault, verdict: Verdict, fired: Sequence[Fired]) -> str:
    """The odd rank is who fires, or who alone does not; and it does so at the same place in every run."""
    others = set(range(verdict.case.layout.world)) - {fault.rank}
    ranks = {one.rank for one in fired}
    if not fired or ranks != (others if fault.kind == "missing" else {fault.rank}):
        return f"it fired on ranks {sorted(ranks)}"
    places = {(one.rank, one.stage, one.call) for one in fired}
    return "" if len(places) == len(ranks) else f"it fired at {sorted(places)}"


def _not_passed(fault: Fault, verdict: Verdict, healthy: Mapping[str, int]) -> str:
    doubts = [LOST_ONCE] if fault.once else []
    if verdict.violation is None and verdict.counts == healthy and list(verdict.doubts) == doubts:
        return ""
    return f"{verdict.violation}; doubts: {verdict.doubts}; {len(verdict.counts)} laws of {len(healthy)} were judged"


def _not_inconclusive(fault: Fault, verdict: Verdict) -> str:
    said = f"rank {fault.rank} was kept from running: "
    right = verdict.violation is None and not verdict.counts and verdict.doubts
    return "" if right and all(said in doubt for doubt in verdict.doubts) else f"{verdict.violation}; {verdict.doubts}"


def _not_blamed(fault: Fault, verdict: Verdict, fired: Fired) -> str:
    """Law, cause, rank and stage of who failed; of every other rank where it waited, or that it had ended."""
    violation, rank = verdict.violation, fault.rank
    assert violation is not None
    words = re.escape(f"rank {rank} ") + f"{CAUSES[fault.kind]}".rstrip("$") + rf".* in stage {fired.stage}; "
    others = [f"rank {other} {WAITED_OR_ENDED}" for other in range(verdict.case.layout.world) if other != rank]
    rules = {
        violation.law: r"every rank finishes$",
        violation.cause: CAUSES[fault.kind],
        violation.witness: rf"rank {rank}, stage {fired.stage}$",
        violation.sentence: words + "; ".join(others) + "$",
    }
    return "; ".join(f"{said!r} is not {rule!r}" for said, rule in rules.items() if not re.match(rule, said))


def _not_out_of_step(fault: Fault, verdict: Verdict) -> str:
    """Two ranks of one group, one of them the odd one; the call that should not be, and why it cannot be met."""
    violation = verdict.violation
    assert violation is not None
    rules = {
        violation.law: r"collectives run in lock-step$",
        violation.witness: rf"ranks ({fault.rank} and \d|\d and {fault.rank}), group \d+( \w+)?$",
        violation.sentence: r".*called all_reduce int8\[13\] on \{[\d,]+\}( of \w+)? at tests/faults.py:\d+.*"
        r"(cannot meet|ended without it|each waits for the other)",
    }
    return "; ".join(f"{said!r} is not {rule!r}" for said, rule in rules.items() if not re.match(rule, said))
