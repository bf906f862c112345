"""Counts what the judged cases covered, per pytest item, and writes the table at the end of a run.

A tally is plain data, which travels from pytest-xdist's workers in a report; tallies add up. Knows no pytest.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from fuzz import coverage, known, laws, meetings, refusals
from fuzz.functions.families import FAMILIES
from fuzz.functions.judge import Verdict as Calling
from fuzz.laws import refusal
from fuzz.space import NAMED, all_layouts
from fuzz.trial import Verdict

MOST_INCONCLUSIVE = 0.02  # of the cases
MOST_NAMED = 10  # of what was missed
FEW = 100  # below this many cases a share of two in a hundred says nothing

Tally = dict[str, dict[str, float]]


def count(tally: Tally, verdict: Verdict) -> None:
    """Add one verdict to a tally, in place."""
    case = verdict.case
    _add(tally, "worlds", {str(case.layout.world): 1})
    _add(tally, "layouts", {_name(case): 1})
    _add(tally, "words", {coverage.code(case): 1})
    _add(tally, "precision", {case.precision: 1})
    _add(tally, "fired", {law: n > 0 for law, n in verdict.counts.items()})
    _add(tally, "vacuous", {law: n == 0 for law, n in verdict.counts.items()})
    _add(tally, "known", dict.fromkeys(known.met(case), 1))
    _add(tally, "inconclusive", dict.fromkeys(verdict.doubts, 1))
    _add(tally, "cases", {"all": 1, "inconclusive": bool(verdict.doubts), "ill": verdict.ill_conditioned})
    _add(tally, "shapes", {name: value > 0 for name, value in verdict.facts.items()})


def count_broken(tally: Tally, verdict: refusals.Verdict) -> None:
    """Add the verdict on a broken configuration to a tally, in place."""
    _add(tally, "broken", {"violations" if verdict.violation else verdict.outcome: 1})
    _add(tally, "broken fired", {law: n > 0 for law, n in verdict.counts.items()})
    _add(tally, "broken vacuous", {law: n == 0 for law, n in verdict.counts.items()})
    _add(tally, "known refusals", {verdict.known: 1} if verdict.known else {})


def count_call(tally: Tally, verdict: Calling) -> None:
    """Add the verdict on a call of a function to a tally, in place."""
    _add(tally, "calls", {verdict.outcome: 1})
    _add(tally, "functions", {verdict.call.function: 1})
    _add(tally, "known functions", {verdict.known: 1} if verdict.known else {})


def _name(case: Any) -> str:
    layout = case.layout
    return f"{layout.world}: " + " ".join(f"{name}{getattr(layout, name)}" for name in NAMED)


def _add(tally: Tally, kind: str, numbers: Mapping[str, float]) -> None:
    table = tally.setdefault(kind, {})
    for name, number in numbers.items():
        table[name] = table.get(name, 0) + int(number)


def total(tallies: Iterable[Tally]) -> Tally:
    """The sum of tallies."""
    whole: Tally = {}
    for tally in tallies:
        for kind, numbers in tally.items():
            _add(whole, kind, numbers)
    return whole


def too_doubtful(tally: Tally) -> str | None:
    """Why a run fails though no law was broken: too many cases that could not be judged, or only loosely."""
    cases = tally.get("cases", {})
    number = cases.get("all", 0)
    for kind, words in (("inconclusive", "could not be judged in full"), ("ill", "were ill-conditioned")):
        share = cases.get(kind, 0) / max(number, 1)
        if number >= FEW and share > MOST_INCONCLUSIVE:
            return (
                f"{cases[kind]:.0f} of {number:.0f} cases ({share:.1%}) {words}; at most {MOST_INCONCLUSIVE:.0%} may be"
            )
    return None


def write(tally: Tally, console: Console) -> None:
    """The summary: cases, layouts, laws fired and vacuous, known bugs met, what was inconclusive and why."""
    if tally.get("cases"):
        console.print(Group(_cases(tally), _laws(tally)))
    if tally.get("calls"):
        console.print(_called(tally))
    if tally.get("broken"):
        console.print(Group(_broken(tally), _fired(tally, "broken ", refusal.NAMES)))


def _called(tally: Tally) -> Table:
    table = Table(title="functions, called one by one", title_justify="left", show_header=False)
    number, calls = sum(map(len, FAMILIES.values())), tally["calls"]
    table.add_row("functions", f"{len(tally['functions'])} of {number}")
    table.add_row("calls", f"{sum(calls.values())} ({_listed(calls)})")
    table.add_row("known findings", _listed(tally.get("known functions", {})) or "none met")
    return table


def write_failures(rows: Sequence[Mapping[str, str]], console: Console) -> None:
    """The table of new failures, then of each its folder and the line to paste, unbroken for who copies them."""
    if not rows:
        return
    table = Table("law", "smallest layout", "found", title="new failures", title_justify="left")
    for row in rows:
        table.add_row(row["law"], row["layout"], row["found"])
    console.print(table)
    for row in rows:
        console.print(f"{row['folder']}\n{row['example']}", highlight=False, soft_wrap=True, markup=False)


def _cases(tally: Tally) -> Table:
    table = Table(title="ep-ppo-fuzz: what was covered", title_justify="left", show_header=False)
    cases, worlds = tally["cases"], tally["worlds"]
    number = cases["all"]
    table.add_row("cases", f"{number} ({_listed({f'{w} ranks': n for w, n in sorted(worlds.items())})})")
    possible = sum(len(all_layouts(int(world))) for world in worlds)
    table.add_row("layouts", f"{len(tally['layouts'])} of {possible} in these worlds")
    for row in _covered(tally):
        table.add_row(*row)
    table.add_row("precision", _listed(tally["precision"]))
    shapes = {name.replace("_", " "): f"{n} ({n / number:.0%})" for name, n in tally["shapes"].items()}
    table.add_row("cases with", _listed(shapes))
    table.add_row("known bugs met", _listed(tally["known"]) or "none")
    table.add_row("inconclusive", f"{cases['inconclusive']}: {_listed(tally['inconclusive']) or 'none'}")
    table.add_row("ill-conditioned", f"{cases['ill']}")
    return table


def _covered(tally: Tally) -> list[tuple[str, str]]:
    """What met, of what can meet in as many ranks as the largest case had; what did not, by name."""
    ranks, words = max(map(int, tally["worlds"])), [coverage.decoded(code) for code in tally["words"]]
    return [
        ("pairs", _share(meetings.pairs(ranks), {pair for word in words for pair in coverage.pairs(word)}, named=True)),
        ("triples", _share(meetings.threes(ranks), {three for word in words for three in coverage.threes(word)})),
    ]


def _share(possible: Collection[tuple[str, ...]], met: set[tuple[str, ...]], named: bool = False) -> str:
    missed = [meeting for meeting in possible if meeting not in met]
    number = len(possible) - len(missed)
    names = ", ".join(" & ".join(meeting) for meeting in missed[:MOST_NAMED])
    more = f" and {len(missed) - MOST_NAMED} more" if len(missed) > MOST_NAMED else ""
    return f"{number} of {len(possible)} ({number / len(possible):.1%})" + (
        f"; missed: {names}{more}" if names and named else ""
    )


def _listed(numbers: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(numbers.items()))


def _broken(tally: Tally) -> Table:
    table = Table(title="broken configurations", title_justify="left", show_header=False)
    table.add_row("became of them", _listed(tally["broken"]))
    table.add_row("known findings met", _listed(tally.get("known refusals", {})) or "none")
    return table


def _laws(tally: Tally) -> Table:
    return _fired(tally, "", laws.NAMES)


def _fired(tally: Tally, kind: str, names: Sequence[str]) -> Table:
    table = Table("law", "fired", "vacuous", title="cases in which a law had something to check", title_justify="left")
    fired, vacuous = Counter(tally[f"{kind}fired"]), Counter(tally[f"{kind}vacuous"])
    for law in names:
        style = "yellow" if not fired[law] else ""
        table.add_row(law.replace("_", " "), str(fired[law]), str(vacuous[law]), style=style)
    return table
