"""`python -m fuzz map`: a campaign as one page that needs nothing else, and its pictures as PNGs beside it.

Knows the reading, its sums and its charts. What a campaign says (laws, cases, reports) is text, never markup.
"""

from collections.abc import Iterator, Sequence
from html import escape
from json import dumps
from pathlib import Path
from urllib.parse import quote

from fuzz.case_json import from_json
from fuzz.deep import charts
from fuzz.deep.reading import Failure, Reading, read
from fuzz.deep.sums import length, summary

REPORT = "report.html"
MOST_SHOWN = 200_000  # characters of one failure's report in the page

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2733; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .3rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.verdict { font-size: 1.1rem; font-weight: 600; padding: .5rem .8rem; border-radius: .3rem; background: #e3f1e5 }
.verdict.violated { background: #fbe3e1 }
table { border-collapse: collapse; font-size: 13px } th, td { text-align: left; padding: .25rem .7rem .25rem 0;
vertical-align: top; border-bottom: 1px solid #e4e9ee } td { overflow-wrap: anywhere } th { white-space: nowrap }
pre { background: #f4f6f8; padding: .8rem; overflow: auto; font-size: 12px } code { font-size: 12px }
figure { margin: 0 0 1.2rem } figcaption { font-weight: 600; font-size: 13px } svg { max-width: 100%; height: auto }
.maps { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start }
a { color: #0b5cad } :target { outline: 2px solid #d62728; outline-offset: 3px } nav a { margin-right: 1rem }
"""
SCRIPT = """
const tips = JSON.parse(document.getElementById("tips").textContent);
for (const [id, text] of Object.entries(tips)) {
  const cell = document.getElementById(id);
  if (!cell) continue;
  const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
  title.textContent = text;
  cell.prepend(title);
  cell.setAttribute("aria-label", text);
}
const show = () => {
  const at = location.hash && document.getElementById(location.hash.slice(1));
  if (at) at.querySelectorAll("details").forEach(one => { one.open = true; });
};
addEventListener("hashchange", show);
show();
"""


def run(folder: Path) -> int:
    """Write the page and its pictures into the campaign's folder; the exit code. ValueError where it is none."""
    reading = read(folder)
    figures = list(charts.figures(reading))
    try:
        for name, _, figure in figures:
            (folder / f"{name}.png").write_bytes(charts.png(figure))
        page = html(reading, [(name, title, charts.svg(figure)) for name, title, figure in figures])
        (folder / REPORT).write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from error
    print(f"{reading.verdict()}: {folder / REPORT}, and {len(figures)} pictures beside it")
    return 0


def html(reading: Reading, pictures: Sequence[tuple[str, str, str]]) -> str:
    """The whole page; `pictures`: name, title, SVG."""
    maps = "".join(_picture(*one) for one in pictures if one[0].startswith("map-"))
    others = "".join(_picture(*one) for one in pictures if not one[0].startswith("map-"))
    sections = {
        "failures": ("Failures", _failures(reading)),
        "map": ("Map of layouts", f"<p>{MAP}</p><div class=maps>{maps}</div>"),
        "charts": ("Discovery, laws, time", others),
        "slowest": ("Slowest cases", _slowest(reading)),
        "notes": ("What happened", _table(("at", "what", ""), ((length(at), *what) for at, *what in reading.notes))),
        "environment": ("Environment", _table((), _environment(reading))),
    }
    links = "".join(f'<a href="#{name}">{title}</a>' for name, (title, _) in sections.items())
    body = "".join(f"<section id={name}><h2>{title}</h2>{text}</section>" for name, (title, text) in sections.items())
    tips = dumps(charts.tips(reading)).replace("<", "\\u003c")
    return (
        f"<!DOCTYPE html><html lang=en><meta charset=utf-8><title>{escape(reading.verdict())}: ep-ppo-fuzz</title>"
        f'<link rel=icon href="data:,"><style>{STYLE}</style><h1>Campaign {escape(reading.folder.name)}</h1>'
        f"{_head(reading)}<nav>{links}</nav>{body}"
        f"<script type=application/json id=tips>{tips}</script><script>{SCRIPT}</script></html>\n"
    )


MAP = (
    "A cell is a layout: the darker, the more cases; white was never visited; a red ring is a violation, and links to "
    "its failure; hatched: every case of it met the region of a bug that is known upstream, which was stepped around."
)


def _head(reading: Reading) -> str:
    (_, verdict), *rows = summary(reading)
    kind = "verdict violated" if reading.distinct else "verdict"
    return f'<p class="{kind}">{escape(verdict)}</p>{_table((), rows)}'


def _picture(name: str, title: str, svg: str) -> str:
    return f'<figure id="{name}"><figcaption>{escape(title)}</figcaption>{svg}</figure>'


def _table(head: Sequence[str], rows: object) -> str:
    """Cells are text, but for those that are markup already."""
    top = "<tr>" + "".join(f"<th>{escape(word)}" for word in head) + "\n" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}" for cell in row) + "\n" for row in rows)  # type: ignore[attr-defined]
    return f"<table>{top}{body}</table>" if body else "<p>None.</p>"


class _Markup(str):
    """What needs no escaping."""


def _text(cell: object) -> str:
    return cell if isinstance(cell, _Markup) else escape(str(cell))


def _failures(reading: Reading) -> str:
    return "".join(_failure(reading, one) for one in reading.failures) or "<p>None.</p>"


def _failure(reading: Reading, one: Failure) -> str:
    """An article with what is known of a failure, its report, and a link to its folder."""
    folder = f"failures/{quote(one.folder)}"
    same = f"the same as failure {one.same}" if one.same else one.state
    link = _Markup(f'<a href="{folder}/">{escape(one.folder)}</a>') if one.folder else "none yet"
    rows = [
        ("first tensor or cause", one.tensor),
        ("what was seen", one.sentence),
        ("smallest layout", one.layout),
        ("cases", f"{one.cases}, the first at {length(one.at)}; {same}"),
        ("folder", link),
    ]
    text = f"<h3>{escape(one.law)}</h3>{_table((), rows)}{_report(reading, one)}"
    return f'<article id="failure-{one.number}">{text}</article>'


def _report(reading: Reading, one: Failure) -> str:
    file = reading.folder / "failures" / one.folder / "report.md"
    if not one.folder or not file.is_file():
        return ""
    text = file.read_text(encoding="utf-8", errors="replace")[:MOST_SHOWN]
    href = f"failures/{quote(one.folder)}/report.md"
    link = f'<p><a class=report href="{href}">report.md</a></p>'
    return f"{link}<details><summary>report</summary><pre>{escape(text)}</pre></details>"


def _slowest(reading: Reading) -> str:
    rows = (
        (f"{s:.1f} s", cell, _Markup(f"<code>{escape(_short(text))}</code>")) for s, _, cell, text in reading.slowest
    )
    return _table(("time", "layout", "case, where it was kept"), rows)


def _short(document: str) -> str:
    """The line that makes a case, without what has its default."""
    try:
        return repr(from_json(document))
    except ValueError:
        return document


def _environment(reading: Reading) -> Iterator[tuple[str, str]]:
    asked = {name: reading.meta[name] for name in ("max_ranks", "budget", "shards", "seed") if name in reading.meta}
    for name, value in {**asked, **reading.meta.get("environment", {})}.items():
        if value != "":
            yield name.replace("_", " "), str(value)
