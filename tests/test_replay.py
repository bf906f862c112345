"""`python -m fuzz replay`: one line per case file, exit codes, JSON; real ranks for every outcome that needs them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fuzz import forking, known, laws, memory, replay
from fuzz.__main__ import main
from fuzz.case import Case, Violation
from fuzz.case_json import to_json
from fuzz.replay import Replayed, exit_code, flat, law_named, outcome_of
from fuzz.trial import Verdict
from tests.test_command_line import ROOT
from toy_models.spec import Batch, Layout

EP = Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2))
PLANT = "toy_models.planted.gradients:expert_gradients_scaled_twice"
BROKEN = "gradients match the reference"
COMMAND = [sys.executable, "-m", "fuzz", "replay"]
needs_bugs = pytest.mark.skipif(not known.living(), reason="no known bug lives in this megatron-core")


@pytest.fixture(scope="module", autouse=True)
def _warm() -> Iterator[None]:
    forking.warm_up()
    yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """ep.json, none.json (no case) and the folder of a failure, failures/one/."""
    failure = tmp_path / "failures" / "one"
    failure.mkdir(parents=True)
    for path in (tmp_path / "ep.json", failure / "case.json", failure / "original.json"):
        path.write_text(to_json(EP))
    (tmp_path / "none.json").write_text('{"schema": 1')
    return tmp_path


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


# ---- the command itself ----------------------------------------------------------------------------------------


def test_each_file_gets_its_line(folder: Path) -> None:
    """A fresh process: holds, fixed, known and invalid, in the order of their paths; invalid decides the exit code."""
    expected = [
        f"{folder}/ep.json: HOLDS",
        f"{folder}/failures/one/case.json: FIXED",
        f"{folder}/none.json: INVALID a case file must be JSON: Expecting ',' delimiter: line 1 column 13 (char 12)",
    ]
    for bug in known.living()[:1]:
        (folder / "known.json").write_text(to_json(bug.example))
        expected.insert(2, f"{folder}/known.json: KNOWN {bug.id}; ")
    done = subprocess.run([*COMMAND, "--keep-going", folder], cwd=ROOT, capture_output=True, text=True, timeout=120)
    found = done.stdout.splitlines()
    assert len(found) == len(expected), done.stderr
    assert [line[: len(start)] for line, start in zip(found, expected, strict=True)] == expected
    assert done.returncode == 2
    assert done.stderr.startswith(f"{len(expected)} case files: 1 HOLDS, 1 FIXED, ") and done.stderr.count("\n") == 1


def test_a_broken_law_has_its_numbers(folder: Path) -> None:
    """The planted bug halves a gradient: the line has the law, who saw it, and both numbers; exit code 1."""
    command = [*COMMAND, "--plant", PLANT, str(folder / "failures")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    [line] = done.stdout.splitlines()
    path, said = line.split(": ", 1)
    assert (done.returncode, path) == (1, f"{folder}/failures/one/case.json")
    law, witness, numbers, also = said.split("; ")
    assert law == f"VIOLATED {BROKEN}" and witness.startswith("rank 0, 0/0/actor/grad/") and "norm" in also
    expected, observed = (float(number.split()[1]) for number in numbers.split(", "))
    assert observed == pytest.approx(expected / 2)


# ---- outcomes and options --------------------------------------------------------------------------------------


def test_it_stops_at_the_first_broken_case(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And says how many were not tried."""
    assert main(["replay", "--plant", PLANT, str(folder)]) == 1
    out, said = capsys.readouterr()
    assert len(out.splitlines()) == 1 and f"ep.json: VIOLATED {BROKEN}; " in out
    assert said == "3 case files: 1 VIOLATED, 2 not tried; --keep-going goes on\n"


def test_invalid_wins_over_violated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --keep-going all are tried: two violated, one invalid, exit code 2."""
    assert main(["replay", "--plant", PLANT, "--keep-going", str(folder)]) == 2
    assert [line.split(": ")[1].split()[0] for line in lines(capsys)] == ["VIOLATED", "VIOLATED", "INVALID"]


def test_json_is_one_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing else is on stdout; every field is there, with full numbers."""
    paths = [str(folder / "ep.json"), str(folder / "none.json")]
    assert main(["replay", "--json", "--keep-going", "--plant", PLANT, *paths]) == 2
    broken, wrong = json.loads(capsys.readouterr().out)
    assert list(broken) == [
        "outcome", "path", "law", "witness", "expected", "observed", "sentence", "why", "seconds"
    ]  # fmt: skip
    assert (broken["outcome"], broken["law"], broken["path"]) == ("VIOLATED", BROKEN, paths[0])
    assert float(broken["observed"]) == pytest.approx(float(broken["expected"]) / 2)
    assert "differs by 5.00e-01" in broken["sentence"] and broken["seconds"] > 0
    assert (wrong["outcome"], wrong["law"], wrong["path"]) == ("INVALID", "", paths[1])


