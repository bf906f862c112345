"""`python -m fuzz deep` as a user meets it: refusals in one line, to the end, resumed after SIGKILL, Redis.

What takes a Ray of its own is `slow`, except for one campaign with a planted bug.
"""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from hypothesis.database import GitHubArtifactDatabase, ReadOnlyDatabase

from fuzz.__main__ import main
from fuzz.case import Case, Violation
from fuzz.case_json import from_json
from fuzz.deep import database, reading, schema
from fuzz.deep.campaign import Campaign
from fuzz.deep.cluster import Needs
from fuzz.deep.options import seconds
from tests.test_ranks_end import gone

ROOT = Path(__file__).parents[1]
PLANT = "toy_models.planted.gradients:expert_gradients_scaled_twice"
FEW = ("--max-ranks", "2", "--chunk", "15", "--only", "property any_case 2", "--shrink-seconds", "4")
PATIENCE = 110.0  # seconds until something is to be seen


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line of a refusal."""
    try:
        code = main(["deep", *options])
    except SystemExit as ended:
        code = int(ended.code or 0)
    said = capsys.readouterr()
    assert code == 2 and not said.out
    [line] = said.err.splitlines()
    return line


def started(folder: Path, *options: str, budget: str = "30s") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fuzz", "deep", "--budget", budget, "--campaign", str(folder), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Whatever happens, the process ends; yields a list for the processes below it."""
    below = list[int]()
    try:
        yield below
    finally:
        process.kill()
        process.wait(20)


