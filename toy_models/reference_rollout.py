"""The reference's rollout: inverse CDF, one batched forward per position; and where responses lie in rows.

Knows no megatron, no layout but the padded width, no reward, no update. Shapes: R rows, P longest prompt,
J longest response, W padded width, V vocabulary.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from toy_models import batching
from toy_models.families import Tensors
from toy_models.reference_model import Pass, forward, joined, routing_gap


@dataclass(frozen=True)
class Responses:
    """Sequences [R, W] and mask [R, J], and the index arithmetic between the two."""

    sequences: torch.Tensor
    mask: torch.Tensor
    prompt_lengths: tuple[int, ...]
    longest_prompt: int
    # Where experts have a capacity a token depends on those after it, so that how near choices came is seen as they are
    # made: of each sampled token [R, J], and of routing.
    margin: torch.Tensor | None = None
    routing: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> torch.Tensor:
        """The sequences [R, P + J], without what the width was rounded up by."""
        return self.sequences[:, : self.longest_prompt + self.mask.shape[1]].clone()

    @property
    def counts(self) -> list[int]:
        """Tokens in each response: its last token is always sampled."""
        return [1 + max(row.nonzero().flatten().tolist()) for row in self.mask]

    @property
    def padding(self) -> torch.Tensor:
        """True [R, W] behind the last token of each row."""
        ends = torch.tensor([p + n for p, n in zip(self.prompt_lengths, self.counts, strict=True)])
        return torch.arange(self.sequences.shape[1]) >= ends[:, None]

    @property
    def positions(self) -> torch.Tensor:
        """Sequence position of every response token [R, J]."""
        return torch.tensor(self.prompt_lengths)[:, None] + torch.arange(self.mask.shape[1])

    @property
    def targets(self) -> torch.Tensor:
        return self.sequences.gather(1, self.positions)

    def at_predictions(self, x_RW: torch.Tensor) -> torch.Tensor:
        """What stands one position before each response token: where it was predicted, [R, J, ...]."""
        return x_RW[torch.arange(len(self.prompt_lengths))[:, None], self.positions - 1]

    def at_last_tokens(self, x_RW: torch.Tensor) -> torch.Tensor:
        ends = zip(self.prompt_lengths, self.counts, strict=True)
        return torch.stack([x_RW[row, prompt + count - 1] for row, (prompt, count) in enumerate(ends)])

    def masked(self, x_RJ: torch.Tensor) -> torch.Tensor:
        return torch.where(self.mask.bool(), x_RJ, 0.0)

    def of_rows(self, rows: list[int]) -> "Responses":
        lengths = tuple(self.prompt_lengths[row] for row in rows)
        return replace(self, sequences=self.sequences[rows], mask=self.mask[rows], prompt_lengths=lengths)


def _padding(case: Any) -> Responses:
    """No prompt and no response yet: the padding token everywhere."""
    width = batching.padded_width(case.layout, case.batch)
    pad = batching.pad_token(case.model, case.batch)
    sequences = torch.full((case.batch.rows, width), pad, dtype=torch.int64)
    mask = torch.zeros(case.batch.rows, case.batch.response, dtype=torch.int64)
    return Responses(sequences, mask, batching.prompt_lengths(case.batch, case.seed), case.batch.prompt)


def forced_responses(case: Any, tokens: torch.Tensor, mask: torch.Tensor) -> Responses:
    """Given `tokens` [R, P + J] and `mask` [R, J], as a rollout would have made them."""
    made = _padding(case)
    made.sequences[:, : tokens.shape[1]] = tokens
    return replace(made, mask=mask.to(torch.int64))


def sample(p_V: torch.Tensor, u: float) -> int:
    """First token whose cumulative probability exceeds `u`, at most the last of positive probability."""
    first = int((p_V.cumsum(0) <= u).sum())
    return min(first, int(p_V.nonzero().max()))


def evaluated(case: Any, role: str, state: Tensors, sequences: torch.Tensor) -> Pass:
    """A forward pass over all rows; where experts have a capacity, micro-batch by micro-batch, as the system does.

    Roles that never learn may be without sequence parallelism: then each TP rank routes the whole sequence.
    """
    if not case.model.capacity:
        return forward(case.model, state, sequences)
    minis = batching.partition(case.layout, case.batch, case.ppo).micro
    groups = [list(micro) for mini in minis for share in mini for micro in share]
    cut = case.switches.forward_sp or role in ("actor", "critic")
    shards = batching.shards(case.layout, case.batch.micro_rows, sequences.shape[1], cut)
    return joined([forward(case.model, state, sequences[rows], shards) for rows in groups])


@torch.no_grad()
def rollout(case: Any, actor: Tensors, iteration: int) -> Responses:
    """Sample all responses, row by row and position by position."""
    made = _padding(case)
    if case.model.capacity:
        made = replace(made, margin=torch.full(made.mask.shape, float("inf"), dtype=torch.float64))
    for row, prompt in enumerate(batching.prompt_tokens(case.model, case.batch, case.seed, iteration)):
        made.sequences[row, : len(prompt)] = torch.tensor(prompt)
    limits = batching.response_limits(case.batch, case.seed)
    alive = list(range(case.batch.rows))
    for j in range(case.batch.response):
        alive = [row for row in alive if j < limits[row]]
        if alive:
            alive = _extend(case, actor, iteration, made, alive, j)
    return made


def _extend(case: Any, actor: Tensors, iteration: int, made: Responses, alive: list[int], j: int) -> list[int]:
    """Put token `j` into the responses of the rows `alive`; the rows that go on."""
    lengths = [made.prompt_lengths[row] + j for row in alive]
    if case.model.capacity:  # whom experts drop depends on all rows, and on their padding
        whole = evaluated(case, "actor", actor, made.sequences)
        made.routing.append(routing_gap(case.model, whole))
        z = whole.output[alive]
    else:
        z = forward(case.model, actor, made.sequences[alive, : max(lengths)]).output
    going_on = []
    for index, (row, length) in enumerate(zip(alive, lengths, strict=True)):
        token = batching.forced_token(case.model, case.batch, case.seed, iteration, row, j)
        sampled = token is None
        if token is None:
            p_V = (z[index, length - 1] / case.ppo.temperature).softmax(-1)
            u = batching.uniform("sample", case.seed, iteration, row, j)
            token = sample(p_V, batching.uniform("sample", case.seed, iteration, row, j))
            if made.margin is not None:
                made.margin[row, j] = _distance(p_V, token, u)
        made.sequences[row, length], made.mask[row, j] = token, int(sampled)
        if not (sampled and token == batching.end_token(case.model)):
            going_on.append(row)
    return going_on


def sampling_margin(case: Any, of: Responses, z_RWV: torch.Tensor, iteration: int) -> torch.Tensor:
    """How far each uniform was from giving another token [R, J]; inf where nothing was sampled.

    Negative where a forced token is not the one that would have been sampled.
    """
    if of.margin is not None:
        return of.margin
    p_RJV = (of.at_predictions(z_RWV) / case.ppo.temperature).softmax(-1)
    margin = torch.full(of.mask.shape, float("inf"), dtype=torch.float64)
    for row, j in of.mask.nonzero().tolist():
        u = batching.uniform("sample", case.seed, iteration, row, j)
        margin[row, j] = _distance(p_RJV[row, j], int(of.targets[row, j]), u)
    return margin


def _distance(p_V: torch.Tensor, token: int, u: float) -> float:
    cumulative, positive = p_V.cumsum(0).tolist(), p_V.nonzero().flatten().tolist()
    below = u - cumulative[token - 1] if token > positive[0] else float("inf")
    above = cumulative[token] - u if token < positive[-1] else float("inf")
    return min(below, above)
