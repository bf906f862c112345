"""A core attention for context parallelism, chosen in the layer spec: megatron's own local one asserts CP=1.

Keys and values are gathered over CP, then a plain softmax over all positions up to one's own. Knows megatron's process
groups and where a rank's positions lie (`batching.chunk_positions`); no model, no PPO.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig

from toy_models.batching import chunk_positions


class ContextParallelAttention(torch.nn.Module):
    """softmax(q kᵀ / √d) v, causal, over the whole sequence; this rank's queries only. Sinks as in megatron's own.

    query [S/CP, B, heads/TP, d], key and value [S/CP, B, groups/TP, d] -> [S/CP, B, heads/TP * d]. The backward of the
    gather is a reduce-scatter: every rank's queries send gradients back to the keys.
    """

    def __init__(self, config: TransformerConfig, *_: Any, pg_collection: Any = None, **__: Any) -> None:
        super().__init__()
        self.group, self.cp = pg_collection.cp, config.context_parallel_size
        heads, dtype = config.num_attention_heads // config.tensor_model_parallel_size, config.params_dtype
        self.sinks, self.softmax_offset = config.softmax_type != "vanilla", torch.zeros(heads, dtype=dtype)
        if config.softmax_type == "learnable":
            self.softmax_offset = torch.nn.Parameter(self.softmax_offset)
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        width, device = len(query) * self.cp, query.device
        places = [torch.tensor(chunk_positions(width, self.cp, rank), device=device) for rank in range(self.cp)]
        later = torch.cat(places)[None, :] > places[self.group.rank()][:, None]
        keys, values = (self._everybodys(part, query.shape[2]) for part in (key, value))
        scores = torch.einsum("sbhd,tbhd->bhst", query, keys) * query.shape[-1] ** -0.5
        shares = self._shares(scores.masked_fill(later, -torch.inf))
        return torch.einsum("bhst,tbhd->sbhd", shares, values).flatten(2)

    def _shares(self, scores: torch.Tensor) -> torch.Tensor:
        if not self.sinks:
            return scores.softmax(-1)
        sinks = self.softmax_offset.to(scores.device)[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]

    def _everybodys(self, part: torch.Tensor, heads: int) -> torch.Tensor:
        whole = gather_from_sequence_parallel_region(part, group=self.group)
        return whole.repeat_interleave(heads // part.shape[2], dim=2)
