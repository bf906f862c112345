"""`status` and `map`: what is said of a campaign, and its page in a real headless Chromium, driven by WebDriver."""

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fuzz.__main__ import main
from fuzz.deep import schema, status
from fuzz.deep.campaign import DONE, Campaign, Record
from fuzz.deep.charts import name_of
from fuzz.deep.discovery import cell
from fuzz.deep.reading import read
from fuzz.space import all_layouts
from toy_models.spec import Layout

BROKEN = cell(Layout(world=2, ep=2))
REPORT = "# violated: <script>window.broken = 1</script> (EP=2 on 2 ranks)"
ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
TALLY = {"fired": {"every_rank_finishes": 1, "idle": 0}, "vacuous": {"every_rank_finishes": 0, "idle": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign with all layouts of two ranks but one, and a failure at EP=2."""
    where = tmp_path_factory.mktemp("campaigns") / "a & b"
    with closing(Campaign(where)) as campaign:
        campaign.describe(max_ranks=2, budget=60, shards=1, seed=0, environment={"machine": "a <b>"})
        campaign.begin(60.0, 1)
        chunk = campaign.chunk(0, "property any_case 2", 0, 1)
        number, _ = campaign.claim("gradients match the reference", "*/grad", 0, "2 ranks EP=2", "differs by 1 < 2")
        campaign.keep(number, "gradients-1234", {"report.md": REPORT.encode(), "case.json": b"{}"}, "2 ranks EP=2", "x")
        for here in map(cell, all_layouts(2)[:-1]):
            how = {"outcome": "violated", "failure": number} if here == BROKEN else {"outcome": "holds"}
            told: dict[str, Any] = {"kind": "case", "cell": here, "seconds": 1.0, "new": (("cell", here),), **how}
            campaign.record(chunk, Record(**told, tally=TALLY))
        campaign.end(chunk, DONE)
        campaign.found(number)
        campaign.note("lost", "shard 0: its process has ended")
        campaign.beat("done")
    return where


# ---- status ----------------------------------------------------------------------------------------------------


def test_status_says_it_once_where_nobody_looks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(folder)]) == 1
    said = capsys.readouterr().out
    for words in (
        "1 distinct failure",
        "9 of 10 at 2",
        "1 fired, 1 vacuous: idle",
        "2 ranks EP=2",
        "shard 0: its proc",
    ):
        assert words in said
    assert "8 holds, 1 violated" in said


def test_status_lives_while_the_campaign_runs(folder: Path, tmp_path: Path) -> None:
    where = tmp_path / "c"
    shutil.copytree(folder, where)
    campaign = Campaign(where)
    assert read(where).running
    with closing(sqlite3.connect(where / schema.NAME)) as db, db:
        db.execute("DELETE FROM notes")
    threading.Timer(1.5, _said_and_closed, (where, campaign)).start()
    with open(tmp_path / "said", "w") as said:
        assert status.run(where, Console(force_terminal=True, file=said, width=100)) == 1
    assert not read(where).running
    text = (tmp_path / "said").read_text()
    assert "1, running" in text and "1, none running" in text and "the last words" in text


def _said_and_closed(where: Path, campaign: Campaign) -> None:
    with closing(sqlite3.connect(where / schema.NAME)) as db, db:
        db.execute("INSERT INTO notes VALUES (NULL, 1.0, 'note', 'the last words')")
    campaign._lock.close()


@pytest.mark.parametrize("command", ["status", "map"])
def test_what_is_no_campaign_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"python -m fuzz: {tmp_path} is no campaign: it has no campaign.db\n"
    (tmp_path / "campaign.db").write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    assert main([command, str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


# ---- the page --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    assert main(["map", str(folder)]) == 0
    return folder / "report.html"


def test_the_page_needs_nothing_else(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', text) and "@import" not in text and "url(http" not in text
    assert "<script>window.broken" not in text and "a <b>" not in text and "<b>" not in text
    names = {file.name for file in page.parent.glob("*.png")}
    assert names == {"map-1.png", "map-2.png", "discovery.png", "laws.png", "time.png"}
    assert all((page.parent / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_every_layout_has_its_cell(page: Path) -> None:
    ids = set(re.findall(r'id="(cell-[^"]+)"', page.read_text()))
    assert ids == {name_of(cell(one)) for world in (1, 2) for one in all_layouts(world)}


class Browser:
    """A session of Chromium, by the few words of WebDriver that are needed."""

    def __init__(self, driver: str, browser: str, port: int) -> None:
        self._process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, start_new_session=True)
        self._url = f"http://127.0.0.1:{port}"
        options = {"binary": browser, "args": ARGUMENTS}
        asked = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            self._wait()
            self._url += "/session/" + self.ask("/session", capabilities={"alwaysMatch": asked})["sessionId"]
        except BaseException:
            self._ended()
            raise

    def _wait(self) -> None:
        until = time.monotonic() + 20
        while True:
            try:
                urllib.request.urlopen(f"{self._url}/status", timeout=5).close()
                return
            except OSError:
                assert time.monotonic() < until, "chromedriver does not answer"
                time.sleep(0.05)

    def ask(self, command: str, **body: Any) -> Any:
        request = urllib.request.Request(f"{self._url}{command}", json.dumps(body).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=40) as answer:
            return json.loads(answer.read())["value"]

    def run(self, script: str) -> Any:
        return self.ask("/execute/sync", script=script, args=[])

    def click(self, selector: str) -> None:
        [element] = self.ask("/element", using="css selector", value=selector).values()
        self.ask(f"/element/{element}/click")

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.ask("/se/log", type="browser") if entry["level"] != "INFO"]

    def close(self) -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(self._url, method="DELETE"), timeout=20).close()
        finally:
            self._ended()

    def _ended(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)


def _free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if not (driver and chromium):
        pytest.skip("no chromium and chromedriver here")
    with closing(Browser(driver, chromium, _free_port())) as opened:
        yield opened


def test_in_a_browser_the_failing_cell_leads_to_its_report(page: Path, browser: Browser) -> None:
    browser.ask("/url", url=page.as_uri())
    assert browser.errors() == []
    assert browser.run("return document.querySelector('.verdict').textContent") == "1 distinct failure"
    assert "1 cases, 1 violated" in browser.run(
        f"return document.getElementById('{name_of(BROKEN)}').getAttribute('aria-label')"
    )
    assert browser.run("return document.querySelectorAll('svg a').length") >= 1
    browser.click(f"#{name_of(BROKEN)} a")
    assert browser.run("return location.hash") == "#failure-1"
    assert browser.run("return document.querySelector('#failure-1 details').open") is True
    assert browser.run("return document.querySelector('#failure-1 pre').textContent") == REPORT
    assert browser.run("return window.broken") is None
    browser.click("#failure-1 a.report")
    assert browser.run("return location.pathname").endswith("/failures/gradients-1234/report.md")
    assert browser.run("return document.body.textContent") == REPORT
    assert browser.errors() == []
