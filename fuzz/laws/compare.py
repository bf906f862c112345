"""What laws share: which part of a reference tensor a rank must hold, when two numbers differ, what can be judged.

Pure functions over a case and observations. Knows the shard map and the partition; no processes, no megatron.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch

from fuzz.case import Case, Observation
from fuzz.laws.pieces import group, owners, places
from toy_models import weights
from toy_models.batching import chunk_positions, padded_width, partition, prompt_lengths
from toy_models.coordinates import coordinates, is_last
from toy_models.spec import Layout, MoEModel

T = TypeVar("T")
TRAINED = ("actor", "critic")
STATES = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}

# Bounds on max|a-b| / max(max|b|, s), where s is FLOOR times the median of max|b| over the tensors of the kind;
# measured noise and reasons stand in docs/tolerances.md. A tensor that is zero in theory carries the rounding of its
# kind: the floor lies as far above that as the bound lies above the rounding of other tensors. 'clipped' holds for
# what follows a clipped step, since megatron accumulates the norm in float32, 6e-8 off.
BOUNDS = {
    "float64": {"forward": 1e-12, "gradient": 1e-11, "clipped": 1e-6, "norm": 1e-6, "step": 1e-11},
    "float32": {"forward": 2e-5, "gradient": 2e-4, "clipped": 2e-4, "norm": 2e-4, "step": 2e-5},
}
FLOOR = {"float64": 1e-3, "float32": 5e-2}
UNIT = {"float64": 2.0**-52, "float32": 2.0**-23}
ROUNDING = {"float64": 1e-15, "float32": 1e-6}  # of a gradient, as a share of the greatest one
# A discrete choice (expert, token, clip branch) nearer than this to its edge may fall either way.
EDGES = {"float64": {"before": 1e-9, "after": 1e-6}, "float32": {"before": 1e-5, "after": 1e-5}}
ILL = 8.0  # times the movement of the reference under a nudge of one unit in the last place
# Where a case is judged by that movement from the start (`Trial.judge`: float32 on GPUs) no bound is set by hand: it is
# FACTOR times the movement of the tensor itself, and at least so many units in the last place of its scale.
DERIVED, FACTOR, UNITS = "derived", 16.0, 32.0


class Finding(NamedTuple):
    """What a law found wrong: where, what was expected, what was seen, in one sentence."""

    witness: str
    expected: str
    observed: str
    sentence: str


class Step(NamedTuple):
    """One optimizer step: of which iteration, which within it, and which mini-batch it trains."""

    iteration: int
    step: int
    mini_batch: int

    @property
    def key(self) -> str:
        return f"{self.iteration}/{self.step}"


def updated(case: Case) -> list[int]:
    """Iterations (rollouts counted from 0) that an Update follows."""
    names = [type(operation).__name__ for operation in case.program]
    return [names[:i].count("Rollout") - 1 for i, name in enumerate(names) if name == "Update"]


def iterations(case: Case) -> range:
    return range(sum(type(operation).__name__ == "Rollout" for operation in case.program))


def steps(case: Case) -> list[Step]:
    """All optimizer steps of the program, in order."""
    per_update = range(case.ppo.epochs * case.ppo.mini_batches)
    return [Step(i, s, s % case.ppo.mini_batches) for i in updated(case) for s in per_update]


def certain_iterations(case: Case, reference: Observation) -> Iterator[int]:
    """Iterations whose routing and all earlier choices lie clear of their edges; the first doubtful one ends them."""
    for i in iterations(case):
        if any(_doubtful(case, reference, step) for step in steps(case) if step.iteration < i):
            return
        if reference.numbers[f"{i}/margin/routing"] < _edge(case, i > 0):
            return
        yield i


def certain_steps(case: Case, reference: Observation) -> Iterator[Step]:
    """Steps before and at which every discrete choice lies clear of its edge."""
    sure = set(certain_iterations(case, reference))
    for step in steps(case):
        if step.iteration not in sure or _doubtful(case, reference, step):
            return
        yield step


def _edge(case: Case, after: bool) -> float:
    return EDGES[case.precision]["after" if after else "before"]


def _doubtful(case: Case, reference: Observation, step: Step) -> bool:
    return reference.numbers[f"{step.key}/margin"] < _edge(case, step.iteration + step.step > 0)


def doubts(case: Case, reference: Observation) -> list[str]:
    """Why some of the case cannot be judged, if so: the first discrete choice that lies too near its edge."""
    found = []
    if len(list(certain_iterations(case, reference))) < len(iterations(case)):
        found.append("routing of a forward pass lies within the noise of a tie")
    elif len(list(certain_steps(case, reference))) < len(steps(case)):
        found.append("routing or clipping in an update lies within the noise of its edge")
    if forced_tokens(case, reference):
        found.append("a sampled token lies within the noise of the next one")
    return found


def forced_tokens(case: Case, reference: Observation) -> dict[int, dict[tuple[int, int], int]]:
    """Per iteration, (row, position) -> the reference's token, where a row is teacher-forced.

    That is from the first position on whose uniform falls within the noise of a step of the CDF.
    """
    return {i: found for i in iterations(case) if (found := _forced(case, reference, i))}


def _forced(case: Case, reference: Observation, iteration: int) -> dict[tuple[int, int], int]:
    margins, mask = reference.tensors[f"{iteration}/margin/rollout"], reference.tensors[f"{iteration}/mask"].bool()
    near = (margins < _edge(case, iteration > 0)) & mask
    if not near.any():
        return {}
    tokens = response_tokens(case, reference.tensors[f"{iteration}/tokens"])
    from_here = near.cumsum(1) > 0
    return {(int(r), int(j)): int(tokens[r, j]) for r, j in from_here.nonzero()}


def response_tokens(case: Case, tokens: torch.Tensor) -> torch.Tensor:
    """Response part [rows, response] of full sequences of all rows, the padding where a row is shorter."""
    starts = torch.tensor(prompt_lengths(case.batch, case.seed))[:, None]
    at = (starts + torch.arange(case.batch.response)).clamp(max=tokens.shape[1] - 1)
    return tokens.gather(1, at)


def rows_of(case: Case, rank: int) -> list[int]:
    """The batch rows that a rank holds, in its order."""
    dp = coordinates(case.layout, rank).dp
    return list(partition(case.layout, case.batch, case.ppo).rows_of(dp))


def rows_in(case: Case, rank: int, step: Step) -> list[int]:
    """The batch rows that a rank trains in one step, in its order."""
    dp = coordinates(case.layout, rank).dp
    micro = partition(case.layout, case.batch, case.ppo).micro[step.mini_batch][dp]
    return [row for rows in micro for row in rows]


def seers(case: Case, ranks: Sequence[Observation]) -> list[Observation]:
    """The ranks of the last pipeline stage, which alone see logits and losses."""
    return [rank for rank in ranks if is_last(case.layout, rank.rank)]


def trained(case: Case, rank: int, rows: Sequence[int]) -> torch.Tensor:
    """Whether each response token of these rows [rows, response] is predicted from a position of the rank's own."""
    width, cp = padded_width(case.layout, case.batch), case.layout.cp
    own = torch.zeros(width, dtype=torch.bool)
    own[chunk_positions(width, cp, coordinates(case.layout, rank).cp)] = True
    starts = torch.tensor(prompt_lengths(case.batch, case.seed))[list(rows), None]
    return own[(starts + torch.arange(case.batch.response) - 1).clamp(max=width - 1)]


