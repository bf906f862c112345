"""Collectives that cannot match are named, in words, on real ranks; matching ones are not; starved is not hung."""

import inspect
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from fuzz import pulse
from fuzz.case import Case, Observation, Violation
from fuzz.laws import liveness
from fuzz.lockstep import ON_DEVICE, Call, left_out, line, mismatch, parsed, standstill
from fuzz.ranks import Ranks
from fuzz.recorder import ARGUMENTS, DESCRIBED, _waiting

SELF = "tests.in_ranks"
NOTHING = Observation(rank=0, outcome="done", stage="")


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2, start=f"{SELF}:start_recorded", preload=("torch", SELF))
    yield ranks
    ranks.close()


def verdict(seen: list[Observation]) -> str:
    """The first law of liveness that is broken, and its sentence."""
    for law in (liveness.collectives_run_in_lock_step, liveness.every_rank_finishes):
        try:
            law(Case(), seen, NOTHING)
        except Violation as violation:
            return f"{violation.law}: {violation.sentence}"
    return "holds"


# ---- on real ranks ---------------------------------------------------------------------------------------------


CANNOT_MATCH = [
    ("operation", ("broadcast float32[2] on {0,1} at tests/in_ranks.py:", "broadcast cannot meet all_gather")),
    ("shape", ("shape (2,) cannot meet (3,)",)),
    ("type", ("dtype float32 cannot meet float64",)),
    ("reduction", ("detail sum cannot meet max",)),
    ("root", ("detail from 0 cannot meet from 1",)),
    ("splits", ("rank 0 sends 4 elements, rank 1 takes 8",)),
    ("group", ("rank 0 called barrier on {0,1} of first at", "{0,1} of second at", "each waits for the other")),
    ("order", ("barrier on {0,1} of first at", "barrier on {0,1} of second at", "each waits for the other")),
    ("coalesced", ("all_reduce float32[2] on {0,1} of first at", "barrier on {0,1} of second at", "for the other")),
    ("left out", ("rank 0 called all_reduce float32[2] on {0,1} at", "rank 1 had ended without it")),
    ("messages", ("recv float32[2] on {1,0}", "each waits for the other")),
    ("pending", ("rank 0 called broadcast float32[2] on {0,1} at", "rank 1 had ended without it")),
    ("one more", ("rank 0 called broadcast float32[2] on {0,1} at", "ended without it")),
]


@pytest.mark.parametrize(("how", "words"), CANNOT_MATCH)
def test_calls_that_cannot_match_are_named(two: Ranks, how: str, words: tuple[str, ...]) -> None:
    began = time.monotonic()
    seen = two.run(f"{SELF}:out_of_step", how)
    took, said = time.monotonic() - began, verdict(seen)
    print(f"{took:.2f} s: {said}")
    assert said.startswith("collectives run in lock-step: ")
    assert all(part in said for part in words), said
    assert "patience" not in said and not any("no rank gave a sign of life" in one.error for one in seen)
    assert liveness.collectives_run_in_lock_step(Case(), two.run(f"{SELF}:total", 1.0), NOTHING) == 2


def test_calls_that_match_are_counted(two: Ranks) -> None:
    seen = two.run(f"{SELF}:total", 1.0)
    assert liveness.collectives_run_in_lock_step(Case(), seen, NOTHING) == 2
    assert [str(call)[:40] for one in seen for call in one.calls] == ["all_reduce float64[1] on {0,1} at tests/"] * 2
    assert [one.inside for one in seen] == [-1, -1]


def test_the_record_survives_a_death(two: Ranks) -> None:
    seen = two.run(f"{SELF}:signals_itself", "SIGKILL")
    said = verdict(seen)
    assert said.startswith("every rank finishes: rank 1 died of SIGKILL in stage before the end; rank 0 ")


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGTERM"])
def test_causes_of_death_are_failures_of_their_own(two: Ranks, name: str) -> None:
    """Hypothesis tells failures apart by type: another signal, another exception, another class."""
    kinds = [_raised(two.run(f"{SELF}:signals_itself", name)) for _ in range(2)]
    other = _raised(two.run(f"{SELF}:raises_on", 1))
    assert kinds[0] is kinds[1] and kinds[0].cause == f"died of {name}"
    assert other is not kinds[0] and other.cause.startswith("raised RuntimeError at ") and issubclass(other, Violation)


def _raised(seen: list[Observation]) -> type[Violation]:
    with pytest.raises(Violation) as caught:
        liveness.every_rank_finishes(Case(), seen, NOTHING)
    return caught.type


# ---- starved is not hung ---------------------------------------------------------------------------------------


