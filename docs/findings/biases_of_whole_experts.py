"""Megatron-core cannot train experts with biases where each rank has all experts whole.

    pip install torch megatron-core && python biases_of_whole_experts.py

One process, EP=1 and ETP=1: an expert's MLP adds its bias, in place, to what its second linear layer returned, a view
that autograd refuses to have written to. Exits 1 while the bug lives, 0 when it has gone, 2 where something else went
wrong.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig


def trained():
    """The gradient of the second bias for a token of gate 0.5, which is 0.5; or what was raised."""
    config = TransformerConfig(
        num_layers=1, hidden_size=4, num_attention_heads=1, num_moe_experts=2, ffn_hidden_size=8, moe_ffn_hidden_size=8,
        add_bias_linear=True,
        use_cpu_initialization=True, gradient_accumulation_fusion=False, bias_activation_fusion=False,
    )  # fmt: skip
    group = parallel_state.get_expert_tensor_parallel_group()
    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    expert = MLP(config, parts, is_expert=True, input_size=4, ffn_hidden_size=8, tp_group=group)
    try:
        output, _ = expert(torch.ones(1, 4), per_token_scale=torch.tensor([0.5]))
        output.sum().backward()
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        return str(error)
    return float(expert.linear_fc2.bias.grad[0])


def main():
    torch.cuda.current_device = lambda: "cpu"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        found = trained()
        dist.destroy_process_group()
    print(f"gradient of an expert's second bias: expected 0.5, observed {found}")
    return int(found != 0.5)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
