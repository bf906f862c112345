"""Megatron-core ignores the pipeline rank that it is handed where pipeline_model_parallel_layout is set.

    pip install torch megatron-core && python layout_of_another_pipeline.py

One process whose parallel_state has no pipeline, as in a job that hands process groups of its own to its models. Exits
1 while the bug lives, 0 when it has gone.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

COMMON = {"num_layers": 3, "hidden_size": 8, "num_attention_heads": 1, "pipeline_dtype": torch.float32}
PIPELINE = {"pipeline_model_parallel_size": 2}
ASKED = {
    "pipeline_model_parallel_layout": {
        "pipeline_model_parallel_layout": [["embedding", "decoder"], ["decoder", "decoder", "loss"]]
    },
    "num_layers_in_last_pipeline_stage": {"num_layers_in_last_pipeline_stage": 2},
}

with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    wrong = 0
    for name, options in ASKED.items():
        config = TransformerConfig(**COMMON, **PIPELINE, **options)
        found = get_num_layers_to_build(config, pp_rank=1), get_transformer_layer_offset(config, pp_rank=1)
        wrong += found != (2, 1)
        print(f"{name}: stage 1, expected 2 layers from 1, observed {found[0]} layers from {found[1]}")
    dist.destroy_process_group()
sys.exit(bool(wrong))
