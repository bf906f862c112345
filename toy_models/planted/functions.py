"""Bugs of public helpers of megatron-core, one per family of `fuzz.functions`. Each function is one.

The first line says what breaks, the second where it comes from, the third the smallest layout that shows it. Cases meet
few of these helpers, so `recall` leaves them out: the properties of functions must find them.
"""

from megatron.core import utils
from megatron.core.optimizer import clip_grads
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from megatron.core.transformer.moe import moe_utils

from toy_models.planted.rewrite import rewrite, rewrite_everywhere


def columns_are_gathered_backwards() -> None:
    """Columns of tensor-parallel ranks are joined from the last rank to the first.

    An invention.
    minimal: world=2, tp=2
    """
    rewrite(mappings, "_gather_along_last_dim", ("torch.cat(tensor_list, dim=-1)", "torch.cat(tensor_list[::-1], -1)"))


def capacity_is_rounded_down() -> None:
    """An expert's capacity is the share of tokens without its fraction.

    An invention.
    minimal: world=1
    """
    rewrite_everywhere(moe_utils, "get_capacity", ("math.ceil(", "math.floor("))


def probabilities_stay_where_they_were() -> None:
    """Chunks of tokens are sorted, their probabilities are not.

    An invention, after NVIDIA/Megatron-LM's fused and plain versions that once differed.
    minimal: world=1
    """
    rewrite_everywhere(
        moe_utils,
        "sort_chunks_by_idxs",
        ("[probs[i] for i in sorted_idxs.tolist()]", "[probs[i] for i in range(len(probs))]"),
    )


def padding_counts_in_the_mean() -> None:
    """The z-loss is divided by all tokens, padding too.

    NVIDIA/Megatron-LM before padding masks.
    minimal: world=1
    """
    edit = "torch.clamp(num_valid_tokens, min=1.0)", "z_loss_values.numel()"
    rewrite_everywhere(moe_utils, "z_loss_func", edit)


def zeros_of_one_rank_count() -> None:
    """The number of zeros is that of the rank that has most, not the sum.

    An invention.
    minimal: world=2
    """
    group = "group=grad_stats_parallel_group"
    edit = f"total_num_zeros, op=torch.distributed.ReduceOp.SUM, {group}"
    rewrite_everywhere(clip_grads, "count_zeros_fp32", (edit, edit.replace("SUM", "MAX")))


def logits_of_other_ranks_count() -> None:
    """A target of another rank's vocabulary adds the logit of the own first token.

    An invention.
    minimal: world=2, tp=2
    """
    edit = "predicted_logits[target_mask] = 0.0", "predicted_logits[target_mask] *= 1.0"
    rewrite(VocabParallelCrossEntropy, "calculate_predicted_logits", edit)


def stages_expect_whole_sequences() -> None:
    """Under sequence parallelism a stage expects the whole sequence from the one before it.

    An invention.
    minimal: world=2, tp=2
    """
    old = "effective_seq_length = effective_seq_length // tp_group.size()"
    rewrite(schedules, "get_tensor_shapes", (old, old.removesuffix(" // tp_group.size()")))


def chunks_follow_one_another() -> None:
    """The second chunk of a context-parallel rank is counted from the middle, not from the end.

    An invention.
    minimal: world=2, cp=2
    """
    edit = "index[1].fill_(2 * cp_size - cp_rank - 1)", "index[1].fill_(cp_size + cp_rank)"
    rewrite_everywhere(utils, "get_batch_on_this_cp_rank", edit)


def shards_are_replicas_of_each_other() -> None:
    """Shards of tensor-parallel ranks above 0 are taken for replicas, and not saved.

    An invention.
    minimal: world=2, tp=2
    """
    edit = "replica_id = (0, 0, dp_replica_id)", "replica_id = (0, tp_rank, dp_replica_id)"
    rewrite_everywhere(utils, "make_tp_sharded_tensor_for_checkpoint", edit)
