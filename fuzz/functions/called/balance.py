"""How the balance losses of moe_utils and their log are called."""

from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from fuzz.functions.balance import mine

NAME = "load_balancing_loss"


def switch_load_balancing_loss_func(here: Any, probs: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    call = here.call
    return moe_utils.switch_load_balancing_loss_func(
        probs, tokens, call["total"], call["topk"], call["experts"], call["coeff"], padding_mask=mask
    )


def z_loss_func(here: Any, logits: Tensor, mask: Tensor | None = None) -> Tensor:
    return moe_utils.z_loss_func(logits, here.call["coeff"], padding_mask=mask)


def get_tokens_per_expert_and_token_count(here: Any, routing_map: Tensor) -> Any:
    return moe_utils.get_tokens_per_expert_and_token_count(
        routing_map, here.group, topk=here.call["topk"], with_padding_mask=here.call["mask"]
    )


def get_updated_expert_bias(here: Any, tokens: Tensor, bias: Tensor) -> Tensor:
    return moe_utils.get_updated_expert_bias(tokens, bias, here.call["rate"])


def _log(here: Any, losses: dict[str, Tensor]) -> None:
    reduce, average = here.call["reduce"], here.call["average"]
    for layer in [layer for layer in range(here.call["layers"]) for _ in range(here.call["times"])]:
        if layer in mine(here.call, here.rank):
            moe_utils.save_to_aux_losses_tracker(
                NAME,
                losses[f"loss{layer}"],
                layer + 1,
                here.call["layers"],
                reduce_group=here.group_of(reduce) if reduce else None,
                avg_group=here.group_of(average) if average else None,
                reduce_group_has_dp=bool(reduce and "dp" in reduce),
            )
    if NAME not in moe_utils.get_moe_layer_wise_logging_tracker():  # a stage without MoE layers logs nothing
        moe_utils.save_to_aux_losses_tracker(
            NAME,
            torch.zeros(()),
            1,
            here.call["layers"],
            reduce_group=here.group_of(reduce) if reduce else None,
            avg_group=here.group_of(average) if average else None,
            reduce_group_has_dp=bool(reduce and "dp" in reduce),
        )


def reduce_aux_losses_tracker_across_ranks(here: Any, **losses: Tensor) -> Tensor:
    _log(here, losses)
    moe_utils.reduce_aux_losses_tracker_across_ranks()
    return moe_utils.get_moe_layer_wise_logging_tracker()[NAME]["values"]


def track_moe_metrics(here: Any, **losses: Tensor) -> Any:
    _log(here, losses)
    layers, freq, total = here.call["layers"], here.call["freq"], dict[str, Tensor]()
    moe_utils.track_moe_metrics(
        here.call["scale"],
        0,
        total_loss_dict=total,
        num_layers=layers,
        moe_layer_freq=[1] + [0] * (layers - 1) if freq == "list" else freq,
        mtp_num_layers=here.call["mtp"],
    )
    return total[NAME], moe_utils.get_moe_layer_wise_logging_tracker()[NAME]["values"]


def MoEAuxLossAutoScaler(here: Any, x: Tensor, loss: Tensor) -> Tensor:
    if here.call["scale"] is not None:
        moe_utils.MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(here.call["scale"]))
    return moe_utils.MoEAuxLossAutoScaler.apply(x, loss)
