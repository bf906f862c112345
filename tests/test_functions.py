"""Properties of functions: they find a bug in every family and shrink it, are silent without, draw what is valid."""

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fuzz import known as known_bugs
from fuzz.case import Violation
from fuzz.functions import inputs, known, strategies
from fuzz.functions.call import Call, size
from fuzz.functions.families import FAMILIES, promise_of
from fuzz.functions.judge import KNOWN, RIGHT, VIOLATED, judge
from fuzz.functions.strategies import calls
from fuzz.trial import Trials
from toy_models.spec import Layout

ROOT = Path(__file__).parent.parent
QUIET = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
NAMES = [f"{family}.{name}" for family, of in FAMILIES.items() for name in of]
# By family: the planted bug, the function that shows it, and what of the layout it needs.
PLANTED = {
    "mappings": ("columns_are_gathered_backwards", "all_gather_last_dim_from_tensor_parallel_region", "world"),
    "routing": ("capacity_is_rounded_down", "get_capacity", ""),
    "permutation": ("probabilities_stay_where_they_were", "sort_chunks_by_idxs", ""),
    "balance": ("padding_counts_in_the_mean", "z_loss_func", ""),
    "clipping": ("zeros_of_one_rank_count", "count_zeros_fp32", "world"),
    "entropy": ("logits_of_other_ranks_count", "vocab_parallel_cross_entropy", "tp"),
    "stages": ("stages_expect_whole_sequences", "get_tensor_shapes", "tp"),
    "helpers": ("chunks_follow_one_another", "get_batch_on_this_cp_rank", "cp"),
    "state": ("shards_are_replicas_of_each_other", "make_tp_sharded_tensor_for_checkpoint", "tp"),
}
EVAL = {"Call": Call, "Layout": Layout}


@pytest.fixture(scope="module")
def planted() -> Iterator[Trials]:
    """All bugs at once: each is one of another function."""
    plants = (f"toy_models.planted.functions:{bug}" for bug, _, _ in PLANTED.values())
    trials = Trials(plants=(*known_bugs.mends(), *plants))
    yield trials
    trials.close()


@pytest.fixture(scope="module")
def healthy() -> Iterator[Trials]:
    trials = Trials(plants=known_bugs.mends())
    yield trials
    trials.close()


def _each(function: str, world: int, examples: int, told: Callable[[Call], None]) -> None:
    phases = [Phase.generate, Phase.shrink]

    @settings(max_examples=examples, phases=phases, **QUIET)  # type: ignore[arg-type]
    @given(calls(function=function, world=world))
    def drawn(call: Call) -> None:
        told(call)

    drawn()


# ---- bugs are found --------------------------------------------------------------------------------------------


def test_every_family_has_a_planted_bug() -> None:
    from toy_models.planted import functions

    made = [name for name, f in vars(functions).items() if inspect.isfunction(f) and f.__module__ == functions.__name__]
    assert sorted(made) == sorted(bug for bug, _, _ in PLANTED.values()) and set(PLANTED) == set(FAMILIES)


@pytest.mark.parametrize("family", PLANTED)
def test_a_planted_bug_is_found_and_shrinks(planted: Trials, family: str) -> None:
    _, name, needs = PLANTED[family]

    def told(call: Call) -> None:
        if found := judge(planted, call).violation:
            raise found

    with pytest.raises(Violation) as caught:
        _each(f"{family}.{name}", 2, 150, told)
    call: Call = caught.value.case  # type: ignore[assignment]
    assert caught.value.law == known.VALUES and call.function == f"{family}.{name}"
    assert call.contiguous and call.dtype == promise_of(call.function).dtypes[0]
    assert call.layout.world == (2 if needs else 1) and (needs in ("", "world") or getattr(call.layout, needs) == 2)


# Bugs of dispatchers that cases find too, and a call in which each is found.
DISPATCHED = {
    "alltoall": (
        "chunks_restored_by_the_wrong_shape",
        Call(
            function="permutation.alltoall",
            layout=Layout(world=4, tp=2, ep=2, etp=2),
            arguments=(("local", 2), ("topk", 2), ("hidden", 3), ("dropped", False)),
            rows=(2, 3, 1, 0),
            group="etp-ep",
        ),
    ),
    "allgather": (
        "last_gathered_token_lost",
        Call(
            function="permutation.allgather",
            arguments=(("local", 2), ("topk", 2), ("hidden", 3), ("dropped", False)),
            layout=Layout(world=2, ep=2),
            rows=(4, 4),
            group="etp-ep",
        ),
    ),
}


