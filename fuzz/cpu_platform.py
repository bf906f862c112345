"""Lets released megatron-core run on torch without CUDA. The one place that bends torch.

`apply()` is called once in a rank process, never in the parent and never where CUDA exists. Each bend says what it
stands for; none replaces arithmetic of megatron-core: devices and streams, nothing else. Process groups: `fuzz.group`.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")
FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "as_tensor", "arange", "rand", "randn", "zeros_like")


def apply() -> None:
    """Bend torch and megatron-core in this process; RuntimeError where CUDA is there and must be used instead."""
    if torch.cuda.is_available():
        raise RuntimeError("cpu_platform.apply() was called on a machine with CUDA; use the GPU instead")
    _devices()
    _streams()
    _type_names()
    _megatron()


def _is_cuda(device: Any) -> bool:
    return str(device).startswith("cuda") if isinstance(device, (str, torch.device)) else False


def _here(function: Callable) -> Callable:
    """The factory with `device="cuda"`, a literal all over megatron-core, read as the CPU."""

    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)  # pages are pinned for copies to a device
        return function(*args, **kwargs)

    return on_cpu


def _devices() -> None:
    for name in FACTORIES:
        setattr(torch, name, _here(getattr(torch, name)))
    to = torch.Tensor.to

    def to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(CPU if _is_cuda(a) else a for a in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return to(self, *args, **kwargs)

    torch.Tensor.to = to_cpu  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]


class _Stream:
    """A stream or event on a machine where everything is done when the call returns."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def record_event(self, *_: Any) -> "_Stream":
        return self


def _streams() -> None:
    only = _Stream()
    torch.cuda.Stream = torch.cuda.Event = _Stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *_: only  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda *_: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None  # type: ignore[assignment]
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: None  # type: ignore[assignment]


def _type_names() -> None:
    """The optimizers assert `grad.type() == 'torch.cuda.FloatTensor'`; float64 stands in for float32 there."""
    original = torch.Tensor.type
    names = {torch.float32: "Float", torch.float64: "Float", torch.bfloat16: "BFloat16", torch.float16: "Half"}

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or self.dtype not in names:
            return original(self, *args, **kwargs)
        return f"torch.cuda.{names[self.dtype]}Tensor"

    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]


def _megatron() -> None:
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # Without TransformerEngine 0.13.1 to 0.16.1 leave this name undefined and every MoE forward raises NameError
    # (mended in 0.17).
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # The dispatcher moves split sizes from CUDA to numpy, and leaves what is on the CPU already as tensors, which
    # all_to_all_single does not take.
    token_dispatcher.maybe_move_tensor_to_cpu = _move_to_cpu
    # The tracker has no CUDA state to fork; dropout and jitter are off and weights are loaded, never drawn.
    random.CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    # What is recomputed saves and restores the states of both generators; there is one, the CPU's.
    random._get_cuda_rng_state = lambda *_, **__: torch.empty(0, dtype=torch.uint8)
    random._set_cuda_rng_state = lambda *_, **__: None
    # Newer versions compile an extension for this, each rank for itself, longer than a rank that hangs is waited for.
    if hasattr(random, "_get_share_storage"):
        random._get_share_storage = lambda: _refill


def _refill(output: torch.Tensor, recomputed: torch.Tensor) -> None:
    """Put what was recomputed where it had been given back, as 0.16.1 does."""
    storage, found = output.untyped_storage(), recomputed.untyped_storage()
    storage.resize_(found.size())
    storage.copy_(found)


def _move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor
