"""The reference's formulas against hand numbers, plain Python loops, finite differences and torch.optim."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from toy_models import batching, families, reference, reference_model, weights
from toy_models import reference_update as update
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
BATCH = Batch(rows=4, prompt=3, response=4, raggedness="ragged", holes=True)


class Rollout: ...


class Update: ...


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make(**changes: Any) -> SimpleNamespace:
    fields = {
        "layout": Layout(), "model": MODELS["qwen3moe"], "batch": BATCH, "ppo": PPO(kl_coef=0.1), "seed": 3,
        "switches": Switches(), "program": (Rollout(), Update()), "precision": "float64",
    }  # fmt: skip
    return SimpleNamespace(**(fields | changes))


# Advantages


def test_gae_skips_holes() -> None:
    nothing = 77.0  # must not be read where the mask is 0
    rewards = torch.tensor([[1.0, nothing, 2.0, 0.0]], dtype=torch.float64)
    values = torch.tensor([[0.5, nothing, 0.25, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 0]])
    advantages, returns = reference.advantages_and_returns(PPO(gamma=0.5, lam=0.5), rewards, values, mask)
    last = 2 - 0.25
    first = (1 + 0.5 * 0.25 - 0.5) + 0.5 * 0.5 * last
    assert advantages.tolist() == [[first, 0, last, 0]]
    assert returns.tolist() == [[first + 0.5, 0, 2.0, 0]]


def test_whitening_is_global_and_masked_with_the_population_variance() -> None:
    advantages = torch.tensor([[1.0, 9.0], [3.0, 5.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 0], [1, 1]])
    scale = math.sqrt(8 / 3 + 1e-8)
    expected = torch.tensor([[-2 / scale, 0], [0, 2 / scale]], dtype=torch.float64)
    torch.testing.assert_close(reference.whitened(advantages, mask), expected, rtol=1e-15, atol=0)


def test_rewards_carry_the_kl_term_on_the_mask_and_the_score_at_the_last_token() -> None:
    seen = reference.run(make(program=(Rollout(),)))["tensors"]
    for row, mask in enumerate(seen["0/mask"].tolist()):
        last = max(j for j, kept in enumerate(mask) if kept)
        for j, kept in enumerate(mask):
            kl = (seen["0/old_logp"] - seen["0/ref_logp"])[row, j].item()
            expected = kept * -0.1 * kl + (j == last) * seen["0/scores"][row].item()
            assert seen["0/rewards"][row, j].item() == pytest.approx(expected, rel=1e-15)


# Losses: the page's formulas once more, with Python numbers, and their gradients by finite differences


def plain_balance(model: MoEModel, one: reference_model.Pass) -> float:
    """Both balance losses of one micro-batch from its router logits, token by token."""
    total = 0.0
    for layer in one.routing:
        logits, chosen = layer.logits.tolist(), layer.logits.topk(model.top_k, dim=1).indices.tolist()
        exps = [[math.exp(x) for x in token] for token in logits]
        scores = exps if model.score == "softmax" else [[x / (1 + x) for x in token] for token in exps]
        for e in range(model.experts):
            share = sum(token[e] / sum(token) for token in scores)
            count = sum(e in experts for experts in chosen)
            total += model.aux_loss * model.experts / (model.top_k * len(exps) ** 2) * share * count
        total += model.z_loss * sum(math.log(sum(token)) ** 2 for token in exps) / len(exps)
    return total


def plain_actor(ppo: PPO, seen: dict, row: int, j: int, z: torch.Tensor, token: int) -> float:
    logp = torch.log_softmax(z / ppo.temperature, -1)
    ratio = math.exp(logp[token].item() - seen["0/old_logp"][row, j].item())
    a = seen["0/advantages"][row, j].item()
    clipped = min(max(ratio, 1 - ppo.clip_eps), 1 + ppo.clip_eps)
    entropy = -sum(math.exp(x) * x for x in logp.tolist())
    return max(-a * ratio, -a * clipped) - ppo.entropy_coef * entropy


def plain_critic(ppo: PPO, seen: dict, row: int, j: int, v: torch.Tensor, token: int) -> float:
    old, goal = seen["0/values"][row, j].item(), seen["0/returns"][row, j].item()
    near = old + min(max(v.item() - old, -ppo.value_clip), ppo.value_clip)
    return 0.5 * max((v.item() - goal) ** 2, (near - goal) ** 2)


@torch.no_grad()
def plain_loss(case: Any, seen: dict, role: str, mini: int, state: dict[str, torch.Tensor]) -> float:
    """The whole loss of one mini-batch, micro-batch by micro-batch, token by token."""
    term = plain_actor if role == "actor" else plain_critic
    lengths = batching.prompt_lengths(case.batch, case.seed)
    micros = [micro for share in batching.partition(case.layout, case.batch, case.ppo).micro[mini] for micro in share]
    terms, balance = [], 0.0
    for micro in micros:
        one = reference_model.forward(case.model, state, seen["0/tokens"][list(micro)])
        balance += plain_balance(case.model, one) / len(micros)
        for k, row in enumerate(micro):
            for j in seen["0/mask"][row].nonzero().flatten().tolist():
                at, token = lengths[row] + j - 1, int(seen["0/tokens"][row, lengths[row] + j])
                terms.append(term(case.ppo, seen, row, j, one.output[k, at], token))
    return sum(terms) / len(terms) + balance


def slope(case: Any, seen: dict, role: str, state: dict[str, torch.Tensor], name: str, at: tuple) -> float:
    step, losses = 1e-5, []
    for sign in (1, -1):
        moved = state[name].clone()
        moved[at] += sign * step
        losses.append(plain_loss(case, seen, role, 1, state | {name: moved}))
    return (losses[0] - losses[1]) / (2 * step)


NAMES = (
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.embed_tokens.weight",
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_the_gradient_of_a_later_step_is_that_of_the_plain_loss(family: str, role: str) -> None:
    changes = {"aux_loss": 0.3, "z_loss": 0.05}
    model = MoEModel(**{**vars(MODELS[family]), **changes})
    ppo = PPO(mini_batches=2, lr=0.3, critic_lr=0.3, entropy_coef=0.1, temperature=1.5, value_clip=0.05)
    case = make(model=model, ppo=ppo, layout=Layout(world=2))
    seen = reference.run(case)["tensors"]
    prefix = f"0/0/{role}/weight/"
    trained = {key.removeprefix(prefix): w for key, w in seen.items() if key.startswith(prefix)}
    with keep_float64():
        state = families.to_hf(model, trained)
        for name in NAMES:
            gradient = seen[f"0/1/{role}/grad/{name}"]
            at = divmod(int(gradient.abs().argmax()), gradient.shape[1])
            theirs = name.replace(".mlp.gate.", ".mlp.router.") if family == "gptoss" else name
            expected = slope(case, seen, role, state, theirs, at)
            assert gradient[at].item() == pytest.approx(expected, rel=1e-6), name


def test_balance_losses_of_a_router_that_prefers_nobody() -> None:
    model = MoEModel(experts=4, top_k=2, aux_loss=0.5, z_loss=0.25)
    logits, experts = torch.zeros(6, 4, dtype=torch.float64), torch.tensor([[0, 1]] * 6)
    one = reference_model.Pass(torch.zeros(1, 6, dtype=torch.float64), (reference_model.Routing(logits, experts),))
    expected = 0.5 * 1 + 0.25 * math.log(4) ** 2
    assert update.balance_loss(model, Layout(), [one, one]).item() == pytest.approx(expected, rel=1e-15)


def test_value_and_policy_losses_take_the_worse_branch() -> None:
    ppo, as_tensor = PPO(clip_eps=0.5, value_clip=0.5), lambda *x: torch.tensor(x, dtype=torch.float64)
    policy = update.clipped_policy_loss(ppo, as_tensor(2, 2, 0.25, 0.25, 1), as_tensor(1, -1, 1, -1, 2))
    assert policy.tolist() == [-1.5, 2, -0.25, 0.5, -2]
    zero, goal, v = as_tensor(0, 0, 0), as_tensor(1, -1, 1), as_tensor(2, 1, 0.25)
    assert update.clipped_value_loss(ppo, v, zero, goal).tolist() == [0.5, 2, 0.5 * 0.75**2]
    assert update.value_branch_gap(ppo, v, zero, goal) == 0.5


# Optimizers


@pytest.mark.parametrize(
    "ppo",
    [
        PPO(optimizer="adam", weight_decay=0.1, eps=1e-6),
        PPO(optimizer="adam", weight_decay=0.1, eps=1e-6, coupled_decay=True, embedding_lr=0.2, qk_decay=True),
        PPO(weight_decay=0.1, embedding_lr=0.2),
        PPO(momentum=0.9, weight_decay=0.1),
    ],
    ids=["adamw", "adam", "sgd", "momentum"],
)
def test_optimizers_do_what_torch_optim_does(ppo: PPO) -> None:
    names = {"a.weight": (3, 2), "a.q_norm.weight": (4,), "q_proj.bias": (2,), "lm_head.weight": (2, 2)}
    generator = torch.Generator().manual_seed(0)
    drawn = {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in names.items()}
    ours, theirs = update.Trained(drawn, lr=0.05), {n: w.clone().requires_grad_() for n, w in drawn.items()}
    groups = [
        {
            "params": [w],
            "weight_decay": 0.1 if w.dim() > 1 or (ppo.qk_decay and "q_norm" in name) else 0.0,
            "lr": ppo.embedding_lr if ppo.embedding_lr and name == "lm_head.weight" else 0.05,
        }
        for name, w in theirs.items()
    ]
    if ppo.optimizer == "adam":
        kind = torch.optim.Adam if ppo.coupled_decay else torch.optim.AdamW
        optimizer: Any = kind(groups, lr=0.05, betas=(ppo.beta1, ppo.beta2), eps=ppo.eps)
    else:
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=ppo.momentum)
    for _ in range(3):
        grads = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in names.items()}
        for name, w in theirs.items():
            w.grad = grads[name].clone()
        optimizer.step()
        update.step(ppo, ours, grads)
    for kind, moments in ours.moments.items():
        torch.testing.assert_close(moments, {n: optimizer.state[w][kind] for n, w in theirs.items()})
    expected = {name: w.detach() for name, w in theirs.items()}
    torch.testing.assert_close(ours.weights, expected, rtol=1e-13, atol=1e-15)


def test_clipping_divides_by_the_norm_over_all_gradients() -> None:
    ppo = PPO(mini_batches=2, max_norm=0.01, lr=1.0)
    seen = reference.run(make(ppo=ppo))
    prefix = "0/0/actor/grad/"
    grads = {k.removeprefix(prefix): g for k, g in seen["tensors"].items() if k.startswith(prefix)}
    norm = math.sqrt(sum((g**2).sum().item() for g in grads.values()))
    assert seen["numbers"]["0/0/actor_norm"] == pytest.approx(norm, rel=1e-14)
    before = weights.canonical(MODELS["qwen3moe"], "actor", seed=3)
    for name, grad in grads.items():
        after = before[name] - grad * 0.01 / (norm + 1e-6)
        torch.testing.assert_close(seen["tensors"][f"0/0/actor/weight/{name}"], after, rtol=1e-14, atol=1e-15)
    assert update.clip_coefficient(5.0, 2.0) == update.clip_coefficient(0.0, 2.0) == 1


def test_tied_embeddings_get_the_gradient_of_both_uses() -> None:
    case = make(model=MODELS["mixtral"], program=(Rollout(),))
    state = reference_model.initial(case.model, "actor", 0, "float64")
    assert "lm_head.weight" not in state
    tokens = torch.tensor([[1, 2, 3]])
    apart = state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    both = []
    for weights_ in (state, apart):
        leaves = {name: w.clone().requires_grad_() for name, w in weights_.items()}
        with keep_float64():
            output = reference_model.forward(case.model, leaves, tokens).output
            both.append(update.gradients(output.logsumexp(-1).sum(), leaves))
    tied, split = both
    total = split["model.embed_tokens.weight"] + split["lm_head.weight"]
    torch.testing.assert_close(tied["model.embed_tokens.weight"], total, rtol=1e-14, atol=1e-14)
