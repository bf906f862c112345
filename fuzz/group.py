"""torch.distributed's process group on the wire: real messages between real processes, and sums in rank order.

The backend "wire" of `torch.distributed`, for CPU tensors, in place of Gloo's: it also has what Gloo lacks and
megatron-core needs (ReduceOp.AVG, uneven gathers and scatters). A collective is one exchange of every member with every
other; a reduction adds what came in the order of ranks, so that all get the same bits. Whoever changes or frees a
tensor that is still being sent is found out each time, not now and then (`fuzz.messages`).

Knows torch.distributed, `fuzz.messages` and `fuzz.wire`; nothing of megatron-core, of cases or of laws.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fuzz.messages import Done, Late, Sent, Taken, send
from fuzz.messages import bytes_of as _bytes
from fuzz.messages import view_of as _view
from fuzz.wire import Wire

BACKEND = "wire"


def _sum(parts: torch.Tensor, _: int) -> torch.Tensor:
    """From the first rank to the last. (`torch.sum` takes four at a time, but not of the last few elements: from five
    ranks on the last bit would hang on where in a buffer an element lies.)
    """
    whole = parts[0].clone()
    for part in parts[1:]:
        whole += part
    return whole


REDUCTIONS: tuple[tuple[Any, Callable], ...] = (  # an operation of torch's equals these, and has another hash
    (dist.ReduceOp.SUM, _sum),
    (dist.ReduceOp.AVG, lambda parts, axis: _sum(parts, axis) / parts.shape[axis]),
    (dist.ReduceOp.MAX, torch.amax),
    (dist.ReduceOp.MIN, torch.amin),
    (dist.ReduceOp.PRODUCT, torch.prod),
)


def reduced(parts: torch.Tensor, op: Any) -> torch.Tensor:
    """Reduce over the first axis, one entry per rank."""
    for known, function in REDUCTIONS:
        if op == known:
            return function(parts, 0).to(parts.dtype)  # type: ignore[no-any-return]
    raise NotImplementedError(f"the CPU platform reduces by sum, mean, maximum, minimum and product, not by {op}")


Base: Any = dist.ProcessGroup  # whose stubs promise a Work of C++


class Group(Base):
    """The members of a group, by their ranks in the world; `name` is the same on all of them."""

    def __init__(self, wire: Wire, name: str, members: Sequence[int], rank: int) -> None:
        super().__init__(rank, len(members))
        self._wire, self._name, self._members, self._rank = wire, name, members, rank
        self._channel = _channel(name)
        self._asked: dict[tuple[int, int], deque[Taken]] = {}

    @property
    def group_name(self) -> str:
        return self._name

    def getBackendName(self) -> str:
        return BACKEND

    def _swap(self, sent: Sequence[memoryview], received: Sequence[memoryview]) -> Done:
        """`sent[i]` goes to member i, `received[i]` is filled from it."""
        others = [*range(self._rank + 1, len(self._members)), *range(self._rank)]
        for i in others:
            self._wire.post(self._members[i], self._channel, sent[i])
        received[self._rank][:] = sent[self._rank]
        for i in others:
            self._wire.take(self._members[i], self._channel, received[i])
        return Done()

    # ---- collectives: names and arguments are torch's ----

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Done:
        op = opts.reduceOp if opts else dist.ReduceOp.SUM
        [tensor], size = tensors, len(self._members)
        if size > 1:
            parts = tensor.new_empty((size, *tensor.shape))
            self._swap([_bytes(tensor)] * size, _split(parts, None, len(parts)))
            return Late(lambda: tensor.copy_(reduced(parts, op)))
        return Done()

    def reduce(self, tensors: list[torch.Tensor], opts: Any) -> Done:
        [tensor] = tensors
        whole = tensor.clone()
        self.allreduce([whole], opts).wait()
        if self._rank == opts.rootRank:
            tensor.copy_(whole)
        return Done()

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None) -> Done:
        [into], [tensor] = outputs, inputs
        found = [torch.empty(part.shape, dtype=part.dtype) for part in into]
        self._swap([_bytes(tensor)] * len(into), [_view(part) for part in found])
        for part, arrived in zip(into, found, strict=True):
            part.copy_(arrived)
        return Done()

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Done:
        parts = output.new_empty((len(self._members), input.numel()))
        self._swap([_bytes(input)] * len(parts), _split(parts, None, len(parts)))
        return Late(lambda: output.copy_(parts.reshape(output.shape)))

    def reduce_scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any = None) -> Done:
        [output], [chunks] = outputs, inputs
        parts = output.new_empty((len(chunks), *output.shape))
        self._swap([_bytes(chunk) for chunk in chunks], _split(parts, None, len(parts)))
        op = opts.reduceOp if opts else dist.ReduceOp.SUM
        return Late(lambda: output.copy_(reduced(parts, op)))

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Done:
        return self.reduce_scatter([output], [list(input.reshape(len(self._members), *output.shape))], opts)

    def alltoall(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None) -> Done:
        found = [torch.empty(part.shape, dtype=part.dtype) for part in outputs]
        self._swap([_bytes(part) for part in inputs], [_view(part) for part in found])
        for part, arrived in zip(outputs, found, strict=True):
            part.copy_(arrived)
        return Done()

    def all_to_all_single(
        self, output: torch.Tensor, input: torch.Tensor, into: Any = None, out: Any = None, opts: Any = None
    ) -> Done:
        size, found = len(self._members), output if output.is_contiguous() else output.new_empty(output.shape)
        taken, sent = _split(found, into, size), _split(input.detach().contiguous(), out, size)
        self._swap(sent, taken)
        if found is not output:
            output.copy_(found)
        return Done()

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> Done:
        [tensor], root = tensors, opts.rootRank
        if self._rank != root:
            return self._fill(tensor, root)
        for peer in self._others():
            self._wire.post(peer, self._channel, _bytes(tensor))
        return Done()

    def gather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any) -> Done:
        [tensor] = inputs
        if self._rank != opts.rootRank:
            self._wire.post(self._members[opts.rootRank], self._channel, _bytes(tensor))
        for i, into in enumerate(outputs[0] if outputs else ()):
            into.copy_(tensor) if i == self._rank else self._fill(into, i)
        return Done()

    def scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any) -> Done:
        [output] = outputs
        if self._rank != opts.rootRank:
            return self._fill(output, opts.rootRank)
        for i, part in enumerate(inputs[0]):
            output.copy_(part) if i == self._rank else self._wire.post(self._members[i], self._channel, _bytes(part))
        return Done()

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = None) -> Done:
        return _all([self.allreduce([tensor], opts) for tensor in tensors])

    def all_gather_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> Done:
        return _all([self.all_gather_single(output, tensor) for output, tensor in zip(outputs, inputs, strict=True)])

    def reduce_scatter_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> Done:
        pairs = zip(outputs, inputs, strict=True)
        return _all([self.reduce_scatter_single(output, tensor, opts) for output, tensor in pairs])

    def barrier(self, opts: Any = None) -> Done:
        nothing = [memoryview(bytearray())] * len(self._members)
        return self._swap(nothing, nothing)

    def _others(self) -> list[int]:
        return [peer for i, peer in enumerate(self._members) if i != self._rank]

    def _fill(self, tensor: torch.Tensor, member: int) -> Done:
        """Take a whole tensor from one member."""
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        self._wire.take(self._members[member], self._channel, _view(whole))
        tensor.copy_(whole)
        return Done()

    # ---- messages ----

    def send(self, tensors: list[torch.Tensor], to: int, tag: int = 0) -> Sent:
        peer, channel = self._members[to], _channel(f"{self._name}/{tag}")
        return send(tensors[0], peer, lambda data: self._wire.post(peer, channel, data))

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int = 0) -> Taken:
        peer, channel = self._members[source], _channel(f"{self._name}/{tag}")
        asked = self._asked.setdefault((peer, channel), deque())
        return Taken(tensors[0], lambda into: self._wire.take(peer, channel, into), asked)

    # What newer and older versions of torch call the same.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


def _all(works: Sequence[Done]) -> Late:
    return Late(lambda: [work.wait() for work in works])


def _channel(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _split(tensor: torch.Tensor, sizes: Sequence[int] | None, number: int) -> list[memoryview]:
    """The bytes of `number` parts along the first axis, of `sizes` rows each or of equally many."""
    equal = sizes is None or not len(sizes)
    rows = [tensor.shape[0] // number] * number if equal else map(int, sizes)  # type: ignore[arg-type]
    whole, row = _view(tensor), tensor.element_size() * math.prod(tensor.shape[1:])
    ends = [row * end for end in accumulate(rows, initial=0)]
    return [whole[start:end] for start, end in pairwise(ends)]


def connect(rank: int, world: int, folder: Path) -> None:
    """Make the wire of this rank and the backend that uses it; once per process, `folder` is the pool's own."""
    wire = Wire(rank, world, folder)

    def make(options: Any, _: Any) -> Group:
        members = list(options.global_ranks_in_group) or list(range(world))
        return Group(wire, options.group_id, members, options.group_rank)

    dist.Backend.register_backend(BACKEND, make, extended_api=True, devices=["cpu"])