def test_a_planted_bug_of_a_dispatcher_is_found(healthy: Trials) -> None:
    """The ledger of a round trip does not agree with itself whatever the dispatcher does."""
    assert all(judge(healthy, call).outcome == RIGHT for _, call in DISPATCHED.values())
    wrong = Trials(plants=tuple(f"toy_models.planted.dispatch:{bug}" for bug, _ in DISPATCHED.values()))
    try:
        found = {name: judge(wrong, call).violation for name, (_, call) in DISPATCHED.items()}
    finally:
        wrong.close()
    assert all(violation and violation.law == known.VALUES for violation in found.values()), found


def test_without_bugs_nothing_is_found_and_all_is_judged(healthy: Trials) -> None:
    unjudged = []
    for name in NAMES:
        outcomes: list[str] = []

        def told(call: Call, outcomes: list[str] = outcomes) -> None:
            verdict = judge(healthy, call)
            assert verdict.outcome != VIOLATED, verdict.violation
            outcomes.append(verdict.outcome)

        _each(name, 2, 12, told)
        unjudged += [] if {RIGHT, KNOWN} & set(outcomes) else [name]
    assert unjudged == [] and len(NAMES) >= 60


# ---- verdicts --------------------------------------------------------------------------------------------------


def test_a_rank_that_hangs_is_a_violation_and_the_pool_lives_on(healthy: Trials) -> None:
    [entry] = [one for one in known.KNOWN if one.fatal]
    assert judge(healthy, entry.example).outcome == KNOWN  # not made
    assert judge(healthy, entry.example, step_around=False).outcome == VIOLATED
    plain = Call(function="mappings.all_to_all_sp2hp", layout=known.TP2, arguments=known.FLAT, rows=(2, 2))
    assert judge(healthy, plain).outcome == RIGHT


def test_a_verdict_does_not_depend_on_what_ran_before(healthy: Trials) -> None:
    found: list[Call] = []
    for name in NAMES[::6]:
        _each(name, 2, 4, found.append)
    first = [judge(healthy, call).outcome for call in found]
    again = [judge(healthy, call).outcome for call in reversed(found)]
    assert first == again[::-1]


# ---- calls and what is drawn -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_calls_are_valid_values(ranks: int) -> None:
    for name in NAMES:

        def told(call: Call) -> None:
            assert eval(repr(call), {**EVAL, "inf": float("inf")}) == call and hash(call) and call.world <= ranks
            given = [promise_of(call.function).inputs(call, rank) for rank in range(call.world)]
            assert all(torch.is_tensor(x) for tensors in given for x in tensors.values())

        _each(name, ranks, 4, told)


def test_all_functions_and_layouts_draw_as_many_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypothesis prefers fewer choices to smaller ones."""
    drawn: list[int] = []
    seen = set()

    def counted(least: int, most: int) -> st.SearchStrategy[int]:
        assert least < most
        drawn.append(most)
        return st.integers(least, most)

    monkeypatch.setattr(strategies, "st", SimpleNamespace(integers=counted))

    def told(call: Call) -> None:
        seen.add(len(drawn))
        drawn.clear()

    for name in NAMES[::9]:
        for ranks in (1, 2, 4, 8):
            _each(name, ranks, 5, told)
    assert len(seen) == 1


def test_inputs_are_exact_and_laid_out_as_asked() -> None:
    call = Call(function="helpers.divide", dtype="bfloat16", contiguous=False)
    made = inputs.tensor(call, 0, "x", (3, 4))
    assert not made.is_contiguous() and torch.equal(made.double() * 8, (made.double() * 8).round())
    assert torch.equal(made, inputs.tensor(call, 0, "x", (3, 4))) and not torch.equal(
        made, inputs.tensor(call, 1, "x", (3, 4))
    )


@pytest.mark.parametrize("wrong", [{"group": "no"}, {"dtype": "int8"}, {"rows": ()}, {"rows": (-1,)}])
def test_what_is_no_call_is_refused_with_its_value(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        Call(function="helpers.divide", **wrong)


def test_the_smaller_call_is_the_simpler_one() -> None:
    one = Call(function="helpers.divide")
    two = Call(function="helpers.divide", layout=Layout(world=2), rows=(1, 1))
    assert size(one) < size(two) and size(one) < size(Call(function="helpers.divide", contiguous=False))


@pytest.mark.parametrize("wrong", ["--examples=0", "--ranks=3", "--ranks=x", "--only=nothing"])
def test_the_benchmark_refuses_in_one_line(wrong: str) -> None:
    asked = [sys.executable, "benchmarks/functions.py", wrong]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
