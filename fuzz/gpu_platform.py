"""Sets up a rank process for its GPU, alone on it or beside others, and lets released megatron-core run float64 there.

`apply()` is called once in a rank process, before process groups exist, where `fuzz.cpu_platform` is without CUDA.
Arithmetic is megatron-core's and torch's own: TF32 is off and deterministic algorithms are on, so that laws about
bits can be asked. Knows nothing of cases, layouts or other ranks.
"""

import os
from typing import Any

import torch

# Before CUDA and NCCL are initialised. cuBLAS is deterministic with a workspace of its own; megatron-core asks for one
# queue per device, so that kernels start in the order in which they were issued. One channel and small buffers, since a
# layout has some fifteen communicators and tensors are tiny: 6 layouts of one rank took 11 GiB without, 1 GiB with it.
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "NCCL_MAX_NCHANNELS": "1",
    "NCCL_BUFFSIZE": "1048576",
}
# NCCL takes two ranks on one GPU for a mistake unless each says that it is a host of its own; they talk over the
# loopback then.
SHARED = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_NVLS_ENABLE": "0"}


def gpu_of(rank: int, world: int, gpus: int) -> int:
    """The GPU of a rank: its own where there are enough, else neighbours share one."""
    return rank if world <= gpus else rank * gpus // world


def environment(rank: int, world: int, gpus: int) -> dict[str, str]:
    """What a rank sets before its first CUDA call."""
    alone = {"NCCL_HOSTID": f"ep-ppo-fuzz-rank{rank}", **SHARED}
    return {**ENVIRONMENT, **(alone if world > gpus else {})}


def apply(rank: int, world: int) -> None:
    """Take this rank's GPU; RuntimeError where there is none."""
    gpus = torch.cuda.device_count()
    if not gpus:
        raise RuntimeError("gpu_platform.apply() was called on a machine without CUDA; use cpu_platform there")
    os.environ.update(environment(rank, world, gpus))
    torch.cuda.set_device(gpu_of(rank, world, gpus))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True)
    _type_names()
    _megatron()


def _type_names() -> None:
    """The optimizers assert `grad.type() == 'torch.cuda.FloatTensor'`; float64 stands in for float32 there."""
    original = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        said = original(self, *args, **kwargs)
        return "torch.cuda.FloatTensor" if said == "torch.cuda.DoubleTensor" else said

    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]


def _megatron() -> None:
    from megatron.core.transformer.moe import moe_utils

    # Without TransformerEngine 0.13.1 to 0.16.1 leave this name undefined and every MoE forward raises NameError
    # (mended in 0.17).
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def seed_generators() -> None:
    """megatron's own generators by name, as its training makes them once groups exist; nothing is drawn from them."""
    from megatron.core.tensor_parallel import random

    random.model_parallel_cuda_manual_seed(1)
