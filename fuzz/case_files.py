"""Case files on disk, which may come from a stranger: which ones a path means, and reading one within bounds.

Nothing blocks (no FIFO or device is opened), nothing is followed out of a folder, nothing is executed. Knows files and
`fuzz.case_json`; no ranks, no laws, no torch.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from fuzz.case import Case
from fuzz.case_json import MOST_CHARACTERS, from_json

MOST_FILES, MOST_ENTRIES, MOST_DEPTH = 10_000, 100_000, 16  # what a folder may hold, and how deep its folders nest
CASE, ORIGINAL = "case.json", "original.json"  # in a failure folder: the minimal case, the first failing one
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link, which is not followed",
}


@dataclass(frozen=True)
class Found:
    """A case file that a path means, or `why` the path means none."""

    path: Path
    why: str = ""
    inside: bool = False  # found in a folder: it must not be a link

    @property
    def is_known_failure(self) -> bool:
        """Whether it lies in the folder of a failure, beside the first failing case."""
        return os.path.lexists(self.path.parent / ORIGINAL)

    def case(self) -> Case:
        """The case in the file; ValueError, in one line without the path, where there is none."""
        if self.why:
            raise ValueError(self.why)
        return from_json(_text(self.path, os.O_NOFOLLOW if self.inside else 0))


def find(path: Path) -> list[Found]:
    """The case files that a file or folder means, in the order of their paths; never none."""
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            return [Found(path)]
        if _is_failure(path):
            return [Found(path / CASE, inside=True)]
        found = sorted(_walk(path), key=lambda one: one.path)
    except (OSError, ValueError) as error:
        return [Found(path, why=_reason(error))]
    empty = f"has no case file: no *.json that is not {ORIGINAL}, in it or below it"
    return found or [Found(path, why=empty)]


def _is_failure(folder: Path) -> bool:
    return os.path.lexists(folder / CASE) and os.path.lexists(folder / ORIGINAL)


def _walk(folder: Path) -> Iterator[Found]:
    """The case files below a folder, in no order; links are passed over. ValueError where there are too many."""
    waiting, entries, files = [(folder, 0)], 0, 0
    while waiting:
        here, depth = waiting.pop()
        inside, why = _entries(here)
        if why:
            yield Found(here, why)
        case_files = [entry for entry in inside if _is_case_file(entry)]
        yield from (Found(here / entry.name, inside=True) for entry in case_files)
        waiting += [(here / entry.name, depth + 1) for entry in inside if entry.is_dir(follow_symlinks=False)]
        entries, files = entries + len(inside), files + len(case_files)
        _check_bounds(entries, files, depth)


def _is_case_file(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith(".json") and entry.name != ORIGINAL and entry.is_file(follow_symlinks=False)


def _entries(folder: Path) -> tuple[list[os.DirEntry[str]], str]:
    """What is in a folder (of a failure's folder its case alone), or why that cannot be said."""
    try:
        with os.scandir(folder) as entries:
            found = list(islice(entries, MOST_ENTRIES + 1))
    except OSError as error:
        return [], _reason(error)
    return [entry for entry in found if entry.name == CASE or not _is_failure(folder)], ""


def _check_bounds(entries: int, files: int, depth: int) -> None:
    found = {"case files": (files, MOST_FILES), "entries": (entries, MOST_ENTRIES), "levels": (depth, MOST_DEPTH)}
    for name, (number, most) in found.items():
        if number > most:
            raise ValueError(f"is a folder with more than {most} {name}; name what is meant in it")


def _text(path: Path, flags: int) -> str:
    try:
        return _bytes(path, flags).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"is no case file: its byte {error.start} is not UTF-8") from None
    except OSError as error:
        raise ValueError(_reason(error)) from None


def _bytes(path: Path, flags: int) -> bytes:
    # Looked at before it is opened, since opening a device may already do something; and again after, since what has
    # the name may have changed. O_NONBLOCK: a FIFO that slips in between must not block.
    _check_regular(os.stat(path, follow_symlinks=not flags))
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | flags), "rb") as file:
        _check_regular(os.fstat(file.fileno()))
        data = file.read(MOST_CHARACTERS + 1) or b""
    if len(data) > MOST_CHARACTERS:
        raise ValueError(f"is no case file: it has more than {MOST_CHARACTERS} bytes")
    return data


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"is no case file: it is {KINDS.get(stat.S_IFMT(found.st_mode), 'no regular file')}")


def _reason(error: OSError | ValueError) -> str:
    return f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
