"""`python -m fuzz news`: a failure is new once, whatever the campaign; what an issue says; workflows."""

import re
import stat
from pathlib import Path

import pytest

from fuzz.__main__ import main
from fuzz.deep import news
from fuzz.deep.reading import read
from tests.test_map import REPORT, folder  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[1]


def test_a_failure_is_new_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    options = ["news", str(folder), "--seen", str(tmp_path / "kept" / "seen.json"), "--summary", str(tmp_path / "s.md")]
    assert main(options) == 1
    assert "new: gradients match the reference [*/grad], smallest at 2 ranks EP=2" in capsys.readouterr().out
    assert main(options) == 0
    assert capsys.readouterr().out == "0 new of 1 distinct failures\n"
    said = (tmp_path / "s.md").read_text()
    assert said.count("| **new** | gradients match") == 1 and said.count("| known | gradients match") == 1


def test_a_damaged_list_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    (tmp_path / "seen.json").write_text("[1")
    assert main(["news", str(folder), "--seen", str(tmp_path / "seen.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_issue_is_the_report_and_is_found_again(folder: Path) -> None:  # noqa: F811
    reading = read(folder)
    [one] = reading.distinct
    text = news.body(reading, one)
    assert text.startswith(REPORT) and news.marker(one) in text and len(text) < 65_536
    assert news.key(one) == news.key(read(folder).distinct[0])


@pytest.mark.parametrize("name", ["fuzz", "weekly-deep"])
def test_workflows_pin_what_they_use_and_call_one_script(name: str) -> None:
    text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text()
    used = re.findall(r"uses: (\S+)", text)
    assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", one) for one in used)
    scripts = re.findall(r"run: (\S+)", text)
    assert set(scripts) == {".ci/run" if name == "fuzz" else ".ci/deep"}
    assert all((ROOT / script).stat().st_mode & stat.S_IXUSR for script in scripts)
    assert "permissions:\n  contents: read\n" in text
