"""Every law can fire: each planted bug breaks first the law that its row in `planted_cases` names; the healthy none.

Also what planted bugs look like, and the two laws that follow from others and so are never the first to be broken.
"""

import importlib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from planted_cases import PLANTED

from fuzz import forking, known, laws, tensors
from fuzz.case import Case, Observation, Rollout, Update, Violation
from fuzz.laws import updates
from fuzz.ranks import Ranks
from fuzz.trial import Trials, Verdict
from toy_models.spec import PPO, Batch, Layout, MoEModel, Switches

# Implied by earlier laws: where gradients match the reference and the norm is theirs, the norm matches the reference;
# where the optimizer also does its formula, so do weights and moments.
IMPLIED = (updates.gradient_norm_matches_the_reference, updates.weights_and_moments_match_the_reference)

GROUPED = MoEModel(heads=4, kv_heads=2, experts=4, top_k=2, norm_topk_prob=True, vocab=12)
SHARED = MoEModel(family="qwen2moe", heads=2, kv_heads=2, experts=3, top_k=2, shared_ffn=4, tied=True)
MIXTRAL = MoEModel(family="mixtral", heads=2, kv_heads=2, top_k=2, norm_topk_prob=True, layers=2)
DENSE = replace(GROUPED, layers=4, dense=(1,), dense_ffn=3)
SKEWED = MoEModel(experts=4, skew=4.0, aux_loss=0.3, z_loss=0.1)
BIASED = MoEModel(
    family="glm4moe", heads=2, kv_heads=2, experts=4, top_k=2, norm_topk_prob=True, shared_ffn=4, aux_loss=1.0,
    score="sigmoid", expert_bias=0.5, bias_rate=0.0625, scaling=2.5, expert_groups=2, group_topk=1,
)  # fmt: skip
DROPPING = MoEModel(heads=2, kv_heads=2, experts=4, top_k=2, norm_topk_prob=True, capacity=0.5, pad_to_capacity=True)
DOUBLE = Switches(router_dtype="fp64", dispatcher="allgather")
ADAM = PPO(optimizer="adam", lr=0.03, critic_lr=0.03, eps=1e-2, mini_batches=2, weight_decay=0.1, max_norm=0.3)
SGD = PPO(mini_batches=2, epochs=2, momentum=0.9, temperature=0.7, entropy_coef=0.1, kl_coef=0.1, whiten=True)
RAGGED = Batch(rows=4, prompt=3, response=4, raggedness="ragged")
HOLES = Batch(rows=4, prompt=2, response=5, holes=True, pad_is_eos=True)
GATHER = Switches(dispatcher="allgather")
SHARED_OUT = Switches(
    distributed=True, overlap_reduce=True, overlap_gather=True, align=True, bucket=1, average=True, check_nan=True,
    count_zeros=True,
)  # fmt: skip

