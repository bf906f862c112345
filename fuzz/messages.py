"""Messages between two ranks: what `isend` and `irecv` return, and whether a tensor was left alone while it was sent.

Knows tensors and bytes; nothing of sockets, groups or cases. What is sent is read at once, so a tensor that is changed
or freed too early would not show: it is compared with what was read when its handle is waited for, or at the end of the
case where nobody waits (the interleaved schedule drops handles).
"""

import ctypes
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

NOWHERE = ctypes.c_ubyte()  # where a tensor without elements lies


def view_of(tensor: torch.Tensor) -> memoryview:
    """Its bytes, to be read or filled; `tensor` is contiguous.

    Not through numpy, after which torch resizes the storage no more, as megatron does with what is recomputed.
    """
    assert tensor.is_contiguous(), "a copy would be filled in its place"
    data = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr() or ctypes.addressof(NOWHERE))
    data.tensor = tensor  # type: ignore[attr-defined]  # lives as long as its bytes
    return memoryview(data).cast("B")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return view_of(tensor.detach().contiguous())


class Done:
    """The Work of what is done when its call returns."""

    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class Late(Done):
    """The Work of a reduction or a gather: what came stands in its place only when it has been waited for.

    Whoever reads earlier reads what was there before, each time, and not now and then as where a device is busy.
    """

    def __init__(self, put: Callable[[], Any]) -> None:
        self._put: Callable[[], Any] | None = put

    def wait(self, *_: Any) -> bool:
        put, self._put = self._put, None
        if put:
            put()
        return True

    def is_completed(self) -> bool:
        return self._put is None


class Sent(Done):
    """A message. Until it is waited for its tensor must be left alone: it might be read at any time."""

    def __init__(self, tensor: torch.Tensor, to: int) -> None:
        self._tensor, self._to, self._place, self.data = tensor, to, tensor.data_ptr(), bytes(bytes_of(tensor))

    def wait(self, *_: Any) -> bool:
        if self in _unsettled:
            _settle(self)
        return True

    def touched(self) -> str:
        """What was done to the tensor meanwhile; '' where nothing was."""
        if self._tensor.data_ptr() != self._place or self._tensor.nbytes != len(self.data):
            return (
                f"the memory of a tensor of {len(self.data)} bytes was given back while it was sent to rank {self._to}"
            )
        if bytes(bytes_of(self._tensor)) != self.data:
            return f"a tensor of {len(self.data)} bytes was changed while it was sent to rank {self._to}"
        return ""


_unsettled: dict[Sent, None] = {}  # a set in the order in which they were sent
_messages: dict[str, Any] = {"sent": 0, "touched": []}


def send(tensor: torch.Tensor, to: int, post: Callable[[memoryview], None]) -> Sent:
    """Post what a tensor holds; it is looked at again when the message is waited for, or at the end of the case."""
    message = Sent(tensor, to)
    post(memoryview(message.data))
    _unsettled[message] = None
    return message


def _settle(message: Sent) -> None:
    del _unsettled[message]
    _messages["sent"] += 1
    if found := message.touched():
        _messages["touched"].append(found)


def settled() -> dict[str, Any]:
    """At the end of a case: how many messages were sent, and which of their tensors were touched too early."""
    for message in list(_unsettled):
        _settle(message)
    found = dict(_messages)
    _messages.update(sent=0, touched=[])
    return found


class Taken(Done):
    """A message that comes; those of one channel come in the order in which they were asked for."""

    def __init__(self, tensor: torch.Tensor, take: Callable[[memoryview], None], asked: "deque[Taken]") -> None:
        self._tensor, self._take, self._asked, self.done = tensor, take, asked, False
        asked.append(self)

    def wait(self, *_: Any) -> bool:
        while not self.done:
            self._asked.popleft()._fill()
        return True

    def _fill(self) -> None:
        whole = self._tensor if self._tensor.is_contiguous() else torch.empty_like(self._tensor).contiguous()
        self._take(view_of(whole))
        if whole is not self._tensor:
            self._tensor.copy_(whole)
        self.done = True
