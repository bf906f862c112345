"""With a GPU: hangs and deaths over NCCL end with a verdict and give the memory back; failures are classified.

Needs megatron-core and at least one GPU; two ranks share it where there is one only.
"""

import subprocess
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from fuzz import device, known
from fuzz.case import Case
from fuzz.investigate import classified
from fuzz.trial import Trials, Verdict
from toy_models.spec import Batch, Layout

pytestmark = pytest.mark.skipif(device.name() == "cpu", reason="needs a GPU")
CASE = Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2))
LONGEST = 30.0  # seconds to a verdict; the case is confirmed in a fresh pool, which has as many
LIVENESS = "toy_models.planted.liveness:"


def used() -> int:
    """MiB in use on all GPUs."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    return sum(map(int, said.split()))


def settled(most: int) -> int:
    """MiB in use as soon as they are at most so many, or after some seconds."""
    until = time.monotonic() + 10
    while used() > most and time.monotonic() < until:
        time.sleep(0.2)
    return used()


@pytest.fixture(scope="module")
def healthy() -> Iterator[Trials]:
    with closing(Trials(plants=known.mends())) as trials:
        yield trials


def judged(*plants: str) -> Verdict:
    with closing(Trials(plants=(*known.mends(), *plants))) as trials:
        return trials.judge(CASE)


@pytest.mark.parametrize(
    ("bug", "law"),
    [
        ("first_rank_alone_reduces", "collectives run in lock-step"),
        ("last_rank_is_killed", "every rank finishes"),
    ],
)
def test_lost_ranks_have_a_verdict_and_leave_no_memory(healthy: Trials, bug: str, law: str) -> None:
    assert healthy.judge(CASE).violation is None
    before, trials = used(), Trials(plants=(*known.mends(), LIVENESS + bug))
    with closing(trials):
        trials.judge(Case(layout=Layout(world=2), batch=Batch(rows=2)))  # the pool has started, and its cause is known
        began = time.monotonic()
        verdict = trials.judge(CASE)
        took = time.monotonic() - began
    after = settled(before)
    print(f"{bug}: {took:.1f} s, quiet {verdict.seconds.get('quiet', 0):.1f} s, MiB {before} before, {after} after")
    print(verdict.violation)
    assert verdict.violation is not None and verdict.violation.law == law
    assert took < LONGEST
    assert after <= before
    assert healthy.judge(CASE).violation is None


def test_what_fails_on_the_cpu_too_is_logic() -> None:
    plants = (*known.mends(), "toy_models.planted.gradients:expert_gradients_scaled_twice")
    with closing(Trials(plants=plants)) as trials, closing(trials.on_cpu()) as cpu:
        assert trials.judge(CASE).violation is not None
        assert classified(cpu.judge(CASE)).startswith("logic: fails on CPU too")


def test_what_the_cpu_does_right_is_of_the_gpu() -> None:
    plants = (*known.mends(), "tests.gpu_bugs:experts_are_off_on_the_gpu")
    with closing(Trials(plants=plants)) as trials, closing(trials.on_cpu()) as cpu:
        assert trials.judge(CASE).violation is not None
        assert classified(cpu.judge(CASE)).startswith("kernel, stream or precision: GPU only")


def test_this_process_has_not_opened_cuda(healthy: Trials) -> None:
    assert healthy.judge(CASE).facts is not None
    assert not torch.cuda.is_initialized()
