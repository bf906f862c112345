"""The reference against closed forms, finite differences, torch.optim and transformers' own classes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from toy_models import batching, families, reference, reference_model, reference_rollout, weights
from toy_models import reference_update as update
from toy_models.batching import end_token, uniform
from toy_models.precision import keep_float64
from toy_models.spec import FAMILIES, PPO, Batch, Layout, MoEModel, Switches

MODELS = {
    "qwen3moe": MoEModel(layers=2, experts=4, top_k=2, norm_topk_prob=True, hidden=12, heads=4, kv_heads=2, ffn=6),
    "qwen2moe": MoEModel(family="qwen2moe", layers=2, experts=3, heads=2, kv_heads=1, shared_ffn=6),
    "mixtral": MoEModel(family="mixtral", experts=4, top_k=2, norm_topk_prob=True, heads=2, tied=True),
    "gptoss": MoEModel(
        family="gptoss", layers=2, experts=4, top_k=2, norm_topk_prob=True, hidden=12, heads=4, kv_heads=2, ffn=6,
        activation="quick_gelu", clamp=0.5, glu_offset=1.0, sinks="learnable", biases=True,
    ),
    "glm4moe": MoEModel(
        family="glm4moe", layers=2, experts=4, top_k=2, norm_topk_prob=True, heads=2, kv_heads=1, ffn=6, shared_ffn=6,
        score="sigmoid", scaling=2.5, expert_groups=2, group_topk=1,
    ),
}  # fmt: skip
BIASES = {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in range(2)}
BATCH = Batch(rows=4, prompt=3, response=4, raggedness="ragged", holes=True)
SETTINGS = PPO(mini_batches=2, epochs=2, lr=0.1, critic_lr=0.1, kl_coef=0.1, entropy_coef=0.02, whiten=True)


class Rollout: ...


class Update: ...


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make(**changes: Any) -> SimpleNamespace:
    fields = {
        "layout": Layout(), "model": MODELS["qwen3moe"], "batch": BATCH, "ppo": SETTINGS, "seed": 3,
        "switches": Switches(), "program": (Rollout(), Update()), "precision": "float64",
    }  # fmt: skip
    return SimpleNamespace(**(fields | changes))


def farthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], *, but: str = "margin") -> float:
    """Greatest absolute difference over all tensors that both have, which must be the same ones."""
    assert set(a) == set(b)
    return max((a[key] - b[key]).abs().max().item() for key in a if but not in key)


def their_model(model: MoEModel, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The family's ForCausalLM class with our weights and float64 rotary frequencies."""
    theirs = AutoModelForCausalLM.from_config(families.hf_config(model)).eval()
    missing = theirs.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight", *BIASES}
    theirs.model.rotary_emb.inv_freq = families.frequencies(model)
    return theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(family: str) -> None:
    model = MODELS[family]
    state = reference_model.initial(model, "actor", 1, "float64")
    theirs = their_model(model, state)
    leaves = {name: w.clone().requires_grad_() for name, w in state.items()}
    tokens = torch.randint(model.vocab, (3, 7), generator=torch.Generator().manual_seed(0))
    with keep_float64():
        ours_out = reference_model.forward(model, leaves, tokens).output
        theirs_out = theirs(input_ids=tokens).logits
        gradients = update.gradients((ours_out**2).sum(), leaves)
        (theirs_out**2).sum().backward()
    assert ours_out.dtype is torch.float64
    torch.testing.assert_close(ours_out, theirs_out, rtol=1e-13, atol=1e-13)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_in_the_page_is_observed(family: str) -> None:
    adam = PPO(mini_batches=2, optimizer="adam")
    seen = reference.run(make(model=MODELS[family], ppo=adam))
    shapes = {key: tuple(tensor.shape) for key, tensor in seen["tensors"].items()}
    rows, response, width, vocab = 4, 4, 7, MODELS[family].vocab
    expected = {"0/tokens": (rows, width), "0/logits": (rows, width, vocab), "0/scores": (rows,)}
    per_token = (
        "mask",
        "old_logp",
        "ref_logp",
        "values",
        "rewards",
        "advantages",
        "returns",
        "margin/rollout",
    )
    expected |= {f"0/{name}": (rows, response) for name in per_token}
    for step in (0, 1):
        expected[f"0/{step}/logp"] = (2, response)
        for role in ("actor", "critic"):
            for kind in ("grad", "weight", "exp_avg", "exp_avg_sq"):
                table = weights.shapes(MODELS[family], role)
                expected |= {f"0/{step}/{role}/{kind}/{name}": shape for name, shape in table.items()}
    assert shapes == expected
    metrics = {"policy_loss", "entropy", "approx_kl", "clip_fraction", "value_loss", "value_clip_fraction"}
    metrics |= {"actor_norm", "critic_norm", "margin"}
    assert set(seen["numbers"]) == {f"0/{s}/{name}" for s in (0, 1) for name in metrics} | {"0/margin/routing"}
    counts = seen["facts"]["0/tokens_per_expert"]
    assert [sum(layer) for layer in counts] == [rows * width * MODELS[family].top_k] * MODELS[family].layers


