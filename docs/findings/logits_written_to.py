"""vocab_parallel_cross_entropy overwrites float32 logits with probabilities, and takes no transposed ones.

    pip install torch megatron-core && python logits_written_to.py

One process. Exits 1 while the bug lives, 0 when it has gone, 2 where something else went wrong.
"""

import os
import sys
import tempfile

import torch
import torch.distributed as dist


def main():
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = os.path.join(tempfile.mkdtemp(), "store")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    wrong = 0
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.tensor([[[1.0, 2.0, 3.0]]], dtype=dtype)
        vocab_parallel_cross_entropy(logits, torch.tensor([[0]]))
        print(f"{dtype} logits 1, 2, 3 after the loss: {[round(x, 3) for x in logits.flatten().tolist()]}")
        wrong += logits.flatten().tolist() != [1.0, 2.0, 3.0]
    try:
        vocab_parallel_cross_entropy(torch.zeros(2, 2, 3).transpose(0, 1), torch.zeros(2, 2, dtype=torch.int64))
        print("transposed logits: accepted")
    except RuntimeError as error:
        print(f"transposed logits: RuntimeError: {str(error)[:60]}...")
    dist.destroy_process_group()
    return int(wrong > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
