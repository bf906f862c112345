"""pytest's side: options, Hypothesis profiles, the warm pools, what a fault of ours and the end of a run look like."""

import os
import tempfile
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, event, settings
from rich.console import Console

from fuzz import forking, known, summary
from fuzz.case import Case, HarnessFault
from fuzz.strategies import worlds
from fuzz.trial import Trials

os.environ["HF_HUB_OFFLINE"] = "1"

# Phase.explain re-runs a minimal case hundreds of times; the clock is the pool's, not Hypothesis's.
_ALL = tuple(phase for phase in Phase if phase is not Phase.explain)
_COMMON: dict[str, Any] = {"deadline": None, "phases": _ALL, "print_blob": False}
settings.register_profile("dev", max_examples=30, **_COMMON)
settings.register_profile("ci", max_examples=30, derandomize=True, database=None, **_COMMON)
settings.register_profile("deep", max_examples=2000, **_COMMON)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ep-ppo-fuzz")
    group.addoption("--max-ranks", type=int, default=4, help="largest world that is drawn (default 4)")
    group.addoption("--no-known", action="store_true", help="do not step around known bugs of megatron-core")
    group.addoption("--any-version", action="store_true", help="go on with an unsupported megatron-core")
    group.addoption(
        "--plant", action="append", default=[], metavar="MODULE:FUNCTION", help="a bug to plant in every rank"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("max_ranks") < 1:
        pytest.exit(f"--max-ranks={config.getoption('max_ranks')} must be at least 1", returncode=2)
    found, supported = known.version(), ", ".join(known.SUPPORTED)
    if found not in known.SUPPORTED and not config.getoption("any_version"):
        said = f"megatron-core {found} is not supported (supported: {supported}); --any-version goes on all the same"
        pytest.exit(said, returncode=2)


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
    database = config.rootpath / ".hypothesis"
    if error := _unwritable(database):
        said = f"WARNING: failures cannot be kept in {database} ({error.strerror}); they are printed, the run goes on"
        lines.append(said)
    if known.version() not in known.SUPPORTED:
        lines.append(f"WARNING: megatron-core {known.version()} is untested; supported: {', '.join(known.SUPPORTED)}")
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "world" in metafunc.fixturenames:
        sizes = worlds(metafunc.config.getoption("max_ranks"))
        metafunc.parametrize("world", sizes, ids=[f"{size}ranks" for size in sizes])


# ---- running and counting --------------------------------------------------------------------------------------

TALLY = pytest.StashKey[summary.Tally]()


def _trials(config: pytest.Config, mends: tuple[str, ...]) -> Iterator[Trials]:
    forking.warm_up()
    trials = Trials(plants=(*mends, *config.getoption("plant")))
    yield trials
    trials.close()


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
    """A tally of its own for every item; it travels in the item's report, from pytest-xdist's workers too."""
    item.config.stash[TALLY] = {}
    item.user_properties.append(("fuzz", item.config.stash[TALLY]))


@pytest.fixture(scope="session")
def rehearse(pytestconfig: pytest.Config, trials: Trials) -> Callable[[Case], None]:
    """Run a case and judge it by all laws."""

    def run(case: Case) -> None:
        verdict = trials.judge(case)
        summary.count(pytestconfig.stash[TALLY], verdict)
        for law, number in verdict.counts.items():
            event(f"{law}: {'fired' if number else 'vacuous'}")
        if verdict.violation is not None:
            raise verdict.violation

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, HarnessFault):
        report.when = "setup"  # an error in JUnit, not a failure: nothing was found
        report.longrepr = f"harness fault: {call.excinfo.value}"
        item.session.shouldstop = "a fault of the harness"
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    tally = _tally(terminalreporter)
    text = StringIO()
    width = max(100, terminalreporter._tw.fullwidth)
    summary.write(tally, Console(file=text, width=width, force_terminal=terminalreporter.isatty))
    terminalreporter.write(text.getvalue())
    if why := summary.too_doubtful(tally):
        terminalreporter.write_line(f"FAILED: {why}", red=True)


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
