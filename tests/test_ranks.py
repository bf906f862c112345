"""Every way in which a rank or a pool can end: the right observation, and the next case passes."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch

from fuzz.case import HarnessFault, Observation
from fuzz.ranks import Ranks

SELF = "tests.in_ranks"
PRELOAD = ("torch", SELF)


def pool(world: int = 2, start: str | None = f"{SELF}:start_recorded", patience: float = 5.0, **options) -> Ranks:
    return Ranks(world, start=start, patience=patience, preload=options.pop("preload", PRELOAD), **options)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = pool()
    yield ranks
    ranks.close()


def passes(ranks: Ranks) -> None:
    """The next case is right; prints how long the pool took to be there again."""
    began = time.monotonic()
    seen = ranks.run(f"{SELF}:total", 1.5)
    print(f"next case after {time.monotonic() - began:.2f} s")
    assert [one.outcome for one in seen] == ["done"] * ranks.world
    assert all(one.tensors["sum"].tolist() == [1.5 * ranks.world] for one in seen)


def outcomes(seen: list[Observation]) -> list[str]:
    assert [one.rank for one in seen] == list(range(len(seen)))
    return [one.outcome for one in seen]


def test_what_a_rank_returns_arrives_as_it_was(two: Ranks, recwarn: pytest.WarningsRecorder) -> None:
    one = two.run(f"{SELF}:many_kinds")[1]
    assert {name: t.dtype for name, t in one.tensors.items() if name != str(t.dtype)[6:]} == {
        "empty": torch.float32,
        "scalar": torch.float32,
        "strided": torch.int64,
    }
    assert one.tensors["bool"].tolist() == [True, False, True]
    assert one.tensors["int64"].tolist() == [1, 2, 3, 4, 5]
    assert one.tensors["float64"].tolist() == [[0.5] * 3] * 2
    assert one.tensors["empty"].shape == (0, 4)
    assert one.tensors["scalar"].shape == () and one.tensors["scalar"].item() == 7.0
    assert one.tensors["strided"].tolist() == [[0, 3], [1, 4], [2, 5]]
    one.tensors["int64"].add_(1)
    assert dict(one.seconds) == {"all": 0.25}
    assert not recwarn.list


def test_the_pool_stays_warm(two: Ranks) -> None:
    first, again = ([one.numbers["pid"] for one in two.run(f"{SELF}:whoami")] for _ in range(2))
    assert first == again
    assert [one.numbers["threads"] for one in two.run(f"{SELF}:whoami")] == [1, 1]
    began = time.monotonic()
    for _ in range(20):
        passes(two)
    print(f"round trip {(time.monotonic() - began) / 20 * 1000:.1f} ms")


def test_the_stage_and_facts_come_back(two: Ranks) -> None:
    one = two.run(f"{SELF}:total", 2.0)[1]
    assert (one.stage, one.numbers["rank"], one.facts["said"]) == ("sum", 1, "ok")


def test_the_environment_is_the_ranks_alone(two: Ranks) -> None:
    assert two.run(f"{SELF}:environment", "OMP_NUM_THREADS")[0].facts["value"] == "1"
    assert two.run(f"{SELF}:environment", "TORCHDYNAMO_DISABLE")[0].facts["value"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in os.environ


def test_an_exception_on_one_rank_leaves_the_others_hung(two: Ranks) -> None:
    began = time.monotonic()
    seen = two.run(f"{SELF}:raises_on", 1)
    assert outcomes(seen) == ["hung", "raised"]
    assert seen[1].facts["exception"] == "RuntimeError"
    assert seen[1].facts["message"] == "refused on purpose by rank 1"
    assert seen[1].facts["megatron"] == ""
    assert "in raises_on" in seen[1].error
    assert seen[1].stage == "before the sum"
    assert seen[0].stage == "sum"
    assert "all_reduce" in seen[0].facts["stack"]
    [wait] = seen[0].waits
    assert str(wait).startswith("rank 0 called all_reduce float64[1] on {0,1} at tests/in_ranks.py:")
    assert str(wait).endswith("; rank 1 had raised an exception")
    assert seen[0].calls[seen[0].inside] is wait.call and str(wait) in seen[0].error
    assert time.monotonic() - began < 10
    passes(two)


def test_an_exception_on_all_ranks_needs_no_grace(two: Ranks) -> None:
    began = time.monotonic()
    assert outcomes(two.run(f"{SELF}:raises_on", 0, 1)) == ["raised", "raised"]
    assert time.monotonic() - began < 2
    passes(two)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGSEGV"])
def test_a_rank_dead_by_signal_has_died(two: Ranks, name: str) -> None:
    seen = two.run(f"{SELF}:signals_itself", name)
    assert seen[1].outcome == "died" and seen[0].outcome in ("raised", "hung")
    assert seen[1].facts["signal"] == name
    assert seen[1].stage == "before the end"
    assert "last words" in seen[1].error
    passes(two)


def test_a_real_segmentation_fault_tells_where(two: Ranks) -> None:
    seen = two.run(f"{SELF}:reads_null")
    assert seen[1].facts["signal"] == "SIGSEGV" and "in reads_null" in seen[1].error
    passes(two)


def test_a_rank_killed_between_cases_is_no_finding(two: Ranks) -> None:
    os.kill(two.run(f"{SELF}:whoami")[0].numbers["pid"], signal.SIGKILL)
    time.sleep(0.2)
    passes(two)


def test_an_endless_loop_is_hung_after_its_patience() -> None:
    ranks = pool(patience=1.0)
    seen = ranks.run(f"{SELF}:loops_on_1")
    assert outcomes(seen) == ["done", "hung"]
    assert [one.stage for one in seen] == ["loop", "loop"]
    assert "in loops_on_1" in seen[1].facts["stack"] and "no rank gave a sign of life for 1" in seen[1].error
    assert seen[1].inside == -1 and not seen[1].waits
    passes(ranks)
    ranks.close()


def test_two_pools_at_once(two: Ranks) -> None:
    four, lone = pool(4), pool(1, start=None)
    passes(four), passes(two), passes(four)
    pids = {one.numbers["pid"] for ranks in (two, four, lone) for one in ranks.run(f"{SELF}:whoami")}
    four.close(), lone.close()
    assert len(pids) == 7
    passes(two)


def test_ranks_know_nothing_of_the_parents_main_module(two: Ranks) -> None:
    assert two.run(f"{SELF}:imported", "pytest", "hypothesis")[0].facts == {
        "pytest": False,
        "hypothesis": False,
    }


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (
            "start_fails_on_1",
            "rank 1: could not call tests.in_ranks:start_fails_on_1: ValueError: cannot start with",
        ),
        ("start_dies", "exited with code 7 while it started:\nabout to leave"),
        ("no_such_start", "has no attribute 'no_such_start'"),
    ],
)
def test_a_pool_that_cannot_start_is_a_fault_of_the_harness(start: str, words: str) -> None:
    with pytest.raises(HarnessFault, match=words):
        pool(start=f"{SELF}:{start}", plants=("p",))


def test_a_module_that_cannot_be_preloaded_is_named() -> None:
    with pytest.raises(HarnessFault, match="could not import no_such_module: ModuleNotFoundError"):
        pool(1, start=None, preload=("torch", "no_such_module"))


@pytest.mark.parametrize(
    ("function", "args", "words"),
    [
        (
            "bulk",
            (33,),
            r"69,20\d,\d+ bytes of at most 67,108,864: rank 0 34,60\d,\d+ \(largest 'bulk'\), rank 1",
        ),
        ("bulk", (65,), r"136,31\d,\d+ bytes"),
        ("not_a_dict", (), r"could not pack what tests.in_ranks:not_a_dict returned: .*\['tensor'\]"),
        ("no_such_function", (), "could not import tests.in_ranks:no_such_function"),
    ],
)
def test_what_cannot_be_brought_back_is_a_fault_of_the_harness(
    two: Ranks, function: str, args: tuple, words: str
) -> None:
    with pytest.raises(HarnessFault, match=words):
        two.run(f"{SELF}:{function}", *args)
    passes(two)


def test_sixty_megabytes_arrive(two: Ranks) -> None:
    began = time.monotonic()
    assert [one.tensors["bulk"].numel() for one in two.run(f"{SELF}:bulk", 30)] == [30 * 2**20] * 2
    print(f"60 MiB in {time.monotonic() - began:.2f} s")


def test_a_machine_without_threads_is_no_finding(two: Ranks) -> None:
    """One line with what to do; the next case passes."""
    with pytest.raises(HarnessFault, match=r"rank \d: Resource temporarily unavailable: no more threads here; raise"):
        two.run(f"{SELF}:no_more_threads")
    passes(two)
