"""Collectives on NCCL return before they are done: what cannot match is named all the same. Needs a GPU, no megatron.

Where only torch, pytest and psutil are installed: `python -m pytest --noconftest tests/test_lockstep_nccl.py`.
"""

import time
from collections.abc import Iterator

import pytest
import torch

from fuzz import forking
from fuzz.case import Case
from fuzz.laws import liveness
from fuzz.ranks import Ranks
from tests.test_lockstep import CANNOT_MATCH, NOTHING, verdict

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SELF = "tests.in_nccl_ranks"
LONGEST = 30.0  # seconds: communicators are made, and what only the patient take for a deadlock waits up to 12 s


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forking, "PRELOAD", ("torch",))  # the fork server must not touch the GPU
        ranks = Ranks(2, start=f"{SELF}:start", preload=("torch", SELF))
        yield ranks
        ranks.close()


def passes(two: Ranks) -> None:
    seen = two.run(f"{SELF}:total", 1.5)
    assert [(one.outcome, one.facts) for one in seen] == [("done", {"device": "cuda:0", "backend": "nccl"})] * 2
    assert [one.tensors["sum"].tolist() for one in seen] == [[3.0]] * 2
    assert liveness.collectives_run_in_lock_step(Case(), seen, NOTHING) == 2


def test_calls_that_match_pass_and_are_counted(two: Ranks) -> None:
    for _ in range(3):
        passes(two)


@pytest.mark.parametrize(("how", "words"), CANNOT_MATCH)
def test_calls_that_cannot_match_are_named(two: Ranks, how: str, words: tuple[str, ...]) -> None:
    began = time.monotonic()
    seen = two.run(f"{SELF}:out_of_step", how)
    took, said = time.monotonic() - began, verdict(seen)
    quiet = max(one.seconds.get("quiet", 0.0) for one in seen)
    print(f"{took:.2f} s, {quiet:.2f} s of them quiet, {[one.outcome for one in seen]}: {said}")
    assert said.startswith("collectives run in lock-step: ") and all(part in said for part in words), said
    assert took < LONGEST
    passes(two)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_death_is_that_of_its_rank(two: Ranks, name: str) -> None:
    """Rank 0 waits for its device, or is ended by NCCL when its peer has gone: rank 1 is to blame."""
    seen = two.run("tests.in_ranks:signals_itself", name)
    said = verdict(seen)
    print([one.outcome for one in seen], said)
    assert said.startswith(f"every rank finishes: rank 1 died of {name} in stage before the end; rank 0 ")
    passes(two)


def test_an_exception_is_that_of_its_rank(two: Ranks) -> None:
    seen = two.run("tests.in_ranks:raises_on", 1)
    said = verdict(seen)
    assert said.startswith("every rank finishes: rank 1 raised RuntimeError at ") and "; rank 0 waited " in said, said
    assert max(one.seconds.get("quiet", 0.0) for one in seen) < 3
    passes(two)
