"""The search of a test: verdicts recorded by case, a budget, the best so far on disk, one folder per failure."""

import errno
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from fuzz import repro
from fuzz.case import Case, HarnessFault, Violation, violation_of
from fuzz.case_json import from_json
from fuzz.descent import smallest
from fuzz.folders import Folders, name
from fuzz.investigate import investigate
from fuzz.timebox import Failure, TimeBox, TimeUp
from toy_models.spec import Batch, Layout, MoEModel

ROOT = Path(__file__).parents[1]
LARGE = Case(layout=Layout(world=4, ep=2), batch=Batch(rows=4))
MIDDLE = Case(layout=Layout(world=2, ep=2), batch=Batch(rows=4))
SMALL = Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2))


def broken(case: Case, law: str = "law", cause: str = "") -> Violation:
    kind = violation_of(cause) if cause else Violation
    return kind(case, law, "rank 0", "1", "2", "in words")


class Judge:
    """Breaks the law on every case with more than one rank, and counts what was really run."""

    def __init__(self) -> None:
        self.run: list[Case] = []

    def __call__(self, case: Case) -> Violation | None:
        self.run.append(case)
        if case.layout.world == 1:
            return None
        try:
            self._law(case)
        except Violation as violation:
            return violation
        raise AssertionError

    def _law(self, case: Case) -> None:
        self.seen = Bulk()
        bulk = self.seen
        self.alive = weakref.ref(bulk)
        del self.seen
        raise broken(case)


class Bulk:
    """What a rank saw."""


def failing(box: TimeBox, case: Case, judge: Judge) -> Violation:
    with pytest.raises(Violation) as caught:
        box.run(case, judge)
    return caught.value


def stay(case: Case, fails: object) -> None:
    """No leaps: Hypothesis alone asks for cases."""


# ---- the time box ----------------------------------------------------------------------------------------------


def test_a_verdict_is_found_once_and_repeated() -> None:
    judge, box = Judge(), TimeBox(60.0, lambda _: None, leaps=stay)
    first = failing(box, SMALL, judge)
    depth = _depth(first)
    assert failing(box, SMALL, judge) is first and _depth(failing(box, SMALL, judge)) == depth
    box.run(Case(), judge)
    box.run(Case(), judge)
    assert judge.run == [SMALL, Case()] and box.cases == 2


def _depth(error: BaseException) -> int:
    trace, found = error.__traceback__, 0
    while trace is not None:
        trace, found = trace.tb_next, found + 1
    return found


def test_a_recorded_violation_does_not_keep_what_was_seen() -> None:
    judge, box = Judge(), TimeBox(60.0, lambda _: None, leaps=stay)
    failing(box, SMALL, judge)
    gc.collect()
    assert judge.alive() is None


def test_once_the_budget_is_spent_the_search_ends_with_the_smallest() -> None:
    """By what is no Exception, which Hypothesis would shrink; nothing more is run, nothing recorded as passed."""
    judge, box = Judge(), TimeBox(0.0, lambda _: None, leaps=stay)
    assert box.left() == float("inf")
    failing(box, LARGE, judge)
    for case in (SMALL, LARGE):
        with pytest.raises(TimeUp) as ended:
            box.run(case, judge)
        assert ended.value.verdict() is box.failures["law", ""].violation
    assert box.left() == 0 and judge.run == [LARGE] and box.cases == 1


def test_several_failures_end_as_a_group() -> None:
    first, second = broken(SMALL), broken(MIDDLE, "other")
    verdict = TimeUp([first, second]).verdict()
    assert isinstance(verdict, ExceptionGroup) and verdict.exceptions == (first, second)


def test_the_best_is_the_smallest_and_every_better_one_is_told() -> None:
    told: list[Failure] = []
    box = TimeBox(60.0, told.append, leaps=stay)
    for case in (MIDDLE, LARGE, SMALL, MIDDLE):
        failing(box, case, Judge())
    assert [one.violation.case for one in told] == [MIDDLE, SMALL]
    assert {one.first for one in told} == {MIDDLE} and [one.tried for one in told] == [1, 3]


def test_laws_and_causes_are_failures_of_their_own() -> None:
    told: list[Failure] = []
    box = TimeBox(60.0, told.append, leaps=stay)
    for case, violation in zip(
        (SMALL, MIDDLE, LARGE), (broken(SMALL), broken(MIDDLE, cause="a"), broken(LARGE, "b")), strict=True
    ):
        with pytest.raises(Violation):
            box.run(case, lambda _, found=violation: found)
    assert set(box.failures) == {("law", ""), ("law", "a"), ("b", "")} and len(told) == 3


