"""The router's formulas of `docs/ppo.md`: which experts a token goes to, with which gates, and how near the choice was.

Plain loops over tokens, for the reference and for the law that judges routers. Knows no module, no layout, no library
but torch. Shapes: N tokens, E experts, K chosen per token.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from toy_models.spec import MoEModel

TINY = 1e-300  # below every score: a division by it says that two zeros are a tie


class Choice(NamedTuple):
    """The `experts` [N, K] of each token, and the `margin` [N] by which the nearest discrete choice was made.

    Logits differ by a margin; scores (probabilities, sigmoids with their biases) by a share of their size.
    """

    experts: torch.Tensor
    margin: torch.Tensor


def choose(model: MoEModel, logits_NE: torch.Tensor, bias_E: torch.Tensor | None = None) -> Choice:
    """The top_k experts of the greatest scores, in the groups of the greatest scores where groups are limited."""
    scores, sizes = _scores(model, logits_NE.detach().double(), bias_E)
    found = [_choose(model, *token) for token in zip(scores.tolist(), sizes.tolist(), strict=True)]
    experts = torch.tensor([experts for experts, _ in found], dtype=torch.int64).reshape(-1, model.top_k)
    return Choice(experts, torch.tensor([margin for _, margin in found], dtype=torch.float64))


def balanced(model: MoEModel, logits_NE: torch.Tensor, shards: Sequence[torch.Tensor]) -> Choice:
    """The top_k experts of the greatest scores that Sinkhorn's iteration makes of the logits of each shard.

    Where it nearly ended one step sooner or later, scores are sure to a ten-thousandth only.
    """
    experts = torch.zeros(len(logits_NE), model.top_k, dtype=torch.int64)
    margin = torch.full((len(logits_NE),), float("inf"), dtype=torch.float64)
    for shard in shards:
        scores, stop = _doubly_stochastic(logits_NE.detach()[shard].double())
        for token, row in zip(shard.tolist(), scores.tolist(), strict=True):
            chosen, near = _best(model.top_k, list(range(model.experts)), row, row)
            experts[token], margin[token] = torch.tensor(chosen), min(near, max(stop, near / 1000))
    return Choice(experts, margin)


def _doubly_stochastic(logits_nE: torch.Tensor) -> tuple[torch.Tensor, float]:
    """exp(logits) with rows and columns scaled in turn until all rows, and nearly all columns, have one sum.

    Ends when the columns' factors move by no more than 1e-4 on average (S-BASE, arXiv:2103.16716; megatron
    `moe_utils.sinkhorn`). Also how near to that bound, as a share of the factors, it came.
    """
    costs, columns, moved, nearest = (
        logits_nE.exp(),
        torch.ones(logits_nE.shape[1]).double(),
        float("inf"),
        float("inf"),
    )
    while moved > 1e-4:
        rows = 1 / (len(costs) * ((costs * columns).sum(1) + 1e-8))
        former, columns = columns, 1 / (costs.shape[1] * ((costs * rows[:, None]).sum(0) + 1e-8))
        moved = (former - columns).abs().mean().item()
        nearest = min(nearest, abs(moved - 1e-4) / max(1.0, columns.mean().item()))
    return costs * columns * rows[:, None], nearest


def counted(model: MoEModel, logits_NE: torch.Tensor) -> Choice:
    """The experts for which balance losses count a token: of the greatest logits, whatever biases and groups say."""
    return choose(replace(model, expert_bias=0.0, bias_rate=0.0, group_topk=0), logits_NE)


def _scores(model: MoEModel, logits: torch.Tensor, bias_E: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What experts are chosen by, and against which size a difference counts."""
    if model.score == "sigmoid":
        scores = logits.sigmoid()
        return (scores, scores) if bias_E is None else (scores + bias_E, scores + bias_E.abs())
    if model.norm_topk_prob or not model.group_topk:  # softmax keeps the order of logits
        return logits, torch.ones_like(logits)
    return logits.softmax(-1), logits.softmax(-1)


def _choose(model: MoEModel, scores: list[float], sizes: list[float]) -> tuple[list[int], float]:
    if not model.group_topk:
        return _best(model.top_k, list(range(model.experts)), scores, sizes)
    size = model.experts // model.expert_groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(model.expert_groups)]
    counts = model.top_k // model.group_topk  # experts by which a group is judged
    best = [sorted(some, key=lambda e: -scores[e])[:counts] for some in members]
    of_groups = [[sum(values[e] for e in some) for some in best] for values in (scores, sizes)]
    groups, among_groups = _best(model.group_topk, list(range(model.expert_groups)), *of_groups)
    experts, among_experts = _best(model.top_k, [e for g in groups for e in members[g]], scores, sizes)
    return experts, min(among_groups, among_experts)


def _best(number: int, some: list[int], scores: list[float], sizes: list[float]) -> tuple[list[int], float]:
    """So many of the greatest score, and the distance of the last of them to the next, as a share of their size."""
    ranked = sorted(some, key=lambda e: -scores[e])
    if number == len(some):
        return ranked, float("inf")
    last, next_ = ranked[number - 1], ranked[number]
    return ranked[:number], (scores[last] - scores[next_]) / max(sizes[last], sizes[next_], TINY)


def gates(model: MoEModel, logits_NE: torch.Tensor, experts_NK: torch.Tensor) -> torch.Tensor:
    """The weights [N, K] of the chosen experts' outputs: biases choose and weigh nothing."""
    if model.score == "sigmoid":
        scores = logits_NE.sigmoid().gather(1, experts_NK)
        found = scores / (scores.sum(-1, keepdim=True) + 1e-20) if model.top_k > 1 else scores
    elif model.sinkhorn and model.top_k == 1:
        found = logits_NE.sigmoid().gather(1, experts_NK)
    elif model.norm_topk_prob:
        found = logits_NE.gather(1, experts_NK).softmax(-1)
    else:
        found = logits_NE.softmax(-1).gather(1, experts_NK)
    return found * model.scaling


def dropped(
    model: MoEModel, gates_NK: torch.Tensor, experts_NK: torch.Tensor, shards: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, float]:
    """Which copies [N, K] their experts have no room for, and the margin, as a share, by which the nearest was judged.

    A shard has the tokens that one rank routes at a time, in order: of these an expert takes
    ceil(tokens * K / E * capacity), those of the greatest gates or, by position, the first, which is no close choice.
    """
    gone, margin = torch.zeros_like(experts_NK, dtype=torch.bool), float("inf")
    for shard in shards:
        room = math.ceil(len(shard) * model.top_k / model.experts * model.capacity)
        gates, experts = gates_NK.detach()[shard].double(), experts_NK[shard]
        for expert in range(model.experts):
            copies = (experts == expert).nonzero().tolist()
            by_position = model.drops == "position"
            ranked = sorted((-n if by_position else gates[n, k].item(), n, k) for n, k in copies)[::-1]
            for _, n, k in ranked[room:]:
                gone[shard[n], k] = True
            if len(ranked) > room and not by_position:
                last, next_ = ranked[room - 1][0], ranked[room][0]
                margin = min(margin, (last - next_) / max(last, TINY))
    return gone, margin


def shares(model: MoEModel, logits_NE: torch.Tensor) -> torch.Tensor:
    """Each expert's share [N, E] of a token, as balance losses count it: scores that add up to one."""
    if model.score == "sigmoid":
        scores = logits_NE.sigmoid()
        return scores / (scores.sum(-1, keepdim=True) + 1e-20)
    return logits_NE.softmax(-1)
