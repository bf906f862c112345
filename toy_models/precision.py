"""Float64 that stays float64: while active, conversions "to float32" leave float64 tensors alone.

transformers and megatron-core upcast norms, router, softmax and cross-entropy "to float32", which costs half
the digits of a float64 model. Only operations on float64 tensors are touched, and only those that name
float32; all others cost one Python call more. Knows neither library.

As `.float()` on a float32 tensor does, a conversion left out returns the tensor itself, not a copy. What has no
dtype of its own (a quotient of counts, a tensor made from Python numbers) is float64 meanwhile. Not covered:
tensors made in float32 by name (`torch.tensor(x, dtype=torch.float32)`) and functions that somebody imported by
value before.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

_MISSING = object()
_FLOAT32_NAMES = ("torch.FloatTensor", "torch.cuda.FloatTensor")
_CONVERTING = (
    (torch.Tensor, "to"), (torch.Tensor, "type"), (torch.Tensor, "softmax"), (torch.Tensor, "log_softmax"),
    (torch, "softmax"), (torch, "log_softmax"), (F, "softmax"), (F, "log_softmax"),
)  # fmt: skip


def _wide(argument: Any) -> Any:
    named = isinstance(argument, str) and argument in _FLOAT32_NAMES
    return torch.float64 if named or argument is torch.float32 or argument is torch.FloatTensor else argument


def _is_wide(args: tuple, kwargs: dict[str, Any]) -> bool:
    tensor = args[0] if args else kwargs.get("input")
    return isinstance(tensor, torch.Tensor) and tensor.dtype is torch.float64


def _kept(function: Callable) -> Callable:
    """`function` with float64 wherever it is asked for float32 on a float64 tensor."""

    @functools.wraps(function)
    def kept(*args: Any, **kwargs: Any) -> Any:
        if not _is_wide(args, kwargs):
            return function(*args, **kwargs)
        wide = {name: _wide(value) for name, value in kwargs.items()}
        return function(args[0], *map(_wide, args[1:]), **wide) if args else function(**wide)

    return kept


def _kept_float(float_: Callable) -> Callable:
    @functools.wraps(float_)
    def kept(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor if tensor.dtype is torch.float64 else float_(tensor, *args, **kwargs)

    return kept


def _patch() -> list[tuple[Any, str, Any]]:
    """Replace the functions; what each owner had under that name itself, to be put back."""
    replaced: list[tuple[Any, str, Callable]] = [(torch.Tensor, "float", _kept_float(torch.Tensor.float))]
    replaced += [(owner, name, _kept(getattr(owner, name))) for owner, name in _CONVERTING]
    before = [(owner, name, vars(owner).get(name, _MISSING)) for owner, name, _ in replaced]
    for owner, name, function in replaced:
        setattr(owner, name, function)
    return before


def _restore(before: list[tuple[Any, str, Any]]) -> None:
    for owner, name, value in before:
        if value is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, value)


@contextmanager
def keep_float64(active: bool = True) -> Iterator[None]:
    """While open, and if `active`, code that upcasts "to float32" leaves float64 tensors float64."""
    before, default = _patch() if active else [], torch.get_default_dtype()
    if active:
        torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        _restore(before)
