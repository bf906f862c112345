"""Laws of the update: gradients, their norm, what the optimizer does with them, weights after it, reported metrics."""

import math
from collections.abc import Mapping, Sequence

import torch

from fuzz.case import Case, Observation, Violation
from fuzz.laws.compare import (
    BOUNDS,
    FLOOR,
    ROUNDING,
    STATES,
    TRAINED,
    Finding,
    Step,
    base_of,
    bound_of,
    certain_steps,
    compare,
    compare_pieces,
    rows_in,
    seers,
    steps,
    summands,
    trained,
)
from fuzz.laws.pieces import group, owners, places
from fuzz.tensors import Group
from toy_models import weights

BIAS_BOUND = 1e-6  # megatron keeps expert biases in float32, whatever the precision
METRICS = ("policy_loss", "entropy", "approx_kl", "clip_fraction", "value_loss", "value_clip_fraction")


def _base(case: Case, reference: Observation, step: Step, kind: str) -> float:
    """The bound of a kind before conditioning: looser after a clipped step, and by what Adam makes of rounding."""
    after = kind in ("weight", *_states(case))
    clipped = case.ppo.max_norm and (after or step.iteration + step.step > 0)
    base = base_of(case, reference, "clipped" if clipped else "gradient")
    # A square doubles the relative error of what is squared.
    return max(base * (2 if kind == "exp_avg_sq" else 1), _adam_noise(case, reference, step, after))


def _adam_noise(case: Case, reference: Observation, step: Step, after: bool) -> float:
    """How far Adam moves a weight on a gradient that is nothing but rounding: lr·rounding/eps per step, at most lr."""
    if case.ppo.optimizer != "adam":
        return 0.0
    before = [s for s in steps(case) if s < step or (after and s == step)]
    keys = [f"{s.key}/{role}_norm" for s in before for role in TRAINED]
    rounding = [ROUNDING[case.precision] * reference.numbers[key] for key in keys]
    greatest = max(case.ppo.lr, case.ppo.critic_lr, case.ppo.embedding_lr)
    return sum(greatest * min(1.0, r / case.ppo.eps) for r in rounding)


