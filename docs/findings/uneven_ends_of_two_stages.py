"""Megatron-core divides by zero where PP=2 has virtual stages and both uneven ends are given.

    pip install torch megatron-core && python uneven_ends_of_two_stages.py

One process, no process group: where the layers of each stage begin, for a configuration that TransformerConfig accepts.
Exits 1 while the bug lives, 0 when it has gone.
"""

import sys

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

# Six layers on two ranks with two virtual stages each: two, one, two, one.
config = TransformerConfig(
    num_layers=6,
    hidden_size=8,
    num_attention_heads=1,
    pipeline_model_parallel_size=2,
    virtual_pipeline_model_parallel_size=2,
    num_layers_in_first_pipeline_stage=4,
    num_layers_in_last_pipeline_stage=2,
    pipeline_dtype=torch.float32,
)
wrong = 0
for pp_rank, vp_stage, expected in ((0, 0, 0), (1, 0, 2), (0, 1, 3), (1, 1, 5)):
    try:
        observed = get_transformer_layer_offset(config, vp_stage, pp_rank)
    except ZeroDivisionError as error:
        observed = f"ZeroDivisionError: {error}"
    wrong += observed != expected
    print(f"pipeline rank {pp_rank}, virtual stage {vp_stage}: expected layers from {expected}, observed {observed}")
sys.exit(bool(wrong))
