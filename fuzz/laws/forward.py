"""Laws of rollout and experience: tokens, logits, log-probs, values and scores are those of the reference."""

from collections.abc import Sequence

import torch

from fuzz.case import Case, Observation, Violation
from fuzz.laws.compare import (
    Finding,
    base_of,
    bound_of,
    certain_iterations,
    compare,
    rows_in,
    rows_of,
    seers,
    steps,
    trained,
)
from toy_models.batching import chunk_positions, padded_width
from toy_models.coordinates import coordinates


def _cut(case: Case, rank: int, name: str, truth: torch.Tensor) -> torch.Tensor:
    """The rows, and for logits the positions and the vocabulary shard, of a rank."""
    rows = truth[rows_of(case, rank)]
    if name != "logits":
        return rows
    width, at = case.model.vocab // case.layout.tp, coordinates(case.layout, rank)
    own = chunk_positions(padded_width(case.layout, case.batch), case.layout.cp, at.cp)
    return rows[:, own, at.tp * width : (at.tp + 1) * width]


def _compare_rows(
    case: Case, ranks: Sequence[Observation], reference: Observation, i: int, names: Sequence[str]
) -> Finding | None:
    base = base_of(case, reference, "clipped" if i > 0 and case.ppo.max_norm else "forward")
    for name in names:
        key = f"{i}/{name}"
        truth = reference.tensors[key]
        # A log-prob is a difference of logits: its rounding is theirs, however near it is to zero.
        scale = max(float(truth.abs().max()), 1.0 if "logp" in name else 0.0)
        bound = bound_of(reference, key, base, scale)
        for rank in seers(case, ranks) if name == "logits" else ranks:
            found = compare(key, rank.rank, rank.tensors[key], _cut(case, rank.rank, name, truth), scale, bound)
            if found:
                return found
    return None


def rollouts_are_the_same_tokens(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Sampled tokens and masks do not depend on the layout: inverse CDF with uniforms keyed by row and position."""
    judged = 0
    for i in certain_iterations(case, reference):
        for rank in ranks:
            for name in ("tokens", "mask"):
                truth = reference.tensors[f"{i}/{name}"][rows_of(case, rank.rank)].long()
                found = compare(f"{i}/{name}", rank.rank, rank.tensors[f"{i}/{name}"].long(), truth, 1.0, 0.0)
                if found:
                    raise Violation(case, "rollouts are the same tokens", *found)
        judged += 1
    return judged


def logits_match_the_reference(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """The actor's logits, every position and vocabulary shard, are those of transformers."""
    judged = 0
    for i in certain_iterations(case, reference):
        found = _compare_rows(case, ranks, reference, i, ["logits"])
        if found:
            raise Violation(case, "logits match the reference", *found)
        judged += 1
    return judged


def log_probs_match_the_reference(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Old and reference log-probs of the sampled tokens are those of transformers, and zero where masked."""
    judged = 0
    for i in certain_iterations(case, reference):
        found = _compare_rows(case, ranks, reference, i, ["old_logp", "ref_logp"])
        if found:
            raise Violation(case, "log-probs match the reference", *found)
        judged += 1
    return judged


def values_and_scores_match_the_reference(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """The critic's values and the reward model's scores are those of transformers, at the right positions."""
    judged = 0
    for i in certain_iterations(case, reference):
        found = _compare_rows(case, ranks, reference, i, ["values", "scores"])
        if found:
            raise Violation(case, "values and scores match the reference", *found)
        judged += 1
    return judged


def _unlike_first(case: Case, ranks: Sequence[Observation], i: int) -> Finding | None:
    step = next(step for step in steps(case) if step.iteration == i)
    for rank in seers(case, ranks):
        held, rows = rows_of(case, rank.rank), rows_in(case, rank.rank, step)
        old = rank.tensors[f"{i}/old_logp"][[held.index(row) for row in rows]] * trained(case, rank.rank, rows)
        new = rank.tensors[f"{step.key}/logp"]
        found = compare(f"{step.key}/logp - old_logp", rank.rank, new - old, torch.zeros_like(old), 1.0, _one(case))
        if found:
            return found
    return None


def _one(case: Case) -> float:
    return 1e-12 if case.precision == "float64" else 1e-5


def ratio_is_one_before_the_first_step(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Before the first optimizer step of an iteration: log-probs equal the old ones, KL 0, clip fraction 0."""
    judged = 0
    if case.model.sinkhorn:
        return 0  # which balances loads in training only
    for i in sorted({step.iteration for step in steps(case)}):
        found = _unlike_first(case, ranks, i)
        if found:
            raise Violation(case, "ratio is one before the first step", *found)
        for rank in ranks:
            kl, clipped = (rank.numbers[f"{i}/0/{name}"] for name in ("approx_kl", "clip_fraction"))
            if abs(kl) > _one(case) or clipped != 0:
                numbers = "KL 0, clip fraction 0", f"KL {kl:.3g}, clip fraction {clipped:.3g}"
                said = Finding(
                    f"rank {rank.rank}, step {i}/0", *numbers, "the first step reports a policy that has moved"
                )
                raise Violation(case, "ratio is one before the first step", *said)
        judged += 1
    return judged