HEALTHY = (
    Case(layout=Layout(world=2), model=SHARED, batch=RAGGED, ppo=ADAM, switches=SHARED_OUT, twin="plain_switches"),
    Case(layout=Layout(world=4, tp=2), model=SHARED, batch=RAGGED, ppo=ADAM, switches=SHARED_OUT),
    Case(layout=Layout(world=4, pp=2, ep=2), model=DENSE, batch=RAGGED, ppo=ADAM, switches=SHARED_OUT),
    Case(
        layout=Layout(world=2),
        batch=RAGGED,
        ppo=ADAM,
        switches=Switches(distributed=True, pad_buckets=True),
    ),
    Case(
        layout=Layout(world=2, tp=2),
        model=SHARED,
        batch=RAGGED,
        switches=Switches(recompute="uniform", recompute_layers=2),
        twin="plain_switches",
    ),
    Case(
        model=DENSE,
        batch=RAGGED,
        switches=Switches(recompute="block", recompute_layers=2, padding_mask="padding"),
    ),
    Case(layout=Layout(world=2), model=SHARED, batch=RAGGED, switches=Switches(recompute="all")),
    Case(
        layout=Layout(world=2, pp=2),
        model=MIXTRAL,
        batch=RAGGED,
        ppo=replace(ADAM, embedding_lr=0.01, coupled_decay=True),
        switches=Switches(per_token=True),
    ),
    Case(
        layout=Layout(world=2, cp=2),
        model=GROUPED,
        batch=HOLES,
        ppo=PPO(embedding_lr=0.01, weight_decay=0.1, qk_decay=True, mini_batches=2),
        switches=Switches(per_token=True),
    ),
    Case(),
    Case(batch=HOLES, ppo=PPO(gamma=0.9, lam=0.6, whiten=True)),
    Case(model=MIXTRAL, batch=RAGGED, ppo=SGD),
    Case(batch=Batch(rows=2), program=(Rollout(), Update(), Rollout(), Update())),
    Case(batch=RAGGED, ppo=PPO(mini_batches=2, eps=1e-3), precision="float32"),
    Case(layout=Layout(world=2), batch=RAGGED, ppo=SGD),
    Case(layout=Layout(world=2, ep=2), model=SKEWED, batch=RAGGED, ppo=ADAM),
    Case(layout=Layout(world=2, ep=2), model=GROUPED, batch=RAGGED, switches=GATHER, twin="other_dispatcher"),
    Case(layout=Layout(world=2, tp=2), model=SHARED, batch=HOLES, ppo=SGD, twin="again"),
    Case(layout=Layout(world=2, etp=2), model=GROUPED, batch=RAGGED, switches=Switches(perform_initialization=False)),
    Case(layout=Layout(world=2, tp=2, ep=2), model=GROUPED, batch=HOLES, ppo=ADAM),
    Case(layout=Layout(world=4, ep=2, etp=2), model=GROUPED, batch=RAGGED),
    Case(layout=Layout(world=4, tp=2, ep=2), model=GROUPED, batch=RAGGED, ppo=ADAM),
    Case(layout=Layout(world=2, pp=2), model=MIXTRAL, batch=RAGGED, switches=Switches(deallocate=True)),
    Case(layout=Layout(world=2, ep=2), batch=RAGGED, switches=Switches(decoder_input=True), twin="plain_switches"),
    Case(layout=Layout(world=2, cp=2), model=SKEWED, batch=HOLES, ppo=ADAM),
    Case(layout=Layout(world=2, tp=2), model=BIASED, batch=RAGGED, ppo=SGD, switches=Switches(padding_mask="padding")),
    Case(layout=Layout(world=2, ep=2), model=BIASED, batch=HOLES, precision="float32", switches=DOUBLE),
    Case(layout=Layout(world=2, tp=2, ep=2), model=DROPPING, batch=Batch(rows=2, prompt=3, response=3), seed=1),
    Case(layout=Layout(world=2, cp=2), model=replace(DROPPING, pad_to_capacity=False), batch=RAGGED, seed=1),
    Case(layout=Layout(world=4, pp=2, vpp=2), model=DENSE, batch=RAGGED, switches=Switches(p2p="overlapped")),
    Case(layout=Layout(world=4, cp=2, tp=2, order="cp-tp-ep-dp-pp"), model=replace(GROUPED, kv_heads=1), batch=HOLES),
)


def _first_broken(verdict: Verdict) -> str | None:
    """The name of the first law in causal order that was broken: unlike the others it has no count."""
    return None if verdict.violation is None else next(name for name in laws.NAMES if name not in verdict.counts)


@pytest.fixture(scope="module")
def healthy() -> Iterator[Trials]:
    forking.warm_up()
    trials = Trials(plants=known.mends())
    yield trials
    trials.close()


@pytest.fixture
def planted(request: pytest.FixtureRequest) -> Iterator[Trials]:
    trials = Trials(plants=(*known.mends(), f"toy_models.planted.{request.param}"))
    yield trials
    trials.close()


def _one_of_each_law_first() -> Iterator[Any]:
    """Of every law its first bug; the others are slow: `fuzz recall` plants them all."""
    shown = set[str]()
    for bug, (_, law) in PLANTED.items():
        yield pytest.param(bug, bug, id=bug, marks=[pytest.mark.slow] if law.__name__ in shown else [])
        shown.add(law.__name__)


@pytest.mark.parametrize(("planted", "bug"), list(_one_of_each_law_first()), indirect=["planted"])
def test_a_planted_bug_breaks_its_law_first(planted: Trials, bug: str, healthy: Trials) -> None:
    case, law = PLANTED[bug]
    assert healthy.judge(case).violation is None
    verdict = planted.judge(case)
    assert _first_broken(verdict) == law.__name__, str(verdict.violation)


def test_every_law_is_the_first_to_be_broken_by_some_bug() -> None:
    first = {law.__name__ for _, law in PLANTED.values()} | {law.__name__ for law in IMPLIED}
    assert first == set(laws.NAMES)


def test_laws_are_silent_and_fire_on_a_healthy_system(healthy: Trials) -> None:
    checked: Counter[str] = Counter()
    for case in HEALTHY:
        verdict = healthy.judge(case)
        assert verdict.violation is None, str(verdict.violation)
        checked.update(verdict.counts)
    assert not [name for name in laws.NAMES if not checked[name]]