def base_of(case: Case, reference: Observation, kind: str) -> float:
    """The bound of a kind before the movement of the reference: as measured, or some units where it is derived."""
    measured = BOUNDS[case.precision][kind]
    return min(measured, UNITS * UNIT[case.precision]) if reference.numbers.get(DERIVED) else measured


def bound_of(reference: Observation, key: str, base: float, scale: float) -> float:
    """The bound on a tensor: the base, or what the reference itself moves by under a nudge, times ILL or FACTOR."""
    times = FACTOR if reference.numbers.get(DERIVED) else ILL
    return max(base, times * reference.numbers.get(f"moved/{key}", 0.0) / max(scale, 1e-300))


def differs(
    mine: torch.Tensor, truth: torch.Tensor, scale: float, bound: float
) -> tuple[float, tuple[int, ...]] | None:
    """The greatest relative difference and where, if above the bound; NaN and infinity differ from everything."""
    gap = (mine.to(torch.float64) - truth.to(torch.float64)).abs() / max(scale, 1e-300)
    gap = gap.nan_to_num(nan=torch.inf, posinf=torch.inf)
    if gap.numel() == 0 or float(gap.max()) <= bound:
        return None
    worst = int(gap.argmax())
    return float(gap.flatten()[worst]), tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), gap.shape))


