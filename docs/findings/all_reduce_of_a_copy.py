"""reduce_from_tensor_model_parallel_region does not reduce a tensor that is not contiguous, and overwrites one that is.

    pip install torch megatron-core && python all_reduce_of_a_copy.py

Two CPU processes over Gloo. Exits 1 while the bug lives, 0 when it has gone, 2 where something else went wrong.
"""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def rank(number, store, wrong):
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe.moe_utils import get_tokens_per_expert_and_token_count

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    group = dist.group.WORLD
    given = torch.full((2, 3), float(number + 1)).t()  # 1 on rank 0, 2 on rank 1, not contiguous
    kept = given.contiguous().clone()
    apart = mappings.reduce_from_tensor_model_parallel_region(given, group)
    mappings.reduce_from_tensor_model_parallel_region(kept, group)
    x = torch.ones(3, 2, requires_grad=True)
    mappings.copy_to_tensor_model_parallel_region(x, group).backward(torch.full((2, 3), number + 1.0).t())
    routed = torch.eye(4)[: 1 + number].bool()  # one token on rank 0, two on rank 1
    _, local, total = get_tokens_per_expert_and_token_count(routed, group, topk=1, with_padding_mask=True)
    if number == 0:
        print(f"sum over ranks of 1 and 2, not contiguous: expected 3, observed {apart[0, 0]:g}")
        print(f"the argument, contiguous: expected 1 as before, observed {kept[0, 0]:g}")
        print(f"gradient of copy_to, of upstream 1 and 2 not contiguous: expected 3, observed {x.grad[0, 0]:g}")
        print(f"tokens of rank 0 and of both: expected 1 and 3, observed {float(local):g} and {float(total):g}")
        wrong.value = int(float(apart[0, 0]) != 3 or float(kept[0, 0]) != 1 or float(local) != 1)
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
