"""The reference's first optimizer step with taps on every module: outputs and their gradients, in megatron's names.

transformers' own modules, with hooks. Knows no megatron and no process group; of the layout the partition of rows, and
into how many parts an expert is cut. Shapes: R rows of the mini-batch, W padded width, F features of a module.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from toy_models import families, reference
from toy_models import reference_packing as packing
from toy_models import reference_update as update
from toy_models.batching import partition
from toy_models.families import Tensors
from toy_models.precision import keep_float64
from toy_models.reference import Experience, Run
from toy_models.reference_model import _backbone, routing_gap
from toy_models.reference_modules import Attention
from toy_models.reference_packing import KINDS
from toy_models.spec import MoEModel
from toy_models.taps import Taps

STEP = "0/0"  # iteration 0, optimizer step 0
LOSSES = {"actor": reference._actor_loss, "critic": reference._critic_loss}
_IN_LAYER = {
    "input_layernorm": "input_layernorm",
    "self_attention": "self_attn",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "g": "self_attn.g_proj",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "experts": "mlp.experts",
    "shared": "mlp.shared_expert",
    "shared_ungated": "mlp.shared_experts",
    "shared_gate": "mlp.shared_expert_gate",
    "mlp": "mlp",
}


def run(
    case: Any,
    nudge: float = 0.0,
    given: tuple[torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, dict[str, Any]]:
    """Rollout and first step; {"tensors", "numbers"} under the keys of `docs/ppo.md`, and for each module of a role

    `forward/ROLE/MODULE` and `backward/ROLE/MODULE`, [R, W, F] or as `reference_packing.layer` says;
    `chosen/ROLE/layers.i` [R, W, K] has the experts, where there are any. `nudge` and `dtype` as in `reference.run`;
    `given` are tokens and mask that force the rollout.
    """
    with keep_float64():
        now = reference._start(case, nudge, dtype)
        experience = reference._rollout(now, 0, given)
        gaps = [_step(now, role, experience) for role in LOSSES]
    now.numbers[f"{STEP}/margin"] = min(gaps)
    return {"tensors": now.tensors, "numbers": now.numbers}


def _step(now: Run, role: str, experience: Experience) -> float:
    """One step of one role under taps; how near any choice came to its edge."""
    case, model = now.case, now.trained[role]
    micro_batches = [micro for share in partition(case.layout, case.batch, case.ppo).micro[0] for micro in share]
    rows = [row for micro in micro_batches for row in micro]
    leaves = {name: w.detach().requires_grad_() for name, w in model.weights.items()}
    with _tapped(case.model) as taps:
        passes = reference._forward_mini_batch(now, leaves | model.biases, experience.responses, micro_batches)
        for one in passes:
            taps.tap("output_layer", one.output)
        loss, gap = LOSSES[role](now, STEP, experience, rows, torch.cat([one.output for one in passes]))
        grads = update.gradients(loss + update.balance_loss(case.model, case.layout, passes), leaves)
    now.tensors |= _named(case, role, taps, leaves, len(rows), experience.responses.sequences.shape[1])
    reference._apply(now, STEP, role, grads)
    return min(gap, routing_gap(case.model, *passes))


@contextmanager
def _tapped(model: MoEModel) -> Iterator[Taps]:
    """Taps on the backbone while the block runs."""
    taps, (module, _) = Taps(), _backbone(model)
    paths = {"embedding": "embed_tokens", "final_layernorm": "norm"}
    for i in range(model.layers):
        paths |= {f"layers.{i}": f"layers.{i}"}
        paths |= {f"layers.{i}.{ours}": f"layers.{i}.{theirs}" for ours, theirs in _IN_LAYER.items()}
    there = dict(module.named_modules())
    hooks = [_on_output(taps, name, there[path]) for name, path in paths.items() if path in there]
    for i, layer in enumerate(module.layers):
        hooks += [_on_core(taps, f"layers.{i}.self_attention.core_attention", layer.self_attn)]
        if i in model.moe:
            hooks += [_on_router(taps, i, layer.mlp.gate), _on_input(taps, f"layers.{i}.dispatched", layer.mlp.experts)]
    try:
        yield taps
    finally:
        for hook in hooks:
            hook.remove()


def _on_output(taps: Taps, name: str, module: torch.nn.Module) -> Any:
    return module.register_forward_hook(lambda _, __, out: taps.tap(name, out[0] if isinstance(out, tuple) else out))


def _on_input(taps: Taps, name: str, module: torch.nn.Module) -> Any:
    return module.register_forward_pre_hook(lambda _, inputs: taps.tap(name, inputs[0]))


def _on_core(taps: Taps, name: str, attention: Any) -> Any:
    """What comes of the softmax; modules of our own say where that is, since their outputs may be gated afterwards."""
    if isinstance(attention, Attention):
        return _on_output(taps, name, attention.core)
    return _on_input(taps, name, attention.o_proj)


def _on_router(taps: Taps, layer: int, gate: torch.nn.Module) -> Any:
    """All families return (logits, gates, experts)."""

    def hook(_: Any, __: Any, out: tuple) -> None:
        taps.tap(f"layers.{layer}.gates", out[1])
        taps.tap(f"layers.{layer}.chosen", out[2])

    return gate.register_forward_hook(hook)


# ---- in megatron's names ---------------------------------------------------------------------------------------


def _named(case: Any, role: str, taps: Taps, leaves: Tensors, rows: int, width: int) -> Tensors:
    """Every module of all passes, under megatron's names."""
    kept = dict(zip(KINDS, (taps.values, taps.gradients), strict=True))
    seen = {kind: {name: _joined(passes, rows, width) for name, passes in kept[kind].items()} for kind in KINDS}
    found: Tensors = {}
    for kind in KINDS:
        outside = (name for name in seen[kind] if name.count(".") < 2)  # all but `layers.i.*`
        found |= {f"{kind}/{role}/{name}": seen[kind][name] for name in outside}
    for i in range(case.model.layers):
        here = {kind: _below(seen[kind], f"layers.{i}.") for kind in KINDS}
        if i in case.model.moe:
            found[f"chosen/{role}/layers.{i}"] = here["forward"]["chosen"]
        for kind, named in _layer(case, i, here, leaves).items():
            found |= {f"{kind}/{role}/layers.{i}.{name}": tensor for name, tensor in named.items()}
    return found


def _layer(case: Any, i: int, here: packing.Kinds, leaves: Tensors) -> packing.Kinds:
    if i in case.model.dense:
        return packing.dense_layer(case.model, here)
    experts = families.from_their_experts(case.model, _below(leaves, f"model.layers.{i}.mlp.experts."))
    return packing.layer(case.model, here, here["forward"]["chosen"], experts, case.layout.etp)


def _joined(passes: list[torch.Tensor], rows: int, width: int) -> torch.Tensor:
    """[R, W, F] of all passes, whether a pass had its tokens in one axis or two."""
    return torch.cat([one.reshape(rows // len(passes), width, -1) for one in passes])


def _below(named: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
