"""`python -m fuzz recall`: a quick recall of one bug per family, bugs of one's own, and what is refused."""

import json
import os
import signal
from pathlib import Path

import pytest

from fuzz import hunt, plants
from fuzz.__main__ import main
from fuzz.case import Case, Violation
from fuzz.hunt import Recalled
from fuzz.plants import Plant
from fuzz.recall import _Told
from fuzz.recalled import Control, Recall, minimal_layout, plain, totals
from fuzz.rows import covering
from toy_models.spec import Batch, Layout

# Of every family of laws one that is quickly found; of the slower ones `make recall` has all.
QUICK = (
    "dispatch:weakest_experts_chosen",
    "dispatch:forward_passes_count_tokens",
    "dispatch:last_gathered_token_lost",
    "gradients:expert_gradients_scaled_twice",
    "gradients:norm_summed_from_the_own_part_on",
    "gradients:critic_learns_at_the_actors_rate",
    "losses:value_loss_without_half",
    "losses:new_log_probs_reported_from_the_old",
    "losses:clip_fraction_is_always_zero",
    "ppo_arithmetic:log_probs_without_temperature",
    "ppo_arithmetic:values_one_late",
    "ppo_arithmetic:kl_penalty_is_a_bonus",
    "state:reference_follows_the_actor",
    "liveness:critic_shares_its_embeddings",
    "liveness:starved_expert_raises",
)
MINE = '''
"""Bugs of mine; what lies beside the file can be imported."""

from beside import HALF

from toy_models import ppo
from toy_models.planted.rewrite import rewrite


def no_half() -> None:
    """A factor is lost.

    minimal: world=1
    """
    _rewritten(HALF)


def not_there() -> None:
    _rewritten("nothing like that")


def _rewritten(old: str) -> None:
    rewrite(ppo, "_critic_loss", (old, ""))
    ppo.LOSSES["critic"] = ppo._critic_loss
'''


def results(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    """Exit code and JSON of a recall."""
    out = tmp_path / "out.json"
    code = main(["recall", "--json", str(out), *arguments])
    return code, json.loads(out.read_text())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own, in which .fuzz lies."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_quick_recall(here: Path) -> None:
    """Found by the search of every run, with nothing chosen for them; as many cases without a bug break nothing."""
    code, said = results(here, "--bugs", ",".join(QUICK), "--shrink-seconds", "0")
    assert code == 0, said
    assert {bug["id"] for bug in said["bugs"]} == set(QUICK) and all(bug["found"] for bug in said["bugs"])
    assert said["control"]["false_alarms"] == 0
    assert said["control"]["cases"] == sum(bug["cases"] for bug in said["bugs"])
    assert (here / ".fuzz" / "recall.md").read_text().count("| yes |") >= len(QUICK)
    assert (here / ".fuzz" / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_bugs_of_a_file_of_ones_own(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One is found; what does not find what it patches is named, the others go on, and the exit code is 2."""
    monkeypatch.setattr(hunt, "rows_in_turn", lambda: covering(1)[:3])
    (here / "mine.py").write_text(MINE)
    (here / "beside.py").write_text('HALF = "0.5 * "\n')
    code, said = results(here, "mine.py", "--shrink-seconds", "3")
    found, fault = said["bugs"]
    assert code == 2
    assert (found["id"], found["found"], found["is_minimal"]) == ("mine.py:no_half", True, "yes")
    assert found["law"] == "gradients match the reference" and found["minimal_case"]["layout"]["world"] == 1
    assert fault["id"] == "mine.py:not_there" and not fault["found"]
    assert "could not be planted: AssertionError: toy_models.ppo._critic_loss has 'nothing like" in fault["fault"]
    assert "mine.py:not_there: could not be planted" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_done(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table and the files have the bugs that are through, and say how many are not."""
    monkeypatch.setattr(hunt, "rows_in_turn", lambda: covering(1)[:3])
    through = _Told.done

    def pressed(told: _Told, one: Recalled) -> None:
        through(told, one)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(_Told, "done", pressed)
    (here / "mine.py").write_text(MINE)
    (here / "beside.py").write_text('HALF = "0.5 * "\n')
    code, said = results(here, "mine.py", "--shrink-seconds", "0")
    assert code == 130 and [bug["id"] for bug in said["bugs"]] == ["mine.py:no_half"] and said["bugs"][0]["found"]
    assert said["untried"] == "1 of 2 bugs and the control" and said["control"]["cases"] == 0
    assert "interrupted: 1 of 2 bugs and the control not tried" in (here / ".fuzz" / "recall.md").read_text()


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.py"], "nowhere.py cannot be read as Python: No such file or directory"),
        (["none.py"], "none.py has no bug: no function at its top level whose name does not begin with _"),
        (["wrong.py"], "wrong.py cannot be read as Python: "),
        (["odd.py"], "odd.py:bug: 'minimal: world=x' must be a layout such as 'minimal: world=2 ep=2'"),
        (["--bugs", "nope"], "--bugs=nope names no bug; there are dispatch:gates_softmaxed_before_top_k, "),
        (["--seconds-per-bug", "x"], "argument --seconds-per-bug: x must be a number of seconds, 0 or more"),
        (["--shrink-seconds", "-1"], "argument --shrink-seconds: -1 must be a number of seconds, 0 or more"),
        (["--jobs", "0"], "argument --jobs: 0 must be an integer, 1 or more"),
    ],
)
def test_bad_input_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    (here / "none.py").write_text("def _helper() -> None: ...\n")
    (here / "wrong.py").write_text("def bug(:\n")
    (here / "odd.py").write_text('def bug() -> None:\n    """Says.\n\n    minimal: world=x\n    """\n')
    try:
        code = main(["recall", *arguments])
    except SystemExit as end:  # argparse's way
        code = end.code  # type: ignore[assignment]
    out, error = capsys.readouterr()
    assert (code, out) == (2, "") and error.count("\n") == 1 and said in error, error


def test_a_plant_can_be_a_file(here: Path) -> None:
    (here / "mine.py").write_text("def bug() -> int:\n    return 7\n")
    plant = plants.resolved("mine.py:bug")
    assert plant == f"{here}/mine.py:bug" and plants.load(plant)() == 7
    with pytest.raises(ValueError, match=r"mine.py:other must be MODULE:FUNCTION or FILE.py:FUNCTION"):
        plants.resolved("mine.py:other")


def test_the_package_has_the_bugs_and_no_mends() -> None:
    ids = [bug.id for bug in plants.in_package()]
    assert len(ids) == len(set(ids)) >= 55 and {id.partition(":")[0] for id in ids} >= {"dispatch", "liveness"}
    assert not [id for id in ids if id.startswith(("mends:", "rewrite:"))]
    assert sum(id.startswith("liveness:") for id in ids) >= 10
    assert all(minimal_layout(bug) for bug in plants.in_package())


# ---- what is counted -------------------------------------------------------------------------------------------

EP = Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2))


