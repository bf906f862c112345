"""How the token dispatchers are called: the six steps of a layer, with an echo in place of its experts."""

from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from fuzz.functions.dispatchers import experts, ordered


def _config(here: Any, kind: str) -> TransformerConfig:
    call, layout = here.call, here.call.layout
    return TransformerConfig(
        num_layers=1,
        hidden_size=call["hidden"],
        num_attention_heads=layout.tp,
        kv_channels=1,
        moe_router_pre_softmax=True,
        num_moe_experts=experts(call),
        moe_router_topk=call["topk"],
        moe_token_dispatcher_type=kind,
        moe_expert_capacity_factor=1.0 if call["dropped"] else None,
        tensor_model_parallel_size=layout.tp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.tp > 1,
        add_bias_linear=False,
    )


def _round_trip(here: Any, kind: str, owner: Any, tokens: Tensor, probs: Tensor, chosen: Tensor) -> tuple[Any, ...]:
    local, first = here.call["local"], here.call.place(here.rank, "ep") * here.call["local"]
    dispatcher = owner(local, list(range(first, first + local)), _config(here, kind), here.groups)
    hidden, gates = dispatcher.dispatch_preprocess(tokens[:, None], chosen, probs)
    hidden, gates = dispatcher.token_dispatch(hidden, gates)
    arrived, counts, kept = dispatcher.dispatch_postprocess(hidden, gates)
    answer = dispatcher.combine_preprocess(arrived * kept[:, None] / here.call.layout.etp)
    combined = dispatcher.combine_postprocess(dispatcher.token_combine(answer))
    sizes = [int(n) for n in counts]
    each = zip(arrived.detach().split(sizes), kept.detach().split(sizes), strict=True)
    rows, gates_in_order = zip(*(ordered(*pair) for pair in each), strict=True)
    return torch.cat(rows), torch.cat(gates_in_order), sizes, combined[:, 0]


def alltoall(here: Any, tokens: Tensor, probs: Tensor, chosen: Tensor) -> tuple[Any, ...]:
    return _round_trip(here, "alltoall", MoEAlltoAllTokenDispatcher, tokens, probs, chosen)


def allgather(here: Any, tokens: Tensor, probs: Tensor, chosen: Tensor) -> tuple[Any, ...]:
    return _round_trip(here, "allgather", MoEAllGatherTokenDispatcher, tokens, probs, chosen)
