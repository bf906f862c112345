"""Canonical weights: names, shapes and values from one seed; and the shard map, which slice lives where.

Names are those of a Qwen3-MoE checkpoint (`docs/ppo.md`). Knows no megatron, no process group, no fuzzer: a
layout's coordinates are plain numbers. `place` says which slice of a canonical tensor a rank holds.
"""

from collections.abc import Mapping
from functools import cache, lru_cache
from types import MappingProxyType

import torch

from toy_models.batching import uniform
from toy_models.coordinates import coordinates, is_first, is_last, layers_on
from toy_models.spec import SHARED_GATE, Layout, MoEModel

ROLES = ("actor", "critic", "reference", "reward")
Shape = tuple[int, ...]
Slices = tuple[slice, ...]


def has_token_head(role: str) -> bool:
    """Actor and reference predict tokens; critic and reward model have one scalar per position."""
    return role in ("actor", "reference")


def _attention_shapes(model: MoEModel) -> dict[str, Shape]:
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    sizes = {"q": queries, "k": keys, "v": keys} | ({"g": queries} if model.output_gate else {})
    shapes: dict[str, Shape] = {f"{x}_proj.weight": (size, model.hidden) for x, size in sizes.items()}
    if model.has_qkv_bias:
        shapes |= {f"{x}_proj.bias": (size,) for x, size in sizes.items()}
    if model.has_qk_norm:
        shapes |= {"q_norm.weight": (model.head_dim,), "k_norm.weight": (model.head_dim,)}
    if model.sinks == "learnable":
        shapes |= {"sinks": (model.heads,)}
    return shapes | {"o_proj.weight": (model.hidden, queries)} | _bias(model, {"o_proj": model.hidden})


def _bias(model: MoEModel, sizes: Mapping[str, int]) -> dict[str, Shape]:
    return {f"{name}.bias": (size,) for name, size in sizes.items()} if model.biases else {}


def _mlp_shapes(model: MoEModel, width: int) -> dict[str, Shape]:
    ups = ("gate_proj", "up_proj") if model.gated else ("up_proj",)
    shapes: dict[str, Shape] = {f"{name}.weight": (width, model.hidden) for name in ups}
    shapes |= {"down_proj.weight": (model.hidden, width)}
    return shapes | _bias(model, dict.fromkeys(ups, width) | {"down_proj": model.hidden})


def _layer_shapes(model: MoEModel, layer: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"input_layernorm.weight": (model.hidden,)}
    shapes |= {"post_attention_layernorm.weight": (model.hidden,)}
    shapes |= {f"self_attn.{name}": shape for name, shape in _attention_shapes(model).items()}
    if layer in model.dense:
        return shapes | {f"mlp.{k}": v for k, v in _mlp_shapes(model, model.dense_ffn).items()}
    shapes |= {"mlp.gate.weight": (model.experts, model.hidden)} | _bias(model, {"mlp.gate": model.experts})
    for expert in range(model.experts):
        shapes |= {f"mlp.experts.{expert}.{k}": v for k, v in _mlp_shapes(model, model.ffn).items()}
    if model.shared_ffn:
        shapes |= {f"mlp.shared_expert.{k}": v for k, v in _mlp_shapes(model, model.shared_ffn).items()}
        shapes |= {"mlp.shared_expert_gate.weight": (1, model.hidden)} if model.family in SHARED_GATE else {}
    return shapes


@cache
def shapes(model: MoEModel, role: str) -> Mapping[str, Shape]:
    """Every canonical tensor of a role's model: name -> full shape."""
    table: dict[str, Shape] = {"model.embed_tokens.weight": (model.vocab, model.hidden)}
    for layer in range(model.layers):
        table |= {f"model.layers.{layer}.{k}": v for k, v in _layer_shapes(model, layer).items()}
    table["model.norm.weight"] = (model.hidden,)
    if not has_token_head(role):
        table["score.weight"] = (1, model.hidden)
    elif not model.tied:
        table["lm_head.weight"] = (model.vocab, model.hidden)
    return table


def _draw(model: MoEModel, role: str, seed: int, name: str, shape: Shape) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(uniform("weight", seed, role, name) * 2**31))
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * noise
    if name.endswith(".bias"):
        return 0.2 * noise
    if name == "model.embed_tokens.weight":
        noise[:, 0] += model.skew  # a direction common to all tokens, by which the router can prefer experts
        return noise
    if name.endswith("mlp.gate.weight"):
        noise[:, 0] -= model.skew * torch.arange(shape[0], dtype=torch.float64)
    return noise * shape[-1] ** -0.5


@lru_cache(maxsize=16)
def canonical(model: MoEModel, role: str, seed: int) -> Mapping[str, torch.Tensor]:
    """The weights of a role's model, float64, from `seed` alone; each tensor has its own random stream. Read only."""
    drawn = {name: _draw(model, role, seed, name, shape) for name, shape in shapes(model, role).items()}
    return MappingProxyType(drawn)


BIAS_STEPS = 8  # a loaded bias is a multiple of such a part of the spread: exact in float32, as megatron keeps it


