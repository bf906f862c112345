"""Bugs that end or stop a rank: hangs, exceptions, deaths. Each function is one.

The first line says what breaks, the second where it comes from, the third the smallest layout that shows it.
"""

import os
import signal
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.transformer.moe.experts import SequentialMLP

from toy_models import ppo
from toy_models.planted.rewrite import rewrite, wrap


def generation_ends_with_the_own_rows() -> None:
    """A rank whose rows have ended stops generating, while others still send it tokens for its experts.

    Adapted from huggingface/trl's synced_gpus: all ranks must generate for as long as the longest row.
    minimal: world=2 ep=2
    """
    old = "max(batching.response_limits(case.batch, case.seed))"
    own = "max(batching.response_limits(case.batch, case.seed)[row] for row in rollout.rows)"
    rewrite(ppo, "roll_out", (old, own))


def first_rank_alone_reduces() -> None:
    """Rank 0 reduces a number for its log that no other rank reduces.

    Adapted from NVIDIA/Megatron-LM#3401, commit c7be214c67: a reduction that not all ranks join.
    minimal: world=2
    """

    def around(original: Callable, *args: Any) -> Any:
        history = original(*args)
        if dist.get_rank() == 0 and dist.get_world_size() > 1:
            dist.all_reduce(torch.zeros(1))
        return history

    wrap(ppo, "update", around)


def starved_expert_raises() -> None:
    """An expert without tokens raises, as a grouped matrix product of no rows did.

    NVIDIA/Megatron-LM commit eef48ef31c.
    minimal: world=1
    """

    def around(original: Callable, self: Any, hidden: torch.Tensor, counts: torch.Tensor, *args: Any) -> Any:
        if (torch.as_tensor(counts) == 0).any():
            raise RuntimeError(f"Input batch size must be positive, got tokens_per_expert={counts.tolist()}")
        return original(self, hidden, counts, *args)

    wrap(SequentialMLP, "forward", around)


def last_rank_is_killed() -> None:
    """The last rank is killed at its first optimizer step, as by the kernel when memory runs out.

    No upstream commit; what an operator sees as exit code 137.
    minimal: world=1
    """

    def around(original: Callable, *args: Any) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    wrap(ppo, "_train", around)


def sent_tensors_are_reused() -> None:
    """A pipeline writes into a tensor again while it is still being sent to the next stage.

    Adapted from NVIDIA/Megatron-LM#4047, commit 260cba7133: its storage is given back there.
    minimal: world=2 pp=2
    """

    def around(original: Callable, **messages: Any) -> Any:
        handles = original(**messages)
        for name, tensor in messages.items():
            if "_send_" in name and tensor is not None:
                tensor.data.zero_()
        return handles

    wrap(p2p_communication, "_p2p_ops", around)
    wrap(p2p_communication, "_batched_p2p_ops", around)