def test_a_case_run_twice_is_bitwise_the_same_and_draws_nothing() -> None:
    state = torch.get_rng_state()
    one, two = reference.run(make()), reference.run(make())
    assert all(torch.equal(one["tensors"][key], two["tensors"][key]) for key in one["tensors"] | two["tensors"])
    assert one["numbers"] == two["numbers"] and one["facts"] == two["facts"]
    assert torch.equal(state, torch.get_rng_state())


def test_an_operation_out_of_place_is_named() -> None:
    with pytest.raises(ValueError, match="cannot run Update here"):
        reference.run(make(program=(Update(),)))


# Rollout


def test_sampling_takes_the_first_token_whose_cumulative_probability_exceeds_u() -> None:
    p = torch.tensor([0.0, 0.25, 0.5, 0.25, 0.0], dtype=torch.float64)
    taken = [reference_rollout.sample(p, u) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999, 1.0)]
    assert taken == [1, 1, 2, 2, 3, 3, 3]


def test_the_margin_is_the_distance_to_the_nearest_boundary_that_matters() -> None:
    p = torch.tensor([0.0, 0.25, 0.5, 0.25], dtype=torch.float64)
    assert reference_rollout._distance(p, 1, 0.01) == pytest.approx(0.24)
    assert reference_rollout._distance(p, 2, 0.30) == pytest.approx(0.05)
    assert reference_rollout._distance(p, 3, 0.99) == pytest.approx(0.24)
    assert reference_rollout._distance(p, 1, 0.26) == pytest.approx(-0.01)


def replayed(case: Any, seen: dict[str, Any], row: int) -> tuple[list[int], list[int]]:
    """What the page says a row's response and mask must be, given the logits that were observed."""
    start = len(batching.prompt_tokens(case.model, case.batch, case.seed, 0)[row])
    tokens, mask = [], []
    for j in range(batching.response_limits(case.batch, case.seed)[row]):
        forced = batching.forced_token(case.model, case.batch, case.seed, 0, row, j)
        p = (seen["0/logits"][row, start + j - 1] / case.ppo.temperature).softmax(-1)
        u = uniform("sample", case.seed, 0, row, j)
        tokens.append(reference_rollout.sample(p, u) if forced is None else forced)
        mask.append(int(forced is None))
        if forced is None and tokens[-1] == end_token(case.model):
            break
    return tokens, mask


@pytest.mark.parametrize("seed", range(4))
def test_every_row_is_what_its_logits_and_uniforms_say(seed: int) -> None:
    case = make(seed=seed, program=(Rollout(),), ppo=PPO(temperature=0.7))
    seen = reference.run(case)["tensors"]
    for row, prompt in enumerate(batching.prompt_tokens(case.model, case.batch, seed, 0)):
        tokens, mask = replayed(case, seen, row)
        padded = [*prompt, *tokens] + [0] * (7 - len(prompt) - len(tokens))
        assert seen["0/tokens"][row].tolist() == padded
        assert seen["0/mask"][row].tolist() == mask + [0] * (4 - len(mask))
        assert (seen["0/margin/rollout"][row][seen["0/mask"][row].bool()] > 0).all()


