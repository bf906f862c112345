"""The command line, `python -m fuzz COMMAND`: options and exit codes. A command's module is imported when asked for."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Cases of ep-ppo-fuzz, one at a time.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    replay = commands.add_parser("replay", help="judge case files again", description=REPLAY, formatter_class=raw)
    show = commands.add_parser("show", help="show a case and where its ranks sit", description=SHOW)
    _replay_options(replay)
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


def _plant(text: str) -> str:
    try:
        return plants.resolved(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _replay(options: argparse.Namespace) -> int:
    from fuzz import known, replay

    if wrong := known.unsupported():
        if not options.any_version:
            return _refuse(wrong)
        print(f"WARNING: {wrong.partition(';')[0]}", file=sys.stderr)
    names = ("no_known", "keep_going", "json", "verbose")
    try:
        law = replay.law_named(options.law) if options.law else ""
    except ValueError as error:
        return _refuse(str(error))
    asked = replay.Asked(law=law, plants=tuple(options.plant), **{name: getattr(options, name) for name in names})
    return replay.run(options.paths, asked)


def _show(options: argparse.Namespace) -> int:
    from fuzz import show

    return show.run(options.paths, as_json=options.json)


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
        return {"replay": _replay, "show": _show}[options.command](options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has read enough; what is left in the buffer must not raise at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
