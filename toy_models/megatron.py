"""The four models of PPO on megatron-core: configuration, layer spec, weights in and out under canonical names.

Knows layouts and weights; knows nothing of PPO, of the reference or of the fuzzer. Process groups are made by the
caller: `Role.groups` has them, whether or not megatron takes its own from `parallel_state`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from toy_models import families, megatron_names, weights
from toy_models.attention import ContextParallelAttention
from toy_models.batching import padded_width
from toy_models.coordinates import chunks, coordinates, is_first, is_last
from toy_models.megatron_names import Shard
from toy_models.spec import PPO, Batch, Layout, MoEModel, Switches

TRAINED = ("actor", "critic")
DTYPES = {"float64": torch.float64, "float32": torch.float32}


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm as a layer-spec choice: megatron's own wrapper refuses sequence parallel."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ScalarHead(torch.nn.Module):
    """One number per position, replicated over TP: [S/TP, B, H] -> [S, B, 1], the head of critic and reward model.

    Stands where GPTModel has its output layer, as in verl's `LinearForLastLayer`. Each TP rank sees its part of the
    sequence, so the weight is marked `sequence_parallel` and finalize_model_grads sums its gradient over TP.
    """

    def __init__(self, config: TransformerConfig, tp: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.tp = tp
        self.weight = torch.nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        values = hidden @ self.weight.t()
        if self.weight.sequence_parallel:  # type: ignore[attr-defined]
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False, group=self.tp)
        return values, None


def _balancing(model: MoEModel) -> dict[str, Any]:
    """One load balancing type as a name, several as a list."""
    names, coefficients = list(model.load_losses) or ["none"], list(model.load_losses.values()) or [0.0]
    several = len(names) > 1
    return {
        "moe_router_load_balancing_type": names if several else names[0],
        "moe_aux_loss_coeff": coefficients if several else coefficients[0],
    }


def _options(model: MoEModel) -> dict[str, Any]:
    """What the model asks of TransformerConfig, whatever the layout."""
    return {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.head_dim,
        "ffn_hidden_size": model.dense_ffn or model.ffn,
        "moe_layer_freq": [int(layer in model.moe) for layer in range(model.layers)],
        "moe_ffn_hidden_size": model.ffn,
        "num_moe_experts": model.experts,
        "moe_router_topk": model.top_k,
        "moe_router_pre_softmax": not model.norm_topk_prob,
        "moe_router_score_function": model.score,
        "moe_router_enable_expert_bias": model.expert_bias > 0,
        "moe_router_bias_update_rate": model.bias_rate,
        "moe_router_topk_scaling_factor": model.scaling if model.scaling != 1 else None,
        "moe_router_num_groups": model.expert_groups or None,
        "moe_router_group_topk": model.group_topk or None,
        **_balancing(model),
        "moe_expert_capacity_factor": model.capacity or None,
        "moe_pad_expert_input_to_capacity": model.pad_to_capacity,
        "moe_z_loss_coeff": model.z_loss or None,
        "moe_shared_expert_intermediate_size": model.shared_ffn or None,
        "moe_shared_expert_gate": model.family in weights.SHARED_GATE,
        "add_qkv_bias": model.family in weights.QKV_BIAS,
        "qk_layernorm": model.family in weights.QK_NORM,
        "layernorm_epsilon": families.rms_norm_eps(model.family),
    }


# No dropout, no fusion (they need CUDA).
FIXED: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "use_cpu_initialization": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "gradient_accumulation_fusion": False,
}


def _pipeline(layout: Layout) -> dict[str, Any]:
    """How the layers are cut into stages, by the option of megatron that the layout names."""
    options: dict[str, Any] = {"pipeline_model_parallel_size": layout.pp}
    if layout.vpp > 1:
        options["virtual_pipeline_model_parallel_size"] = layout.vpp
    if layout.split == "ends":
        options["num_layers_in_first_pipeline_stage"] = layout.stages[0] * layout.vpp
        options["num_layers_in_last_pipeline_stage"] = layout.stages[-1] * layout.vpp
    elif layout.split == "list":
        listed = [["decoder"] * count for count in layout.stages]
        listed[0], listed[-1] = ["embedding", *listed[0]], [*listed[-1], "loss"]
        options["pipeline_model_parallel_layout"] = listed
    options["account_for_embedding_in_pipeline_split"] = layout.split in ("embedding", "both")
    options["account_for_loss_in_pipeline_split"] = layout.split in ("loss", "both")
    return options


def transformer_config(
    model: MoEModel, layout: Layout, switches: Switches, precision: str, role: str = "actor"
) -> TransformerConfig:
    """A TransformerConfig of its own for each model: schedules hang functions on it."""
    config = TransformerConfig(
        **_options(model),
        **_pipeline(layout),
        **FIXED,
        tensor_model_parallel_size=layout.tp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.tp > 1 and (switches.forward_sp or role in TRAINED),
        moe_token_dispatcher_type=switches.dispatcher,
        moe_router_dtype=None if switches.router_dtype == "none" else switches.router_dtype,
        perform_initialization=switches.perform_initialization,
        batch_p2p_comm=switches.p2p == "batched",
        overlap_p2p_comm=switches.p2p in ("overlapped", "flushed"),
        overlap_p2p_comm_warmup_flush=switches.p2p == "flushed",
        deallocate_pipeline_outputs=switches.deallocate,
        microbatch_group_size_per_vp_stage=switches.group or layout.pp if layout.vpp > 1 else None,
        params_dtype=DTYPES[precision],
        pipeline_dtype=DTYPES[precision],
    )
    config.finalize_model_grads_func = finalize_model_grads
    return config


def _spec(config: TransformerConfig, vp_stage: int | None, pp_rank: int | None) -> TransformerBlockSubmodules:
    """Megatron's own choice of layers for a stage, with norms and an attention that run here."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage, pp_rank=pp_rank
    )
    for layer in block.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        attention = parts.self_attention.submodules
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
        if config.context_parallel_size > 1:
            attention.core_attention = ContextParallelAttention
    return replace(block, layer_norm=RMSNorm)


