"""The summary: what it counts about a case, that counts add up, when it fails a run, and what a person reads."""

import json
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from fuzz import laws, summary
from fuzz.case import Case
from fuzz.known import living
from fuzz.summary import FEW, MOST_INCONCLUSIVE, Tally
from fuzz.trial import Verdict
from toy_models.spec import Batch, Layout

FIRST, SECOND = laws.NAMES[:2]
EP2 = Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2), precision="float32")


def verdict(case: Case, **changes: Any) -> Verdict:
    plain = {
        "counts": {FIRST: 1},
        "violation": None,
        "doubts": (),
        "ill_conditioned": False,
        "facts": {},
        "seconds": {},
    }
    return Verdict(case=case, **{**plain, **changes})


def tally(*verdicts: Verdict) -> Tally:
    counted: Tally = {}
    for one in verdicts:
        summary.count(counted, one)
    return counted


def written(counted: Tally) -> str:
    text = StringIO()
    summary.write(counted, Console(file=text, width=140))
    return text.getvalue()


def row(text: str, name: str) -> str:
    """The one row of the printed tables that starts with a name."""
    [found] = [line for line in text.splitlines() if line.strip("│┃ ").startswith(name)]
    return " ".join(found.replace("│", " ").split())


# ---- counting --------------------------------------------------------------------------------------------------


def test_every_kind_is_counted() -> None:
    """Worlds, layouts, precisions, laws fired and vacuous, shapes."""
    facts = {"starved_experts": 3, "starved_ranks": 0}
    counted = tally(
        verdict(Case(), counts={FIRST: 7, SECOND: 0}, facts=facts),
        verdict(EP2, counts={FIRST: 0, SECOND: 2}, facts=facts),
        verdict(EP2, counts={FIRST: 1}, facts={"starved_experts": 0, "starved_ranks": 1}),
    )
    assert counted["cases"] == {"all": 3, "inconclusive": 0, "ill": 0}
    assert counted["worlds"] == {"1": 1, "2": 2}
    assert sorted(counted["layouts"].values()) == [1, 2]
    assert counted["precision"] == {"float64": 1, "float32": 2}
    assert counted["fired"] == {FIRST: 2, SECOND: 1}
    assert counted["vacuous"] == {FIRST: 1, SECOND: 1}
    assert counted["shapes"] == {"starved_experts": 2, "starved_ranks": 1}


def test_a_case_with_two_doubts_is_one_inconclusive_case() -> None:
    """Reasons are counted apart; the share that fails a run is of cases."""
    counted = tally(verdict(Case(), doubts=("a close call", "a tie")), verdict(Case(), doubts=("a tie",)))
    assert counted["inconclusive"] == {"a close call": 1, "a tie": 2}
    assert counted["cases"]["inconclusive"] == 2


def test_known_bugs_are_counted_where_they_live() -> None:
    """A case in the region of a known bug says so; the smallest case lies in none."""
    for bug in living():
        assert tally(verdict(bug.example))["known"].get(bug.id) == 1
    assert tally(verdict(Case()))["known"] == {}


def test_totals_are_sums() -> None:
    """The sum over items, in any order and with empty ones, is the count of all cases at once."""
    verdicts = [verdict(Case(), doubts=("a tie",)), verdict(EP2, ill_conditioned=True), verdict(EP2)]
    apart = [tally(one) for one in verdicts]
    assert summary.total([{}, *apart]) == summary.total(reversed(apart)) == tally(*verdicts)
    assert summary.total([]) == {}


def test_a_tally_travels() -> None:
    """pytest-xdist carries it as plain data: JSON neither loses nor changes anything."""
    counted = tally(verdict(EP2, doubts=("a tie",), ill_conditioned=True, facts={"starved_experts": 2.0}))
    assert json.loads(json.dumps(counted)) == counted


# ---- when a run fails ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inconclusive", "ill"])
@pytest.mark.parametrize(
    ("number", "doubtful", "fails"),
    [(FEW, 2, False), (FEW, 3, True), (FEW - 1, FEW - 1, False), (1000, 20, False), (1000, 21, True), (0, 0, False)],
)
def test_more_than_two_in_a_hundred_fail_a_run(kind: str, number: int, doubtful: int, fails: bool) -> None:
    """A run that could not judge is not green; below a hundred cases a share says nothing."""
    why = summary.too_doubtful({"cases": {"all": number, kind: doubtful}})
    assert (why is not None) == fails
    if why:
        assert f"{doubtful} of {number} cases ({doubtful / number:.1%})" in why and f"{MOST_INCONCLUSIVE:.0%}" in why


def test_nothing_judged_fails_nothing() -> None:
    """The tests of the fuzzer itself judge no case."""
    assert summary.too_doubtful({}) is None
    assert written({}) == ""


# ---- what a person reads ---------------------------------------------------------------------------------------


def test_the_tables_show_the_numbers() -> None:
    """Cases by world, layouts out of those possible, shares, doubts with their reasons."""
    doubts = ("a close call",)
    text = written(tally(verdict(Case(), facts={"starved_experts": 1}), verdict(EP2, doubts=doubts), verdict(EP2)))
    assert row(text, "cases   ") == "cases 3 (1 ranks 1, 2 ranks 2)"
    assert row(text, "layouts") == "layouts 2 of 11 in these worlds"
    assert row(text, "precision") == "precision float32 2, float64 1"
    assert row(text, "cases with") == "cases with starved experts 1 (33%)"
    assert row(text, "known bugs met") == "known bugs met none"
    assert row(text, "inconclusive") == "inconclusive 1: a close call 1"
    assert row(text, "ill-conditioned") == "ill-conditioned 0"


def test_every_law_has_its_row() -> None:
    """A law that never fired is shown with 0, not left out."""
    text = written(tally(verdict(Case(), counts={FIRST: 4, SECOND: 0})))
    assert row(text, FIRST.replace("_", " ")).endswith(" 1 0")
    assert row(text, SECOND.replace("_", " ")).endswith(" 0 1")
    assert all(row(text, law.replace("_", " ")).endswith(" 0 0") for law in laws.NAMES[2:])
