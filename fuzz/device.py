"""Which device the ranks run on, and how many share one GPU: chosen in the parent, which never initialises CUDA itself.

GPUs are counted through NVML. "On the CPU" means that no GPU is visible, to this process and to all that it starts, so
that a host with GPUs is then as one without. Knows torch and the environment; nothing of ranks, cases or megatron-core.
"""

import importlib.metadata
import importlib.util
import os

import torch

SHARED = 8  # ranks that one GPU takes, unless --ranks-per-gpu says otherwise
MOST_SHARED = 16
VISIBLE, PER_GPU = "CUDA_VISIBLE_DEVICES", "EP_PPO_FUZZ_RANKS_PER_GPU"
# GPUs are counted without CUDA, in the fork server too: processes forked from one that has opened it cannot use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

# Paths of megatron-core that no case takes, by what would have to be importable; "" where we never turn it on.
UNCOVERED = {
    "TransformerEngine layers": "transformer_engine",
    "grouped GEMM": "grouped_gemm",
    "DeepEP dispatcher": "deep_ep",
    "apex optimizers": "apex",
    "permute fusion": "",
    "CUDA graphs": "",
    "bfloat16": "",
    "several hosts": "",
}


def gpus() -> int:
    """How many GPUs are visible, by NVML."""
    return torch.cuda.device_count()


def name() -> str:
    """'cuda' where a GPU is visible, else 'cpu'."""
    return "cuda" if gpus() else "cpu"


def choose(device: str = "", ranks_per_gpu: int = SHARED) -> None:
    """Make `device`, 'cpu' or 'cuda', that of all ranks; '' takes CUDA where there is a GPU.

    ValueError where there is no GPU for 'cuda', or no such device or number.
    """
    if device not in ("", "cpu", "cuda"):
        raise ValueError(f"--device={device} must be cpu or cuda")
    if not 1 <= ranks_per_gpu <= MOST_SHARED:
        raise ValueError(f"--ranks-per-gpu={ranks_per_gpu} must be 1 to {MOST_SHARED}")
    if device == "cpu":
        os.environ[VISIBLE] = ""
    if device == "cuda" and not gpus():
        hidden = f", {VISIBLE}={os.environ[VISIBLE]!r}" if VISIBLE in os.environ else ""
        raise ValueError(f"--device=cuda needs a GPU, and torch {torch.__version__} sees none{hidden}")
    os.environ[PER_GPU] = str(ranks_per_gpu)


def most_ranks() -> int | None:
    """The largest world that fits; None on the CPU, where memory alone says."""
    return gpus() * int(os.environ.get(PER_GPU, SHARED)) or None


def told() -> list[str]:
    """Device, number of GPUs, backend and versions; and what no case covers there."""
    if name() == "cpu":
        return ["device: cpu, process groups of our own (fuzz/group.py)"]
    shared = os.environ.get(PER_GPU, SHARED)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    said = f"device: cuda, {gpus()} visible, backend nccl {nccl}, CUDA {torch.version.cuda}"
    return [f"{said}, up to {shared} ranks on one GPU", f"not covered: {', '.join(uncovered())}"]


def uncovered() -> list[str]:
    """What of megatron-core needs a GPU and is not run, and why."""
    return [
        what if not module else f"{what} ({module} {_version(module) or 'is not installed'})"
        for what, module in UNCOVERED.items()
    ]


def _version(module: str) -> str:
    if importlib.util.find_spec(module) is None:
        return ""
    try:
        return f"{importlib.metadata.version(module)} is there, and not drawn"
    except importlib.metadata.PackageNotFoundError:
        return "is there, and not drawn"
