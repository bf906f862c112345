"""Rollouts from the sharded actor: prompts, and tokens that are sampled by inverse CDF, one after the other.

Written from `docs/ppo.md`. Knows no loss. Shapes: R rows of this DP rank, C positions of this CP rank, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from toy_models import batching
from toy_models.megatron import Role
from toy_models.passes import Rollout, evaluate
from toy_models.readings import at_last
from toy_models.releases import ProcessGroupCollection


def _prompts(case: Any, groups: ProcessGroupCollection, iteration: int) -> Rollout:
    batch, pad = case.batch, batching.pad_token(case.model, case.batch)
    rows = batching.partition(case.layout, batch, case.ppo).rows_of(groups.dp.rank())
    prompts = batching.prompt_tokens(case.model, batch, case.seed, iteration)
    tokens = torch.full((len(rows), batching.padded_width(case.layout, batch)), pad)
    for i, row in enumerate(rows):
        tokens[i, : len(prompts[row])] = torch.tensor(prompts[row])
    lengths = torch.tensor([len(prompts[row]) for row in rows])
    mask = torch.zeros(len(rows), batch.response, dtype=torch.bool)
    return Rollout(groups, rows, tokens, mask, lengths, torch.zeros_like(lengths))


def sample(logits_RV: torch.Tensor, uniforms: Sequence[float], temperature: float) -> torch.Tensor:
    """Inverse CDF in float64: the first token whose cumulative probability exceeds the uniform."""
    probabilities = torch.softmax(logits_RV.double() / temperature, dim=-1)
    exceeds = probabilities.cumsum(-1) > torch.tensor(uniforms, dtype=torch.float64)[:, None]
    last = logits_RV.shape[1] - 1 - (probabilities > 0).flip(1).int().argmax(1)
    first = torch.where(exceeds.any(1), exceeds.int().argmax(1), last)
    return torch.minimum(first, last)


def _last_logits(batch: Rollout, logits_RCV: torch.Tensor) -> torch.Tensor:
    return gather_from_tensor_model_parallel_region(at_last(batch, logits_RCV).contiguous(), batch.groups.tp)


def _put(case: Any, rollout: Rollout, drawn_R: torch.Tensor, position: int, iteration: int, forced: Mapping) -> None:
    """Append one token, in place, to every row that has not sampled the end nor met its limit."""
    limits = batching.response_limits(case.batch, case.seed)
    for i, row in enumerate(rollout.rows):
        if not _goes_on(case, rollout, i, position, limits[row]):
            continue
        observed = batching.forced_token(case.model, case.batch, case.seed, iteration, row, position)
        token = forced.get((row, position), int(drawn_R[i])) if observed is None else observed
        rollout.tokens_RW[i, rollout.prompts_R[i] + position] = token
        rollout.mask_RT[i, position] = observed is None
        rollout.responses_R[i] = position + 1


def _goes_on(case: Any, rollout: Rollout, i: int, position: int, limit: int) -> bool:
    if rollout.responses_R[i] < position or position >= limit:
        return False
    last = rollout.tokens_RW[i, rollout.prompts_R[i] + position - 1]
    ended = position > 0 and bool(rollout.mask_RT[i, position - 1]) and last == batching.end_token(case.model)
    return not ended


def roll_out(case: Any, actor: Role, iteration: int, forced: Mapping[tuple[int, int], int]) -> Rollout:
    """Sample responses from the sharded actor. `forced` (row, position) -> token overrides single samples.

    All ranks call the model equally often: experts serve the rows of other DP ranks, so a rank whose rows have
    ended goes on until the longest row of all has. What is drawn and kept is on the CPU, as numbers of a row are.
    """
    rollout = _prompts(case, actor.groups, iteration)
    for position in range(max(batching.response_limits(case.batch, case.seed))):
        logits_RV = evaluate(case, actor, rollout, _last_logits, case.model.vocab)
        uniforms = [batching.uniform("sample", case.seed, iteration, row, position) for row in rollout.rows]
        _put(case, rollout, sample(logits_RV.cpu(), uniforms, case.ppo.temperature), position, iteration, forced)
    return rollout.to(torch.cuda.current_device())
