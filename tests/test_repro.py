"""`repro.py`: scripts that need torch and megatron-core alone, fit a screen, and tell a bug from its absence."""

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import known, repro, strategies
from fuzz.case import Case
from toy_models.spec import PPO, Batch, Layout, MoEModel, Switches

GRADIENTS, NORM = "gradients match the reference", "gradient norm is that of the observed gradients"
DISPATCH, STEP = "every copy is delivered once", "the optimizer does its formula"
SCALED = "toy_models.planted.gradients:expert_gradients_scaled_twice"
FOUR = MoEModel(heads=2, kv_heads=2, ffn=4, experts=4, top_k=2, norm_topk_prob=True)
EP2 = Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2))
ADAM = PPO(optimizer="adam", lr=0.01, weight_decay=0.1, max_norm=1.0, eps=1e-4)
ETP = Case(layout=Layout(world=4, ep=2, etp=2), model=FOUR, batch=Batch(rows=4))
BALANCED = replace(FOUR, aux_loss=1.0)
STAGES = Layout(world=4, pp=2, ep=2)
TP = Case(layout=Layout(world=2, tp=2, etp=2), model=FOUR, batch=Batch(rows=2, prompt=3))
SHARED = MoEModel(family="qwen2moe", experts=3, top_k=2, norm_topk_prob=True, hidden=8, heads=2, shared_ffn=3, layers=2)
ALONE = Case(model=SHARED, batch=Batch(rows=3, prompt=4, response=3))
GATHER = replace(ETP, switches=Switches(dispatcher="allgather"))


def ran(tmp_path: Path, text: str) -> tuple[int, str]:
    """Its exit code and what it says, run as a user would."""
    file = tmp_path / "repro.py"
    file.write_text(text)
    asked = [sys.executable, str(file)]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    return done.returncode, done.stdout + (done.stderr if done.returncode > 1 or "Traceback" in done.stderr else "")


# ---- the text --------------------------------------------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    case=strategies.cases(max_ranks=8),
    law=st.sampled_from([*(law for some in repro.KINDS.values() for law in some), "metrics match the reference"]),
    plants=st.sampled_from([(), (SCALED,), (SCALED, "toy_models.planted.mends:expert_gradients_over_expert_dp")]),
    sentence=st.text(max_size=400),
)
def test_every_script_is_short_and_formatted(case: Case, law: str, plants: tuple[str, ...], sentence: str) -> None:
    text = repro.script(case, law, plants, sentence, "megatron-core 0.16.1, torch 2.13.0")
    lines = text.splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 100, text
    assert "#?" not in text and "$" not in ast.unparse(ast.parse(text).body[1:])
    assert ast.get_docstring(ast.parse(text)).startswith(f"The law: {law}.")
    asked = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length=100", "--diff", "-"]
    done = subprocess.run(asked, input=text, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    imported = {part.partition(".")[0] for part in _imported(text)}
    assert ("fuzz" in imported) == ("it needs ep-ppo-fuzz" in " ".join(lines))
    assert "fuzz" in imported or imported - {"toy_models"} <= set(sys.stdlib_module_names) | {"torch", "megatron"}


def _imported(text: str) -> list[str]:
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return [
        name
        for n in found
        for name in ([n.module or ""] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names])
    ]


def test_a_whole_case_is_the_case(tmp_path: Path) -> None:
    """What the script writes down evaluates back to the case."""
    case = replace(ETP, ppo=ADAM, twin="other_dispatcher", precision="float32", seed=7)
    scope: dict[str, object] = {"__name__": "repro"}
    exec(repro.whole_case(case, GRADIENTS, (SCALED,)), scope)
    assert scope["CASE"] == case and scope["PLANTS"] == (SCALED,) and scope["LAW"] == GRADIENTS


