"""The four models of PPO on megatron-core: built, loaded and wrapped, with weights in and out under canonical names.

Knows layouts and weights; knows nothing of PPO, of the reference or of the fuzzer. Process groups are made by the
caller: `Role.groups` has them, whether or not megatron takes its own from `parallel_state`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from toy_models import families, megatron_names, sharded_optimizer, weights
from toy_models.batching import padded_width
from toy_models.coordinates import chunks, coordinates, is_first, is_last
from toy_models.megatron_config import TRAINED, transformer_config
from toy_models.megatron_modules import ScalarHead, block_spec
from toy_models.megatron_names import Shard
from toy_models.releases import ProcessGroupCollection, tp_of, unless_usual
from toy_models.spec import PPO, Batch, Layout, MoEModel, Switches


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
        transformer_layer_spec=block_spec(config, vp_stage, coordinates(layout, rank).pp if explicit else None),
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
        gpt.output_layer = ScalarHead(config, tp_of(gpt))
    if config.params_dtype == torch.float64:
        gpt.rotary_pos_emb.inv_freq = families.frequencies(model).to(torch.cuda.current_device())
    return gpt.cuda(torch.cuda.current_device())  # norms and heads are made on the CPU, as in megatron's training


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
        """This rank's canonical pieces of every 'weight', 'grad' (reduced, before clipping) or optimizer state.

        With a distributed optimizer gradients and states hold only where the pieces of 'owned' are True.
        """
        found: dict[str, torch.Tensor] = {}
        for of, name, parameter in self.parameters:
            tensor = self._tensor(parameter, kind)
            if tensor is not None:
                found |= self.unpack(of, name, tensor.detach())
        return found

    def rest(self, param_sync: bool = True) -> None:
        """Passes that train nothing follow: weights are gathered now and not by the next forward pass."""
        for chunk in self.chunks if self.switches.overlap_gather else ():
            chunk.disable_forward_pre_hook(param_sync=param_sync)  # type: ignore[operator]

    def wake(self) -> None:
        """Training goes on: where gathers overlap, forward passes wait for their weights again."""
        for chunk in self.chunks if self.switches.overlap_gather else ():
            chunk.enable_forward_pre_hook()  # type: ignore[operator]

    def _tensor(self, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor | None:
        if kind == "weight":
            return parameter
        if kind == "grad":
            return parameter.main_grad if parameter.requires_grad else None  # type: ignore[attr-defined,no-any-return]
        assert self.optimizer
        if self.switches.distributed:
            return sharded_optimizer.state(self.optimizer, parameter, kind) if parameter.requires_grad else None
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
            part = canonical[piece][where[piece]].to(parameter.dtype).to(parameter.device)
            parameter.data.view(-1)[index.reshape(-1).to(parameter.device)] = part.reshape(-1)


def _optimizer(
    role: str, chunks: Sequence[torch.nn.Module], ppo: PPO, switches: Switches, dtype: Any, explicit: Mapping[str, Any]
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
        params_dtype=dtype,
        use_distributed_optimizer=switches.distributed,
        log_num_zeros_in_grad=switches.count_zeros,
        decoupled_lr=ppo.embedding_lr or None,
        **unless_usual(decoupled_weight_decay=(not ppo.coupled_decay, True)),  # since 0.15
        **unless_usual(apply_wd_to_qk_layernorm=(ppo.qk_decay, False)),  # since 0.16
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
        _learns(role, config, case.ppo, explicit)
    else:
        for gpt in gpts:
            gpt.requires_grad_(False)
    return role


def _count_widely(role: Role) -> None:
    """float64 for the running mean of loads, which megatron keeps in float32 by name."""
    for router in (layer.mlp.router for layer in role.moe_layers().values() if role.model.global_aux_loss):
        for name in ("global_tokens_per_expert", "ga_steps"):
            setattr(router, name, getattr(router, name).double())


def _learns(role: Role, config: TransformerConfig, ppo: PPO, explicit: Mapping[str, ProcessGroupCollection]) -> None:
    """Wrap the chunks in DDP, as megatron's training does: buckets for the first chunk only."""
    for of, name, parameter in role.parameters:
        pieces = role.unpack(of, name, parameter.detach())
        parameter.requires_grad_(not all(weights.is_frozen(ppo.frozen, piece) for piece in pieces))
    role.chunks = [
        DistributedDataParallel(config, _reduction(role.switches), gpt, disable_bucketing=stage > 0, **explicit)
        for stage, gpt in enumerate(role.chunks)
    ]
    role.optimizer = _optimizer(role.name, role.chunks, ppo, role.switches, config.params_dtype, explicit)
    role.scheduler = _scheduler(role.optimizer)
    config.no_sync_func = _of_chunks(role, "no_sync")
    if role.switches.align:
        config.grad_sync_func = _of_chunks(role, "start_grad_sync")
    if role.switches.align and role.switches.overlap_gather:
        config.param_sync_func = _of_chunks(role, "start_param_sync")
    role.rest(param_sync=False)


def _reduction(switches: Switches) -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(
        use_distributed_optimizer=switches.distributed,
        overlap_grad_reduce=switches.overlap_reduce,
        overlap_param_gather=switches.overlap_gather,
        align_param_gather=switches.align and switches.overlap_gather,
        bucket_size=switches.bucket or None,
        pad_buckets_for_high_nccl_busbw=switches.pad_buckets,
        average_in_collective=switches.average,
        check_for_nan_in_grad=switches.check_nan,
    )


def _of_chunks(role: Role, name: str) -> Any:
    """A method of each chunk, as a list where there are several."""
    methods = [getattr(chunk, name) for chunk in role.chunks]
    return methods if len(methods) > 1 else methods[0]
