"""Mends of bugs that live in the pinned megatron-core: each is called once in a rank, before process groups exist.

A mend touches only the region that its entry in `fuzz/known.py` names, so that every law can be judged there; the bug
itself is shown on stock megatron-core by the entry's example.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import layers

LINEARS = (layers.ColumnParallelLinear, layers.RowParallelLinear)


def _after_init(owner: type, then: Callable[[Any], None]) -> None:
    original = owner.__init__  # type: ignore[misc]

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        then(self)

    owner.__init__ = init  # type: ignore[misc]


def _reduce_apart(linear: Any) -> None:
    config = linear.config
    if linear.is_expert and config.expert_tensor_parallel_size != config.tensor_model_parallel_size:
        for parameter in linear.parameters():
            parameter.allreduce = False


def expert_gradients_over_expert_dp() -> None:
    """EP=1 with ETP unequal to TP: expert gradients are reduced over expert DP, not over dense DP.

    NVIDIA/Megatron-LM#5916, commit cd4afffa64.
    """
    for owner in LINEARS:
        _after_init(owner, _reduce_apart)


def _mark(parallel: Any) -> None:
    weight: torch.nn.Parameter | None = parallel.weight
    if weight is not None and not hasattr(weight, "tensor_model_parallel"):
        axis = 1 if isinstance(parallel, layers.RowParallelLinear) else 0
        layers.set_tensor_model_parallel_attributes(weight, True, axis, 1)


def shards_marked_without_initialization() -> None:
    """perform_initialization=False: sharded weights are marked all the same, so that gradient norms count them.

    NVIDIA/Megatron-LM#4084, commit a8bad4b441; in 0.16.1 only the initialisers set the mark.
    """
    for owner in (*LINEARS, layers.VocabParallelEmbedding):
        _after_init(owner, _mark)
