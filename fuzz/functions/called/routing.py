"""How the routing functions of moe_utils are called."""

from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from torch import Tensor


def topk_routing_with_score_function(here: Any, logits: Tensor, expert_bias: Tensor | None = None) -> Any:
    groups, chosen = here.call["groups"] or (None, None)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(here.call["deterministic"])
    try:
        return moe_utils.topk_routing_with_score_function(
            logits,
            here.call["topk"],
            use_pre_softmax=here.call["pre_softmax"],
            num_groups=groups,
            group_topk=chosen,
            scaling_factor=here.call["scaling"],
            score_function=here.call["score_function"],
            expert_bias=None if expert_bias is None else expert_bias.detach(),
        )
    finally:
        torch.use_deterministic_algorithms(before)


def group_limited_topk(here: Any, logits: Tensor) -> Any:
    tokens, experts = logits.shape
    return moe_utils.group_limited_topk(logits, here.call["topk"], tokens, experts, *here.call["groups"])


def compute_routing_scores_for_aux_loss(here: Any, logits: Tensor, padding_mask: Tensor | None = None) -> Any:
    return moe_utils.compute_routing_scores_for_aux_loss(
        logits, here.call["topk"], here.call["score_function"], padding_mask=padding_mask
    )


def apply_router_token_dropping(here: Any, probs: Tensor, routing_map: Tensor) -> Any:
    return moe_utils.apply_router_token_dropping(
        probs,
        routing_map,
        here.call["topk"],
        here.call["factor"],
        drop_policy=here.call["policy"],
        pad_to_capacity=here.call["pad"],
    )


def get_capacity(here: Any) -> int:
    call = here.call
    return moe_utils.get_capacity(call["tokens"], call["experts"], call["factor"], call["least"])


def pad_routing_map(here: Any, routing_map: Tensor) -> Tensor:
    return moe_utils.pad_routing_map(routing_map, here.call["multiple"])


def router_gating_linear(here: Any, inp: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return moe_utils.router_gating_linear(inp, weight, bias, getattr(torch, here.call["router_dtype"]))


def sinkhorn(here: Any, cost: Tensor) -> Tensor:
    return moe_utils.sinkhorn(cost)
