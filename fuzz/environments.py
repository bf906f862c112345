"""Environments with another megatron-core: a folder for each version; all else is shared with an interpreter.

An environment is built under a temporary name and renamed when it is whole, so that one with a name is whole. Knows
venv, pip and the cache folder; nothing of cases. Every wait has a deadline.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from fuzz import commands

MOST_SECONDS = 300.0  # for one step: an environment is made in 1 s, megatron-core is 2 MB where it need not be compiled
RETRIES, SILENCE = 1, 15  # of pip: tries more, and seconds without an answer before it gives up
VERSION = re.compile(r"\d+(\.\d+){1,3}((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?")
ASK = """
import importlib.util as u, json, site, sys
here = [path for path in [*site.getsitepackages(), site.getusersitepackages()] if path in sys.path]
found = [name for name in ("torch", "transformers", "pip") if u.find_spec(name)]
print(json.dumps(["%d.%d" % sys.version_info[:2], sys.prefix, here, found]))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python with torch: its path, its version as '3.12', its prefix, its folders of packages."""

    path: str
    version: str
    prefix: str
    sites: tuple[str, ...]


class OtherPython(Exception):
    """A version that this Python cannot have; says which one it needs, such as '>=3.12'."""


def place() -> Path:
    """Where environments are kept if nothing else is asked for."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ep-ppo-fuzz" / "environments"


def interpreter(path: str = sys.executable) -> Interpreter:
    """A Python that environments can share packages with; ValueError, in one line, where it cannot."""
    try:
        code, said = commands.run([path, "-c", ASK], Path.cwd(), 60.0)
        version, prefix, sites, found = json.loads(said.splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is no Python that can be run: {_last(str(error))}") from error
    missing = [name for name in ("torch", "transformers", "pip") if name not in found]
    if code or missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: an environment shares them with it")
    return Interpreter(path, version, prefix, tuple(sites))


def check(version: str) -> str:
    """The version as it is written; ValueError where it is none, since it becomes a path and an argument of pip."""
    if not VERSION.fullmatch(version):
        raise ValueError(f"{version!r} is no version of megatron-core; one is written as 0.16.1")
    return version


def order(version: str) -> tuple[tuple[int, ...], int, str]:
    """By which versions are sorted: their numbers, and what comes before a release before it."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    assert numbers
    rest = version[numbers.end() :]
    return tuple(map(int, numbers[0].split("."))), int(not rest or rest.startswith(".post")), rest


def folder_of(version: str, base: Interpreter, cache: Path) -> Path:
    """Where the environment of a version lies or will lie; another interpreter has another."""
    mark = hashlib.blake2b(base.prefix.encode(), digest_size=4).hexdigest()
    return cache / f"megatron-core-{check(version)}-py{base.version}-{mark}"


def python_of(version: str, base: Interpreter, cache: Path) -> str:
    """The Python of that environment, which is built where it is not there.

    OtherPython where the version needs one; ValueError, in one line, where it cannot be had.
    """
    folder = folder_of(version, base, cache)
    if not folder.exists():
        _build(version, base, folder)
    return str(folder / "bin" / "python")


def _build(version: str, base: Interpreter, folder: Path) -> None:
    """The environment, whole or not at all; another process may build the same one."""
    half = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _forget_the_half_built(folder.parent)
        _fill(version, base, half)
        with contextlib.suppress(OSError):
            half.rename(folder)
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be written: {error.strerror}") from error
    finally:  # Ctrl-C too
        shutil.rmtree(half, ignore_errors=True)
    if not folder.exists():
        raise ValueError(f"{folder} cannot be written")


def _forget_the_half_built(cache: Path) -> None:
    """What a killed process has left."""
    for half in cache.glob(".megatron-core-*"):
        if half.suffix[1:].isdigit() and not psutil.pid_exists(int(half.suffix[1:])):
            shutil.rmtree(half, ignore_errors=True)


def _fill(version: str, base: Interpreter, half: Path) -> None:
    code, said = commands.run([base.path, "-m", "venv", "--without-pip", str(half)], half.parent, MOST_SECONDS)
    if code != 0:
        raise ValueError(f"no environment can be made with {base.path}: {_last(said)}")
    site = half / "lib" / f"python{base.version}" / "site-packages"
    (site / "shared.pth").write_text("".join(f"{path}\n" for path in base.sites))
    options = ["--no-deps", "--no-input", "--quiet", "--disable-pip-version-check", "--target", str(site)]
    patience = ["--retries", str(RETRIES), "--timeout", str(SILENCE)]
    asked = [base.path, "-m", "pip", "install", *options, *patience, f"megatron-core=={version}"]
    code, said = commands.run(asked, half.parent, MOST_SECONDS)
    if code != 0:
        _explain(version, said)


def _explain(version: str, said: str) -> None:
    """Raise what pip's words mean."""
    needs = re.search(rf"[ ;]{re.escape(version)} Requires-Python ([^;\s]+)", said)
    needs = needs or re.search(r"requires a different Python: \S+ not in '([^']+)'", said)
    if needs:
        raise OtherPython(needs[1])
    if "(from versions: none)" in said:
        raise ValueError(f"megatron-core {version} is in no cache here, and the registry cannot be reached")
    if "No matching distribution" not in said:
        raise ValueError(f"megatron-core {version} cannot be installed: {_last(said)}")
    raise ValueError(f"megatron-core {version} was never released; releases near it: {_near(version, said)}")


def _near(version: str, said: str) -> str:
    """Some releases of which pip has told, nearest first."""
    told = re.search(r"\(from versions: ([^)]*)\)", said)
    released = [one for one in (told[1].split(", ") if told else []) if re.fullmatch(r"[\d.]+", one)]
    released += re.findall(r"[ ;](\d[\d.]*) Requires-Python", said)
    ranked = sorted({*released, version}, key=order)
    at = ranked.index(version)
    return ", ".join(one for one in ranked[max(0, at - 2) : at + 3] if one != version)


def _last(said: str) -> str:
    """The last line that says something, shortened."""
    lines: Iterable[str] = (line.strip() for line in reversed(said.splitlines()))
    return next((line for line in lines if line), "nothing said")[:200]
