"""How the functions that cut a pipeline are called."""

from types import SimpleNamespace
from typing import Any

from megatron.core import num_microbatches_calculator as calculators
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules, utils
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.cuda_graphs import convert_schedule_table_to_order as to_order
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import is_layer_window_attention as is_window
from torch import Tensor

from fuzz.functions.stages import layers_of


def _config(call: Any) -> TransformerConfig:
    counts, split, vpp = layers_of(call), call["split"], call["vpp"]
    ends = {"first": ("first",), "last": ("last",), "ends": ("first", "last")}.get(split, ())
    places = {"first": 0, "last": -1}
    asked = {f"num_layers_in_{end}_pipeline_stage": sum(chunk[places[end]] for chunk in counts) for end in ends}
    asked |= {f"account_for_{x}_in_pipeline_split": split in (x, "both") for x in ("embedding", "loss")}
    return TransformerConfig(
        num_layers=sum(map(sum, counts)),
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=call["pp"],
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        pipeline_dtype="float32",
        **asked,
    )


def layers_and_offsets(here: Any) -> Any:
    """get_num_layers_to_build and get_transformer_layer_offset of every chunk."""
    config, call = _config(here.call), here.call
    stages = [[(v if call["vpp"] > 1 else None, p) for p in range(call["pp"])] for v in range(call["vpp"])]
    functions = get_num_layers_to_build, get_transformer_layer_offset
    return tuple([[f(config, v, p) for v, p in chunk] for chunk in stages] for f in functions)


def get_schedule_table(here: Any) -> list:
    return schedules.get_schedule_table(here.call["number"], here.call["chunks"], here.call["group"])


def convert_schedule_table_to_order(here: Any) -> list:
    table = get_schedule_table(here)
    return to_order(min(here.call["warm"], len(table)), here.call["chunks"], table)


def get_pp_rank_microbatches(here: Any) -> Any:
    call, stages = here.call, parallel_state.get_pipeline_model_parallel_world_size()
    chunks = call["chunks"] if stages > 1 else 1
    size = chunks if chunks > 1 else None
    parallel_state.set_virtual_pipeline_model_parallel_world_size(size)
    return schedules.get_pp_rank_microbatches(
        call["number"], chunks, call["group"], call["forward_only"], call["overlap"]
    )


def get_tensor_shapes(here: Any) -> list:
    tp, cp = here.group_of("tp"), here.group_of("cp")
    return schedules.get_tensor_shapes(
        seq_length=here.call["length"] * tp.size() * cp.size(),
        micro_batch_size=here.call["micro"],
        decoder_seq_length=None,
        config=SimpleNamespace(sequence_parallel=here.call["sequence_parallel"], hidden_size=8),
        tp_group=tp,
        cp_group=cp,
    )


def neighbours(here: Any) -> Any:
    """is_pp_first_stage, is_pp_last_stage, get_pp_first_rank, ..last_rank, ..next_rank, ..prev_rank."""
    functions = (
        utils.is_pp_first_stage, utils.is_pp_last_stage, utils.get_pp_first_rank,
        utils.get_pp_last_rank, utils.get_pp_next_rank, utils.get_pp_prev_rank,
    )  # fmt: skip
    return tuple(function(here.group) for function in functions)


def virtual_stages(here: Any) -> Any:
    """is_vp_first_stage and is_vp_last_stage."""
    return tuple(f(here.call["stage"], here.call["vpp"]) for f in (utils.is_vp_first_stage, utils.is_vp_last_stage))


def ConstantNumMicroBatchesCalculator(here: Any) -> Any:
    call = here.call
    made = calculators.ConstantNumMicroBatchesCalculator(
        call["batch"], call["micro"], call["dp"], call["decrease"], rank=1
    )
    made.update(7, True)
    batches = made.get_current_global_batch_size(), made.get_current_running_global_batch_size()
    return made.get(), *batches, made.get_micro_batch_size()


def RampupBatchsizeNumMicroBatchesCalculator(here: Any) -> Any:
    call, batch = here.call, here.call["start"] + 2 * here.call["grows"]
    made = calculators.RampupBatchsizeNumMicroBatchesCalculator(
        batch, 1, 1, False, 1, call["start"], 2, call["samples"]
    )
    made.update(call["consumed"], True)
    return made.get(), made.get_current_global_batch_size()


def is_layer_window_attention(here: Any) -> bool:
    freq = here.call["freq"]
    return is_window(here.call["window"], list(freq) if isinstance(freq, tuple) else freq, here.call["layer"])


def deallocate_output_tensor(here: Any, x: Tensor) -> Any:
    """Of a result that is sent, whose graph must live on."""
    source = x.clone().requires_grad_()
    sent = source * 2
    schedules.deallocate_output_tensor(sent, here.call["free"])
    return list(sent.shape), sent.grad_fn is not None
