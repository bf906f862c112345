"""pytest's side: options, Hypothesis profiles, warm pools, the search of each test, and how the end of a run looks."""

import contextlib
import gc
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import Phase, currently_in_test_context, event, settings
from rich.console import Console

from fuzz import device, forking, known, plants, refusals, summary
from fuzz.broken import Broken
from fuzz.broken import size as size_of_broken
from fuzz.case import Case, HarnessFault, Violation
from fuzz.functions import judge as functions
from fuzz.functions.call import Call
from fuzz.functions.call import size as size_of_call
from fuzz.search import Row, Search
from fuzz.space import PROPERTIES
from fuzz.timebox import TimeBox, TimeUp
from fuzz.trial import Trials

os.environ["HF_HUB_OFFLINE"] = "1"

# Phase.explain re-runs a minimal case hundreds of times; the clock is the pool's, not Hypothesis's.
_ALL = tuple(phase for phase in Phase if phase is not Phase.explain)
DEEP = 2000
_COMMON: dict[str, Any] = {"deadline": None, "phases": _ALL, "print_blob": False}
settings.register_profile("dev", max_examples=12, **_COMMON)
settings.register_profile("ci", max_examples=12, derandomize=True, database=None, **_COMMON)
settings.register_profile("deep", max_examples=DEEP, **_COMMON)
_PROFILES = ("dev", "ci", "deep")
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def _number(kind: Callable[[str], float], name: str) -> Callable[[str], float]:
    """An option's number; one line and exit code 2 where it is none (pytest's own code would be 4)."""

    def parsed(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            print(f"--{name}={text} must be a number", file=sys.stderr)
            raise SystemExit(2) from None

    return parsed


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ep-ppo-fuzz")
    group.addoption(
        "--max-ranks", type=_number(int, "max-ranks"), default=4, help="largest world that is drawn (default 4)"
    )
    group.addoption("--device", default="", help="cpu or cuda (default cuda where a GPU is visible)")
    group.addoption(
        "--ranks-per-gpu",
        type=_number(int, "ranks-per-gpu"),
        default=device.SHARED,
        help=f"ranks that one GPU takes at most (default {device.SHARED})",
    )
    group.addoption("--every-layout", action="store_true", help="each layout once, as in the deep profile")
    group.addoption("--no-known", action="store_true", help="do not step around known bugs of megatron-core")
    group.addoption("--any-version", action="store_true", help="go on with an unsupported megatron-core")
    group.addoption(
        "--shrink-seconds",
        type=_number(float, "shrink-seconds"),
        default=60.0,
        help="for all failures of one test together (default 60)",
    )
    group.addoption(
        "--plant",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="a bug to plant in every rank; or FILE.py:FUNCTION",
    )


@pytest.hookimpl(tryfirst=True)  # before Hypothesis loads the profile
def pytest_configure(config: pytest.Config) -> None:
    if wrong_option := next(_wrong_options(config), None):
        pytest.exit(wrong_option, returncode=2)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    if (wrong := known.unsupported()) and not config.getoption("any_version"):
        pytest.exit(wrong, returncode=2)


def _wrong_options(config: pytest.Config) -> Iterator[str]:
    """What cannot be run, a line each."""
    try:
        device.choose(config.getoption("device"), config.getoption("ranks_per_gpu"))
    except ValueError as error:
        yield str(error)
    if config.getoption("max_ranks") < 1:
        yield f"--max-ranks={config.getoption('max_ranks')} must be at least 1"
    if (most := device.most_ranks()) and config.getoption("max_ranks") > most:
        gpus, each = device.gpus(), config.getoption("ranks_per_gpu")
        yield f"--max-ranks={config.getoption('max_ranks')} must be at most {most}: {gpus} GPUs, --ranks-per-gpu={each}"
    if not config.getoption("shrink_seconds") >= 0:
        yield f"--shrink-seconds={config.getoption('shrink_seconds')} must be 0 or more"
    if (profile := config.getoption("--hypothesis-profile")) not in (None, "", "default", *_PROFILES):
        yield f"--hypothesis-profile={profile} must be one of {', '.join(_PROFILES)}"
    for plant in config.getoption("plant"):
        try:
            plants.resolved(plant)
        except ValueError as error:
            yield f"--plant {error}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C; once more where it comes while Python collects: Hypothesis has a callback there, and Python drops what
    is raised in it.
    """
    if frame is None or frame.f_code.co_name != "gc_callback":
        raise KeyboardInterrupt
    threading.Timer(0.05, os.kill, (os.getpid(), number)).start()


def _unwritable(folder: Path) -> OSError | None:
    """Why nothing can be kept in a folder: Hypothesis passes over it without a word."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        return error
    return None


def pytest_report_header(config: pytest.Config) -> list[str]:
    from importlib.metadata import version

    names = ("megatron-core", "torch", "transformers", "hypothesis")
    lines = ["ep-ppo-fuzz: " + ", ".join(f"{name} {version(name)}" for name in names)]
    lines += device.told()
    database = config.rootpath / ".hypothesis"
    if error := _unwritable(database):
        said = f"WARNING: failures cannot be kept in {database} ({error.strerror}); they are printed, the run goes on"
        lines.append(said)
    if known.version() not in known.SUPPORTED:
        lines.append(f"WARNING: megatron-core {known.version()} is untested; supported: {', '.join(known.SUPPORTED)}")
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "world" in metafunc.fixturenames:
        sizes = [size for size in PROPERTIES if size <= metafunc.config.getoption("max_ranks")]
        metafunc.parametrize("world", sizes, ids=[f"{size}ranks" for size in sizes])


# ---- running and counting --------------------------------------------------------------------------------------

TALLY = pytest.StashKey[summary.Tally]()
SEARCH = pytest.StashKey[Search]()
TRIALS = pytest.StashKey[Trials]()
CONSOLE = pytest.StashKey[Console]()
ROWS = pytest.StashKey[dict[str, Row]]()  # by folder, what has been investigated in this run


def _trials(config: pytest.Config, mends: tuple[str, ...]) -> Iterator[Trials]:
    forking.warm_up()
    gc.collect()
    gc.freeze()  # what is imported stays: a collection that looks at all of torch takes long
    trials = Trials(plants=(*mends, *map(plants.resolved, config.getoption("plant"))))
    yield trials
    trials.close()


@pytest.fixture(scope="session")
def long(pytestconfig: pytest.Config) -> None:
    """What takes long is asked for, or belongs to the deep profile."""
    if not (pytestconfig.getoption("every_layout") or settings().max_examples >= DEEP):
        pytest.skip("in the deep profile, or with --every-layout")


@pytest.fixture(scope="session")
def trials(pytestconfig: pytest.Config) -> Iterator[Trials]:
    """The warm pools; known bugs of megatron-core are mended unless --no-known."""
    yield from _trials(pytestconfig, () if pytestconfig.getoption("no_known") else known.mends())


@pytest.fixture(scope="session")
def stock(pytestconfig: pytest.Config) -> Iterator[Trials]:
    """Pools of megatron-core as released: nothing mended."""
    yield from _trials(pytestconfig, ())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A tally and a search of its own for every item; they travel in its report, from pytest-xdist's workers too."""
    item.config.stash[TALLY] = {}
    item.config.stash[SEARCH] = _search(item)
    item.user_properties.append(("fuzz", item.config.stash[TALLY]))
    _own_examples(item)


def _own_examples(item: pytest.Item) -> None:
    """What is remembered of a property belongs to its world: Hypothesis's plugin sees to it only where there is a mark.

    A shard of the deep run saves under the same key.
    """
    if inner := getattr(getattr(getattr(item, "obj", None), "hypothesis", None), "inner_test", None):
        inner._hypothesis_internal_add_digest = item.nodeid.encode()


def _search(item: pytest.Item) -> Search:
    cases = getattr(getattr(item, "function", None), "_hypothesis_internal_use_settings", settings()).max_examples
    seconds, console = item.config.getoption("shrink_seconds"), partial(_console, item.config)
    return Search(item.name, cases, seconds, item.config.rootpath, console)


def _console(config: pytest.Config) -> Console | None:
    """Where pytest itself writes, past its capturing; None in a worker of pytest-xdist, whose output is a channel."""
    reporter, capturing = map(config.pluginmanager.get_plugin, ("terminalreporter", "capturemanager"))
    if reporter is None:
        return None
    with capturing.global_and_fixture_disabled() if capturing else contextlib.nullcontext():
        reporter.ensure_newline()
        if CONSOLE not in config.stash:
            file = os.fdopen(os.dup(sys.__stdout__.fileno()), "w")  # type: ignore[union-attr]
            config.stash[CONSOLE] = Console(file=file, force_terminal=reporter.isatty)
    return config.stash[CONSOLE]


@pytest.fixture(scope="session")
def rehearse(pytestconfig: pytest.Config, trials: Trials) -> Callable[[Case], None]:
    """Run a case and judge it by all laws."""

    def judge(case: Case) -> Violation | None:
        verdict = trials.judge(case)
        summary.count(pytestconfig.stash[TALLY], verdict)
        for law, number in verdict.counts.items() if currently_in_test_context() else ():
            event(f"{law}: {'fired' if number else 'vacuous'}")
        return verdict.violation

    pytestconfig.stash[TRIALS] = trials
    return lambda case: pytestconfig.stash[SEARCH].run(case, judge)


@pytest.fixture(scope="session")
def refuse(pytestconfig: pytest.Config, trials: Trials) -> Callable[[Broken], None]:
    """Run a broken configuration and judge how it is refused."""

    def judge(broken: Any) -> Violation | None:
        verdict = refusals.judge(trials, broken, known=not pytestconfig.getoption("no_known"))
        summary.count_broken(pytestconfig.stash[TALLY], verdict)
        event(f"{verdict.outcome} {verdict.known}".strip())
        return verdict.violation

    return _boxed(pytestconfig, judge, size_of_broken)


def _boxed(
    config: pytest.Config, judge: Callable[[Any], Violation | None], size: Callable[[Any], Any]
) -> Callable[[Any], None]:
    """Judges each value once, within a time box of its own per test; raises the Violation."""
    boxes: dict[str, TimeBox] = {}

    def run(value: Any) -> None:
        name, seconds = os.environ.get("PYTEST_CURRENT_TEST", ""), config.getoption("shrink_seconds")
        box = boxes.get(name) or TimeBox(seconds, lambda _: None, size, lambda *_: None)
        boxes.setdefault(name, box).run(value, judge)

    return run


@pytest.fixture(scope="session")
def make(pytestconfig: pytest.Config, trials: Trials) -> Callable[[Call], None]:
    """Make a call of a function and judge it."""

    def judge(call: Any) -> Violation | None:
        verdict = functions.judge(trials, call, step_around=not pytestconfig.getoption("no_known"))
        summary.count_call(pytestconfig.stash[TALLY], verdict)
        return verdict.violation

    return _boxed(pytestconfig, judge, size_of_call)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Any:
    """A search that ran out of time ends with the smallest that it has found."""
    try:
        return (yield)
    except TimeUp as ended:
        raise ended.verdict() from None


def pytest_itemcollected(item: pytest.Item) -> None:
    """What is violated, in place of tracebacks through the harness: Hypothesis asks for it at every failing case."""
    usual = item.repr_failure

    def told(excinfo: pytest.ExceptionInfo[BaseException], *style: Any) -> Any:
        broken = _violations(excinfo.value)
        return "\n".join(map(str, broken)).strip("\n") if broken else usual(excinfo, *style)

    item.repr_failure = told  # type: ignore[method-assign]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    report = yield
    if call.when == "call":
        item.config.stash[SEARCH].close()
    if call.excinfo is not None and isinstance(call.excinfo.value, HarnessFault):
        report.when = "setup"  # an error in JUnit, not a failure: nothing was found
        report.longrepr = f"harness fault: {call.excinfo.value}"
        item.session.shouldstop = "a fault of the harness"
    elif call.excinfo is not None and report.failed and _violations(call.excinfo.value):
        _tell(item, report)
    return report


def _violations(error: BaseException) -> list[Violation]:
    """What left the test, where it is nothing but Violations: one, or a group of several."""
    leaves = error.exceptions if isinstance(error, BaseExceptionGroup) else (error,)
    violations = [leaf for leaf in leaves if isinstance(leaf, Violation)]
    return violations if len(violations) == len(leaves) else []


def _tell(item: pytest.Item, report: pytest.TestReport) -> None:
    """What was found out about each failure, and where it is written."""
    stash = item.config.stash
    rows = stash.setdefault(ROWS, {})
    if TRIALS not in stash or not stash[SEARCH].box.failures:
        return
    found = stash[SEARCH].investigate(stash[TRIALS], rows)
    rows |= {row.folder: row for row, _ in found}
    report.longrepr = "\n".join(row.violation for row, _ in found)  # of the smallest cases, as in their folders
    unwritten = stash[SEARCH].folders.warnings
    told = [str(text) if unwritten and text else row.told() for row, text in found]
    report.sections.append(("ep-ppo-fuzz", "\n\n".join([*unwritten, *told])))
    report.user_properties.append(("failures", [row.plain() for row, _ in found]))
    del stash[SEARCH]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    tally = _tally(terminalreporter)
    text = StringIO()
    width = max(100, terminalreporter._tw.fullwidth)
    console = Console(file=text, width=width, force_terminal=terminalreporter.isatty)
    summary.write(tally, console)
    summary.write_failures([row.plain() for row in _failures(terminalreporter, config)], console)
    terminalreporter.write(text.getvalue())
    if why := summary.too_doubtful(tally):
        terminalreporter.write_line(f"FAILED: {why}", red=True)


def _failures(terminalreporter: Any, config: pytest.Config) -> list[Row]:
    """Of all items, those of pytest-xdist's workers too; and of the one that was interrupted."""
    reports = terminalreporter.stats.get("failed", [])
    told = [Row(**row) for r in reports for row in dict(r.user_properties).get("failures", [])]
    interrupted = config.stash[SEARCH].best() if SEARCH in config.stash else []
    folders = {row.folder: row for row in (*interrupted, *told)}
    return list(folders.values())


def _tally(terminalreporter: Any) -> summary.Tally:
    reports = [r for rs in terminalreporter.stats.values() for r in rs if getattr(r, "when", "") == "call"]
    return summary.total(dict(r.user_properties).get("fuzz", {}) for r in reports)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return
    faults = [r for r in reporter.stats.get("error", []) if str(r.longrepr).startswith("harness fault")]
    if faults:
        session.exitstatus = 2
    elif session.exitstatus == 0 and summary.too_doubtful(_tally(reporter)):
        session.exitstatus = 1
