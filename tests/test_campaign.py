"""The campaign's folder: one writer, every finished case kept, damage mended, failures claimed once; the next chunk."""

import multiprocessing
import os
import signal
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from fuzz.case import Case, Violation
from fuzz.deep import arms, discovery, schema
from fuzz.deep.arms import Pull, choose
from fuzz.deep.campaign import DONE, EXHAUSTED, Campaign, Record
from fuzz.deep.ledger import Ledger, Plan
from fuzz.functions.families import FAMILIES
from toy_models.spec import Batch, Layout, MoEModel

PLAN = Plan(max_ranks=2, budget=60.0, shards=1, seed=7)


def record(cell: str = "1: ep1 etp1 tp1 cp1 pp1", **more: object) -> Record:
    return Record(seconds=0.5, kind="case", cell=cell, outcome="holds", **more)  # type: ignore[arg-type]


def filled(folder: Path, cases: int) -> None:
    with closing(Campaign(folder)) as campaign:
        campaign.begin(60.0, 1)
        chunk = campaign.chunk(0, "property any_case 2", 0, 1)
        for n in range(cases):
            campaign.record(chunk, record(new=(("pair", f"a & {n}"),), tally={"fired": {"law": 1}}, document="x" * 200))
        campaign.end(chunk, DONE)
        campaign.beat("done")


def counted(folder: Path) -> int:
    with closing(sqlite3.connect(folder / schema.NAME)) as db:
        return int(db.execute("SELECT count(*) FROM cases").fetchone()[0])


# ---- the folder ------------------------------------------------------------------------------------------------


def test_what_was_recorded_is_there_while_it_is_written(tmp_path: Path) -> None:
    with closing(Campaign(tmp_path / "c")) as campaign:
        campaign.begin(60.0, 2)
        chunk = campaign.chunk(0, "property any_case 2", 0, 1)
        new = (("pair", "a & b"), ("cell", "2: ep2"))
        assert campaign.record(chunk, record(new=new, tally={"fired": {"law": 1}})) == 2
        assert campaign.record(chunk, record(new=new, tally={"fired": {"law": 1}})) == 0
        assert counted(tmp_path / "c") == 2
        [(arm, start, seconds, worth, ended)] = campaign.pulls()
    assert (arm, start, worth, ended) == ("property any_case 2", 0, 11.0, "running") and seconds >= 0


