"""megatron-core's parameter names and packing against the canonical ones: one tensor in, its canonical pieces out.

Plain functions on tensors. Knows names and shapes; no process groups, no modules.
"""

import re
from functools import cache
from typing import NamedTuple

import torch

from toy_models import weights
from toy_models.spec import MoEModel

_ATTENTION = {
    "linear_proj.weight": "self_attn.o_proj.weight",
    "linear_proj.bias": "self_attn.o_proj.bias",
    "core_attention.softmax_offset": "self_attn.sinks",
    "q_layernorm.weight": "self_attn.q_norm.weight",
    "k_layernorm.weight": "self_attn.k_norm.weight",
}
_PLAIN = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
    **{f"self_attention.{k}": v for k, v in _ATTENTION.items()},
}

_MLP = re.compile(
    r"mlp\.((?P<shared>shared_experts)\.|experts\.local_experts\.(?P<expert>\d+)\.)?linear_fc(?P<fc>[12])\.(?P<kind>weight|bias)"
)


class Shard(NamedTuple):
    """Which part of a model's tensors a model chunk has: its layers, its first expert, its place in TP."""

    model: MoEModel
    layers: tuple[int, ...]
    first_expert: int
    tp: int
    tp_rank: int


def _halves(of: Shard, fc1: torch.Tensor, prefix: str, kind: str) -> dict[str, torch.Tensor]:
    if not of.model.gated:
        return {f"{prefix}.up_proj.{kind}": fc1}
    gate, up = fc1.chunk(2, dim=0)
    return {f"{prefix}.gate_proj.{kind}": gate, f"{prefix}.up_proj.{kind}": up}


@cache
def _rows(model: MoEModel, tp: int, tp_rank: int) -> dict[str, torch.Tensor]:
    """Where the rows of q, g, k and v stand in the equal part of linear_qkv that a TP rank has."""
    packed = [x for x, _ in weights.packed_rows(model)]
    mine = packed[len(packed) * tp_rank // tp : len(packed) * (tp_rank + 1) // tp]
    rows = {x: [i for i, held in enumerate(mine) if held == x] for x in "qgkv"}
    return {x: torch.tensor(at) for x, at in rows.items() if at}


def _queries_keys_values(of: Shard, qkv: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    rows = _rows(of.model, of.tp, of.tp_rank)
    return {f"self_attn.{x}_proj.{kind}": qkv[at] for x, at in rows.items()}


def _unpack_in_layer(of: Shard, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if name in _PLAIN:
        return {_PLAIN[name]: tensor}
    if name.startswith("self_attention.linear_qkv."):
        return _queries_keys_values(of, tensor, name.rsplit(".", 1)[1])
    found = _MLP.fullmatch(name)
    assert found, f"no canonical name is known for megatron's parameter {name}"
    prefix = "mlp.shared_expert" if found["shared"] else "mlp"
    if found["expert"]:
        prefix = f"mlp.experts.{of.first_expert + int(found['expert'])}"
    kind = found["kind"]
    return _halves(of, tensor, prefix, kind) if found["fc"] == "1" else {f"{prefix}.down_proj.{kind}": tensor}


def unpack(of: Shard, role: str, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor shaped like megatron's parameter `name` as the canonical pieces it holds (views where possible)."""
    if name == "output_layer.weight":
        return {_head(of.model, role): tensor}
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if not layer:
        return {_PLAIN[name]: tensor}
    pieces = _unpack_in_layer(of, layer[2], tensor)
    return {f"model.layers.{of.layers[int(layer[1])]}.{k}": v for k, v in pieces.items()}


def _head(model: MoEModel, role: str) -> str:
    """The last stage of a pipeline has a copy of a tied embedding as its head."""
    if not weights.has_token_head(role):
        return "score.weight"
    return "model.embed_tokens.weight" if model.tied else "lm_head.weight"
