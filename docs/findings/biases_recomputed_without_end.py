"""Megatron-core: the backward pass of a recomputed MLP with biases never ends.

    pip install torch megatron-core && python biases_recomputed_without_end.py

One process, selective recomputation of a dense MLP: the checkpoint returns the parameter of the second bias itself, and
autograd makes it the checkpoint's own output. Its backward pass then asks for itself, for ever. Shown without waiting:
after the forward pass the parameter must still be a leaf. Exits 1 while the bug lives, 0 when it has gone, 2 where
something else went wrong.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig


def checkpointed():
    """The second bias of an MLP that was run as TransformerLayer runs it with recompute_modules=["mlp"]."""
    config = TransformerConfig(
        num_layers=1, hidden_size=4, num_attention_heads=1, ffn_hidden_size=8, add_bias_linear=True,
        use_cpu_initialization=True, gradient_accumulation_fusion=False, bias_activation_fusion=False,
    )  # fmt: skip
    group = parallel_state.get_tensor_model_parallel_group()
    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp = MLP(config, parts, tp_group=group)
    tensor_parallel.checkpoint(mlp, False, torch.ones(1, 1, 4, requires_grad=True))
    return mlp.linear_fc2.bias


def main():
    torch.cuda.current_device = lambda: "cpu"
    tensor_parallel.random._get_cuda_rng_state = lambda *_, **__: torch.empty(0, dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        bias = checkpointed()
        dist.destroy_process_group()
    print(f"the second bias is a leaf: expected True, observed {bias.is_leaf} (it comes from {bias.grad_fn})")
    return int(not bias.is_leaf)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
