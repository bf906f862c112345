"""Laws of state: replicas are bitwise identical, what must not change does not, coordinates are what the order says."""

from collections.abc import Iterator, Sequence

import torch

from fuzz.case import Case, Observation, Violation
from fuzz.laws.compare import STATES, TRAINED, Finding, holders, iterations, steps, updated
from fuzz.laws.pieces import due, group, places
from fuzz.tensors import Tensors, grouped
from toy_models import weights
from toy_models.coordinates import chunks, coordinates, is_last, layers_on
from toy_models.coordinates import groups as expected_groups


def _due(case: Case, rank: int, reference: Tensors) -> Iterator[tuple[str, tuple[str, ...]]]:
    """By group the names that a rank must have observed: the reference's, less what other ranks hold or see."""
    for name, shapes in reference.groups.items():
        names = tuple(tensor for tensor, _ in shapes)
        parts = name.split("/")
        if parts[-1] == "expert_bias":  # each rank of a layer has all biases of its router
            layers = layers_on(case.layout, case.model.layers, rank)
            yield name, tuple(tensor for tensor in names if weights.layer_of(tensor) in layers)
        elif len(parts) > 3:
            yield name, due(case.model, case.layout, parts[2], rank, names)
        elif parts[-1] != "margin":
            unseen = () if is_last(case.layout, rank) else ("logits", "logp")
            yield name, tuple(tensor for tensor in names if tensor not in unseen)


def everything_asked_for_is_done(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Every rank has every rollout, every optimizer step of every epoch, and every tensor of them that it holds."""
    judged, whole = 0, grouped(reference.tensors)
    for rank in ranks:
        seen, number, missing = grouped(rank.tensors).groups, 0, []
        for name, names in _due(case, rank.rank, whole):
            there = {tensor for tensor, _ in seen.get(name, ())}
            missing += [f"{name}/{tensor}" for tensor in names if tensor not in there]
            number += len(names)
        if missing:
            said = f"{len(missing)} of {number} tensors are missing on rank {rank.rank}, {missing[0]} first"
            finding = Finding(f"rank {rank.rank}, {missing[0]}", f"{number} tensors", f"{len(missing)} missing", said)
            raise Violation(case, "everything asked for is done", *finding)
        judged += number
    return judged


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


def _alike(case: Case, ranks: Sequence[Observation], reference: Observation, role: str, prefix: str) -> bool:
    """Whether whoever holds an element of a group holds what the first rank that has it holds: in one pass."""
    whole = group(reference, prefix)
    first, known = torch.zeros(len(whole.flat), dtype=torch.float64), torch.zeros(len(whole.flat), dtype=torch.bool)
    for rank in ranks:
        mine = group(rank, prefix)
        where = places(case, role, rank.rank, mine, whole)
        if where is None or not torch.equal(first[where.at], torch.where(known[where.at], mine.flat, 0.0)):
            return False
        first[where.at], known[where.at] = mine.flat, True
    return True


def replicas_are_bitwise_identical(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Ranks that hold the same slice hold the same bits: gradients, weights and optimizer state, at every step."""
    judged = 0
    for step in steps(case):
        for role in TRAINED:
            replicas = holders(case, role)
            judged += sum(len(members) > 1 for members in replicas.values())
            for kind in ("grad", "weight", *STATES[case.ppo.optimizer]):
                prefix = f"{step.key}/{role}/{kind}"
                if _alike(case, ranks, reference, role, prefix):
                    continue
                for (name, *_), members in replicas.items():
                    if found := _unlike_replica(ranks, members, f"{prefix}/{name}"):
                        raise Violation(case, "replicas are bitwise identical", *found)
    return judged


def expert_biases_are_the_same_on_all_ranks(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Every rank that has a layer, over TP, CP and DP, has bitwise the same biases in its router after every step."""
    judged = 0
    for name in weights.expert_biases(case.model, "actor", case.seed):
        layer, world = weights.layer_of(name), range(case.layout.world)
        members = [rank for rank in world if layer in layers_on(case.layout, case.model.layers, rank)]
        for key in (f"{step.key}/{role}/expert_bias/{name}" for step in steps(case) for role in TRAINED):
            found = _unlike_replica(ranks, members, key)
            if found:
                raise Violation(case, "expert biases are the same on all ranks", *found)
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
    """Megatron's coordinates of every rank equal an independent formula of the order of the axes."""
    for rank in ranks:
        due, there = coordinates(case.layout, rank.rank)._asdict(), rank.facts["coordinates"]
        if due != there:
            finding = Finding(f"rank {rank.rank}", str(due), str(there), "megatron places the rank elsewhere")
            raise Violation(case, "ranks sit where the order says", *finding)
    return len(ranks)


def _misgrouped(case: Case, rank: Observation) -> Finding | None:
    for kind, there in rank.facts["groups"].items():
        due = next((group for group in expected_groups(case.layout, kind) if rank.rank in group), None)
        if due != there:
            said = f"rank {rank.rank} is in another {kind} group than the order {case.layout.order} says"
            return Finding(f"rank {rank.rank}, {kind} group", str(due), str(there), said)
    meet = set(rank.facts["groups"]["etp"]) & set(rank.facts["groups"]["ep"])
    if meet != {rank.rank}:
        said = f"the ETP and EP groups of rank {rank.rank} do not meet in it alone"
        return Finding(f"rank {rank.rank}", f"{{{rank.rank}}}", str(sorted(meet)), said)
    return None


def every_group_is_what_the_order_says(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Every process group has the ranks, in order, that agree on all other axes: a partition of the world."""
    for rank in ranks:
        found = _misgrouped(case, rank)
        if found:
            raise Violation(case, "every group is what the order says", *found)
    return len(ranks) if len(ranks) > 1 else 0


def _misnumbered(case: Case, rank: Observation, role: str) -> Finding | None:
    """Of each virtual stage the numbers, from 1, and kinds of its layers."""
    places = chunks(case.layout, case.model.layers, rank.rank)
    due = [[(layer + 1, layer in case.model.moe) for layer in chunk] for chunk in places]
    there = [[tuple(layer) for layer in chunk] for chunk in rank.facts[f"layers/{role}"]]
    if due == there:
        return None
    said = f"the layers of the {role} on rank {rank.rank}, as (number, has experts) per virtual stage, are others"
    return Finding(f"rank {rank.rank}, {role}", str(due), str(there), said)


def every_layer_is_there_once(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Over all pipeline and virtual stages the layers are numbered 1..L, each once, and have experts where asked."""
    for rank in ranks:
        for role in weights.ROLES:
            found = _misnumbered(case, rank, role)
            if found:
                raise Violation(case, "every layer is there once", *found)
    return len(ranks) if case.layout.pp > 1 or case.model.dense else 0
