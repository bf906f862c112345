"""Megatron-core sums the bias gradients of different experts, where experts are spread over ranks of one TP group.

    pip install torch megatron-core && python biases_of_other_experts.py

Two ranks on the CPU over Gloo, TP=2 with sequence parallelism, EP=2, ETP=1: an expert's second linear layer with a
bias, of another expert on each rank. Its gradient is 1 on rank 0 and 2 on rank 1, and must stay so, since nobody else
has that expert. Exits 1 while the bug lives, 0 when it has gone (or is refused), 2 where something else went wrong.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
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


def gradients():
    """Of the bias and of the weight, after megatron has finished them; what they were before."""
    from megatron.core import parallel_state as state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed import finalize_model_grads as finish
    from megatron.core.tensor_parallel import RowParallelLinear
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=4, num_attention_heads=2, num_moe_experts=2, add_bias_linear=True,
        tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2,
        expert_tensor_parallel_size=1, use_cpu_initialization=True, gradient_accumulation_fusion=False,
    )  # fmt: skip
    expert = RowParallelLinear(
        4, 4, config=config, init_method=torch.nn.init.ones_, bias=True, input_is_parallel=True, skip_bias_add=True,
        is_expert=True, tp_group=state.get_expert_tensor_parallel_group(),
    )  # fmt: skip
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=False, average_in_collective=False)
    model = DistributedDataParallel(config, ddp, expert)
    output, bias = model(torch.ones(1, 1, 4))
    ((output + bias).sum() * (1 + dist.get_rank())).backward()
    finish([model])
    return float(expert.bias.main_grad[0]), float(expert.weight.main_grad[0, 0])


def run(rank, folder):
    from megatron.core import parallel_state as state

    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    run_without_cuda()
    state.initialize_model_parallel(
        tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1
    )
    bias, weight = gradients()
    line = f"rank {rank}: gradient of its own expert's weight {weight:g}, of its bias: expected {weight:g}, observed"
    print(f"{line} {bias:g}", flush=True)
    dist.barrier()
    sys.exit(BUG if bias != weight else 0)


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