def compare(
    name: str, rank: int, mine: torch.Tensor, truth: torch.Tensor, scale: float, bound: float
) -> Finding | None:
    """One tensor of one rank against what it must be."""
    if mine.shape != truth.shape:
        shapes = f"{list(truth.shape)}", f"{list(mine.shape)}"
        return Finding(f"rank {rank}, {name}", *shapes, f"{name} has another shape on rank {rank}")
    worst = differs(mine, truth, scale, bound)
    if worst is None:
        return None
    gap, where = worst
    numbers = f"{float(truth[where]):.15g}", f"{float(mine[where]):.15g}"
    witness = f"rank {rank}, {name}, element {list(where)}"
    return Finding(witness, *numbers, f"{name} differs by {gap:.2e} of its scale {scale:.3g}; the bound is {bound:.1e}")


def known_of(case: Case, kind: str, table: Mapping[str, T]) -> dict[str, T]:
    """The tensors of a table that have this kind: all have weights, those that are frozen have no gradient or state."""
    return {name: x for name, x in table.items() if kind == "weight" or not weights.is_frozen(case.ppo.frozen, name)}


def holders(case: Case, role: str) -> Mapping[tuple, list[int]]:
    """(name, slice) -> the ranks that hold it."""
    return _holders(case.model, case.layout, role)


@lru_cache(maxsize=64)
def _holders(model: MoEModel, layout: Layout, role: str) -> Mapping[tuple, list[int]]:
    found: dict[tuple, list[int]] = defaultdict(list)
    for rank in range(layout.world):
        for name, where in weights.held(model, layout, role, rank).items():
            found[name, *((s.start, s.stop) for s in where)].append(rank)
    return found


def summands(case: Case, reference: Observation, iteration: str, role: str) -> float:
    """The size of what a gradient is summed from, and which may cancel to nothing while its rounding stays.

    Advantages (a saturated policy: 1 - p), errors of values, coefficients of the entropy and of balance losses.
    """
    seen = {name: reference.tensors[f"{iteration}/{name}"] for name in ("advantages", "returns", "values")}
    own = seen["advantages"] if role == "actor" else seen["returns"] - seen["values"]
    entropy = abs(case.ppo.entropy_coef) if role == "actor" else 0.0
    return float(own.abs().max()) + entropy + case.model.balance


def scales(case: Case, reference: Observation, prefix: str) -> dict[str, float]:
    """Per tensor of a group of the reference max(max|b|, s): what a difference is measured against."""
    whole = group(reference, prefix)
    greatest = torch.zeros(len(whole.shapes), dtype=torch.float64)
    greatest.scatter_reduce_(0, owners(whole.shapes), whole.flat.abs(), "amax")
    iteration, _, role, kind = prefix.split("/")
    size = summands(case, reference, iteration, role)
    share = {"grad": size, "momentum_buffer": size, "exp_avg": (1 - case.ppo.beta1) * size}
    share["exp_avg_sq"] = (1 - case.ppo.beta2) * size**2
    floor = FLOOR[case.precision] * max(statistics.median(greatest.tolist()), share.get(kind, 0.0))
    return {name: max(value, floor) for name, value in zip(whole.names, greatest.tolist(), strict=True)}


def compare_pieces(
    case: Case, ranks: Sequence[Observation], reference: Observation, role: str, prefix: str, base: float
) -> Finding | None:
    """The first piece of any rank under `prefix` (`0/1/actor/grad`) that differs from its slice of the reference."""
    measure, whole = scales(case, reference, prefix), group(reference, prefix)
    scale = torch.tensor(list(measure.values()), dtype=torch.float64)
    for rank in ranks:
        mine = group(rank, prefix)
        where = places(case, role, rank.rank, mine, whole)
        if where and not _far(mine.flat, whole.flat[where.at], base * scale[where.tensor]):
            continue
        for name, slices in weights.held(case.model, case.layout, role, rank.rank).items():
            if name in measure and (found := _unlike(rank, reference, f"{prefix}/{name}", slices, measure[name], base)):
                return found
    return None


def _far(mine: torch.Tensor, truth: torch.Tensor, bounds: torch.Tensor) -> bool:
    """Whether anything may lie outside the base bound: one pass over all pieces, so that agreement is cheap."""
    return not bool(((mine - truth).abs() <= bounds).all())


def _unlike(
    rank: Observation, reference: Observation, key: str, slices: weights.Slices, scale: float, base: float
) -> Finding | None:
    mine, truth = rank.tensors.get(key), reference.tensors[key][slices]
    if mine is None:
        return Finding(f"rank {rank.rank}, {key}", f"{list(truth.shape)}", "nothing", f"{key} is missing")
    return compare(key, rank.rank, mine, truth, scale, bound_of(reference, key, base, scale))
