"""How the helpers of state dicts and checkpoints are called."""

from typing import Any

import torch
from megatron.core import utils
from megatron.core.dist_checkpointing import ShardedTensor, dict_utils
from megatron.core.dist_checkpointing import utils as keys
from megatron.core.dist_checkpointing.mapping import is_main_replica as is_main
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint as make_several
from torch import Tensor

from fuzz.functions.state import KEYS, flat, front, mapping, paths, tree


def _told(shard: Any) -> Any:
    fields = shard.local_shape, shard.global_shape, shard.global_offset, shard.axis_fragmentations, shard.replica_id
    return tuple(list(field) for field in fields)


def make_tp_sharded_tensor_for_checkpoint(here: Any, x: Tensor) -> Any:
    made = utils.make_tp_sharded_tensor_for_checkpoint(
        x, "key", tp_axis=here.call["axis"], prepend_offsets=front(here.call)
    )
    return _told(made)


def make_sharded_tensor_for_checkpoint(here: Any, x: Tensor) -> Any:
    return _told(utils.make_sharded_tensor_for_checkpoint(x, "key", prepend_offsets=front(here.call)))


def make_sharded_tensors_for_checkpoint(here: Any, x: Tensor) -> Any:
    state = {"cut": x, "kept": x, "linear._extra_state": None}
    made = make_several(state, "a.", {"cut": here.call["axis"]}, front(here.call))
    cut, kept, extra = made["a.cut"], made["a.kept"], made["a.linear._extra_state"]
    places = [[list(one.global_offset), list(one.replica_id)] for one in (cut, kept)]
    return list(made), *places, list(extra.replica_id)


def from_rank_offsets(here: Any, x: Tensor) -> Any:
    call = here.call
    made = ShardedTensor.from_rank_offsets("key", x, (call["axis"], call["index"], call["number"]))
    return list(made.global_shape), list(made.global_offset)


def is_main_replica(here: Any) -> bool:
    return is_main(here.call["replica"])


def prefixes(here: Any) -> Any:
    """add_prefix_for_sharding, replace_prefix_for_sharding, apply_prefix_mapping."""
    call = here.call

    def after(function: Any, *arguments: Any) -> list[str]:
        state = {i: [ShardedTensor.from_rank_offsets(key, torch.zeros(1))] for i, key in enumerate(KEYS)}
        function(state, *arguments)
        return [one.key for [one] in state.values()]

    added = after(keys.add_prefix_for_sharding, call["new"])
    replaced = after(keys.replace_prefix_for_sharding, call["old"], call["new"])
    return added, replaced, after(keys.apply_prefix_mapping, mapping(call))


def trees(here: Any) -> Any:
    """nested_values, dict_list_map_outplace, dict_list_map_inplace, extract_matching_values."""
    made, again = tree(here.call), tree(here.call)
    outside = dict_utils.dict_list_map_outplace(lambda v: v + 100, made)
    values = list(dict_utils.nested_values(made))
    even, odd = dict_utils.extract_matching_values(made, lambda v: isinstance(v, int) and v % 2 == 0)
    inside = dict_utils.dict_list_map_inplace(lambda v: v + 100, again)
    kept = [[v for v in dict_utils.nested_values(part) if isinstance(v, int)] for part in (even, odd)]
    return values, outside, inside, *kept


def split_and_merge(here: Any) -> dict:
    """extract_matching_values with lists as dicts, and merge of what it gives."""
    made = tree(here.call)
    parts = dict_utils.extract_matching_values(made, lambda v: isinstance(v, int) and v % 2 == 0, True)
    return dict(sorted((path, v) for path, v in paths(dict_utils.merge(*parts))))


def diff(here: Any) -> Any:
    left, right, apart = dict_utils.diff(flat(here.call, "one"), flat(here.call, "other"))
    return sorted(left), sorted(right), sorted(path for path, *_ in apart)


def reload_model_params(here: Any, weight: Tensor, loaded: Tensor) -> Any:
    """Of the optimizer with float32 copies of bfloat16 weights."""
    parameter = torch.nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    inner = torch.optim.SGD([parameter], lr=1.0)
    config = OptimizerConfig(bf16=True, params_dtype=torch.bfloat16, lr=1.0)
    optimizer = Float16OptimizerWithFloat16Params(inner, config, None, lambda: None)
    parameter.data.copy_(loaded)
    optimizer.reload_model_params()
    copy = optimizer.fp32_from_float16_groups[0][0]
    optimizer._copy_main_params_to_model_params()
    return copy.detach(), parameter.detach()


def tensor_parallel_attributes(here: Any) -> Any:
    """set_tensor_model_parallel_attributes, copy_.., set_defaults_if_not_set_.. on bare and on marked parameters."""
    call = here.call
    one, other, bare = parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    layers.set_tensor_model_parallel_attributes(one, call["parallel"], call["dim"], call["stride"])
    layers.copy_tensor_model_parallel_attributes(other, one)
    layers.set_defaults_if_not_set_tensor_model_parallel_attributes(bare)
    found = [_marks(parameter) for parameter in parameters]
    layers.set_defaults_if_not_set_tensor_model_parallel_attributes(one)
    return *found, _marks(one)


def _marks(parameter: Any) -> list:
    return [parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride]
