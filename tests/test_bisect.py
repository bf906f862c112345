"""`python -m fuzz bisect`: environments built by pip from wheels in a folder, verdicts in the order of versions.

The wheels are megatron-core by name alone, so that nothing is downloaded; the slow test takes the real ones.
"""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from fuzz import bisect, environments, known
from fuzz.__main__ import main
from fuzz.bisect import Judged, conclusions
from fuzz.case import Case
from fuzz.case_json import to_json

ROOT = Path(__file__).parents[1]
NAMED = "Metadata-Version: 2.1\nName: megatron-core\n"
SCRIPT = "import sys, torch, megatron.core as core\nprint('seen in', core.VERSION)\nsys.exit(core.HAS_BUG)\n"
BACKEND = "import pathlib, time\ndef build_wheel(*_, **__):\n    pathlib.Path({there!r}).touch()\n    time.sleep(60)\n"


def wheel(folder: Path, version: str, source: str, requires: str = ">=3.11") -> None:
    """A wheel of the name megatron-core that holds `megatron/core/__init__.py`."""
    info = f"megatron_core-{version}.dist-info"
    files = {
        "megatron/core/__init__.py": f"VERSION = {version!r}\n{source}\n",
        f"{info}/METADATA": f"{NAMED}Version: {version}\nRequires-Python: {requires}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: here\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"megatron_core-{version}-py3-none-any.whl", "w") as made:
        for name, text in files.items():
            made.writestr(name, text)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, of which alone pip knows; the working directory has a script and a case."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    Path("bug.py").write_text(SCRIPT)
    Path("case.json").write_text(to_json(Case()))
    return folder


def test_where_a_bug_came_in_and_went(wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sorted by version, each in an environment of its own that shares torch; none is built twice."""
    for version, has_bug in {"7.9.0": 0, "7.10.0": 1, "7.11.0": 0}.items():
        wheel(wheels, version, f"HAS_BUG = {has_bug}")
    wheel(wheels, "7.12.0", "raise RuntimeError('not here')")
    wheel(wheels, "7.13.0", "HAS_BUG = 1", requires=">=3.99")
    versions = "7.13.0,7.12.0,7.11.0,7.10.0,7.9.0"
    asked = ["bisect", "bug.py", "--versions", versions, "--cache", str(tmp_path / "cache"), "--json"]
    code = main(asked)
    said = json.loads(capsys.readouterr().out)
    outcomes = {one["version"]: one["outcome"] for one in said["versions"]}
    assert code == 1 and list(outcomes) == ["7.9.0", "7.10.0", "7.11.0", "7.12.0", "7.13.0"]
    assert list(outcomes.values()) == ["HOLDS", "VIOLATED", "HOLDS", "INCONCLUSIVE", "SKIPPED"]
    assert [one["why"] for one in said["versions"]][1] == "seen in 7.10.0"
    assert said["conclusions"] == ["introduced in 7.10.0, or after 7.9.0", "mended in 7.11.0, or after 7.10.0"]
    assert "needs Python >=3.99" in said["versions"][4]["why"] and "RuntimeError" in said["versions"][3]["why"]
    assert sorted(file.name.split("-py")[0] for file in (tmp_path / "cache").iterdir()) == [
        f"megatron-core-{version}" for version in ("7.10.0", "7.11.0", "7.12.0", "7.9.0")
    ]
    for file in wheels.iterdir():
        file.unlink()
    assert main([*asked[:3], "7.10.0", *asked[4:]]) == 1  # from the cache
    assert json.loads(capsys.readouterr().out)["conclusions"][0].startswith("there in 7.10.0")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bug.py", "--versions", "7.2.0"], "megatron-core 7.2.0 was never released; releases near it: 7.1.0, 7.4.0"),
        (["bug.py", "--versions", "../x"], "'../x' is no version of megatron-core; one is written as 0.16.1"),
        (["bug.py", "--versions", ","], "--versions names none"),
        (["none.py"], "none.py: there is no such script"),
        (["none.json"], "none.json cannot be read: No such file or directory"),
        (["case.json", "--law", "nope"], "no law is called 'nope'"),
        (["bug.py", "--python", "/none"], "/none is no Python that can be run"),
        (["bug.py", "--cache", "/proc/none", "--versions", "7.1.0"], "/proc/none cannot be written"),
        (["bug.py", "--seconds", "x"], "argument --seconds: x must be a number of seconds"),
    ],
)
def test_bad_input_is_one_line(
    wheels: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    wheel(wheels, "7.1.0", "HAS_BUG = 0")
    wheel(wheels, "7.4.0", "HAS_BUG = 0")
    try:
        code = main(["bisect", *arguments])
    except SystemExit as end:  # argparse's way
        code = end.code  # type: ignore[assignment]
    out, error = capsys.readouterr()
    assert (code, out) == (2, "") and error.count("\n") == 1 and said in error, error


def test_without_a_registry_it_is_said_so(wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bisect", "bug.py", "--versions", "7.1.0", "--cache", str(tmp_path / "cache")]) == 2
    assert capsys.readouterr().err == (
        "python -m fuzz: megatron-core 7.1.0 is in no cache here, and the registry cannot be reached\n"
    )
    assert not list((tmp_path / "cache").iterdir())


def test_an_interrupted_build_leaves_nothing(wheels: Path, tmp_path: Path) -> None:
    """Ctrl-C while pip builds: no environment, no half of one, exit code 130; what a killed one left goes too."""
    built, source = tmp_path / "built", tmp_path / "megatron_core-7.1.0"
    source.mkdir()
    (source / "PKG-INFO").write_text(f"{NAMED}Version: 7.1.0\n")
    system = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (source / "pyproject.toml").write_text(system)
    (source / "backend.py").write_text(BACKEND.format(there=str(built)))
    subprocess.run(["tar", "czf", wheels / "megatron_core-7.1.0.tar.gz", source.name], cwd=tmp_path, check=True)
    cache = tmp_path / "cache"
    left = cache / ".megatron-core-7.0.0-py3.11-00000000.4194304"  # above every process id
    left.mkdir(parents=True)
    command = [sys.executable, "-m", "fuzz", "bisect", "bug.py", "--versions", "7.1.0", "--cache", str(cache)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 60
        while not built.exists():
            assert process.poll() is None and time.monotonic() < until, process.stderr and process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        ("VV", ["there in 0.0, the oldest that was judged", "lives in 0.1, the newest that was judged"]),
        ("HIV", ["introduced in 0.2, or after 0.0", "lives in 0.2, the newest that was judged"]),
        ("HH", ["violated in none of the versions that were judged"]),
        ("IS", ["no version was judged"]),
    ],
)
def test_what_follows_from_the_verdicts(outcomes: str, said: list[str]) -> None:
    words = {word[0]: word for word in (bisect.HOLDS, bisect.VIOLATED, bisect.INCONCLUSIVE, bisect.SKIPPED)}
    assert conclusions([Judged(f"0.{n}", words[letter]) for n, letter in enumerate(outcomes)]) == said


def test_versions_are_sorted_by_number() -> None:
    given = ["0.16.1", "0.9.0", "0.16.0rc0", "0.16.0"]
    assert sorted(given, key=environments.order) == ["0.9.0", "0.16.0rc0", "0.16.0", "0.16.1"]


@pytest.mark.slow
def test_a_case_on_real_releases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bug of 0.15 and 0.16 alike; 0.19 is skipped under Python 3.11, or run where a Python has it."""
    [bug] = [bug for bug in known.KNOWN if bug.id == "expert-gradients-over-dense-dp"]
    (tmp_path / "case.json").write_text(to_json(bug.example))
    versions = ["--versions", "0.15.3,0.16.1,0.19.2", "--cache", str(tmp_path / "cache")]
    assert main(["bisect", str(tmp_path / "case.json"), *versions, "--json"]) == 1
    first, second, third = json.loads(capsys.readouterr().out)["versions"]
    assert first["outcome"] == second["outcome"] == "VIOLATED" and second["law"] == bug.law
    assert third["outcome"] in ("SKIPPED", "HOLDS")