# Adam after four clipped steps, whose norms megatron rounds to float32: 1.3e-6 off by nothing but that.
ROUNDED = Case(
    layout=Layout(world=3, pp=3, vpp=2, order="ep-tp-dp-cp-pp", split="both", stages=(0, 1, 1, 1, 1, 0)),
    model=MoEModel(
        family="mixtral", layers=4, experts=3, top_k=2, norm_topk_prob=True, hidden=4, ffn=3, vocab=15, skew=10.0,
        aux_loss=0.3, z_loss=0.1,
    ),
    batch=Batch(rows=24, prompt=4, response=4, micro_rows=4, raggedness="one_long", holes=True, pad_is_eos=True),
    ppo=PPO(
        epochs=2, mini_batches=2, temperature=1.6, gamma=0.9, clip_eps=0.05, value_clip=0.05, entropy_coef=0.1,
        whiten=True, optimizer="adam", lr=0.09, critic_lr=0.09, weight_decay=0.1, max_norm=0.3,
    ),
    switches=Switches(
        perform_initialization=False, p2p="plain", deallocate=True, forward_sp=False, decoder_input=True,
        padding_mask="padding", groups="other",
    ),
    seed=4096,
)  # fmt: skip


def test_what_all_laws_look_at_is_laid_out_once(healthy: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a distributed optimizer's shares are put together the whole was laid out anew for every group of names."""
    made, laid_out = list[int](), tensors.laid_out
    monkeypatch.setattr(tensors, "laid_out", lambda some: made.append(len(some)) or laid_out(some))
    verdict = healthy.judge(HEALTHY[0])
    assert verdict.violation is None
    assert len(made) == 2 * 2, f"{len(made)} times for 2 ranks, the case and its twin: {made} tensors"


def test_what_the_norms_float32_moves_is_no_violation(healthy: Trials) -> None:
    """The reference, its clip coefficients moved as much, moves as far: ill-conditioned, and counted so."""
    verdict = healthy.judge(ROUNDED)
    assert verdict.violation is None and verdict.ill_conditioned


# ---- laws that follow from others ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def observed(healthy: Trials) -> tuple[Case, Sequence[Observation], Observation]:
    """A healthy case, what its one rank saw, and the reference."""
    case, pool, truth = Case(), Ranks(1, start="fuzz.drive:start"), Ranks(1, start=None)
    try:
        ranks, [reference] = pool.run("fuzz.drive:step", case), truth.run("fuzz.truth:run", case)
    finally:
        pool.close()
        truth.close()
    return case, ranks, reference


def _broken_by(law: Callable, case: Case, ranks: Sequence[Observation], reference: Observation) -> str:
    with pytest.raises(Violation) as caught:
        law(case, ranks, reference)
    return caught.value.witness


def test_a_wrong_norm_is_a_violation(observed: tuple) -> None:
    case, ranks, reference = observed
    key, norms = "0/0/critic_norm", reference.numbers
    wrong = replace(reference, numbers={**norms, key: norms[key] * (1 + 1e-5)})
    assert updates.gradient_norm_matches_the_reference(case, ranks, reference) == len(updates.TRAINED)
    assert key in _broken_by(updates.gradient_norm_matches_the_reference, case, ranks, wrong)


def test_a_wrong_weight_is_a_violation(observed: tuple) -> None:
    case, ranks, reference = observed
    key, tensors = "0/0/actor/weight/lm_head.weight", reference.tensors
    wrong = replace(reference, tensors={**tensors, key: tensors[key] * (1 + 1e-9)})
    assert updates.weights_and_moments_match_the_reference(case, ranks, reference) == len(updates.TRAINED)
    assert key in _broken_by(updates.weights_and_moments_match_the_reference, case, ranks, wrong)


# ---- the form of planted bugs ----------------------------------------------------------------------------------

MODULES = ("dispatch", "gradients", "layers", "ppo_arithmetic", "losses", "state", "liveness", "reduction")


def _bugs() -> dict[str, Callable[[], None]]:
    modules = {name: importlib.import_module(f"toy_models.planted.{name}") for name in MODULES}
    made = {name: inspect.getmembers(module, inspect.isfunction) for name, module in modules.items()}
    return {
        f"{name}:{function.__name__}": function
        for name, functions in made.items()
        for _, function in functions
        if function.__module__ == modules[name].__name__ and not function.__name__.startswith("_")
    }


def test_every_planted_bug_has_a_case() -> None:
    assert set(_bugs()) == set(PLANTED)


def test_every_planted_bug_says_what_breaks_where_from_and_the_smallest_layout() -> None:
    for name, bug in _bugs().items():
        what, where, minimal = [line for line in inspect.getdoc(bug).splitlines() if line]
        assert what.endswith(".") and where.endswith("."), name
        assert re.fullmatch(r"minimal: world=\d( (tp|pp|cp|ep|etp)=\d)*", minimal), name
