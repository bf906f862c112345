"""Bugs to plant, for the tests of GPUs and of their bounds: nothing else knows them."""

from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP

from toy_models.planted.rewrite import wrap


def experts_are_off_on_the_gpu() -> None:
    """A kernel that is wrong by a thousandth, where the CPU's is right."""

    def around(original: Any, self: Any, *args: Any) -> Any:
        output, bias = original(self, *args)
        return (output * 1.001 if torch.cuda.is_available() else output), bias

    wrap(SequentialMLP, "forward", around)


def experts_are_off_by_a_hundredth() -> None:
    """What experts give is 1 % too large, on any device."""

    def around(original: Any, self: Any, *args: Any) -> Any:
        output, bias = original(self, *args)
        return output * 1.01, bias

    wrap(SequentialMLP, "forward", around)
