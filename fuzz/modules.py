"""The modules of a traced model in the order of the forward pass, and whence their gradients come. Plain names.

Knows a MoEModel and megatron's names, relative to the model; no tensors.
"""

import re

from toy_models.spec import MoEModel

IN_LAYER = (
    "input_layernorm", "self_attention.linear_qkv", "self_attention.q_layernorm", "self_attention.k_layernorm",
    "self_attention.core_attention", "self_attention", "pre_mlp_layernorm",
)  # fmt: skip
WITH_EXPERTS = (
    "mlp.shared_experts", "mlp.router", "mlp.token_dispatcher", "mlp.experts.linear_fc1", "mlp.experts.linear_fc2",
    "mlp",
)  # fmt: skip
DENSE = ("mlp.linear_fc1", "mlp")  # (what linear_fc2 puts out is what the mlp does)
NORM = "gradient norm"  # no module, but what all of them together have
DISPATCHER = "mlp.token_dispatcher"
PER_COPY = (DISPATCHER, "mlp.experts.linear_fc1", "mlp.experts.linear_fc2")
HALVES = "mlp.linear_fc1"  # cut over TP by features, the gate's and the up projection's apart
BY_GROUP = "self_attention.k_layernorm"  # one query group of several TP ranks where there are fewer groups
BY_FEATURE = ("linear_qkv", "q_layernorm", "k_layernorm", "core_attention")  # cut over TP by heads, not by position

# Who reads what a module puts out, and so hands a gradient back to it; `+` is the layer that follows.
READERS = {
    "embedding": "layers.0",
    "input_layernorm": "self_attention.linear_qkv",
    "self_attention.linear_qkv": "self_attention.core_attention",
    "self_attention.q_layernorm": "self_attention.core_attention",
    "self_attention.k_layernorm": "self_attention.core_attention",
    "self_attention.core_attention": "self_attention.linear_proj",
    "self_attention": "pre_mlp_layernorm or the residual",
    "pre_mlp_layernorm": "mlp (its router, token_dispatcher or shared_experts)",
    "mlp.router": "mlp.token_dispatcher",
    "mlp.token_dispatcher": "mlp.experts",
    "mlp.experts.linear_fc1": "mlp.experts.linear_fc2",
    "mlp.experts.linear_fc2": "the combine of mlp.token_dispatcher",
    "mlp.linear_fc1": "mlp.linear_fc2",
    "mlp.shared_experts": "mlp",
    "mlp": "the residual",
    "final_layernorm": "output_layer",
    "output_layer": "the loss",
}

_PARAMETERS = {
    r"model\.embed_tokens\.weight": "embedding",
    r"model\.norm\.weight": "final_layernorm",
    r"(lm_head|score)\.weight": "output_layer",
    r".*\.input_layernorm\.weight": "input_layernorm",
    r".*\.self_attn\.[qgkv]_proj\.(weight|bias)": "self_attention.linear_qkv",
    r".*\.self_attn\.q_norm\.weight": "self_attention.q_layernorm",
    r".*\.self_attn\.k_norm\.weight": "self_attention.k_layernorm",
    r".*\.self_attn\.sinks": "self_attention.core_attention",
    r".*\.self_attn\.o_proj\.(weight|bias)": "self_attention",
    r".*\.post_attention_layernorm\.weight": "pre_mlp_layernorm",
    r".*\.mlp\.gate\.(weight|bias)": "mlp.router",
    r".*\.mlp\.(gate|up)_proj\.(weight|bias)": "mlp.linear_fc1",
    r".*\.mlp\.down_proj\.(weight|bias)": "mlp",
    r".*\.mlp\.experts\.\d+\.(gate|up)_proj\.(weight|bias)": "mlp.experts.linear_fc1",
    r".*\.mlp\.experts\.\d+\.down_proj\.(weight|bias)": "mlp.experts.linear_fc2",
    r".*\.mlp\.shared_expert(_gate)?\..*weight": "mlp.shared_experts",
}


def names(model: MoEModel) -> list[str]:
    """All modules, first to last; a family without some of them has no tensors for them."""
    inside = [f"layers.{i}{name}" for i in range(model.layers) for name in (*(f".{n}" for n in _parts(model, i)), "")]
    return ["embedding", *inside, "final_layernorm", "output_layer"]


def _parts(model: MoEModel, layer: int) -> tuple[str, ...]:
    return (*IN_LAYER, *(DENSE if layer in model.dense else WITH_EXPERTS))


def in_layer(module: str) -> tuple[str, str]:
    """`layers.3.mlp.router` as `layers.3` and `mlp.router`; outside of layers the first is empty."""
    found = re.fullmatch(r"(layers\.\d+)\.(.+)", module)
    return (found[1], found[2]) if found else ("", module)


def layer_of(module: str) -> int | None:
    """The index of the layer that a module is or lies in, or None."""
    found = re.match(r"layers\.(\d+)", module)
    return int(found[1]) if found else None


def reader(model: MoEModel, module: str) -> str:
    """Who hands back the gradient of a module's output."""
    if found := re.fullmatch(r"layers\.(\d+)", module):
        after = int(found[1]) + 1
        return f"layers.{after}" if after < model.layers else "final_layernorm"
    return READERS[in_layer(module)[1]]


def of_parameter(name: str) -> str:
    """The module that a canonical tensor belongs to."""
    layer = re.match(r"model\.(layers\.\d+\.)", name)
    kind = next(module for pattern, module in _PARAMETERS.items() if re.fullmatch(pattern, name))
    return f"{layer[1] if layer else ''}{kind}"
