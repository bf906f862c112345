"""`python -m fuzz show`: every field, what follows from the sizes, where ranks sit; without torch and without ranks."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fuzz import known
from fuzz.__main__ import main
from fuzz.case import Case, Rollout, Update
from fuzz.case_json import to_json
from fuzz.space import VALUES
from fuzz.strategies import all_layouts
from toy_models import coordinates, weights
from toy_models.batching import chunk_positions
from toy_models.coordinates import GROUPS, groups
from toy_models.spec import PPO, Batch, Layout, MoEModel

ROOT = Path(__file__).parent.parent
CASE = Case(
    layout=Layout(world=4, tp=2, ep=4),
    model=MoEModel(heads=2, kv_heads=2, experts=8),
    batch=Batch(rows=8, prompt=3, response=2, micro_rows=2),
    ppo=PPO(mini_batches=2, epochs=2),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "case.json").write_text(to_json(CASE))
    return tmp_path / "case.json"


def shown(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["show", str(path)]) == 0
    return capsys.readouterr().out


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_every_field_is_there(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that differ from their defaults have the default beside them."""
    found = rows(shown(path, capsys))
    assert ["layout", "world", "4", "1"] in found and ["experts", "8", "2"] in found
    assert ["ppo", "epochs", "2", "1"] in found and ["critic_lr", "0.1"] in found
    data = json.loads(to_json(CASE))
    names = {name for value in data.values() if isinstance(value, dict) for name in value} | {"twin", "seed", "program"}
    assert names <= {word for line in found for word in line[:2]}


def test_what_follows_from_the_sizes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """8 rows of 3 + 2 tokens padded to 6, two mini-batches, DP 2, micro-batches of two rows, two epochs."""
    assert main(["show", "--json", str(path)]) == 0
    [one] = json.loads(capsys.readouterr().out)
    assert one["derived"] == {
        "dp": 2,
        "edp": 1,
        "experts per rank": 2,
        "width": 6,
        "global batch": 48,
        "prompt tokens": 24,
        "response tokens": 16,
        "rows per mini-batch": 4,
        "micro-batches per rank": 1,
        "optimizer steps": 4,
    }
    assert one["ranks"][3] == {
        "rank": 3,
        "tp": 1,
        "cp": 0,
        "dp": 1,
        "pp": 0,
        "etp": 0,
        "ep": 3,
        "edp": 0,
        "layers": [[0]],
    }
    assert one["groups"]["tp"] == [[0, 1], [2, 3]] and one["groups"]["ep"] == [[0, 1, 2, 3]]
    assert one["case"] == json.loads(to_json(CASE)) and one["path"] == str(path) and one["known"] == []


def test_groups_as_a_person_reads_them(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(shown(path, capsys))
    assert ["tp", "2", "{0,1}", "{2,3}"] in found and ["dp", "2", "{0,2}", "{1,3}"] in found
    assert ["edp", "1", "every", "rank", "by", "itself"] in found
    assert ["3", "1", "0", "1", "0", "0", "3", "0", "0"] in found


def test_stages_as_a_person_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which layers each rank has, virtual stage by virtual stage; lists of numbers, and that there are none."""
    layout = Layout(world=4, pp=2, cp=2, vpp=2, split="list", stages=(2, 1, 0, 1))
    case = Case(layout=layout, model=MoEModel(layers=4, dense=(0, 3), dense_ffn=2), batch=Batch(rows=2))
    (tmp_path / "piped.json").write_text(to_json(case))
    found = rows(shown(tmp_path / "piped.json", capsys))
    assert ["1", "0", "1", "0", "0", "0", "0", "1", "0-1", "|", "none"] in found
    assert ["2", "0", "0", "0", "1", "0", "0", "0", "2", "|", "3"] in found
    assert ["stages", "2", "1", "0", "1", "none"] in found and ["dense", "0", "3", "none"] in found


def test_the_last_line_pastes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not broken by the width of the table, and evaluates to the case."""
    *_, last = shown(path, capsys).splitlines()
    names = {"Case": Case, "Layout": Layout, "MoEModel": MoEModel, "Batch": Batch, "PPO": PPO}
    assert eval(last.removeprefix("@example"), names) == CASE


def test_the_program_and_known_bugs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Operations by name; a case in the region of a known bug says so."""
    case = Case(layout=Layout(world=2, etp=2), batch=Batch(rows=2), program=(Rollout(), Update(), Rollout()))
    (tmp_path / "case.json").write_text(to_json(case))
    found = shown(tmp_path, capsys)
    assert "Rollout Update Rollout" in found
    assert ("expert-gradients-over-dense-dp" in found) == bool(known.met(case))


def test_a_folder_shows_all_and_names_what_is_none(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 for what is no case; the others are shown all the same."""
    (path.parent / "bad.json").write_text("[]")
    assert main(["show", str(path.parent)]) == 2
    out, said = capsys.readouterr()
    assert f"{path.parent}/bad.json: INVALID a case file must hold a JSON object, not list\n" == said
    assert out.count("@example") == 1


def test_it_imports_no_torch(path: Path) -> None:
    """A table must not take the seconds that torch takes."""
    code = "import sys; from fuzz.__main__ import main; main(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", code, "show", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "megatron", "transformers", "hypothesis"} & set(done.stdout.splitlines()[-1].split())


