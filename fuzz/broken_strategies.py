"""The strategy that draws broken configurations. Knows Hypothesis, cases and the table of breakages only."""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from fuzz.breakages import BREAKAGES, breakages_of
from fuzz.broken import Broken
from fuzz.case import Case
from fuzz.choices import Numbered
from fuzz.strategies import cases

MOST_VALUES = 24  # of one kind of breakage


def broken_configurations(**knobs: Any) -> st.SearchStrategy[Broken]:
    """A valid case and one breakage. Shrinks towards the smallest case that can be broken so, and the first breakage.

    `knobs` are those of `cases`.
    """
    return _broken_configurations(cases(**knobs))


@st.composite
def _broken_configurations(draw: st.DrawFn, valid: st.SearchStrategy[Case]) -> Broken:
    place = Numbered(draw)
    kind, value = place(len(BREAKAGES)), place(MOST_VALUES)
    case = _sound(draw(valid))
    found = breakages_of(case, kind)
    return Broken(case=case, overrides=found[value % len(found)])


def _sound(case: Case) -> Case:
    """Without a twin, and without what is known to be wrong by itself: batched messages both ways between two ranks."""
    case = replace(case, twin=None)
    if case.layout.pp == 2 and case.layout.vpp > 1 and case.switches.p2p == "batched":
        return replace(case, switches=replace(case.switches, p2p="plain"))
    return case
