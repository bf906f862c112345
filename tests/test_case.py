"""The values that cross every arrow: what a Case prints, how its file loads for ever, what is refused and how."""

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from fuzz import case_json
from fuzz.case import Case, Observation, Rollout, Update, Violation, twin_of
from fuzz.case_json import SCHEMA, from_json, to_json
from fuzz.strategies import cases
from tests.mutations import mutated
from toy_models.spec import PPO, Batch, Layout, MoEModel, Switches

DATA = Path(__file__).parent / "data"

# Every field of the newest away from its default; in schema 1 pipeline and context parallelism were pinned to 1.
FILES = {
    1: Case(
        layout=Layout(world=8, tp=2, ep=2, etp=2),
        model=MoEModel(
            family="qwen2moe",
            layers=2,
            experts=6,
            top_k=3,
            norm_topk_prob=True,
            hidden=24,
            heads=4,
            kv_heads=2,
            head_dim=6,
            ffn=6,
            shared_ffn=10,
            vocab=14,
            tied=True,
            skew=0.1,
            aux_loss=0.3,
            z_loss=1e-3,
        ),
        batch=Batch(rows=48, prompt=5, response=3, micro_rows=2, raggedness="one_long", holes=True, pad_is_eos=True),
        ppo=PPO(
            epochs=2,
            mini_batches=3,
            temperature=0.7,
            gamma=0.9,
            lam=0.95,
            kl_coef=0.1,
            clip_eps=0.05,
            value_clip=0.01,
            entropy_coef=0.3,
            whiten=True,
            optimizer="adam",
            lr=0.03,
            critic_lr=1 / 3,
            weight_decay=0.2,
            momentum=0.5,
            beta1=0.8,
            beta2=0.99,
            eps=1e-4,
            max_norm=30.0,
        ),
        switches=Switches(dispatcher="allgather", perform_initialization=False),
        program=(Rollout(), Update(), Rollout()),
        twin="other_dispatcher",
        precision="float32",
        seed=2**62 + 1,
    )
}
FILES[2] = replace(
    FILES[1],
    layout=Layout(
        world=16,
        tp=2,
        pp=2,
        vpp=2,
        cp=2,
        ep=2,
        etp=2,
        order="cp-tp-ep-dp-pp",
        split="list",
        stages=(1, 0, 2, 1),
    ),
    model=replace(FILES[1].model, layers=4, ffn=12, dense=(0, 2), dense_ffn=6),
    batch=replace(FILES[1].batch, rows=60),
    ppo=replace(FILES[1].ppo, frozen="attention"),
    switches=Switches(
        dispatcher="allgather",
        perform_initialization=False,
        p2p="flushed",
        deallocate=True,
        group=3,
        forward_sp=False,
        decoder_input=True,
        padding_mask="padding",
        groups="explicit",
    ),
)
FILES[3] = replace(
    FILES[2],
    model=replace(
        FILES[2].model,
        score="sigmoid",
        expert_bias=0.5,
        bias_rate=0.0625,
        scaling=2.5,
        expert_groups=2,
        group_topk=1,
        seq_aux_loss=0.5,
        global_aux_loss=2.0,
        capacity=0.5,
        pad_to_capacity=True,
    ),
    switches=replace(FILES[2].switches, router_dtype="fp64"),
)
FILES[4] = replace(
    FILES[3],
    ppo=replace(FILES[3].ppo, optimizer="adam", embedding_lr=0.05, coupled_decay=True, qk_decay=True),
    switches=replace(
        FILES[3].switches,
        distributed=True,
        overlap_reduce=True,
        overlap_gather=True,
        align=True,
        bucket=50,
        pad_buckets=True,
        average=True,
        check_nan=True,
        count_zeros=True,
        recompute="block",
        recompute_layers=2,
    ),
)
FILES[5] = replace(
    FILES[4],
    model=replace(
        FILES[4].model,
        activation="quick_gelu",
        gated=False,
        qk_norm="off",
        output_gate=True,
        sinks="learnable",
    ),
    switches=replace(FILES[4].switches, qk_scaling=True, fp32_residual=True, deterministic=True),
)
FILES[6] = replace(FILES[5], model=replace(FILES[5].model, drops="position"))  # sinkhorn has no capacity
BARE = json.loads(to_json(Case()))


