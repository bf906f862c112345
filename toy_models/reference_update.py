"""The reference's losses and optimizers, written from `docs/ppo.md`: plain formulas on float64 tensors.

Knows no model, no layout, no megatron, and uses no torch.optim. Shapes: R rows, J response positions,
N tokens of one micro-batch, E experts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from toy_models import batching
from toy_models.families import Tensors
from toy_models.reference_model import Pass, Routing
from toy_models.routing import shares
from toy_models.spec import PPO, Layout, MoEModel

OF_TOKENS = ("model.embed_tokens.weight", "lm_head.weight")  # have a rate of their own, where one is asked for


@dataclass
class Trained:
    """One model in training: weights under transformers' names, optimizer state by kind, steps taken."""

    weights: Tensors
    lr: float
    steps: int = 0
    moments: dict[str, Tensors] = field(default_factory=dict)
    biases: Tensors = field(default_factory=dict)  # of the routers, by name: moved by the load, not by gradients


def clipped_policy_loss(ppo: PPO, ratio: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Elementwise max of the plain and the clipped surrogate, to be minimised."""
    clipped = ratio.clamp(1 - ppo.clip_eps, 1 + ppo.clip_eps)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def clipped_value_loss(ppo: PPO, v: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
    """Elementwise half of the greater squared error, of the value and of the value kept near the old one."""
    near = old_values + (v - old_values).clamp(-ppo.value_clip, ppo.value_clip)
    return 0.5 * torch.maximum((v - returns) ** 2, (near - returns) ** 2)


def value_branch_gap(ppo: PPO, v: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor) -> float:
    """How far the max of the value loss is from changing sides; inf where nothing is clipped."""
    near = old_values + (v - old_values).clamp(-ppo.value_clip, ppo.value_clip)
    gaps = ((v - returns).abs() - (near - returns).abs()).abs()
    return smallest(gaps[(v - old_values).abs() > ppo.value_clip])


def smallest(numbers: torch.Tensor) -> float:
    return numbers.min().item() if numbers.numel() else float("inf")


def _load_loss(model: MoEModel, shares_NE: torch.Tensor, counts: Sequence[float], tokens: float) -> torch.Tensor:
    """The sum over experts of the share and the load of each, so that an even load of so many tokens gives 1."""
    total = shares_NE.new_zeros(())
    for expert, count in enumerate(counts):
        total = total + shares_NE[:, expert].sum() * count
    return total * model.experts / (model.top_k * tokens**2)


def _counts(model: MoEModel, routing: Routing, valid_N: torch.Tensor) -> list[int]:
    """How many of the valid tokens have each expert among those of the greatest logits."""
    experts_NK = routing.experts if routing.counted is None else routing.counted.experts
    return [int((experts_NK[valid_N] == expert).sum()) for expert in range(model.experts)]


def _aux_loss(model: MoEModel, routing: Routing, valid_N: torch.Tensor) -> torch.Tensor:
    """Load balancing over the valid tokens of one micro-batch and one layer."""
    shares_NE = shares(model, routing.logits)[valid_N]
    return _load_loss(model, shares_NE, _counts(model, routing, valid_N), shares_NE.shape[0])


def _seq_aux_loss(model: MoEModel, routing: Routing, valid_N: torch.Tensor, rows: int) -> torch.Tensor:
    """The same row by row, the mean over rows; of every row so many tokens as rows have on average."""
    tokens, total = int(valid_N.sum()) / rows, routing.logits.new_zeros(())
    for row_N in torch.arange(len(valid_N)).chunk(rows):
        mine = torch.zeros_like(valid_N)
        mine[row_N] = valid_N[row_N]
        shares_NE = shares(model, routing.logits)[mine]
        total = total + _load_loss(model, shares_NE, _counts(model, routing, mine), tokens)
    return total / rows


def _global_aux_loss(
    model: MoEModel, passes: Sequence[Pass], places: Sequence[Sequence[int]], layer: int
) -> torch.Tensor:
    """The sum over micro-batches: `places[d]` names those of DP rank d, in order.

    The load is that of all DP ranks, the mean over their micro-batches so far.
    """
    total, so_far = passes[0].output.new_zeros(()), [0.0] * model.experts
    for number, places_D in enumerate(zip(*places, strict=True), 1):
        here = [(passes[at].routing[layer], _valid(passes[at])) for at in places_D]
        for routing, valid_N in here:
            so_far = [a + b for a, b in zip(so_far, _counts(model, routing, valid_N), strict=True)]
        tokens = sum(int(valid_N.sum()) for _, valid_N in here)
        for routing, valid_N in here:
            shares_NE = shares(model, routing.logits)[valid_N]
            total = total + _load_loss(model, shares_NE, [count / number for count in so_far], tokens)
    return total


def _valid(one: Pass) -> torch.Tensor:
    """Which tokens [N] balance losses count."""
    rows, width = one.output.shape[:2]
    return torch.ones(rows * width, dtype=torch.bool) if one.padding is None else ~one.padding.flatten()


def _z_loss(routing: Routing, valid_N: torch.Tensor, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean over shards of positions of the mean over the valid tokens of each; 0 where a shard has none."""
    squares_N = routing.logits.logsumexp(dim=-1) ** 2
    parts = [squares_N[shard[valid_N[shard]]] for shard in shards]
    return sum(part.sum() / max(1, part.numel()) for part in parts) / len(parts)  # type: ignore[return-value]


def _shards(layout: Layout, rows: int, width: int) -> list[torch.Tensor]:
    """The tokens (indices into [rows * width]) that each rank of TP x CP holds, under sequence parallelism."""
    return [torch.tensor(held) for held in batching.shards(layout, rows, width)]


def balance_loss(model: MoEModel, layout: Layout, micro_batches: Sequence[Pass]) -> torch.Tensor:
    """Mean over the micro-batches of the sum over the layers of all balance losses, with their factors.

    The micro-batches are those of the first DP rank, then those of the second, and so on.
    """
    total = micro_batches[0].output.new_zeros(())
    for one in micro_batches if model.balance else ():
        rows, width = one.output.shape[:2]
        valid_N, shards = _valid(one), _shards(layout, rows, width)
        for layer in one.routing:
            total = total + model.aux_loss * _aux_loss(model, layer, valid_N)
            total = total + model.seq_aux_loss * _seq_aux_loss(model, layer, valid_N, rows)
            total = total + model.z_loss * _z_loss(layer, valid_N, shards)
    if model.global_aux_loss:
        places = torch.arange(len(micro_batches)).chunk(layout.dp)
        for at in range(len(micro_batches[0].routing)):
            losses = _global_aux_loss(model, micro_batches, [some.tolist() for some in places], at)
            total = total + model.global_aux_loss * losses
    return total / len(micro_batches)


def moved_biases(model: MoEModel, biases: Tensors, passes: Sequence[Pass]) -> Tensors:
    """Each bias one rate up where its expert got fewer tokens than the mean of the step, one rate down where more."""
    moved = {}
    for at, (name, bias) in enumerate(biases.items()):
        loads = _loads(model, passes, at)
        signs = [(sum(loads) > load * model.experts) - (sum(loads) < load * model.experts) for load in loads]
        moved[name] = bias + model.bias_rate * torch.tensor(signs, dtype=bias.dtype)
    return moved


def _loads(model: MoEModel, passes: Sequence[Pass], at: int) -> list[int]:
    """How many valid tokens of all passes went to each expert of one layer."""
    loads = [0] * model.experts
    for one in passes:
        kept_NK = _valid(one)[:, None].expand_as(one.routing[at].experts)
        if (gone_NK := one.routing[at].dropped) is not None:
            kept_NK = kept_NK & ~gone_NK
        for expert in one.routing[at].experts[kept_NK].tolist():
            loads[expert] += 1
    return loads


def gradients(loss: torch.Tensor, leaves: Tensors) -> Tensors:
    """d loss / d leaf by name; zero for a leaf that the loss does not depend on."""
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in pairs}