# ---- leaps -----------------------------------------------------------------------------------------------------

ETP = Case(layout=Layout(world=2, etp=2), batch=Batch(rows=2))


def test_leaps_end_on_the_simplest_layout_that_fails() -> None:
    """Degrees that the first case has not are tried too: EP is simpler than ETP."""
    assert smallest(ETP, lambda case: case.layout.ep * case.layout.etp > 1) == SMALL


def test_leaps_keep_the_rows_where_ranks_are_fewer() -> None:
    """What needs three rows needs no three ranks."""
    assert smallest(Case(layout=Layout(world=4), batch=Batch(rows=4)), lambda case: case.batch.rows > 2) == Case(
        batch=Batch(rows=3)
    )


def test_leaps_go_back_to_what_they_began_with() -> None:
    """On the simpler layout it takes more experts than on the one where they were first brought down."""
    first = Case(layout=Layout(world=2, etp=2), model=MoEModel(experts=8), batch=Batch(rows=2))

    def fails(case: Case) -> bool:
        return case.layout.etp > 1 or (case.layout.ep > 1 and case.model.experts >= 4)

    assert smallest(first, fails) == Case(layout=SMALL.layout, model=MoEModel(experts=4), batch=SMALL.batch)


def test_a_smaller_case_of_hypothesis_is_brought_down_too() -> None:
    """And the budget is one for all, from the first failure on."""
    box = TimeBox(60.0, lambda _: None)

    def judge(case: Case) -> Violation | None:
        alone = case.layout.world == 1 and case.model.hidden > 8
        return broken(case) if case.layout.tp > 1 or alone else None

    large = Case(layout=Layout(world=2, tp=2, ep=2), model=MoEModel(heads=2, kv_heads=2))
    for case in (large, Case(model=MoEModel(hidden=16, layers=3))):
        with pytest.raises(Violation):
            box.run(case, judge)
    assert box.failures["law", ""].violation.case == Case(model=MoEModel(hidden=16)) and 0 < box.left() < 60


# ---- folders ---------------------------------------------------------------------------------------------------


def failure(case: Case, first: Case = LARGE, cause: str = "") -> Failure:
    return Failure(broken(case, "Every copy, delivered once", cause), first, 1)


def held(folder: Path, file: str = "case.json") -> Case:
    return from_json((folder / file).read_text())


def test_the_name_is_law_and_hash_and_depends_on_what_failed() -> None:
    names = {name(failure(case, cause=cause)) for case in (SMALL, MIDDLE) for cause in ("", "a")}
    assert len(names) == 4 and name(failure(SMALL)) == name(failure(SMALL, first=MIDDLE))
    assert all(one.startswith("every-copy-delivered-once-") and len(one) == 34 for one in names)


def test_a_smaller_case_renames_the_folder_and_the_first_case_stays(tmp_path: Path) -> None:
    folders = Folders(tmp_path)
    before = folders.keep(failure(LARGE))
    assert held(before) == LARGE == held(before, "original.json")
    after = folders.keep(failure(SMALL))
    assert held(after) == SMALL and held(after, "original.json") == LARGE
    assert [path.name for path in tmp_path.iterdir()] == [after.name] and not list(after.glob(".*"))


def test_a_failure_found_before_is_one_folder(tmp_path: Path) -> None:
    known = Folders(tmp_path).keep(failure(SMALL, first=MIDDLE))
    (known / "report.md").write_text("as it was")
    again = Folders(tmp_path)
    again.keep(failure(LARGE))
    assert again.keep(failure(SMALL)) == known and [path.name for path in tmp_path.iterdir()] == [known.name]
    assert held(known, "original.json") == MIDDLE and (known / "report.md").read_text() == "as it was"


def test_what_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("")
    folders = Folders(tmp_path / "occupied")
    for _ in range(2):
        folders.keep(failure(SMALL))
        folders.keep(failure(MIDDLE))
    [said] = folders.warnings
    assert said.startswith(f"WARNING: {tmp_path}/occupied cannot be written (Not a directory)")


