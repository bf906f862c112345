"""Bugs of how gradients are reduced and shared out, re-introduced in megatron-core. Each function is one.

Each names where it comes from and the smallest layout that shows it.
"""

from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from toy_models.planted.rewrite import rewrite


def every_rank_updates_the_first_share() -> None:
    """Every rank takes the first share of the gradients for its own; the others are nobody's.

    Adapted from pytorch/torchtitan#2842: a rank that is not that of the group.
    minimal: world=2
    """
    rewrite(DistributedOptimizer, "_build_model_gbuf_range", ("_all_ranges[data_parallel_rank]", "_all_ranges[0]"))


def gathered_weights_not_waited_for() -> None:
    """A forward pass does not wait for the weights that are being gathered for it.

    The class of NVIDIA/Megatron-LM#4047, commit 260cba7133: what is under way taken for done.
    minimal: world=2
    """
    rewrite(_ParamAndGradBucketGroup, "finish_param_sync", ("self.param_gather_handle.wait()", "pass"))


def zeros_of_replicas_counted() -> None:
    """Gradients that every TP rank has are counted on each of them when zeros are counted.

    Adapted from NVIDIA/Megatron-LM#4084, commit a8bad4b441: replicas in a statistic over tensor-parallel ranks.
    minimal: world=2 tp=2
    """
    rewrite(clip_grads, "count_zeros_fp32", ("is_not_shared and is_not_tp_duplicate", "is_not_shared"))
    optimizer.count_zeros_fp32 = clip_grads.count_zeros_fp32
