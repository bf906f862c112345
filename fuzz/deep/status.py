"""`python -m fuzz status`: how far a campaign is, as a table that lives while it runs. Knows rich and the reading."""

import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fuzz.deep.reading import Reading, read
from fuzz.deep.sums import length, summary, where

EVERY = 1.0  # seconds between two looks
MOST_ARMS, MOST_NOTES = 8, 5


def run(folder: Path, console: Console | None = None) -> int:
    """Show it until the campaign ends where somebody looks at a terminal, else once; 1 where a law was violated."""
    console, reading = console or Console(), read(folder)
    if console.is_terminal and reading.running:
        reading = _live(folder, console, reading)
    else:
        console.print(table(reading))
    return 1 if reading.distinct else 0


def _live(folder: Path, console: Console, reading: Reading) -> Reading:
    with Live(table(reading), console=console, auto_refresh=False) as live:
        while reading.running:
            time.sleep(EVERY)
            reading = read(folder)
            live.update(table(reading), refresh=True)
    return reading


def table(reading: Reading) -> Group:
    """Sums, failures, where the time went, the last notes."""
    return Group(_sums(reading), *_failures(reading), _arms(reading), *_notes(reading))


def _sums(reading: Reading) -> Table:
    shown = Table(title=f"campaign {reading.folder}", title_justify="left", show_header=False)
    for name, value in summary(reading):
        style = ("red" if reading.distinct else "green") if name == "verdict" else ""
        shown.add_row(name, Text(value, style=style))
    return shown


def _failures(reading: Reading) -> list[Table | Text]:
    shown = Table("law", "first tensor or cause", "smallest layout", "cases", "state", title="distinct failures")
    shown.title_justify = "left"
    for one in reading.distinct:
        shown.add_row(*map(Text, (one.law, one.tensor, one.layout, str(one.cases), one.state)))
    folders = [Text(str(reading.folder / "failures" / one.folder)) for one in reading.distinct if one.folder]
    return [shown, *folders] if reading.distinct else []


def _arms(reading: Reading) -> Table:
    shown = Table("chunks of", "chunks", "cases", "time", "new per minute", title="where the time went")
    shown.title_justify = "left"
    for name, chunks, cases, seconds, rate in where(reading)[:MOST_ARMS]:
        shown.add_row(name, str(chunks), str(cases), length(seconds), f"{rate:.0f}")
    return shown


def _notes(reading: Reading) -> list[Text]:
    return [Text(f"at {length(at)}: {kind}: {text}", style="yellow") for at, kind, text in reading.notes[-MOST_NOTES:]]
