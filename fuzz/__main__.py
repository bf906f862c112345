"""The command line, `python -m fuzz COMMAND`: options and exit codes. A command's module is imported when asked for."""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fuzz import plants
from fuzz.deep import options as deep

INTERRUPTED, CLOSED = 130, 141  # 128 + SIGINT, 128 + SIGPIPE: as shells count
PATHS = "a case file, the folder of a failure (its case.json), or a folder with such files and folders below it"
REPLAY = """Runs each case on megatron-core and prints one line each:

  VIOLATED law; witness; numbers   a law is broken
  HOLDS                            no law is broken
  FIXED                            the same, of a case that lies in the folder of a failure
  KNOWN id                         broken by a known bug of megatron-core alone; counts as holding
  INCONCLUSIVE why                 could not be judged in full
  INVALID why                      no case file

Exit code: 0 all hold, 1 any violated, 2 any invalid or inconclusive, wrong usage, or a fault of the harness."""
SHOW = "Prints each case as a table, its ranks' coordinates and groups, and the line to paste. Runs nothing."


RECALL = """Would the suite have caught this bug? Each bug is planted in every rank and searched for as in any run: the
covering rows, then drawn cases, with fixed seeds. Found is what breaks a law with the bug and holds without it. What is
found is shrunk; then as many cases run without any bug, and must break nothing. Writes .fuzz/recall.md and recall.png.

Exit code: 0 all found and no false alarm, 1 one not found or a false alarm, 2 a bug that could not be planted, or wrong
usage."""