def test_a_second_writer_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    with closing(Campaign(tmp_path)), pytest.raises(ValueError, match=rf"is being written by process {os.getpid()} on"):
        Campaign(tmp_path)
    Campaign(tmp_path).close()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"has no campaign\.db, but thesis\.tex"):
        Campaign(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        Campaign(tmp_path / "thesis.tex")


def test_a_campaign_of_another_version_is_refused(tmp_path: Path) -> None:
    with closing(Campaign(tmp_path)) as campaign:
        campaign.describe(version=99)
    with pytest.raises(ValueError, match=rf"is of version 99; this program has {schema.VERSION}"):
        Campaign(tmp_path)
    assert counted(tmp_path) == 0, "refused, and nothing changed"


def _writes_for_ever(folder: Path) -> None:
    campaign = Campaign(folder, patience=5.0)
    campaign.begin(60.0, 1)
    chunk = campaign.chunk(0, "property any_case 2", 0, 1)
    for n in range(10**9):
        campaign.record(chunk, record(new=(("pair", str(n)),)))
        campaign.beat()
        (folder / "finished").write_text(str(counted(folder)))


def test_ten_writers_killed_at_random_lose_no_finished_case(tmp_path: Path) -> None:
    folder, before = tmp_path / "c", 0
    for round in range(10):
        process = multiprocessing.get_context("fork").Process(target=_writes_for_ever, args=(folder,))
        process.start()
        process.join(0.15 + 0.03 * round)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        finished = int((folder / "finished").read_text() or before) if (folder / "finished").exists() else 0
        with closing(Campaign(folder)) as campaign:
            assert counted(folder) >= finished >= before and not campaign.warnings
            assert campaign.spent() > 0
        before = finished
    assert before > 100


@pytest.mark.parametrize("where", ["torn end", "middle", "head"])
def test_a_damaged_database_is_read_as_far_as_it_goes(tmp_path: Path, where: str) -> None:
    filled(tmp_path, 400)
    file = tmp_path / schema.NAME
    data = bytearray(file.read_bytes())
    if where == "torn end":
        data = data[: len(data) * 3 // 4]
    else:
        at = len(data) // 2 if where == "middle" else 0
        data[at : at + 4096] = b"\xff" * 4096
    file.write_bytes(data)
    with closing(Campaign(tmp_path)) as campaign:
        [warning] = campaign.warnings
        campaign.begin(60.0, 1)
        campaign.record(campaign.chunk(0, "a", 0, 1), record())
    kept = counted(tmp_path) - 1
    assert f"was damaged: {kept} cases" in warning and file.with_name("campaign.db.damaged1").exists()
    assert kept == 0 if where == "head" else 0 < kept <= 400
    assert not list(tmp_path.glob("*.part"))


# ---- resuming --------------------------------------------------------------------------------------------------


def test_a_campaign_goes_on_with_what_is_left_of_its_budget(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    with closing(sqlite3.connect(tmp_path / schema.NAME)) as db, db:
        db.execute("UPDATE sessions SET seconds=45")
    ledger = Ledger(tmp_path, PLAN)
    assert 14 < ledger.left() <= 15
    ledger.close("done")


def test_what_ran_when_the_driver_was_killed_is_done_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, PLAN)
    first = ledger.next(0)
    number, mine = ledger.claim("law", "tensor", 0, "1 rank", "")
    assert first and mine and first.arm.once
    ledger._campaign.close()
    ledger = Ledger(tmp_path, PLAN)
    again = ledger.next(1)
    assert again and again.arm.name == first.arm.name and again.seed == first.seed + 1
    assert ledger.claim("law", "tensor", 1, "1 rank", "") == (number, True)
    ledger.close("done")


def test_no_chunk_after_the_time_is_up(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, Plan(max_ranks=1, budget=0.0, shards=1))
    assert ledger.next(0) is None
    ledger.close("done")


# ---- failures --------------------------------------------------------------------------------------------------


def test_a_failure_is_claimed_once_and_again_when_its_shard_is_lost(tmp_path: Path) -> None:
    with closing(Campaign(tmp_path)) as campaign:
        assert campaign.claim("law", "a", 0, "", "") == (1, True)
        assert campaign.claim("law", "a", 1, "", "") == (1, False)
        assert campaign.claim("law", "a", 0, "", "") == (1, True), "it goes on shrinking its own"
        assert campaign.claim("law", "b", 1, "", "") == (2, True)
        campaign.lost(0)
        assert campaign.claim("law", "a", 1, "", "") == (1, True)
        campaign.found(1)
        assert campaign.claim("law", "a", 1, "", "") == (1, False), "it has its report"


def test_one_folder_for_each_distinct_failure(tmp_path: Path) -> None:
    with closing(Campaign(tmp_path)) as campaign:
        for tensor, name in (("a", "law-1"), ("b", "law-9")):
            number, _ = campaign.claim("law", tensor, 0, "", "")
            campaign.keep(number, name, {"case.json": b"{}"}, "4 ranks", "")
            campaign.keep(number, "law-1", {"report.md": b"#"}, "2 ranks", "wrong")
            campaign.found(number)
        assert [folder.name for folder in (tmp_path / "failures").iterdir() if folder.name != "law-9"] == ["law-1"]
        same = [row for row in sqlite3.connect(tmp_path / schema.NAME).execute("SELECT same FROM failures ORDER BY id")]
    assert same == [(None,), (1,)]


def test_failures_are_told_apart_by_law_and_tensor_not_by_place() -> None:
    def broken(witness: str) -> tuple[str, str]:
        return discovery.identity(Violation(Case(), "gradients match the reference", witness, "", "", ""))

    down = "0/0/actor/grad/model.layers.0.mlp.experts.0.gate_proj.weight"
    one = broken(f"rank 0, {down}, element [1, 4]")
    assert one == broken(f"rank 3, {down.replace('0', '1')}, element [0, 2]")
    assert one != broken("rank 0, 0/0/actor/grad/lm_head.weight, element [1, 4]")
    assert one[1] == "*/*/actor/grad/model.layers.*.mlp.experts.*.gate_proj.weight"


# ---- discovery and the next chunk ------------------------------------------------------------------------------


def test_what_a_case_meets() -> None:
    layout = Layout(world=4, tp=2, ep=2)
    case = Case(layout=layout, model=MoEModel(heads=2, kv_heads=2), batch=Batch(rows=2))
    new = Counter(kind for kind, _ in discovery.met(case, {"law": 3, "idle": 0}, {"starved": True}))
    assert new["cell"] == 1 and new["behaviour"] == 2 and new["pair"] > 1000 and new["triple"] > 500
    assert discovery.degrees(discovery.cell(layout)) == dict(world=4, ep=2, etp=1, tp=2, cp=1, pp=1)


def test_each_arm_is_tried_then_time_goes_where_something_new_appears() -> None:
    every = [arm for arm in arms.arms(2) if arm.kind == arms.PROPERTY]
    pulls = list[Pull]()
    for _ in range(200):
        arm, _start = choose(every, pulls) or pytest.fail("nothing to do")
        pulls.append(Pull(arm=arm.name, seconds=10.0, worth=50.0 if arm is every[2] and len(pulls) < 100 else 0.1))
    first = [pull.arm for pull in pulls[: len(every)]]
    assert first == [arm.name for arm in every]
    spent = Counter(pull.arm for pull in pulls[len(every) : 100])
    assert spent[every[2].name] > 45, spent
    later = Counter(pull.arm for pull in pulls[110:])
    assert min(later[arm.name] for arm in every) > 5, "what has run dry is not all that is tried"


def test_the_choice_is_a_function_of_the_log() -> None:
    every = arms.arms(4)
    pulls = [Pull(arm=arm.name, seconds=3.0 + n, worth=n % 7) for n, arm in enumerate(every)]
    assert {choose(every, pulls)[0].name for _ in range(5)} == {choose(every, list(pulls))[0].name}  # type: ignore[index]


def test_every_family_of_functions_has_its_chunks() -> None:
    assert set(arms.FAMILIES) == set(FAMILIES)


def test_rows_are_taken_in_slices_and_lost_ones_again() -> None:
    [arm] = [arm for arm in arms.arms(2) if arm.name == "rows every_layout 2"]
    pulls = [
        Pull(arm=arm.name, start=0),
        Pull(arm=arm.name, start=50, lost=True),
        Pull(arm=arm.name, start=100, last=True),
    ]
    assert choose([arm], pulls) == (arm, 50)
    assert choose([arm], [*pulls, Pull(arm=arm.name, start=50)]) is None


def test_a_lists_end_ends_its_arm(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, Plan(max_ranks=1, budget=60.0, shards=1, only=("rows every_layout",)))
    chunk = ledger.next(0)
    assert chunk is not None and chunk.arm.what == "every_layout"
    ledger.end(chunk.number, EXHAUSTED)
    assert ledger.next(0) is None
    ledger.close("done")
