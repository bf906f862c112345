"""Where system and reference part: nowhere in a healthy system, at the module of a planted bug and on its ranks."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image
from matplotlib.colors import to_rgb
from planted_cases import PLANTED

from fuzz import divergence, forking, heatmap, known, modules
from fuzz.case import Case, Rollout, Update
from fuzz.differences import BACKWARD, FORWARD, GRADIENTS, WEIGHTS, Row
from fuzz.divergence import Divergence
from fuzz.trial import Trials
from toy_models import weights
from toy_models.reference import run
from toy_models.reference_trace import run as traced
from toy_models.spec import FAMILIES, PPO, Batch, Layout, MoEModel, Switches

QWEN3 = MoEModel(heads=4, kv_heads=2, experts=4, top_k=2, norm_topk_prob=True, layers=2, ffn=4, vocab=12)
GLM4 = MoEModel(
    family="glm4moe",
    heads=2,
    kv_heads=2,
    experts=4,
    top_k=2,
    norm_topk_prob=True,
    shared_ffn=4,
    layers=2,
    score="sigmoid",
)
QWEN2 = MoEModel(family="qwen2moe", heads=2, kv_heads=2, experts=4, top_k=2, shared_ffn=4, layers=2, tied=True)
MIXTRAL = MoEModel(family="mixtral", heads=2, kv_heads=1, experts=4, top_k=3, norm_topk_prob=True, layers=2)
GPTOSS = replace(
    QWEN3, family="gptoss", activation="quick_gelu", clamp=0.5, glu_offset=1.0, sinks="learnable", biases=True
)
BALANCED = replace(QWEN3, aux_loss=0.3, z_loss=0.1, skew=2.0)
BENT = replace(BALANCED, activation="gelu", clamp=0.5, glu_offset=1.0, output_gate=True, sinks="learnable", biases=True)
RAGGED = Batch(rows=4, prompt=3, response=4, raggedness="ragged")
HOLES = Batch(rows=8, prompt=2, response=3, holes=True, micro_rows=2, pad_is_eos=True)
ADAM = PPO(optimizer="adam", lr=0.03, critic_lr=0.03, eps=1e-2, weight_decay=0.1, max_norm=0.3, whiten=True)
SGD = PPO(mini_batches=2, epochs=2, temperature=0.7, entropy_coef=0.1, kl_coef=0.1, gamma=0.9, lam=0.6)
GATHER = Switches(dispatcher="allgather")
DENSE = replace(QWEN3, dense=(0, 2), dense_ffn=6, layers=4)  # and fewer query groups than four TP ranks
OVERLAPPED = Switches(p2p="overlapped", deallocate=True)
LAYOUTS = {
    "world1": Layout(),
    "dp2": Layout(world=2),
    "tp2": Layout(world=2, tp=2),
    "ep2": Layout(world=2, ep=2),
    "etp2": Layout(world=2, etp=2),
    "tp2-ep2": Layout(world=2, tp=2, ep=2),
    "tp2-ep2-dp2": Layout(world=4, tp=2, ep=2),
    "ep2-etp2": Layout(world=4, ep=2, etp=2),
    "ep4": Layout(world=4, ep=4),
    "pp2": Layout(world=2, pp=2),
    "cp2": Layout(world=2, cp=2, ep=2),
    "pp2-cp2": Layout(world=4, pp=2, cp=2, order="cp-tp-ep-dp-pp"),
    "pp2-vpp2": Layout(world=4, pp=2, vpp=2, ep=2, split="list", stages=(1, 0, 1, 2)),
    "tp2-cp2": Layout(world=4, tp=2, cp=2, etp=4),
    "tp4": Layout(world=4, tp=4, ep=2, order="dp-ep-cp-tp-pp"),
}
HEALTHY = {
    "world1": Case(model=MIXTRAL, batch=RAGGED, ppo=SGD),
    "dp2": Case(layout=LAYOUTS["dp2"], model=BALANCED, batch=HOLES, ppo=ADAM),
    "tp2": Case(layout=LAYOUTS["tp2"], model=QWEN2, batch=RAGGED, ppo=SGD),
    "ep2": Case(layout=LAYOUTS["ep2"], model=MIXTRAL, batch=HOLES, ppo=ADAM, switches=GATHER),
    "etp2": Case(layout=LAYOUTS["etp2"], model=QWEN2, batch=RAGGED, switches=GATHER),
    "tp2-ep2": Case(layout=LAYOUTS["tp2-ep2"], model=BENT, batch=RAGGED, ppo=SGD),
    "tp2-ep2-dp2": Case(layout=LAYOUTS["tp2-ep2-dp2"], model=QWEN2, batch=HOLES, ppo=ADAM),
    "ep2-etp2": Case(layout=LAYOUTS["ep2-etp2"], model=BALANCED, batch=replace(HOLES, rows=16), ppo=SGD),
    "ep4": Case(layout=LAYOUTS["ep4"], model=GPTOSS, batch=RAGGED, program=(Rollout(), Update(), Rollout())),
    "pp2": Case(layout=LAYOUTS["pp2"], model=QWEN2, batch=RAGGED, ppo=SGD, switches=Switches(shared_overlap=True)),
    "cp2": Case(layout=LAYOUTS["cp2"], model=BALANCED, batch=RAGGED, ppo=ADAM),
    "pp2-cp2": Case(layout=LAYOUTS["pp2-cp2"], model=MIXTRAL, batch=HOLES, ppo=SGD),
    "pp2-vpp2": Case(layout=LAYOUTS["pp2-vpp2"], model=DENSE, batch=HOLES, ppo=ADAM, switches=OVERLAPPED),
    "tp2-cp2": Case(layout=LAYOUTS["tp2-cp2"], model=replace(DENSE, heads=2, tied=True), batch=RAGGED, ppo=SGD),
    "tp4": Case(layout=LAYOUTS["tp4"], model=replace(DENSE, dense_ffn=8), batch=RAGGED, ppo=ADAM),
}


@pytest.fixture(scope="module")
def healthy() -> Iterator[Trials]:
    forking.warm_up()
    trials = Trials(plants=known.mends())
    yield trials
    trials.close()


@pytest.fixture
def with_bug(request: pytest.FixtureRequest) -> Iterator[Trials]:
    trials = Trials(plants=(*known.mends(), request.param))
    yield trials
    trials.close()


# ---- nothing is found where nothing is -------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_system_diverges_nowhere(healthy: Trials, name: str) -> None:
    """In float64 whatever is not after a clipped step agrees to 1e-12 or a hundredth of its bound."""
    found = divergence.measure(healthy, HEALTHY[name])
    assert found.first is None and not found.doubt, found.table()
    loose = {row.module for row in found.rows if row.phase != WEIGHTS and row.greatest > max(1e-12, row.bound / 100)}
    assert loose <= {f"{role}/{modules.NORM}" for role in ("actor", "critic")}  # megatron sums it up in float32
    assert "nothing differs" in found.sentence() and f"{len(found.rows)} comparisons" in found.sentence()


@pytest.mark.parametrize("name", ["world1", "tp2", "ep2", "tp2-ep2-dp2"])
def test_float32_diverges_nowhere_either(healthy: Trials, name: str) -> None:
    case = replace(HEALTHY[name], precision="float32", ppo=replace(HEALTHY[name].ppo, eps=1e-2))
    found = divergence.measure(healthy, case)
    assert found.first is None, found.table()
    assert 1e-8 < max(row.greatest for row in found.rows if row.phase == FORWARD) < 2e-5


def test_every_module_is_compared_in_every_phase(healthy: Trials) -> None:
    """No module is left out, and what has no parameters has a forward and a backward row."""
    found = divergence.measure(healthy, HEALTHY["tp2"])
    qwen2 = [name for name in modules.names(QWEN2) if "_layernorm" not in name or "self_attention." not in name]
    for role in ("actor", "critic"):
        there = {phase: [r.module for r in found.rows if r.phase == phase and r.module.startswith(role)] for phase in
                 (FORWARD, BACKWARD, GRADIENTS, WEIGHTS)}  # fmt: skip
        assert there[FORWARD] == [f"{role}/{name}" for name in (*qwen2, "loss")]
        assert there[BACKWARD] == [f"{role}/{name}" for name in reversed(qwen2)]
        owners = {modules.of_parameter(name) for name in weights.shapes(QWEN2, role)}
        assert set(there[WEIGHTS]) == {f"{role}/{name}" for name in owners}
        assert set(there[GRADIENTS]) - set(there[WEIGHTS]) == {f"{role}/{modules.NORM}"}
    assert all(None not in row.differences for row in found.rows)


def test_a_rank_is_compared_in_what_its_stages_have(healthy: Trials) -> None:
    """The rank with the embedding has no head, and no layer is on two ranks; a tied embedding is on both."""
    found = divergence.measure(healthy, HEALTHY["pp2"])
    there = {f"{row.phase} {row.module}": [gap is not None for gap in row.differences] for row in found.rows}
    first = ("embedding", "layers.0", "layers.0.mlp.router", "layers.0.mlp.token_dispatcher")
    last = ("layers.1", "layers.1.mlp.experts.linear_fc1", "final_layernorm", "output_layer")
    for phase in (FORWARD, BACKWARD):
        assert all(there[f"{phase} critic/{name}"] == [True, False] for name in first)
        assert all(there[f"{phase} actor/{name}"] == [False, True] for name in last)
    assert there[f"{GRADIENTS} actor/embedding"] == [True, True]
    assert there[f"{WEIGHTS} critic/embedding"] == there[f"{WEIGHTS} actor/layers.0.mlp.router"] == [True, False]
    assert there[f"{FORWARD} actor/loss"] == [True, True]  # metrics are known to all stages


# ---- what is planted is found where it is ----------------------------------------------------------------------

EXPERTS, MLP = "actor/layers.0.mlp.experts.linear_fc1", "actor/layers.0.mlp"
# Of each bug: phase, module, ranks, and a part of the sentence.
FOUND = {
    "dispatch:gates_softmaxed_before_top_k": (FORWARD, f"{MLP}.router", [0], "pre_mlp_layernorm matches"),
    "dispatch:chunks_not_sorted_by_expert": (FORWARD, f"{MLP}.token_dispatcher", [0, 1], "copies do not arrive"),
    "dispatch:last_gathered_token_lost": (
        FORWARD, f"{MLP}.token_dispatcher", [1],
        "on rank 1, 1 of 10 copies do not arrive, first row 1, position 5 for expert 1",
    ),
    "dispatch:probabilities_of_other_ranks_lost": (FORWARD, f"{MLP}.token_dispatcher", [0, 1], "router matches"),
    "dispatch:chunks_restored_by_the_wrong_shape": (FORWARD, MLP, None, "experts.linear_fc2 matches"),
    "dispatch:combine_overwrites_copies": (FORWARD, MLP, [0], "experts.linear_fc2 matches"),
    "dispatch:probabilities_detached_across_ep": (
        BACKWARD, f"{MLP}.token_dispatcher", [0, 1], "its output carries no gradient",
    ),
    "state:rotary_base_of_another_family": (FORWARD, "actor/layers.0.self_attention.core_attention", [0], "differs"),
    "ppo_arithmetic:sampled_without_temperature": (FORWARD, "rollout/tokens", [0], "critic/output_layer matches"),
    "ppo_arithmetic:values_one_late": (FORWARD, "experience/values", [0], "experience/ref_logp matches"),
    "ppo_arithmetic:gae_steps_through_holes": (FORWARD, "experience/advantages", [0], "experience/rewards matches"),
    "losses:value_loss_without_half": (FORWARD, "critic/loss", [0], "critic/loss differs by 1.0e+00"),
    "losses:policy_loss_is_a_mean_of_means": (
        BACKWARD, "actor/output_layer", [0], "matches in forward; backward: the gradient handed back by the loss",
    ),
    "gradients:predicted_logit_in_every_shard": (BACKWARD, "actor/output_layer", [0], "handed back by the loss"),
    "gradients:z_loss_on_probabilities": (
        BACKWARD, "actor/layers.0.pre_mlp_layernorm", [0], "the gradient handed back by mlp (its router",
    ),
    "gradients:expert_gradients_not_reduced": (
        GRADIENTS, EXPERTS, [1, 3], "everything matches in forward and backward; parameter gradients",
    ),
    "gradients:norm_gradients_not_summed_over_tp": (
        GRADIENTS, "actor/layers.0.input_layernorm", None, "embedding matches",
    ),
    "gradients:router_gradient_not_summed_over_tp": (GRADIENTS, f"{MLP}.router", [0, 1], "on all ranks"),
    "gradients:expert_norm_over_the_dense_group": (GRADIENTS, "actor/gradient norm", None, "norm differs"),
    "gradients:vectors_are_decayed": (WEIGHTS, "actor/layers.0.input_layernorm", [0], "the new weight of"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("with_bug", "bug"), [(f"toy_models.planted.{bug}", bug) for bug in FOUND], indirect=["with_bug"], ids=list(FOUND)
)
def test_a_planted_bug_is_found_at_its_module(with_bug: Trials, bug: str) -> None:
    phase, module, ranks, said = FOUND[bug]
    found = divergence.measure(with_bug, PLANTED[bug][0])
    assert found.first and (found.first.phase, found.first.module) == (phase, module), found.sentence()
    assert ranks is None or found.first.above == ranks
    assert said in found.sentence() and module in found.table() and "**" in found.table()


SECOND = {
    "expert_too_great": (FORWARD, "actor/layers.1.mlp.experts.linear_fc2", "linear_fc1 matches"),
    "gradient_doubled": (BACKWARD, "actor/layers.1.mlp.experts.linear_fc1", "handed back by mlp.experts.linear_fc2"),
    "not_a_number": (FORWARD, "actor/layers.1.mlp.experts.linear_fc2", "on rank 1, in shape or by NaN"),
}


@pytest.mark.parametrize(
    ("with_bug", "bug", "layout"),
    [(f"tests.divergence_bugs:{bug}", bug, layout) for bug in SECOND for layout in ("ep4", "pp2")],
    indirect=["with_bug"],
    ids=[f"{bug}-{layout}" for bug in SECOND for layout in ("ep4", "pp2")],
)
def test_the_layer_and_the_one_rank_are_found(with_bug: Trials, bug: str, layout: str) -> None:
    """What one expert of the second layer does wrong on rank 1 is found there, and its first layer is clean."""
    phase, module, said = SECOND[bug]
    case = Case(layout=LAYOUTS[layout], model=QWEN3, batch=Batch(rows=4, prompt=4, response=4))
    found = divergence.measure(with_bug, case)
    assert found.first and (found.first.phase, found.first.module, found.first.above) == (phase, module, [1])
    assert said in found.sentence()
    if bug == "expert_too_great":
        assert found.first.differences[1] == pytest.approx(0.03, rel=0.9)


@pytest.mark.parametrize("with_bug", ["tests.divergence_bugs:dies"], indirect=True)
def test_how_far_ranks_came_is_said(with_bug: Trials, tmp_path: Path) -> None:
    case = Case(layout=LAYOUTS["ep2"], model=QWEN3, batch=RAGGED)
    found = divergence.measure(with_bug, case)
    assert found.rows == () and found.table() == ""
    assert "rank 1 died after 'actor forward layers.1.mlp." in found.sentence()
    assert "rank 0 raised RuntimeError" in found.sentence()  # Gloo: its peer has gone
    assert "after 'actor forward layers.1.mlp.experts.linear_fc2'" in found.sentence()
    heatmap.write(found, tmp_path / "lost.png")
    assert image.imread(tmp_path / "lost.png").shape[0] < 500


# ---- the reference's own trace ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_traced_reference_is_the_reference(family: str) -> None:
    """Taps change nothing; what is computed once more, expert by expert, adds up to what transformers computed."""
    models = {"qwen3moe": QWEN3, "qwen2moe": QWEN2, "glm4moe": GLM4, "mixtral": MIXTRAL, "gptoss": GPTOSS}
    model, cut = models[family], "etp2" if family != "gptoss" else "ep2"
    case = Case(layout=LAYOUTS[cut], model=replace(model, z_loss=0.1), batch=RAGGED)
    seen, plain = traced(case)["tensors"], run(case)["tensors"]
    assert all((seen[key] == plain[key]).all() for key in plain)
    for i in range(2):
        here = f"actor/layers.{i}.mlp"
        added = seen[f"forward/{here}.experts.linear_fc2"].sum((2, 3))
        added = added + seen.get(f"forward/{here}.shared_experts", 0.0) + _second_biases(case, seen, i)
        assert (added - seen[f"forward/{here}"]).abs().max() < 1e-14
        chosen, gates = seen[f"chosen/actor/layers.{i}"], seen[f"backward/{here}.token_dispatcher"][..., -1].sum(3)
        assert (seen[f"backward/{here}.router"].gather(2, chosen) - gates).abs().max() < 1e-14


def _second_biases(case: Case, seen: Mapping[str, torch.Tensor], layer: int) -> torch.Tensor | float:
    """What the biases of the chosen experts add to each token, times their gates."""
    if not case.model.biases:
        return 0.0
    canonical, path = weights.canonical(case.model, "actor", case.seed), f"model.layers.{layer}.mlp.experts"
    biases = torch.stack([canonical[f"{path}.{expert}.down_proj.bias"] for expert in range(case.model.experts)])
    gates = seen[f"forward/actor/layers.{layer}.mlp.token_dispatcher"][..., 0, -1:]
    return (biases[seen[f"chosen/actor/layers.{layer}"]] * gates).sum(2)


# ---- words, table and picture ----------------------------------------------------------------------------------


def _pretended(world: int, layers: int, wrong: list[int]) -> Divergence:
    case = Case(
        layout=Layout(world=world, ep=world), model=MoEModel(layers=layers, experts=64), batch=Batch(rows=world)
    )
    at = layers // 2
    gaps = {f"actor/layers.{at}.mlp.router": [3.1e-2 if rank in wrong else 2e-16 for rank in range(world)]}
    clean = [1e-16] * world
    rows = [
        Row(phase, f"actor/{name}", tuple(gaps.get(f"actor/{name}", clean)), (1e-12,) * world)
        for phase in (FORWARD, BACKWARD)
        for name in modules.names(case.model)[:: 1 if phase == FORWARD else -1]
    ]
    return Divergence(case, tuple(rows))


def test_the_sentence_names_module_number_and_ranks() -> None:
    said = _pretended(4, 2, [2, 3]).sentence()
    assert said == (
        "In the first optimizer step forward: actor/layers.1.mlp.shared_experts matches, "
        "actor/layers.1.mlp.router differs by 3.1e-02 on ranks 2, 3 (bound 1.0e-12)."
    )


@pytest.mark.parametrize(("size", "columns"), [(1, 1), (4, 4), (64, 8)])
def test_a_table_is_small_whatever_the_case(size: int, columns: int) -> None:
    found = _pretended(size, 64, [size - 1])
    lines = found.table().splitlines()
    assert len(lines) <= 15 and lines[0].count("rank ") == columns and f"rank {size - 1} " in lines[0]
    assert [line for line in lines if "**3.1e-02**" in line] == [lines[7]]


def _pixels(path: Path, colour: str) -> int:
    return int((np.abs(image.imread(path)[..., :3] - to_rgb(colour)) < 0.02).all(-1).sum())


@pytest.mark.parametrize(("size", "layers"), [(1, 1), (4, 2), pytest.param(64, 64, marks=pytest.mark.slow)])
def test_a_picture_frames_what_is_first(tmp_path: Path, size: int, layers: int) -> None:
    """Light cells for what agrees, a frame around what does not; of a size that a page can show."""
    file = tmp_path / "divergence.png"
    heatmap.write(_pretended(size, layers, [0]), file)
    height, width = image.imread(file).shape[:2]
    assert 500 < width < 4000 and 300 < height < 4500
    assert _pixels(file, heatmap.FRAME) > 50 and _pixels(file, heatmap.UNDER) > 1000
    framed = _pixels(file, heatmap.FRAME)
    heatmap.write(_pretended(size, layers, []), file)
    assert _pixels(file, heatmap.FRAME) < framed  # what the legend has remains
