"""The record of collectives as values, and what can be told from it: who called what that cannot match, who waits.

Every collective is a row of a matrix: how many elements this rank sends to each member of the group and how many it
takes from each. Members agree when what one sends is what the other takes. The k-th call of a rank on a group meets
the k-th call of the others; a message between two ranks is a group of the two in one direction.

Knows lines of bytes and numbers; nothing of processes, torch, cases or laws.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations
from typing import Any

ENDED = {"done": "had ended without it", "raised": "had raised an exception", "died": "had died"}
EACH_OTHER, ELSEWHERE = "each waits for the other", "it waits there for somebody else"  # until the others go on
ON_DEVICE = -2  # in place of the call that a rank is in: it waits until its device has done all that it has issued
SAME_SHAPE = ("all_reduce", "broadcast", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
MESSAGES = {"send": "send", "isend": "send", "recv": "recv", "irecv": "recv"}


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one rank. `sent` and `taken`: elements per member of `ranks`; `detail`: reduction, root or tag."""

    op: str
    group: str
    ranks: tuple[int, ...]
    sent: tuple[int, ...]
    taken: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    detail: str
    where: str

    def __str__(self) -> str:
        members, (_, _, name) = ",".join(map(str, self.ranks)), self.group.partition(" ")
        kind = f" {self.dtype}{list(self.shape)}" if self.dtype else ""
        return f"{self.op}{kind} on {{{members}}}{name and f' of {name}'} at {self.where}"

    @cached_property
    def channel(self) -> tuple:
        """Calls of one channel meet in their order."""
        return self.group, self.ranks, self.detail if self.a_message else None

    @property
    def a_message(self) -> bool:
        """Whether it goes from one rank to another; `ranks` are then these two, `detail` is the tag."""
        return self.op in MESSAGES


def line(call: Call) -> bytes:
    """The call as it stands in the record."""
    return json.dumps(list(vars(call).values())).encode()


@lru_cache(maxsize=20000)
def parsed(text: bytes) -> Call:
    """The inverse of `line`; equal lines give the same object."""
    values: list[Any] = [tuple(value) if isinstance(value, list) else value for value in json.loads(text)]
    return Call(*values)


Record = Mapping[int, Sequence[Call]]  # by rank, in order


@dataclass(frozen=True)
class Divergence:
    """Two members of a group that cannot meet: the calls, None where a rank has made none, and why."""

    rank: int
    call: Call
    other: int
    others_call: Call | None
    why: str

    @property
    def certain(self) -> bool:
        """Whether it stays so whatever anybody does."""
        return self.why not in (EACH_OTHER, ELSEWHERE)

    def __str__(self) -> str:
        theirs = f"called {self.others_call}: " if self.others_call else ""
        return f"rank {self.rank} called {self.call}; rank {self.other} {theirs}{self.why}"


# ---- do the calls match? ---------------------------------------------------------------------------------------

Channels = dict[tuple, dict[int, list[int]]]  # by channel and rank: where in the rank's record its calls stand


def channels(record: Record) -> Channels:
    """The calls sorted by where they meet."""
    found: Channels = defaultdict(lambda: defaultdict(list))
    for rank, calls in record.items():
        for place, call in enumerate(calls):
            found[call.channel][rank].append(place)
    return found


def mismatch(record: Record) -> Divergence | None:
    """The earliest two calls that met and do not match."""
    found = [one for members in channels(record).values() if (one := _first_unlike(record, members))]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _first_unlike(record: Record, members: Mapping[int, list[int]]) -> tuple[int, Divergence] | None:
    for places in zip(*members.values(), strict=False):
        calls = [(rank, record[rank][place]) for rank, place in zip(members, places, strict=True)]
        for (rank, mine), (other, theirs) in combinations(calls, 2):
            if why := unlike(rank, mine, other, theirs):
                return min(places), Divergence(rank, mine, other, theirs, why)
    return None


def in_step(record: Record) -> bool:
    """Whether ranks that have all ended made calls that all matched, and left none for somebody who comes later."""
    return mismatch(record) is None and left_out(record) is None


def left_out(record: Record, ended: Collection[int] | None = None) -> Divergence | None:
    """A call that a member of its group never made, of those that have `ended`: all where it is None."""
    for channel, members in channels(record).items():
        numbers = {rank: len(members.get(rank, ())) for rank in channel[1]}
        most, over = max(numbers, key=numbers.__getitem__), [r for r in numbers if ended is None or r in ended]
        fewest = min(over, key=numbers.__getitem__, default=most)
        if numbers[fewest] < numbers[most]:
            call = record[most][members[most][numbers[fewest]]]
            return Divergence(most, call, fewest, None, "ended without it")
    return None


