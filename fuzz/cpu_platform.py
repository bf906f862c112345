"""Lets released megatron-core run on torch without CUDA, over Gloo. The one place that bends torch.

`apply()` is called once in a rank process, never in the parent and never where CUDA exists. Each bend says what it
stands for; none replaces arithmetic of megatron-core: devices, streams and what Gloo lacks, nothing else.
"""

import contextlib
import functools
import sys
from collections import deque
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist

CPU = torch.device("cpu")
FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "as_tensor", "arange", "rand", "randn", "zeros_like")


def apply() -> None:
    """Bend torch and megatron-core in this process; RuntimeError where CUDA is there and must be used instead."""
    if torch.cuda.is_available():
        raise RuntimeError("cpu_platform.apply() was called on a machine with CUDA; use the GPU instead")
    _devices()
    _streams()
    _type_names()
    _process_groups()
    _messages()
    _collectives()
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


def _process_groups() -> None:
    """One Gloo device for all groups: each would have its own, with a thread that wakes a hundred times a second.

    Megatron makes some 25 groups per layout; with those of 20 layouts kept these threads took two thirds of the time.
    """
    from torch.distributed import ProcessGroupGloo, distributed_c10d

    device = ProcessGroupGloo.create_default_device()

    class OnSharedDevice(ProcessGroupGloo):
        def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout, options._devices, options._threads = timeout, [device], 1
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = OnSharedDevice  # type: ignore[misc]


# ---- collectives -----------------------------------------------------------------------------------------------
# Gloo lacks ReduceOp.AVG and uneven all-gather and reduce-scatter (EP > 1 with ETP > 1), and its rings take seven
# milliseconds at 4 ranks on 2 cores, where one all-to-all takes one: each ring step wakes another process. So every
# reduction and gather is one real all-to-all over the same group, and sums in rank order, the same on every rank.


def _bytes(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors])


def _exchange(sent: Sequence[torch.Tensor], received: Sequence[torch.Tensor], group: Any) -> None:
    """`sent[i]` goes to rank i of the group, `received[i]` is filled from it. A lone rank has it already."""
    if len(sent) == 1:
        received[0].copy_(sent[0].detach().contiguous().view(received[0].dtype).reshape(received[0].shape))
        return
    into = torch.empty(sum(part.nbytes for part in received), dtype=torch.uint8)
    sizes = [[part.nbytes for part in parts] for parts in (received, sent)]
    dist.all_to_all_single(into, _bytes(sent), sizes[0], sizes[1], group=group)
    for part, arrived in zip(received, into.split(sizes[0]), strict=True):
        part.copy_(arrived.view(part.dtype).reshape(part.shape))


def _reduced(parts: torch.Tensor, op: Any) -> torch.Tensor:
    """Reduce over the first axis, one entry per rank."""
    if op == dist.ReduceOp.AVG:
        return parts.sum(0) / parts.shape[0]
    known: dict[Any, Callable] = {
        dist.ReduceOp.SUM: torch.sum,
        dist.ReduceOp.MAX: torch.amax,
        dist.ReduceOp.MIN: torch.amin,
    }
    return known[op](parts, 0).to(parts.dtype)


def _member(function: Callable) -> Callable:
    """Only members take part; what is asked for asynchronously is done when the call returns."""

    @functools.wraps(function)
    def called(*args: Any, group: Any = None, async_op: bool = False, **kwargs: Any) -> Any:
        if dist.get_rank(group) < 0:
            return None
        function(*args, group=group, **kwargs)
        return _Stream() if async_op else None

    return called


@_member
def _all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
    size = dist.get_world_size(group)
    parts = tensor.new_empty((size, *tensor.shape))
    _exchange([tensor] * size, list(parts), group)
    tensor.copy_(_reduced(parts, op))


@_member
def _all_gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None) -> None:
    _exchange([tensor] * len(tensor_list), tensor_list, group)


@_member
def _all_gather_into_tensor(output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None) -> None:
    size = dist.get_world_size(group)
    parts = output_tensor.new_empty((size, input_tensor.numel()))
    _exchange([input_tensor] * size, list(parts), group)
    output_tensor.copy_(parts.reshape(output_tensor.shape))


@_member
def _reduce_scatter(
    output: torch.Tensor, input_list: Sequence[torch.Tensor], op: Any = dist.ReduceOp.SUM, group: Any = None
) -> None:
    parts = output.new_empty((len(input_list), *output.shape))
    _exchange(input_list, list(parts), group)
    output.copy_(_reduced(parts, op))


@_member
def _reduce_scatter_tensor(
    output: torch.Tensor, input: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None
) -> None:
    chunks = input.reshape(dist.get_world_size(group), *output.shape)
    _reduce_scatter(output, list(chunks), op=op, group=group)


COLLECTIVES = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather_into_tensor,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_tensor": _reduce_scatter_tensor,
}


def _messages() -> None:
    """A message goes on though nobody keeps its handle, as with NCCL: Gloo forgets one whose handle is gone.

    The interleaved schedule drops handles of sends. A message is long through when a thousand others have followed.
    """
    from torch.distributed import distributed_c10d

    kept: deque[Any] = deque(maxlen=1024)

    def keeping(function: Callable) -> Callable:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            kept.append(function(*args, **kwargs))
            return kept[-1]

        return called

    for name in ("isend", "irecv"):
        ours = keeping(getattr(dist, name))
        setattr(dist, name, ours)
        setattr(distributed_c10d, name, ours)


def _collectives() -> None:
    """Put ours where torch has its own, and where megatron-core has taken torch's by value."""
    from torch.distributed import distributed_c10d

    replaced = {getattr(dist, name): ours for name, ours in COLLECTIVES.items()}
    megatron = [module for name, module in sys.modules.items() if name.startswith("megatron.")]
    for module in (dist, distributed_c10d, *megatron):
        functions = {name: value for name, value in vars(module).items() if isinstance(value, FunctionType)}
        for name in [name for name, value in functions.items() if value in replaced]:
            setattr(module, name, replaced[functions[name]])


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


def _move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor
