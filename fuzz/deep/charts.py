"""The pictures of a campaign: the map of layouts, discovery, laws, where the time went. Knows matplotlib.

Each is drawn once, and written as PNG and as SVG for the page. In a map a cell is a layout: its id and its link are
those of the page. Colours are even to the eye in grey and to colour-blind eyes; a ring or hatching says the rest.
"""

import io
import itertools
import math
from collections.abc import Iterator
from typing import Any

from fuzz.deep.discovery import cell as cell_of
from fuzz.deep.discovery import degrees
from fuzz.deep.reading import Reading
from fuzz.deep.sums import max_ranks, where
from fuzz.space import all_layouts, worlds

CELL, LEAST = 0.32, 4.2  # inches: of a cell, and of a map with its legend
EMPTY, EDGE, RING = "#ffffff", "#c4ccd4", "#d62728"
KINDS = {"cell": "layouts", "behaviour": "behaviours", "pair": "pairs", "triple": "triples"}
MOST_LAWS = 60


def figures(reading: Reading) -> Iterator[tuple[str, str, Any]]:
    """Name, title and figure of each picture."""
    for world in worlds(max_ranks(reading)):
        yield f"map-{world}", f"{world} rank{'s' * (world > 1)}", layouts(reading, world)
    yield "discovery", "Discovered over time", discovery(reading)
    yield "laws", "Laws: cases in which they had something to check", laws(reading)
    yield "time", "Where the time went", time(reading)


def png(figure: Any) -> bytes:
    """The picture as a file."""
    return _saved(figure, "png", dpi=130)


def svg(figure: Any) -> str:
    """The picture as an element to be put into a page: without head, ids that last, no date."""
    text = _saved(figure, "svg", metadata={"Date": None}).decode()
    return text[text.index("<svg") :].replace(' target="_blank"', "")


def _saved(figure: Any, kind: str, **how: Any) -> bytes:
    from matplotlib import rc_context

    data = io.BytesIO()
    with rc_context({"svg.hashsalt": "fuzz", "svg.fonttype": "none"}):
        figure.savefig(data, format=kind, **how)
    return data.getvalue()


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# ---- the map ---------------------------------------------------------------------------------------------------


def name_of(cell: str) -> str:
    """The id of a layout's cell."""
    return "cell-" + "-".join(cell.replace(":", "").split())


def layouts(reading: Reading, world: int) -> Any:
    """TP down, EP and ETP across; a facet for each PP (down) and CP (across) that the world has room for."""
    here = {cell_of(one): one for one in all_layouts(world)}
    pps, cps = (sorted({getattr(one, name) for one in here.values()}) for name in ("pp", "cp"))
    tps = [sorted({one.tp for one in here.values() if one.pp == pp}) for pp in pps]
    pairs = sorted({(one.ep, one.etp) for one in here.values()})
    high = [len(inside) * CELL + 0.75 for inside in tps]
    figure = _figure(max(LEAST, 1.3 + len(cps) * (len(pairs) * CELL + 0.5)), 1.1 + sum(high))
    axes = figure.subplots(len(pps), len(cps), squeeze=False, height_ratios=high)
    most = max((number for number, _ in reading.cells.values()), default=1)
    for (down, pp), (across, cp) in itertools.product(enumerate(pps), enumerate(cps)):
        inside = {cell: one for cell, one in here.items() if (one.pp, one.cp) == (pp, cp)}
        _facet(axes[down][across], reading, inside, tps[down], pairs, most)
        if inside:
            axes[down][across].set_title(f"PP {pp}, CP {cp}", fontsize=7, pad=3)
    figure.supylabel("TP", fontsize=8)
    figure.supxlabel("EP · ETP", fontsize=8)
    _scale(figure, most)
    return figure


def _facet(axes: Any, reading: Reading, inside: dict[str, Any], tps: list[int], pairs: list, most: int) -> None:
    if not inside:
        axes.axis("off")
        return
    for cell, one in inside.items():
        _draw(axes, reading, cell, pairs.index((one.ep, one.etp)), tps.index(one.tp), most)
    axes.set_xlim(-0.6, len(pairs) - 0.4)
    axes.set_ylim(len(tps) - 0.4, -0.6)
    axes.set_xticks(range(len(pairs)), [f"{ep}·{etp}" for ep, etp in pairs], fontsize=6, rotation=90)
    axes.set_yticks(range(len(tps)), [str(tp) for tp in tps], fontsize=6)
    axes.tick_params(length=0)
    axes.set_aspect("equal")
    for side in axes.spines.values():
        side.set_visible(False)


