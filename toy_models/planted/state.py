"""Bugs of coordinates, of what must not change and of what must not be remembered. Each function is one.

The first line says what breaks, the second where it comes from, the third the smallest layout that shows it.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer import transformer_layer

from toy_models import experience, families, passes, ppo, sampling
from toy_models.planted.rewrite import rewrite, wrap


def dp_rank_from_the_expert_group() -> None:
    """The data-parallel rank is asked of the expert-parallel group: ranks take one another's rows.

    pytorch/torchtitan#2842: a rank taken from the wrong group.
    minimal: world=2
    """
    for owner, name in ((sampling, "_prompts"), (passes, "_passes"), (ppo, "update")):
        rewrite(owner, name, ("groups.dp.rank()", "groups.ep.rank()"))


def data_before_tensor_in_the_order() -> None:
    """Neighbouring ranks are data-parallel instead of tensor-parallel.

    Adapted from volcengine/verl#4697, commit b16e0488a: chunks that go to the wrong ranks.
    minimal: world=4 ep=2
    """

    def around(original: Callable, *args: Any, **kwargs: Any) -> None:
        assert kwargs["order"] != "dp-ep-cp-tp-pp"
        original(*args, **kwargs | {"order": "dp-ep-cp-tp-pp"})

    wrap(parallel_state, "initialize_model_parallel", around)


def data_group_without_context_parallelism() -> None:
    """The group over data and context parallelism is asked for and the data-parallel one given.

    volcengine/verl#5983 and NovaSky-AI/SkyRL#1420: one of the two groups taken for the other.
    minimal: world=2 cp=2
    """

    def around(original: Callable, with_context_parallel: bool = False, partial_data_parallel: bool = False) -> Any:
        return original(with_context_parallel=partial_data_parallel, partial_data_parallel=partial_data_parallel)

    wrap(parallel_state, "get_data_parallel_group", around)


def layers_numbered_from_1_on_every_stage() -> None:
    """Layers of later stages have the numbers of those of the first: their balance losses share its slots.

    Adapted from NVIDIA/Megatron-LM#1584: a wrong offset of the layers of a stage.
    minimal: world=2 pp=2
    """
    wrap(transformer_layer, "get_transformer_layer_offset", lambda original, *args, **kwargs: 0)


def rotary_base_of_another_family() -> None:
    """Rotary embeddings turn with the default base, not with the family's.

    Adapted from volcengine/verl#1444, commit b52956409: a model's constant lost in conversion.
    minimal: world=1
    """

    def around(original: Callable, family: str) -> float:
        return 10_000.0 if original(family) != 10_000.0 else 1_000_000.0

    wrap(families, "rope_theta", around)


def reference_follows_the_actor() -> None:
    """After an update the reference model has the actor's weights: from then on the KL penalty is 0.

    huggingface/trl#702: a KL that is always 0.
    minimal: world=1
    """

    def around(original: Callable, case: Any, roles: Any, *args: Any) -> Any:
        history = original(case, roles, *args)
        for copy, learned in zip(roles["reference"].gpts, roles["actor"].gpts, strict=True):
            copy.load_state_dict(learned.state_dict())
        return history

    wrap(ppo, "update", around)


def embeddings_rounded_where_handed_in() -> None:
    """Where the embedded tokens are handed in they lose their last bit: what must not matter does, by rounding.

    No upstream commit; the class of volcengine/verl#6280, numbers that depend on who computes them.
    minimal: world=1
    """

    def around(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
        embedded = kwargs.get("decoder_input")
        rounded = {} if embedded is None else {"decoder_input": embedded * (1 + 2.0**-52)}
        return original(self, *args, **kwargs | rounded)

    wrap(gpt_model.GPTModel, "_preprocess", around)


def critic_edits_the_reward_head() -> None:
    """Training changes the reward model's head in place.

    volcengine/verl#137, commit 8bf9b95ad: another role's data edited in place.
    minimal: world=1
    """

    def around(original: Callable, case: Any, roles: Any, *args: Any) -> Any:
        if roles["reward"].last:
            roles["reward"].last.output_layer.weight.data.mul_(1.0 + 2.0**-20)
        return original(case, roles, *args)

    wrap(ppo, "update", around)


def rewards_centred_by_earlier_batches() -> None:
    """Scores are centred by those of batches before, and the process never forgets them.

    No upstream commit; running moments of rewards as in CarperAI/trlx, kept for longer than a run.
    minimal: world=1
    """
    seen: list[torch.Tensor] = []

    def around(original: Callable, experience: Any, *args: Any) -> torch.Tensor:
        mean = torch.cat(seen).mean() if seen else 0.0
        seen.append(experience["scores"])
        return original({**experience, "scores": experience["scores"] - mean}, *args)  # type: ignore[no-any-return]

    wrap(experience, "token_rewards", around)
