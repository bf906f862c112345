"""`python -m fuzz show`: a case as a table, where its ranks sit, the line to paste. Starts nothing, imports no torch.

Knows case files and the formulas of `toy_models` that need the standard library only.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fuzz import known
from fuzz.case import Case
from fuzz.case_files import Found, find
from fuzz.case_json import PARTS, to_json
from toy_models.batching import padded_width, prompt_lengths, response_limits
from toy_models.coordinates import GROUPS, Coordinates, chunks, coordinates, groups

NARROWEST = 110  # characters; where the output is no terminal, nothing is cut to the 80 that are assumed then
MEANINGS = {
    "dp": "data-parallel size of dense weights, world / (tp·cp·pp)",
    "edp": "data-parallel size of expert weights, world / (etp·ep·pp)",
    "experts per rank": "experts / ep",
    "width": "tokens of a padded row: prompt + response, up to a multiple of tp, of 2·cp·tp where cp > 1",
    "global batch": "tokens of an iteration, padding included: rows · width",
    "prompt tokens": "of all rows, drawn by the seed",
    "response tokens": "of all rows, at most",
    "rows per mini-batch": "of all DP ranks: rows / mini_batches",
    "micro-batches per rank": "in a mini-batch: rows per mini-batch / (dp · micro_rows)",
    "optimizer steps": "of actor and critic each, in the whole program: updates · epochs · mini_batches",
}


def derived(case: Case) -> dict[str, int]:
    """What follows from the sizes; MEANINGS says how."""
    layout, batch, ppo = case.layout, case.batch, case.ppo
    mini, updates = batch.rows // ppo.mini_batches, sum(type(step).__name__ == "Update" for step in case.program)
    numbers = [
        layout.dp,
        layout.edp,
        case.model.experts // layout.ep,
        padded_width(layout, batch),
        batch.rows * padded_width(layout, batch),
        sum(prompt_lengths(batch, case.seed)),
        sum(response_limits(batch, case.seed)),
        mini,
        mini // (layout.dp * batch.micro_rows),
        updates * ppo.epochs * ppo.mini_batches,
    ]
    return dict(zip(MEANINGS, numbers, strict=True))


def as_data(found: Found, case: Case) -> dict[str, Any]:
    """All that `show` says, as JSON has it."""
    places = [coordinates(case.layout, rank)._asdict() for rank in range(case.layout.world)]
    return {
        "path": str(found.path),
        "case": json.loads(to_json(case)),
        "derived": derived(case),
        "known": list(known.met(case)),
        "ranks": [{"rank": rank, **place, "layers": _layers(case, rank)} for rank, place in enumerate(places)],
        "groups": {kind: groups(case.layout, kind) for kind in GROUPS},
        "example": example(case),
    }


def example(case: Case) -> str:
    """The line to paste above `test_pasted_cases`."""
    return f"@example({case!r})"


# ---- tables ----------------------------------------------------------------------------------------------------


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)


def _sections(case: Case) -> dict[str, tuple[Any, Any]]:
    """Name -> the values of a part, and their defaults."""
    plain = Case()
    return {name: (getattr(case, name), getattr(plain, name)) for name in PARTS} | {"case": (case, plain)}


def _names(value: Any) -> list[str]:
    return [f.name for f in fields(value) if f.name not in PARTS]


def _fields(case: Case) -> Table:
    table = _table("case", "part", "field", "value", "default")
    for part, (mine, plain) in _sections(case).items():
        table.add_section()
        for name in _names(mine):
            value, usual = _text(getattr(mine, name)), _text(getattr(plain, name))
            same, first = value == usual, name == _names(mine)[0]
            table.add_row(part * first, name, value, "" if same else usual, style="dim" if same else "bold")
    return table


def _text(value: Any) -> str:
    parts = value if isinstance(value, tuple) else (value,)
    return " ".join(type(part).__name__ if is_dataclass(part) else str(part) for part in parts) or "none"


def _derived(case: Case) -> Table:
    table = _table("what follows", "size", "value", "is")
    for name, number in derived(case).items():
        table.add_row(name, str(number), MEANINGS[name])
    if met := known.met(case):
        table.add_row("known bugs", str(len(met)), f"lies in the region of {', '.join(met)}")
    return table


def _places(case: Case) -> Table:
    table = _table("where the ranks sit", "rank", *Coordinates._fields, "layers")
    for rank in range(case.layout.world):
        layers = " | ".join(_span(stage) for stage in _layers(case, rank))
        table.add_row(str(rank), *map(str, coordinates(case.layout, rank)), layers)
    return table


def _layers(case: Case, rank: int) -> list[list[int]]:
    """The layers of each virtual stage of a rank, from 0."""
    return [list(stage) for stage in chunks(case.layout, case.model.layers, rank)]


def _span(layers: Sequence[int]) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(*layers) or "none"


def _groups(case: Case) -> Table:
    table = _table("groups", "group", "size", "ranks")
    for kind in GROUPS:
        found = groups(case.layout, kind)
        size = len(found[0])
        members = " ".join("{" + ",".join(map(str, group)) + "}" for group in found)
        table.add_row(kind, str(size), "every rank by itself" if size == 1 else members, style="dim" * (size == 1))
    return table


def _write(found: Found, case: Case, console: Console) -> None:
    tables = (_fields(case), _derived(case), _places(case), _groups(case))
    console.print(Group(Text(str(found.path)), *tables))
    print(example(case), flush=True)  # as it is: a table's console would break the line


def run(paths: Sequence[Path], *, as_json: bool) -> int:
    """Show every case that the paths mean; 2 where one is none."""
    console, shown, wrong = Console(), list[dict[str, Any]](), 0
    console.width = console.width if console.is_terminal else max(NARROWEST, console.width)
    for found in (one for path in paths for one in find(path)):
        try:
            case = found.case()
        except ValueError as error:
            print(f"{ascii(str(found.path))[1:-1]}: INVALID {error}", file=sys.stderr)
            wrong = 2
            continue
        shown.append(as_data(found, case)) if as_json else _write(found, case, console)
    if as_json:
        print(json.dumps(shown, indent=2))
    return wrong
