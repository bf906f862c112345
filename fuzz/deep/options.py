"""The options of `python -m fuzz deep`, and its exit codes. Imports nothing heavy before it is asked to run."""

import argparse
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "": 1.0}
DEEP = """Runs all properties for a time, in shards on a Ray cluster, or on a Ray of this machine alone where no address
is given. Time goes where new layouts, behaviours, pairs and triples still appear. A failure is shrunk by the shard that
finds it first, and has one folder below failures/. A campaign that ended in any way goes on with --campaign DIR and the
rest of its budget; `python -m fuzz status DIR` looks at it.

Exit code: 0 no law violated, 1 a law violated, 2 a fault of the harness, or what cannot be run, in one line."""


def add_parsers(commands: Any) -> None:
    """The command, with `run` set to what it does: a function of the options that returns the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    deep = commands.add_parser("deep", help="a campaign over many shards", description=DEEP, formatter_class=raw)
    deep.set_defaults(run=_deep)
    deep.add_argument(
        "--budget", type=seconds, required=True, metavar="TIME", help="of all drivers, as 90s, 45m, 1h30m"
    )
    deep.add_argument("--ray-address", default="", metavar="A", help="of a cluster: auto, host:port or ray://host:port")
    deep.add_argument("--shards", type=_at_least(1, int), default=0, metavar="N", help="default: as many as have room")
    deep.add_argument("--max-ranks", type=_at_least(1, int), default=8, metavar="N", help="largest world (default 8)")
    gpus = "GPUs that a rank asks for (default 0: ranks on the CPU)"
    deep.add_argument("--gpus-per-rank", type=_at_least(0, float), default=0.0, metavar="G", help=gpus)
    deep.add_argument("--campaign", type=Path, metavar="DIR", help="a new folder, or one to go on with")
    database = "example database: a folder or redis://host:port (default: examples in the campaign's folder)"
    deep.add_argument("--database", default="", metavar="D", help=database)
    _add_search(deep)
    _add_readers(commands)


STATUS = """How far a campaign is: while it runs a table that lives, on a terminal; else once. Exit code: 1 where a law
was violated, 2 where the folder is no campaign, else 0."""


def _add_readers(commands: Any) -> None:
    status = commands.add_parser("status", help="how far a campaign is", description=STATUS)
    status.set_defaults(run=_status)
    said = "writes report.html, one page that needs nothing else, and PNGs into the campaign's folder"
    page = commands.add_parser("map", help="a campaign as a page", description=said)
    page.set_defaults(run=_map)
    said = "says which failures are new, and remembers them; exit code 1 where one is"
    news = commands.add_parser("news", help="which failures of a campaign are new", description=said)
    news.set_defaults(run=_news)
    news.add_argument("--seen", type=Path, required=True, metavar="FILE", help="failures of earlier campaigns")
    news.add_argument("--summary", type=Path, metavar="FILE", help="a file to which a summary in Markdown is added")
    news.add_argument("--issues", action="store_true", help="an issue for each distinct failure, through gh")
    for command in (status, page, news):
        command.add_argument("folder", type=Path, metavar="DIR", help="of the campaign")


def _add_search(deep: argparse.ArgumentParser) -> None:
    deep.add_argument("--seed", type=_at_least(0, int), default=0, metavar="S", help="of the first chunk (default 0)")
    chunk = "cases of a chunk (default 50; every chunk begins with the simplest case)"
    deep.add_argument("--chunk", type=_at_least(1, int), default=50, metavar="N", help=chunk)
    only = "only chunks whose name begins so, such as 'property any_case' or 'rows every_layout'; may be repeated"
    deep.add_argument("--only", action="append", default=[], metavar="NAME", help=only)
    shrink = "seconds for shrinking the failures of a chunk (default 60)"
    deep.add_argument("--shrink-seconds", type=_at_least(0, float), default=60.0, metavar="S", help=shrink)
    plant = "a bug to plant in every rank; may be repeated"
    deep.add_argument("--plant", action="append", default=[], type=_plant, metavar="MODULE:FUNCTION", help=plant)
    deep.add_argument("--no-known", action="store_true", help="do not step around known bugs of megatron-core")
    deep.add_argument("--any-version", action="store_true", help="go on with an unsupported megatron-core")


def seconds(text: str) -> float:
    """Seconds of `90`, `90s`, `45m`, `6h`, `1h30m`."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms]?)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise argparse.ArgumentTypeError(f"{text} must be a time such as 90s, 45m, 6h or 1h30m")
    return sum(float(number) * UNITS[unit] for number, unit in parts)


def _at_least(least: float, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            words = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text} must be {words}, {least:g} or more")
        return value

    return number


def _plant(text: str) -> str:
    from fuzz import plants

    try:
        return plants.resolved(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _deep(options: argparse.Namespace) -> int:
    from fuzz import known
    from fuzz.deep import driver

    if wrong := known.unsupported():
        if not options.any_version:
            raise ValueError(wrong)
        print(f"WARNING: {wrong.partition(';')[0]}", file=sys.stderr)
    names = ("budget", "shards", "max_ranks", "gpus_per_rank", "database", "seed", "chunk", "shrink_seconds")
    return driver.run(
        driver.Asked(
            **{name: getattr(options, name) for name in names},
            address=options.ray_address,
            folder=options.campaign,
            only=tuple(options.only),
            plants=tuple(options.plant),
            known=not options.no_known,
        )
    )


def _status(options: argparse.Namespace) -> int:
    from fuzz.deep import status

    return status.run(options.folder)


def _map(options: argparse.Namespace) -> int:
    from fuzz.deep import page

    return page.run(options.folder)


def _news(options: argparse.Namespace) -> int:
    from fuzz.deep import news

    return news.run(options.folder, options.seen, options.issues, options.summary)
