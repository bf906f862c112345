"""What a user sees of pytest: bad input, faults of the harness, doubtful runs, sums. Each in a fresh pytest."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fuzz import plants

ROOT = Path(__file__).parent.parent


def run(*options: str, pretend: str = "") -> tuple[int, str]:
    """Exit code and output of `pytest fuzz/`, in the derandomized profile that keeps no database."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.pretend", "-p", "no:cacheprovider", "fuzz/"]
    hidden = ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST", "COLUMNS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [*command, "--hypothesis-profile=ci", *options],
        cwd=ROOT,
        env={**environment, "PRETEND": pretend},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


# ---- bad input -------------------------------------------------------------------------------------------------


PLANT = plants.FORM


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--plant", "nope:no"], f"Exit: --plant nope:no {PLANT}"),
        (["--plant", "nope"], f"Exit: --plant nope {PLANT}"),
        (["--plant", "toy_models.planted.state:nope"], f"Exit: --plant toy_models.planted.state:nope {PLANT}"),
        (["--hypothesis-profile=no"], "Exit: --hypothesis-profile=no must be one of dev, ci, deep"),
        (["--max-ranks=x"], "--max-ranks=x must be a number"),
        (["--shrink-seconds=x"], "--shrink-seconds=x must be a number"),
    ],
)
def test_what_does_not_exist_is_refused(options: list[str], said: str) -> None:
    code, text = run(*options)
    assert (code, lines(text)) == (2, [said])


def test_no_ranks_at_all_is_refused() -> None:
    """One line with the number, exit code 2, and nothing is started."""
    code, text = run("--max-ranks=0")
    assert (code, lines(text)) == (2, ["Exit: --max-ranks=0 must be at least 1"])


def test_an_unsupported_megatron_is_refused() -> None:
    """One line that names the version found, those supported, and the way out."""
    code, text = run(pretend="old_megatron")
    [line] = lines(text)
    assert code == 2
    assert "megatron-core 0.1.0" in line and "0.16.1, 0.19.2" in line and "--any-version" in line


def test_any_version_goes_on_with_a_warning() -> None:
    """Whoever insists is told in the header, and gets all tests."""
    code, text = run("--any-version", "--collect-only", "-k", "pasted", pretend="old_megatron")
    warnings = [line for line in lines(text) if line.startswith("WARNING: megatron-core 0.1.0 is untested")]
    assert (code, len(warnings)) == (0, 1), text
    assert "test_pasted_cases" in text


# ---- faults of ours --------------------------------------------------------------------------------------------


def test_a_fault_of_the_harness_is_neither_a_finding_nor_a_pass(tmp_path: Path) -> None:
    """One line, exit code 2, an error in JUnit and no failure; the run stops there."""
    code, text = run("-k", "any_case", "--max-ranks=2", f"--junitxml={tmp_path}/junit.xml", pretend="fault")
    assert code == 2, text
    assert [line for line in lines(text) if line.startswith("harness fault:")] == [
        "harness fault: the reference died on Case()"
    ]
    assert "Traceback" not in text and "@example" not in text and "Falsifying" not in text
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("errors"), suite.get("failures")) == ("1", "0")
    assert len(suite.findall("testcase/error")) == 1


# ---- doubts and sums -------------------------------------------------------------------------------------------

MANY = ("-k", "any_case or dispatchers or shipped")


@cache
def doubtful(*options: str) -> tuple[int, str]:
    return run(*MANY, *options, pretend="doubts")


def numbers(text: str) -> list[list[str]]:
    """The summary, row by row, as words in any order: which came first depends on the workers."""
    _, summary = text.split("ep-ppo-fuzz: what was covered", 1)
    return [sorted(re.findall(r"[\w.%]+", line)) for line in lines(summary) if not line.startswith("=")]


def test_a_run_that_could_not_judge_fails() -> None:
    """All passed, but more than two cases in a hundred were inconclusive: exit code 1 and the reason."""
    code, text = doubtful()
    assert code == 1, text
    assert "9 passed" in text
    [said] = [line for line in lines(text) if line.startswith("FAILED:")]
    cases, number = re.findall(r"(\d+) of (\d+) cases", said)[0]
    assert 100 <= int(number) <= 180 and int(number) / 50 < int(cases) < int(number)
    assert f"{cases}: a margin below the noise {cases}" in text


@pytest.mark.slow
def test_the_summary_adds_up_over_workers() -> None:
    """pytest-xdist shares the tests out; the numbers and the verdict stay."""
    alone, shared = doubtful(), doubtful("-n", "2")
    assert shared[0] == alone[0] == 1, shared[1]
    assert numbers(shared[1]) == numbers(alone[1])


@pytest.mark.slow
def test_a_real_case_is_counted_over_workers() -> None:
    """The smallest case on real ranks, judged in a worker, counted in the parent."""
    code, text = run("--max-ranks=1", "-k", "pasted", "-n", "2")
    assert code == 0, text
    assert re.search(r"cases +│ 1 \(1 ranks 1\)", text), text
    assert re.search(r"every rank finishes +│ 1 +│ 0", text), text
