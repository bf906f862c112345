"""Megatron-core averages expert gradients over ranks that hold other shards, where a rank order puts CP before TP.

    pip install torch megatron-core && python experts_of_other_replicas.py

Four ranks on the CPU over Gloo, TP=2, CP=2, EP=1, ETP=2, one expert's ColumnParallelLinear in DDP. Each rank's gradient
is 1 + its number; what it must become is the mean over the ranks that hold the same shard. Exits 1 while the bug lives,
0 when it has gone (or is refused), 2 where something else went wrong.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 4
BUG = 10  # exit code of a rank; an exception would give 1


class Stream:
    """A stream on a machine where everything is done when the call returns."""

    def wait_stream(self, *_): ...


def run_without_cuda():
    """The grad buffer is made on torch.cuda.current_device(), newer versions ask for streams; Gloo cannot average."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *_: Stream()
    torch.cuda.synchronize = lambda *_: None
    torch.nn.Module.cuda = lambda self, *_: self


def reduced_gradient(order):
    """The gradient after DDP's reduction, and what it must be."""
    from megatron.core import parallel_state as state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer import TransformerConfig

    state.initialize_model_parallel(
        tensor_model_parallel_size=2, context_parallel_size=2, expert_tensor_parallel_size=2, order=order
    )
    config = TransformerConfig(
        num_layers=1, hidden_size=4, num_attention_heads=2, num_moe_experts=1, add_bias_linear=False,
        tensor_model_parallel_size=2, context_parallel_size=2, expert_tensor_parallel_size=2,
        use_cpu_initialization=True, perform_initialization=False, gradient_accumulation_fusion=False,
    )  # fmt: skip
    expert = ColumnParallelLinear(
        4, 4, config=config, init_method=torch.nn.init.zeros_, bias=False, is_expert=True,
        tp_group=state.get_expert_tensor_parallel_group(),
    )  # fmt: skip
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=False, average_in_collective=False)
    model = DistributedDataParallel(config, ddp, expert)
    (expert.weight.sum() * (1 + dist.get_rank())).backward()
    model.finish_grad_sync()
    replicas = dist.get_process_group_ranks(state.get_expert_data_parallel_group())
    due = sum(1 + rank for rank in replicas) / len(replicas)
    found = float(expert.weight.main_grad.flatten()[0])
    state.destroy_model_parallel()
    return found, due, replicas


def run(rank, folder):
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    run_without_cuda()
    wrong = 0
    for order in ("tp-cp-ep-dp-pp", "cp-tp-ep-dp-pp"):
        found, due, replicas = reduced_gradient(order)
        wrong += found != due
        if rank == 0:
            print(
                f"order {order}, rank 0: the shard is on ranks {replicas}: expected {due:g}, observed {found:g}",
                flush=True,
            )
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
