"""vocab_parallel_cross_entropy with label smoothing takes a rank's share of the vocabulary for the whole.

    pip install torch megatron-core && python smoothing_over_a_share.py

Two CPU processes over Gloo. Exits 1 while the bug lives, 0 when it has gone, 2 where something else went wrong.
"""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ALPHA, VOCABULARY = 0.1, 8


def rank(number, store, wrong):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    whole = torch.arange(VOCABULARY, dtype=torch.float32)[None, None] / 4
    target = torch.tensor([[2]])
    logs = whole.log_softmax(-1)
    share = ALPHA * VOCABULARY / (VOCABULARY - 1)  # the formula in the source
    expected = float((1 - share) * -logs[0, 0, 2] - share * logs.mean())
    own = whole.chunk(2, -1)[number].clone()
    found = float(vocab_parallel_cross_entropy(own, target, label_smoothing=ALPHA))
    print(f"loss on TP rank {number}: expected {expected:.6f}, observed {found:.6f}", flush=True)
    wrong.value |= int(abs(found - expected) > 1e-5)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        wrong = mp.get_context("spawn").Value("i", 0)
        mp.spawn(rank, (os.path.join(tempfile.mkdtemp(), "store"), wrong), nprocs=2)
        sys.exit(wrong.value)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