BISECT = """In which releases of megatron-core does a case fail? Each gets an environment of its own, in a cache folder,
that shares torch and all else with this one (or with --python); the case is judged there by the code of today,
megatron-core as released. A script that shows a bug (exit code 1 while it lives, 0 when it has gone) is run as it is.

  HOLDS, VIOLATED     as in replay
  INCONCLUSIVE why    the case cannot be expressed in that release, or was not judged in full
  SKIPPED why         the release needs another Python

Exit code: 0 it holds wherever it was judged, 1 violated somewhere, 2 judged nowhere, wrong usage, or an environment
that cannot be built."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m fuzz", description="Cases of ep-ppo-fuzz one at a time, and bugs to be found.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    recall = commands.add_parser("recall", help="find planted bugs", description=RECALL, formatter_class=raw)
    _recall_options(recall)
    bisect = commands.add_parser("bisect", help="one case on several releases", description=BISECT, formatter_class=raw)
    _bisect_options(bisect)
    deep.add_parsers(commands)
    replay = commands.add_parser("replay", help="judge case files again", description=REPLAY, formatter_class=raw)
    show = commands.add_parser("show", help="show a case and where its ranks sit", description=SHOW)
    _replay_options(replay)
    for command in (replay, recall):
        command.add_argument("--device", default="", metavar="cpu|cuda", help="default cuda where a GPU is visible")
    for command in (replay, show):
        command.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=PATHS)
        command.add_argument("--json", action="store_true", help="one JSON document on stdout, and nothing else there")
    return parser


def _replay_options(replay: argparse.ArgumentParser) -> None:
    switches = {
        "--keep-going": "go on after the first case that is violated or invalid",
        "--no-known": "run megatron-core as released: known bugs are reported like any other",
        "--any-version": "go on with an unsupported megatron-core",
        "--verbose": "expected and observed in full, below the line",
    }
    for name, said in switches.items():
        replay.add_argument(name, action="store_true", help=said)
    replay.add_argument("--law", default="", metavar="LAW", help="only this law counts; its name or its sentence")
    plant = "a bug to plant in every rank; may be repeated"
    replay.add_argument("--plant", action="append", default=[], type=_plant, metavar="MODULE:FUNCTION", help=plant)


def _recall_options(recall: argparse.ArgumentParser) -> None:
    files = "bugs of your own: every top-level function of the file that does not begin with _; else all of the package"
    recall.add_argument("files", nargs="*", metavar="FILE.py", help=files)
    bugs = "only these, by id or name, with commas between them"
    recall.add_argument("--bugs", default="", metavar="A,B", help=bugs)
    for name, said in {"--seconds-per-bug": "of search", "--shrink-seconds": "of shrinking what was found"}.items():
        recall.add_argument(name, type=_seconds, default=60.0, metavar="S", help=f"{said} (default 60)")
    recall.add_argument("--jobs", type=_jobs, default=1, metavar="N", help="bugs at once (default 1)")
    recall.add_argument("--json", default="", metavar="OUT", help="a file for the results as JSON")
    recall.add_argument("--any-version", action="store_true", help="go on with an unsupported megatron-core")


def _bisect_options(bisect: argparse.ArgumentParser) -> None:
    case = "a case file, the folder of a failure, or a script (.py) that shows a bug"
    bisect.add_argument("case", type=Path, metavar="CASE", help=case)
    bisect.add_argument("--versions", default="", metavar="A,B", help="releases of megatron-core (default: seven)")
    bisect.add_argument("--law", default="", metavar="LAW", help="only this law counts; its name or its sentence")
    python = "another Python that has torch, for releases that this one cannot have; may be repeated"
    bisect.add_argument("--python", action="append", default=[], metavar="PATH", help=python)
    bisect.add_argument("--cache", type=Path, metavar="FOLDER", help="where environments are kept")
    bisect.add_argument("--seconds", type=_seconds, default=300.0, metavar="S", help="for one release (default 300)")
    bisect.add_argument("--json", action="store_true", help="one JSON document on stdout, and nothing else there")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (seconds := float(text)) < float("inf"):
            return seconds
    raise argparse.ArgumentTypeError(f"{text} must be a number of seconds, 0 or more")


def _jobs(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (jobs := int(text)) >= 1:
            return jobs
    raise argparse.ArgumentTypeError(f"{text} must be an integer, 1 or more")


def _plant(text: str) -> str:
    try:
        return plants.resolved(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _unsupported(options: argparse.Namespace) -> str:
    """What ends a command for the device that is asked for or the megatron-core that is installed; a warning where it
    goes on all the same.
    """
    from fuzz import device, known

    try:
        device.choose(options.device)
    except ValueError as error:
        return str(error)
    wrong = known.unsupported()
    if wrong and options.any_version:
        print(f"WARNING: {wrong.partition(';')[0]}", file=sys.stderr)
    return "" if options.any_version else wrong


def _recall(options: argparse.Namespace) -> int:
    from fuzz import recall

    if wrong := _unsupported(options):
        return _refuse(wrong)
    bugs = tuple(filter(None, (name.strip() for name in options.bugs.split(","))))
    numbers = {"seconds": options.seconds_per_bug, "shrink_seconds": options.shrink_seconds, "jobs": options.jobs}
    try:
        return recall.run(recall.Asked(files=tuple(options.files), bugs=bugs, json=options.json, **numbers))
    except ValueError as error:
        return _refuse(str(error))


def _replay(options: argparse.Namespace) -> int:
    from fuzz import replay

    if wrong := _unsupported(options):
        return _refuse(wrong)
    names = ("no_known", "keep_going", "json", "verbose")
    try:
        law = replay.law_named(options.law) if options.law else ""
    except ValueError as error:
        return _refuse(str(error))
    asked = replay.Asked(law=law, plants=tuple(options.plant), **{name: getattr(options, name) for name in names})
    return replay.run(options.paths, asked)


def _bisect(options: argparse.Namespace) -> int:
    from fuzz import bisect, replay

    named = tuple(filter(None, (version.strip() for version in options.versions.split(","))))
    names = ("case", "cache", "seconds", "json")
    try:
        law = replay.law_named(options.law) if options.law else ""
        numbers = {"pythons": tuple(options.python), "law": law, **{name: getattr(options, name) for name in names}}
        return bisect.run(bisect.Asked(versions=named if options.versions else bisect.RELEASES, **numbers))
    except ValueError as error:
        return _refuse(str(error))


def _show(options: argparse.Namespace) -> int:
    from fuzz import show

    return show.run(options.paths, as_json=options.json)


def _deep(options: argparse.Namespace) -> int:
    """A command of `fuzz.deep`."""
    try:
        return options.run(options)
    except ValueError as error:
        return _refuse(str(error))


def _refuse(why: str) -> int:
    print(f"python -m fuzz: {why}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. SystemExit(2) by argparse where the options are wrong."""
    parser = _parser()
    given = sys.argv[1:] if arguments is None else arguments
    if not given:
        parser.print_help(sys.stderr)
        return 2
    options = parser.parse_args(given)
    try:
        own = {"bisect": _bisect, "recall": _recall, "replay": _replay, "show": _show}
        return own[options.command](options) if options.command in own else _deep(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has read enough; what is left in the buffer must not raise at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
