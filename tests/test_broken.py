"""Broken configurations: the table breaks what it says, verdicts are right, and a pool is as good after them as new."""

import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

from fuzz import known, refusals
from fuzz.breakages import BREAKAGES, breakages_of
from fuzz.broken import Broken, size
from fuzz.broken_strategies import MOST_VALUES, broken_configurations
from fuzz.case import Case, Observation, Violation
from fuzz.known_refusals import living
from fuzz.laws import refusal
from fuzz.strategies import cases
from fuzz.trial import Trials
from toy_models.spec import Batch, Layout, MoEModel

SIZES = {"MoEModel": MoEModel, "Layout": Layout, "Batch": Batch, "Case": Case, "Broken": Broken}
TWO = Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2))


def _broken(case: Case, name: str, value: object) -> Broken:
    return Broken(case=case, overrides=((name, value),))


# ---- the table and the strategy --------------------------------------------------------------------------------


@given(cases(max_ranks=8), st.integers(0, len(BREAKAGES) - 1))
@settings(max_examples=200, deadline=None, database=None)
def test_every_case_has_something_to_break_and_the_draw_reaches_all_of_it(case: Case, kind: int) -> None:
    found = breakages_of(case, kind)
    assert 0 < len(found) <= MOST_VALUES
    for overrides in found:
        assert hash(Broken(case=case, overrides=overrides))


def test_every_kind_of_breakage_has_its_turn() -> None:
    stages = Case(layout=Layout(world=2, pp=2), model=MoEModel(layers=2))
    tensor = Case(layout=Layout(world=2, tp=2), model=MoEModel(heads=2, kv_heads=2))
    assert all(any(list(breakage(case)) for case in (stages, tensor)) for breakage in BREAKAGES)


@given(broken_configurations(max_ranks=4))
@settings(max_examples=50, deadline=None, database=None)
def test_repr_evaluates_back(broken: Broken) -> None:
    from fuzz.case import Rollout, Update
    from toy_models.spec import PPO, Switches

    names = {**SIZES, "PPO": PPO, "Switches": Switches, "Rollout": Rollout, "Update": Update}
    assert eval(repr(broken), names) == broken


def test_shrinks_to_the_smallest_case_that_can_be_broken_so() -> None:
    wanted = "config.num_moe_experts"
    strategy = broken_configurations(max_ranks=4, ep=2)
    found = find(strategy, lambda b: b.get(wanted, 0) > 0, settings=settings(max_examples=3000, database=None))
    assert found.case.layout == Layout(world=2, ep=2)
    assert size(found) <= size(_broken(found.case, wanted, 9))


def test_an_override_of_nobody_is_refused() -> None:
    try:
        _broken(Case(), "model.layers", 3)
    except ValueError as error:
        assert "model.layers" in str(error)
    else:
        raise AssertionError("accepted")


# ---- laws, on made-up observations -----------------------------------------------------------------------------


def _refused(rank: int, **facts: object) -> Observation:
    usual = {
        "phase": "models", "exception": "ValueError", "message": "because", "place": "config.py:1", "function": "f",
        "line": "raise ValueError", "check": True, "ours": False, "issued": 0, "traceback": "",
    }  # fmt: skip
    return Observation(rank=rank, outcome="done", stage="models", facts={"refused": {**usual, **facts}})


def _went_on(rank: int) -> Observation:
    return Observation(rank=rank, outcome="done", stage="update")


def _law(*ranks: Observation) -> str:
    _, violation = refusal.judge(_broken(TWO, "config.moe_router_topk", 3), ranks)
    return violation.law if violation else ""


def test_a_refusal_by_a_check_on_all_ranks_holds() -> None:
    assert _law(_refused(0), _refused(1)) == ""


def test_each_law_of_refusal_is_broken_by_what_it_forbids() -> None:
    assert _law(_refused(0, check=False), _refused(1)) == "what is refused is refused by a check"
    assert _law(_refused(0), _refused(1, phase="rollout")) == "all ranks refuse alike"
    assert _law(_refused(0), _went_on(1)) == "all ranks refuse alike"
    assert _law(_refused(0, message=""), _refused(1)) == "a refusal says why"
    hung = Observation(rank=0, outcome="hung", stage="update", facts={"stack": ""}, error="given up")
    assert _law(hung, _went_on(1)) == "every rank ends"


def test_different_causes_are_different_failures() -> None:
    broken, kinds = _broken(TWO, "config.moe_router_topk", 3), set()
    for place in ("a.py:1", "b.py:2"):
        _, violation = refusal.judge(broken, [_refused(0, check=False, place=place), _refused(1)])
        kinds.add(type(violation))
    assert len(kinds) == 2 and all(issubclass(kind, Violation) for kind in kinds)


# ---- on megatron-core ------------------------------------------------------------------------------------------


def test_verdicts_on_megatron() -> None:
    trials = Trials(plants=known.mends())
    try:
        refused = refusals.judge(trials, _broken(TWO, "config.sequence_parallel", True))
        right = refusals.judge(trials, _broken(TWO, "config.moe_router_num_groups", 3))
        deep = refusals.judge(trials, _broken(TWO, "config.moe_router_topk", 3))
        new = refusals.judge(trials, _broken(TWO, "config.moe_router_topk", 3), known=False)
    finally:
        trials.close()
    assert (refused.outcome, refused.violation) == (refusals.REFUSED, None)
    assert (right.outcome, right.violation) == (refusals.RIGHT, None)
    assert (deep.outcome, deep.known, deep.violation) == (refusals.KNOWN, "no-check-at-all", None)
    assert new.violation is not None and new.violation.law == "what is refused is refused by a check"


AFTER = (
    _broken(TWO, "groups.tensor_model_parallel_size", 3),
    _broken(TWO, "groups.tensor_model_parallel_size", -1),  # groups are made, and not for every rank
    _broken(TWO, "groups.num_distributed_optimizer_instances", 3),
    _broken(TWO, "config.num_moe_experts", 3),
    _broken(TWO, "config.moe_router_topk", 3),
    _broken(TWO, "config.sequence_parallel", True),
    _broken(TWO, "ddp.use_distributed_optimizer", True),
)


def _observed(trials: Trials, case: Case) -> list[Observation]:
    return trials._seen(case, 1.0).ranks


def test_a_healthy_case_after_broken_ones_is_bitwise_that_of_a_fresh_pool() -> None:
    fresh, used = Trials(plants=known.mends()), Trials(plants=known.mends())
    try:
        before = _observed(fresh, TWO)
        _observed(used, TWO)  # its groups are kept, as in a long run
        pool = used._pool(2)._pool
        for broken in AFTER:
            used.attempt(broken)
        after = _observed(used, TWO)
        assert used._pool(2)._pool is pool, "a refusal cost the pool"
    finally:
        fresh.close(), used.close()
    for one, other in zip(before, after, strict=True):
        assert one.tensors.keys() == other.tensors.keys() and one.tensors
        assert all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)
        assert one.numbers == other.numbers and one.facts == other.facts


def test_known_refusals_are_told_apart() -> None:
    assert len({one.id for one in living()}) == len(living())
    for one in living():
        assert one.covers(one.example), one.id
        others = [other.id for other in living() if other is not one and other.covers(one.example)]
        assert not others, f"{one.id} and {others} cover the same"
