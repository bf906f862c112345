"""Mends of bugs that live in the pinned megatron-core: each is called once in a rank, before process groups exist.

A mend touches only the region that its entry in `fuzz/known.py` names, so that every law can be judged there; the bug
itself is shown on stock megatron-core by the entry's example.
"""

import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.tensor_parallel import layers, scatter_to_sequence_parallel_region
from megatron.core.transformer import transformer_block, transformer_layer
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from toy_models.planted.rewrite import rewrite, rewrite_everywhere, wrap

LINEARS = (layers.ColumnParallelLinear, layers.RowParallelLinear)


def _after_init(owner: type, then: Callable[[Any], None]) -> None:
    original = owner.__init__  # type: ignore[misc]

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        then(self)

    owner.__init__ = init  # type: ignore[misc]


def _reduce_apart(moe: Any) -> None:
    members = dist.get_process_group_ranks
    for linear in moe.experts.modules() if moe.config.expert_model_parallel_size == 1 else ():
        if isinstance(linear, LINEARS) and members(linear.tp_group) != members(moe.tp_group):
            for parameter in linear.parameters():
                parameter.allreduce = False  # type: ignore[attr-defined]


def expert_gradients_over_expert_dp() -> None:
    """EP=1 with other ETP groups than TP groups: expert gradients are reduced over expert DP, not over dense DP.

    NVIDIA/Megatron-LM#5916, commit cd4afffa64, where ETP is not TP; docs/findings/experts-of-other-replicas.md.
    """
    _after_init(MoELayer, _reduce_apart)


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


def _in_order(original: Callable, **messages: Any) -> Any:
    """The receives the other way round where both neighbours are one rank."""
    if messages["prev_pipeline_rank"] != messages["next_pipeline_rank"]:
        return original(**messages)
    ends = ("tensor_recv_prev", "tensor_recv_next")
    return original(**messages | {ends[0]: messages[ends[1]], ends[1]: messages[ends[0]]})


def two_stages_meet_in_order() -> None:
    """Interleaved schedule, PP=2, batched: what one rank sends to its previous stage the other takes from its next.

    docs/findings/interleaved-two-stages.md; both neighbours are one rank, and messages between two ranks meet in order.
    """
    wrap(p2p_communication, "_batched_p2p_ops", _in_order)


def uneven_ends_without_a_middle() -> None:
    """Interleaved schedule, PP=2, both ends given: no layer lies between them, and nothing is divided by no stages.

    docs/findings/uneven-ends-of-two-stages.md; `get_transformer_layer_offset` divides by the number of middle stages.
    """
    divided = "                            // middle_pipeline_stages\n"
    guarded = divided.replace("middle_pipeline_stages", "max(1, middle_pipeline_stages)")
    rewrite_everywhere(transformer_layer, "get_transformer_layer_offset", (divided, guarded))


def layout_of_the_given_pipeline() -> None:
    """`pipeline_model_parallel_layout` is read at the pipeline rank that is handed in, not at that of parallel_state.

    docs/findings/layout-of-another-pipeline.md.
    """
    asked = "get_num_layers_to_build(\n            layer_type=LayerType.decoder, vp_stage=vp_stage\n        )"
    given = asked.replace("vp_stage=vp_stage", "vp_stage=vp_stage, pp_rank=pp_rank")
    rewrite_everywhere(transformer_block, "get_num_layers_to_build", (asked, given))
    asked = "get_layer_offset(\n                layer_type=LayerType.decoder, vp_stage=vp_stage\n            )"
    given = asked.replace("vp_stage=vp_stage", "vp_stage=vp_stage, pp_rank=pp_rank")
    rewrite_everywhere(transformer_layer, "get_transformer_layer_offset", (asked, given))
    world = "parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None"
    for name in ("get_num_layers_to_build", "get_layer_offset"):
        rewrite(PipelineParallelLayerLayout, name, (world, "self.virtual_pipeline_model_parallel_size > 1"))


def _by_expert_rank(original: Callable, self: Any, routing_map: torch.Tensor) -> torch.Tensor:
    """The counts of all ranks are put as if TP were the faster axis of the group."""
    ranks = dist.get_process_group_ranks(self.tp_ep_group)
    mine = [ranks.index(rank) for rank in dist.get_process_group_ranks(self.tp_group)]
    if self.tp_size == 1 or self.ep_size == 1 or mine[1] - mine[0] == 1:
        return original(self, routing_map)
    gather = token_dispatcher.gather_from_sequence_parallel_region

    def gathered(counts: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return gather(counts, *args, **kwargs).reshape(self.tp_size, self.ep_size, -1).transpose(0, 1).flatten()

    with mock.patch.object(token_dispatcher, "gather_from_sequence_parallel_region", gathered):
        return original(self, routing_map)


def counts_by_expert_rank() -> None:
    """A rank order with EP before TP: the all-to-all dispatcher reads the gathered counts in the order of its group.

    docs/findings/experts-before-tensors.md.
    """
    wrap(token_dispatcher.MoEAlltoAllTokenDispatcher, "preprocess", _by_expert_rank)


def _aliased(original: Callable, **messages: Any) -> Any:
    sent = {name: tensor.detach() for name, tensor in messages.items() if "_send_" in name and tensor is not None}
    return original(**messages | sent)


def sent_tensors_outlive_deallocation() -> None:
    """Overlapped p2p with deallocate_pipeline_outputs: what is on its way keeps its storage.

    NVIDIA/Megatron-LM#4047, commit 260cba7133 (which waits for the send instead).
    """
    wrap(p2p_communication, "_p2p_ops", _aliased)


def _scattered(original: Callable, self: Any, *args: Any, **kwargs: Any) -> tuple:
    found = list(original(self, *args, **kwargs))
    mask, embedded = kwargs.get("padding_mask"), kwargs.get("decoder_input") is not None
    whole = found[-1] is mask and mask is not None and (embedded or not self.pre_process)
    if whole and self.config.sequence_parallel:
        cut = scatter_to_sequence_parallel_region(kwargs["padding_mask"].transpose(0, 1).contiguous())
        found[-1] = cut.transpose(0, 1).contiguous()
    return tuple(found)


def padding_mask_scattered_on_every_stage() -> None:
    """Sequence parallelism: the padding mask is cut like the hidden states on stages without an embedding too.

    NVIDIA/Megatron-LM#5563; the same where `decoder_input` is given.
    """
    wrap(GPTModel, "_preprocess", _scattered)


def _per_token(original: Callable, self: Any, routing_map: torch.Tensor, padding_mask: Any = None) -> None:
    original(self, routing_map, padding_mask=None if padding_mask is None else padding_mask[:, None])


def padding_mask_of_expert_biases() -> None:
    """Expert biases: the padding mask [tokens] leaves tokens out of the load [tokens, E], and not experts.

    NVIDIA/Megatron-LM#6111, mended by #6114.
    """
    wrap(TopKRouter, "_apply_expert_bias", _per_token)


def _over_own_ranks(original: Callable, model: Any, config: Any) -> None:
    routers = [module for chunk in model for module in chunk.modules() if isinstance(module, TopKRouter)]
    group = routers[0].tp_dp_cp_group if routers else None
    with mock.patch.object(parallel_state, "get_tensor_and_data_parallel_group", lambda **_: group):
        original(model, config)


def expert_biases_over_the_given_groups() -> None:
    """Expert biases: the load is summed over the model's own TP x CP x DP group, not over that of parallel_state.

    docs/findings/expert-biases-of-other-groups.md; 0.19 takes the group as an argument.
    """
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    wrap(module, "_update_router_expert_bias", _over_own_ranks)
