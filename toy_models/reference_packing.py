"""What transformers' modules of one layer did, in megatron's names and packing; and each expert's part, copy by copy.

Pure functions on tensors. What transformers computes inside one call (every expert by itself, the gated shared expert)
is computed here once more from what went in. Knows no module, no megatron, no process group.

Shapes: R rows, W width, E experts, K chosen per token, P parts into which an expert is cut, H hidden, F expert width.
"""

from collections.abc import Mapping

import torch

from toy_models.families import Tensors
from toy_models.reference_modules import activated
from toy_models.spec import MoEModel

KINDS = ("forward", "backward")  # a module's output, and the gradient with respect to it
Kinds = dict[str, Tensors]  # of each kind, tensors [R, W, ...] by name
PLAIN = ("input_layernorm", "pre_mlp_layernorm", "mlp")


def dense_layer(model: MoEModel, seen: Kinds) -> Kinds:
    """All modules of a layer without experts; linear_fc1 has the gate's features first."""
    found = {kind: _attention(model, seen[kind]) for kind in KINDS}
    for kind in KINDS:
        halves = [seen[kind][name] for name in ("gate", "up") if name in seen[kind]]
        found[kind]["mlp.linear_fc1"] = torch.cat(halves, -1)
        found[kind] |= {name: seen[kind][name] for name in PLAIN}
    return found


def layer(model: MoEModel, seen: Kinds, chosen: torch.Tensor, experts: Tensors, parts: int) -> Kinds:
    """All modules of a layer. `chosen` [R, W, K]; `experts` has gate_up_proj [E, 2F, H] and down_proj [E, H, F].

    What happens per copy of a token (token_dispatcher, linear_fc1, linear_fc2) is [R, W, K, P, ...]: each part has its
    share of the expert's width, as expert tensor parallelism cuts it.
    """
    copies = _copies(model, seen, chosen, experts, parts)
    found = {kind: _attention(model, seen[kind]) | copies[kind] for kind in KINDS}
    for kind in KINDS:
        gates = seen[kind]["gates"]
        found[kind]["mlp.router"] = gates.new_zeros(*gates.shape[:2], model.experts).scatter(2, chosen, gates)
        found[kind] |= {name: seen[kind][name] for name in PLAIN}
    if model.shared_ffn:
        forward = seen["forward"]
        gated = forward["shared"] * forward["shared_gate"].sigmoid() if "shared_gate" in forward else None
        found["forward"]["mlp.shared_experts"] = forward["shared_ungated"] if gated is None else gated
        found["backward"]["mlp.shared_experts"] = seen["backward"]["mlp"]  # the layer's output is a sum
    return found


def _attention(model: MoEModel, seen: Mapping[str, torch.Tensor]) -> Tensors:
    """linear_qkv has, per query group, its query heads, one key head and one value head."""
    groups = [seen[x].unflatten(-1, (model.kv_heads, -1)) for x in ("qgkv" if model.output_gate else "qkv")]
    found = {name: tensor for name, tensor in seen.items() if name.startswith("self_attention")}
    return found | {"self_attention.linear_qkv": torch.cat(groups, dim=-1).flatten(-2)}


def _copies(model: MoEModel, seen: Kinds, chosen: torch.Tensor, experts: Tensors, parts: int) -> Kinds:
    """What is sent to each part of each chosen expert (hidden state, then gate) and what comes of it.

    The gate is applied between the two matrices, as megatron does, and to the second bias, which linear_fc2 leaves to
    its caller; the sum over parts and copies, with that bias, is the layer's output.
    """
    shape = (*chosen.shape, parts, -1)
    hidden = seen["forward"]["dispatched"][:, :, None, None].expand(shape).clone().requires_grad_()
    gates = seen["forward"]["gates"][..., None, None].expand(shape).clone().requires_grad_()
    up, down = _cut(model, experts, parts)
    with torch.enable_grad():
        fc1 = _by_expert(hidden, up, chosen)
        fc1 = fc1 + experts["gate_up_proj_bias"].detach()[chosen][..., None, :] if model.biases else fc1
        fc2 = _by_expert(activated(model, fc1) * gates, down, chosen)
        bias = experts["down_proj_bias"].detach()[chosen][..., None, :] * gates if model.biases else 0.0
    back = seen["backward"]["experts"][:, :, None, None].expand_as(fc2)
    grads = torch.autograd.grad(fc2 + bias, [hidden, gates, fc1], back)
    forward = (torch.cat([hidden, gates], -1).detach(), fc1.detach(), fc2.detach())
    names = ("mlp.token_dispatcher", "mlp.experts.linear_fc1", "mlp.experts.linear_fc2")
    found = forward, (torch.cat(grads[:2], -1), grads[2], back)
    return {kind: dict(zip(names, tensors, strict=True)) for kind, tensors in zip(KINDS, found, strict=True)}


def _cut(model: MoEModel, experts: Tensors, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[E, P, 2F/P, H], in each part the gate's rows first, and [E, P, H, F/P]."""
    up, down = experts["gate_up_proj"].detach(), experts["down_proj"].detach()
    return up.unflatten(1, (1 + model.gated, parts, -1)).transpose(1, 2).flatten(2, 3), down.unflatten(
        2, (parts, -1)
    ).transpose(1, 2)


def _by_expert(x: torch.Tensor, weight: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Each copy [R, W, K, P, I] through the matrix [E, P, O, I] of its expert: [R, W, K, P, O]."""
    out = x.new_zeros(*x.shape[:-1], weight.shape[-2])
    for expert, matrix in enumerate(weight):
        at = chosen == expert
        out[at] = torch.einsum("cpi,poi->cpo", x[at], matrix)
    return out