def test_verbose_has_all_below(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Expected, observed and the sentence, each on a line of its own."""
    assert main(["replay", "--verbose", "--plant", PLANT, str(folder / "ep.json")]) == 1
    _, *below = lines(capsys)
    assert [line.split()[0] for line in below] == ["expected", "observed", "in"]
    assert all(line.startswith("    ") for line in below)


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        (BROKEN, 1, f"VIOLATED {BROKEN}; rank 0"),
        ("gradient-norm_matches the reference", 1, f"VIOLATED gradient norm matches the reference; after {BROKEN} "),
        ("routing is valid", 0, "HOLDS routing is valid"),
        ("the dispatchers agree", 0, "HOLDS the dispatchers agree; (vacuous)"),
    ],
)
def test_only_the_law_that_is_asked_for_counts(
    folder: Path, capsys: pytest.CaptureFixture[str], asked: str, code: int, said: str
) -> None:
    """Broken itself, broken after another, held, or with nothing to check."""
    assert main(["replay", "--plant", PLANT, "--law", asked, str(folder / "ep.json")]) == code
    [line] = lines(capsys)
    assert line.startswith(f"{folder}/ep.json: {said}")


@needs_bugs
def test_a_known_bug_counts_only_with_no_known(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default the case holds with the mend and breaks without: KNOWN. With --no-known it is a finding."""
    bug, path = known.living()[0], folder / "known.json"
    path.write_text(to_json(bug.example))
    assert main(["replay", str(path)]) == 0
    [line] = lines(capsys)
    assert line.startswith(f"{path}: KNOWN {bug.id}; rank 0, ") and bug.upstream.split(",")[0] in line
    assert main(["replay", "--no-known", str(path)]) == 1
    [line] = lines(capsys)
    assert line.startswith(f"{path}: VIOLATED {bug.law}; ")
    assert main(["replay", "--law", "routing is valid", str(path)]) == 0
    assert lines(capsys) == [f"{path}: HOLDS routing is valid"]


def test_a_case_that_this_machine_cannot_hold(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not started, and inconclusive: the next machine may have the room."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": memory.GIB // 4}))
    assert main(["replay", str(folder / "ep.json")]) == 2
    [line] = lines(capsys)
    assert "INCONCLUSIVE may take 0.8 GiB of memory, and 0.2 GiB are free here" in line


# ---- wrong usage and faults ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--law", "gradient match"], "no law is called 'gradient match'; the closest are: gradients match the ref"),
        (["--plant", "tests"], "tests must be MODULE:FUNCTION or FILE.py:FUNCTION"),
        (["--plant", "tests.nowhere:bug"], "tests.nowhere:bug must be MODULE:FUNCTION or FILE.py:FUNCTION"),
        (["--laws"], "unrecognized arguments: --laws"),
    ],
)
def test_wrong_usage_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    """Exit code 2, nothing on stdout, no traceback."""
    try:
        code = main(["replay", *arguments, str(folder / "ep.json")])
    except SystemExit as end:  # argparse's way
        code = end.code  # type: ignore[assignment]
    out, error = capsys.readouterr()
    assert (code, out) == (2, "") and "Traceback" not in error
    assert len([line for line in error.splitlines() if said in line]) == 1, error


