"""Differences of a traced step between ranks and reference, module by module, as rows of numbers with their bounds.

Pure functions on observations. Bounds and scales are those of the laws (`docs/tolerances.md`). Knows no processes and
no megatron.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from fuzz import alignment, modules
from fuzz.alignment import FIRST
from fuzz.case import Case, Observation
from fuzz.laws.compare import (
    BOUNDS,
    FLOOR,
    TRAINED,
    bound_of,
    differs,
    known_of,
    rows_in,
    rows_of,
    scales,
    summands,
    trained,
)
from fuzz.laws.updates import _base
from toy_models import weights
from toy_models.coordinates import is_last

FORWARD, BACKWARD, GRADIENTS, WEIGHTS = PHASES = ("forward", "backward", "parameter gradients", "updated weights")
EXPERIENCE = ("old_logp", "ref_logp", "values", "scores", "rewards", "advantages", "returns")
LOSSES = {"actor": ("policy_loss", "entropy"), "critic": ("value_loss",)}
Gap = tuple[float, float]  # a relative difference and the bound on it


@dataclass(frozen=True)
class Row:
    """One module in one phase: the relative difference of each rank, None where a rank holds nothing of it."""

    phase: str
    module: str
    differences: tuple[float | None, ...]
    bounds: tuple[float, ...]
    note: str = ""

    @property
    def bound(self) -> float:
        return max(self.bounds)

    @property
    def above(self) -> list[int]:
        """The ranks whose difference is above their bound."""
        pairs = enumerate(zip(self.differences, self.bounds, strict=True))
        return [rank for rank, (gap, bound) in pairs if gap is not None and gap > bound]

    @property
    def greatest(self) -> float:
        return max((gap for gap in self.differences if gap is not None), default=0.0)


def rows(case: Case, ranks: Sequence[Observation], truth: Observation) -> tuple[Row, ...]:
    """All rows in causal order: forward, what the rollout gave, losses; backward; parameters; their new weights."""
    there = [name for name in modules.names(case.model) if f"forward/actor/{name}" in truth.tensors]
    forward = [_activation(case, ranks, truth, FORWARD, role, name) for role in TRAINED for name in there]
    forward += [*_rollout(case, ranks, truth), *_experience(case, ranks, truth), *_losses(case, ranks, truth)]
    backward = [_activation(case, ranks, truth, BACKWARD, role, name) for role in TRAINED for name in there[::-1]]
    kinds = {"grad": GRADIENTS, "weight": WEIGHTS}
    after = [row for k, phase in kinds.items() for r in TRAINED for row in _parameters(case, ranks, truth, r, k, phase)]
    return (*forward, *backward, *after)


def _row(phase: str, module: str, gaps: Iterable[Gap | None], note: str = "") -> Row:
    found = list(gaps)
    bound = max((gap[1] for gap in found if gap), default=0.0)
    differences, bounds = ([gap[i] if gap else other for gap in found] for i, other in ((0, None), (1, bound)))
    return Row(phase, module, tuple(differences), tuple(b or 0.0 for b in bounds), note)


def _gap(mine: torch.Tensor | None, due: torch.Tensor, scale: float) -> float | None:
    """The greatest relative difference; infinite where shapes differ or anything is NaN, None where nothing is."""
    if mine is None or mine.shape != due.shape:
        return torch.inf
    worst = differs(mine, due, scale, -1.0)
    return None if worst is None else worst[0]


def _worst(gaps: Iterable[Gap]) -> Gap | None:
    """The one that uses most of its bound."""
    return max(gaps, key=lambda gap: gap[0] / max(gap[1], 1e-300), default=None)


# ---- outputs and their gradients -------------------------------------------------------------------------------


def _activation(case: Case, ranks: Sequence[Observation], truth: Observation, kind: str, role: str, name: str) -> Row:
    key, scale = f"{kind}/{role}/{name}", _scale(case, truth, kind, role, name)
    bound = bound_of(truth, key, BOUNDS[case.precision]["forward" if kind == FORWARD else "gradient"], scale)
    gaps: list[Gap | None] = []
    notes = []
    # DDP averages over DP and CP, so that each rank's loss, and what comes back from it, is that often its share.
    times = case.layout.dp * case.layout.cp if kind == BACKWARD else 1
    for rank in ranks:
        if not alignment.holds(case, rank.rank, name):
            gaps.append(None)
            continue
        due, note = _due(case, rank, truth, role, name, truth.tensors[key])
        mine = _mine(case, ranks, rank, kind, key)
        gap = torch.inf if note and kind == FORWARD else _gap(mine, times * due, times * scale)
        gaps.append(None if gap is None else (gap, bound))
        if kind == BACKWARD:
            note = "its output carries no gradient" if name in rank.facts[f"{role}/detached"] else ""
        notes += [f"on rank {rank.rank}, {note}"] if note else []
    return _row(kind, f"{role}/{name}", gaps, "".join(notes[:1]))


def _mine(case: Case, ranks: Sequence[Observation], rank: Observation, kind: str, key: str) -> torch.Tensor | None:
    """What a rank has of a module; of a gradient that several ranks have parts of, their sum."""
    several = alignment.sharing(case, rank.rank, key) if kind == BACKWARD else [rank.rank]
    parts = [ranks[other].tensors[key] for other in several if key in ranks[other].tensors]
    return torch.stack(parts).sum(0) if len(several) > 1 and len(parts) == len(several) else rank.tensors.get(key)


def _due(
    case: Case, rank: Observation, truth: Observation, role: str, name: str, whole: torch.Tensor
) -> tuple[torch.Tensor, str]:
    """What the rank must hold of a module, and what is wrong with the copies of tokens that were sent to it."""
    layer, inside = modules.in_layer(name)
    if inside not in modules.PER_COPY:
        return alignment.cut(case, rank.rank, role, name, whole), ""
    chosen, copies = truth.tensors[f"chosen/{role}/{layer}"], alignment.arrived(case, rank, role, layer)
    due = alignment.of_copies(case, rank.rank, copies, chosen, whole)
    if inside != modules.DISPATCHER:
        return due, ""
    return due, alignment.misplaced(copies, alignment.due(case, rank.rank, chosen))


def _scale(case: Case, truth: Observation, kind: str, role: str, name: str) -> float:
    """max|b|, not less than FLOOR times that of the role's other modules or of what a gradient is summed from."""
    prefix = f"{kind}/{role}/"
    greatest = {key: float(t.abs().max()) for key, t in truth.tensors.items() if key.startswith(prefix)}
    size = summands(case, truth, "0", role) if kind == BACKWARD else 0.0
    return max(greatest[prefix + name], FLOOR[case.precision] * max(median(greatest.values()), size))


