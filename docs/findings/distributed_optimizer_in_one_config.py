"""Megatron-core takes use_distributed_optimizer=True for DDP and False for the optimizer, and trains wrongly.

    pip install torch megatron-core && python distributed_optimizer_in_one_config.py

Two ranks on the CPU over Gloo, one linear layer, data parallel. DDP then reduces to each rank its half of the gradients
only; the plain optimizer steps all of them. After one step the replicas must be equal. Exits 1 while the bug lives, 0
when it has gone (or is refused), 2 where something else went wrong.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
BUG = 10  # exit code of a rank; an exception would give 1


def run_without_cuda():
    """The grad buffer is made on torch.cuda.current_device(), and Gloo can neither average nor scatter."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    reduce = dist.all_reduce

    def scatter(output, tensor, op=None, group=None, async_op=False):
        reduce(tensor, group=group)  # in a copy, so that the other half stays what it is: local
        output.copy_(tensor.chunk(dist.get_world_size(group))[dist.get_rank(group)])

    for module in [dist, *(m for n, m in sys.modules.items() if n.startswith("megatron."))]:
        for name in ("reduce_scatter_tensor", "_reduce_scatter_base", "dist_reduce_scatter_func"):
            if hasattr(module, name):
                setattr(module, name, lambda o, t, **k: scatter(o, t.clone(), **k))


def weight_after_one_step(sharded):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=sharded, overlap_grad_reduce=False)
    linear = torch.nn.Linear(128, 2, bias=False)
    torch.nn.init.ones_(linear.weight)
    model = DistributedDataParallel(config, ddp, linear)
    (model(torch.ones(1, 128)).sum() * (1 + dist.get_rank())).backward()
    model.finish_grad_sync()
    # What an optimizer with use_distributed_optimizer=False does: it steps every parameter with its main_grad.
    return (linear.weight - linear.weight.main_grad).detach()


def run(rank, folder):
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    parallel_state.initialize_model_parallel()
    run_without_cuda()
    wrong = 0
    for sharded in (False, True):
        mine = weight_after_one_step(sharded)
        both = [torch.empty_like(mine) for _ in range(RANKS)]
        dist.all_gather(both, mine)
        wrong += not torch.equal(*both)
        if rank == 0:
            rows = ["/".join(f"{w:g}" for w in weight[:, 0]) for weight in both]
            print(f"DDP sharded={sharded!s:<5} first column on rank 0: {rows[0]}, on rank 1: {rows[1]}", flush=True)
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
