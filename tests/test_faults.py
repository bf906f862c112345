"""Faults in real cases: each gets the right verdict and leaves nothing behind, and the next case passes."""

import multiprocessing
from collections.abc import Iterator

import psutil
import pytest

from fuzz import known
from fuzz.case import Case, HarnessFault
from fuzz.forking import home
from fuzz.trial import Trials, Verdict
from tests.fault_verdicts import wrong
from tests.faults import PLANT, Control, Fault, injected
from tests.test_ranks_end import gone
from toy_models.spec import Batch, Layout, MoEModel

FOUR = MoEModel(heads=2, kv_heads=2, experts=4)
EP2 = Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2, prompt=2, response=2))
TP2 = Case(layout=Layout(world=2, tp=2, etp=2), model=FOUR)
EP4 = Case(layout=Layout(world=4, ep=4), model=FOUR, batch=Batch(rows=4))
MIXED = Case(layout=Layout(world=4, tp=2, ep=2, etp=2), model=FOUR, batch=Batch(rows=4, prompt=2, response=2))
AGAIN = Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2), twin="again")
OTHER = Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2), twin="other_dispatcher")
SHORT = 0.3  # times the patience of 5 s, for hangs that the record does not explain


class Faulty:
    """Trials under a fault, and what must be true after each."""

    def __init__(self) -> None:
        self.trials, self.control = Trials(plants=(*known.mends(), PLANT)), Control()

    def verdict(self, case: Case, fault: Fault, times_patience: float = 1.0) -> Verdict:
        """Of a case under a fault that is seen for the first time."""
        self.trials._confirmed.clear()
        with injected(self.control, fault):
            return self.trials.judge(case, times_patience)

    def pids(self, case: Case) -> list[int]:
        pool = self.trials._pools[case.layout.world]._pool
        return pool.pids if pool else []

    def folders(self) -> int:
        """Of pools that were started and not closed."""
        pools = [*self.trials._pools.values(), *filter(None, [self.trials._truth])]
        return sum(pool._pool is not None for pool in pools)


@pytest.fixture(scope="module")
def faulty() -> Iterator[Faulty]:
    faulty = Faulty()
    yield faulty
    faulty.trials.close()
    faulty.control.disarm()
    assert list(home().iterdir()) == [] and _zombies() == []


def _zombies() -> list[psutil.Process]:
    multiprocessing.active_children()
    return [child for child in psutil.Process().children(True) if child.status() == psutil.STATUS_ZOMBIE]


def check(faulty: Faulty, case: Case, fault: Fault, times_patience: float = 1.0) -> Verdict:
    """The verdict of a case under a fault, where it is right and nothing is left of the fault."""
    healthy = faulty.trials.judge(case)
    assert healthy.violation is None and not healthy.doubts and healthy.counts["every_rank_finishes"]
    pids = faulty.pids(case)
    verdict = faulty.verdict(case, fault, times_patience)
    fired = faulty.control.fired()
    assert wrong(fault, verdict, fired, healthy.counts) == ""
    after = faulty.trials.judge(case)
    assert (after.violation, after.doubts, after.counts) == (None, healthy.doubts, healthy.counts)
    left = [pid for pid in {*pids, *(one.pid for one in fired)} if pid not in faulty.pids(case)]
    assert gone(left, []) and bool(left) == (fault.kind != "pause")
    assert len(list(home().iterdir())) == faulty.folders() and _zombies() == []
    return verdict


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        (EP2, Fault("exception", 1, "collective 20")),
        (TP2, Fault("exception", 0, "step 1")),
        (TP2, Fault("exception", 1, "inside 30")),
        (EP2, Fault("exit", 1, "stage update")),
        (EP2, Fault("segfault", 0, "inside 20")),
        (TP2, Fault("kill", 1, "stage rollout")),
        (EP2, Fault("kill", 1, "end")),
        (EP2, Fault("memory", 1, "collective 20")),
        (TP2, Fault("memory", 0, "stage models")),
        (EP2, Fault("mismatch", 1, "collective 20")),
        (TP2, Fault("mismatch", 0, "collective 60")),
        (TP2, Fault("missing", 1, "collective 40")),
        (EP2, Fault("missing", 0, "end")),
        (MIXED, Fault("exception", 2, "stage groups")),
        pytest.param(EP4, Fault("kill", 2, "stage groups"), marks=slow),
        pytest.param(MIXED, Fault("kill", 3, "inside 77"), marks=slow),
        pytest.param(MIXED, Fault("memory", 3, "step 0"), marks=slow),
        pytest.param(MIXED, Fault("mismatch", 2, "collective 100"), marks=slow),
        pytest.param(EP4, Fault("missing", 3, "collective 33"), marks=slow),
        pytest.param(MIXED, Fault("missing", 1, "end"), marks=slow),
    ],
    ids=lambda value: f"{value.kind}-{value.at}".replace(" ", "-") if isinstance(value, Fault) else "",
)
def test_a_fault_that_the_record_explains(faulty: Faulty, case: Case, fault: Fault) -> None:
    assert check(faulty, case, fault).seconds["quiet"] < 3


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        (AGAIN, Fault("kill", 1, "step 0", in_twin=True)),
        (OTHER, Fault("mismatch", 0, "collective 20", in_twin=True)),
        (OTHER, Fault("kill", 1, "collective 20")),
        pytest.param(AGAIN, Fault("exception", 0, "collective 30"), marks=slow),
    ],
)
def test_a_fault_in_a_case_with_a_twin(faulty: Faulty, case: Case, fault: Fault) -> None:
    check(faulty, case, fault)