def _draw(axes: Any, reading: Reading, cell: str, x: int, y: int, most: int) -> None:
    from matplotlib.patches import Circle, Rectangle

    number, violated = reading.cells.get(cell, (0, 0))
    hatch = "////" if number and reading.tally.get("known cells", {}).get(cell, 0) == number else None
    face = _colour(number, most)
    square = Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, facecolor=face, edgecolor=EDGE, linewidth=0.5, hatch=hatch)
    square.set_gid(name_of(cell))
    if failures := reading.broken.get(cell):
        square.set_url(f"#failure-{failures[0]}")
    axes.add_patch(square)
    if violated:
        ring = Circle((x, y), 0.36, fill=False, edgecolor=RING, linewidth=1.8)
        ring.set_url(f"#failure-{reading.broken[cell][0]}" if cell in reading.broken else None)
        axes.add_patch(ring)


def _colour(number: int, most: int) -> Any:
    """Of many cases dark, of few light, by logarithm; white where there was none."""
    from matplotlib import colormaps

    return EMPTY if not number else colormaps["Blues"](0.2 + 0.7 * math.log1p(number) / math.log1p(most))


def _scale(figure: Any, most: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown = sorted({1, max(1, round(math.sqrt(most))), most})
    marks: list[Any] = [Patch(facecolor=EMPTY, edgecolor=EDGE, label="never visited")]
    marks += [Patch(facecolor=_colour(n, most), edgecolor=EDGE, label=f"{n} case{'s' * (n > 1)}") for n in shown]
    marks.append(Patch(facecolor=EMPTY, edgecolor=EDGE, hatch="////", label="known upstream"))
    ring = Line2D([], [], linestyle="", marker="o", markerfacecolor="none", markeredgecolor=RING, label="violated")
    ring.set_markersize(9)
    ring.set_markeredgewidth(1.8)
    marks.append(ring)
    figure.legend(handles=marks, loc="outside upper center", ncols=3, fontsize=7, frameon=False)


# ---- the others ------------------------------------------------------------------------------------------------


def discovery(reading: Reading) -> Any:
    """How much of each kind had been met, over the seconds of the campaign; failures as red lines."""
    figure = _figure(8.0, 4.2)
    axes = figure.subplots(2, 2, sharex=True)
    for axis, (kind, title) in zip(axes.flat, KINDS.items(), strict=True):
        points = [(0.0, 0), *((at, number) for at, what, number in reading.growth if what == kind)]
        points.append((reading.seconds, points[-1][1]))
        axis.step(*zip(*points, strict=True), where="post", color="#08519c", linewidth=1.4)
        for one in reading.distinct:
            axis.axvline(one.at, color=RING, linewidth=0.8)
        axis.set_title(title, fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
        axis.set_ylim(bottom=0)
    for axis in axes[1]:
        axis.set_xlabel("seconds of the campaign; red: a distinct failure", fontsize=7)
    return figure


def laws(reading: Reading) -> Any:
    """How often each law had something to check; in red one that never had."""
    rows = sorted(reading.laws.items(), key=lambda one: one[1][0])[:MOST_LAWS]
    figure = _figure(8.0, 0.7 + 0.17 * max(1, len(rows)))
    axes = figure.subplots()
    colours = ["#08519c" if fired else RING for _, (fired, _) in rows]
    axes.barh([law.replace("_", " ") for law, _ in rows], [fired for _, (fired, _) in rows], color=colours)
    vacuous = {law.replace("_", " ") for law, (fired, _) in rows if not fired}
    for label in axes.get_yticklabels():
        label.set_color(RING if label.get_text() in vacuous else "black")
    axes.tick_params(labelsize=6, length=0)
    axes.margins(y=0.01)
    return figure


def time(reading: Reading) -> Any:
    """Minutes by kind of chunk."""
    rows = where(reading)[::-1]
    figure = _figure(8.0, 0.8 + 0.22 * max(1, len(rows)))
    axes = figure.subplots()
    axes.barh([name for name, *_ in rows], [seconds / 60 for _, _, _, seconds, _ in rows], color="#08519c")
    axes.set_xlabel("minutes of shards", fontsize=7)
    axes.tick_params(labelsize=7, length=0)
    return figure


def tips(reading: Reading) -> dict[str, str]:
    """What a cell says when it is pointed at, by its id."""
    said = {}
    for world in worlds(max_ranks(reading)):
        for cell in map(cell_of, all_layouts(world)):
            number, violated = reading.cells.get(cell, (0, 0))
            known = "".join(f"; known upstream, stepped around: {bug}" for bug in reading.known.get(cell, ()))
            words = " ".join(f"{name.upper()}={n}" for name, n in degrees(cell).items() if name != "world")
            said[name_of(cell)] = f"{world} ranks, {words}: {number} cases, {violated} violated{known}"
    return said