@lru_cache(maxsize=20000)
def unlike(rank: int, a: Call, other: int, b: Call) -> str:
    """Why two calls that meet cannot match, in words; '' where they do."""
    if a.a_message:
        return _unlike_messages(a, b)
    if a.op != b.op:
        return f"{a.op} cannot meet {b.op}"
    for name in ("dtype", "detail", *(("shape",) if a.op in SAME_SHAPE else ())):
        if getattr(a, name) != getattr(b, name):
            return f"{name} {getattr(a, name)} cannot meet {getattr(b, name)}"
    mine, theirs = a.ranks.index(rank), a.ranks.index(other)
    return _unequal(rank, a.sent[theirs], other, b.taken[mine]) or _unequal(other, b.sent[mine], rank, a.taken[theirs])


def _unequal(sender: int, sent: int, taker: int, taken: int) -> str:
    return "" if sent == taken else f"rank {sender} sends {sent} elements, rank {taker} takes {taken}"


def _unlike_messages(a: Call, b: Call) -> str:
    if {MESSAGES[call.op] for call in (a, b)} != {"send", "recv"}:
        return "a message needs one rank that sends and one that receives"
    if (a.dtype, sum(a.sent + a.taken)) != (b.dtype, sum(b.sent + b.taken)):
        return f"{a.dtype}{list(a.shape)} cannot meet {b.dtype}{list(b.shape)}"
    return ""


# ---- can they go on? -------------------------------------------------------------------------------------------


def standstill(
    record: Record, inside: Mapping[int, int], ended: Mapping[int, str], patient: bool = False
) -> list[Divergence]:
    """Why every rank that has not ended waits for ever, the most telling first; empty where one may still go on.

    `inside`: the index of the call that a rank is in, or has raised or died in; -1 for none, or ON_DEVICE. `ended`:
    done, raised or died. Who waits for its device may be let go by another call than the one that nobody meets yet:
    only to the `patient` is that a reason.
    """
    record = {
        rank: calls[: inside[rank]] if rank in ended and inside[rank] >= 0 else calls for rank, calls in record.items()
    }
    met, live = channels(record), [rank for rank in record if rank not in ended]
    waiting = {rank: _waiting(record, met, rank, inside[rank]) for rank in live}
    found = [_obstacle(record, met, waiting, ended, rank) for rank in live]
    if any(one is None or (inside[one.rank] == ON_DEVICE and not (one.certain or patient)) for one in found):
        return []
    return sorted((one for one in found if one), key=telling)


def telling(one: Divergence) -> int:
    """What cannot be met at all comes first, then two that wait for each other, then who waits for these."""
    return 0 if one.certain else 1 + (one.why == ELSEWHERE)


Waiting = Mapping[int, Sequence[int]]  # by rank: the calls that keep it, as places in its record


def _waiting(record: Record, met: Channels, rank: int, inside: int) -> list[int]:
    """Of the calls that a rank waits for those that not all members of the group have made, or made alike."""
    places = range(len(record[rank])) if inside == ON_DEVICE else [inside] if inside >= 0 else []
    return [place for place in places if any(True for _ in _unmet(record, met, rank, place))]


def _unmet(record: Record, met: Channels, rank: int, place: int) -> Iterator[tuple[int, Call | None, str]]:
    """The members that do not meet a call: with none, or with one that it cannot meet, and why."""
    call = record[rank][place]
    members = met[call.channel]
    turn = members[rank].index(place)
    for other in call.ranks:
        theirs = record[other][members[other][turn]] if len(members.get(other, ())) > turn else None
        if theirs is None:
            yield other, None, ""
        elif other != rank and (why := unlike(rank, call, other, theirs)):
            yield other, theirs, why


def _obstacle(
    record: Record, met: Channels, waiting: Waiting, ended: Mapping[int, str], rank: int
) -> Divergence | None:
    """The member of a group for which this rank waits in vain, the most telling of several."""
    found = (
        _divergence(record, waiting, ended, rank, record[rank][place], *other)
        for place in waiting[rank]
        for other in _unmet(record, met, rank, place)
    )
    return min((one for one in found if one), key=telling, default=None)


def _divergence(
    record: Record,
    waiting: Waiting,
    ended: Mapping[int, str],
    rank: int,
    call: Call,
    other: int,
    theirs: Call | None,
    why: str,
) -> Divergence | None:
    """How a member that does not meet a call explains that its rank waits; None where it may still come."""
    if why or other in ended:
        return Divergence(rank, call, other, theirs, why or ENDED[ended[other]])
    calls = [record[other][place] for place in waiting[other]]
    if not calls:
        return None
    mutual = next((one for one in calls if rank in one.ranks), None)
    return Divergence(rank, call, other, mutual or calls[0], EACH_OTHER if mutual else ELSEWHERE)
