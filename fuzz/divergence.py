"""Where system and reference part at the first optimizer step: module by module, forward, backward, parameters.

Knows trials, the bounds of the laws and what is compared with what. Knows no megatron, no torch module, no drawing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fuzz import modules
from fuzz.alignment import FIRST
from fuzz.case import DEFAULT_PROGRAM, Case, Observation
from fuzz.differences import BACKWARD, FORWARD, GRADIENTS, PHASES, WEIGHTS, Row, rows
from fuzz.laws.compare import certain_steps
from fuzz.trial import Trials

SHOWN = 8  # ranks that a table has columns for
BEFORE, AFTER = 5, 7  # rows of a table before the first divergence, and from it on


@dataclass(frozen=True)
class Divergence:
    """What the ranks hold of every module against what the reference has, in the order of the step.

    `lost` says how far ranks came that did not finish (there are no rows then), `doubt` why a difference may be none.
    """

    case: Case
    rows: tuple[Row, ...]
    lost: str = ""
    doubt: str = ""

    @property
    def first(self) -> Row | None:
        return next((row for row in self.rows if row.above), None)

    def sentence(self) -> str:
        if self.lost:
            return self.lost
        return f"{_same(self) if self.first is None else _said(self, self.first)}{self.doubt and f' But {self.doubt}.'}"

    def table(self) -> str:
        """Markdown: the rows around the first divergence, differences above their bound in bold."""
        if not self.rows:
            return ""
        at = self.rows.index(self.first) if self.first else BEFORE
        shown = self.rows[max(0, at - BEFORE) : at + AFTER]
        ranks = _columns(self)
        head = ["phase", "module", *(f"rank {rank}" for rank in ranks), "bound"]
        lines = [head, ["---"] * len(head), *(_cells(row, ranks) for row in shown)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measure(trials: Trials, case: Case) -> Divergence:
    """Run the first optimizer step of a case with taps on every module, in the reference and in the ranks."""
    first = replace(case, program=DEFAULT_PROGRAM, twin=None)
    truth, ranks = trials.traced(first)
    if any(rank.outcome != "done" for rank in ranks):
        return Divergence(case, (), lost="; ".join(map(_how_far, ranks)) + ".")
    certain = next(certain_steps(first, truth), None) == FIRST
    doubt = "" if certain else "a choice of the routing or clipping lies within the noise of its edge"
    return Divergence(case, rows(first, ranks, truth), doubt=doubt)


# ---- in words --------------------------------------------------------------------------------------------------


def _how_far(rank: Observation) -> str:
    ended = {"done": "finished", "hung": "hung", "died": "died", "raised": "raised", "starved": "got no processor"}
    said = rank.facts.get("message", "").strip().partition("\n")[0]
    raised = f" {rank.facts['exception']}: {said[:160]}" if rank.outcome == "raised" else ""
    return f"rank {rank.rank} {ended[rank.outcome]}{raised} after {rank.stage!r}"


def _same(of: Divergence) -> str:
    ranks = f"{of.case.layout.world} rank{'s' * (of.case.layout.world > 1)}"
    return (
        "In the first optimizer step, on the reference's tokens, nothing differs: every module of actor and critic "
        f"forward and backward, parameter gradients and updated weights ({len(of.rows)} comparisons on {ranks})."
    )


def _said(of: Divergence, row: Row) -> str:
    earlier, same = PHASES[: PHASES.index(row.phase)], [other for other in of.rows if other.phase == row.phase]
    at = same.index(row)
    lead = f"everything matches in {' and '.join(earlier)}; " if earlier else ""
    matching = f"{same[at - 1].module} matches, " if at else ""
    by = f" by {row.greatest:.1e}" if row.greatest < torch.inf else ""
    note = f"; {row.note}" if row.note else "" if by else ", in shape or by NaN"
    differs = f"{_what(of.case, row)} differs{by} {_ranks(of, row.above)}{note} (bound {row.bound:.1e})"
    return f"In the first optimizer step {lead}{row.phase}: {matching}{differs}."


def _what(case: Case, row: Row) -> str:
    module = row.module.partition("/")[2]
    if row.phase == BACKWARD:
        return f"the gradient handed back by {modules.reader(case.model, module)} to {row.module}"
    if module == modules.NORM:
        return row.module
    return {FORWARD: "", GRADIENTS: "the parameter gradient of ", WEIGHTS: "the new weight of "}[row.phase] + row.module


def _ranks(of: Divergence, ranks: Sequence[int]) -> str:
    if len(ranks) == of.case.layout.world:
        return "on all ranks" if len(ranks) > 1 else "on the one rank"
    return f"on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


# ---- as a table ------------------------------------------------------------------------------------------------


def _columns(of: Divergence) -> list[int]:
    """All ranks, or where they are many those that differ first."""
    ranks, first = list(range(of.case.layout.world)), of.first
    return sorted(sorted(ranks, key=lambda rank: rank not in (first.above if first else ()))[:SHOWN])


def _cells(row: Row, ranks: Sequence[int]) -> list[str]:
    gaps = [row.differences[rank] for rank in ranks]
    cells = ["" if gap is None else f"{gap:.1e}" for gap in gaps]
    marked = [f"**{cell}**" if rank in row.above else cell for rank, cell in zip(ranks, cells, strict=True)]
    return [row.phase, row.module, *marked, f"{row.bound:.0e}"]
