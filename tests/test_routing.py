"""The router's formulas against transformers' GLM-4-MoE, against torch.topk, and by hand where they have no other."""

import math
from dataclasses import replace

import pytest
import torch
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

from toy_models import batching, families, reference_model, routing, weights
from toy_models import reference_update as update
from toy_models.precision import keep_float64
from toy_models.spec import Layout, MoEModel, groupings

SIGMOID = MoEModel(family="glm4moe", experts=6, top_k=2, norm_topk_prob=True, shared_ffn=2, score="sigmoid")


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "model",
    [
        SIGMOID,
        replace(SIGMOID, scaling=2.5, expert_bias=0.5),
        replace(SIGMOID, expert_groups=3, group_topk=1),
        replace(SIGMOID, experts=12, top_k=4, expert_groups=4, group_topk=2, expert_bias=0.5, scaling=0.4),
        replace(SIGMOID, top_k=1, norm_topk_prob=False, expert_groups=3),
    ],
    ids=str,
)
def test_gates_are_those_of_glm(model: MoEModel) -> None:
    """Same experts, same gates, same logits, with biases and groups, where GLM-4-MoE has the option."""
    theirs, ours = Glm4MoeTopkRouter(families.hf_config(model)).double(), reference_model.Router(model)
    ours.weight.data = theirs.weight.data = seeded(model.experts, model.hidden)
    bias = seeded(model.experts, seed=1) * model.expert_bias
    ours.register_buffer("e_score_correction_bias", bias)
    theirs.e_score_correction_bias = bias
    hidden = seeded(50, model.hidden, seed=2)
    with keep_float64():
        found, expected = ours(hidden), theirs(hidden)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-14, atol=1e-14)
    dense = [torch.zeros(50, model.experts, dtype=torch.float64).scatter(1, x[2], x[1]) for x in (found, expected)]
    torch.testing.assert_close(*dense, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("normalised", [False, True])
def test_plain_gates_are_a_softmax(normalised: bool) -> None:
    model = MoEModel(experts=5, top_k=3, norm_topk_prob=normalised, scaling=2.5)
    logits = seeded(40, 5)
    choice, top = routing.choose(model, logits), logits.topk(4, dim=1)
    assert choice.experts.sort(1).values.equal(top.indices[:, :3].sort(1).values)
    torch.testing.assert_close(choice.margin, top.values[:, 2] - top.values[:, 3])
    gates, all_shares = routing.gates(model, logits, choice.experts), logits.softmax(1).gather(1, choice.experts)
    due = all_shares / all_shares.sum(1, keepdim=True) if normalised else all_shares
    torch.testing.assert_close(gates, 2.5 * due)


def test_groups_are_judged_by_what_they_must_give() -> None:
    """With softmax before top-k: two of the best of [0.4, 0.0], [0.3, 0.25], [0.05, 0.0] make the second group win."""
    model = MoEModel(experts=6, top_k=2, expert_groups=3, group_topk=1)
    shares = torch.tensor([[0.399999, 1e-6, 0.3, 0.25, 0.049999, 1e-6]], dtype=torch.float64)
    choice = routing.choose(model, shares.log())
    assert choice.experts.tolist() == [[2, 3]]
    assert choice.margin.item() == pytest.approx((0.55 - 0.4) / 0.55, abs=1e-4)


def test_a_bias_chooses_and_weighs_nothing() -> None:
    model = MoEModel(experts=3, top_k=1, score="sigmoid", expert_bias=0.5)
    logits, bias = torch.tensor([[0.0, -1.0, -2.0]], dtype=torch.float64), torch.tensor([0.0, 0.0, 0.5]).double()
    choice = routing.choose(model, logits, bias)
    assert choice.experts.tolist() == [[2]]
    assert routing.gates(model, logits, choice.experts).item() == pytest.approx(torch.sigmoid(logits)[0, 2].item())
    assert routing.counted(model, logits).experts.tolist() == [[0]]


def test_two_sigmoids_near_one_are_a_tie_and_two_near_zero_are_not() -> None:
    model = MoEModel(experts=2, score="sigmoid")
    logits = torch.tensor([[40.0, 41.0], [-40.0, -41.0]], dtype=torch.float64)
    assert routing.choose(model, logits).margin.tolist() == pytest.approx([0.0, 1 - torch.e**-1], abs=1e-12)


@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (6, 3), (8, 4), (5, 2), (12, 12)])
def test_groupings_can_all_give_top_k_experts(experts: int, top_k: int) -> None:
    found = groupings(experts, top_k)
    assert found and (experts, top_k) in found
    for groups, limit in found:
        assert experts % groups == 0 and 1 <= top_k // limit <= experts // groups and top_k <= limit * experts // groups


