"""Which part of a traced tensor of the reference a rank must hold, by row and position, and for experts copy by copy.

Pure functions over a case, the partition and coordinates. Padding is aligned as any token: both sides give it the same
tokens and route it. Only self-attention and the token logits are cut by features (heads, vocabulary) and see all
positions; everything else sees a share of the positions under TP, which is sequence parallel then.
"""

from collections import Counter
from typing import NamedTuple

import torch

from fuzz import modules
from fuzz.case import Case, Observation
from fuzz.laws.compare import Step, rows_in
from toy_models.batching import padded_width, partition
from toy_models.coordinates import coordinates

FIRST = Step(0, 0, 0)


def cut(case: Case, rank: int, role: str, module: str, truth: torch.Tensor) -> torch.Tensor:
    """The rows, positions and features [rows, S, F] of a tensor [R, W, F] that a rank holds."""
    tp, part = coordinates(case.layout, rank).tp, truth[rows_in(case, rank, FIRST)]
    if module == "output_layer" and role == "critic":
        return part
    by_feature = module == "output_layer" or module.endswith(modules.BY_FEATURE)
    return part.chunk(case.layout.tp, dim=2 if by_feature else 1)[tp]


class Copy(NamedTuple):
    """A token's copy for one expert: where the token stands, and which expert."""

    row: int
    position: int
    expert: int


def arrived(case: Case, rank: Observation, role: str, layer: str) -> list[Copy | None]:
    """The copies at the experts of a rank, in its order; None for what no token is."""
    first = coordinates(case.layout, rank.rank).ep * (case.model.experts // case.layout.ep)
    table = rank.tensors[f"copies/{role}/{layer}"].tolist()
    return [_copy(case, micro, source, index, first + expert) for micro, source, index, expert in table]


def _copy(case: Case, micro: int, source: int, index: int, expert: int) -> Copy | None:
    """Of token `index` of a rank: its tokens lie position after position, row after row in each."""
    if not 0 <= source < case.layout.world:
        return None
    at, rows = coordinates(case.layout, source), case.batch.micro_rows
    share = padded_width(case.layout, case.batch) // case.layout.tp
    batch = partition(case.layout, case.batch, case.ppo).micro[0][at.dp][micro]
    return Copy(batch[index % rows], at.tp * share + index // rows, expert)


def due(case: Case, rank: int, chosen: torch.Tensor) -> set[Copy]:
    """The copies that must arrive at a rank: those for its experts from all ranks of its expert-parallel group.

    `chosen` [R, W, K]: the reference's experts.
    """
    here, local = coordinates(case.layout, rank), case.model.experts // case.layout.ep
    found = set()
    for source in range(case.layout.world):
        if coordinates(case.layout, source).edp == here.edp:
            found |= {c for c in _sent(case, source, chosen) if c.expert // local == here.ep}
    return found


def _sent(case: Case, source: int, chosen: torch.Tensor) -> set[Copy]:
    share = padded_width(case.layout, case.batch) // case.layout.tp
    first = coordinates(case.layout, source).tp * share
    places = ((row, position) for row in rows_in(case, source, FIRST) for position in range(first, first + share))
    return {Copy(row, position, expert) for row, position in places for expert in chosen[row, position].tolist()}


def misplaced(copies: list[Copy | None], wanted: set[Copy]) -> str:
    """What is wrong with the copies that arrived, in words; empty where each came once."""
    counts = Counter(copies)
    lost, more = sorted(wanted - set(copies)), [copy for copy in counts if copy not in wanted or counts[copy] > 1]
    said = [f"{len(lost)} of {len(wanted)} copies do not arrive, first {_said(lost[0])}"] if lost else []
    return " and ".join(said + ([f"{len(more)} arrive that should not, first {_said(more[0])}"] if more else []))


def _said(copy: Copy | None) -> str:
    return f"row {copy.row}, position {copy.position} for expert {copy.expert}" if copy else "one that no token is"


def of_copies(
    case: Case, rank: int, copies: list[Copy | None], chosen: torch.Tensor, truth: torch.Tensor
) -> torch.Tensor:
    """What [R, W, K, P, F] says of each copy [copies, F]; NaN where the reference did not choose that expert."""
    part, found = coordinates(case.layout, rank).etp, truth.new_full((len(copies), truth.shape[-1]), torch.nan)
    for at, copy in ((at, copy) for at, copy in enumerate(copies) if copy):
        for k in (chosen[copy.row, copy.position] == copy.expert).nonzero().flatten().tolist():
            found[at] = truth[copy.row, copy.position, k, part]
    return found
