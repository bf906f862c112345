"""Bugs of PPO's losses and of what is reported of them, re-introduced in `toy_models.ppo`. Each function is one.

The first line says what breaks, the second where it comes from, the third the smallest layout that shows it.
"""

from toy_models import ppo
from toy_models.planted.rewrite import rewrite


def _rewrite_loss(role: str, old: str, new: str) -> None:
    name = f"_{role}_loss"
    assert ppo.LOSSES[role] is getattr(ppo, name)
    rewrite(ppo, name, (old, new))
    ppo.LOSSES[role] = getattr(ppo, name)


def entropy_is_a_penalty() -> None:
    """The entropy bonus is added to the loss.

    NVIDIA/Megatron-LM#2374, commit ba9caf491e.
    minimal: world=1
    """
    _rewrite_loss("actor", "policy - ppo.entropy_coef * entropy", "policy + ppo.entropy_coef * entropy")


def policy_loss_is_a_mean_of_means() -> None:
    """The policy loss is averaged within each micro-batch, then over them, however many tokens they have.

    NovaSky-AI/SkyRL#925, volcengine/verl#5625, huggingface/trl#7249.
    minimal: world=1
    """
    _rewrite_loss("actor", ".sum() * scale", ".sum() / mask.sum().clamp(min=1)")


def value_loss_per_micro_batch() -> None:
    """The critic normalises by the tokens of its own micro-batch, while the actor's loss was mended.

    volcengine/verl#6957, #5767 and #7110.
    minimal: world=1
    """
    _rewrite_loss("critic", "loss.sum() * scale", "loss.sum() / mask.sum().clamp(min=1)")


def value_loss_without_half() -> None:
    """The factor one half of the value loss is lost.

    volcengine/verl#2016, commit 6e15bbe25.
    minimal: world=1
    """
    _rewrite_loss("critic", "0.5 * torch.maximum", "torch.maximum")


def value_clip_does_nothing() -> None:
    """Old values are taken from the new pass: value clipping never bites.

    google/tf-agents#352.
    minimal: world=1
    """
    _rewrite_loss("critic", "clipped = old +", "old = values.detach()\n    clipped = old +")


def new_log_probs_reported_from_the_old() -> None:
    """What the update reports as its log-probs are the old ones.

    Adapted from volcengine/verl#4778, commit f1d5e0e27: reports that are not of this step.
    minimal: world=1
    """
    _rewrite_loss("actor", '"logp": logp.detach()', '"logp": old')


def clip_fraction_is_always_zero() -> None:
    """The reported clip fraction is 0, whatever is clipped.

    volcengine/verl#972, commit 88db55407.
    minimal: world=1
    """
    old = "(mask & ((ratio - 1).abs() > ppo.clip_eps)).to(loss.dtype)"
    _rewrite_loss("actor", old, "torch.zeros_like(ratio)")


def metrics_of_the_own_rank() -> None:
    """Reported losses are sums over this rank's rows alone.

    volcengine/verl#2259, commit 6d9ac2f7b: a part reported for the whole.
    minimal: world=2
    """
    rewrite(ppo, "_metrics", ("role.groups.dp_cp if", "role.groups.cp if"))


def one_epoch_whatever_is_asked() -> None:
    """The actor and critic are trained for one epoch.

    volcengine/verl#346, commit b4c13ce6f.
    minimal: world=1
    """
    rewrite(ppo, "update", ("range(case.ppo.epochs * case.ppo.mini_batches)", "range(case.ppo.mini_batches)"))