def wait_for_cases(folder: Path, number: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE
    while not (folder / schema.NAME).exists() or reading.glance(folder).cases < number:
        assert process.poll() is None and time.monotonic() < until, process.communicate(timeout=5)[0]
        time.sleep(0.1)


def below(process: subprocess.Popen[str]) -> list[int]:
    return [child.pid for child in psutil.Process(process.pid).children(recursive=True)]


# ---- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--budget", "soon"), "--budget: soon must be a time such as 90s, 45m, 6h or 1h30m"),
        (("--budget", "3s"), "--budget 3s is too small for one case"),
        (("--budget", "60s", "--shards", "0"), "--shards: 0 must be an integer, 1 or more"),
        (("--budget", "60s", "--gpus-per-rank", "nan"), "--gpus-per-rank: nan must be a number, 0 or more"),
        (("--budget", "60s", "--plant", "nope:no"), "--plant: nope:no must be MODULE:FUNCTION"),
        (("--budget", "60s", "--ray-address", "nowhere"), "--ray-address nowhere must be auto, host:port or ray://"),
        (("--budget", "60s", "--ray-address", "127.0.0.1:9"), "--ray-address 127.0.0.1:9: no cluster answers"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str
) -> None:
    assert said in refused(capsys, "--campaign", str(tmp_path / "c"), *options)


def test_times_are_read() -> None:
    assert [seconds(text) for text in ("90", "90s", "45m", "6h", "1h30m", "0.5h")] == [90, 90, 2700, 21600, 5400, 1800]


def test_a_second_driver_and_a_spent_budget_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fuzz.deep.campaign import Lock

    with closing(Campaign(tmp_path)) as campaign:
        campaign.begin(60.0, 1)
        campaign._db.execute("UPDATE sessions SET seconds=55")
        campaign._db.commit()
    with closing(Lock(tmp_path / "lock")):
        said = refused(capsys, "--campaign", str(tmp_path), "--budget", "10m")
        assert f"campaign {tmp_path} is being written by process {os.getpid()} on" in said
    said = refused(capsys, "--campaign", str(tmp_path), "--budget", "60s")
    assert f"--campaign {tmp_path} has spent 55s of its budget of 60s" in said


def test_a_folder_of_something_else_or_another_version_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(Campaign(tmp_path / "old")) as campaign:
        campaign.describe(version=99)
    said = refused(capsys, "--campaign", str(tmp_path / "old"), "--budget", "60s")
    assert f"{tmp_path / 'old'} is of version 99; this program has {schema.VERSION}" in said
    said = refused(capsys, "--campaign", str(tmp_path), "--budget", "60s")
    assert f"--campaign {tmp_path} has no campaign.db, but old" in said


def test_a_shard_asks_for_what_its_largest_layout_needs() -> None:
    assert Needs(max_ranks=1).bundle() == {"CPU": 0.5} and Needs(max_ranks=8).bundle() == {"CPU": 2.0}
    assert Needs(max_ranks=8, gpus_per_rank=0.5).bundle() == {"CPU": 2.0, "GPU": 4.0}
    assert Needs(max_ranks=4, gpus_per_rank=0.125).bundle()["GPU"] == 0.5
    assert Needs(max_ranks=8, gpus_per_rank=0.3).bundle()["GPU"] == 3, "a part of a GPU, or whole ones"


# ---- Redis, a real server --------------------------------------------------------------------------------------


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server on a socket of its own: its address and its process."""
    pytest.importorskip("redis", reason="the package redis is not installed")
    if not (program := shutil.which("redis-server")):
        pytest.skip("no redis-server here")
    socket = tmp_path / "redis.sock"
    options = ("--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(tmp_path))
    process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 10
    while not socket.exists() and time.monotonic() < until:
        time.sleep(0.02)
    yield f"unix://{socket}", process
    process.kill()
    process.wait(10)


def test_examples_are_shared_through_redis(redis: tuple[str, subprocess.Popen[bytes]], tmp_path: Path) -> None:
    said = list[str]()
    one, other = (database.opened(redis[0], tmp_path / name, said.append) for name in "ab")
    one.save(b"key", b"value")
    assert list(other.fetch(b"key")) == [b"value"] and not said
    other.delete(b"key", b"value")
    assert list(one.fetch(b"key")) == []


def test_where_redis_goes_down_the_local_folder_has_the_rest(
    redis: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    said = list[str]()
    examples = database.opened(redis[0], tmp_path / "a", said.append)
    examples.save(b"key", b"lost")
    redis[1].kill()
    redis[1].wait(10)
    examples.save(b"key", b"kept")
    assert list(examples.fetch(b"key")) == [b"kept"] == list(database.opened("", tmp_path / "a", print).fetch(b"key"))
    assert len(said) == 1 and "going on with the local folder" in said[0]
    database.shared(redis[0], tmp_path / "a", said.append).save(b"key", b"kept too")
    assert len(said) == 2 and "cannot be reached" in said[1]


def test_no_redis_at_the_start_is_refused_without_its_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("redis", reason="the package redis is not installed")
    options = ("--campaign", str(tmp_path / "c"), "--budget", "60s", "--database", "redis://:secret@127.0.0.1:9")
    said = refused(capsys, *options)
    assert "--database redis://127.0.0.1:9 cannot be reached" in said and "secret" not in said


# ---- what is saved ---------------------------------------------------------------------------------------------


class Judge:
    """Takes the cases of a search; those with EP above 1 are broken, unless others have them or they are mended."""

    def __init__(self, others: bool = False, mended: bool = False) -> None:
        self.met_others, self.mended, self.cases = others, mended, list[Case]()

    def case(self, case: Case) -> None:
        self.cases.append(case)
        if case.layout.ep > 1 and not (self.met_others or self.mended):
            raise Violation(case, "a law", "a witness", "", "", "")


def searched(name: str, seed: int, folder: Path, judge: Judge) -> None:
    from fuzz.deep import arms, shard
    from fuzz.deep.ledger import Chunk

    [arm] = [arm for arm in arms.arms(2) if arm.name == name]
    chunk = Chunk(number=1, arm=arm, start=0, seed=seed, size=30, left=60.0)
    [search] = shard.searches(chunk, database.opened("", folder, print))
    shard._searched(search, judge)  # type: ignore[arg-type]


def test_what_a_shard_found_is_tried_first_and_forgotten_when_it_passes(tmp_path: Path) -> None:
    searched("property any_case 2", 3, tmp_path, Judge())
    again = Judge()
    searched("saved any_case 2", 4, tmp_path, again)
    assert again.cases and again.cases[0].layout.ep == 2
    searched("saved any_case 2", 5, tmp_path, Judge(others=True))
    kept = Judge()
    searched("saved any_case 2", 6, tmp_path, kept)
    assert kept.cases[0].layout.ep == 2, "what another shard has claimed is not forgotten"
    before, mended = len(list(tmp_path.rglob("*"))), Judge(mended=True)
    searched("saved any_case 2", 7, tmp_path, mended)
    assert mended.cases and len(list(tmp_path.rglob("*"))) < before


def test_an_artifact_of_the_examples_is_read_back(tmp_path: Path) -> None:
    """As GitHub's upload makes it, and Hypothesis keeps it once it is loaded."""
    database.opened("", tmp_path / "db", print).save(b"key", b"value")
    (tmp_path / "cache").mkdir()
    name = datetime.now(UTC).isoformat().replace(":", "_")
    shutil.make_archive(str(tmp_path / "cache" / name), "zip", tmp_path / "db")
    artifact = GitHubArtifactDatabase("owner", "repository", path=tmp_path / "cache")
    assert list(ReadOnlyDatabase(artifact).fetch(b"key")) == [b"value"]


# ---- whole campaigns -------------------------------------------------------------------------------------------


def test_a_campaign_finds_shrinks_and_reports_once(tmp_path: Path) -> None:
    """Two shards meet one bug: one folder, with the smallest case and its report; a second driver is refused."""
    folder = tmp_path / "c"
    process = started(folder, *FEW, "--plant", PLANT, "--shards", "2", budget="25s")
    with ended(process):
        wait_for_cases(folder, 1, process)
        children = below(process)
        assert main(["deep", "--budget", "60s", "--campaign", str(folder)]) == 2
        said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, said
    seen = reading.read(folder)
    assert f"{len(seen.distinct)} distinct failure" in said and seen.faults == 0 and not seen.running
    assert seen.distinct[0].state == "found" and seen.distinct[0].cases >= 1
    report = folder / "failures" / seen.distinct[0].folder
    assert {"case.json", "original.json", "report.md"} <= {file.name for file in report.iterdir()}
    assert from_json((report / "case.json").read_text()).layout.ep == 2
    assert len(list((folder / "failures").iterdir())) == len(seen.distinct)
    assert gone(children, [])


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_and_its_campaign_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    process = started(folder, *FEW, budget="300s")
    with ended(process):
        wait_for_cases(folder, 5, process)
        children = below(process)
        finished = reading.glance(folder).cases
        process.send_signal(signal.SIGKILL)
    assert gone(children, [], seconds=20)
    before = reading.glance(folder)
    assert before.cases >= finished and not reading.read(folder).running
    process = started(folder, *FEW, budget=f"{before.seconds + 25:.0f}s")
    with ended(process):
        said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    after = reading.read(folder)
    assert after.kinds["case"] > before.cases and after.faults == 0
    assert [ending for *_, ending in after.sessions] == ["running", "done"]
    assert after.seconds <= before.seconds + 25 + 15


@pytest.mark.slow
def test_redis_that_goes_down_in_the_middle_ends_nothing(
    redis: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    process = started(folder, *FEW, "--plant", PLANT, "--database", redis[0], budget="35s")
    with ended(process):
        until = time.monotonic() + PATIENCE
        while not (folder / schema.NAME).exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        redis[1].kill()
        said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "going on with the local folder" in said, said
    seen = reading.read(folder)
    assert seen.faults == 0 and seen.distinct[0].state == "found"
    assert any(path.is_file() for path in (folder / "examples").rglob("*")), "what was found later is in the folder"


@pytest.mark.slow
def test_too_many_shards_are_told_what_is_free(tmp_path: Path) -> None:
    process = started(tmp_path / "c", "--shards", "500", budget="60s")
    with ended(process):
        said, _ = process.communicate(timeout=60)
    [line] = said.splitlines()
    assert process.returncode == 2
    assert "--shards 500 of --max-ranks 8 need CPU 2 each on one node" in line and "free are CPU" in line


@pytest.mark.slow
def test_ctrl_c_keeps_what_has_finished(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    process = started(folder, *FEW, budget="300s")
    with ended(process):
        wait_for_cases(folder, 3, process)
        children = below(process)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted: what has finished is kept" in said
    assert gone(children, [], seconds=20) and reading.read(folder).kinds["case"] >= 3
    with closing(sqlite3.connect(folder / schema.NAME)) as db:
        assert db.execute("SELECT ended FROM sessions").fetchall() == [("interrupted",)]


@pytest.mark.slow
def test_a_node_lost_costs_no_finished_case(tmp_path: Path) -> None:
    """Two nodes with a shard each; one is taken away, and there is no other: the other goes on, and ends in time."""
    from ray.cluster_utils import Cluster

    folder, room = tmp_path / "c", {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**room, "include_dashboard": False})
    try:
        node = cluster.add_node(**room)
        cluster.wait_for_nodes()
        process = started(folder, *FEW, "--max-ranks", "4", "--ray-address", cluster.address, budget="60s")
        with ended(process):
            wait_for_cases(folder, 8, process)
            finished = reading.glance(folder).cases
            cluster.remove_node(node, allow_graceful=False)
            said, _ = process.communicate(timeout=PATIENCE)
    finally:
        cluster.shutdown()
    assert process.returncode == 0 and "lost: shard" in said, said
    seen = reading.read(folder)
    assert seen.kinds["case"] > finished and seen.faults == 0 and seen.seconds < 60 + 30
    assert {ended_ for *_, ended_, _shard in seen.chunks} <= {"done", "lost"}
