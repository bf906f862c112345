"""What came of a recall: table, `recall.md`, `recall.png`, JSON, and the exit code. It runs nothing.

Knows the results of searches and what docstrings of planted bugs promise.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fuzz.case import Case
from fuzz.case_json import to_json
from fuzz.folders import write as write_whole
from fuzz.plants import Plant
from fuzz.progress import in_words, layout_of
from fuzz.space import NAMED
from toy_models.spec import Layout

if TYPE_CHECKING:
    from fuzz.hunt import Recalled

FOLDER = Path(".fuzz")
MINIMAL = re.compile(r"^minimal: (.*)$", re.MULTILINE)
COLUMNS = ("bug", "found", "law", "seconds", "cases", "smallest", "size", "minimal", "shrinking")


@dataclass(frozen=True)
class Control:
    """How many cases ran without a bug, and which broke a law all the same."""

    cases: int
    alarms: tuple[str, ...]


@dataclass(frozen=True)
class Recall:
    """The bugs that were tried, what became of each, and the control."""

    bugs: tuple[Plant, ...]
    results: "tuple[Recalled, ...]"
    control: Control
    seconds: float  # of search for each bug
    untried: str = ""  # what was left when it was interrupted, in words

    @property
    def alarms(self) -> tuple[str, ...]:
        return (*(alarm for one in self.results for alarm in one.alarms), *self.control.alarms)

    @property
    def exit_code(self) -> int:
        """2 where a bug could not be planted, 1 where one was not found or a healthy case accused, else 0."""
        if any(one.fault for one in self.results):
            return 2
        return int(bool(self.alarms) or not all(one.found for one in self.results))


def minimal_layout(bug: Plant) -> Layout | None:
    """The smallest layout as the docstring has it, `minimal: world=2 ep=2`; None where it says nothing."""
    found = MINIMAL.search(bug.said)
    if found is None:
        return None
    try:
        degrees: dict[str, Any] = {}
        for part in found[1].split():
            name, _, number = part.partition("=")
            degrees[name] = int(number)
        return Layout(**degrees)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{bug.id}: {found[0]!r} must be a layout such as 'minimal: world=2 ep=2': {error}") from error


def is_minimal(bug: Plant, one: "Recalled") -> str:
    """'yes', 'no: ...', or empty where the bug was not found or its docstring says nothing."""
    said = minimal_layout(bug)
    if one.minimal is None or said is None:
        return ""
    return "yes" if _degrees(one.minimal.layout) == _degrees(said) else f"no: {in_words(said)}"


def _degrees(layout: Layout) -> tuple[int, ...]:
    return tuple(getattr(layout, name) for name in ("world", *NAMED))


def size_of(case: Case) -> str:
    """What beside the layout is large in a case."""
    model, batch = case.model, case.batch
    layers = f"{model.layers} layer{'s' * (model.layers > 1)}"
    return f"{batch.rows}x({batch.prompt}+{batch.response}) tokens, {layers}, {model.experts} experts"


def _cells(bug: Plant, one: "Recalled") -> tuple[str, ...]:
    if one.fault:
        return bug.id, "fault", *[""] * 7
    numbers = f"{one.seconds:.1f}", str(one.cases)
    if one.minimal is None:
        return bug.id, "no", "", *numbers, *[""] * 4
    shrunk = layout_of(one.minimal), size_of(one.minimal), is_minimal(bug, one), f"{one.shrink_seconds:.1f}"
    return bug.id, "yes", one.law, *numbers, *shrunk


def totals(recall: Recall) -> list[str]:
    """The sums, a line each."""
    found = [one for one in recall.results if one.found]
    tried = [one for one in recall.results if not one.fault]
    lines = [f"{len(found)} of {len(recall.results)} bugs found{_share(len(found), len(recall.results))}"]
    if found:
        seconds, slowest = [one.seconds for one in found], max(found, key=lambda one: one.seconds)
        lines += [
            f"seconds of search until found: median {median(seconds):.1f}, most {max(seconds):.1f} ({slowest.id})"
        ]
        shrinking = [one.shrink_seconds for one in found]
        lines += [f"seconds of shrinking: median {median(shrinking):.1f}, most {max(shrinking):.1f}"]
    told = [is_minimal(bug, one) for bug, one in zip(recall.bugs, recall.results, strict=True)]
    if any(told):
        yes, known = told.count("yes"), sum(map(bool, told))
        lines += [f"{yes} of {known} shrunk to the minimal layout{_share(yes, known)}"]
    missed = [one.id for one in tried if not one.found]
    lines += [f"not found within {recall.seconds:g} s: {', '.join(missed)}"] if missed else []
    lines += [f"{one.id}: {one.fault}" for one in recall.results if one.fault]
    lines += [f"interrupted: {recall.untried} not tried"] if recall.untried else []
    lines += [f"healthy control: {recall.control.cases} cases, {len(recall.alarms)} false alarms"]
    return [*lines, *(f"false alarm: {alarm}" for alarm in recall.alarms)]


def _share(part: int, whole: int) -> str:
    return f" ({part / whole:.0%})" if whole else ""


# ---- what is written -------------------------------------------------------------------------------------------


def write(recall: Recall, out: str) -> int:
    """Print the table and the totals; write recall.md, recall.png and the JSON file `out`; the exit code."""
    table = Table(*COLUMNS)
    for bug, one in zip(recall.bugs, recall.results, strict=True):
        table.add_row(*_cells(bug, one))
    console = Console(width=max(Console().width, 200))
    console.print(table, markup=False)
    for line in totals(recall):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    try:
        _files(recall, out)
    except OSError as error:
        print(f"python -m fuzz: {error.filename} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    return recall.exit_code


def _files(recall: Recall, out: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    write_whole(FOLDER / "recall.md", markdown(recall))
    draw(recall, FOLDER / "recall.png")
    print(f"written: {FOLDER / 'recall.md'}, {FOLDER / 'recall.png'}{f', {out}' * bool(out)}")
    if out:
        write_whole(Path(out), json.dumps(plain(recall), indent=2) + "\n")


def plain(recall: Recall) -> dict[str, Any]:
    """The results as plain data; `minimal_case` as in a case file."""
    bugs = zip(recall.bugs, recall.results, strict=True)
    control = {"cases": recall.control.cases, "false_alarms": len(recall.alarms), "alarms": list(recall.alarms)}
    said = {"bugs": [_plain(bug, one) for bug, one in bugs], "control": control}
    return said | ({"untried": recall.untried} if recall.untried else {})


def _plain(bug: Plant, one: "Recalled") -> dict[str, Any]:
    minimal = json.loads(to_json(one.minimal)) if one.minimal else None
    names = ("id", "found", "law", "seconds", "cases")
    numbers = {name: getattr(one, name) for name in names} | {"minimal_case": minimal}
    more = {"is_minimal": is_minimal(bug, one), "fault": one.fault}
    return numbers | {"shrink_seconds": one.shrink_seconds} | more


def markdown(recall: Recall) -> str:
    """`recall.md`."""
    from importlib.metadata import version

    rows = [_cells(bug, one) for bug, one in zip(recall.bugs, recall.results, strict=True)]
    lines = ["| " + " | ".join(row).replace("\n", " ") + " |" for row in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    cases = [f"- `{one.id}`: `{one.minimal!r}`" for one in recall.results if one.minimal]
    versions = ", ".join(f"{name} {version(name)}" for name in ("megatron-core", "torch", "hypothesis"))
    head = ["# Recall of planted bugs", "", f"{versions}; at most {recall.seconds:g} s of search for each bug.", ""]
    return "\n".join(
        [*head, *(f"- {line}" for line in totals(recall)), "", *lines, "", "## Smallest cases", "", *cases, ""]
    )


def draw(recall: Recall, file: Path) -> None:
    """`recall.png`: the share of bugs that were found within so many seconds of search."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    seconds, number = sorted(one.seconds for one in recall.results if one.found), len(recall.results)
    end = max([recall.seconds, *seconds])
    shares = [100 * place / number for place in range(len(seconds) + 1)]
    axes.step([0, *seconds, end], [*shares, shares[-1]], where="post", color="#0072b2", linewidth=1.8)
    _marked(axes, seconds, end)
    axes.set_title(f"{len(seconds)} of {number} planted bugs found", fontsize=10, loc="left")
    figure.savefig(file, dpi=130, format="png")


def _marked(axes: Any, seconds: Sequence[float], end: float) -> None:
    """Axes with their units, and the median of what was found."""
    if seconds:
        middle = median(seconds)
        axes.axvline(middle, color="#8090a0", linewidth=1, linestyle="--")
        axes.text(middle + end / 100, 4, f"median {middle:.1f} s", fontsize=8, color="#506070")
    axes.set_xlim(0, end)
    axes.set_ylim(0, 103)
    axes.set_xlabel("seconds of search", fontsize=9)
    axes.set_ylabel("share of bugs found, %", fontsize=9)
    axes.grid(color="#dfe7ee", linewidth=0.6)
    axes.tick_params(labelsize=8)
