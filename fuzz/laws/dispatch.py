"""Laws of the token dispatcher, judged from a ledger of stamped tokens: who must get which copy, what must come back.

Expected numbers come from the case and the shard map's coordinates; nothing is asked of megatron.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fuzz.case import Case, Observation, Violation
from fuzz.laws.compare import BOUNDS, Finding, certain_iterations, compare, iterations, rows_of
from toy_models import routing, weights
from toy_models.coordinates import coordinates, layers_on


def _layers(case: Case, rank: int) -> list[str]:
    """The ledgers of a rank: of each iteration and each layer with experts on its stages."""
    here = [layer for layer in layers_on(case.layout, case.model.layers, rank) if layer in case.model.moe]
    return [f"{i}/dispatch/{layer}" for i in iterations(case) for layer in here]


def _peers(case: Case, rank: int) -> list[int]:
    """The ranks that exchange tokens with this one, itself included: the same EDP (and pipeline) coordinate."""
    mine = coordinates(case.layout, rank)
    everyone = {r: coordinates(case.layout, r) for r in range(case.layout.world)}
    return [r for r, at in everyone.items() if (at.edp, at.pp) == (mine.edp, mine.pp)]


def _copies_due(case: Case, ranks: Sequence[Observation], rank: int, key: str) -> Counter:
    """(expert, token id) -> copies that must reach this rank: every peer's tokens routed to its experts, once."""
    local = case.model.experts // case.layout.ep
    first = coordinates(case.layout, rank).ep * local
    due: Counter = Counter()
    for peer in _peers(case, rank):
        seen = ranks[peer].tensors
        mine = seen[f"{key}/map"][:, first : first + local].bool()
        ids = seen[f"{key}/sent"][:, 0].round().long()
        due.update((first + int(e), int(ids[t])) for t, e in mine.nonzero())
    return due


def _copies_there(case: Case, rank: Observation, key: str) -> Counter:
    local = case.model.experts // case.layout.ep
    first = coordinates(case.layout, rank.rank).ep * local
    counts = rank.tensors[f"{key}/counts"].long()
    experts = torch.arange(first, first + local).repeat_interleave(counts)
    ids = rank.tensors[f"{key}/arrived"][:, 0].round().long()
    return Counter(zip(experts.tolist(), ids.tolist(), strict=True))


def _miscarried(case: Case, ranks: Sequence[Observation], rank: Observation, key: str) -> Finding | None:
    total, rows = int(rank.tensors[f"{key}/counts"].sum()), len(rank.tensors[f"{key}/arrived"])
    where = f"rank {rank.rank}, {key}"
    if total != rows:
        return Finding(where, f"{total} copies (sum of counts)", f"{rows} rows", "counts do not add up to the copies")
    due, there = _copies_due(case, ranks, rank.rank, key), _copies_there(case, rank, key)
    if due == there:
        return None
    expert, token = min((due - there) or (there - due))
    numbers = f"{due[expert, token]} copies", f"{there[expert, token]} copies"
    sentence = f"token {token} arrived at expert {expert} {there[expert, token]} times instead of {due[expert, token]}"
    return Finding(f"{where}, expert {expert}, token {token}", *numbers, sentence)


