"""What is read of a model's output: log-probabilities, entropies, values and scores of the tokens of a rollout.

Written from `docs/ppo.md`. Knows no schedule and no loss. Shapes: R rows of this DP rank, W padded width, T greatest
response, V vocabulary; under context parallelism C = W/CP of the positions are a rank's own.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)

from toy_models import batching
from toy_models.passes import Rollout
from toy_models.releases import own_share


def _own(batch: Rollout, at_RT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of these sequence positions are this context-parallel rank's own, and where among them they lie."""
    cp = batch.groups.cp
    places = batching.chunk_positions(batch.tokens_RW.shape[1], cp.size(), cp.rank())
    where_W = torch.full(batch.tokens_RW.shape[1:], -1, device=at_RT.device)
    where_W[places] = torch.arange(len(places), device=at_RT.device)
    return where_W[at_RT] >= 0, where_W[at_RT].clamp(min=0)


def trained(batch: Rollout) -> torch.Tensor:
    """The response tokens [R, T] that were sampled and are predicted from positions of this rank's own."""
    return batch.mask_RT & _own(batch, batch.states_RT)[0]


def _at_states(batch: Rollout, x_RC: torch.Tensor) -> torch.Tensor:
    """What stands where each response token is predicted [R, T], zero where masked or another rank's."""
    own, index = _own(batch, batch.states_RT)
    return torch.where(batch.mask_RT & own, x_RC.gather(1, index), 0.0)


def token_logp(batch: Rollout, logits_RCV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities [R, T] of the response tokens from vocab-parallel logits, zero where masked."""
    own = {"labels": batch.tokens_RW.roll(-1, dims=1)}
    own = own_share(own, batch.groups.cp)
    scaled = (logits_RCV / temperature).transpose(0, 1).contiguous()
    return _at_states(batch, -vocab_parallel_cross_entropy(scaled, own["labels"].t().contiguous()).t())


def token_entropy(batch: Rollout, logits_RCV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Entropies [R, T] of the sampling distributions from vocab-parallel logits, zero where masked.

    As a sum of -p·log p: log(total) - moment/total loses all digits where a policy is all but certain.
    """
    scaled, tp = logits_RCV / temperature, batch.groups.tp
    top = scaled.detach().amax(-1)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tp)
    shifted = scaled - top[..., None]
    total = reduce_from_tensor_model_parallel_region(shifted.exp().sum(-1), tp)
    total = copy_to_tensor_model_parallel_region(total, tp)  # each rank goes on with its part of the vocabulary
    logp = shifted - total.log()[..., None]
    return _at_states(batch, -reduce_from_tensor_model_parallel_region((logp.exp() * logp).sum(-1), tp))


def token_values(batch: Rollout, output_RC1: torch.Tensor) -> torch.Tensor:
    """The critic's values [R, T] of the states before the response tokens, zero where masked."""
    return _at_states(batch, output_RC1.squeeze(-1))


def at_last(batch: Rollout, x_RCF: torch.Tensor) -> torch.Tensor:
    """What stands at the last token of each row [R, F]; zero where that is another rank's."""
    own, index = _own(batch, (batch.prompts_R + batch.responses_R - 1)[:, None])
    return torch.where(own, x_RCF.gather(1, index[..., None].expand(-1, 1, x_RCF.shape[2])).squeeze(1), 0.0)


def last_score(batch: Rollout, output_RC1: torch.Tensor) -> torch.Tensor:
    """The reward model's output [R] at the last token of each row."""
    return at_last(batch, output_RC1).squeeze(1)
