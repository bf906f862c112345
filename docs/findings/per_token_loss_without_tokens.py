"""Megatron-core takes calculate_per_token_loss=True with a loss that counts no tokens: sums where it should average.

    pip install torch megatron-core && python per_token_loss_without_tokens.py

Two ranks on the CPU over Gloo, one linear layer, data parallel: both ranks have the same rows and return their mean, so
the gradient must be that of one rank, 1. Exits 1 while the bug lives, 0 when it has gone (or is refused), 2 where
something else went wrong.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
BUG = 10  # exit code of a rank; an exception would give 1


def run_without_cuda():
    """Tensors that megatron makes with device='cuda' are made on the CPU; nothing else is touched."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    zeros = torch.zeros
    torch.zeros = lambda *a, **k: zeros(*a, **{**k, "device": "cpu"})


def gradient(per_token):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, calculate_per_token_loss=per_token)
    config.finalize_model_grads_func = finalize_model_grads
    linear = torch.nn.Linear(4, 1, bias=False)
    linear.config, linear.model_type = config, ModelType.encoder_or_decoder
    linear.set_input_tensor = lambda tensor: None
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), linear)

    def step(batches, module):
        return module(next(batches)), lambda output: (output.mean(), {})  # (loss, report): no number of tokens

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([torch.ones(2, 4)]),
        model=model,
        num_microbatches=1,
        seq_length=4,
        micro_batch_size=2,
        forward_only=False,
    )
    return float(linear.weight.main_grad[0, 0])


def run(rank, folder):
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    parallel_state.initialize_model_parallel()
    run_without_cuda()
    wrong = 0
    for per_token in (False, True):
        try:
            found = gradient(per_token)
        except (ValueError, AssertionError) as error:
            print(f"calculate_per_token_loss={per_token} refused: {error}", flush=True)
            continue
        wrong += found != 1.0
        if rank == 0:
            print(f"calculate_per_token_loss={per_token!s:<5} expected gradient 1, observed {found:g}", flush=True)
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