# ---- what it says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "law", "says"),
    [
        (EP2, DISPATCH, "as expected: every copy is delivered once"),
        (EP2, GRADIENTS, "as expected: losses and gradients of one rank"),
        pytest.param(ALONE, GRADIENTS, "as expected: losses and gradients", marks=pytest.mark.slow),
        pytest.param(replace(EP2, ppo=ADAM), NORM, "as expected: the norm", marks=pytest.mark.slow),
        pytest.param(replace(TP, ppo=ADAM), STEP, "as expected: the formula", marks=pytest.mark.slow),
        pytest.param(Case(ppo=ADAM), STEP, "as expected: the formula", marks=pytest.mark.slow),
        pytest.param(TP, GRADIENTS, "as expected: losses", marks=pytest.mark.slow),
        pytest.param(TP, DISPATCH, "as expected: every copy", marks=pytest.mark.slow),
        pytest.param(ETP, NORM, "as expected: the norm", marks=pytest.mark.slow),
        pytest.param(ETP, DISPATCH, "as expected: every copy", marks=pytest.mark.slow),
        pytest.param(GATHER, DISPATCH, "as expected: every copy", marks=pytest.mark.slow),
        pytest.param(GATHER, GRADIENTS, "holds: gradients match", marks=pytest.mark.slow),
        pytest.param(Case(model=BALANCED, batch=TP.batch), GRADIENTS, "as expected: losses", marks=pytest.mark.slow),
        pytest.param(
            Case(model=replace(FOUR, layers=2, tied=True, dense=(0,), dense_ffn=6), batch=TP.batch),
            GRADIENTS,
            "as expected: losses and gradients",
            marks=pytest.mark.slow,
        ),
        pytest.param(replace(EP2, model=BALANCED), GRADIENTS, "as expected: losses", marks=pytest.mark.slow),
        pytest.param(replace(TP, model=replace(FOUR, kv_heads=1)), GRADIENTS, "as exp", marks=pytest.mark.slow),
        pytest.param(
            Case(layout=Layout(world=4, tp=2, ep=2, order="ep-tp-dp-cp-pp"), model=FOUR, batch=ETP.batch),
            GRADIENTS,
            "as expected: losses and gradients of one rank",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Case(layout=STAGES, model=replace(BALANCED, layers=2), batch=ETP.batch),
            GRADIENTS,
            "as expected: losses",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Case(layout=STAGES, model=replace(FOUR, layers=2), batch=ETP.batch, ppo=ADAM),
            STEP,
            "as expected: the formula",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_healthy_cases_are_as_expected(tmp_path: Path, case: Case, law: str, says: str) -> None:
    code, said = ran(tmp_path, repro.script(case, law))
    assert (code, said.startswith(says)) == (0, True), said


@pytest.mark.parametrize(
    ("case", "law", "plant", "says"),
    [
        (EP2, GRADIENTS, SCALED, "rank 0, decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight: expected "),
        (
            Case(layout=Layout(world=2, ep=2), model=MoEModel(experts=4), batch=Batch(rows=2, prompt=4)),
            DISPATCH,
            "toy_models.planted.dispatch:chunks_not_sorted_by_expert",
            "rank 1, expert 2: expected tokens [",
        ),
        (ALONE, GRADIENTS, "toy_models.planted.dispatch:combine_overwrites_copies", "rank 0, losses: expected "),
        pytest.param(
            Case(),
            "routing is valid",
            "toy_models.planted.dispatch:gate_of_top_1_is_one",
            "rank 0, losses: expected ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            replace(TP, model=replace(FOUR, z_loss=0.1)),
            GRADIENTS,
            "toy_models.planted.gradients:z_loss_not_divided_by_tp",
            "rank 0, embedding.word_embeddings.weight: expected ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_planted_bug_is_shown(tmp_path: Path, case: Case, law: str, plant: str, says: str) -> None:
    code, said = ran(tmp_path, repro.script(case, law, (plant,)))
    assert code == 1 and said.startswith(says), said


@pytest.mark.parametrize(
    "bug", [bug for bug in known.living() if repro.kind(bug.example, bug.law)], ids=lambda bug: bug.id
)
def test_a_bug_of_megatron_is_shown_without_this_package(tmp_path: Path, bug: known.Known) -> None:
    text = repro.script(bug.example, bug.law)
    code, said = ran(tmp_path, text)
    assert "from fuzz" not in text and "toy_models" not in text
    assert code == 1 and "expected" in said and "observed" in said, said


def test_a_script_that_fails_shows_nothing(tmp_path: Path) -> None:
    """Exit code 1 is also that of a traceback."""
    for text, why in (
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit(0)", "exit code 0"),
        ("a b", "SyntaxError"),
    ):
        (tmp_path / "repro.py").write_text(text)
        assert why in repro.check(tmp_path / "repro.py", 30.0)
    (tmp_path / "repro.py").write_text("import time; time.sleep(60)")
    assert "not finished after 1 s" in repro.check(tmp_path / "repro.py", 1.0)
    (tmp_path / "repro.py").write_text("print('expected 1, observed 2'); raise SystemExit(1)")
    assert repro.check(tmp_path / "repro.py", 30.0) == ""