def test_a_second_iteration_starts_from_the_trained_weights() -> None:
    case = make(program=(Rollout(), Update(), Rollout(), Update()), ppo=PPO(optimizer="adam", lr=0.1))
    seen = reference.run(case)["tensors"]
    trained = {n.split("weight/", 1)[1]: w for n, w in seen.items() if n.startswith("0/0/actor/weight/")}
    with keep_float64():
        again = reference_model.forward(case.model, families.to_hf(case.model, trained), seen["1/tokens"]).output
    assert torch.equal(again, seen["1/logits"])
    assert not torch.equal(seen["0/tokens"], seen["1/tokens"])


def test_before_the_first_step_nothing_has_moved_and_later_something_has() -> None:
    numbers = reference.run(make())["numbers"]
    first = [numbers[f"0/0/{name}"] for name in ("clip_fraction", "value_clip_fraction")]
    assert first == [0, 0] and abs(numbers["0/0/approx_kl"]) < 1e-14
    assert abs(numbers["0/3/approx_kl"]) > 1e-3


# Which rows share a micro-batch matters to the balance losses alone


@pytest.mark.parametrize("layout", [Layout(), Layout(world=2), Layout(world=4, tp=4), Layout(world=4, tp=2)])
def test_without_balance_losses_the_partition_changes_nothing(layout: Layout) -> None:
    whole = reference.run(make(batch=Batch(**{**vars(BATCH), "micro_rows": 2})))["tensors"]
    model = MoEModel(**{**vars(MODELS["qwen3moe"]), "aux_loss": 1e-40})  # too small to be seen: pass by pass
    cut = reference.run(make(layout=layout, model=model))["tensors"]
    logits = cut.pop("0/logits")
    assert (whole.pop("0/logits") - logits[:, :7]).abs().max() < 1e-13
    assert farthest(whole, cut) < 1e-12


def test_with_a_balance_loss_the_partition_matters() -> None:
    model = MoEModel(**{**vars(MODELS["qwen3moe"]), "aux_loss": 1.0})
    batch = Batch(**{**vars(BATCH), "micro_rows": 2})
    key = "0/0/actor/grad/model.layers.0.mlp.gate.weight"
    one, two = (reference.run(make(model=model, batch=b))["tensors"][key] for b in (batch, BATCH))
    assert (one - two).abs().max() > 1e-3


# Nudged runs


def test_a_nudged_run_keeps_the_tokens_and_moves_a_little() -> None:
    seen = reference.run(make())["tensors"]
    given = {"tokens": [seen["0/tokens"]], "mask": [seen["0/mask"]]}
    assert farthest(seen, reference.run(make(), **given)["tensors"]) == 0
    moved = reference.run(make(), nudge=2**-30, **given)["tensors"]
    assert torch.equal(moved["0/tokens"], seen["0/tokens"])
    assert 1e-12 < farthest(seen, moved) < 1e-4


def test_clip_coefficients_are_nudged_alike_or_in_turns() -> None:
    """Adam does not feel a factor that all of its steps share: only nudges in turns show what a rounded norm does."""

    def moved(optimizer: str, *nudges: float) -> float:
        case = make(ppo=PPO(max_norm=0.01, mini_batches=2, optimizer=optimizer, eps=1e-12, lr=0.01))
        seen = reference.run(case)["tensors"]
        given = {"tokens": [seen["0/tokens"]], "mask": [seen["0/mask"]]}
        again = reference.run(case, clip_nudges=nudges, **given)["tensors"]
        return max((seen[key] - again[key]).abs().max().item() for key in seen if "/weight/" in key)

    assert moved("sgd", 2**-24, 2**-24) > 1e-12
    assert moved("adam", 2**-24, -(2**-24)) > 30 * moved("adam", 2**-24, 2**-24)


@pytest.mark.parametrize("nudges", [{"dtype": torch.float32}, {"logit_nudge": 2.0**-52}], ids=["float32", "softmax"])
def test_rounding_moves_gradients_a_little(nudges: dict[str, Any]) -> None:
    """A float32 run is one: it was not while its weights were converted inside `keep_float64`, which leaves them."""
    seen = reference.run(make())["tensors"]
    given = {"tokens": [seen["0/tokens"]], "mask": [seen["0/mask"]]}
    name = "0/0/actor/grad/model.norm.weight"
    moved = reference.run(make(), **given, **nudges)["tensors"][name]
    assert moved.dtype is nudges.get("dtype", torch.float64)
    assert 0 < float((moved.double() - seen[name]).abs().max()) < 1e-5
