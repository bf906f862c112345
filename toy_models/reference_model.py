"""The reference's four models: transformers' backbone, one matmul as head, float64, weights as data.

Knows no megatron, no layout, no PPO. A model is a dict of weights under transformers' names
(`families.to_hf`); the module is only its shape, built without storage and kept for the models used last.

Shapes: B rows, W width, N = B*W tokens, E experts, K chosen per token, V vocabulary.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.func import functional_call
from transformers import AutoModel, PreTrainedModel

from toy_models import families, weights
from toy_models.batching import uniform
from toy_models.families import Tensors
from toy_models.spec import MoEModel


class Routing(NamedTuple):
    """What one layer's router did: `logits` [N, E] and the chosen `experts` [N, K]."""

    logits: torch.Tensor
    experts: torch.Tensor


class Pass(NamedTuple):
    """One forward pass: token logits [B, W, V] or values [B, W], and the routing of each layer that has experts."""

    output: torch.Tensor
    routing: tuple[Routing, ...]
    padding: torch.Tensor | None = None  # True [B, W] where balance losses leave tokens out


@lru_cache(maxsize=8)
def _backbone(model: MoEModel) -> tuple[PreTrainedModel, list[Routing]]:
    """The family's *Model without weights, and the list to which its routers add at every forward."""
    with torch.device("meta"):
        module = AutoModel.from_config(families.hf_config(model)).eval()
    frequencies = families.inv_freq(families.rope_theta(model.family), model.head_dim)
    module.rotary_emb.inv_freq = module.rotary_emb.original_inv_freq = frequencies
    seen: list[Routing] = []
    for layer in (module.layers[i] for i in model.moe):
        # All three families return (logits, gates, experts); the logits are a plain product with gate.weight.
        layer.mlp.gate.register_forward_hook(lambda _, __, out: seen.append(Routing(out[0], out[2])))
    return module, seen


def head(state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The last matrix: [1, H] for a scalar, [V, H] for tokens; the embedding where tied."""
    for name in ("score.weight", "lm_head.weight"):
        if name in state:
            return state[name]
    return state["model.embed_tokens.weight"]


def forward(model: MoEModel, state: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> Pass:
    """Run `tokens` [B, W] through the model; causal attention, padding neither masked nor left out."""
    module, seen = _backbone(model)
    seen.clear()
    body = {name.removeprefix("model."): w for name, w in state.items() if name.startswith("model.")}
    hidden = functional_call(module, body, kwargs={"input_ids": tokens, "use_cache": False}).last_hidden_state
    output = hidden @ head(state).T
    routing = tuple(seen)
    seen.clear()
    return Pass(output.squeeze(-1) if "score.weight" in state else output, routing)


def _nudged(tensor: torch.Tensor, nudge: float, *key: int | str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(uniform("nudge", *key) * 2**31))
    signs = 2.0 * torch.randint(2, tensor.shape, generator=generator, dtype=tensor.dtype) - 1
    return tensor * (1 + nudge * signs)


def initial(
    model: MoEModel, role: str, seed: int, precision: str, nudge: float = 0.0, dtype: torch.dtype = torch.float64
) -> Tensors:
    """Weights before training, rounded as the system's are; each times 1 + nudge or 1 - nudge, signs keyed."""
    canonical = dict(weights.canonical(model, role, seed))
    if precision == "float32":
        canonical = {name: w.float().double() for name, w in canonical.items()}
    if nudge:
        canonical = {name: _nudged(w, nudge, seed, role, name) for name, w in canonical.items()}
    return families.to_hf(model, {name: w.to(dtype) for name, w in canonical.items()})


def routing_gap(model: MoEModel, *passes: Pass) -> float:
    """Smallest distance, in router logits, of the last chosen to the first refused expert; inf if all are."""
    if model.top_k == model.experts:
        return float("inf")
    gaps = []
    for layer in (layer for one in passes for layer in one.routing):
        ranked_NE = layer.logits.detach().sort(dim=-1, descending=True).values
        gaps.append((ranked_NE[:, model.top_k - 1] - ranked_NE[:, model.top_k]).min().item())
    return min(gaps)


def tokens_per_expert(model: MoEModel, one: Pass) -> list[list[int]]:
    """How many tokens each layer with experts sent to each: plain lists [layers][E], padding counted."""
    return [torch.bincount(x.experts.flatten(), minlength=model.experts).tolist() for x in one.routing]
