"""Helpers of megatron-core that fail inside an operator, or say nothing, at the edge of what they are documented for.

    pip install torch megatron-core && python functions_at_their_edges.py

One process, and two for the first. Exits 1 while one of the bugs lives, 0 when all have gone, 2 where something else
went wrong.
"""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def rank(number, store, wrong):
    from megatron.core.tensor_parallel import mappings

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    found = list(mappings.all_to_all_hp2sp(torch.zeros(0, 2), dist.group.WORLD).shape)
    if number == 0:
        print(f"all_to_all_hp2sp of no token, [0, H/TP] with H/TP = 2: expected [0, 4], observed {found}")
        wrong.value = int(found != [0, 4])
    dist.destroy_process_group()


def alone(store):
    """What a single process shows: how many fail."""
    from megatron.core.distributed.param_and_grad_buffer import shard_buffer
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator as Rampup
    from megatron.core.tensor_parallel.utils import split_tensor_into_1d_equal_chunks
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.moe_utils import group_limited_topk, router_gating_linear

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # another bug, of an environment without TransformerEngine
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    calls = {
        "group_limited_topk of no token": lambda: group_limited_topk(torch.zeros(0, 4), 1, 0, 4, 2, 1),
        "router_gating_linear of no token": lambda: router_gating_linear(
            torch.zeros(0, 2, 4), torch.zeros(2, 4), None, torch.float64
        ),
        "split_tensor_into_1d_equal_chunks of a transposed tensor": lambda: split_tensor_into_1d_equal_chunks(
            torch.zeros(2, 3).t(), tp_group=dist.group.WORLD
        ),
        "ramp-up from a batch to itself": lambda: Rampup(4, 1, 1, False, 0, 4, 2, 100),
        "ramp-up over no samples": lambda: Rampup(8, 1, 1, False, 0, 4, 2, 0),
        "shard_buffer of 1 element in 2": lambda: shard_buffer(torch.zeros(1), 2),
    }
    failed = 0
    for said, call in calls.items():
        try:
            call()
            print(f"{said}: a result")
        except Exception as error:
            failed += 1
            print(f"{said}: {type(error).__name__}: {str(error)[:70]}")
    dist.destroy_process_group()
    return failed


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        folder = tempfile.mkdtemp()
        wrong = mp.get_context("spawn").Value("i", 0)
        mp.spawn(rank, (os.path.join(folder, "two"), wrong), nprocs=2)
        sys.exit(int(bool(alone(os.path.join(folder, "one")) + wrong.value)))
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
