"""megatron-core's parameter names and packing against the canonical ones: one tensor in, its canonical pieces out.

Plain functions on tensors. Knows names and shapes; no process groups, no modules.
"""

import re

import torch

from toy_models import weights
from toy_models.spec import MoEModel

_ATTENTION = {
    "linear_proj.weight": "self_attn.o_proj.weight",
    "q_layernorm.weight": "self_attn.q_norm.weight",
    "k_layernorm.weight": "self_attn.k_norm.weight",
}
_PLAIN = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
    **{f"self_attention.{k}": v for k, v in _ATTENTION.items()},
}


def _halves(fc1: torch.Tensor, prefix: str) -> dict[str, torch.Tensor]:
    gate, up = fc1.chunk(2, dim=0)
    return {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up}


def _queries_keys_values(model: MoEModel, qkv: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """linear_qkv holds, per query group: its query heads, then one key head, then one value head."""
    per_group = model.heads // model.kv_heads
    groups = qkv.reshape(-1, (per_group + 2) * model.head_dim, *qkv.shape[1:])
    sizes = [per_group * model.head_dim, model.head_dim, model.head_dim]
    parts = zip("qkv", groups.split(sizes, dim=1), strict=True)
    return {f"self_attn.{x}_proj.{kind}": part.reshape(-1, *qkv.shape[1:]) for x, part in parts}


def _unpack_in_layer(model: MoEModel, name: str, tensor: torch.Tensor, first: int) -> dict[str, torch.Tensor]:
    if name in _PLAIN:
        return {_PLAIN[name]: tensor}
    if name.startswith("self_attention.linear_qkv."):
        return _queries_keys_values(model, tensor, name.rsplit(".", 1)[1])
    expert = re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.linear_fc([12])\.weight", name)
    shared = re.fullmatch(r"mlp\.shared_experts\.linear_fc([12])\.weight", name)
    assert expert or shared, f"no canonical name is known for megatron's parameter {name}"
    prefix = f"mlp.experts.{first + int(expert[1])}" if expert else "mlp.shared_expert"
    first_layer = (expert or shared).groups()[-1] == "1"  # type: ignore[union-attr]
    return _halves(tensor, prefix) if first_layer else {f"{prefix}.down_proj.weight": tensor}


def unpack(model: MoEModel, role: str, name: str, tensor: torch.Tensor, first_expert: int) -> dict[str, torch.Tensor]:
    """A tensor shaped like megatron's parameter `name` as the canonical pieces it holds (views where possible)."""
    if name == "output_layer.weight":
        return {"lm_head.weight" if weights.has_token_head(role) else "score.weight": tensor}
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if not layer:
        return {_PLAIN[name]: tensor}
    pieces = _unpack_in_layer(model, layer[2], tensor, first_expert)
    return {f"model.layers.{layer[1]}.{k}": v for k, v in pieces.items()}
