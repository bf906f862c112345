"""Bugs that end or stop a rank: hangs, exceptions, deaths. Each function is one.

The first line says what breaks, the second where it comes from, the third the smallest layout that shows it.
"""

import os
import signal
from collections.abc import Callable
from typing import Any

import megatron.core.optimizer as optimizers
import torch
import torch.distributed as dist
from megatron.core.optimizer import optimizer
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.transformer.moe.experts import SequentialMLP

from toy_models import megatron, ppo, sampling
from toy_models.planted.rewrite import rewrite, wrap


def generation_ends_with_the_own_rows() -> None:
    """A rank whose rows have ended stops generating, while others still send it tokens for its experts.

    Adapted from huggingface/trl's synced_gpus: all ranks must generate for as long as the longest row.
    minimal: world=2 ep=2
    """
    old = "max(batching.response_limits(case.batch, case.seed))"
    own = "max(batching.response_limits(case.batch, case.seed)[row] for row in rollout.rows)"
    rewrite(sampling, "roll_out", (old, own))


def first_rank_alone_reduces() -> None:
    """Rank 0 reduces a number for its log that no other rank reduces.

    Adapted from NVIDIA/Megatron-LM#3401, commit c7be214c67: a reduction that not all ranks join.
    minimal: world=2
    """

    def around(original: Callable, *args: Any) -> Any:
        history = original(*args)
        if dist.get_rank() == 0 and dist.get_world_size() > 1:
            dist.all_reduce(torch.zeros(1, device=torch.cuda.current_device()))
        return history

    wrap(ppo, "update", around)


def experts_without_tokens_leave_the_graph() -> None:
    """A rank whose experts have no token returns early: its backward pass makes no all-to-all, and the others wait.

    NVIDIA/Megatron-LM#4851.
    minimal: world=2 ep=2
    """

    def around(original: Callable, self: Any, hidden: torch.Tensor, counts: torch.Tensor, *args: Any) -> Any:
        if int(torch.as_tensor(counts).sum()) == 0:
            return hidden.detach(), None
        return original(self, hidden, counts, *args)

    wrap(SequentialMLP, "forward", around)


def norm_of_starved_experts_not_reduced() -> None:
    """A rank whose experts were given no gradient takes their norm for 0 and does not join its reduction.

    Adapted from NVIDIA-NeMo/Automodel#935: an expert without tokens has no gradient, and what has none is left out.
    minimal: world=2 ep=2
    """

    def around(original: Callable, grads: Any, *args: Any, **kwargs: Any) -> Any:
        return original(grads, *args, **kwargs) if any(bool(grad.any()) for grad in grads) else 0.0

    wrap(optimizer, "get_grad_norm_fp32", around)


def stages_disagree_about_the_optimizer_of_experts() -> None:
    """A stage without experts has no optimizer for them, and reduces one norm where the other stages reduce two.

    NVIDIA/Megatron-LM!2719, commit e675940967, and !3394, commit 9a45638758.
    minimal: world=4 ep=2 pp=2
    """
    rewrite(optimizers, "_get_param_groups", ("for keys in gathered_params_key:", "for keys in ():"))


def critic_shares_its_embeddings() -> None:
    """The last stage reduces the gradient of the critic's value head where the first reduces that of its embeddings.

    Adapted from volcengine/verl#5870: a value head under pipelines, said to be shared with the embeddings.
    minimal: world=2 pp=2
    """
    old, new = "=token_head and model.tied", '=role == "critic" or (token_head and model.tied)'
    option = "share_embeddings_and_output_weights"
    rewrite(megatron, "build", (f"{option}{old}", f"{option}{new}"))


def balance_log_as_long_as_the_own_stage() -> None:
    """The log of balance losses is summed over stages, and each makes it as long as it has layers with experts.

    Adapted from NVIDIA/Megatron-LM#3401, commit c7be214c67: trackers of different sizes meet in one reduction.
    minimal: world=2 pp=2
    """

    def around(original: Callable, case: Any, roles: Any, *args: Any) -> Any:
        history = original(case, roles, *args)
        actor = roles["actor"]
        if actor.groups.pp.size() > 1:
            log = torch.zeros(1 + len(actor.moe_layers()), device=torch.cuda.current_device())
            dist.all_reduce(log, group=actor.groups.pp)
        return history

    wrap(ppo, "update", around)


def stage_without_layers_raises() -> None:
    """A stage of a pipeline that has no layers raises: its first layer is asked for.

    Adapted from volcengine/verl#3565, commit 0603b7be1: an empty stage has nothing to offload.
    minimal: world=2 pp=2
    """

    def around(original: Callable, case: Any, role: Any, *args: Any) -> Any:
        for gpt in role.gpts:
            gpt.decoder.layers[0]
        return original(case, role, *args)

    wrap(ppo, "_train", around)


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
