"""The reference's four models: transformers' backbone, one matmul as head, float64, weights as data.

Knows no megatron, no layout, no PPO. A model is a dict of weights under transformers' names
(`families.to_hf`); the module is only its shape, built without storage and kept for the models used last.

Shapes: B rows, W width, N = B*W tokens, E experts, K chosen per token, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.func import functional_call
from transformers import AutoModel, PreTrainedModel
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMLP, Glm4MoeMoE

from toy_models import families, routing, weights
from toy_models.batching import uniform
from toy_models.families import Tensors
from toy_models.reference_modules import MLP, Attention, Experts, Router, choosing_bias
from toy_models.spec import MoEModel


class Routing(NamedTuple):
    """What one layer's router did: `logits` [N, E] and the chosen `experts` [N, K].

    Of a router that is not the plain one also the `margin` [N] of its choice, and `counted`: for which experts balance
    losses count each token.
    """

    logits: torch.Tensor
    experts: torch.Tensor
    margin: torch.Tensor | None = None
    counted: routing.Choice | None = None
    dropped: torch.Tensor | None = None  # [N, K], the copies that experts had no room for


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
        if model.family == "glm4moe":
            _as_asked(module, model)
        if model.family == "gptoss":
            for layer in module.layers:
                layer.mlp.gate = layer.mlp.router  # the same module under the other families' name
        _put_in(module, model)
    module.rotary_emb.inv_freq = module.rotary_emb.original_inv_freq = families.frequencies(model)
    seen: list[Routing] = []
    for layer in (module.layers[i] for i in model.moe):
        if not model.plain_router:
            layer.mlp.gate.register_buffer("e_score_correction_bias", torch.zeros(model.experts, dtype=torch.float64))
        # All families return (logits, gates, experts); the logits are a plain product with gate.weight.
        layer.mlp.gate.register_forward_hook(lambda gate, _, out: seen.append(_routing(model, gate, out)))
    return module, seen


def _as_asked(module: PreTrainedModel, model: MoEModel) -> None:
    """GLM-4-MoE with dense layers at any place and a shared expert of any width."""
    for i, layer in enumerate(module.layers):
        layer.mlp = Glm4MoeMLP(module.config) if i in model.dense else Glm4MoeMoE(module.config)
        if i in model.moe:
            layer.mlp.shared_experts = Glm4MoeMLP(module.config, model.shared_ffn)


def _put_in(module: PreTrainedModel, model: MoEModel) -> None:
    """Modules of our own where those of the family are not what the model asks for."""
    for i, layer in enumerate(module.layers):
        layer.self_attn = layer.self_attn if model.plain_attention else Attention(model)
        if i in model.moe:
            layer.mlp.gate = layer.mlp.gate if _knows(model) else Router(model)
            if model.family == "gptoss":
                layer.mlp.router = layer.mlp.gate
            layer.mlp.experts = layer.mlp.experts if model.plain_mlp else Experts(model)
        elif not model.plain_mlp:
            layer.mlp = MLP(model, model.dense_ffn)
        name = "shared_experts" if model.family == "glm4moe" else "shared_expert"
        if i in model.moe and model.shared_ffn and not model.plain_mlp:
            setattr(layer.mlp, name, MLP(model, model.shared_ffn))


def _knows(model: MoEModel) -> bool:
    """Whether the family's own router is that of the model: GLM-4-MoE judges a group by two experts."""
    if model.biases != (model.family == "gptoss"):
        return False
    if model.family != "glm4moe" or model.routes_together:
        return model.plain_router
    two = not model.group_topk or model.top_k // model.group_topk == 2
    return model.score == "sigmoid" and two


def _routing(model: MoEModel, gate: torch.nn.Module, out: tuple[torch.Tensor, ...]) -> Routing:
    logits, _, experts = out
    if model.plain_router:
        return Routing(logits, experts)
    choice = gate.choice if isinstance(gate, Router) else routing.choose(model, logits, choosing_bias(gate))
    gone, nearest = gate.drops if isinstance(gate, Router) and model.capacity else (None, float("inf"))
    margin = choice.margin.clamp(max=nearest)
    return Routing(logits, experts, margin, routing.counted(model, logits) if model.load_losses else None, gone)


