"""Which part of a traced tensor of the reference a rank must hold, by row and position, and for experts copy by copy.

Pure functions over a case, the partition and coordinates. Padding is aligned as any token: both sides give it the same
tokens and route it. A rank has the modules of its pipeline stages and, under context parallelism, some of the
positions. Of these self-attention, plain MLPs and the token logits see all and are cut by features (heads, width,
vocabulary); everything else sees a share of them under TP, which is sequence parallel then.
"""

from collections import Counter
from typing import NamedTuple

import torch

from fuzz import modules
from fuzz.case import Case, Observation
from fuzz.laws.compare import Step, rows_in
from toy_models.batching import chunk_positions, padded_width, partition
from toy_models.coordinates import coordinates, is_first, is_last, layers_on

FIRST = Step(0, 0, 0)


def cut(case: Case, rank: int, role: str, module: str, truth: torch.Tensor) -> torch.Tensor:
    """The rows, positions and features [rows, S, F] of a tensor [R, W, F] that a rank holds."""
    at, tp = coordinates(case.layout, rank), case.layout.tp
    part = truth[rows_in(case, rank, FIRST)][:, _positions(case, rank)]
    if module == "output_layer" and role == "critic":
        return part
    if module.endswith(modules.HALVES):
        return part.unflatten(2, (2, -1)).chunk(tp, dim=3)[at.tp].flatten(2)
    if module.endswith(modules.BY_GROUP) and case.model.kv_heads < tp:
        return part.chunk(case.model.kv_heads, dim=2)[at.tp * case.model.kv_heads // tp]
    by_feature = module == "output_layer" or module.endswith(modules.BY_FEATURE)
    return part.chunk(tp, dim=2 if by_feature else 1)[at.tp]


def holds(case: Case, rank: int, module: str) -> bool:
    """Whether a module lies on the pipeline stages of a rank."""
    layer = modules.layer_of(module)
    if layer is not None:
        return layer in layers_on(case.layout, case.model.layers, rank)
    return is_first(case.layout, rank) if module == "embedding" else is_last(case.layout, rank)


def sharing(case: Case, rank: int, module: str) -> list[int]:
    """The ranks whose gradients add up to that of a module's output: TP ranks that share a query group, by its key."""
    share = case.layout.tp // case.model.kv_heads
    if not module.endswith(modules.BY_GROUP) or share <= 1:
        return [rank]
    here = coordinates(case.layout, rank)
    places = {other: coordinates(case.layout, other) for other in range(case.layout.world)}
    row = {other: at.tp // share for other, at in places.items() if at[1:4] == here[1:4]}  # of the same cp, dp and pp
    return [other for other, group in row.items() if group == here.tp // share]


def _positions(case: Case, rank: int) -> list[int]:
    """The positions of a row that a rank has before sequence parallelism, in its order."""
    cp = coordinates(case.layout, rank).cp
    return chunk_positions(padded_width(case.layout, case.batch), case.layout.cp, cp)


def _share(case: Case, rank: int) -> list[int]:
    """The positions of a row that a rank has in the residual stream and sends to experts, in its order."""
    positions, at = _positions(case, rank), coordinates(case.layout, rank)
    size = len(positions) // case.layout.tp
    return positions[at.tp * size : (at.tp + 1) * size]


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
    batch = partition(case.layout, case.batch, case.ppo).micro[0][at.dp][micro]
    return Copy(batch[index % rows], _share(case, source)[index // rows], expert)


def due(case: Case, rank: int, chosen: torch.Tensor) -> set[Copy]:
    """The copies that must arrive at a rank: those for its experts from all ranks of its expert-parallel group.

    `chosen` [R, W, K]: the reference's experts.
    """
    here, local = coordinates(case.layout, rank), case.model.experts // case.layout.ep
    found = set()
    for source in range(case.layout.world):
        at = coordinates(case.layout, source)
        if (at.edp, at.pp) == (here.edp, here.pp):
            found |= {c for c in _sent(case, source, chosen) if c.expert // local == here.ep}
    return found


def _sent(case: Case, source: int, chosen: torch.Tensor) -> set[Copy]:
    places = ((row, position) for row in rows_in(case, source, FIRST) for position in _share(case, source))
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
