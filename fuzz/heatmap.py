"""Draws a divergence: modules by ranks, one panel per phase, the relative difference as colour. Knows matplotlib alone.

Light cells lie at or under their bound, coloured ones above it; the scale (inferno, from light to dark) is even to the
eye, to colour-blind eyes and in grey print. What is first in order has a frame.
"""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fuzz.differences import PHASES, Row
from fuzz.divergence import Divergence

HEIGHT, WIDTH = 0.19, 0.46  # inches of a cell
NARROW = 0.2  # of a cell without its number
WRITTEN = 4  # ranks up to which each cell has its number
MOST_WIDTH = 6.0  # of a panel
MOST_ROWS = 120  # modules shown, around the first divergence where they are more
MARGIN = 3.4  # for names and the colour bar
UNDER, ABSENT, INFINITE, FRAME = "#dfe7ee", "#ffffff", "#000000", "#0072b2"

Cells = Mapping[tuple[str, str], Row]


def write(divergence: Divergence, file: Path | BinaryIO) -> None:
    """A PNG of all modules; only the sentence where ranks did not finish."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.4 s to import, and needed only for a failure
    from matplotlib.figure import Figure

    names, panel = _shown(divergence), _panel_width(divergence)
    size = (MARGIN + len(PHASES) * panel, 2.2 + HEIGHT * len(names)) if names else (9.0, 2.5)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(divergence, size[0]), fontsize=8, x=0.01, ha="left")
    if names:
        _draw(figure, divergence, names)
    figure.savefig(file, dpi=130, format="png")


def _title(divergence: Divergence, inches: float) -> str:
    lines = (divergence.sentence(), f"{divergence.case!r}")
    return "\n".join(textwrap.fill(line, int(inches * 14)) for line in lines)


def _panel_width(divergence: Divergence) -> float:
    world = divergence.case.layout.world
    return min(MOST_WIDTH, max(1.25, world * (WIDTH if world <= WRITTEN else NARROW)))


def _shown(divergence: Divergence) -> list[str]:
    """The modules in the order of the forward pass."""
    names, first = list(dict.fromkeys(row.module for row in divergence.rows)), divergence.first
    at = names.index(first.module) if first else 0
    start = max(0, min(at - MOST_ROWS // 2, len(names) - MOST_ROWS))
    return names[start : start + MOST_ROWS]


def _draw(figure: Any, divergence: Divergence, names: list[str]) -> None:
    cells = {(row.phase, row.module): row for row in divergence.rows}
    colours = _Colours(divergence)
    panels = figure.subplots(1, len(PHASES), sharey=True)
    for axes, phase in zip(panels, PHASES, strict=True):
        _panel(axes, divergence, names, {name: cells.get((phase, name)) for name in names}, colours)
        axes.set_title(phase, fontsize=8)
    panels[0].set_yticks([i + 0.5 for i in range(len(names))], names, fontsize=7)
    panels[0].set_ylim(len(names), 0)
    _legend(figure, panels, colours)


class _Colours:
    """From a cell to its colour."""

    def __init__(self, divergence: Divergence) -> None:
        from matplotlib import cm, colormaps, colors

        pairs = [pair for row in divergence.rows for pair in zip(row.differences, row.bounds, strict=True)]
        finite = [gap for gap, bound in pairs if gap is not None and bound < gap < float("inf")] or [1e-3]
        scale = colors.LogNorm(min(1e-3, *finite), max(1.0, *finite), clip=True)
        part = colors.LinearSegmentedColormap.from_list("above", colormaps["inferno_r"](list(range(40, 230))))
        self.bar = cm.ScalarMappable(scale, part)

    def of(self, gap: float | None, bound: float) -> Any:
        """Red, green, blue."""
        from matplotlib.colors import to_rgb

        if gap is None:
            return to_rgb(ABSENT)
        if gap == float("inf"):
            return to_rgb(INFINITE)
        return self.bar.to_rgba(np.array([gap]))[0, :3] if gap > bound else to_rgb(UNDER)


def _panel(
    axes: Any, divergence: Divergence, names: list[str], rows: Mapping[str, Row | None], colours: _Colours
) -> None:
    world = divergence.case.layout.world
    blank = [(None, 0.0)] * world
    cells = [list(zip(row.differences, row.bounds, strict=True)) if (row := rows[name]) else blank for name in names]
    picture = [[colours.of(*cell) for cell in line] for line in cells]
    axes.imshow(picture, extent=(0, world, len(names), 0), aspect="auto", interpolation="nearest")
    _rule(axes, world, names)
    for at, line in enumerate(cells if world <= WRITTEN else ()):
        for rank, (gap, bound) in enumerate(line):
            _number(axes, rank, at, gap, bound, picture[at][rank])
    if (first := divergence.first) and rows.get(first.module) is first:
        _frame(axes, names.index(first.module), first.above)


def _rule(axes: Any, world: int, names: list[str]) -> None:
    """Lines between cells, darker ones between actor, critic and the rest; numbers of ranks."""
    axes.vlines(range(1, world), 0, len(names), color="#ffffff", linewidth=0.6)
    axes.hlines(range(1, len(names)), 0, world, color="#ffffff", linewidth=0.6)
    groups = [name.split("/")[0] for name in names]
    ends = [at for at in range(1, len(names)) if groups[at] != groups[at - 1]]
    axes.hlines(ends, 0, world, color="#555555", linewidth=0.8)
    every = -(-world // 16)
    axes.set_xticks([rank + 0.5 for rank in range(0, world, every)], range(0, world, every), fontsize=7)
    axes.set_xlabel("rank", fontsize=7)
    axes.tick_params(length=0)


def _number(axes: Any, rank: int, at: int, gap: float | None, bound: float, colour: Any) -> None:
    if gap is not None:
        ink = "#8090a0" if gap <= bound else "#ffffff" if _dark(colour) else "#000000"
        axes.text(rank + 0.5, at + 0.5, _short(gap), fontsize=5.5, color=ink, ha="center", va="center")


def _frame(axes: Any, at: int, ranks: list[int]) -> None:
    from matplotlib.patches import Rectangle

    for rank in ranks:
        axes.add_patch(Rectangle((rank, at), 1, 1, fill=False, edgecolor=FRAME, linewidth=2.5, zorder=3))


def _short(gap: float) -> str:
    return "0" if gap == 0 else "∞" if gap == float("inf") else f"{gap:.0e}".replace("e-0", "e-").replace("e+0", "e+")


def _dark(colour: Any) -> bool:
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.5


def _legend(figure: Any, panels: Any, colours: _Colours) -> None:
    from matplotlib.patches import Patch

    bar = figure.colorbar(colours.bar, ax=list(panels), pad=0.01, fraction=0.03, aspect=30)
    bar.set_label("relative difference, where above its bound", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    patches = [
        Patch(facecolor=UNDER, edgecolor="#8090a0", label="at or under its bound"),
        Patch(facecolor=INFINITE, label="missing, misplaced or NaN"),
        Patch(facecolor="none", edgecolor=FRAME, linewidth=2.5, label="first divergence"),
    ]
    figure.legend(handles=patches, loc="outside lower left", ncols=3, fontsize=7, frameon=False)
