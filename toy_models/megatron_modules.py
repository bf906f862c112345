"""Modules that stand in megatron-core's layers where its own cannot run here, the layer spec that has them, and a head.

Knows megatron's config and process groups; no layout, no weights, no PPO.
"""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from toy_models.attention import ContextParallelAttention


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm as a layer-spec choice: megatron's own wrapper refuses sequence parallel."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ScalarHead(torch.nn.Module):
    """One number per position, replicated over TP: [S/TP, B, H] -> [S, B, 1], the head of critic and reward model.

    Stands where GPTModel has its output layer, as in verl's `LinearForLastLayer`. Each TP rank sees its part of the
    sequence, so the weight is marked `sequence_parallel` and finalize_model_grads sums its gradient over TP.
    """

    def __init__(self, config: TransformerConfig, tp: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.tp = tp
        self.weight = torch.nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        values = hidden @ self.weight.t()
        if self.weight.sequence_parallel:  # type: ignore[attr-defined]
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False, group=self.tp)
        return values, None


def block_spec(config: TransformerConfig, vp_stage: int | None, pp_rank: int | None) -> TransformerBlockSubmodules:
    """Megatron's own choice of layers for a stage, with norms and an attention that run here."""
    rank = {} if pp_rank is None else {"pp_rank": pp_rank}  # which 0.14 and older do not take
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage, **rank
    )
    for layer in block.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        attention = parts.self_attention.submodules
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
        if config.context_parallel_size > 1:
            attention.core_attention = ContextParallelAttention
    return replace(block, layer_norm=RMSNorm)