def gradients_match_the_reference(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Every parameter's gradient of actor and critic, reduced and before clipping, is that of plain autograd."""
    judged = 0
    for step in certain_steps(case, reference):
        for role in TRAINED:
            prefix = f"{step.key}/{role}/grad"
            found = compare_pieces(case, ranks, reference, role, prefix, _base(case, reference, step, "grad"))
            if found:
                raise Violation(case, "gradients match the reference", *found)
            judged += 1
    return judged


def _unique(case: Case, ranks: Sequence[Observation], reference: Observation, role: str, prefix: str) -> torch.Tensor:
    """The observed gradients of unique parameters, flat: of replicas, the lowest rank's piece counts."""
    whole, parts = group(reference, prefix), []
    counted = torch.zeros(len(whole.flat), dtype=torch.bool)
    for rank in ranks:
        mine = group(rank, prefix)
        at = places(case, role, rank.rank, mine, whole).at  # type: ignore[union-attr]
        parts.append(mine.flat[~counted[at]])
        counted[at] = True
    return torch.cat(parts)


def _wrong_norm(rank: Observation, key: str, due: float, of: str, allowed: float) -> Finding | None:
    norm = rank.numbers[key]
    if abs(norm - due) <= max(allowed, 1e-12):
        return None
    sentence = f"the reported gradient norm is not that of {of}: {norm:.9g} instead of {due:.9g}"
    return Finding(f"rank {rank.rank}, {key}", f"{due:.9g}", f"{norm:.9g}", sentence)


def gradient_norm_is_that_of_the_observed_gradients(
    case: Case, ranks: Sequence[Observation], reference: Observation
) -> int:
    """The reported norm is the L2 norm over unique parameters of the gradients that the ranks hold."""
    bound = BOUNDS[case.precision]["norm"]
    for step in steps(case):
        for role in TRAINED:
            due = math.sqrt(float((_unique(case, ranks, reference, role, f"{step.key}/{role}/grad") ** 2).sum()))
            for rank in ranks:
                found = _wrong_norm(rank, f"{step.key}/{role}_norm", due, "the observed gradients", bound * due)
                if found:
                    raise Violation(case, "gradient norm is that of the observed gradients", *found)
    return len(steps(case))


def gradient_norm_matches_the_reference(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """The reported norm, and so the clip coefficient, is the reference's on every rank."""
    base, judged = base_of(case, reference, "norm"), 0
    for step in certain_steps(case, reference):
        for role in TRAINED:
            key = f"{step.key}/{role}_norm"
            due = reference.numbers[key]
            scale = max(due, FLOOR[case.precision] * summands(case, reference, str(step.iteration), role))
            allowed = scale * bound_of(reference, key, max(base, _adam_noise(case, reference, step, False)), scale)
            for rank in ranks:
                found = _wrong_norm(rank, key, due, "the reference", allowed)
                if found:
                    raise Violation(case, "gradient norm matches the reference", *found)
            judged += 1
    return judged


def zeros_of_gradients_are_counted(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """The reported number of zeros is that of the observed gradients over unique parameters, on every rank."""
    if not case.switches.count_zeros:
        return 0
    for key, role in ((step.key, role) for step in steps(case) for role in TRAINED):
        due = float((_unique(case, ranks, reference, role, f"{key}/{role}/grad") == 0).sum())
        for rank in ranks:
            if (counted := rank.numbers[f"{key}/{role}_zeros"]) != due:
                said = f"{counted:.0f} zeros are reported of the {role}'s gradients, which have {due:.0f}"
                finding = Finding(f"rank {rank.rank}, {key}/{role}_zeros", str(due), str(counted), said)
                raise Violation(case, "zeros of gradients are counted", *finding)
    return len(steps(case))


# ---- the optimizer, from what it was given ---------------------------------------------------------------------


def _decays(case: Case, name: str, shape: Sequence[int]) -> bool:
    of_heads = case.ppo.qk_decay and name.endswith(("q_norm.weight", "k_norm.weight"))
    return of_heads or (len(shape) > 1 and not name.endswith(".bias"))


def _rate(case: Case, role: str, name: str) -> float:
    of_tokens = name.endswith("embed_tokens.weight") or name == "lm_head.weight"
    usual = case.ppo.lr if role == "actor" else case.ppo.critic_lr
    return case.ppo.embedding_lr if of_tokens and case.ppo.embedding_lr > 0 else usual


def _coefficient(case: Case, norm: float) -> float:
    return min(1.0, case.ppo.max_norm / (norm + 1e-6)) if case.ppo.max_norm > 0 else 1.0


def _adam(
    case: Case, w: torch.Tensor, g: torch.Tensor, before: Mapping, t: int, lr: torch.Tensor, wd: torch.Tensor
) -> dict:
    p = case.ppo
    if p.coupled_decay:
        g, wd = g + wd * w, torch.zeros_like(wd)
    m = p.beta1 * before["exp_avg"] + (1 - p.beta1) * g
    v = p.beta2 * before["exp_avg_sq"] + (1 - p.beta2) * g * g
    moved = (m / (1 - p.beta1**t)) / ((v / (1 - p.beta2**t)).sqrt() + p.eps)
    return {"weight": w - lr * wd * w - lr * moved, "exp_avg": m, "exp_avg_sq": v}


def _sgd(
    case: Case, w: torch.Tensor, g: torch.Tensor, before: Mapping, t: int, lr: torch.Tensor, wd: torch.Tensor
) -> dict:
    g = g + wd * w
    carried = g if t == 1 or not case.ppo.momentum else case.ppo.momentum * before["momentum_buffer"] + g
    state = {"momentum_buffer": carried} if case.ppo.momentum else {}
    return {"weight": w - lr * carried, **state}


def _states(case: Case) -> tuple[str, ...]:
    return STATES[case.ppo.optimizer] if case.ppo.optimizer == "adam" or case.ppo.momentum else ()


def _before(case: Case, rank: Observation, role: str, trained: Group, number: int) -> dict[str, torch.Tensor]:
    """Weights and state just before step `number` of the program, flat over all trained tensors of a rank."""
    if number > 0:
        key = f"{steps(case)[number - 1].key}/{role}"
        return {kind: group(rank, f"{key}/{kind}").of(trained.names) for kind in ("weight", *_states(case))}
    initial, held = (
        weights.canonical(case.model, role, case.seed),
        weights.held(case.model, case.layout, role, rank.rank),
    )
    w = torch.cat([initial[name][held[name]].reshape(-1) for name in trained.names])
    w = w.float().double() if case.precision == "float32" else w
    return {"weight": w} | {k: torch.zeros_like(w) for k in _states(case)}


def _misstepped(case: Case, rank: Observation, role: str, number: int) -> Finding | None:
    prefix = f"{steps(case)[number].key}/{role}"
    gradients = group(rank, f"{prefix}/grad")
    if not gradients.shapes:
        return None
    before, of, p = _before(case, rank, role, gradients, number), owners(gradients.shapes), case.ppo
    wd = torch.tensor([p.weight_decay * _decays(case, *one) for one in gradients.shapes], dtype=torch.float64)[of]
    lr = torch.tensor([_rate(case, role, name) for name in gradients.names], dtype=torch.float64)[of]
    g = gradients.flat * _coefficient(case, rank.numbers[f"{prefix}_norm"])
    rule = _adam if case.ppo.optimizer == "adam" else _sgd
    due = rule(case, before["weight"], g, before, number + 1, lr, wd)
    for kind, truth in due.items():
        mine = group(rank, f"{prefix}/{kind}").of(gradients.names)
        scale = max(float(truth.abs().max()), float(before[kind].abs().max()))
        found = compare(f"{prefix}/{kind}", rank.rank, mine, truth, scale, BOUNDS[case.precision]["step"])
        if found:
            return found._replace(witness=f"{found.witness}, {_owner(gradients, found)}")
    return None


def _owner(gradients: Group, found: Finding) -> str:
    """Which tensor the flat index of a finding falls into."""
    index = int(found.witness.rsplit("[", 1)[1].rstrip("]"))
    return gradients.names[int(owners(gradients.shapes)[index])]


def the_optimizer_does_its_formula(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """AdamW or SGD, decaying matrices only, leads from observed weights, moments, gradients and norm to those after."""
    for number in range(len(steps(case))):
        for role in TRAINED:
            for rank in ranks:
                found = _misstepped(case, rank, role, number)
                if found:
                    raise Violation(case, "the optimizer does its formula", *found)
    return len(steps(case))


def weights_and_moments_match_the_reference(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Weights and optimizer state after each step are those of the one-process reference."""
    judged = 0
    for step in certain_steps(case, reference):
        for role in TRAINED:
            for kind in ("weight", *_states(case)):
                base = _base(case, reference, step, kind)
                found = compare_pieces(case, ranks, reference, role, f"{step.key}/{role}/{kind}", base)
                if found:
                    raise Violation(case, "weights and moments match the reference", *found)
            judged += 1
    return judged


def expert_biases_follow_the_load(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """After each step a bias is one rate higher where its expert had fewer tokens than the mean, lower where more.

    Counted over all tokens of the mini-batch, of all ranks. The bound is float32's: megatron keeps biases in it.
    """
    judged = 0
    for step in certain_steps(case, reference):
        for role in TRAINED:
            for name in weights.expert_biases(case.model, role, case.seed):
                key = f"{step.key}/{role}/expert_bias/{name}"
                for rank in (rank for rank in ranks if key in rank.tensors):
                    found = compare(key, rank.rank, rank.tensors[key], reference.tensors[key], 1.0, BIAS_BOUND)
                    if found:
                        raise Violation(case, "expert biases follow the load", *found)
                    judged += 1
    return judged


# ---- metrics ---------------------------------------------------------------------------------------------------


def metrics_agree_on_all_ranks(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Reported metrics are bitwise the same on every rank."""
    for key, value in ranks[0].numbers.items():
        for rank in ranks[1:]:
            if rank.numbers.get(key) != value:
                where, said = f"rank {rank.rank}, {key}", f"rank {rank.rank} reports another {key} than rank 0"
                finding = Finding(where, f"{value!r} (rank 0)", f"{rank.numbers.get(key)!r}", said)
                raise Violation(case, "metrics agree on all ranks", *finding)
    return len(ranks[0].numbers) if len(ranks) > 1 else 0


def _wrong_metric(case: Case, rank: Observation, reference: Observation, step: Step, name: str) -> Finding | None:
    key = f"{step.key}/{name}"
    due, mine = reference.numbers[key], rank.numbers[key]
    scale = max(1.0, abs(due))
    if abs(mine - due) <= bound_of(reference, key, _base(case, reference, step, "metric"), scale) * scale:
        return None
    sentence = f"{name} of step {step.key} is {mine:.12g}; over the whole mini-batch it is {due:.12g}"
    return Finding(f"rank {rank.rank}, {key}", f"{due:.12g}", f"{mine:.12g}", sentence)


def metrics_match_the_reference(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Losses, entropy, KL and clip fractions are those of the whole mini-batch, on every rank."""
    judged = 0
    for step in certain_steps(case, reference):
        for name in METRICS:
            for rank in ranks:
                found = _wrong_metric(case, rank, reference, step, name)
                if found:
                    raise Violation(case, "metrics match the reference", *found)
        judged += 1
    return judged


def later_mini_batches_move(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """After the first step the new log-probs are those of the moved policy, as in the reference."""
    judged = 0
    for step in certain_steps(case, reference):
        if step.step == 0:
            continue
        key, base = f"{step.key}/logp", _base(case, reference, step, "logp")
        truth = reference.tensors[key]
        for rank in seers(case, ranks):
            order, rows = [row for share in _order(case, step) for row in share], rows_in(case, rank.rank, step)
            due = truth[[order.index(row) for row in rows]] * trained(case, rank.rank, rows)
            scale = max(1.0, float(truth.abs().max()))
            bound = bound_of(reference, key, base, scale)
            found = compare(key, rank.rank, rank.tensors[key], due, scale, bound)
            if found:
                raise Violation(case, "later mini-batches move", *found)
        judged += bool(reference.numbers[f"{step.key}/approx_kl"] != 0)
    return judged


def _order(case: Case, step: Step) -> list[list[int]]:
    """Rows of a mini-batch in the reference's order: ascending."""
    share = case.batch.rows // case.ppo.mini_batches
    return [list(range(step.mini_batch * share, (step.mini_batch + 1) * share))]
