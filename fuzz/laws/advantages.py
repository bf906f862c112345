"""Laws of rewards and advantages, judged from what the system itself observed just before, by closed forms."""

from collections.abc import Sequence

import torch

from fuzz.case import Case, Observation, Violation
from fuzz.laws.compare import BOUNDS, compare, iterations, rows_of
from toy_models.coordinates import coordinates


def _rewards(case: Case, seen: dict[str, torch.Tensor]) -> torch.Tensor:
    """R = -kl_coef·(old - ref) on the mask, plus the score at the last sampled token."""
    rewards = -case.ppo.kl_coef * (seen["old_logp"] - seen["ref_logp"]) * seen["mask"]
    for row, mask in enumerate(seen["mask"]):
        for last in mask.nonzero().flatten()[-1:]:  # none where nothing was sampled, which breaks another law
            rewards[row, last] += seen["scores"][row]
    return rewards


def _closed_form(case: Case, rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A_k = sum over l of (gamma·lam)^l · delta_(k+l), over the sampled positions of one row."""
    at = mask.nonzero().flatten()
    v = values[at]
    following = torch.cat([v[1:], v.new_zeros(1)])
    delta = rewards[at] + case.ppo.gamma * following - v
    steps = torch.arange(len(at))
    power = (steps[None, :] - steps[:, None]).clamp(min=0).double()
    decay = torch.where(steps[None, :] >= steps[:, None], (case.ppo.gamma * case.ppo.lam) ** power, 0.0)
    return torch.zeros_like(rewards).index_copy(0, at, decay @ delta)


def _seen(rank: Observation, i: int) -> dict[str, torch.Tensor]:
    names = ("old_logp", "ref_logp", "values", "scores", "rewards", "advantages", "returns", "mask")
    return {name: rank.tensors[f"{i}/{name}"].double() for name in names}


def rewards_and_returns_match_a_closed_form(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Token rewards and returns follow from observed log-probs, scores, values and mask; masked places leak nothing."""
    bound = BOUNDS[case.precision]["forward"]
    for i in iterations(case):
        for rank in ranks:
            seen = _seen(rank, i)
            rewards = _rewards(case, seen)
            parts = zip(rewards, seen["values"], seen["mask"].bool(), strict=True)
            returns = torch.stack([_closed_form(case, *row) for row in parts]) + seen["values"] * seen["mask"]
            for name, due in (("rewards", rewards), ("returns", returns)):
                scale = max(1.0, float(due.abs().max()))
                found = compare(f"{i}/{name}", rank.rank, seen[name], due, scale, bound)
                if found:
                    raise Violation(case, "rewards and returns match a closed form", *found)
    return len(iterations(case))


def _whole_batch(case: Case, ranks: Sequence[Observation], i: int) -> dict[str, torch.Tensor]:
    """The observed arrays of all rows, from one rank of each DP coordinate."""
    first = {coordinates(case.layout, rank.rank).dp: rank for rank in reversed(ranks)}
    order = torch.tensor([row for dp in sorted(first) for row in rows_of(case, first[dp].rank)]).argsort()
    parts = [_seen(first[dp], i) for dp in sorted(first)]
    return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}


def _advantages(case: Case, seen: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Advantages due, and the scale of their rounding: whitening divides that of returns - values by the deviation."""
    mask = seen["mask"]
    plain = (seen["returns"] - seen["values"]) * mask
    summands = float((seen["returns"].abs() + seen["values"].abs()).max())
    if not case.ppo.whiten:
        return plain, summands
    centred = (plain - plain.sum() / mask.sum()) * mask
    deviation = ((centred**2).sum() / mask.sum() + 1e-8).sqrt()
    return centred / deviation, summands / float(deviation)


def advantages_are_whitened_over_the_whole_batch(
    case: Case, ranks: Sequence[Observation], reference: Observation
) -> int:
    """Advantages are returns minus values; whitening is over the masked-in tokens of all DP ranks."""
    bound = BOUNDS[case.precision]["forward"]
    for i in iterations(case):
        due, rounding = _advantages(case, _whole_batch(case, ranks, i))
        scale = max(1.0, float(due.abs().max()), rounding)
        for rank in ranks:
            mine = _seen(rank, i)["advantages"]
            found = compare(f"{i}/advantages", rank.rank, mine, due[rows_of(case, rank.rank)], scale, bound)
            if found:
                raise Violation(case, "advantages are whitened over the whole batch", *found)
    return len(iterations(case)) if case.ppo.whiten else 0
