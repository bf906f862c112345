"""The tensors of a call: the same in the rank that is handed them and in the parent that knows what must come out.

A pure function of the call, the rank and a name. Values are small multiples of 1/8, which every float type holds
exactly, and so their sums: what only moves or adds numbers is judged bit by bit in bfloat16 too. Knows torch alone.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from fuzz.functions.call import Call

ALL = -1  # in place of a rank: the same tensor on every one
STEP = 0.125
MOST = 16  # steps on either side of 0


def generator(call: Call, rank: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{call.seed}/{rank}/{name}".encode()))


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)


def tensor(call: Call, rank: int, name: str, shape: Sequence[int], dtype: str = "") -> torch.Tensor:
    """Small exact numbers in the call's dtype (or another), contiguous or not as the call says."""
    chosen, random = dtype_of(dtype or call.dtype), generator(call, rank, name)
    if chosen == torch.bool:
        return laid(call, torch.randint(0, 2, tuple(shape), generator=random).bool())
    steps = torch.randint(-MOST, MOST + 1, tuple(shape), generator=random)
    return laid(call, (steps * STEP).to(chosen) if chosen.is_floating_point else steps.to(chosen))


def integers(call: Call, rank: int, name: str, shape: Sequence[int], least: int, most: int) -> torch.Tensor:
    """int64 of `least` to `most`."""
    return laid(call, torch.randint(least, most + 1, tuple(shape), generator=generator(call, rank, name)))


def distinct(call: Call, rank: int, name: str, shape: Sequence[int], dtype: str = "") -> torch.Tensor:
    """Each last dimension is a permutation of equally spaced numbers around 0: no ties, and all exact."""
    random, (*front, last) = generator(call, rank, name), shape
    order = torch.rand((*front, last), generator=random).argsort(-1)
    return laid(call, ((order - last // 2) * STEP).to(dtype_of(dtype or call.dtype)))


def positive(call: Call, rank: int, name: str, shape: Sequence[int], dtype: str = "") -> torch.Tensor:
    """Exact numbers above 0."""
    steps = torch.randint(1, MOST + 1, tuple(shape), generator=generator(call, rank, name))
    return laid(call, (steps * STEP).to(dtype_of(dtype or call.dtype)))


def routing(call: Call, rank: int, name: str, tokens: int, experts: int, topk: int) -> torch.Tensor:
    """A map [tokens, experts] with `topk` experts per token."""
    order = torch.rand((tokens, experts), generator=generator(call, rank, name)).argsort(-1)
    return laid(call, order < topk)


def laid(call: Call, made: torch.Tensor) -> torch.Tensor:
    """As the call wants it in memory: of a tensor that is not contiguous the first two dimensions lie the other way
    round, as after a transpose; a vector takes every second element.
    """
    if call.contiguous:
        return made.contiguous()
    if made.dim() > 1:
        return made.transpose(0, 1).contiguous().transpose(0, 1)
    return made.repeat_interleave(2)[::2] if made.dim() else made


def upstream(call: Call, rank: int, output: str, like: Any) -> torch.Tensor:
    """The gradient that comes back to an output, contiguous or not as the call says."""
    return tensor(call, rank, f"upstream/{output}", like.shape, str(like.dtype)[6:])


def matrix(call: Call, rank: int) -> dict[str, torch.Tensor]:
    """One tensor x [rows of the rank, cols]."""
    return {"x": tensor(call, rank, "x", (call.rows[rank], call["cols"]))}
