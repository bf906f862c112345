"""Bugs of activations, biases, gates, sinks and shared experts, as they could come to be. Each function is one.

The first line says what breaks, the second where it comes from, the third the smallest layout that shows it.
"""

from functools import partial
from typing import Any

from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch.nn.functional import gelu

from toy_models import megatron_config
from toy_models.planted.rewrite import after_init, rewrite


def gelu_of_tanh() -> None:
    """gelu is its approximation by tanh.

    No upstream commit; families have one or the other under names that are alike (gelu, gelu_new, gelu_pytorch_tanh).
    minimal: world=1
    """
    megatron_config.ACTIVATIONS["gelu"] = partial(gelu, approximate="tanh")


def gates_clamped_from_below() -> None:
    """The gate's half of a clamped activation is cut off on both sides, as the other half is.

    No upstream commit; gpt-oss clamps them differently.
    minimal: world=1
    """
    rewrite(MLP, "forward", ("x_glu.clamp(min=None, max=val)", "x_glu.clamp(min=-val, max=val)"))


def offset_on_the_gate() -> None:
    """glu_linear_offset moves the gate's half.

    No upstream commit.
    minimal: world=1
    """
    edits = (
        ("self.config.activation_func(x_glu) * (", "(self.config.activation_func(x_glu) + offset) * ("),
        ("x_linear + self.config.glu_linear_offset", "x_linear"),
        ("def glu(x):", "offset = self.config.glu_linear_offset\n\n            def glu(x):"),
    )
    rewrite(MLP, "forward", *edits)


def biases_of_experts_without_gates() -> None:
    """An expert's second bias is added whole, whatever the token's gate.

    No upstream commit; the class of NVIDIA/Megatron-LM's per_token_scale, which came to experts before biases did.
    minimal: world=1
    """
    scaled = "output_bias.unsqueeze(0) * per_token_scale.unsqueeze(-1)"
    rewrite(MLP, "forward", (scaled, "output_bias.unsqueeze(0).expand_as(output)"))


def router_without_its_bias() -> None:
    """The router's bias is loaded, saved and never added.

    No upstream commit.
    minimal: world=1
    """
    rewrite(Router, "gating", ("self.weight, self.bias, router_dtype", "self.weight, None, router_dtype"))


def outputs_gated_twice() -> None:
    """The sigmoid of attention's output gate is taken twice.

    No upstream commit.
    minimal: world=1
    """
    rewrite(Attention, "_apply_output_gate", ("torch.sigmoid(gate.float())", "torch.sigmoid(gate.float()).sigmoid()"))


def sinks_without_a_gradient() -> None:
    """Learned sinks take part in the softmax and do not learn.

    No upstream commit.
    minimal: world=1
    """
    old = "softmax_offset.to(input.device)"
    rewrite(FusedScaleMaskSoftmax, "forward_torch_softmax", (old, f"{old}.detach()"))


def scores_of_deeper_layers_too_large() -> None:
    """apply_query_key_layer_scaling multiplies scores by the layer's number and never divided them by it.

    No upstream commit.
    minimal: world=1
    """

    def undo(attention: Any) -> None:
        if attention.config.apply_query_key_layer_scaling:
            attention.softmax_scale *= attention.layer_number

    after_init(DotProductAttention, undo)


def overlapped_gates_detached() -> None:
    """The gate of an overlapped shared expert has no gradient.

    No upstream commit; the class of NVIDIA/Megatron-LM's streams, in which a tensor is made outside of the graph.
    minimal: world=1
    """
    rewrite(
        SharedExpertMLP,
        "get_output",
        ("self.cached_output * self.gate_score", "self.cached_output * self.gate_score.detach()"),
    )
