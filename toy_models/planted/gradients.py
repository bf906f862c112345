"""Bugs of gradients, their reduction and norm, and of the optimizer, re-introduced. Each function is one.

The first line says what breaks, the second where it comes from, the third the smallest layout that shows it.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from megatron.core.transformer.moe import router
from megatron.core.transformer.moe.router import TopKRouter

from toy_models import megatron, ppo
from toy_models.planted.rewrite import after_init, rewrite, wrap


def expert_gradients_scaled_twice() -> None:
    """Expert gradients are divided by the expert-parallel size once more than they should be.

    NVIDIA/Megatron-LM commits c13f08a11b and 3373641ff1.
    minimal: world=2 ep=2
    """

    def scale(ddp: Any) -> None:
        for group in ddp.expert_parallel_bucket_groups:
            for bucket in group.buckets:
                bucket.gradient_scaling_factor /= ddp.config.expert_model_parallel_size

    after_init(DistributedDataParallel, scale)


def expert_gradients_not_reduced() -> None:
    """Expert gradients are not summed over expert data parallelism: replicas of an expert drift apart.

    Adapted from NVIDIA/Megatron-LM#5916, commit cd4afffa64: replicas that never exchange gradients.
    minimal: world=2 ep=2
    """

    def forget(ddp: Any) -> None:
        for group in ddp.expert_parallel_bucket_groups:
            group.start_grad_sync = lambda *_, **__: None
            group.finish_grad_sync = lambda *_, **__: None

    after_init(DistributedDataParallel, forget)


def balance_gradients_not_averaged() -> None:
    """Auxiliary and z losses of every micro-batch count in full: their gradients grow with the number of them.

    Adapted from NVIDIA/Megatron-LM#2237, commit f6e0d425a5: a factor of the scale of balance losses left out.
    minimal: world=1
    """
    old, new = "loss_scale * cp_group_size / num_microbatches", "loss_scale * cp_group_size"
    rewrite(schedules, "forward_step_calc_loss", (old, new))


def expert_biases_of_the_own_load() -> None:
    """Each rank moves its routers' biases by the tokens that it has itself: replicas come to choose other experts.

    No upstream commit; the class of NVIDIA/Megatron-LM#2237: a sum over ranks left out.
    minimal: world=2
    """

    def around(original: Callable, *args: Any) -> torch.Tensor:
        with mock.patch.object(dist, "all_reduce", lambda *_, **__: None):
            return original(*args)  # type: ignore[no-any-return]

    wrap(importlib.import_module("megatron.core.distributed.finalize_model_grads"), "get_updated_expert_bias", around)


def expert_biases_follow_the_crowd() -> None:
    """Biases grow where an expert has more tokens than the mean.

    No upstream commit; a sign turned round.
    minimal: world=1
    """

    def around(original: Callable, tokens: torch.Tensor, bias: torch.Tensor, rate: float, *args: Any) -> torch.Tensor:
        return original(tokens, bias, -rate, *args)  # type: ignore[no-any-return]

    wrap(importlib.import_module("megatron.core.distributed.finalize_model_grads"), "get_updated_expert_bias", around)


def sequence_losses_added_up() -> None:
    """The load losses of the rows of a micro-batch are added up, not averaged.

    No upstream commit; a mean over rows left out.
    minimal: world=1
    """
    rewrite(TopKRouter, "_apply_seq_aux_loss", ("/ bsz\n", "\n"))


def global_load_of_one_micro_batch() -> None:
    """The global load loss takes the load of the micro-batch at hand, not the mean of those so far.

    No upstream commit; a running mean that does not run.
    minimal: world=1
    """
    old = "averated_tokens_per_expert = self.global_tokens_per_expert / self.ga_steps"
    rewrite(TopKRouter, "_apply_global_aux_loss", (old, "averated_tokens_per_expert = global_tokens_per_expert"))


def z_loss_not_divided_by_tp() -> None:
    """Every TP rank adds the whole z-loss, and the router's gradient is summed over TP.

    NVIDIA/Megatron-LM commit cac8d1a3f0.
    minimal: world=2 tp=2
    """
    old, new = "self.config.moe_z_loss_coeff / self.tp_cp_group.size()", "self.config.moe_z_loss_coeff"
    rewrite(TopKRouter, "apply_z_loss", (old, new))


def z_loss_on_probabilities() -> None:
    """The z-loss is taken of softmaxed router logits.

    NVIDIA/Megatron-LM commit c656553315.
    minimal: world=1
    """

    def around(original: Callable, logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original(torch.softmax(logits, dim=-1), *args, **kwargs)  # type: ignore[no-any-return]

    wrap(router, "z_loss_func", around)


def predicted_logit_in_every_shard() -> None:
    """The log-prob's gradient takes the label off every vocabulary shard, not only off the one that has it.

    modelscope/ms-swift#9947: right forward, wrong backward under tensor parallelism.
    minimal: world=2 tp=2
    """

    def around(original: Callable, softmax: torch.Tensor, target_mask: torch.Tensor) -> Any:
        return original(softmax, torch.zeros_like(target_mask))

    wrap(VocabParallelCrossEntropy, "prepare_gradient_calculation_operands", around)


def norm_gradients_not_summed_over_tp() -> None:
    """Gradients of norms are left as each TP rank has them, from its part of the sequence.

    Adapted from NVIDIA/Megatron-LM commit 5fffdfc737: a reduction of gradients over TP left out.
    minimal: world=2 tp=2
    """
    old = 'getattr(param, "sequence_parallel", False)'
    new = f'"norm" not in name and {old}'
    qk = ('("q_layernorm" in name or "k_layernorm" in name)', "False")
    module = __import__(finalize_model_grads.__module__, fromlist=["_"])
    rewrite(module, "_allreduce_non_tensor_model_parallel_grads", (old, new), qk)


def router_gradient_not_summed_over_tp() -> None:
    """The router's weight lacks its sequence-parallel mark: each TP rank keeps the gradient of its own tokens.

    No upstream commit; the mark is what commit cac8d1a3f0 of NVIDIA/Megatron-LM relies on.
    minimal: world=2 tp=2
    """

    def unmark(self: Any) -> None:
        self.weight.sequence_parallel = False

    after_init(TopKRouter, unmark)


def expert_norm_over_the_dense_group() -> None:
    """The norm counts only this EP rank's experts: clip coefficients differ, dense replicas drift apart.

    NVIDIA/Megatron-LM#3024, commit b2e93909f0.
    minimal: world=2 ep=2
    """

    def around(original: Callable, *args: Any, **kwargs: Any) -> Any:
        chained = original(*args, **kwargs)
        dense, *experts = chained.chained_optimizers
        for expert in experts:
            expert.grad_stats_parallel_group = dense.grad_stats_parallel_group
        return chained

    wrap(megatron, "get_megatron_optimizer", around)


def norm_summed_from_the_own_part_on() -> None:
    """Each rank adds up the norm beginning with its own part: rounding differs, and so do the clipped replicas.

    No upstream commit; the class of verl#789, commit 093e9599d: a decision on the norm that ranks take apart.
    minimal: world=2 ep=2
    """
    assert hasattr(optimizer, "get_grad_norm_fp32")
    optimizer.get_grad_norm_fp32 = _norm_from_the_own_part_on


def _norm_from_the_own_part_on(grads: list[torch.Tensor], *, grad_stats_parallel_group: Any) -> float:
    group = grad_stats_parallel_group
    own = sum(float((grad.double() ** 2).sum()) for grad in grads)
    mine = torch.tensor([own], dtype=torch.float32, device=torch.cuda.current_device())
    parts = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    others = sum(float(part) for rank, part in enumerate(parts) if rank != dist.get_rank(group))
    return math.sqrt(own + others)


def gradients_not_zeroed() -> None:
    """Gradients of the step before are still there: every step adds to them.

    volcengine/verl#5105 and NVIDIA/Megatron-LM#6871: stale gradients.
    minimal: world=1
    """
    rewrite(ppo, "_train", ("chunk.zero_grad_buffer()", "pass"))


def only_experts_are_clipped() -> None:
    """Of the chained optimizers only that of the experts clips: dense gradients go through whole.

    No upstream commit; the class of NVIDIA/Megatron-LM#3024, clip coefficients that differ between parameters.
    minimal: world=2 ep=2
    """

    def around(original: Callable, parameters: Any, *args: Any, **kwargs: Any) -> None:
        if parallel_state.get_expert_model_parallel_world_size() == 1 or not getattr(parameters[0], "allreduce", True):
            original(parameters, *args, **kwargs)

    assert hasattr(clip_grads, "clip_grad_by_total_norm_fp32")
    wrap(optimizer, "clip_grad_by_total_norm_fp32", around)


def vectors_are_decayed() -> None:
    """Weight decay takes norms and biases too: the multiplier of a parameter group is ignored.

    Adapted from NVIDIA/Megatron-LM!1578, commit f11303b5d8: multipliers of parameter groups that leak.
    minimal: world=1
    """
    rewrite(OptimizerParamScheduler, "step", (" * param_group.get('wd_mult', 1.0)", ""))


def adam_without_bias_correction() -> None:
    """Adam's moments are used as they are: the first steps are far too small or large.

    No upstream commit; the class of NVIDIA/Megatron-LM#174, state that does not belong to the step.
    minimal: world=1
    """

    def around(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
        for group in self.param_groups:
            for state in (self.state[p] for p in group["params"] if "step" in self.state[p]):
                state["step"] += 10_000
        return original(self, *args, **kwargs)

    assert issubclass(torch.optim.AdamW, torch.optim.Optimizer)
    wrap(torch.optim.AdamW, "step", around)


def critic_learns_at_the_actors_rate() -> None:
    """The critic's optimizer is made with the actor's learning rate.

    volcengine/verl#1463, commit 80af51b60: a rate other than the configured one.
    minimal: world=1
    """
    rewrite(megatron, "_optimizer", ('ppo.lr if role == "actor" else ppo.critic_lr', "ppo.lr"))