def norm(tensors: Iterable[torch.Tensor]) -> float:
    """L2 norm over all of them together."""
    return sum((x**2).sum() for x in tensors).sqrt().item()  # type: ignore[union-attr]


def clip_coefficient(max_norm: float, total: float) -> float:
    return min(1.0, max_norm / (total + 1e-6)) if max_norm > 0 else 1.0


def step(ppo: PPO, model: Trained, grads: Tensors) -> None:
    """One optimizer step on gradients that are already clipped; every tensor is replaced, none changed."""
    model.steps += 1
    formula = _adam if ppo.optimizer == "adam" else _sgd
    model.weights = model.weights | {name: formula(ppo, model, name, grad) for name, grad in grads.items()}


def _decay(ppo: PPO, name: str, weight: torch.Tensor) -> float:
    if ppo.qk_decay and name.endswith((".q_norm.weight", ".k_norm.weight")):
        return ppo.weight_decay
    return 0.0 if weight.dim() == 1 or name.endswith("bias") else ppo.weight_decay


def _rate(ppo: PPO, model: Trained, name: str) -> float:
    return ppo.embedding_lr if ppo.embedding_lr and name in OF_TOKENS else model.lr


def _running(model: Trained, kind: str, name: str, new: torch.Tensor) -> torch.Tensor:
    model.moments.setdefault(kind, {})[name] = new
    return new


def _adam(ppo: PPO, model: Trained, name: str, g: torch.Tensor) -> torch.Tensor:
    w, t, zero, lr = model.weights[name], model.steps, torch.zeros_like(g), _rate(ppo, model, name)
    decay = _decay(ppo, name, w)
    g = g + decay * w if ppo.coupled_decay else g
    before = {kind: model.moments.get(kind, {}).get(name, zero) for kind in ("exp_avg", "exp_avg_sq")}
    m = _running(model, "exp_avg", name, ppo.beta1 * before["exp_avg"] + (1 - ppo.beta1) * g)
    v = _running(model, "exp_avg_sq", name, ppo.beta2 * before["exp_avg_sq"] + (1 - ppo.beta2) * g**2)
    w = w if ppo.coupled_decay else w * (1 - lr * decay)
    m_hat, v_hat = m / (1 - ppo.beta1**t), v / (1 - ppo.beta2**t)
    return w - lr * m_hat / (v_hat.sqrt() + ppo.eps)


def _sgd(ppo: PPO, model: Trained, name: str, g: torch.Tensor) -> torch.Tensor:
    w = model.weights[name]
    b = g + _decay(ppo, name, w) * w
    if ppo.momentum > 0:
        if model.steps > 1:
            b = ppo.momentum * model.moments["momentum_buffer"][name] + b
        _running(model, "momentum_buffer", name, b)
    return w - _rate(ppo, model, name) * b


def softmax_rounding(ppo: PPO, logp_KV: torch.Tensor, advantages_K: torch.Tensor) -> torch.Tensor:
    """What, times a unit in the last place, is the rounding of a log-softmax's backward pass, as a term of a loss.

    It takes p·Σg from g, numbers of the size of the loss's own factors. Where a policy is all but certain their
    difference is far smaller, and the rounding is the same under any small change of the weights.
    """
    size = (ppo.entropy_coef + advantages_K.abs().max()) / len(advantages_K)
    signs = 1 - 2 * (torch.arange(logp_KV.shape[-1]) % 2)
    return size * (signs * logp_KV).sum()
