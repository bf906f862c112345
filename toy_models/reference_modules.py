"""Modules of the reference where a model departs from its family: router, experts, MLPs, attention (`docs/ppo.md`).

Plain loops and formulas, in the place and under the parameter names of transformers' own. Knows no megatron, no layout,
no PPO. Shapes: B rows, W width, N = B*W tokens, E experts, K chosen per token, H hidden, F width of an MLP, d of a
head.
"""

from typing import Any

import torch

from toy_models import families, routing
from toy_models.spec import MoEModel


class Router(torch.nn.Module):
    """The router of `docs/ppo.md` in the place of a family's own, where that knows less."""

    def __init__(self, model: MoEModel) -> None:
        super().__init__()
        self.model = model
        self.weight = torch.nn.Parameter(torch.empty(model.experts, model.hidden))
        self.bias = torch.nn.Parameter(torch.empty(model.experts)) if model.biases else None
        self.shards: list[torch.Tensor] = []  # of the forward pass to come, where tokens are routed together
        self.drops = torch.zeros(0, 0), float("inf")

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = hidden.reshape(-1, self.model.hidden) @ self.weight.T
        logits = logits if self.bias is None else logits + self.bias
        together = self.model.sinkhorn and len(self.shards) > 0  # in training only
        self.choice = (
            routing.balanced(self.model, logits, self.shards)
            if together
            else routing.choose(self.model, logits, choosing_bias(self))
        )
        experts = self.choice.experts
        gates = routing.gates(self.model, logits, experts)
        if self.model.capacity:
            self.drops = routing.dropped(self.model, gates, experts, self.shards)
            gates = gates.masked_fill(self.drops[0], 0.0)
        return logits, gates, experts


def choosing_bias(gate: torch.nn.Module) -> torch.Tensor | None:
    """What is added to the scores by which experts are chosen [E], and to no gate."""
    return getattr(gate, "e_score_correction_bias", None)


def _bent(kind: str, x: torch.Tensor) -> torch.Tensor:
    if kind == "silu":
        return x * x.sigmoid()
    if kind == "gelu":
        return x * (1 + torch.erf(x / 2**0.5)) / 2
    if kind == "quick_gelu":
        return x * (1.702 * x).sigmoid()
    positive = torch.where(x > 0, x, 0.0)
    return positive**2 if kind == "squared_relu" else positive


def activated(model: MoEModel, fc1: torch.Tensor) -> torch.Tensor:
    """What an MLP makes of its first projection [..., 2F], the gate's half first; [..., F] where it does not gate."""
    if not model.gated:
        return _bent(model.activation, fc1)
    gate, up = fc1.chunk(2, dim=-1)
    if model.clamp:
        gate, up = gate.clamp(max=model.clamp), up.clamp(-model.clamp, model.clamp)
    return _bent(model.activation, gate) * (up + model.glu_offset)


class MLP(torch.nn.Module):
    """One plain MLP of a width, of dense layers and as the shared expert."""

    def __init__(self, model: MoEModel, width: int) -> None:
        super().__init__()
        self.model = model
        if model.gated:
            self.gate_proj = torch.nn.Linear(model.hidden, width, bias=model.biases)
        self.up_proj = torch.nn.Linear(model.hidden, width, bias=model.biases)
        self.down_proj = torch.nn.Linear(width, model.hidden, bias=model.biases)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(hidden)
        fc1 = torch.cat([self.gate_proj(hidden), up], dim=-1) if self.model.gated else up
        return self.down_proj(activated(self.model, fc1))


class Experts(torch.nn.Module):
    """The experts of one layer: the sum over a token's experts of what each makes of it, times its gate."""

    def __init__(self, model: MoEModel) -> None:
        super().__init__()
        self.model, rows = model, model.ffn * (1 + model.gated)
        self.gate_up_proj = torch.nn.Parameter(torch.empty(model.experts, rows, model.hidden))
        self.down_proj = torch.nn.Parameter(torch.empty(model.experts, model.hidden, model.ffn))
        if model.biases:
            self.gate_up_proj_bias = torch.nn.Parameter(torch.empty(model.experts, rows))
            self.down_proj_bias = torch.nn.Parameter(torch.empty(model.experts, model.hidden))

    def forward(self, hidden: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(hidden)
        for expert in range(self.model.experts):
            tokens, places = (experts == expert).nonzero(as_tuple=True)
            made = self._one(expert, hidden[tokens]) * gates[tokens, places, None]
            total = total.index_add(0, tokens, made)
        return total

    def _one(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        fc1 = x @ self.gate_up_proj[expert].T
        fc1 = fc1 + self.gate_up_proj_bias[expert] if self.model.biases else fc1
        fc2 = activated(self.model, fc1) @ self.down_proj[expert].T
        return fc2 + self.down_proj_bias[expert] if self.model.biases else fc2


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.empty(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


class Attention(torch.nn.Module):
    """Causal attention with rotary embeddings, and what of norms, biases, gates and sinks the model asks for."""

    def __init__(self, model: MoEModel) -> None:
        super().__init__()
        self.model, queries, keys = model, model.heads * model.head_dim, model.kv_heads * model.head_dim
        for x, size in {"q": queries, "k": keys, "v": keys}.items():
            setattr(self, f"{x}_proj", torch.nn.Linear(model.hidden, size, bias=model.has_qkv_bias))
        self.core, self.o_proj = torch.nn.Identity(), torch.nn.Linear(queries, model.hidden, bias=model.biases)
        if model.output_gate:
            self.g_proj = torch.nn.Linear(model.hidden, queries, bias=model.has_qkv_bias)
        if model.has_qk_norm:
            eps = families.rms_norm_eps(model.family)
            self.q_norm, self.k_norm = RMSNorm(model.head_dim, eps), RMSNorm(model.head_dim, eps)
        if model.sinks == "learnable":
            self.sinks = torch.nn.Parameter(torch.empty(model.heads))

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Any, **_: Any) -> tuple[torch.Tensor, None]:
        q, k, v = (proj(hidden_states).unflatten(-1, (-1, self.model.head_dim)) for proj in self._projections())
        if self.model.has_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, W, d]
        if self.model.family == "gptoss":  # which hands on the angles of half the features
            position_embeddings = tuple(torch.cat([part, part], dim=-1) for part in position_embeddings)
        seen = self._attended(_turned(q, *position_embeddings), _turned(k, *position_embeddings), v)
        mixed = self.core(seen.transpose(1, 2).flatten(2))
        mixed = mixed * self.g_proj(hidden_states).sigmoid() if self.model.output_gate else mixed
        return self.o_proj(mixed), None

    def _projections(self) -> tuple[Any, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def _attended(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """A sink is one more key of a fixed score, 0 where it is not learned, and of no value."""
        several = self.model.heads // self.model.kv_heads
        k, v = k.repeat_interleave(several, dim=1), v.repeat_interleave(several, dim=1)
        scores = q @ k.transpose(2, 3) / self.model.head_dim**0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
        if self.model.sinks == "vanilla":
            return scores.softmax(-1) @ v
        sinks = self.sinks if self.model.sinks == "learnable" else scores.new_zeros(self.model.heads)
        more = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, more], dim=-1).softmax(-1)[..., :-1] @ v


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embeddings: features i and i + half of those that turn are a pair; the rest of a head is left alone."""
    size = cos.shape[-1]
    turning, rest = x[..., :size], x[..., size:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return torch.cat([turned, rest], dim=-1)
