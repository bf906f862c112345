"""Canonical weights: names, shapes and values from one seed; and the shard map, which slice lives where.

Names are those of a Qwen3-MoE checkpoint (`docs/ppo.md`). Knows no megatron, no process group, no fuzzer: a
layout's coordinates are plain numbers. `place` says which slice of a canonical tensor a rank holds.
"""

from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from types import MappingProxyType

import torch

from toy_models.batching import uniform
from toy_models.coordinates import coordinates
from toy_models.spec import Layout, MoEModel

ROLES = ("actor", "critic", "reference", "reward")
Shape = tuple[int, ...]
Slices = tuple[slice, ...]


def has_token_head(role: str) -> bool:
    """Actor and reference predict tokens; critic and reward model have one scalar per position."""
    return role in ("actor", "reference")


def _attention_shapes(model: MoEModel) -> dict[str, Shape]:
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    sizes = {"q": queries, "k": keys, "v": keys}
    shapes: dict[str, Shape] = {f"{x}_proj.weight": (size, model.hidden) for x, size in sizes.items()}
    if model.family == "qwen2moe":
        shapes |= {f"{x}_proj.bias": (size,) for x, size in sizes.items()}
    if model.family == "qwen3moe":
        shapes |= {"q_norm.weight": (model.head_dim,), "k_norm.weight": (model.head_dim,)}
    return shapes | {"o_proj.weight": (model.hidden, queries)}


def _mlp_shapes(model: MoEModel, width: int) -> dict[str, Shape]:
    up, down = (width, model.hidden), (model.hidden, width)
    return {"gate_proj.weight": up, "up_proj.weight": up, "down_proj.weight": down}


def _layer_shapes(model: MoEModel) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"input_layernorm.weight": (model.hidden,)}
    shapes |= {"post_attention_layernorm.weight": (model.hidden,)}
    shapes |= {f"self_attn.{name}": shape for name, shape in _attention_shapes(model).items()}
    shapes |= {"mlp.gate.weight": (model.experts, model.hidden)}
    for expert in range(model.experts):
        shapes |= {f"mlp.experts.{expert}.{k}": v for k, v in _mlp_shapes(model, model.ffn).items()}
    if model.shared_ffn:
        shapes |= {f"mlp.shared_expert.{k}": v for k, v in _mlp_shapes(model, model.shared_ffn).items()}
        shapes |= {"mlp.shared_expert_gate.weight": (1, model.hidden)}
    return shapes


@cache
def shapes(model: MoEModel, role: str) -> Mapping[str, Shape]:
    """Every canonical tensor of a role's model: name -> full shape."""
    table: dict[str, Shape] = {"model.embed_tokens.weight": (model.vocab, model.hidden)}
    for layer in range(model.layers):
        table |= {f"model.layers.{layer}.{k}": v for k, v in _layer_shapes(model).items()}
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


ROW_PARALLEL = ("o_proj.weight", "down_proj.weight")  # cut along the input, axis 1
COLUMN_PARALLEL = (
    "embed_tokens.weight", "lm_head.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight", "q_proj.bias",
    "k_proj.bias", "v_proj.bias", "gate_proj.weight", "up_proj.weight",
)  # fmt: skip  # cut along the output, axis 0


def expert_of(name: str) -> int | None:
    """The index of the routed expert that a canonical tensor belongs to, or None."""
    return int(name.split(".experts.")[1].split(".")[0]) if ".experts." in name else None


def _cut(name: str, shape: Shape, part: int, parts: int) -> Slices:
    axis = 1 if name.endswith(ROW_PARALLEL) else 0 if name.endswith(COLUMN_PARALLEL) else None
    if axis is None or parts == 1:
        return tuple(slice(0, size) for size in shape)
    step = shape[axis] // parts
    mine = slice(part * step, (part + 1) * step)
    return tuple(mine if i == axis else slice(0, size) for i, size in enumerate(shape))


@cache
def held(model: MoEModel, layout: Layout, role: str, rank: int) -> Mapping[str, Slices]:
    """The shard map: canonical name -> slice of the full tensor, for every tensor of which `rank` has a part.

    Ranks whose slices of one name are equal are replicas of each other.
    """
    at, local = coordinates(layout, rank), model.experts // layout.ep
    table = {}
    for name, shape in shapes(model, role).items():
        expert = expert_of(name)
        if expert is None:
            table[name] = _cut(name, shape, at.tp, layout.tp)
        elif expert // local == at.ep:
            table[name] = _cut(name, shape, at.etp, layout.etp)
    return table


def assemble(shape: Shape, parts: Iterable[tuple[Slices, torch.Tensor]]) -> torch.Tensor:
    """One full tensor from the parts that ranks hold; NaN where none does, replicas overwrite each other."""
    whole = None
    for where, part in parts:
        whole = part.new_full(shape, float("nan")) if whole is None else whole
        whole[where] = part
    assert whole is not None, f"no rank holds any part of a tensor of shape {shape}"
    return whole
