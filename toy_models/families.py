"""MoEModel -> transformers: the config of a real family made tiny, and weights under transformers' names.

The `*_minimal.json` files hold what a family fixes (rope, norm epsilon, activation, biases); a MoEModel has
the sizes. `constants` gives the same numbers to whoever builds the model on another library. Downloads
nothing. Knows no megatron, no PPO, no layout.

Canonical names (`toy_models.weights`) have one tensor per expert; transformers 5 keeps the experts of a layer
fused: `mlp.experts.gate_up_proj` [E, 2F, H], gate first, and `mlp.experts.down_proj` [E, H, F]. GLM-4-MoE has
`mlp.shared_experts` for `mlp.shared_expert`. All other names agree.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from toy_models.spec import MoEModel

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.(weight|bias)")
Tensors = dict[str, torch.Tensor]


@cache
def constants(family: str) -> Mapping[str, Any]:
    """What the family fixes whatever its size, as in its JSON file: fields of the transformers config."""
    path = Path(__file__).with_name(f"{family}_minimal.json")
    return MappingProxyType(json.loads(path.read_text()))


def rms_norm_eps(family: str) -> float:
    return constants(family)["rms_norm_eps"]


def rope_theta(family: str) -> float:
    return constants(family)["rope_parameters"]["rope_theta"]


def rotary_fraction(family: str) -> float:
    """The share of a head's features that rotary embeddings turn."""
    return constants(family)["rope_parameters"].get("partial_rotary_factor", 1.0)


def inv_freq(theta: float, dim: int) -> torch.Tensor:
    """Rotary frequencies [dim / 2] in float64 of so many features; both libraries would make them in float32."""
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def frequencies(model: MoEModel) -> torch.Tensor:
    """The rotary frequencies of a model."""
    return inv_freq(rope_theta(model.family), int(model.head_dim * rotary_fraction(model.family)))


def _sizes(model: MoEModel) -> dict[str, Any]:
    sizes = {
        "vocab_size": model.vocab, "hidden_size": model.hidden, "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads, "head_dim": model.head_dim,
        "num_experts_per_tok": model.top_k, "tie_word_embeddings": model.tied,
        "intermediate_size": model.dense_ffn or model.ffn,
    }  # fmt: skip
    if model.family == "mixtral":
        return sizes | {"num_local_experts": model.experts}
    if model.family == "gptoss":
        return sizes | {
            "num_local_experts": model.experts,
            "swiglu_limit": model.clamp,
            "layer_types": ["full_attention"] * model.layers,
        }
    if model.family == "glm4moe":
        return sizes | _glm4moe(model)
    moe = {
        "num_experts": model.experts,
        "moe_intermediate_size": model.ffn,
        "norm_topk_prob": model.norm_topk_prob,
        "mlp_only_layers": list(model.dense),
    }
    shared = {"shared_expert_intermediate_size": model.shared_ffn} if model.shared_ffn else {}
    return sizes | moe | shared


def _glm4moe(model: MoEModel) -> dict[str, Any]:
    """Dense layers come first there; others, and a shared expert of any width, are put in by the reference."""
    leading = [layer for at, layer in enumerate(model.dense) if layer == at]
    return {
        "n_routed_experts": model.experts,
        "moe_intermediate_size": model.ffn,
        "norm_topk_prob": model.norm_topk_prob,
        "routed_scaling_factor": model.scaling,
        "n_group": model.expert_groups if model.group_topk else 1,
        "topk_group": model.group_topk or 1,
        "first_k_dense_replace": len(leading),
    }


def hf_config(model: MoEModel) -> PretrainedConfig:
    """The transformers config: float64, eager attention, eager experts (the default refuses float64)."""
    fields = {k: v for k, v in constants(model.family).items() if k != "model_type"} | _sizes(model)
    return AutoConfig.for_model(
        constants(model.family)["model_type"],
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
        **fields,
    )


def to_hf(model: MoEModel, canonical: Mapping[str, torch.Tensor]) -> Tensors:
    """Canonical tensors -> state dict of the family's ForCausalLM class; `score.weight` passes through."""
    state = {_theirs(model, name): x for name, x in canonical.items() if not _EXPERT.fullmatch(name)}
    for layer in model.moe:
        for kind in ("weight", "bias")[: 1 + model.biases]:
            state |= _fused(model, f"model.layers.{layer}.mlp.experts", kind, canonical)
    return state


def _fused(model: MoEModel, path: str, kind: str, canonical: Mapping[str, torch.Tensor]) -> Tensors:
    """All experts of a layer in one tensor, up behind gate where the experts have gates."""
    parts = {
        part: torch.stack([canonical[f"{path}.{expert}.{part}_proj.{kind}"] for expert in range(model.experts)])
        for part in (("gate", "up", "down") if model.gated else ("up", "down"))
    }
    ups = torch.cat([parts[part] for part in ("gate", "up") if part in parts], dim=1)
    end = "" if kind == "weight" else "_bias"
    return to_their_experts(model, {f"{path}.gate_up_proj{end}": ups, f"{path}.down_proj{end}": parts["down"]})


def _theirs(model: MoEModel, name: str) -> str:
    if model.family == "gptoss":
        return name.replace(".mlp.gate.", ".mlp.router.")
    return name.replace(".mlp.shared_expert.", ".mlp.shared_experts.") if model.family == "glm4moe" else name


def _takes_turns(model: MoEModel) -> bool:
    """Whether the family's own experts have gates and ups in turn, and inputs before outputs."""
    return model.family == "gptoss" and model.plain_mlp


def to_their_experts(model: MoEModel, fused: Mapping[str, torch.Tensor]) -> Tensors:
    """Experts of a layer with gates before ups, [E, 2F, H], as the family has them."""
    if not _takes_turns(model):
        return dict(fused)
    turns = {name: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) for name, x in fused.items() if "up" in name}
    return {name: x.mT if name.endswith("_proj") else x for name, x in (dict(fused) | turns).items()}


def from_their_experts(model: MoEModel, fused: Mapping[str, torch.Tensor]) -> Tensors:
    """The inverse of `to_their_experts`."""
    if not _takes_turns(model):
        return dict(fused)
    found = {name: x.mT if name.endswith("_proj") else x for name, x in fused.items()}
    halves = {name: x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2) for name, x in found.items() if "up" in name}
    return found | halves


def _split_experts(model: MoEModel, name: str, tensor: torch.Tensor) -> Tensors:
    path, last = name.rsplit(".", 1)
    kind = "bias" if last.endswith("_bias") else "weight"
    if last.startswith("down_proj"):
        return {f"{path}.{expert}.down_proj.{kind}": tensor[expert].clone() for expert in range(model.experts)}
    gate_up = {"gate": slice(model.ffn), "up": slice(model.ffn, None)} if model.gated else {"up": slice(None)}
    return {
        f"{path}.{expert}.{part}_proj.{kind}": tensor[expert, rows].clone()
        for expert in range(model.experts)
        for part, rows in gate_up.items()
    }


def from_hf(model: MoEModel, named: Mapping[str, torch.Tensor]) -> Tensors:
    """The inverse of `to_hf`, for weights, gradients and moments; expert tensors are copies."""
    canonical: Tensors = {}
    for name, tensor in named.items():
        fused = ".mlp.experts." in name
        ours = name.replace(".mlp.shared_experts.", ".mlp.shared_expert.").replace(".mlp.router.", ".mlp.gate.")
        for part, x in from_their_experts(model, {name: tensor}).items() if fused else ():
            canonical |= _split_experts(model, part, x)
        canonical |= {} if fused else {ours: tensor}
    return canonical
