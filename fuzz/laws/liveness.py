"""Laws of liveness: the ranks make the same collectives in the same order, and every rank ends its case.

Where they are broken nothing more is judged. What a rank died or hangs of is its cause: different causes are different
failures.
"""

import re
from collections.abc import Sequence

from fuzz.case import Case, Observation, Violation, violation_of
from fuzz.laws.compare import Finding
from fuzz.lockstep import ON_DEVICE, Divergence, left_out, mismatch, telling

FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>\S+)')
OURS = re.compile(r"megatron/core/|toy_models/|tests/")
MADE_ONCE = ("new_group",)  # per layout and pool: what is counted depends on the case alone
OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")


def collectives_run_in_lock_step(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """All members of a group make the same calls in the same order, and what one sends the other takes."""
    if any("calls_lost" in rank.facts for rank in ranks):
        return 0
    apart = _apart(ranks)
    if apart is not None:
        violation = Violation(case, "collectives run in lock-step", *_out_of_step(apart))
        violation.details = _told(ranks)
        raise violation
    return sum(call.op not in MADE_ONCE for rank in ranks for call in rank.calls)


def _apart(ranks: Sequence[Observation]) -> Divergence | None:
    """Where the ranks part ways; a rank that died or raised did not part ways, it ended."""
    record = {rank.rank: rank.calls for rank in ranks}
    if found := mismatch(record):
        return found
    if {rank.outcome for rank in ranks} & {"died", "raised"}:
        return None
    waits = sorted((wait for rank in ranks for wait in rank.waits), key=telling)
    return waits[0] if waits else left_out(record, [rank.rank for rank in ranks if rank.outcome == "done"])


def _out_of_step(apart: Divergence) -> Finding:
    witness = f"ranks {apart.rank} and {apart.other}, group {apart.call.group}"
    theirs = f"rank {apart.other}: {apart.others_call or 'no call'} ({apart.why})"
    return Finding(witness, f"rank {apart.rank}: {apart.call}", theirs, str(apart))


def every_rank_finishes(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Every case ends on every rank, without an exception."""
    blamed = _first_to_fail(ranks)
    if blamed is not None:
        finding = Finding(
            f"rank {blamed.rank}, stage {blamed.stage}",
            "done on every rank",
            blamed.error.strip(),
            _said(ranks, blamed),
        )
        violation = violation_of(cause(blamed))(case, "every rank finishes", *finding)
        violation.details = _told(ranks)
        raise violation
    return len(ranks)


def tensors_are_left_alone_while_sent(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """What `isend` was given is neither changed nor freed before its handle is waited for, or the case is over."""
    seen = [(rank.rank, rank.facts["messages"]) for rank in ranks if "messages" in rank.facts]
    for rank, messages in seen:
        for said in messages["touched"]:
            finding = Finding(f"rank {rank}", "a tensor as it was when isend was called", said, said)
            raise Violation(case, "tensors are left alone while sent", *finding)
    return sum(messages["sent"] for _, messages in seen)


def _told(ranks: Sequence[Observation]) -> str:
    """Of every rank: how it ended, its last collective, its stack or traceback."""
    return "\n\n".join(filter(None, (part for rank in ranks for part in (_last(rank), rank.error.strip()))))


def _last(rank: Observation) -> str:
    last = f"its last collective, number {len(rank.calls)}, was {rank.calls[-1]}" if rank.calls else "no collective"
    return f"{_ended(rank)}; {last}"


def _first_to_fail(ranks: Sequence[Observation]) -> Observation | None:
    """The rank to blame: one that died before one that raised before one that hangs; outside of collectives first."""
    failed = [rank for rank in ranks if rank.outcome in ("died", "raised", "hung")]
    order = ("died", "raised", "hung")
    return min(failed, key=lambda rank: (order.index(rank.outcome), rank.inside != -1, rank.rank), default=None)


def _said(ranks: Sequence[Observation], blamed: Observation) -> str:
    others = "; ".join(_ended(rank) for rank in ranks if rank is not blamed)
    return f"rank {blamed.rank} {cause(blamed)} in stage {blamed.stage}; {others or 'there is no other rank'}"


def _ended(rank: Observation) -> str:
    """What became of a rank that is not to blame."""
    if rank.inside >= 0:
        return f"rank {rank.rank} waited in {rank.calls[rank.inside]}"
    if rank.inside == ON_DEVICE and rank.calls:
        return f"rank {rank.rank} waited for its device after {rank.calls[-1]}"
    ended = {"done": "ended", "raised": f"raised {rank.facts.get('exception')}", "hung": "was busy"}
    return f"rank {rank.rank} {ended.get(rank.outcome, rank.outcome)} in {rank.stage}"


def cause(rank: Observation) -> str:
    """The root cause in a few words that are the same for every case that has it."""
    if rank.outcome == "died":
        return "ran out of memory" if "out_of_memory" in rank.facts else f"died of {_signal(rank)}"
    if rank.outcome == "raised":
        return _raised(rank)
    return f"hangs in {_place(rank.facts['stack'])}"


def _signal(rank: Observation) -> str:
    return str(rank.facts.get("signal") or f"exit code {rank.facts['exit_code']}")


def _raised(rank: Observation) -> str:
    exception, message = rank.facts["exception"], rank.facts["message"]
    if exception in OUT_OF_MEMORY or "can't allocate memory" in message:
        return "ran out of memory"
    return f"raised {exception} at {rank.facts['megatron'] or rank.facts['raised_at']}"


def _place(stack: str) -> str:
    """The innermost function of megatron-core or the trainer; of anybody where there is none."""
    frames = list(FRAME.finditer(stack))
    ours = [frame for frame in frames if OURS.search(frame["file"])]
    for frame in ours or frames:
        return f"{frame['function']} of {frame['file'].rpartition('/')[2]}"
    return "an unknown place"
