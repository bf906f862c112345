"""Megatron-core hands gradients on as activations where PP=2 runs the interleaved schedule with batch_p2p_comm.

    pip install torch megatron-core && python interleaved_two_stages.py

Two ranks on the CPU over Gloo, one exchange of megatron's own P2PCommunicator as the interleaved schedule makes it in its
steady state: every rank sends an activation forward and a gradient backward, and receives one of each. No GPU,
TransformerEngine or apex. Exits 1 while the bug lives, 0 when it has gone, 2 where something else went wrong.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
BUG = 10  # exit code of a rank; an exception would give 1
ACTIVATION, GRADIENT = 10.0, 20.0  # of rank 0; rank 1 sends one more of each


def exchanged(batch_p2p_comm):
    """What this rank receives as its next input and as the gradient of its last output."""
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    config = ModelParallelConfig(
        pipeline_model_parallel_size=RANKS,
        virtual_pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        batch_p2p_comm=batch_p2p_comm,
    )
    communicator = P2PCommunicator(parallel_state.get_pipeline_model_parallel_group(), config)
    rank, shape = dist.get_rank(), (1, 1, 1)
    received = communicator.send_forward_backward_recv_forward_backward(
        torch.full(shape, ACTIVATION + rank),
        torch.full(shape, GRADIENT + rank),
        recv_prev=True,
        recv_next=True,
        tensor_shape=shape,
    )
    return [tensor.item() for tensor in received]


def run(rank, folder):
    from megatron.core import parallel_state

    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda: None
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=RANKS)
    due, wrong = [ACTIVATION + 1 - rank, GRADIENT + 1 - rank], 0
    for batch_p2p_comm in (False, True):
        got = exchanged(batch_p2p_comm)
        wrong += got != due
        if rank == 0:
            said = f"expected input {due[0]} and gradient {due[1]}, observed {got[0]} and {got[1]}"
            print(f"batch_p2p_comm={batch_p2p_comm!s:<5} rank 0 {said}", flush=True)
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
