"""The folders of failures, `.fuzz/failures/<law>-<hash>/`: named by what failed, written while the search goes on.

A folder is named after the law, its cause and the smallest case, so that the same failure found twice is one folder; it
is renamed when a smaller case is found. Knows files; what stands in them is `fuzz.report`'s.
"""

import hashlib
import re
import shutil
from pathlib import Path

from fuzz.case_files import CASE, ORIGINAL
from fuzz.case_json import to_json
from fuzz.timebox import Failure

ROOT = Path(".fuzz") / "failures"


def name(failure: Failure) -> str:
    """The folder of a failure: the law in letters, and a short hash of law, cause and smallest case."""
    violation = failure.violation
    said = "\n".join((violation.law, violation.cause, to_json(violation.case)))
    digest = hashlib.blake2b(said.encode(), digest_size=4).hexdigest()
    return f"{re.sub(r'[^a-z0-9]+', '-', violation.law.lower()).strip('-')}-{digest}"


def write(file: Path, data: str | bytes) -> None:
    """Whole or not at all: a reader never sees half a file. OSError where it cannot be written."""
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_bytes(data.encode() if isinstance(data, str) else data)
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
        raise


class Folders:
    """Keeps the best of every failure of one test on disk. What cannot be written is said once, in `warnings`."""

    def __init__(self, root: Path) -> None:
        self.warnings: list[str] = []
        self._root = root
        self._of: dict[tuple[str, str], Path] = {}

    def keep(self, failure: Failure) -> Path:
        """Write the smallest case so far and the first failing one; the folder, whether it could be written or not."""
        folder = self._root / name(failure)
        try:
            self._move(failure.identity, folder)
            write(folder / CASE, to_json(failure.violation.case))
            if not (folder / ORIGINAL).exists():
                write(folder / ORIGINAL, to_json(failure.first))
        except OSError as error:
            self.warn(error)
        return folder

    def warn(self, error: OSError) -> None:
        """Remember, once, that the folders cannot be written."""
        said = f"cannot be written ({error.strerror}); reports are printed here instead, the run goes on"
        self.warnings = self.warnings or [f"WARNING: {self._root} {said}"]

    def _move(self, identity: tuple[str, str], folder: Path) -> None:
        before = self._of.get(identity)
        self._of[identity] = folder
        if before in (None, folder):
            folder.mkdir(parents=True, exist_ok=True)
        elif folder.exists():  # this very failure was found before, by another test or in another run
            shutil.rmtree(before)
        else:
            before.rename(folder)
