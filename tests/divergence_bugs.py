"""Bugs of one module of the second layer on one rank, to be planted where a divergence must be found. Each is one."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer

from toy_models.planted.rewrite import wrap

RANK = 1


def _in_second_layer(hook: Callable[[torch.nn.Module, Any, tuple], Any]) -> None:
    """Call `hook` on what the last expert's second matrix puts out, in training, on one rank."""

    def around(original: Callable, moe: Any, number: int) -> None:
        original(moe, number)
        if number == 2 and dist.get_rank() == RANK % dist.get_world_size():
            moe.experts.local_experts[-1].linear_fc2.register_forward_hook(_in_training(hook))

    wrap(MoELayer, "set_layer_number", around)


def _in_training(hook: Callable) -> Callable:
    return lambda module, inputs, out: hook(module, inputs, out) if torch.is_grad_enabled() else None


def expert_too_great() -> None:
    """Its output is 3 % too great."""
    _in_second_layer(lambda _module, _inputs, out: (1.03 * out[0], *out[1:]))


def gradient_doubled() -> None:
    """What comes back to it is doubled before it goes on."""
    _in_second_layer(lambda _module, inputs, _out: inputs[0].register_hook(lambda gradient: 2 * gradient) and None)


def not_a_number() -> None:
    """Its output is NaN."""
    _in_second_layer(lambda _module, _inputs, out: (torch.nan * out[0], *out[1:]))


def dies() -> None:
    """The rank ends there."""
    _in_second_layer(lambda *_: os._exit(9))