def test_biases_move_towards_the_mean_load() -> None:
    """Loads 3, 1 and 2 of 6: down, up, and none for the one at the mean; padding counts for nothing."""
    model = MoEModel(experts=3, score="sigmoid", expert_bias=0.5, bias_rate=0.25)
    experts = torch.tensor([[0], [0], [0], [1], [2], [2], [1]])
    seen = reference_model.Routing(torch.zeros(7, 3), experts)
    padding = torch.tensor([[False] * 6 + [True]])
    one = reference_model.Pass(torch.zeros(1, 7, 3), (seen,), padding)
    moved = update.moved_biases(model, {"bias": torch.zeros(3)}, [one])
    assert moved["bias"].tolist() == [-0.25, 0.25, 0.0]


def test_an_expert_keeps_the_greatest_gates_of_each_shard() -> None:
    """Room for ceil(3 * 1 / 2 * 1.0) = 2 of a shard of three; the margin is that of the nearest drop, as a share."""
    model = MoEModel(experts=2, capacity=1.0)
    gates = torch.tensor([[0.9], [0.6], [0.7], [0.9], [0.8], [0.5]]).double()
    experts = torch.tensor([[0], [0], [0], [1], [0], [0]])
    gone, margin = routing.dropped(model, gates, experts, [torch.arange(3), torch.arange(3, 6)])
    assert gone.flatten().tolist() == [False, True, False, False, False, False]
    assert margin == pytest.approx((0.7 - 0.6) / 0.7)


def test_an_expert_keeps_the_first_copies_of_each_shard() -> None:
    """In the shard's order, whatever the gates, and no drop is a close one."""
    model = MoEModel(experts=2, capacity=1.0, drops="position")
    gates = torch.tensor([[0.1], [0.6], [0.7], [0.9], [0.8], [0.5]]).double()
    experts = torch.tensor([[0], [0], [0], [1], [0], [0]])
    gone, margin = routing.dropped(model, gates, experts, [torch.tensor([2, 0, 1]), torch.tensor([3, 4, 5])])
    assert gone.flatten().tolist() == [False, True, False, False, False, False]
    assert margin == float("inf")


def test_shards_are_in_the_order_of_megatron() -> None:
    """[S, B]: all rows of a position, then the next; TP cuts positions."""
    assert batching.shards(Layout(world=2, tp=2), 2, 4) == [[0, 4, 1, 5], [2, 6, 3, 7]]


def test_sinkhorn_sends_a_token_where_others_do_not_want_to_go() -> None:
    """All prefer expert 0, the last least of all: it goes to expert 1; by itself it would not, and has its own gate."""
    model = MoEModel(experts=2, sinkhorn=True)
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0], [1.0, 0.0]]).double()
    assert routing.balanced(model, logits, [torch.arange(3)]).experts.flatten().tolist() == [0, 0, 1]
    apart = routing.balanced(model, logits, [torch.tensor([0, 1]), torch.tensor([2])])
    assert routing.choose(model, logits).experts.flatten().tolist() == [0, 0, 0]
    assert apart.margin.shape == (3,) and (apart.margin[:2] < 1e-6).all()  # equal tokens: a tie
    gates = routing.gates(model, logits, torch.tensor([[0], [0], [1]]))
    assert gates.flatten().tolist() == pytest.approx([1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-3)), 0.5])


def test_sinkhorn_scores_have_equal_rows_and_nearly_equal_columns() -> None:
    scores, stop = routing._doubly_stochastic(3 * seeded(12, 5))
    assert scores.sum(0).tolist() == pytest.approx([1 / 5] * 5, rel=1e-6)
    assert scores.sum(1).tolist() == pytest.approx([1 / 12] * 12, rel=1e-2)
    assert 0 < stop < 1


def test_loaded_biases_are_exact_in_float32() -> None:
    model = MoEModel(layers=3, dense=(1,), dense_ffn=2, experts=5, score="sigmoid", expert_bias=0.125)
    biases = weights.expert_biases(model, "actor", 7)
    assert [weights.layer_of(name) for name in biases] == [0, 2]
    assert all(bias.float().double().equal(bias) and bias.any() for bias in biases.values())
