"""Bugs of routing and of the token dispatchers, re-introduced. Each function is one.

The first line says what breaks, the second where it comes from, the third the smallest layout that shows it.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils, router, token_dispatcher
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher

from toy_models.planted.rewrite import after_init, rewrite, rewrite_everywhere, wrap


def gates_softmaxed_before_top_k() -> None:
    """Gates are softmaxed over all experts and not normalised over the chosen ones.

    verl#1444, commit b52956409: moe_router_pre_softmax=True for Qwen3-MoE.
    minimal: world=1
    """

    def around(original: Callable, *args: Any, **kwargs: Any) -> Any:
        assert "use_pre_softmax" in kwargs
        return original(*args, **{**kwargs, "use_pre_softmax": True})

    wrap(router, "topk_routing_with_score_function", around)


def gate_of_top_1_is_one() -> None:
    """With top_k=1 the softmax is taken over the one chosen expert: every gate is 1, the router has no gradient.

    NVIDIA/Megatron-LM!1690, commit 5153efea0b.
    minimal: world=1
    """

    def around(original: Callable, logits: torch.Tensor, topk: int, **kwargs: Any) -> Any:
        pre_softmax = kwargs.pop("use_pre_softmax") and topk > 1
        return original(logits, topk, use_pre_softmax=pre_softmax, **kwargs)

    wrap(router, "topk_routing_with_score_function", around)


def weakest_experts_chosen() -> None:
    """The experts of the smallest scores are chosen: a top-k whose order was turned round.

    No upstream commit; the class of verl#7106, routing indices that do not belong to their tokens.
    minimal: world=1
    """
    rewrite(
        moe_utils,
        "topk_routing_with_score_function",
        ("return torch.topk(scores, k=topk, dim=1)", "return torch.topk(scores, k=topk, dim=1, largest=False)"),
    )
    router.topk_routing_with_score_function = moe_utils.topk_routing_with_score_function


def expert_biases_in_the_gates() -> None:
    """The biases by which experts are chosen also weigh their outputs.

    No upstream commit; DeepSeek-V3 (arXiv:2412.19437, 2.1.2): the bias term is only used for routing.
    minimal: world=1
    """
    old, new = "torch.gather(scores, dim=1", "torch.gather(scores_for_routing, dim=1"
    rewrite_everywhere(moe_utils, "topk_routing_with_score_function", (old, new))


def groups_scored_by_their_best_expert() -> None:
    """A group of experts is chosen for its best expert, not for as many as it must give.

    No upstream commit; DeepSeek-V2's rule (arXiv:2405.04434) where V3's is asked for.
    minimal: world=1
    """
    rewrite(moe_utils, "group_limited_topk", (".topk(topk // group_topk, dim=-1)", ".topk(1, dim=-1)"))


def scaling_of_pre_softmax_alone() -> None:
    """Gates that are normalised are not scaled.

    No upstream commit; megatron-core's own page of moe_router_topk_scaling_factor says so, and its code does not.
    minimal: world=1
    """
    old, new = "if scaling_factor:", "if scaling_factor and use_pre_softmax:"
    rewrite_everywhere(moe_utils, "topk_routing_with_score_function", (old, new))


def strongest_copies_dropped() -> None:
    """An expert without room keeps the copies of the smallest gates.

    No upstream commit; an order turned round.
    minimal: world=1
    """
    old = "torch.topk(routing_probs, k=expert_capacity, dim=0, sorted=False)"
    new = old.replace("routing_probs,", "torch.where(routing_map, -routing_probs, -torch.inf),")
    rewrite_everywhere(moe_utils, "apply_router_token_dropping", (old, new))


def capacity_without_top_k() -> None:
    """The capacity of an expert is counted from tokens, not from copies.

    No upstream commit; a factor left out.
    minimal: world=1
    """
    old, new = "num_tokens=num_tokens * router_topk", "num_tokens=num_tokens"
    rewrite_everywhere(moe_utils, "apply_router_token_dropping", (old, new))


def first_copies_dropped() -> None:
    """By position an expert without room keeps the copies that come last.

    No upstream commit; an order turned round.
    minimal: world=1
    """

    def around(original: Callable, probs: torch.Tensor, routing_map: torch.Tensor, **kwargs: Any) -> Any:
        if kwargs["drop_policy"] != "position":
            return original(probs, routing_map, **kwargs)
        return tuple(x.flip(0) for x in original(probs.flip(0), routing_map.flip(0), **kwargs))

    wrap(router, "apply_router_token_dropping", around)


def sinkhorn_ends_after_one_round() -> None:
    """Sinkhorn's iteration is no iteration: loads are balanced somewhat.

    No upstream commit.
    minimal: world=1
    """
    rewrite_everywhere(moe_utils, "sinkhorn", ("while error > tol:", "for _ in range(1):"))


def chunks_restored_by_the_wrong_shape() -> None:
    """Copies come back in the wrong order where TP (of experts) and EP are both above 1 and counts are unequal.

    NVIDIA/Megatron-LM!2824, commit 54d4b3ddbb.
    minimal: world=4 ep=2 etp=2
    """
    sizes = "self.num_global_tokens_per_local_expert"
    old, new = f"{sizes}.T.ravel()", f"{sizes}.view(self.tp_size, self.ep_size, -1).permute(2, 1, 0).ravel()"
    rewrite(MoEAlltoAllTokenDispatcher, "combine_preprocess", (old, new))


def _leave_chunks_as_they_came(dispatcher: Any) -> None:
    order = torch.arange(len(dispatcher.sort_input_by_local_experts), device=torch.cuda.current_device())
    dispatcher.sort_input_by_local_experts = dispatcher.restore_output_by_local_experts = order


def chunks_not_sorted_by_expert() -> None:
    """Copies stay in the order of their senders: with two local experts some are served by the neighbour expert.

    Adapted from NVIDIA/Megatron-LM!2824, commit 54d4b3ddbb: the order of chunks, here wrong both ways.
    minimal: world=2 ep=2
    """
    after_init(MoEAlltoAllTokenDispatcher, _leave_chunks_as_they_came)


def splits_overwritten_by_combine() -> None:
    """The combine notes its own receive sizes as those of the dispatch: what is reported no longer pairs up.

    No upstream commit; the class of verl#4986, commit a1a35a7fe: split sizes that do not match.
    minimal: world=2 ep=2
    """

    def around(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
        combined = original(self, *args, **kwargs)
        self.output_splits = self.input_splits
        return combined

    wrap(MoEAlltoAllTokenDispatcher, "token_combine", around)


def combine_overwrites_copies() -> None:
    """Of the top_k copies of a token only one comes back: they are put, not added.

    No upstream commit; a scatter where there must be a scatter_add.
    minimal: world=1
    """
    rewrite(moe_utils, "unpermute", ("output_tokens.scatter_add_(", "output_tokens.scatter_("))
    token_dispatcher.unpermute = moe_utils.unpermute


def probabilities_detached_across_ep() -> None:
    """Probabilities that travel to another rank lose their gradient: the router learns nothing from the main loss.

    NVIDIA/Megatron-LM commit b6ce193888.
    minimal: world=2 ep=2
    """
    for owner in (MoEAlltoAllTokenDispatcher, MoEAllGatherTokenDispatcher):
        wrap(owner, "token_dispatch", _detach_probabilities)


def _detach_probabilities(original: Callable, self: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, probs = original(self, *args)
    return hidden, probs.detach() if self.ep_size > 1 else probs


def gathered_probabilities_detached() -> None:
    """The same in the allgather dispatcher alone.

    NVIDIA/Megatron-LM commit b6ce193888.
    minimal: world=2 ep=2
    """
    wrap(MoEAllGatherTokenDispatcher, "token_dispatch", _detach_probabilities)


def last_gathered_token_lost() -> None:
    """The allgather dispatcher serves all gathered tokens but the last.

    No upstream commit; an off-by-one of the gathered length.
    minimal: world=2 ep=2
    """

    def around(original: Callable, self: Any, hidden: torch.Tensor, probs: torch.Tensor) -> Any:
        if self.tp_size * self.ep_size > 1:
            self.routing_map[-1] = False
        return original(self, hidden, probs)

    wrap(MoEAllGatherTokenDispatcher, "dispatch_postprocess", around)


def probabilities_of_other_ranks_lost() -> None:
    """The allgather dispatcher keeps only this rank's probabilities: copies from other ranks are weighted with 0.

    No upstream commit; the counterpart in the forward pass of commit b6ce193888.
    minimal: world=2 ep=2
    """

    def around(original: Callable, self: Any, hidden: torch.Tensor, probs: torch.Tensor) -> Any:
        gathered, everyone = original(self, hidden, probs)
        mine = torch.zeros_like(everyone).view(-1, *probs.shape)
        mine[self.tp_ep_group.rank() if self.tp_size * self.ep_size > 1 else 0] = probs
        return gathered, mine.view_as(everyone)

    wrap(MoEAllGatherTokenDispatcher, "token_dispatch", around)


def forward_passes_count_tokens() -> None:
    """Forward-only passes add to the router's tokens per expert, from which the next update would go.

    pytorch/torchtitan#4148.
    minimal: world=1
    """

    def prepare(self: Any) -> None:
        counts = torch.zeros(self.num_experts, device=torch.cuda.current_device())
        self.register_buffer("tokens_per_expert", counts, persistent=False)

    def around(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
        probs, routing_map = original(self, *args, **kwargs)
        self.tokens_per_expert += routing_map.sum(0)
        return probs, routing_map

    after_init(TopKRouter, prepare)
    wrap(TopKRouter, "routing", around)
