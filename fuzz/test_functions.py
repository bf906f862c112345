"""The function properties: public helpers of megatron-core one by one, called in the ranks, over their whole range.

A call that fails shrinks to the smallest one. Each item is a family and a world, so that `-k 2ranks` or `-k clipping`
selects. A call found red is pasted above `test_pasted_calls`.
"""

from collections.abc import Callable

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from fuzz.case import Violation
from fuzz.functions import known
from fuzz.functions.call import Call
from fuzz.functions.families import FAMILIES
from fuzz.functions.judge import judge
from fuzz.functions.strategies import LAYOUTS, calls
from fuzz.trial import Trials

Make = Callable[[Call], None]
SHARE = {1: 0.5, 2: 0.75}  # of the examples of a case, per function, where the ranks are few


@pytest.mark.parametrize("family", FAMILIES)
def test_functions_keep_their_promises(make: Make, world: int, family: str) -> None:
    """Every function of the family, called by all ranks of a layout: forward, gradient, dtype, shape, inputs kept."""
    if world not in LAYOUTS:
        pytest.skip("a function sees no more than its group: 8 ranks are enough")
    for name in FAMILIES[family]:
        _promise(make, f"{family}.{name}", world)


def _promise(make: Make, function: str, world: int) -> None:
    @settings(max_examples=max(2, round(SHARE.get(world, 0.75) * settings().max_examples)))
    @given(st.data())
    def kept(data: st.DataObject) -> None:
        make(data.draw(calls(function=function, world=world)))

    kept()


@settings(phases=[Phase.explicit])
@given(calls(function="mappings.all_to_all", world=1))
@example(Call(function="helpers.divide", arguments=(("numerator", 0), ("denominator", 1))))
def test_pasted_calls(make: Make, call: Call) -> None:
    """Calls that once failed, and the smallest of all."""
    make(call)


@pytest.mark.parametrize(
    "one",
    [pytest.param(b, id=b.id, marks=pytest.mark.xfail(raises=Violation, strict=True)) for b in known.living()],
)
def test_known_functions_still_live(stock: Trials, one: known.Known) -> None:
    """On stock megatron-core a known finding breaks its law; where it does not, its entry must go (strict xfail)."""
    verdict = judge(stock, one.example, step_around=False)
    if verdict.violation is not None:
        assert verdict.violation.law == one.laws[0], f"{one.id} breaks another law: {verdict.violation.law}"
        raise verdict.violation