def every_copy_is_delivered_once(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Every routed copy (token, expert) arrives exactly once on each ETP rank of the EP rank that hosts the expert."""
    for rank in ranks:
        for key in _layers(case, rank.rank):
            found = _miscarried(case, ranks, rank, key)
            if found:
                raise Violation(case, "every copy is delivered once", *found)
    return sum(len(rank.tensors[f"{key}/arrived"]) for rank in ranks for key in _layers(case, rank.rank))


def _unequal_splits(case: Case, ranks: Sequence[Observation], sender: Observation, key: str) -> Finding | None:
    at, sent = coordinates(case.layout, sender.rank), sender.facts[f"{key}/splits"]["input"]
    for receiver in (ranks[peer] for peer in _peers(case, sender.rank)) if sent else ():
        to, got = coordinates(case.layout, receiver.rank), receiver.facts[f"{key}/splits"]["output"]
        if at.etp == to.etp and sent[to.ep] != got[at.ep]:
            where = f"{key}, rank {sender.rank} to rank {receiver.rank}"
            return Finding(where, f"{sent[to.ep]} sent", f"{got[at.ep]} expected there", "split sizes disagree")
    return None


def send_splits_equal_receive_splits(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """What rank i says it sends to rank j in the all-to-all is what j says it receives from i, pair by pair."""
    ledgers = [(rank, key) for rank in ranks for key in _layers(case, rank.rank)]
    for rank, key in ledgers:
        found = _unequal_splits(case, ranks, rank, key)
        if found:
            raise Violation(case, "send splits equal receive splits", *found)
    return sum(rank.facts[f"{key}/splits"]["input"] is not None for rank, key in ledgers)


def combine_of_dispatch_is_the_sum_of_probabilities(
    case: Case, ranks: Sequence[Observation], reference: Observation
) -> int:
    """With experts e(x, p) = p·x/ETP, combine(dispatch(x)) = x times the sum of the token's kept probabilities."""
    bound = BOUNDS[case.precision]["forward"]
    ledgers = [(rank, key) for rank in ranks for key in _layers(case, rank.rank)]
    for rank, key in ledgers:
        seen = rank.tensors
        due = seen[f"{key}/sent"].double() * seen[f"{key}/probs"].double().sum(1, keepdim=True)
        scale = float(due.abs().max())
        found = compare(f"{key}/combined", rank.rank, seen[f"{key}/combined"], due, scale, bound)
        if found:
            raise Violation(case, "combine of dispatch is the sum of probabilities", *found)
    return len(ledgers)


class _Router(NamedTuple):
    """What a router has learned: `weight` [E, H], what it adds to logits [E], and the `bias` [E] that it chooses by.

    None where there is none.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    added: torch.Tensor | None = None


def _formula(case: Case, hidden: torch.Tensor, router: _Router) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gates [tokens, E], zero where not chosen; which are chosen; the margin [tokens] of the nearest choice."""
    logits = hidden.double() @ router.weight.t()
    logits = logits if router.added is None else logits + router.added
    if case.model.plain_router:
        return _plain(case, logits)
    choice = routing.choose(case.model, logits, router.bias)
    gates = torch.zeros_like(logits).scatter(1, choice.experts, routing.gates(case.model, logits, choice.experts))
    return gates, torch.zeros_like(logits).scatter(1, choice.experts, 1.0).bool(), choice.margin


def _plain(case: Case, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for the plain softmax router, all tokens at once."""
    k = case.model.top_k
    top = logits.topk(min(k + 1, case.model.experts), dim=1)
    margin = (
        top.values[:, k - 1] - top.values[:, k] if k < case.model.experts else torch.full_like(logits[:, 0], torch.inf)
    )
    chosen = torch.zeros_like(logits).scatter(1, top.indices[:, :k], 1.0)
    gates = logits.softmax(1) * chosen
    gates = gates / gates.sum(1, keepdim=True) if case.model.norm_topk_prob else gates
    return gates, chosen.bool(), margin


def _misrouted(case: Case, rank: Observation, key: str, router: _Router) -> Finding | None:
    seen = {name: rank.tensors[f"{key}/{name}"] for name in ("hidden", "probs", "map")}
    gates, chosen, margin = _formula(case, seen["hidden"], router)
    if case.model.capacity:
        gates, chosen, margin = _kept(case, rank.rank, gates, chosen, margin)
    clear = margin > (1e-9 if case.precision == "float64" else 1e-5)
    bound = BOUNDS[case.precision]["forward"]
    counts = seen["map"].sum(1)
    if (counts != case.model.top_k).any() and not case.model.capacity:
        t = int((counts != case.model.top_k).int().argmax())
        where = f"rank {rank.rank}, {key}, token {t}"
        return Finding(
            where, f"{case.model.top_k} experts", f"{int(counts[t])}", "a token has not top_k distinct experts"
        )
    there = seen["map"].bool()
    there = there & (chosen | (gates > 0)) if case.model.pad_to_capacity else there
    wrong = (chosen != there).any(1) & clear
    if wrong.any():
        t = int(wrong.int().argmax())
        experts = str(chosen[t].nonzero().flatten().tolist()), str(seen["map"][t].nonzero().flatten().tolist())
        return Finding(f"rank {rank.rank}, {key}, token {t}", *experts, "a token goes to the wrong experts")
    return compare(f"{key}/probs", rank.rank, seen["probs"][clear], gates[clear], max(1.0, case.model.scaling), bound)


def _kept(
    case: Case, rank: int, gates: torch.Tensor, chosen: torch.Tensor, margin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same without the copies that experts have no room for, micro-batch by micro-batch."""
    calls = torch.arange(len(gates)).chunk(len(rows_of(case, rank)) // case.batch.micro_rows)
    experts = chosen.nonzero()[:, 1].reshape(-1, case.model.top_k)
    gone, nearest = routing.dropped(case.model, gates.gather(1, experts), experts, calls)
    lost = torch.zeros_like(chosen).scatter(1, experts, gone)
    return gates.masked_fill(lost, 0.0), chosen & ~lost, margin.clamp(max=nearest)


def _as_loaded(case: Case, weight: torch.Tensor | None) -> torch.Tensor | None:
    return weight if weight is None or case.precision == "float64" else weight.float().double()


def routing_is_valid(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """From each router's observed input: the top_k experts of the greatest scores, gates as the score function says;
    of each expert no more copies than it has room for, those of the greatest gates.
    """
    learned = weights.canonical(case.model, "actor", case.seed)
    biases = weights.expert_biases(case.model, "actor", case.seed)
    judged = 0
    for i in certain_iterations(case, reference):
        if i > 0:
            break  # later iterations route with updated weights, judged against the reference
        for layer in case.model.moe:
            gate = f"model.layers.{layer}.mlp.gate"
            weight, added = (_as_loaded(case, learned.get(f"{gate}.{kind}")) for kind in ("weight", "bias"))
            assert weight is not None
            router = _Router(weight, biases.get(f"{gate}.e_score_correction_bias"), added)
            for rank in (r for r in ranks if layer in layers_on(case.layout, case.model.layers, r.rank)):
                found = _misrouted(case, rank, f"{i}/route/{layer}", router)
                if found:
                    raise Violation(case, "routing is valid", *found)
                judged += 1
    return judged
