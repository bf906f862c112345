"""How the small helpers are called."""

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import utils
from megatron.core.distributed.param_and_grad_buffer import shard_buffer as shard
from megatron.core.distributed.reduce_scatter_with_fp32_accumulation import (
    reduce_scatter_with_fp32_accumulation as reduce_scatter,
)
from megatron.core.fusions import fused_bias_dropout, fused_bias_swiglu
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding as Rotary
from megatron.core.tensor_parallel import data as broadcasts
from megatron.core.tensor_parallel import utils as splits
from megatron.core.transformer import utils as masks
from megatron.core.transformer.multi_token_prediction import roll_tensor as roll
from torch import Tensor

from fuzz.functions.helpers import SIZES
from fuzz.functions.sequences import whole_width


def divide(here: Any) -> int:
    return utils.divide(here.call["numerator"], here.call["denominator"])


def split_tensor_along_last_dim(here: Any, x: Tensor) -> Any:
    return tuple(splits.split_tensor_along_last_dim(x, here.call["parts"], here.call["copied"]))


def split_tensor_into_1d_equal_chunks(here: Any, x: Tensor) -> Tensor:
    return splits.split_tensor_into_1d_equal_chunks(x, new_buffer=here.call["copied"], tp_group=here.group)


def gather_split_1d_tensor(here: Any, x: Tensor) -> Tensor:
    return splits.gather_split_1d_tensor(x, tp_group=here.group)


def process_groups(here: Any) -> Any:
    """get_pg_size, get_pg_rank, get_pg_src_rank."""
    return utils.get_pg_size(here.group), utils.get_pg_rank(here.group), utils.get_pg_src_rank(here.group)


def make_viewless_tensor(here: Any, x: Tensor) -> Any:
    made = utils.make_viewless_tensor(x.view(x.shape), requires_grad=True, keep_graph=here.call["keep_graph"])
    utils.assert_viewless_tensor(made)
    return made if here.call["keep_graph"] else made.detach(), made._base is None


def GlobalMemoryBuffer(here: Any) -> Any:
    buffer, dtype = utils.GlobalMemoryBuffer(), getattr(torch, here.call.dtype)
    tensors = [buffer.get_tensor(size, dtype, "one") for size in SIZES]
    apart = buffer.get_tensor(SIZES[0], dtype, "another").data_ptr() != tensors[-1].data_ptr()
    again = buffer.get_tensor(SIZES[0], dtype, "one").data_ptr() == tensors[-1].data_ptr()
    return [list(tensor.shape) for tensor in tensors], apart, again


def get_batch_on_this_cp_rank(here: Any, tokens: Tensor, attention_mask: Tensor) -> Any:
    batch = {"tokens": tokens, "attention_mask": attention_mask, "loss_mask": None}
    found = utils.get_batch_on_this_cp_rank(batch, cp_group=here.group)
    return found["tokens"], found["attention_mask"], found["loss_mask"]


def get_pos_emb_on_this_cp_rank(here: Any, x: Tensor) -> Tensor:
    return rope_utils.get_pos_emb_on_this_cp_rank(x, here.call["dim"], here.group)


def roll_tensor(here: Any, x: Tensor) -> Any:
    return roll(x, shifts=-1, dims=-1, cp_group=here.group)


def shard_buffer(here: Any, x: Tensor) -> Any:
    return tuple(shard(x, here.call["parts"]))


def broadcast_data(here: Any, a: Tensor, b: Tensor) -> Any:
    found = broadcasts.broadcast_data(["a", "b"], {"a": a, "b": b}, a.dtype, tp_group=here.group)
    return found["a"], found["b"]


def reduce_scatter_with_fp32_accumulation(here: Any, x: Tensor) -> Tensor:
    """Into the own share of the buffer, as DDP does."""
    buffer, number = x.clone(memory_format=torch.contiguous_format), here.call.rows[0]
    share = buffer[here.group.rank() * number : (here.group.rank() + 1) * number]
    handle = reduce_scatter(share, buffer, torch.distributed.ReduceOp.SUM, here.group, async_op=True)
    handle.wait()
    return share


def check_param_hashes_across_dp_replicas(here: Any, x: Tensor) -> bool:
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(x)
    return bool(utils.check_param_hashes_across_dp_replicas([model], cross_check=here.call["cross"]))


def get_default_causal_mask(here: Any) -> Tensor:
    return masks.get_default_causal_mask(here.call["width"])


def get_sliding_window_causal_mask(here: Any) -> Tensor:
    width = here.call["width"]
    return masks.get_sliding_window_causal_mask(width, width + here.call["before"], here.call["window"])


def attention_mask_func(here: Any, x: Tensor, mask: Tensor) -> Tensor:
    return masks.attention_mask_func(x, mask)


def gelu_impl(here: Any, x: Tensor) -> Tensor:
    return masks.gelu_impl(x)


def erf_gelu(here: Any, x: Tensor) -> Tensor:
    return masks.erf_gelu(x)


def bias_swiglu_impl(here: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return fused_bias_swiglu.bias_swiglu_impl(x, bias)


def weighted_bias_swiglu_impl(here: Any, x: Tensor, weights: Tensor) -> Tensor:
    return fused_bias_swiglu.weighted_bias_swiglu_impl(x, None, weights)


def bias_dropout_add(here: Any, x: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    add = fused_bias_dropout.get_bias_dropout_add(here.call["training"], here.call["fused"])
    return add((x, bias), residual, 0.0)


def RotaryEmbedding(here: Any) -> Tensor:
    call = here.call
    made = Rotary(
        2 * call["cols"],
        1.0,
        rotary_interleaved=call["interleaved"],
        rotary_base=call["base"],
        use_cpu_initialization=True,
    )
    return made.forward(whole_width(call, here.rank), offset=call["offset"])


def apply_rotary_pos_emb(here: Any, t: Tensor, freqs: Tensor) -> Tensor:
    config = SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=here.call["interleaved"], multi_latent_attention=False
    )
    return rope_utils.apply_rotary_pos_emb(t, freqs.detach(), config, cp_group=here.group_of("cp"))


def prepare_input_tensors_for_wgrad_compute(here: Any, grad_output: Tensor, total: Tensor) -> Any:
    return utils.prepare_input_tensors_for_wgrad_compute(grad_output, total)