def test_repr_leaves_out_defaults() -> None:
    """What a person pastes shows only what matters."""
    assert repr(Case()) == "Case()"
    case = Case(layout=Layout(world=2, tp=2), model=MoEModel(heads=2, kv_heads=2), program=(Rollout(),))
    assert repr(case) == (
        "Case(layout=Layout(world=2, tp=2), model=MoEModel(heads=2, kv_heads=2), program=(Rollout(),))"
    )


@pytest.mark.parametrize("case", [Case(), *FILES.values()], ids=["smallest", *(f"schema_{n}" for n in FILES)])
def test_repr_evaluates_back(case: Case) -> None:
    """`@example(Case(...))` is the case that failed, to the last digit."""
    assert eval(repr(case)) == case


# ---- JSON ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, derandomize=True, database=None)
@given(cases(max_ranks=8))
def test_json_and_repr_lose_nothing(case: Case) -> None:
    """Every case that is drawn survives its file and its repr."""
    assert from_json(to_json(case)) == case
    assert eval(repr(case)) == case


@pytest.mark.parametrize("schema", range(1, SCHEMA + 1))
def test_a_file_of_every_schema_loads_for_ever(schema: int) -> None:
    """A case file written once means the same in every later version; a new schema adds its file here."""
    assert from_json((DATA / f"case_schema_{schema}.json").read_text()) == FILES[schema]


@pytest.mark.parametrize("part", ["layout", "model", "batch", "ppo", "switches", ""])
def test_the_kept_file_has_every_field_away_from_its_default(part: str) -> None:
    """Else a change of a default would go unseen. What cannot be had with another option is left out."""
    value, plain = (getattr(case, part) if part else case for case in (FILES[SCHEMA], Case()))
    same = {f.name for f in fields(value) if getattr(value, f.name) == getattr(plain, f.name)}
    apart = {"switches": {"per_token", "shared_overlap"}, "model": {"clamp", "glu_offset", "biases", "sinkhorn"}}
    assert same == apart.get(part, set())


def test_fields_of_a_later_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were `z_loss` and `seed` of the next schema, files of this one would load without them and not with them."""
    monkeypatch.setattr(case_json, "SCHEMA", SCHEMA + 1)
    monkeypatch.setattr(case_json, "SINCE", {"model.z_loss": SCHEMA + 1, "seed": SCHEMA + 1})
    assert from_json(_file(model__z_loss=..., seed=...)) == Case()
    for text, said in [
        (_file(seed=...), "model has unknown fields 'z_loss'"),
        (_file(model__z_loss=...), "the case has unknown fields 'seed'"),
        (_file(schema=SCHEMA + 1, seed=...), f"lacks 'seed', which schema {SCHEMA + 1} has"),
    ]:
        with pytest.raises(ValueError, match=said):
            from_json(text)


def test_hostile_files_are_refused_or_valid() -> None:
    """Ten thousand mutated files: a valid Case or a ValueError of one short line, and nothing else."""
    outcomes = {"valid": 0, "refused": 0}
    for text in mutated([to_json(Case()), to_json(FILES[SCHEMA])], 10_000):
        outcomes[_outcome(text)] += 1
    assert min(outcomes.values()) > 300, outcomes


def _outcome(text: str) -> str:
    try:
        case = from_json(text)
    except ValueError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and len(message) < 1000, message
        return "refused"
    assert from_json(to_json(case)) == case
    return "valid"


# ---- what a message says ---------------------------------------------------------------------------------------


def _file(**changes: Any) -> str:
    """The smallest case's file with fields replaced, `part__field=value`; ... drops a field."""
    data = json.loads(json.dumps(BARE))
    for path, value in changes.items():
        *parts, name = path.split("__")
        place = data[parts[0]] if parts else data
        place.pop(name, None) if value is ... else place.update({name: value})
    return json.dumps(data)