def test_half_a_file_is_never_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills while a smaller case is written: what lay there stays, and nothing beside it."""
    folders = Folders(tmp_path)
    folder = folders.keep(failure(SMALL, first=MIDDLE))

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:9])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert folders.keep(failure(SMALL)) == folder and held(folder) == SMALL
    assert {file.name for file in folder.iterdir()} == {"case.json", "original.json"}
    assert len(folders.warnings) == 1 and "(No space left on device)" in folders.warnings[0]


class Broken:
    """Trials whose every case is a fault of the harness."""

    plants = ()

    def judge(self, case: Case, times_patience: float = 1.0) -> None:
        raise HarnessFault("rank 0: its reply could not be written\nwith more below")

    def traced(self, case: Case) -> None:
        self.judge(case)


def test_a_fault_of_the_harness_after_the_search_loses_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be found out is named, and the report is written all the same."""
    monkeypatch.setattr(repro, "check", lambda *_: "exit code 0, []")
    folder, report = investigate(failure(SMALL), Broken(), Folders(tmp_path), seconds=1.0)  # type: ignore[arg-type]
    text, fault = (folder / "report.md").read_text(), "HarnessFault: rank 0: its reply could not be written"
    assert held(folder) == SMALL and report.runs == (0, 0) and "Run again" not in text
    assert f"Not found out: again: {fault}; diverge: {fault}; repro.py did not show the bug: exit code 0" in text


# ---- the whole way, in a run of pytest -------------------------------------------------------------------------


def run(tmp_path: Path, *arguments: str, selected: str = "any_case and 2ranks") -> tuple[int, str]:
    """`pytest fuzz/` on a copy of the test file, so that .fuzz lies in a folder of its own."""
    for file in ("conftest.py", "pyproject.toml", "fuzz"):
        if not (tmp_path / file).exists():
            (tmp_path / file).symlink_to(ROOT / file)
    command = [sys.executable, "-m", "pytest", "fuzz/", "--hypothesis-profile=ci", "--max-ranks=2", "-k", selected]
    done = subprocess.run(
        [*command, f"--rootdir={tmp_path}", "-p", "no:cacheprovider", "-p", "tests.pretend", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PRETEND": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def folders_of(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / ".fuzz" / "failures").iterdir())


def test_a_failure_becomes_a_folder_with_all_that_a_maintainer_asks(tmp_path: Path) -> None:
    code, said = run(
        tmp_path, "--plant", "toy_models.planted.gradients:expert_gradients_scaled_twice", "--shrink-seconds=16"
    )
    assert code == 1, said
    [folder] = folders_of(tmp_path)
    files = {"case.json", "original.json", "report.md", "repro.py", "divergence.png"}
    assert {file.name for file in folder.iterdir()} == files
    case, original = held(folder), held(folder, "original.json")
    assert case == Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2)) != original
    report = (folder / "report.md").read_text()
    for part in (
        "EP=2 on 2 ranks",
        "failed 3 times (3/3)",
        "megatron-core | 0.",
        "holds for EP=1",
        "```python\nCase(layout=",
    ):
        assert part in report, part
    for part in (
        "law violated  gradients match the reference",
        "report      .fuzz/failures/",
        "new failures",
        f"@example({case!r})",
    ):
        assert part in said, part
    assert "Traceback" not in said and "site-packages" not in said


@pytest.mark.slow
def test_two_root_causes_of_one_law_are_two_failures(tmp_path: Path) -> None:
    code, said = run(tmp_path, "--plant", "tests.in_ranks:two_causes", "--shrink-seconds=4")
    assert code == 1, said
    folders = folders_of(tmp_path)
    assert [folder.name.rpartition("-")[0] for folder in folders] == ["every-rank-finishes"] * 2
    reports = [(folder / "report.md").read_text() for folder in folders]
    causes = ["raised KeyError at megatron/core/", "raised ValueError at megatron/core/"]
    assert sorted(cause for cause in causes for report in reports if cause in report.splitlines()[0]) == causes
    assert all("## Every rank: last collective and stack" in report for report in reports)
    shown = {line for line in said.splitlines() if line.startswith("@example")}
    assert shown == {f"@example({held(folder)!r})" for folder in folders}


@pytest.mark.slow
def test_an_unwritable_folder_is_one_warning_and_the_report_is_printed(tmp_path: Path) -> None:
    (tmp_path / ".fuzz").write_text("in the way")
    code, said = run(tmp_path, "--plant", "toy_models.planted.liveness:starved_expert_raises", "--shrink-seconds=2")
    assert code == 1 and said.count("WARNING: ") == 1, said
    assert "(Not a directory); reports are printed here instead, the run goes on" in said
    assert "## Minimal case" in said and "## Environment" in said and "@example(Case(" in said


def test_a_bad_budget_is_one_line() -> None:
    asked = [sys.executable, "-m", "pytest", "fuzz/", "--shrink-seconds=-1"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "--shrink-seconds=-1.0 must be 0 or more" in done.stdout + done.stderr
