"""Megatron-core leaves shards out of the gradient norm where perform_initialization=False.

    pip install torch megatron-core && python norm_of_uninitialized_shards.py

Two ranks on the CPU over Gloo, one ColumnParallelLinear split over both (TP=2), no GPU, TransformerEngine or apex.
Rank 0 gets the gradient 3, rank 1 the gradient 4: the norm is 5. Exits 1 while the bug lives, 0 when it has
gone, 2 where something else went wrong.
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
    """get_grad_norm_fp32 makes its scalars with device='cuda'; nothing else of megatron is touched."""
    for name in ("zeros", "tensor"):
        original = getattr(torch, name)
        setattr(torch, name, lambda *a, _original=original, **k: _original(*a, **{**k, "device": "cpu"}))


def reported_norm(perform_initialization):
    """What megatron reports for one sharded weight after a backward pass, and whether that weight is marked."""
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
    from megatron.core.tensor_parallel import ColumnParallelLinear, param_is_not_tensor_parallel_duplicate

    config = ModelParallelConfig(
        tensor_model_parallel_size=RANKS,
        use_cpu_initialization=True,
        perform_initialization=perform_initialization,
    )
    group = parallel_state.get_tensor_model_parallel_group()
    init = torch.nn.init.ones_
    linear = ColumnParallelLinear(1, RANKS, config=config, init_method=init, bias=False, gather_output=False)
    torch.nn.init.ones_(linear.weight)  # "the weights are loaded anyway"
    output, _ = linear(torch.ones(1, 1))
    (output.sum() * (3.0 + dist.get_rank())).backward()

    # What MegatronOptimizer does to choose the gradients that count.
    counted = [linear.weight.grad] if param_is_not_tensor_parallel_duplicate(linear.weight, tp_group=group) else []
    return get_grad_norm_fp32(counted, grad_stats_parallel_group=group), hasattr(linear.weight, "tensor_model_parallel")


def run(rank, folder):
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    read_cuda_literals_as_cpu()
    wrong = 0
    for perform_initialization in (True, False):
        norm, marked = reported_norm(perform_initialization)
        wrong += not math.isclose(norm, 5.0)
        if rank == 0:
            line = f"perform_initialization={perform_initialization!s:<5} weight marked as sharded: {marked!s:<5}"
            print(f"{line} expected norm 5.0, observed {norm:.1f}", flush=True)
    dist.barrier()
    sys.exit(BUG if wrong else 0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as shared:
        ranks = [mp.get_context("spawn").Process(target=run, args=(rank, shared)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(300)
    codes = {process.exitcode for process in ranks}
    sys.exit({frozenset([0]): 0, frozenset([BUG]): 1}.get(frozenset(codes), 2))
