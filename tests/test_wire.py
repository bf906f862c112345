"""The CPU platform's process group: the same as Gloo, bit by bit, what Gloo lacks, and loud where ranks disagree."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from fuzz.group import reduced
from fuzz.ranks import Ranks

SELF = "tests.on_wire"
DTYPES = ("float64", "float32", "bfloat16", "int64", "uint8")


def pool(world: int) -> Ranks:
    return Ranks(world, start=f"{SELF}:start", preload=("torch", SELF))


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = pool(4)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("which", [0, 1], ids=["world", "half"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_collectives_are_those_of_gloo(four: Ranks, dtype: str, which: int) -> None:
    gloo, wire = (four.run(f"{SELF}:collectives", backend, dtype, which) for backend in ("gloo", "wire"))
    for theirs, ours in zip(gloo, wire, strict=True):
        assert theirs.outcome == ours.outcome == "done", (theirs.error, ours.error)
        assert theirs.facts["objects"] == ours.facts["objects"]
        assert theirs.tensors.keys() == ours.tensors.keys() and len(ours.tensors) == 8
        for name, tensor in theirs.tensors.items():
            assert torch.equal(tensor, ours.tensors[name]), (dtype, name, tensor, ours.tensors[name])


def test_means_and_uneven_parts(four: Ranks) -> None:
    for me, rank in enumerate(four.run(f"{SELF}:lacking_in_gloo")):
        assert rank.tensors["mean"].tolist() == [1.5, 1.0]
        assert rank.tensors["gathered"].tolist() == [0.0] + [1.0] * 2 + [2.0] * 3 + [3.0] * 4
        assert rank.tensors["scattered"].tolist() == [1.0 + 2.0 + 3.0 + 4.0] * (me + 1)


def test_more_than_a_socket_holds(four: Ranks) -> None:
    for rank in four.run(f"{SELF}:large", 2**18):  # 2 MiB to each other rank
        assert rank.numbers == {"wrong": 0, "little": 4.0}, rank


def test_nothing_has_come_before_it_is_waited_for(four: Ranks) -> None:
    for me, rank in enumerate(four.run(f"{SELF}:asynchronous")):
        assert rank.tensors["early"].tolist() == [1.0] * 3 + [0.0] * 6
        assert rank.tensors["late"].tolist() == [4.0] * 3 + [1.0, 2.0, 3.0, 4.0] + [8.0 * me, 8.0 * me + 4]


def test_groups_do_not_mix(four: Ranks) -> None:
    assert four.run(f"{SELF}:two_channels")[1].tensors["got"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("waited for", []),
        ("freed", ["the memory of a tensor of 16 bytes was given back while it was sent to rank 1"]),
        ("changed", ["a tensor of 16 bytes was changed while it was sent to rank 1"]),
    ],
)
def test_a_tensor_touched_while_sent(four: Ranks, how: str, said: list[str]) -> None:
    seen = four.run(f"{SELF}:touched", how)
    assert seen[0].facts == {"sent": 1, "touched": said} and seen[1].facts == {"sent": 0, "touched": []}


def test_unequal_sizes_and_deaths_are_told() -> None:
    two = pool(2)
    try:
        first, second = two.run(f"{SELF}:unequal")
        assert "rank 1 sent 12 bytes where 16 are taken" in first.error
        assert "rank 0 sent 16 bytes where 12 are taken" in second.error
        first, second = two.run(f"{SELF}:leaves")
        assert (first.outcome, second.outcome) == ("raised", "hung") and "barrier" in str(second.calls or second.facts)
    finally:
        two.close()


@pytest.mark.parametrize("ranks", [2, 5, 8])
@pytest.mark.parametrize("op", [dist.ReduceOp.SUM, dist.ReduceOp.AVG])
def test_a_sum_does_not_hang_on_where_in_a_buffer_it_lies(ranks: int, op: dist.ReduceOp) -> None:
    """Buckets cut the same gradients differently; the last bit of each must stay."""
    parts = torch.randn(ranks, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = reduced(parts, op)
    for cut in range(1, 50):
        assert torch.equal(whole, torch.cat([reduced(parts[:, :cut], op), reduced(parts[:, cut:], op)])), cut
