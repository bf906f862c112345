"""Mends of bugs of biases, gates and shared experts that live in the pinned megatron-core, as those of `mends.py`."""

from typing import Any

from megatron.core.tensor_parallel.layers import RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from toy_models.planted.rewrite import after_init, rewrite, rewrite_everywhere, wrap


def biases_added_out_of_place() -> None:
    """EP=1: an expert adds its bias to a new tensor, not into the view that a custom function returned.

    docs/findings/biases-of-whole-experts.md.
    """
    old, scaled = "output += ", "output_bias.unsqueeze(0) * per_token_scale.unsqueeze(-1)"
    rewrite(MLP, "forward", (old + scaled, f"output = output + ({scaled}).to(output.dtype)"))  # gates may be float64


def biases_handed_on_as_views() -> None:
    """recompute_modules with "mlp": a checkpoint returns a view of the second bias, not the parameter.

    docs/findings/biases-recomputed-without-end.md.
    """
    old = "return output, output_bias"
    rewrite(MLP, "forward", (old, f"{old} if output_bias is None else output_bias.view_as(output_bias)"))


def _of_one_expert(linear: Any) -> None:
    if linear.is_expert and linear.bias is not None:
        linear.bias.sequence_parallel = False
        if not hasattr(linear.bias, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(linear.bias, True, 0, 1)


def biases_of_experts_stay_apart() -> None:
    """TP>1: the gradient of an expert's second bias is not summed over TP ranks, which have other experts, and norms
    count it on all of them, as they do the expert's weights; docs/findings/biases-of-other-experts.md.
    """
    after_init(RowParallelLinear, _of_one_expert)


def overlapped_experts_are_clamped() -> None:
    """moe_shared_expert_overlap: the shared expert clamps and moves its gated activation as without overlap.

    docs/findings/overlapped-experts-without-clamp.md.
    """
    old = "x = torch.chunk(x, 2, dim=-1)\n                    return self.config.activation_func(x[0]) * x[1]"
    new = (
        "gate, up = torch.chunk(x, 2, dim=-1)\n"
        "                    if (most := self.config.activation_func_clamp_value) is not None:\n"
        "                        gate, up = gate.clamp(max=most), up.clamp(min=-most, max=most)\n"
        "                    return self.config.activation_func(gate) * (up + self.config.glu_linear_offset)"
    )
    rewrite(SharedExpertMLP, "linear_fc1_forward_and_act", (old, new))


def shared_gate_waits() -> None:
    """moe_shared_expert_overlap: the shared expert runs its hooks, which wait for gathered parameters, before its gate.

    docs/findings/shared-gate-before-its-gather.md.
    """

    def waited(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        for hook in self._forward_pre_hooks.values():
            hook(self, args)
        return original(self, *args, **kwargs)

    wrap(SharedExpertMLP, "pre_forward_comm", waited)


def gates_of_own_heads() -> None:
    """attention_output_gate with fewer query groups than TP ranks: a rank takes the gates of its own heads.

    docs/findings/gates-of-other-heads.md.
    """
    old = "gate = gate.reshape(*gate.shape[:2], -1, self.hidden_size_per_attention_head)\n"
    own = "        if self.config.num_query_groups < self.world_size:\n"
    own += "            gate = gate[:, :, idx * size : (idx + 1) * size, :]\n"
    rewrite(SelfAttention, "get_query_key_value_tensors", (old, old + own))


def _marked(attention: Any) -> None:
    if attention.config.softmax_type == "learnable":
        set_tensor_model_parallel_attributes(attention.softmax_offset, True, 0, 1)


def sinks_counted_on_every_rank() -> None:
    """Learned sinks are marked as cut over TP, so that gradient norms count them; sinks-left-out-of-the-norm.md."""
    after_init(DotProductAttention, _marked)


def tokens_dropped_in_order() -> None:
    """moe_token_drop_policy="position": experts keep the first of their tokens; tokens-dropped-at-random-places.md."""
    old = "_, capacity_indices = torch.topk(\n"
    old += "                routing_map.int(), k=expert_capacity, dim=0, sorted=False\n            )"
    # On as many lines: where a check below raises is told by its line.
    new = "capacity_indices = routing_map.int().sort(\n"
    new += "                dim=0, descending=True, stable=True\n            ).indices[:expert_capacity]"
    rewrite_everywhere(moe_utils, "apply_router_token_dropping", (old, new))
