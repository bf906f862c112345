"""How the functions of moe_utils that move tokens are called."""

from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from fuzz.functions.called.dispatchers import allgather as allgather
from fuzz.functions.called.dispatchers import alltoall as alltoall
from fuzz.functions.permutation import capacity


def permute(here: Any, tokens: Tensor, routing_map: Tensor, probs: Tensor | None = None) -> Any:
    pad = here.call["pad"]
    number = capacity(here.call, here.rank) * here.call["experts"] if pad else int(routing_map.sum())
    return moe_utils.permute(tokens, routing_map, probs=probs, num_out_tokens=number, drop_and_pad=pad)


def unpermute(here: Any, permuted: Tensor, indices: Tensor, routing_map: Tensor, probs: Tensor | None = None) -> Tensor:
    shape = torch.Size((here.call.rows[here.rank], here.call["hidden"]))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(here.call["deterministic"])
    try:
        return moe_utils.unpermute(
            permuted, indices, shape, probs=probs, routing_map=routing_map, drop_and_pad=here.call["pad"]
        )
    finally:
        torch.use_deterministic_algorithms(before)


def sort_chunks_by_idxs(
    here: Any, x: Tensor, split_sizes: Tensor, sorted_idxs: Tensor, probs: Tensor | None = None
) -> Any:
    return moe_utils.sort_chunks_by_idxs(x, split_sizes, sorted_idxs, probs=probs)
