"""Bounds of float32 from the movement of the reference, as on GPUs; here of what ranks on the CPU saw."""

from contextlib import closing
from dataclasses import replace

import pytest

from fuzz import known
from fuzz.case import Case, Observation, Violation
from fuzz.laws import judge
from fuzz.laws.compare import BOUNDS, DERIVED, FACTOR, UNIT, UNITS, base_of, bound_of
from fuzz.trial import Trials
from toy_models.spec import PPO, Batch, Layout, MoEModel

CASES = [
    Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2), precision="float32"),
    Case(
        layout=Layout(world=2, tp=2, etp=2), model=MoEModel(heads=2, kv_heads=2),
        batch=Batch(rows=4, response=3),
        ppo=PPO(mini_batches=2, optimizer="adam", eps=1e-4, max_norm=0.3), precision="float32",
    ),
]  # fmt: skip


def violations(*plants: str) -> list[Violation | None]:
    """Of every case, judged by nothing but the movement of the reference."""
    found = []
    with closing(Trials(plants=(*known.mends(), *plants))) as trials:
        for case in CASES:
            seen = trials._seen(case, 1.0)
            found.append(judge(case, seen.ranks, trials._moving(case, seen.reference, derived=True), seen.twin)[1])
    return found


def test_the_healthy_system_is_within_what_the_reference_moves() -> None:
    assert violations() == [None, None]


def test_one_part_in_a_hundred_is_seen() -> None:
    found = violations("tests.gpu_bugs:experts_are_off_by_a_hundredth")
    assert all(violation is not None for violation in found)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_no_bound_is_set_by_hand_where_it_is_derived(precision: str) -> None:
    case = replace(CASES[0], precision=precision)
    plain = Observation(rank=0, outcome="done", stage="", numbers={"moved/x": 3e-7})
    derived = replace(plain, numbers={**plain.numbers, DERIVED: 1.0})
    assert base_of(case, plain, "gradient") == BOUNDS[precision]["gradient"]
    assert base_of(case, derived, "gradient") == min(BOUNDS[precision]["gradient"], UNITS * UNIT[precision])
    assert bound_of(derived, "x", 0.0, 1.0) == FACTOR * 3e-7