def test_a_stopped_rank_is_starved_and_not_hung() -> None:
    ranks = Ranks(2, start=f"{SELF}:start_recorded", preload=("torch", SELF), patience=1.0)
    pid = int(ranks.run(f"{SELF}:whoami")[1].numbers["pid"])
    os.kill(pid, signal.SIGSTOP)
    seen = ranks.run(f"{SELF}:total", 1.0)
    assert [one.outcome for one in seen] == ["starved", "starved"]
    assert f"rank 1 was kept from running: process {pid} is in state stopped" in seen[0].error
    assert verdict(seen) == "holds" and not psutil.pid_exists(pid)
    ranks.close()


def test_a_rank_without_processor_time_is_starved() -> None:
    """Idle priority, on one core with two loops of ordinary priority: it can run, and hardly does."""
    ranks = Ranks(1, start=None, preload=("torch", SELF), patience=1.5)
    pid = int(ranks.run(f"{SELF}:whoami")[0].numbers["pid"])
    os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
    os.sched_setaffinity(pid, {0})
    hogs = [psutil.Popen(["python", "-c", "import os\nos.sched_setaffinity(0, {0})\nwhile True: pass"]) for _ in "ab"]
    time.sleep(0.3)
    try:
        [seen] = ranks.run(f"{SELF}:loops")
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert seen.outcome == "starved" and "s of processor time in" in seen.error
    ranks.close()


def test_a_rank_that_runs_for_ever_is_hung() -> None:
    ranks = Ranks(1, start=None, preload=("torch", SELF), patience=1.0)
    [seen] = ranks.run(f"{SELF}:loops")
    assert seen.outcome == "hung" and verdict([seen]).endswith(
        "hangs in loops of in_ranks.py in stage called; there is no other rank"
    )
    ranks.close()


def test_signs_of_life_are_no_excuse_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz.watch.LONGEST", 2.0)
    ranks = Ranks(2, start=f"{SELF}:start_recorded", preload=("torch", SELF), patience=0.7)
    seen = ranks.run(f"{SELF}:busy_for_ever")
    assert {one.outcome for one in seen} == {"hung"} and "they were still busy after 1." in seen[0].error
    ranks.close()


def test_a_parent_that_was_away_blames_nobody(two: Ranks) -> None:
    """The clock of this process jumps by more than the patience: as after Ctrl-Z, or on a starved machine."""
    pid, parent = int(two.run(f"{SELF}:whoami")[0].numbers["pid"]), os.getpid()
    code = f"import os,signal,time; os.kill({parent},signal.SIGSTOP); time.sleep(7); os.kill({parent},signal.SIGCONT)"
    stopper = psutil.Popen(["python", "-c", code])
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(8.0, os.kill, (pid, signal.SIGCONT)).start()
    seen = two.run(f"{SELF}:total", 1.0)
    stopper.wait(10)
    assert [one.outcome for one in seen] == ["done", "done"]


# ---- values ----------------------------------------------------------------------------------------------------


def call(op: str = "all_reduce", ranks: tuple[int, ...] = (0, 1), **changes: object) -> Call:
    each = (4,) * len(ranks)
    plain = {
        "group": "7",
        "sent": each,
        "taken": each,
        "shape": (4,),
        "dtype": "float32",
        "detail": "sum",
        "where": "x.py:1",
    }
    return parsed(line(Call(op=op, ranks=ranks, **{**plain, **changes})))  # type: ignore[arg-type]


def test_every_function_is_described_under_its_own_arguments() -> None:
    """What torch calls its arguments decides; all of them can be bound by position too."""
    assert set(ARGUMENTS) == set(DESCRIBED)
    for name, defaults in ARGUMENTS.items():
        assert list(defaults) == list(inspect.signature(getattr(dist, name)).parameters)


def test_uneven_all_to_all_of_three_is_compared_pair_by_pair() -> None:
    """Only ranks 1 and 2 disagree, neither with rank 0."""
    rows = {0: ((1, 2, 3), (1, 4, 5)), 1: ((4, 0, 6), (2, 0, 7)), 2: ((5, 8, 9), (3, 6, 9))}
    record = {
        rank: [call("all_to_all_single", (0, 1, 2), sent=sent, taken=taken)] for rank, (sent, taken) in rows.items()
    }
    assert str(mismatch(record)).endswith("rank 2 sends 8 elements, rank 1 takes 7")


def test_the_earliest_mismatch_is_named() -> None:
    early, late = {"group": "8", "where": "early.py:1"}, {"where": "late.py:2"}
    record = {
        0: [call(**late), call(**early), call(**late, dtype="int64")],  # type: ignore[arg-type]
        1: [call(**late), call(**early, dtype="int64"), call(**late)],  # type: ignore[arg-type]
    }
    assert "early.py:1" in str(mismatch(record))


