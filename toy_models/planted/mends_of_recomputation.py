"""Mends of what megatron-core recomputes; as `mends.py`, for the entries of `fuzz/known_recomputation.py`."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import transformer_block
from megatron.core.transformer.transformer_block import TransformerBlock

from toy_models.planted.rewrite import rewrite, wrap

SINCE_17 = hasattr(transformer_block, "checkpointed_forward")  # no method any more


def last_chunk_ends_with_the_layers() -> None:
    """uniform: the last chunk is as short as the layers that are left; docs/findings/recomputation.md.

    Mended in 0.19.2.
    """
    end = "layer_idx + self.config.recompute_num_layers)"
    shorter = "min(layer_idx + self.config.recompute_num_layers, self.num_layers_per_pipeline_rank))"
    rewrite(TransformerBlock, "_checkpointed_forward", (f"custom(layer_idx, {end}", f"custom(layer_idx, {shorter}"))


def padding_mask_of_every_layer() -> None:
    """block: layers that are not recomputed get the padding mask too; docs/findings/recomputation.md.

    Mended in 0.19.2.
    """
    arguments = "hidden_states, attention_mask, context, context_mask, rotary_pos_emb\n"
    wider = arguments.replace("\n", ", padding_mask\n")
    rewrite(TransformerBlock, "_checkpointed_forward", (arguments, wider))


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    """The same with a gradient that nobody asks for, where it has none."""
    if not torch.is_grad_enabled() or tensor.requires_grad:
        return tensor
    return tensor.detach().requires_grad_()


def _with_gradient(original: Callable, *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs | {"hidden_states": _leaf(kwargs["hidden_states"])})


def _norm_with_gradient(original: Callable, self: Any, run_function: Callable, hidden_states: torch.Tensor) -> Any:
    return original(self, run_function, _leaf(hidden_states))


def recomputed_behind_frozen_embeddings() -> None:
    """What is recomputed of the first layer is given something with a gradient, also where the embeddings are frozen.

    docs/findings/recomputation.md.
    """
    owner, name = (
        (transformer_block, "checkpointed_forward") if SINCE_17 else (TransformerBlock, "_checkpointed_forward")
    )
    wrap(owner, name, _with_gradient)
    wrap(CheckpointWithoutOutput, "checkpoint", _norm_with_gradient)


def _as_none(original: Callable, self: Any, fp8: Any = None) -> None:
    original(self, fp8 or None)


def norms_recomputed_without_fp8() -> None:
    """Recomputed norms: fp8=False, the default, means no fp8; docs/findings/recomputation.md."""
    wrap(CheckpointWithoutOutput, "__init__", _as_none)
