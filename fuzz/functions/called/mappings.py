"""How the functions of tensor_parallel.mappings are called."""

from typing import Any

from megatron.core.tensor_parallel import mappings
from torch import Tensor

from fuzz.functions.mappings import counts, pieces


def copy_to_tensor_model_parallel_region(here: Any, x: Tensor) -> Tensor:
    return mappings.copy_to_tensor_model_parallel_region(x, group=here.group)


def reduce_from_tensor_model_parallel_region(here: Any, x: Tensor) -> Tensor:
    return mappings.reduce_from_tensor_model_parallel_region(x, group=here.group)


def scatter_to_tensor_model_parallel_region(here: Any, x: Tensor) -> Tensor:
    return mappings.scatter_to_tensor_model_parallel_region(x, group=here.group)


def gather_from_tensor_model_parallel_region(here: Any, x: Tensor) -> Tensor:
    return mappings.gather_from_tensor_model_parallel_region(x, group=here.group)


def scatter_to_sequence_parallel_region(here: Any, x: Tensor) -> Tensor:
    return mappings.scatter_to_sequence_parallel_region(x, group=here.group)


def gather_from_sequence_parallel_region(here: Any, x: Tensor) -> Tensor:
    return mappings.gather_from_sequence_parallel_region(
        x,
        tensor_parallel_output_grad=here.call["tensor_parallel_output_grad"],
        group=here.group,
        output_split_sizes=pieces(here.call, here.rank) if here.call["splits"] else None,
        use_global_buffer=here.call["buffer"],
    )


def reduce_scatter_to_sequence_parallel_region(here: Any, x: Tensor) -> Tensor:
    return mappings.reduce_scatter_to_sequence_parallel_region(
        x,
        group=here.group,
        input_split_sizes=pieces(here.call, here.rank) if here.call["splits"] else None,
        use_global_buffer=here.call["buffer"],
    )


def all_gather_last_dim_from_tensor_parallel_region(here: Any, x: Tensor) -> Tensor:
    return mappings.all_gather_last_dim_from_tensor_parallel_region(x, group=here.group)


def reduce_scatter_last_dim_to_tensor_parallel_region(here: Any, x: Tensor) -> Tensor:
    return mappings.reduce_scatter_last_dim_to_tensor_parallel_region(x, group=here.group)


def all_to_all(here: Any, x: Tensor) -> Tensor:
    sent, place = counts(here.call, here.rank), here.call.place(here.rank)
    took = [row[place] for row in sent]
    splits = (took, sent[place]) if here.call["splits"] else (None, None)
    return mappings.all_to_all(here.group, x, *splits)


def all_to_all_sp2hp(here: Any, x: Tensor) -> Tensor:
    return mappings.all_to_all_sp2hp(x, group=here.group)


def all_to_all_hp2sp(here: Any, x: Tensor) -> Tensor:
    return mappings.all_to_all_hp2sp(x, group=here.group)