@pytest.mark.parametrize("arguments", [["reply"], []], ids=["unknown command", "nothing"])
def test_the_commands_are_named(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert code == 2 and "replay" in error and "show" in error


def test_an_unsupported_megatron_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line that pytest says too; with --any-version a warning, and on it goes."""
    monkeypatch.setattr(known, "version", lambda: "0.1.0")
    said = "megatron-core 0.1.0 is not supported (supported: 0.16.1, 0.19.2)"
    assert main(["replay", str(folder / "ep.json")]) == 2
    assert capsys.readouterr() == ("", f"python -m fuzz: {said}; --any-version goes on all the same\n")
    assert main(["replay", "--any-version", str(folder / "none.json")]) == 2
    out, error = capsys.readouterr()
    assert error == f"WARNING: {said}\n" and "INVALID" in out


# ---- cut short -------------------------------------------------------------------------------------------------


def _started(folder: Path, number: int) -> "subprocess.Popen[str]":
    for i in range(number):
        (folder / f"a{i:02}.json").write_text(to_json(EP))
    pipe = subprocess.PIPE
    return subprocess.Popen([*COMMAND, folder], cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def _family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def _gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_ctrl_c_keeps_what_was_judged(tmp_path: Path) -> None:
    """What was printed stays, the number of those left is said, no process is left, exit code 130."""
    process = _started(tmp_path, 60)
    assert process.stdout is not None
    first = process.stdout.readline()
    children = _family(process)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert first == f"{tmp_path}/a00.json: HOLDS\n" and process.returncode == 130
    judged = 1 + len(out.splitlines())
    assert error == f"60 case files: {judged} HOLDS, {60 - judged} not tried\n"
    assert len(children) >= 4 and _gone(children)


def test_ctrl_c_while_everything_starts(folder: Path) -> None:
    """Imports that are cut short print no traceback, in this process or in the one that ranks are forked from."""
    process = _started(folder, 1)
    assert process.stdout is not None
    until = time.monotonic() + 20
    while not (children := _family(process)) and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert error == "4 case files: none judged, 4 not tried\n" and _gone(children)


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    """As `| head -1` does: the next line cannot be written, and that is all."""
    process = _started(tmp_path, 60)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    children = _family(process)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=30) == 141 and "Traceback" not in error and "Exception" not in error
    assert _gone(children)


def test_no_rank_starts_for_what_is_no_case(folder: Path) -> None:
    """An invalid file is answered before torch could be imported."""
    began = time.monotonic()
    done = subprocess.run([*COMMAND, folder / "none.json"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "") and time.monotonic() - began < 2


# ---- what a verdict means --------------------------------------------------------------------------------------


def verdict(violation: Violation | None = None, **changes: object) -> Verdict:
    """A verdict of all laws fired, or as changed."""
    counts = dict.fromkeys(laws.NAMES, 3)
    usual = {"case": EP, "counts": counts, "violation": violation, "doubts": (), "ill_conditioned": False}
    return Verdict(**{"facts": {}, "seconds": {}, **usual, **changes})  # type: ignore[arg-type]


LIVENESS = Violation(EP, "every rank finishes", "rank 1, stage update", "done on every rank", "a\nlong\ntrace", "")


def test_what_could_not_be_judged_does_not_hold() -> None:
    """Doubts and ill-conditioned cases are inconclusive, and so is a law behind one that ended everything."""
    assert outcome_of(verdict(doubts=("a tie", "a token")), "") == Replayed("INCONCLUSIVE", why="a tie; a token")
    assert outcome_of(verdict(ill_conditioned=True), "").outcome == "INCONCLUSIVE"
    dead = outcome_of(verdict(LIVENESS, counts={}), "routing_is_valid")
    assert dead.outcome == "INCONCLUSIVE" and "every rank finishes is broken, rank 1, stage update" in dead.why
    assert outcome_of(verdict(LIVENESS, counts={}), "every_rank_finishes").outcome == "VIOLATED"
    assert outcome_of(verdict(LIVENESS, doubts=("a tie",)), "").outcome == "VIOLATED"


def test_the_last_line_of_a_trace_is_shown() -> None:
    """One line whatever an exception says; the terminal is not spoken to."""
    assert outcome_of(verdict(LIVENESS), "").line() == (
        ": VIOLATED every rank finishes; rank 1, stage update; expected done on every rank, observed trace"
    )
    assert flat("\x1b[2Jhidden\n") == "\\x1b[2Jhidden" and len(flat("x" * 999)) == 160


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [("HOLDS FIXED KNOWN", 0), ("HOLDS VIOLATED", 1), ("VIOLATED INCONCLUSIVE", 2), ("INVALID VIOLATED", 2), ("", 0)],
)
def test_exit_codes(outcomes: str, code: int) -> None:
    assert exit_code([Replayed(outcome) for outcome in outcomes.split()]) == code


def test_laws_are_found_by_name_and_by_sentence() -> None:
    """By its name, in any spelling; a Violation states the name in words."""
    for name in laws.NAMES:
        assert law_named(name) == law_named(name.replace("_", " ")) == law_named(name.replace("_", "-").upper()) == name
    assert replay._is("rows are the same on model-parallel ranks", "rows_are_the_same_on_model_parallel_ranks")