def build(
    model: MoEModel,
    role: str,
    config: TransformerConfig,
    batch: Batch,
    layout: Layout,
    stage: int = 0,
    **explicit: ProcessGroupCollection,
) -> GPTModel:
    """A virtual stage of a GPTModel with the head of its role; its weights are whatever memory held until `load`."""
    token_head, rank = weights.has_token_head(role), torch.distributed.get_rank()
    vp_stage = stage if layout.vpp > 1 else None
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=_spec(config, vp_stage, coordinates(layout, rank).pp if explicit else None),
        vocab_size=model.vocab,
        max_sequence_length=padded_width(layout, batch),
        pre_process=is_first(layout, rank) and stage == 0,
        post_process=is_last(layout, rank) and stage == layout.vpp - 1,
        share_embeddings_and_output_weights=token_head and model.tied,
        position_embedding_type="rope",
        rotary_base=families.rope_theta(model.family),
        rotary_percent=families.rotary_fraction(model.family),
        parallel_output=True,
        vp_stage=vp_stage,
        **explicit,
    )
    if not token_head and gpt.post_process:
        gpt.output_layer = ScalarHead(config, gpt.pg_collection.tp)
    if config.params_dtype == torch.float64:
        gpt.rotary_pos_emb.inv_freq = families.frequencies(model)
    return gpt


