"""What follows from a case by key alone: uniforms, prompts, lengths, forced tokens, and which row sits where.

Stdlib only, so that trainer and reference agree in every process, version and layout without sharing any arithmetic.
"""

import hashlib
from dataclasses import dataclass
from functools import cache, lru_cache

from toy_models.spec import PPO, Batch, Layout, MoEModel


def uniform(*key: int | str) -> float:
    """A number in [0, 1) that depends on `key` alone: the same in every process, version and layout."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


@dataclass(frozen=True)
class Partition:
    """Which row sits where: `micro[m][d]` has the micro-batches (tuples of rows) of DP rank d in mini-batch m."""

    micro: tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]

    def rows_of(self, dp_rank: int) -> tuple[int, ...]:
        """All rows of one DP rank, in the order in which it trains them."""
        return tuple(row for mini in self.micro for micro in mini[dp_rank] for row in micro)


@cache
def partition(layout: Layout, batch: Batch, ppo: PPO) -> Partition:
    """Cut rows 0..rows-1 in order: first into mini-batches, these over DP ranks, these into micro-batches."""
    share = batch.rows // (ppo.mini_batches * layout.dp)
    starts = iter(range(0, batch.rows, batch.micro_rows))
    cut = [tuple(range(start, start + batch.micro_rows)) for start in starts]
    per_share = share // batch.micro_rows
    shares = [tuple(cut[i : i + per_share]) for i in range(0, len(cut), per_share)]
    minis = [tuple(shares[i : i + layout.dp]) for i in range(0, len(shares), layout.dp)]
    return Partition(tuple(minis))


def padded_width(layout: Layout, batch: Batch) -> int:
    """Tokens per padded row: prompt + response rounded up to what TP and CP can cut (tp, and 2*cp where cp > 1)."""
    step = layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
    return -(-(batch.prompt + batch.response) // step) * step


def _length(batch: Batch, most: int, *key: int | str) -> int:
    row = key[-1]
    if batch.raggedness == "equal" or (batch.raggedness == "one_long" and row == 0):
        return most
    return 1 if batch.raggedness == "one_long" else 1 + int(uniform(*key) * most)


@lru_cache(maxsize=64)
def prompt_lengths(batch: Batch, seed: int) -> tuple[int, ...]:
    """Tokens in the prompt of each row, 1..batch.prompt."""
    return tuple(_length(batch, batch.prompt, "prompt", seed, row) for row in range(batch.rows))


@lru_cache(maxsize=64)
def response_limits(batch: Batch, seed: int) -> tuple[int, ...]:
    """Tokens that each row may generate at most, 1..batch.response."""
    return tuple(_length(batch, batch.response, "response", seed, row) for row in range(batch.rows))


def prompt_tokens(model: MoEModel, batch: Batch, seed: int, iteration: int) -> tuple[tuple[int, ...], ...]:
    """The prompt of each row: any token may occur, the end and padding tokens included."""
    lengths = prompt_lengths(batch, seed)
    return tuple(
        tuple(int(uniform("token", seed, iteration, row, i) * model.vocab) for i in range(length))
        for row, length in enumerate(lengths)
    )


def forced_token(model: MoEModel, batch: Batch, seed: int, iteration: int, row: int, position: int) -> int | None:
    """The token that the environment puts at a response position, or None where the actor samples.

    The last position that a row may reach is never a hole, so that every row ends on a sampled token.
    """
    last = response_limits(batch, seed)[row] - 1
    if not batch.holes or position >= last or uniform("hole", seed, iteration, row, position) >= 0.3:
        return None
    return int(uniform("observed", seed, iteration, row, position) * model.vocab)


def end_token(model: MoEModel) -> int:
    return model.vocab - 1


def pad_token(model: MoEModel, batch: Batch) -> int:
    return end_token(model) if batch.pad_is_eos else 0


def shards(layout: Layout, rows: int, width: int, cut: bool = True) -> list[list[int]]:
    """The tokens (indices into rows * width) that each rank of TP x CP routes, in its order: positions before rows.

    With `cut` TP cuts the sequence.
    """
    found = []
    for rank in range(layout.cp):
        positions = chunk_positions(width, layout.cp, rank)
        size = len(positions) // layout.tp if cut else len(positions)
        parts = [positions[at : at + size] for at in range(0, len(positions), size)]
        found += [[row * width + p for p in part for row in range(rows)] for part in parts]
    return found


def chunk_positions(width: int, cp: int, cp_rank: int) -> list[int]:
    """The positions of a row of `width` tokens that a context-parallel rank holds, in its order.

    Of 2·CP equal chunks rank c has chunk c and chunk 2·CP-1-c, so that causal attention is equal work for all
    (megatron `utils.get_batch_on_this_cp_rank`).
    """
    if cp == 1:
        return list(range(width))
    size = width // (2 * cp)
    return [chunk * size + i for chunk in (cp_rank, 2 * cp - 1 - cp_rank) for i in range(size)]