def _piped(**changes: Any) -> str:
    """The same on two stages of one layer."""
    return _file(**{"layout__world": 2, "layout__pp": 2, "model__layers": 2} | changes)


REFUSED = {
    "missing field": (_file(batch__rows=...), ["batch lacks 'rows'", f"schema {SCHEMA}"]),
    "missing part": (_file(ppo=...), ["lacks 'ppo'"]),
    "no schema": (_file(schema=...), ["schema"]),
    "unknown field": (_file(layout__tpp=2), ["layout", "unknown", "'tpp'", "tp"]),
    "newer schema": (_file(schema=SCHEMA + 1), [f"schema={SCHEMA + 1}", f"newer than {SCHEMA}"]),
    "schema is a bool": (_file(schema=True), ["schema=True"]),
    "bool for int": (_file(model__layers=True), ["layers=True", "int"]),
    "float for int": (_file(seed=0.0), ["seed=0.0", "int"]),
    "text for number": (_file(model__skew="1"), ["skew='1'", "number"]),
    "int for bool": (_file(batch__holes=1), ["holes=1", "True or False"]),
    "absurd size": (_file(layout__world=10**9), ["world=1000000000", "1..64"]),
    "absurd product": (_file(model__layers=64, model__hidden=1024, model__ffn=4096), ["ffn=4096", "536870912"]),
    "too many digits": (_file().replace('"seed": 0', f'"seed": {"9" * 5000}'), ["5000 digits"]),
    "too long": (_file() + " " * 100_000, ["characters", "100000"]),
    "too deep": ("[" * 50_000, ["too deeply"]),
    "a long text": (_file(twin="x" * 9000), ["twin", "9000"]),
    "NaN": (_file(ppo__lr=float("nan")), ["NaN"]),
    "infinite": (_file().replace('"seed": 0', '"seed": 1e999'), ["seed", "inf"]),
    "a list": (_file(ppo__lr=[1]), ["ppo.lr", "list"]),
    "given twice": (_file().replace('"seed": 0', '"seed": 0, "seed": 1'), ["'seed'", "twice"]),
    "not an object": ("[]", ["object", "list"]),
    "not JSON": ("{", ["line 1"]),
    "unknown choice": (_file(switches__dispatcher="flex"), ["'flex'", "alltoall, allgather"]),
    "unknown operation": (_file(program=["Rollout", "exit"]), ["'exit'", "Rollout, Update"]),
    "Update first": (_file(program=["Update"]), ["Update", "follow a Rollout"]),
    "too many operations": (_file(program=["Rollout"] * 9), ["9", "8"]),
    "ranks not divisible": (_file(layout__world=4, layout__ep=3), ["world=4", "etp*ep*pp=1*3*1=3"]),
    "rows not divisible": (_file(batch__rows=3, ppo__mini_batches=2), ["rows=3", "mini_batches*dp*micro_rows=2*1*1=2"]),
    "heads not divisible": (_file(layout__world=2, layout__tp=2), ["heads=1", "tp=2"]),
    "layers not divisible": (_file(layout__world=2, layout__pp=2), ["layers=1", "pp*vpp=2"]),
    "vpp without pp": (_file(layout__vpp=2), ["vpp=2", "pp=1"]),
    "stages too few": (_file(layout__split="list", layout__stages=[1]), ["stages=(1,)", "pp*vpp=1*1"]),
    "stages of another sum": (_piped(layout__split="list", layout__stages=[1, 0]), ["layers=2", "(1, 0), 1"]),
    "stages no option gives": (_piped(layout__split="loss", layout__stages=[1, 1]), ["'loss'", "(1, 1)"]),
    "stages of no numbers": (_piped(layout__stages=[1, "1"]), ["layout.stages", "ints"]),
    "order without an axis": (_file(layout__order="tp-cp-ep-dp"), ["'tp-cp-ep-dp'", "pp"]),
    "order with pp not last": (_piped(layout__world=4, layout__ep=2, layout__order="pp-tp-cp-ep-dp"), ["dp=2, edp=1"]),
    "gather without overlap": (
        _file(switches__overlap_gather=True),
        ["overlap_gather=True", "distributed=False", "overlap_reduce=False"],
    ),
    "sgd shared out": (_file(switches__distributed=True), ["distributed=True", "'sgd'"]),
    "layers of nothing": (_file(switches__recompute_layers=1), ["recompute='none'", "recompute_layers=1"]),
    "blocks of no layers": (_file(switches__recompute="block"), ["recompute='block'", "recompute_layers=0"]),
    "per token and average": (
        _file(switches__per_token=True, switches__average=True),
        ["per_token=True", "average=True"],
    ),
    "per token with a balance loss": (
        _file(switches__per_token=True, model__aux_loss=0.5),
        ["per_token=True", "sum to 0.5"],
    ),
    "coupled decay of sgd": (_file(ppo__coupled_decay=True), ["coupled_decay=True", "'sgd'"]),
    "buckets without overlap": (_file(switches__bucket=1), ["bucket=1", "overlap_reduce=False"]),
    "group without stages": (_file(switches__group=2), ["group=2", "vpp=1"]),
    "group too great": (_piped(layout__vpp=2, model__layers=4, batch__rows=2, switches__group=3), ["group=3", "2 mic"]),
    "a short last group": (_piped(layout__vpp=2, model__layers=4, batch__rows=3), ["3 micro-batches", "last group"]),
    "overlap without stages": (_piped(switches__p2p="overlapped"), ["'overlapped'", "vpp=1"]),
    "dense layer that is none": (_file(model__dense=[1], model__dense_ffn=2), ["dense=(1,)", "layers=1"]),
    "no layer with experts": (_file(model__dense=[0], model__dense_ffn=2), ["dense=(0,)", "layers=1"]),
    "query groups": (_file(layout__world=4, layout__tp=4, model__heads=12, model__kv_heads=6), ["kv_heads=6", "tp=4"]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "said"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_names_the_numbers(text: str, said: list[str]) -> None:
    """One line that says which field is wrong, with every number involved."""
    with pytest.raises(ValueError) as caught:
        from_json(text)
    assert "\n" not in str(caught.value)
    assert [part for part in said if part not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Case(layout="2 ranks"), "layout='2 ranks' must be a Layout"),  # type: ignore[arg-type]
        (lambda: Case(program=()), "program=()"),
        (lambda: Case(seed=-1), "seed=-1"),
        (lambda: MoEModel(skew=float("nan")), "skew=nan"),
        (lambda: PPO(epochs=True), "epochs=True"),
    ],
)
def test_values_check_themselves(make: Callable[[], object], said: str) -> None:
    """Nothing that exists is invalid, whoever makes it."""
    with pytest.raises(ValueError) as caught:
        make()
    assert said in str(caught.value)


