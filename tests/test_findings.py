"""The scripts in `docs/findings/`: each shows its bug on the installed megatron-core, with nothing of this package."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "docs" / "findings").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_shows_its_bug(script: Path, tmp_path: Path) -> None:
    asked = [sys.executable, str(script)]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.strip(), "it says nothing"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_needs_nothing_of_ours_and_has_a_page(script: Path) -> None:
    text = script.read_text()
    assert "import fuzz" not in text and "from fuzz" not in text and "toy_models" not in text
    assert script.with_name(f"{script.stem.replace('_', '-')}.md").exists()