def head(state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The last matrix: [1, H] for a scalar, [V, H] for tokens; the embedding where tied."""
    for name in ("score.weight", "lm_head.weight"):
        if name in state:
            return state[name]
    return state["model.embed_tokens.weight"]


def forward(
    model: MoEModel, state: Mapping[str, torch.Tensor], tokens: torch.Tensor, shards: Sequence[Sequence[int]] = ()
) -> Pass:
    """Run `tokens` [B, W] through the model; causal attention, padding neither masked nor left out.

    `shards` are the tokens, indices into B * W, that are routed together, where experts have a capacity, and in
    training where loads are balanced by Sinkhorn's iteration.
    """
    module, seen = _backbone(model)
    seen.clear()
    for layer in (module.layers[i] for i in model.moe if model.routes_together):
        layer.mlp.gate.shards = [torch.tensor(shard) for shard in shards]
    body = {name.removeprefix("model."): w for name, w in state.items() if name.startswith("model.")}
    given = {"input_ids": tokens, "use_cache": False}
    hidden = functional_call(module, body, kwargs=given, tie_weights=False).last_hidden_state
    output = hidden @ head(state).T
    routed = tuple(seen)
    seen.clear()
    return Pass(output.squeeze(-1) if "score.weight" in state else output, routed)


def joined(passes: Sequence[Pass]) -> Pass:
    """Passes over rows apart as one pass over all of them."""
    layers = zip(*(one.routing for one in passes), strict=True)
    fields = [zip(*some, strict=True) for some in layers]
    routed = [Routing(*(_cat(parts) for parts in each)) for each in fields]
    return Pass(torch.cat([one.output for one in passes]), tuple(routed))


def _cat(parts: tuple) -> Any:
    """Tensors, or choices, one behind the other; None where there are none."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    return routing.Choice(*(torch.cat(some) for some in zip(*parts, strict=True)))


def parted(whole: Pass, rows: Sequence[int]) -> list[Pass]:
    """The inverse: one pass as passes over so many rows each."""
    tokens = [number * whole.output.shape[1] for number in rows]
    layers = [[Routing(*each) for each in zip(*(_split(x, tokens) for x in one), strict=True)] for one in whole.routing]
    routed = zip(*layers, strict=True) if layers else [()] * len(rows)
    return [Pass(output, some) for output, some in zip(whole.output.split(list(rows)), routed, strict=True)]


def _split(part: Any, sizes: list[int]) -> Sequence[Any]:
    if part is None:
        return [None] * len(sizes)
    if isinstance(part, torch.Tensor):
        return part.split(sizes)
    return [routing.Choice(*some) for some in zip(*(field.split(sizes) for field in part), strict=True)]


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


def initial_biases(model: MoEModel, role: str, seed: int, dtype: torch.dtype = torch.float64) -> Tensors:
    """The routers' biases before training, under transformers' names; megatron's float32 has them exactly."""
    return {name: bias.to(dtype) for name, bias in weights.expert_biases(model, role, seed).items()}


def routing_gap(model: MoEModel, *passes: Pass) -> float:
    """Smallest distance, in router logits, of the last chosen to the first refused expert; inf if all are.

    As `routing.Choice.margin` where the router is not the plain one.
    """
    layers = [layer for one in passes for layer in one.routing]
    if not model.plain_router:
        margins = [layer.margin for layer in layers] + [layer.counted.margin for layer in layers if layer.counted]
        return min(margin.min().item() for margin in margins if margin is not None)
    if model.top_k == model.experts:
        return float("inf")
    gaps = []
    for layer in layers:
        ranked_NE = layer.logits.detach().sort(dim=-1, descending=True).values
        gaps.append((ranked_NE[:, model.top_k - 1] - ranked_NE[:, model.top_k]).min().item())
    return min(gaps)


def tokens_per_expert(model: MoEModel, one: Pass) -> list[list[int]]:
    """How many tokens each layer with experts sent to each: plain lists [layers][E], padding counted."""
    return [torch.bincount(x.experts.flatten(), minlength=model.experts).tolist() for x in one.routing]
