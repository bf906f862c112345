"""How clip_grads and the local multi-tensor functions are called."""

from typing import Any

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate as duplicate
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from fuzz.functions.clipping import kinds


def _parameters(here: Any, gradients: dict[str, Tensor], mixed: bool) -> list[torch.nn.Parameter]:
    """A parameter per gradient, marked as megatron's layers mark theirs."""
    decoupled = dict(here.call.arguments).get("decoupled", False)
    kind_of = kinds(here.call, here.rank) if mixed else ["sharded"] * len(gradients)
    found = []
    for kind, gradient in zip(kind_of, gradients.values(), strict=True):
        parameter = torch.nn.Parameter(torch.zeros_like(gradient))
        if kind == "sharded":
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        if kind == "shared":
            parameter.shared = True  # type: ignore[attr-defined]
        if kind != "none":
            setattr(parameter, "decoupled_grad" if decoupled else "grad", gradient)
        found.append(parameter)
    return found


def get_grad_norm_fp32(here: Any, **gradients: Tensor) -> Any:
    given = list(gradients.values())
    handed = given[0] if here.call["single"] and len(given) == 1 else given
    return clip_grads.get_grad_norm_fp32(handed, here.call["norm_type"], here.group)


def clip_grad_by_total_norm_fp32(here: Any, **gradients: Tensor) -> Any:
    own = {name: gradient.clone() for name, gradient in gradients.items()}  # "modified in place"
    parameters = _parameters(here, own, mixed=False)
    handed = parameters[0] if here.call["single"] and len(parameters) == 1 else parameters
    call = here.call
    clip_grads.clip_grad_by_total_norm_fp32(handed, call["max_norm"], call["total_norm"], call["decoupled"])
    return tuple(own.values())


def count_zeros_fp32(here: Any, **gradients: Tensor) -> float:
    parameters = _parameters(here, gradients, mixed=True)
    return clip_grads.count_zeros_fp32(
        parameters, here.group, use_decoupled_grad=here.call["decoupled"], tp_group=here.group_of("tp")
    )


def param_is_not_tensor_parallel_duplicate(here: Any, **gradients: Tensor) -> Any:
    parameters = _parameters(here, gradients, mixed=True)
    group = {"tp_group": here.group_of("tp")} if here.call["given"] else {}
    return [duplicate(p, **group) for p in parameters], [bool(param_is_not_shared(p)) for p in parameters]


def local_multi_tensor_l2_norm(here: Any, **gradients: Tensor) -> Any:
    return utils.local_multi_tensor_applier(
        utils.local_multi_tensor_l2_norm, torch.zeros(1, dtype=torch.int), [list(gradients.values())], False
    )


def local_multi_tensor_scale(here: Any, **gradients: Tensor) -> Any:
    into = [torch.empty_like(gradient) for gradient in gradients.values()]
    lists = [list(gradients.values()), into]
    utils.local_multi_tensor_applier(
        utils.local_multi_tensor_scale, torch.zeros(1, dtype=torch.int), lists, here.call["scale"]
    )
    return tuple(into)
