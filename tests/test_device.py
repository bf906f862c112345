"""Which device is chosen, what is refused in one line, where ranks sit, and that nobody but ranks opens a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fuzz import device, gpu_platform

ROOT = Path(__file__).parent.parent
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")


def ended(*arguments: str, **surroundings: str) -> tuple[int, list[str]]:
    """Exit code and lines of a command."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True, text=True, timeout=90, cwd=ROOT, env={**os.environ, **surroundings},
    )  # fmt: skip
    return done.returncode, [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device=tpu",), "--device=tpu must be cpu or cuda"),
        (("--ranks-per-gpu=0",), "--ranks-per-gpu=0 must be 1 to 16"),
        (("--ranks-per-gpu=some",), "--ranks-per-gpu=some must be a number"),
        pytest.param(("--device=cuda",), "--device=cuda needs a GPU, and torch ", marks=no_gpu),
    ],
)
def test_wrong_values_end_in_one_line(options: tuple[str, ...], said: str) -> None:
    code, lines = ended("pytest", "fuzz/", "--collect-only", "-q", *options)
    assert code == 2
    assert [line for line in lines if said in line] == lines[:1]


@no_gpu
def test_commands_refuse_cuda_where_there_is_none() -> None:
    code, lines = ended("fuzz", "replay", "--device=cuda", "no_such_file.json")
    assert code == 2
    assert len(lines) == 1 and "--device=cuda needs a GPU" in lines[0]


def test_the_header_says_which_device() -> None:
    code, lines = ended("pytest", "fuzz/", "--collect-only", "--device=cpu", "-k", "nothing_of_this_name")
    assert code == 5, lines
    assert any(line.startswith("device: cpu") for line in lines)


def test_on_the_cpu_no_gpu_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.VISIBLE, "0")
    monkeypatch.setenv(device.PER_GPU, "8")
    device.choose("cpu")
    assert os.environ[device.VISIBLE] == ""
    assert device.name() == "cpu" and device.most_ranks() is None


def test_gpus_are_counted_and_ranks_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.PER_GPU, "8")
    monkeypatch.setattr(device, "gpus", lambda: 2)
    device.choose("cuda", 4)
    assert device.name() == "cuda" and device.most_ranks() == 8


@pytest.mark.parametrize(
    ("ranks", "gpus", "places"),
    [(1, 1, [0]), (4, 1, [0] * 4), (4, 2, [0, 0, 1, 1]), (8, 4, [0, 0, 1, 1, 2, 2, 3, 3]), (2, 8, [0, 1])],
)
def test_each_gpu_gets_as_many_ranks(ranks: int, gpus: int, places: list[int]) -> None:
    assert [gpu_platform.gpu_of(rank, ranks, gpus) for rank in range(ranks)] == places


def test_only_ranks_that_share_a_gpu_are_hosts_of_their_own() -> None:
    shared = [gpu_platform.environment(rank, 4, 2) for rank in range(4)]
    assert len({each["NCCL_HOSTID"] for each in shared}) == 4
    assert all(each["NCCL_SOCKET_IFNAME"] == "lo" and each["NCCL_NVLS_ENABLE"] == "0" for each in shared)
    assert gpu_platform.environment(0, 4, 4) == gpu_platform.ENVIRONMENT


def test_preloading_opens_no_gpu() -> None:
    """All that the fork server imports, in a process of its own."""
    code = "import importlib; from fuzz import device, forking\n"
    code += "for name in forking.PRELOAD: importlib.import_module(name)\n"
    code += "import torch; device.gpus(), device.told(); assert not torch.cuda.is_initialized()\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
