"""Bytes between the ranks of one machine, over Unix sockets: what one posts on a channel, the other takes in order.

Knows sockets and nothing of torch, of groups or of what the bytes mean. A rank reads for itself when it takes: no
thread stands between. Gloo has one that waits for sockets and wakes the one that waits for it; its exchange takes ten
times as long on 2 cores (`benchmarks/wire.py`).
"""

import contextlib
import os
import queue
import socket
import struct
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path

HEAD = struct.Struct("<QQ")  # channel, number of bytes
ANSWER = 120  # seconds without a word from a peer: a backstop, the parent's deadline is shorter
START = 30.0  # seconds for all ranks to be there


class Wire:
    """The sockets of this rank, one to each other rank of its world; made in `folder`, where every rank makes its own.

    RuntimeError where a peer has gone, does not come or sends another number of bytes than is taken.
    """

    def __init__(self, rank: int, world: int, folder: Path) -> None:
        self._peers = _connected(rank, world, folder)
        self._arrived: dict[tuple[int, int], deque[bytearray]] = defaultdict(deque)
        self._late: dict[int, queue.Queue[bytes]] = {}

    def post(self, peer: int, channel: int, data: memoryview) -> None:
        """Send; returns at once, and `data` may change then."""
        head, late, sent = HEAD.pack(channel, len(data)), self._late.get(peer), 0
        if late is None or not late.unfinished_tasks:
            with _gone(peer), contextlib.suppress(BlockingIOError):
                sent = self._peers[peer].sendmsg((head, data), (), socket.MSG_DONTWAIT)
        if sent < len(head) + len(data):
            self._sender(peer).put((head + data)[sent:])

    def _sender(self, peer: int) -> "queue.Queue[bytes]":
        """What the socket has no room for is sent by a thread of its own."""
        if peer not in self._late:
            rest: queue.Queue[bytes] = queue.Queue()
            self._late[peer] = rest
            threading.Thread(target=_send_all, args=(self._peers[peer], rest), daemon=True).start()
        return self._late[peer]

    def take(self, peer: int, channel: int, into: memoryview) -> None:
        """Fill `into` with what the peer has posted next on this channel; waits for it."""
        if waiting := self._arrived.get((peer, channel)):
            return _fill(peer, into, waiting.popleft())
        head = bytearray(HEAD.size)
        while True:
            self._read(peer, memoryview(head))
            found, size = HEAD.unpack(head)
            if found == channel and size == len(into):
                return self._read(peer, into)
            data = bytearray(size)
            self._read(peer, memoryview(data))
            if found == channel:
                return _fill(peer, into, data)
            self._arrived[peer, found].append(data)

    def _read(self, peer: int, into: memoryview) -> None:
        source = self._peers[peer]
        while into:
            with _gone(peer):
                count = source.recv_into(into)
                if not count:
                    raise ConnectionResetError
            into = into[count:]


def _fill(peer: int, into: memoryview, data: bytearray) -> None:
    if len(data) != len(into):
        raise RuntimeError(f"rank {peer} sent {len(data):,} bytes where {len(into):,} are taken")
    into[:] = data


def _send_all(target: socket.socket, rest: "queue.Queue[bytes]") -> None:
    while True:
        data = rest.get()
        with contextlib.suppress(OSError):  # whoever takes from this peer is told
            target.sendall(data)
        rest.task_done()


@contextlib.contextmanager
def _gone(peer: int) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        raise RuntimeError(f"no word from rank {peer} for {ANSWER} s") from None
    except OSError:
        raise RuntimeError(f"rank {peer} has gone: its socket is closed") from None


# ---- at the start ----------------------------------------------------------------------------------------------


def _connected(rank: int, world: int, folder: Path) -> dict[int, socket.socket]:
    """Sockets by peer: this rank calls those below it, those above call it."""
    with _inside(folder), socket.socket(socket.AF_UNIX) as door:
        door.bind(f"door-{rank}")
        door.listen(world)
        door.settimeout(START)
        peers = {peer: _call(peer, rank) for peer in range(rank)}
        for _ in range(world - 1 - rank):
            ours, _ = door.accept()
            peers[int.from_bytes(ours.recv(4), "little")] = ours
    for each in peers.values():
        each.setblocking(True)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", ANSWER, 0))
    return peers


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """A socket's address has 108 bytes at most, a folder's path may be longer."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _call(peer: int, rank: int) -> socket.socket:
    until = time.monotonic() + START
    while True:
        ours = socket.socket(socket.AF_UNIX)
        try:
            ours.connect(f"door-{peer}")
            ours.sendall(rank.to_bytes(4, "little"))
            return ours
        except OSError:
            ours.close()
            if time.monotonic() > until:
                raise RuntimeError(f"rank {peer} did not open its socket within {START:.0f} s") from None
            time.sleep(0.002)
