"""The properties: generated PPO iterations on real megatron-core, judged by all laws. Run with `pytest fuzz/`.

The covering rows come first: in them every two values that can meet do. Each further property draws another region,
and all judge every law; each is parametrised by world, so that `-k 2ranks` selects and pytest-xdist shares them out.
Now and then fewer ranks are drawn, so that a failure can shrink below its world. To keep a failure for good, paste its
`@example(Case(...))` line above `test_pasted_cases`.
"""

from collections.abc import Callable

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from fuzz import known_refusals, refusals
from fuzz.broken import Broken
from fuzz.broken_strategies import broken_configurations
from fuzz.case import Case, Violation
from fuzz.known import Known, living
from fuzz.rehearsal import Rehearse, rehearse_rows
from fuzz.rows import covering, threefold, with_layout
from fuzz.space import all_layouts, first_in
from fuzz.strategies import cases
from fuzz.trial import Trials
from toy_models.spec import PPO, Batch, Layout, MoEModel, Switches

Refuse = Callable[[Broken], None]


def test_covering_rows(rehearse: Rehearse, world: int) -> None:
    """Every two values that can meet in this many ranks, and in no fewer than the property before has."""
    rehearse_rows(rehearse, (row for ranks in first_in(world) for row in covering(ranks)))


def test_every_layout(rehearse: Rehearse, world: int, long: None) -> None:
    """Each layout of this many ranks once."""
    rehearse_rows(rehearse, (with_layout(layout, seed) for seed, layout in enumerate(all_layouts(world))))


def test_three_at_a_time(rehearse: Rehearse, world: int, long: None) -> None:
    """Rows in which many three values meet that no covering row has."""
    rehearse_rows(rehearse, threefold(world))


@given(st.data())
def test_any_case(rehearse: Rehearse, world: int, data: st.DataObject) -> None:
    """Any layout, model, batch and settings of this many ranks, now and then of fewer."""
    rehearse(data.draw(cases(mostly=world)))


@given(st.data())
def test_dispatchers_and_repetition(rehearse: Rehearse, world: int, data: st.DataObject) -> None:
    """Every case has a twin: the other dispatcher, plain switches, or itself once more."""
    twin = data.draw(st.sampled_from(("other_dispatcher", "plain_switches", "again")))
    rehearse(data.draw(cases(mostly=world, twin=twin)))


@given(st.data())
def test_shipped_precision(rehearse: Rehearse, world: int, data: st.DataObject) -> None:
    """float32 as megatron-core ships it, without the no-downcast mode."""
    rehearse(data.draw(cases(mostly=world, precision="float32")))


@settings(max_examples=3 * settings().max_examples)  # most are refused before anything has run
@given(st.data())
def test_broken_configurations_are_refused(refuse: Refuse, world: int, data: st.DataObject) -> None:
    """A valid case and one thing that cannot be: refused by a check, alike on all ranks, or right all the same."""
    refuse(data.draw(broken_configurations(mostly=world)))


@settings(phases=[Phase.explicit])
@given(cases())
@example(Case())
@example(  # with EP=1 a rank order makes other replicas of experts: Megatron-LM#5916 reaches further than ETP unlike TP
    Case(
        layout=Layout(world=4, tp=2, cp=2, etp=2, order="cp-tp-ep-dp-pp"),
        model=MoEModel(heads=2, kv_heads=2),
    )
)
@example(  # an all but certain policy: the entropy's gradient is what rounding leaves
    Case(
        layout=Layout(world=2, tp=2, etp=2),
        model=MoEModel(
            family="qwen2moe", experts=4, hidden=32, heads=8, kv_heads=4, ffn=8, shared_ffn=8, vocab=12, tied=True
        ),
        batch=Batch(rows=9, prompt=6, response=4, micro_rows=3, raggedness="ragged"),
        ppo=PPO(
            mini_batches=3, temperature=0.7, lam=0.0, kl_coef=0.1, value_clip=0.01, entropy_coef=1.0, optimizer="adam",
            lr=0.09, critic_lr=0.009, weight_decay=0.1, eps=0.0001,
        ),
        switches=Switches(p2p="plain", deallocate=True, forward_sp=False),
        seed=4616,
    )
)  # fmt: skip
def test_pasted_cases(rehearse: Rehearse, case: Case) -> None:
    """Cases that once failed, and the smallest of all."""
    rehearse(case)


@pytest.mark.parametrize(
    "bug",
    [pytest.param(b, id=b.id, marks=pytest.mark.xfail(raises=Violation, strict=True)) for b in living()],
)
def test_known_bugs_still_live(stock: Trials, bug: Known) -> None:
    """On stock megatron-core a known bug breaks its law; where it does not, its entry must go (strict xfail)."""
    verdict = stock.judge(bug.example)
    if verdict.violation is not None:
        assert verdict.violation.law == bug.law, f"{bug.id} breaks another law: {verdict.violation.law}"
        raise verdict.violation


@pytest.mark.parametrize(
    "one",
    [pytest.param(b, id=b.id, marks=pytest.mark.xfail(raises=Violation, strict=True)) for b in known_refusals.living()],
)
def test_known_refusals_still_live(trials: Trials, one: known_refusals.Known) -> None:
    """A known finding about refusals breaks its law; where it does not, its entry must go (strict xfail)."""
    verdict = refusals.judge(trials, one.example, known=False)
    if verdict.violation is not None:
        assert verdict.violation.law == one.laws[0], f"{one.id} breaks another law: {verdict.violation.law}"
        raise verdict.violation