def test_messages_match_in_their_direction() -> None:
    there = {"ranks": (0, 1), "taken": (), "sent": (4,), "detail": "0"}
    back = {"ranks": (0, 1), "taken": (4,), "sent": (), "detail": "0"}
    assert mismatch({0: [call("isend", **there)], 1: [call("irecv", **back)]}) is None  # type: ignore[arg-type]
    both = mismatch({0: [call("isend", **there)], 1: [call("send", **there)]})  # type: ignore[arg-type]
    assert both is not None and both.why == "a message needs one rank that sends and one that receives"


def test_a_rank_that_may_go_on_explains_the_others() -> None:
    """Rank 2 is in no collective: nobody stands still for good."""
    pairs = {0: [call()], 1: [call(ranks=(1, 2))], 2: []}
    assert standstill(pairs, {0: 0, 1: 0, 2: -1}, {}) == []
    waits = standstill(pairs, {0: 0, 1: 0, 2: -1}, {2: "done"})
    assert [(one.rank, one.other, one.why) for one in waits] == [
        (1, 2, "had ended without it"),
        (0, 1, "it waits there for somebody else"),
    ]


def test_who_raises_in_a_collective_has_not_met_it() -> None:
    """The others wait for it, though the record says that it came."""
    record = {0: [call(), call()], 1: [call(), call()]}
    [wait] = standstill(record, {0: 1, 1: 1}, {1: "raised"})
    assert (wait.rank, wait.other, wait.others_call, wait.why) == (0, 1, None, "had raised an exception")
    assert standstill(record, {0: 1, 1: -1}, {1: "raised"}) == []


def test_of_many_who_wait_the_two_that_wait_for_each_other_are_named() -> None:
    """Rank 3 alone is in a collective of all: 0 waits for 1, who waits for 3, who waits for everybody."""
    everybody = call(group="0", ranks=(0, 1, 2, 3), where="alone.py:1")
    record = {0: [call()], 1: [call(ranks=(1, 3))], 2: [call(ranks=(2, 3))], 3: [everybody]}
    first, *others = standstill(record, dict.fromkeys(record, 0), {})
    assert str(first).startswith("rank 1 called ") and str(first).endswith("alone.py:1: each waits for the other")
    assert {one.rank for one in others} == {0, 2, 3}


# ---- on a device, where calls return at once -------------------------------------------------------------------


def test_who_waits_for_the_device_waits_for_all_that_was_issued() -> None:
    """Rank 1 has ended without the second of three; the first was met, the third is a call of nobody else."""
    record = {0: [call(where="a.py:1"), call(where="b.py:2"), call(group="9", where="c.py:3")], 1: [call()]}
    inside = {0: ON_DEVICE, 1: -1}
    [wait] = standstill(record, inside, {1: "done"})
    assert (wait.rank, wait.other, wait.why) == (0, 1, "had ended without it") and wait.call.where == "b.py:2"
    assert standstill({0: [call()], 1: [call()]}, inside, {1: "done"}) == []


def test_on_a_device_only_the_patient_take_waiting_for_a_deadlock() -> None:
    """The device may be at work before it comes to the call: what cannot be met at all is judged at once."""
    record = {0: [call(group="7")], 1: [call(group="8")]}
    inside = {0: ON_DEVICE, 1: ON_DEVICE}
    assert standstill(record, inside, {}) == []
    assert {one.why for one in standstill(record, inside, {}, patient=True)} == {"each waits for the other"}
    unlike = {0: [call()], 1: [call(dtype="int64")]}
    assert {one.why for one in standstill(unlike, inside, {})} == {
        "dtype float32 cannot meet int64",
        "dtype int64 cannot meet float32",
    }


def test_a_hung_rank_waits_for_one_that_has_ended_without_its_call() -> None:
    """Though nobody could see that it waits there: it is in no call."""
    ranks = [
        Observation(rank=0, outcome="hung", stage="", calls=[call()], facts={"stack": ""}),
        Observation(rank=1, outcome="done", stage=""),
    ]
    assert verdict(ranks).endswith("at x.py:1; rank 1 ended without it")
    busy = [replace(ranks[0], calls=[]), ranks[1]]
    assert verdict(busy).startswith("every rank finishes: rank 0 hangs in an unknown place")


def test_waiting_for_the_device_is_published(tmp_path: Path) -> None:
    own, seen = pulse.Pulse(tmp_path, 0), list[int]()
    waited = _waiting(lambda: seen.append(pulse.beat(tmp_path, 0).inside), own, threading.local())
    waited()
    assert seen == [ON_DEVICE] and pulse.beat(tmp_path, 0).inside == -1


def test_a_collective_in_which_all_are_is_no_standstill() -> None:
    record = {0: [call()], 1: [call()]}
    assert standstill(record, {0: 0, 1: 0}, {}) == [] and mismatch(record) is None and left_out(record) is None
