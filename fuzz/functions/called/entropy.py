"""How the vocabulary-parallel cross entropy and its parts are called."""

from typing import Any

from megatron.core.tensor_parallel import cross_entropy
from megatron.core.tensor_parallel.utils import VocabUtility as Utility
from torch import Tensor

PARTS = cross_entropy.VocabParallelCrossEntropy


def vocab_parallel_cross_entropy(here: Any, logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy.vocab_parallel_cross_entropy(logits, target, label_smoothing=here.call["smoothing"])


def calculate_logits_max(here: Any, logits: Tensor, target: Tensor) -> Any:
    return PARTS.calculate_logits_max(logits)


def calculate_predicted_logits(here: Any, logits: Tensor, target: Tensor) -> Any:
    """As the loss does it, without the other ranks; "In-place subtraction reduces memory pressure": of a copy."""
    mine, most = PARTS.calculate_logits_max(logits.clone())
    first = here.call.place(here.rank) * here.call["vocab"]
    return PARTS.calculate_predicted_logits(mine, target, most, first, first + here.call["vocab"])


def VocabUtility(here: Any) -> Any:
    place, size, vocab = here.call.place(here.rank), here.group.size(), here.call["vocab"]
    share = Utility.vocab_range_from_per_partition_vocab_size(vocab, place, size)
    return list(share), list(Utility.vocab_range_from_global_vocab_size(vocab * size, place, size))