@lru_cache(maxsize=16)
def expert_biases(model: MoEModel, role: str, seed: int) -> Mapping[str, torch.Tensor]:
    """The biases [E] of each router by name; none where the model has none. They are no parameters. Read only."""
    names = [f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in model.moe if model.expert_bias]
    spread = model.expert_bias / BIAS_STEPS
    return MappingProxyType({name: _steps(seed, role, name, model.experts) * spread for name in names})


def _steps(seed: int, role: str, name: str, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(uniform("bias", seed, role, name) * 2**31))
    return (torch.randn(number, generator=generator, dtype=torch.float64) * BIAS_STEPS).round()


ROW_PARALLEL = ("o_proj.weight", "down_proj.weight")  # cut along the input, axis 1
# along axis 0
COLUMN_PARALLEL = (
    "embed_tokens.weight", "lm_head.weight", "gate_proj.weight", "up_proj.weight", "gate_proj.bias", "up_proj.bias",
    "sinks",
)  # fmt: skip
FIRST, LAST = ("model.embed_tokens.weight",), ("model.norm.weight", "score.weight", "lm_head.weight")


_FROZEN = {
    "router": (".mlp.gate.", ".mlp.router."),  # gpt-oss calls it so
    "experts": (".mlp.experts.",),
    "attention": (".self_attn.",),
    "embedding": (".embed_tokens.",),
}


def is_frozen(frozen: str, name: str) -> bool:
    """Whether a tensor, under its canonical or transformers' name, is among those that `PPO.frozen` names."""
    return frozen != "none" and any(part in name for part in _FROZEN[frozen])


def expert_of(name: str) -> int | None:
    """The index of the routed expert that a canonical tensor belongs to, or None."""
    return int(name.split(".experts.")[1].split(".")[0]) if ".experts." in name else None


def layer_of(name: str) -> int | None:
    """The index of the layer that a canonical tensor belongs to, or None."""
    return int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else None


def packed_rows(model: MoEModel) -> list[tuple[str, int]]:
    """What stands in each row of megatron's linear_qkv: q, g, k or v, and the row of its canonical tensor.

    Per query group: its query heads, as many gates of outputs where there are some, one key head, one value head.
    """
    size, per_group, rows = model.head_dim, model.heads // model.kv_heads, []
    for group in range(model.kv_heads):
        for x in "qg" if model.output_gate else "q":
            rows += [(x, group * per_group * size + i) for i in range(per_group * size)]
        rows += [(x, group * size + i) for x in "kv" for i in range(size)]
    return rows


@cache
def qkv_shard(model: MoEModel, tp: int, tp_rank: int) -> Mapping[str, slice]:
    """The rows of q, g, k and v that a TP rank holds: linear_qkv is cut equally, through a query group if need be."""
    packed = packed_rows(model)
    mine = packed[len(packed) * tp_rank // tp : len(packed) * (tp_rank + 1) // tp]
    rows = {x: [row for kind, row in mine if kind == x] for x in "qgkv"}
    return {x: slice(min(found), max(found) + 1) for x, found in rows.items() if found}


def _cut(name: str, shape: Shape, part: int, parts: int) -> Slices:
    axis = 1 if name.endswith(ROW_PARALLEL) else 0 if name.endswith(COLUMN_PARALLEL) else None
    if axis is None or parts == 1:
        return tuple(slice(0, size) for size in shape)
    step = shape[axis] // parts
    mine = slice(part * step, (part + 1) * step)
    return tuple(mine if i == axis else slice(0, size) for i, size in enumerate(shape))


def _on_stage(model: MoEModel, layout: Layout, rank: int, name: str) -> bool:
    """Whether a tensor lives on the pipeline stages of a rank; a tied embedding lives on the last one too."""
    layer = layer_of(name)
    if layer is not None:
        return layer in layers_on(layout, model.layers, rank)
    if name in LAST:
        return is_last(layout, rank)
    return is_first(layout, rank)


def _slices(model: MoEModel, layout: Layout, rank: int, name: str, shape: Shape) -> Slices | None:
    """Which part of a tensor of its stage a rank holds; None where it is another rank's expert or has no such row."""
    at, expert = coordinates(layout, rank), expert_of(name)
    if ".self_attn." in name and name.split(".")[-2] in ("q_proj", "g_proj", "k_proj", "v_proj"):
        rows = qkv_shard(model, layout.tp, at.tp).get(name.split(".")[-2][0])
        return None if rows is None else (rows, *(slice(0, size) for size in shape[1:]))
    if expert is None:
        return _cut(name, shape, at.tp, layout.tp)
    return _cut(name, shape, at.etp, layout.etp) if expert // (model.experts // layout.ep) == at.ep else None


@cache
def held(model: MoEModel, layout: Layout, role: str, rank: int) -> Mapping[str, Slices]:
    """The shard map: canonical name -> slice of the full tensor, for every tensor of which `rank` has a part.

    Ranks whose slices of one name are equal are replicas of each other.
    """
    tied, table = model.tied and has_token_head(role), {}
    for name, shape in shapes(model, role).items():
        also = tied and name in FIRST and is_last(layout, rank)
        if (also or _on_stage(model, layout, rank, name)) and (part := _slices(model, layout, rank, name, shape)):
            table[name] = part
    return table