class Pretended:
    """Trials in which what `breaks` says is broken."""

    def __init__(self, *breaks: Case) -> None:
        self.breaks = breaks

    def judge(self, case: Case) -> object:
        broken = Violation(case, "law", "rank 0", "1", "2", "in words") if case in self.breaks else None
        return type("Verdict", (), {"violation": broken})


def hunted(planted: Pretended, healthy: Pretended) -> Recalled:
    rows = tuple(covering(1)[:4])
    return hunt.Hunt(planted, healthy, rows, 0.3, 0.0).run("bug")  # type: ignore[arg-type]


def test_what_breaks_without_the_bug_too_is_an_alarm_and_not_found() -> None:
    second = covering(1)[1].case
    for healthy, found, alarms in ((Pretended(), True, 0), (Pretended(second), False, 1)):
        seen = hunted(Pretended(second), healthy)
        assert (seen.found, len(seen.alarms)) == (found, alarms)
        assert not found or (seen.cases, seen.minimal) == (2, second)


def test_the_control_counts_distinct_cases_and_goes_on_after_an_alarm() -> None:
    rows = tuple(covering(1)[:4])
    ran, alarms = hunt.control(Pretended(rows[1].case), (*rows, *rows), 4, lambda n: None)  # type: ignore[arg-type]
    assert (ran, len(alarms)) == (4, 1) and repr(rows[1].case) in alarms[0]


@pytest.mark.parametrize(
    ("result", "alarms", "code"),
    [
        ({"minimal": EP}, (), 0),
        ({"minimal": EP}, ("law: Case()",), 1),
        ({}, (), 1),
        ({"fault": "could not be planted: why"}, (), 2),
    ],
)
def test_the_exit_code_says_what_was_missed(result: dict, alarms: tuple[str, ...], code: int) -> None:
    bug = Plant("bug", "module:bug", "Says.\n\nminimal: world=2 ep=2")
    recall = Recall((bug,), (Recalled(id="bug", cases=3, **result),), Control(3, alarms), 60.0)
    assert recall.exit_code == code and plain(recall)["control"]["false_alarms"] == len(alarms)
    assert ("1 of 1 shrunk to the minimal layout (100%)" in totals(recall)) == ("minimal" in result)