def test_defaults_are_dimmed_on_a_terminal(path: Path) -> None:
    """And what differs stands out."""
    environment = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "PATH": "/usr/bin"}
    command = [sys.executable, "-m", "fuzz", "show", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
    [dim] = [line for line in done.stdout.splitlines() if "critic_lr" in line]
    [bold] = [line for line in done.stdout.splitlines() if "kv_heads" in line and "@" not in line]
    assert "\x1b[2mcritic_lr" in dim.replace(" ", "") and "\x1b[1m" not in dim
    assert "\x1b[1mkv_heads" in bold.replace(" ", "") and "\x1b[2m" not in bold


# ---- coordinates -----------------------------------------------------------------------------------------------

PIPELINES = (
    Layout(world=16, tp=2, cp=2, pp=2, ep=2, etp=2),
    Layout(world=16, cp=2, pp=4, ep=4),
    Layout(world=12, tp=3, pp=2, ep=6),
)
PLAIN = [layout for world in (1, 2, 3, 4, 6, 8) for layout in all_layouts(world)] + list(PIPELINES)
LAYOUTS = [
    replace(layout, order=order)
    for order in VALUES["order"]
    for layout in PLAIN
    if order.endswith("-pp") or layout.pp == 1 or layout.dp == layout.edp
]
THEIRS = {"etp": "tp", "ep": "ep", "etp-ep": "tp-ep", "etp-ep-pp": "tp-ep-pp", "edp": "dp"}  # of the expert side


def test_groups_are_those_of_megatron() -> None:
    """megatron's own generator of ranks, for every kind of group of every layout of up to 8 ranks, in every order."""
    from megatron.core.parallel_state import RankGenerator

    for layout in LAYOUTS:
        dense = RankGenerator(layout.tp, 1, layout.dp, layout.pp, layout.cp, layout.order)
        expert = RankGenerator(layout.etp, layout.ep, layout.edp, layout.pp, 1, layout.order)
        for kind in GROUPS:
            made = expert.get_ranks(THEIRS[kind]) if kind in THEIRS else dense.get_ranks(kind)
            assert sorted(made) == sorted(groups(layout, kind)), (layout, kind)


@pytest.mark.parametrize(
    ("layout", "layers", "held"),
    [
        (Layout(world=2, pp=2), 4, [((0, 1),), ((2, 3),)]),
        (Layout(world=2, pp=2, vpp=2), 4, [((0,), (2,)), ((1,), (3,))]),
        (Layout(world=2, pp=2, split="ends", stages=(1, 3)), 4, [((0,),), ((1, 2, 3),)]),
        (Layout(world=2, pp=2, vpp=2, split="list", stages=(0, 2, 1, 0)), 3, [((), (2,)), ((0, 1), ())]),
        (Layout(world=4, pp=2, split="both", stages=(1, 1), order="pp-dp-ep-cp-tp"), 2, [((0,),), ((1,),)] * 2),
    ],
)
def test_stages_go_around_the_ranks(layout: Layout, layers: int, held: list) -> None:
    """Once per virtual stage; each layer is on one stage, and the ends hold embedding and head."""
    assert [coordinates.chunks(layout, layers, rank) for rank in range(layout.world)] == held
    for rank in range(layout.world):
        flat = tuple(layer for stage in held[rank] for layer in stage)
        assert coordinates.layers_on(layout, layers, rank) == flat
        place = coordinates.coordinates(layout, rank).pp
        assert (coordinates.is_first(layout, rank), coordinates.is_last(layout, rank)) == (place == 0, place == 1)


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_context_parallel_ranks_share_the_positions(cp: int) -> None:
    """Each position once: a chunk and its mirror, in order, which are equal work for all under a causal mask."""
    found = [chunk_positions(24, cp, rank) for rank in range(cp)]
    assert sorted(at for some in found for at in some) == list(range(24))
    assert len({(len(some), sum(some)) for some in found}) == 1
    assert all(some == sorted(some) for some in found)
    assert found[0] == {1: list(range(24)), 2: [*range(6), *range(18, 24)]}.get(cp, found[0])


def test_every_kind_of_group_is_a_partition() -> None:
    for layout in LAYOUTS:
        for kind in GROUPS:
            found = groups(layout, kind)
            assert sorted(rank for group in found for rank in group) == list(range(layout.world))
            assert len({len(group) for group in found}) == 1


def test_the_law_and_the_table_agree() -> None:
    """`ranks_sit_where_the_order_says` judges by the coordinates that are shown."""
    for layout in LAYOUTS:
        for rank in range(layout.world):
            assert weights.coordinates(layout, rank)._asdict() == coordinates.coordinates(layout, rank)._asdict()