# ---- twins, observations, violations ---------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), [("alltoall", "allgather"), ("allgather", "alltoall")])
def test_the_other_dispatcher_changes_the_dispatcher_alone(one: str, other: str) -> None:
    """Anything else that moved would make the twins differ for a reason."""
    case = Case(switches=Switches(dispatcher=one, perform_initialization=False), twin="other_dispatcher", seed=3)
    assert twin_of(case) == Case(switches=Switches(dispatcher=other, perform_initialization=False), seed=3)


def test_again_is_the_same_case_without_a_twin() -> None:
    """A case run twice must be run as it is."""
    assert twin_of(Case(twin="again", seed=3)) == Case(seed=3)


def test_an_observation_is_frozen() -> None:
    """No law may change what the next law judges."""
    with pytest.raises(FrozenInstanceError):
        Observation(rank=0, outcome="done", stage="end").rank = 1  # type: ignore[misc]


def test_a_violation_ends_with_the_line_to_paste() -> None:
    """Law, witness, expected, observed, and last the example, which evaluates to the case."""
    violation = Violation(FILES[1], "a law", "rank 1", "2 tokens", "3 tokens", "One too many.")
    violation.also = ("another law", "a third")
    *rows, last = str(violation).strip().splitlines()
    assert [row.split()[-1] for row in rows] == ["law", "1", "tokens", "tokens", "many.", "third"]
    assert last.startswith("@example(") and eval(last.removeprefix("@example")) == FILES[1]
