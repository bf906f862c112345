"""A verdict depends on the case alone: in two orders, with all that is kept and with nothing, the bits are the same."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import Phase, given, settings

from fuzz import forking, known
from fuzz.case import Case, Observation
from fuzz.strategies import cases
from fuzz.trial import Trials


def _drawn(number: int, max_ranks: int) -> list[Case]:
    """The same cases every time: generated without randomness and without a database."""
    found: list[Case] = []

    @settings(derandomize=True, max_examples=number, database=None, deadline=None, phases=[Phase.generate])
    @given(cases(max_ranks=max_ranks))
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


def _digest(ranks: list[Observation]) -> str:
    """A hash of all that the ranks saw, bit by bit."""
    total = hashlib.blake2b(digest_size=16)
    for rank in ranks:
        total.update(repr((rank.outcome, sorted(rank.numbers.items()), sorted(rank.facts.items()))).encode())
        for name, tensor in sorted(rank.tensors.items()):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


class Remembering(Trials):
    """Trials that keep a digest of every run, the twins' included."""

    def __init__(self) -> None:
        super().__init__(plants=known.mends())
        self.digests: list[str] = []

    def _ranks(self, *args: Any) -> tuple[list[Observation], list[str]]:
        seen, passing = super()._ranks(*args)
        self.digests.append(_digest(seen))
        return seen, passing


@pytest.fixture(scope="module", autouse=True)
def _warm() -> Iterator[None]:
    forking.warm_up()
    yield


def _verdicts(order: list[Case]) -> Mapping[str, tuple]:
    trials, found = Remembering(), {}
    try:
        for case in order:
            trials.digests.clear()
            verdict = trials.judge(case)
            found[repr(case)] = str(verdict.violation), dict(verdict.counts), verdict.doubts, tuple(trials.digests)
    finally:
        trials.close()
    return found


def _alone(cases: list[Case]) -> Mapping[str, tuple]:
    """With nothing kept: no references, no pools, no process groups of an earlier case."""
    return {name: verdict for case in cases for name, verdict in _verdicts([case]).items()}


@pytest.mark.parametrize(
    ("number", "max_ranks"), [(8, 2), pytest.param(50, 4, marks=pytest.mark.slow)], ids=["few", "fifty"]
)
def test_verdicts_depend_on_the_case_alone(number: int, max_ranks: int) -> None:
    drawn = _drawn(number, max_ranks)
    assert len(drawn) == number
    assert _verdicts(drawn) == _verdicts(drawn[::-1]) == _alone(drawn)
