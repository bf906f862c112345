"""Laws of state: replicas are bitwise identical, what must not change does not, coordinates are what the order says."""

from collections import defaultdict
from collections.abc import Sequence

import torch

from fuzz.case import Case, Observation, Violation
from fuzz.laws.compare import STATES, TRAINED, Finding, iterations, steps, updated
from toy_models import weights
from toy_models.coordinates import coordinates


def _due(case: Case, rank: int, reference: Observation) -> list[str]:
    """The keys that a rank must have observed: those of the reference, less the experts that it does not hold."""
    due = []
    for key in reference.tensors:
        parts = key.split("/")
        held = len(parts) < 5 or parts[4] in weights.held(case.model, case.layout, parts[2], rank)
        if held and "margin" not in parts:
            due.append(key)
    return due


def everything_asked_for_is_done(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Every rank has every rollout, every optimizer step of every epoch, and every tensor of them that it holds."""
    judged = 0
    for rank in ranks:
        due = _due(case, rank.rank, reference)
        missing = [key for key in due if key not in rank.tensors]
        if missing:
            said = f"{len(missing)} of {len(due)} tensors are missing on rank {rank.rank}, {missing[0]} first"
            finding = Finding(f"rank {rank.rank}, {missing[0]}", f"{len(due)} tensors", f"{len(missing)} missing", said)
            raise Violation(case, "everything asked for is done", *finding)
        judged += len(due)
    return judged


def _groups(case: Case, role: str) -> dict[tuple, list[int]]:
    """(name, slice) -> the ranks that hold it."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for rank in range(case.layout.world):
        for name, where in weights.held(case.model, case.layout, role, rank).items():
            groups[name, *((s.start, s.stop) for s in where)].append(rank)
    return groups


def _unlike_replica(ranks: Sequence[Observation], members: Sequence[int], key: str) -> Finding | None:
    first = ranks[members[0]].tensors.get(key)
    for member in members[1:]:
        mine = ranks[member].tensors.get(key)
        if first is None or mine is None or torch.equal(first, mine):
            continue
        worst = int((first - mine).abs().flatten().argmax())
        numbers = repr(float(first.flatten()[worst])), repr(float(mine.flatten()[worst]))
        said = f"ranks {members[0]} and {member} hold the same slice of {key} and differ"
        return Finding(f"ranks {members[0]} and {member}, {key}, flat element {worst}", *numbers, said)
    return None


def replicas_are_bitwise_identical(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Ranks that hold the same slice hold the same bits: gradients, weights and optimizer state, at every step."""
    judged = 0
    for step in steps(case):
        for role in TRAINED:
            for (name, *_), members in _groups(case, role).items():
                for kind in ("grad", "weight", *STATES[case.ppo.optimizer]):
                    found = _unlike_replica(ranks, members, f"{step.key}/{role}/{kind}/{name}")
                    if found:
                        raise Violation(case, "replicas are bitwise identical", *found)
                judged += len(members) > 1
    return judged


def rows_are_the_same_on_model_parallel_ranks(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Ranks of one DP coordinate hold bitwise the same tokens, log-probs, values, advantages and returns."""
    judged, names = 0, ("tokens", "mask", "old_logp", "ref_logp", "values", "scores", "advantages", "returns")
    for rank in ranks:
        peer = next(r.rank for r in ranks if _dp(case, r.rank) == _dp(case, rank.rank))
        for i in iterations(case):
            for name in names:
                found = _unlike_replica(ranks, [peer, rank.rank], f"{i}/{name}")
                if found:
                    raise Violation(case, "rows are the same on model-parallel ranks", *found)
        judged += peer != rank.rank
    return judged


def _dp(case: Case, rank: int) -> int:
    return coordinates(case.layout, rank).dp


def _changed(rank: Observation, before: str, after: str, roles: Sequence[str]) -> Finding | None:
    old, new = rank.facts[f"{before}/digest"], rank.facts[f"{after}/digest"]
    for role in roles:
        for name, bits in old[role].items():
            if new[role][name] != bits:
                said = f"{name} of the {role} model changed between '{before}' and '{after}'"
                return Finding(f"rank {rank.rank}, {role}, {name}", bits, new[role][name], said)
    return None


def forward_passes_change_nothing(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Rollout and log-prob passes leave every parameter and buffer of all four models as it was, bit by bit."""
    for i in iterations(case):
        for rank in ranks:
            found = _changed(rank, f"{i}/start", f"{i}/experienced", weights.ROLES)
            if found:
                raise Violation(case, "forward passes change nothing", *found)
    return len(iterations(case))


def reference_and_reward_models_never_change(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Updates leave the reference and reward models as they were, bit by bit."""
    for i in updated(case):
        for rank in ranks:
            found = _changed(rank, "0/start", f"{i}/updated", ("reference", "reward"))
            if found:
                raise Violation(case, "reference and reward models never change", *found)
    return len(updated(case))


def ranks_sit_where_the_order_says(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Megatron's coordinates of every rank equal an independent formula of the order tp-cp-ep-dp-pp."""
    for rank in ranks:
        due, there = coordinates(case.layout, rank.rank)._asdict(), rank.facts["coordinates"]
        if due != there:
            finding = Finding(f"rank {rank.rank}", str(due), str(there), "megatron places the rank elsewhere")
            raise Violation(case, "ranks sit where the order says", *finding)
    return len(ranks)
