"""After the search: runs a minimal case again, looks around it and into it, and writes the folder of the failure.

Knows trials, the neighbourhood, divergence, scripts and folders. Knows no pytest and no Hypothesis. Every step has its
seconds; one that fails is named in the report, and the others go on.
"""

import contextlib
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fuzz import device, divergence, heatmap, known, neighbourhood, repro
from fuzz.case import Case, HarnessFault, Violation
from fuzz.folders import Folders, write
from fuzz.report import AGAIN, Report
from fuzz.timebox import Failure
from fuzz.trial import Trials, Verdict

Step = Callable[[Report, Trials, Path], Report]

AROUND = 30.0  # seconds for the neighbourhood at most
SCRIPT = 60.0  # seconds for a script to show the bug
LIVENESS = ("collectives run in lock-step", "every rank finishes")


def investigate(failure: Failure, trials: Trials, folders: Folders, seconds: float) -> tuple[Path, Report]:
    """Find out what a maintainer asks, and write it down: the folder, and the report that lies in it."""
    around = neighbourhood.explore(failure.violation.case, _fails(failure, trials), seconds)
    failure = _smallest(failure, around.smaller, trials)
    report = Report(failure.violation, plants=_planted(trials), commit=commit())
    report = replace(report, neighbourhood=around.sentence(), neighbours=around.table())
    folder = folders.keep(failure)
    for step in (_again, _on_cpu, _diverge, _script):
        report = _tried(step, report, trials, folder, folders)
    try:
        write(folder / "report.md", str(report))
    except OSError as error:
        folders.warn(error)
    return folder, report


def _same(broken: Violation, violation: Violation | None) -> bool:
    return violation is not None and (violation.law, violation.cause) == (broken.law, broken.cause)


def _fails(failure: Failure, trials: Trials) -> Callable[[Case, float], bool | None]:
    """Whether a neighbour breaks the same law of the same cause; None where it breaks another or cannot be judged."""

    def fails(case: Case, _left: float) -> bool | None:
        try:
            verdict = trials.judge(case)
        except HarnessFault:
            return None
        if verdict.violation is None:
            return None if verdict.doubts else False
        return True if _same(failure.violation, verdict.violation) else None

    return fails


def _smallest(failure: Failure, smaller: Case | None, trials: Trials) -> Failure:
    """A neighbour that is smaller and fails too takes the place of the case."""
    with contextlib.suppress(HarnessFault):
        violation = trials.judge(smaller).violation if smaller is not None else None
        if violation is not None and _same(failure.violation, violation):
            return replace(failure, violation=violation)
    return failure


def _tried(step: Step, report: Report, trials: Trials, folder: Path, folders: Folders) -> Report:
    """The report with what a step adds; where the step fails, with why."""
    try:
        return step(report, trials, folder)
    except OSError as error:
        folders.warn(error)
        return report
    except (Exception, HarnessFault) as error:
        said = (str(error).strip().splitlines() or [""])[0]
        why = f"{step.__name__.strip('_')}: {type(error).__name__}: {said}"
        return replace(report, missing=(*report.missing, why))


def _again(report: Report, trials: Trials, folder: Path) -> Report:
    """How often the case fails when it is really run again, with twice the patience."""
    verdicts = [trials.judge(report.violation.case, times_patience=2.0) for _ in range(AGAIN)]
    return replace(report, runs=(sum(_same(report.violation, v.violation) for v in verdicts), AGAIN))


def _on_cpu(report: Report, trials: Trials, folder: Path) -> Report:
    """Of what failed on GPUs: whether the case breaks a law in float64 on the CPU too."""
    if device.name() == "cpu":
        return report
    with contextlib.closing(trials.on_cpu()) as pools:
        verdict = pools.judge(replace(report.violation.case, precision="float64"))
    return replace(report, classified=classified(verdict))


def classified(verdict: Verdict) -> str:
    """What a verdict in float64 on the CPU says of a failure on GPUs."""
    if verdict.violation is not None:
        return f"logic: fails on CPU too, in float64 ({verdict.violation.law})"
    if verdict.doubts:
        return (
            f"not told apart: on the CPU, in float64, part of the case cannot be judged ({'; '.join(verdict.doubts)})"
        )
    return "kernel, stream or precision: GPU only; on the CPU, in float64, the case holds"


def _diverge(report: Report, trials: Trials, folder: Path) -> Report:
    if report.violation.law in LIVENESS:
        return report
    found = divergence.measure(trials, report.violation.case)
    if found is None:
        return report
    drawn = BytesIO()
    heatmap.write(found, drawn)
    write(folder / "divergence.png", drawn.getvalue())
    return replace(report, divergence=found.sentence(), modules=found.table())


def _script(report: Report, trials: Trials, folder: Path) -> Report:
    """Write the script that shows the bug by itself; one that imports this package where that does not show it."""
    violation, file = report.violation, folder / "repro.py"
    plants = (*_planted(trials), *_needed_mends(violation.case, trials))
    what = violation.case, violation.law, plants, violation.sentence, seen_on()
    for text in dict.fromkeys((repro.script(*what), repro.whole_case(*what))):
        write(file, text)
        why = repro.check(file, SCRIPT)
        if not why:
            how = "runs the whole case through this package" if "from fuzz" in text else "self-contained"
            return replace(report, script=f"{how}; exits 1 while the bug is there")
    return replace(report, missing=(*report.missing, f"repro.py did not show the bug: {why}"))


def _planted(trials: Trials) -> tuple[str, ...]:
    """What was planted on purpose; mends of known bugs are not."""
    return tuple(plant for plant in trials.plants if plant not in known.mends())


def _needed_mends(case: Case, trials: Trials) -> tuple[str, ...]:
    """Mends that were on and that this case needs, as it lies where a known bug lives."""
    needed = {bug.mend for bug in known.living() if bug.id in known.met(case)}
    return tuple(plant for plant in trials.plants if plant in needed)


def seen_on() -> str:
    """The versions that a failure was seen on."""
    packages = ("megatron-core", "torch")
    return ", ".join(f"{name} {metadata.version(name)}" for name in packages)


def commit() -> str:
    """The commit of a megatron-core that is installed from a checkout; empty for a release."""
    said = metadata.distribution("megatron-core").read_text("direct_url.json")
    folder = urlsplit(json.loads(said or "{}").get("url", "")).path
    if not folder:
        return ""
    asked = ["git", "-C", unquote(folder), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