# ---- rollout, experience, losses -------------------------------------------------------------------------------


def _rollout(case: Case, ranks: Sequence[Observation], truth: Observation) -> Iterator[Row]:
    """The share of tokens, and of the mask, that is not the reference's."""
    for name in ("tokens", "mask"):
        whole = truth.tensors[f"0/{name}"].long()
        unlike = [rank.tensors[f"0/{name}"].long() != whole[rows_of(case, rank.rank)] for rank in ranks]
        yield _row(FORWARD, f"rollout/{name}", [(float(one.double().mean()), 0.0) for one in unlike])


def _experience(case: Case, ranks: Sequence[Observation], truth: Observation) -> Iterator[Row]:
    for name in EXPERIENCE:
        whole = truth.tensors[f"0/{name}"]
        gaps = [_compared(case, truth, f"0/{name}", rank, whole[rows_of(case, rank.rank)]) for rank in ranks]
        yield _row(FORWARD, f"experience/{name}", gaps)


def _compared(case: Case, truth: Observation, key: str, rank: Observation, due: torch.Tensor) -> Gap:
    # A log-prob is a difference of logits, a reward of scores: their rounding is that of numbers near 1.
    scale = max(1.0, float(truth.tensors[key].abs().max()))
    gap = _gap(rank.tensors.get(key), due, scale)
    return gap or 0.0, bound_of(truth, key, BOUNDS[case.precision]["forward"], scale)


def _losses(case: Case, ranks: Sequence[Observation], truth: Observation) -> Iterator[Row]:
    """New log-probs of the tokens, and the losses that are reported of the mini-batch."""
    for role, names in LOSSES.items():
        size = FLOOR[case.precision] * max(1.0, summands(case, truth, "0", role))
        gaps = []
        for rank in ranks:
            found = [_number(case, truth, f"{FIRST.key}/{name}", rank, size) for name in names]
            if role == "actor" and is_last(case.layout, rank.rank):
                found.append(_log_probs(case, truth, rank))
            gaps.append(_worst(found))
        yield _row(FORWARD, f"{role}/loss", gaps)


def _log_probs(case: Case, truth: Observation, rank: Observation) -> Gap:
    """Of the tokens that the rank predicts: under context parallelism the others are zero."""
    key, rows = f"{FIRST.key}/logp", rows_in(case, rank.rank, FIRST)
    return _compared(case, truth, key, rank, truth.tensors[key][rows] * trained(case, rank.rank, rows))


def _number(case: Case, truth: Observation, key: str, rank: Observation, floor: float, kind: str = "forward") -> Gap:
    due, mine = (torch.tensor(one.numbers[key], dtype=torch.float64) for one in (truth, rank))
    scale = max(float(due.abs()), floor)
    return _gap(mine, due, scale) or 0.0, bound_of(truth, key, BOUNDS[case.precision][kind], scale)


# ---- parameters ------------------------------------------------------------------------------------------------


def _parameters(
    case: Case, ranks: Sequence[Observation], truth: Observation, role: str, kind: str, phase: str
) -> Iterator[Row]:
    prefix, names = f"{FIRST.key}/{role}/{kind}", list(known_of(case, kind, weights.shapes(case.model, role)))
    measure, base = scales(case, truth, prefix), _base(case, truth, FIRST, kind)

    def gap(rank: Observation, name: str) -> Gap:
        key, where = f"{prefix}/{name}", weights.held(case.model, case.layout, role, rank.rank)[name]
        found = _gap(rank.tensors.get(key), truth.tensors[key][where], measure[name])
        return found or 0.0, bound_of(truth, key, base, measure[name])

    for module in modules.names(case.model):
        own = [name for name in names if modules.of_parameter(name) == module]
        held = [[n for n in own if n in weights.held(case.model, case.layout, role, rank.rank)] for rank in ranks]
        if own:
            gaps = [_worst(gap(rank, name) for name in some) for rank, some in zip(ranks, held, strict=True)]
            yield _row(phase, f"{role}/{module}", gaps)
    if kind == "grad":
        yield _norm(case, ranks, truth, role)


def _norm(case: Case, ranks: Sequence[Observation], truth: Observation, role: str) -> Row:
    key, floor = f"{FIRST.key}/{role}_norm", FLOOR[case.precision] * summands(case, truth, "0", role)
    gaps = [_number(case, truth, key, rank, floor, "norm") for rank in ranks]
    return _row(GRADIENTS, f"{role}/{modules.NORM}", gaps)