@dataclass
class Role:
    """One of the four models on this rank, with a chunk per virtual stage.

    `optimizer` is None for the two that never learn.
    """

    name: str
    model: MoEModel
    layout: Layout
    rank: int
    chunks: list[torch.nn.Module]
    switches: Switches
    groups: ProcessGroupCollection
    optimizer: MegatronOptimizer | None = None
    scheduler: OptimizerParamScheduler | None = None

    @property
    def config(self) -> TransformerConfig:
        return self.gpts[0].config

    @property
    def gpts(self) -> list[GPTModel]:
        return [chunk.module for chunk in self.chunks] if self.optimizer else self.chunks

    @property
    def last(self) -> GPTModel | None:
        """The chunk that ends in the head, if this rank has it."""
        return self.gpts[-1] if is_last(self.layout, self.rank) else None

    def layers(self) -> dict[int, Any]:
        """The layers of this rank by their place in the model, from 0."""
        places = chunks(self.layout, self.model.layers, self.rank)
        pairs = zip(places, self.gpts, strict=True)
        return {at: layer for some, gpt in pairs for at, layer in zip(some, gpt.decoder.layers, strict=False)}

    def moe_layers(self) -> dict[int, Any]:
        """Those of them that have experts."""
        return {at: layer for at, layer in self.layers().items() if at in self.model.moe}

    def expert_biases(self) -> dict[str, torch.Tensor]:
        """The buffers that routers choose by, of those that have some, under their canonical names."""
        routers = {at: layer.mlp.router for at, layer in self.moe_layers().items() if self.model.expert_bias}
        return {f"model.layers.{at}.mlp.gate.e_score_correction_bias": x.expert_bias for at, x in routers.items()}

    @cached_property
    def parameters(self) -> list[tuple[Shard, str, torch.nn.Parameter]]:
        """Every parameter with its name in its chunk, and what that chunk has of the model."""
        at, places = coordinates(self.layout, self.rank), chunks(self.layout, self.model.layers, self.rank)
        first = at.ep * (self.model.experts // self.layout.ep)
        shards = [Shard(self.model, some, first, self.layout.tp, at.tp) for some in places]
        pairs = zip(shards, self.gpts, strict=True)
        return [(of, name, parameter) for of, gpt in pairs for name, parameter in gpt.named_parameters()]

    def unpack(self, of: Shard, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Canonical pieces of a tensor shaped like the parameter `name`."""
        return megatron_names.unpack(of, self.name, name, tensor)

    def pieces(self, kind: str) -> dict[str, torch.Tensor]:
        """This rank's canonical pieces of every 'weight', 'grad' (reduced, before clipping) or optimizer state."""
        found: dict[str, torch.Tensor] = {}
        for of, name, parameter in self.parameters:
            tensor = self._tensor(parameter, kind)
            if tensor is not None:
                found |= self.unpack(of, name, tensor.detach())
        return found

    def _tensor(self, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor | None:
        if kind == "weight":
            return parameter
        if kind == "grad":
            return parameter.main_grad if parameter.requires_grad else None  # type: ignore[attr-defined,no-any-return]
        assert self.optimizer
        for inner in self.optimizer.chained_optimizers:
            if parameter in inner.optimizer.state:
                return inner.optimizer.state[parameter].get(kind)
        return None


def load(role: Role, canonical: Mapping[str, torch.Tensor]) -> None:
    """Copy this rank's slices of the canonical weights into the sharded model."""
    where = weights.held(role.model, role.layout, role.name, role.rank)
    for of, name, parameter in role.parameters:
        flat = torch.arange(parameter.numel()).reshape(parameter.shape)
        for piece, index in role.unpack(of, name, flat).items():
            part = canonical[piece][where[piece]].to(parameter.dtype)
            parameter.data.view(-1)[index.reshape(-1)] = part.reshape(-1)


def _optimizer(
    role: str, chunks: Sequence[torch.nn.Module], ppo: PPO, precision: str, explicit: Mapping[str, Any]
) -> MegatronOptimizer:
    config = OptimizerConfig(
        optimizer=ppo.optimizer,
        lr=ppo.lr if role == "actor" else ppo.critic_lr,
        weight_decay=ppo.weight_decay,
        adam_beta1=ppo.beta1,
        adam_beta2=ppo.beta2,
        adam_eps=ppo.eps,
        sgd_momentum=ppo.momentum,
        clip_grad=ppo.max_norm,
        params_dtype=DTYPES[precision],
    )
    return get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=False, **explicit)


def _scheduler(optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Constant rates. Needed all the same: only the scheduler applies megatron's wd_mult, 0 for vectors and biases."""
    config = optimizer.config
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr,
        max_lr=config.lr,
        min_lr=config.lr,
        lr_warmup_steps=0,
        lr_decay_steps=1,
        lr_decay_style="constant",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def make_role(case: Any, name: str, groups: ProcessGroupCollection) -> Role:
    """Build, load and, for actor and critic, wrap in DDP with an optimizer; `case` has the parts of `spec`."""
    config = transformer_config(case.model, case.layout, case.switches, case.precision, name)
    stages = range(case.layout.vpp)
    explicit = {} if case.switches.groups == "global" else {"pg_collection": groups}
    gpts = [build(case.model, name, config, case.batch, case.layout, stage, **explicit) for stage in stages]
    role = Role(name, case.model, case.layout, torch.distributed.get_rank(), gpts, case.switches, groups)
    load(role, weights.canonical(case.model, name, case.seed))
    biases = weights.expert_biases(case.model, name, case.seed)
    for piece, buffer in role.expert_biases().items():
        buffer.copy_(biases[piece])
    if case.precision == "float64":
        _count_widely(role)
    if name in TRAINED:
        _learns(role, config, case.ppo, case.precision, explicit)
    else:
        for gpt in gpts:
            gpt.requires_grad_(False)
    return role


def _count_widely(role: Role) -> None:
    """float64 for the running mean of loads, which megatron keeps in float32 by name."""
    for router in (layer.mlp.router for layer in role.moe_layers().values() if role.model.global_aux_loss):
        for name in ("global_tokens_per_expert", "ga_steps"):
            setattr(router, name, getattr(router, name).double())


def _learns(
    role: Role, config: TransformerConfig, ppo: PPO, precision: str, explicit: Mapping[str, ProcessGroupCollection]
) -> None:
    """Wrap the chunks in DDP, as megatron's training does: buckets for the first chunk only."""
    for of, name, parameter in role.parameters:
        pieces = role.unpack(of, name, parameter.detach())
        parameter.requires_grad_(not all(weights.is_frozen(ppo.frozen, piece) for piece in pieces))
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=False, overlap_grad_reduce=False)
    role.chunks = [
        DistributedDataParallel(config, ddp, gpt, disable_bucketing=stage > 0, **explicit)
        for stage, gpt in enumerate(role.chunks)
    ]
    role.optimizer = _optimizer(role.name, role.chunks, ppo, precision, explicit)
    role.scheduler = _scheduler(role.optimizer)
    syncs = [chunk.no_sync for chunk in role.chunks]
    config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
