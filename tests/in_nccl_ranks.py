"""The functions of `tests.in_ranks` on NCCL, two ranks on one GPU: collectives return before they are done."""

import os
from typing import Any

import torch
import torch.distributed as dist

from fuzz import pulse, recorder
from tests import in_ranks


def start(rank: int, world: int, store_path: str, plants: tuple[str, ...]) -> None:
    # NCCL takes ranks on one GPU for a mistake unless each says that it is a host of its own; they talk over sockets.
    alone = {"NCCL_HOSTID": f"rank{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_NVLS_ENABLE": "0"}
    os.environ.update(alone)
    torch.cuda.set_device(0)
    torch.set_default_device("cuda")
    store = dist.FileStore(store_path, world)  # type: ignore[attr-defined]
    dist.init_process_group("nccl", store=store, rank=rank, world_size=world)
    assert pulse.own is not None
    recorder.apply(pulse.own)


def total(progress: in_ranks.Progress, value: float) -> dict[str, Any]:
    seen = in_ranks.total(progress, value)
    return {**seen, "facts": {"device": str(seen["tensors"]["sum"].device), "backend": dist.get_backend()}}


def out_of_step(progress: in_ranks.Progress, how: str) -> dict[str, Any]:
    in_ranks.out_of_step(progress, how)
    torch.cuda.synchronize()
    return {}
