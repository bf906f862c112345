"""Megatron-core leaves the attention sinks of all TP ranks but the first out of the gradient norm.

    pip install torch megatron-core && python sinks_left_out_of_the_norm.py

Two ranks on the CPU over Gloo, softmax_type="learnable", two heads, TP=2: a sink on each rank. Their gradients are 3
and 4, so the norm is 5. Exits 1 while the bug lives, 0 when it has gone, 2 where something else went wrong.
"""

import math
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
BUG = 10  # exit code of a rank; an exception would give 1


def read_cuda_literals_as_cpu():
    """Scalars are made with device='cuda', the sink on the current device; nothing else is touched."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    for name in ("zeros", "tensor"):
        original = getattr(torch, name)
        setattr(torch, name, lambda *a, _original=original, **k: _original(*a, **{**k, "device": "cpu"}))


def reported_norm():
    """What megatron reports for the sinks."""
    from megatron.core import parallel_state as state
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    config = TransformerConfig(
        num_layers=1, hidden_size=4, num_attention_heads=2, tensor_model_parallel_size=2, softmax_type="learnable"
    )
    group = state.get_tensor_model_parallel_group()
    collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
    attention = DotProductAttention(config, 1, AttnMaskType.causal, "self", pg_collection=collection)
    sink = attention.softmax_offset
    sink.grad = torch.full_like(sink, 3.0 + dist.get_rank())
    # What MegatronOptimizer does to choose the gradients that count.
    counted = [sink.grad] if param_is_not_tensor_parallel_duplicate(sink, tp_group=group) else []
    return get_grad_norm_fp32(counted, grad_stats_parallel_group=group)


def run(rank, folder):
    from megatron.core import parallel_state as state

    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    read_cuda_literals_as_cpu()
    norm = reported_norm()
    if rank == 0:
        print(f"norm of the gradients 3 and 4 of two sinks: expected 5, observed {norm:g}", flush=True)
    dist.barrier()
    sys.exit(BUG if not math.isclose(norm, 5.0) else 0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as shared:
        ranks = [mp.get_context("spawn").Process(target=run, args=(rank, shared)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
            process.kill()
    codes = {process.exitcode for process in ranks}
    sys.exit(2 if codes - {0, BUG} else int(BUG in codes))