@pytest.mark.parametrize("kind", ["kill", "segfault"])
def test_a_rank_lost_once_is_no_finding(faulty: Faulty, kind: str) -> None:
    check(faulty, EP2, Fault(kind, 0, "step 1", once=True))


def test_a_rank_that_pauses_is_no_finding(faulty: Faulty) -> None:
    check(faulty, EP2, Fault("pause", 1, "collective 20"))


@pytest.mark.parametrize("fault", [Fault("stop", 1, "inside 20"), Fault("starve", 1, "stage update")])
def test_a_rank_kept_from_running_is_inconclusive(faulty: Faulty, fault: Fault) -> None:
    check(faulty, EP2, fault, SHORT)


@pytest.mark.parametrize("case", [EP2, pytest.param(MIXED, marks=slow)])
def test_an_endless_loop_in_one_rank_hangs(faulty: Faulty, case: Case) -> None:
    check(faulty, case, Fault("loop", 1, "collective 20"), SHORT)


def test_a_hang_is_confirmed_with_twice_the_patience(faulty: Faulty) -> None:
    verdict = faulty.verdict(EP2, Fault("loop", 1, "step 0"), SHORT)
    fired = faulty.control.fired()
    assert len({one.pid for one in fired}) == 2 and verdict.seconds["quiet"] >= 2 * SHORT * 5
    assert fired[1].time - fired[0].time >= SHORT * 5


def test_causes_are_failures_of_their_own(faulty: Faulty) -> None:
    kinds = [type(faulty.verdict(EP2, Fault(kind, 1, "step 0")).violation) for kind in ("kill", "segfault", "memory")]
    again = type(faulty.verdict(TP2, Fault("kill", 0, "stage rollout")).violation)
    assert len({*kinds}) == 3 and again is kinds[0]


# ---- full disks ------------------------------------------------------------------------------------------------


def test_files_that_cannot_grow_are_a_fault_of_the_harness(faulty: Faulty) -> None:
    """What the rank saw cannot be brought back: one line that says so, no finding, and the next case passes."""
    with pytest.raises(HarnessFault) as caught, injected(faulty.control, Fault("full disk", 1, "stage experience")):
        faulty.trials.judge(EP2)
    assert [one.rank for one in faulty.control.fired()] == [1]
    said = str(caught.value)
    assert said.startswith("rank 1: /") and "reply-1 could not be written: File too large; it has " in said
    assert "\n" not in said
    assert faulty.trials.judge(EP2).violation is None
