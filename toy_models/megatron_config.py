"""Model, layout and switches as megatron-core's TransformerConfig.

Knows which option of megatron each field asks for; no process groups, no modules, no weights.
"""

from typing import Any

import torch
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig

from toy_models import families
from toy_models.releases import unless_usual
from toy_models.spec import SELECTIVE, SHARED_GATE, Layout, MoEModel, Switches

TRAINED = ("actor", "critic")
DTYPES = {"float64": torch.float64, "float32": torch.float32}
ACTIVATIONS = {
    "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, "relu": torch.nn.functional.relu,
    "squared_relu": squared_relu, "quick_gelu": quick_gelu,
}  # fmt: skip


def _balancing(model: MoEModel) -> dict[str, Any]:
    """One load balancing type as a name, several as a list."""
    if model.sinkhorn:
        return {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0}
    names, coefficients = list(model.load_losses) or ["none"], list(model.load_losses.values()) or [0.0]
    several = len(names) > 1
    return {
        "moe_router_load_balancing_type": names if several else names[0],
        "moe_aux_loss_coeff": coefficients if several else coefficients[0],
    }


def _options(model: MoEModel) -> dict[str, Any]:
    """What the model asks of TransformerConfig, whatever the layout."""
    return {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.head_dim,
        "ffn_hidden_size": model.dense_ffn or model.ffn,
        "moe_layer_freq": [int(layer in model.moe) for layer in range(model.layers)],
        "moe_ffn_hidden_size": model.ffn,
        "num_moe_experts": model.experts,
        "moe_router_topk": model.top_k,
        "moe_router_pre_softmax": not model.norm_topk_prob,
        "moe_router_score_function": model.score,
        "moe_router_enable_expert_bias": model.expert_bias > 0,
        "moe_router_bias_update_rate": model.bias_rate,
        "moe_router_topk_scaling_factor": model.scaling if model.scaling != 1 else None,
        "moe_router_num_groups": model.expert_groups or None,
        "moe_router_group_topk": model.group_topk or None,
        **_balancing(model),
        "moe_expert_capacity_factor": model.capacity or None,
        "moe_pad_expert_input_to_capacity": model.pad_to_capacity,
        "moe_token_drop_policy": model.drops,
        "moe_z_loss_coeff": model.z_loss or None,
        "moe_shared_expert_intermediate_size": model.shared_ffn or None,
        **unless_usual(moe_shared_expert_gate=(model.family in SHARED_GATE, False)),  # since 0.16
        "add_bias_linear": model.biases,
        "add_qkv_bias": model.has_qkv_bias,
        "qk_layernorm": model.has_qk_norm,
        "activation_func": ACTIVATIONS[model.activation],
        "gated_linear_unit": model.gated,
        **unless_usual(
            attention_output_gate=(model.output_gate, False),
            softmax_type=(model.sinks, "vanilla"),
            activation_func_clamp_value=(model.clamp or None, None),
            glu_linear_offset=(model.glu_offset, 0.0),
        ),
        "layernorm_epsilon": families.rms_norm_eps(model.family),
    }


# No dropout, no fusion (they need CUDA).
FIXED: dict[str, Any] = {
    "normalization": "RMSNorm",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "use_cpu_initialization": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "gradient_accumulation_fusion": False,
}


def _pipeline(layout: Layout) -> dict[str, Any]:
    """How the layers are cut into stages, by the option of megatron that the layout names."""
    options: dict[str, Any] = {"pipeline_model_parallel_size": layout.pp}
    if layout.vpp > 1:
        options["virtual_pipeline_model_parallel_size"] = layout.vpp
    if layout.split == "ends":
        options["num_layers_in_first_pipeline_stage"] = layout.stages[0] * layout.vpp
        options["num_layers_in_last_pipeline_stage"] = layout.stages[-1] * layout.vpp
    elif layout.split == "list":
        listed = [["decoder"] * count for count in layout.stages]
        listed[0], listed[-1] = ["embedding", *listed[0]], [*listed[-1], "loss"]
        options["pipeline_model_parallel_layout"] = listed
    options["account_for_embedding_in_pipeline_split"] = layout.split in ("embedding", "both")
    options["account_for_loss_in_pipeline_split"] = layout.split in ("loss", "both")
    return options


def _recomputation(switches: Switches) -> dict[str, Any]:
    """What the backward pass computes again. The modules of models without them are left out by megatron itself."""
    if switches.recompute == "none":
        return {}
    if switches.recompute_layers:
        full = {"recompute_method": switches.recompute, "recompute_num_layers": switches.recompute_layers}
        return {"recompute_granularity": "full", **full}
    modules = list(SELECTIVE) if switches.recompute == "all" else [switches.recompute]
    return {"recompute_granularity": "selective", "recompute_modules": modules}


def transformer_config(
    model: MoEModel, layout: Layout, switches: Switches, precision: str, role: str = "actor"
) -> TransformerConfig:
    """A TransformerConfig of its own for each model: schedules hang functions on it."""
    config = TransformerConfig(
        **_options(model),
        **_pipeline(layout),
        **FIXED,
        **_recomputation(switches),
        tensor_model_parallel_size=layout.tp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.tp > 1 and (switches.forward_sp or role in TRAINED),
        moe_token_dispatcher_type=switches.dispatcher,
        moe_router_dtype=None if switches.router_dtype == "none" else switches.router_dtype,
        moe_shared_expert_overlap=switches.shared_overlap,
        perform_initialization=switches.perform_initialization,
        apply_query_key_layer_scaling=switches.qk_scaling,
        fp32_residual_connection=switches.fp32_residual,
        batch_p2p_comm=switches.p2p == "batched",
        overlap_p2p_comm=switches.p2p in ("overlapped", "flushed"),
        overlap_p2p_comm_warmup_flush=switches.p2p == "flushed",
        deallocate_pipeline_outputs=switches.deallocate,
        calculate_per_token_loss=switches.per_token,
        microbatch_group_size_per_vp_stage=switches.group or layout.pp if layout.vpp > 1 else None,
        params_dtype=DTYPES[precision],
        pipeline_dtype=DTYPES[precision],
    )
    config.finalize_model_grads_func = finalize_model_grads
    return config
