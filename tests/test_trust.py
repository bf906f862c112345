"""A case file comes from strangers: what is in it is a case or a clean ValueError; nothing blocks, runs or grows."""

import ast
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import case_files, forking, memory
from fuzz.__main__ import main
from fuzz.case import Case
from fuzz.case_files import Found, find
from fuzz.case_json import SCHEMA, from_json, to_json
from fuzz.strategies import cases
from fuzz.trial import Trials
from tests.mutations import mutant
from toy_models import weights
from toy_models.spec import MOST, PPO, Batch, Layout, MoEModel, Switches

ROOT = Path(__file__).parent.parent
KEPT = Path(__file__).parent / "data" / f"case_schema_{SCHEMA}.json"


# ---- ten thousand mutated files --------------------------------------------------------------------------------

FILES = 10_000
BYTES = (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\x00", b"\xef\xbb\xbf", b"\x1b[2J", b"\x80" * 99, b"9" * 5000)


def _spoiled(random: Random, text: str) -> bytes:
    """A text as bytes; one time in eight with bytes put into it that may be no text at all."""
    data = text.encode(errors="surrogatepass")
    if random.random() < 0.125:
        place = random.randrange(len(data) + 1)
        data = data[:place] + random.choice(BYTES) + data[place + random.randrange(3) :]
    return data


def _outcome(path: Path) -> str:
    try:
        case = Found(path).case()
    except ValueError as error:
        message = str(error)
        assert type(error) is ValueError, repr(error)
        assert len(message.splitlines()) == 1 and len(message) < 1000 and message.isprintable(), message
        return "refused"
    assert from_json(to_json(case)) == case
    assert memory.needed(case) <= memory.MOST
    return "loaded"


def test_ten_thousand_mutated_files_are_refused_or_valid() -> None:
    """Each a file on disk: a valid Case, or a ValueError of one short printable line, and nothing else."""
    outcomes, texts = Counter[str](), [to_json(Case()), KEPT.read_text()]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.json"

        @settings(max_examples=FILES, derandomize=True, database=None, deadline=None)
        @given(st.sampled_from(texts), st.randoms())
        def judge(text: str, random: Random) -> None:
            path.write_bytes(_spoiled(random, mutant(random, text)))
            outcomes[_outcome(path)] += 1

        judge()
    print(f"{outcomes.total()} mutated case files: {dict(outcomes)}")
    assert outcomes.total() == FILES
    assert min(outcomes["loaded"], outcomes["refused"]) > 300, outcomes


# ---- paths -----------------------------------------------------------------------------------------------------


def _wrong(path: Path) -> str:
    """Why a path means no case; it must be said at once, whatever lies there."""
    began = time.monotonic()
    [found] = find(path)
    with pytest.raises(ValueError) as caught:
        found.case()
    assert time.monotonic() - began < 1
    return str(caught.value)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "cannot be read: No such file or directory"),
    "FIFO": (_fifo, "it is a FIFO"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
    "a terabyte": (_sparse, "more than 100000 bytes"),
    "link to itself": (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
    "not UTF-8": (lambda path: path.write_bytes(b'{"schema": "\xff"}'), "its byte 12 is not UTF-8"),
    "empty folder": (Path.mkdir, "has no case file"),
}


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_is_refused_at_once(name: str, tmp_path: Path) -> None:
    """A FIFO would block whoever opens it, a device may do anything, a large file fills the memory."""
    make, said = NO_FILES[name]
    make(tmp_path / "case.json")
    assert said in _wrong(tmp_path / "case.json")


@pytest.mark.parametrize("name", ["FIFO", "device"])
def test_a_failure_folder_is_no_way_around(name: str, tmp_path: Path) -> None:
    """The names are right and what they name is not: a link in a folder is not followed, a FIFO not opened."""
    NO_FILES[name][0](tmp_path / "case.json")
    (tmp_path / "original.json").write_text(to_json(Case()))
    assert "is no case file: it is a" in _wrong(tmp_path)


def test_a_file_that_becomes_a_fifo_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the opening a name can change hands."""
    os.mkfifo(tmp_path / "case.json")
    regular = os.stat(__file__)
    monkeypatch.setattr(os, "stat", lambda *_, **__: regular)
    with pytest.raises(ValueError, match="it is a FIFO"):
        Found(tmp_path / "case.json").case()


def test_nothing_is_followed_out_of_a_folder(tmp_path: Path) -> None:
    """Of links to files, folders and the folder itself none is taken; what lies there is, in the order of names."""
    secret = tmp_path / "outside" / "deep"
    secret.mkdir(parents=True)
    (secret / "secret.json").write_text(to_json(Case()))
    folder = tmp_path / "given"
    (folder / "b").mkdir(parents=True)
    (folder / "link.json").symlink_to(secret / "secret.json")
    (folder / "folder").symlink_to(secret)
    (folder / "b" / "loop").symlink_to(folder)
    for name in ("b/2.json", "a.json", "c.json", "original.json", "report.md"):
        (folder / name).write_text(to_json(Case()))
    assert [str(one.path.relative_to(folder)) for one in find(folder)] == ["a.json", "b/2.json", "c.json"]


def test_of_a_failure_folder_the_case_alone_is_taken(tmp_path: Path) -> None:
    """In a folder of failures each counts once."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for file in ("case.json", "original.json", "other.json", "report.md"):
            (tmp_path / name / file).write_text(to_json(Case()))
    assert [found.path for found in find(tmp_path)] == [tmp_path / "one" / "case.json", tmp_path / "two" / "case.json"]
    assert [found.path for found in find(tmp_path / "two")] == [tmp_path / "two" / "case.json"]


@pytest.mark.parametrize(
    ("bound", "said"), [("FILES", "5 case files"), ("ENTRIES", "5 entries"), ("DEPTH", "5 levels")]
)
def test_a_folder_is_bounded(bound: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of a million files, or one nested for ever, is not read to its end."""
    monkeypatch.setattr(case_files, f"MOST_{bound}", 5)
    here = tmp_path
    for number in range(9):
        here = here / "below"
        here.mkdir()
        (tmp_path / f"{number}.json").write_text(to_json(Case()))
    assert f"more than {said}" in _wrong(tmp_path)


def test_a_name_may_hold_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is no text, breaks the line or speaks to the terminal is shown escaped, on one line."""
    name = os.fsdecode(b"a\xff\n\x1b[31mHOLDS.json")
    (tmp_path / name).write_text("{")
    assert main(["replay", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}/a\\udcff\\n\\x1b[31mHOLDS.json: INVALID") and len(out.splitlines()) == 1


# ---- memory ----------------------------------------------------------------------------------------------------


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(cases(max_ranks=8))
def test_what_is_drawn_stays_below_the_bound(case: Case) -> None:
    """A file that the fuzzer writes must load; and the weights that the bound counts are those there are.

    Half the bound was enough while most cases were copies; six stages of 16 experts and 40 rows ask for 4.3 of 8.6 GB.
    """
    sizes = [sum(_numbers(shape) for shape in weights.shapes(case.model, role).values()) for role in weights.ROLES]
    assert max(sizes) <= memory.weights(case.model) <= 1.5 * max(sizes)
    assert memory.needed(case) <= memory.MOST


def _numbers(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


ALL = MoEModel(hidden=256, heads=64, kv_heads=64, experts=64, top_k=64, ffn=256, norm_topk_prob=True)
EXTREMES = {
    "ranks": Case(layout=Layout(world=MOST["world"], ep=2), batch=Batch(rows=64)),
    "layers": Case(model=MoEModel(layers=MOST["layers"])),
    "experts": Case(model=MoEModel(experts=MOST["experts"], layers=8)),
    "tokens": Case(batch=Batch(rows=MOST["rows"], prompt=63, micro_rows=1)),
    "weights": Case(model=MoEModel(hidden=256, ffn=1024, experts=64)),
    "steps": Case(batch=Batch(rows=64), ppo=PPO(epochs=16, mini_batches=64), program=Case().program * 4),
    "weights on all ranks": Case(layout=Layout(world=64), model=MoEModel(hidden=512, ffn=512), batch=Batch(rows=64)),
    "everything": Case(layout=Layout(world=64), model=ALL, batch=Batch(rows=64, prompt=60)),
}
REFUSED = ("weights", "steps", "weights on all ranks", "everything")


@pytest.mark.parametrize("name", EXTREMES)
def test_no_file_asks_for_more_memory_than_a_laptop_has(name: str) -> None:
    """Valid sizes that together need too much are refused, with the sizes; whatever loads needs at most 8 GiB."""
    case = EXTREMES[name]
    print(f"{name}: at most {memory.shown(memory.needed(case))}")
    if name in REFUSED:
        with pytest.raises(ValueError, match=rf"{case.layout.world} ranks, .* may take \d.* at most 8.0 GiB may be"):
            from_json(to_json(case))
    else:
        assert memory.needed(from_json(to_json(case))) <= 8 * 2**30


LARGE = {
    "weights": Case(model=MoEModel(experts=16, hidden=64, ffn=128), batch=Batch(rows=2), ppo=PPO(optimizer="adam")),
    "tokens": Case(
        model=MoEModel(layers=2, experts=4, top_k=2, hidden=32, heads=4, kv_heads=4, head_dim=16, ffn=64),
        batch=Batch(rows=32, micro_rows=32, prompt=60, response=2),
    ),
    "vocabulary": Case(model=MoEModel(vocab=1024), batch=Batch(rows=8, micro_rows=8, prompt=120, response=2)),
    "names": Case(model=MoEModel(experts=128, layers=2)),
    "stages": Case(
        layout=Layout(world=2, pp=2, vpp=2),
        model=MoEModel(experts=16, hidden=64, ffn=64, layers=4, dense=(1,), dense_ffn=512),
        batch=Batch(rows=4),
        ppo=PPO(optimizer="adam"),
        switches=Switches(p2p="overlapped"),
    ),
    "context": Case(
        layout=Layout(world=2, cp=2),
        model=MoEModel(layers=2, experts=4, top_k=2, hidden=32, heads=4, kv_heads=1, head_dim=16, ffn=64),
        batch=Batch(rows=16, micro_rows=16, prompt=120, response=2),
    ),
}


@pytest.fixture
def trials() -> Iterator[Trials]:
    """Fresh processes: a peak never falls."""
    forking.warm_up()
    found = Trials()
    yield found
    found.close()


def _peaks() -> dict[int, int]:
    """pid -> the most memory that each process of ours has had, in bytes."""
    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
    lines = {p.pid: Path(f"/proc/{p.pid}/status").read_text().split("VmHWM:")[1].split()[0] for p in ours}
    return {pid: int(kib) * 1024 for pid, kib in lines.items()}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux' /proc")
@pytest.mark.parametrize("name", LARGE)
def test_the_bound_is_above_what_is_used(trials: Trials, name: str) -> None:
    """Large in one dimension: by what each process grows, in peak, is less than it is said to work with and observe."""
    case = LARGE[name]
    trials.judge(Case(layout=Layout(world=case.layout.world), batch=Batch(rows=case.layout.world)))
    before = _peaks()
    assert trials.judge(case).violation is None
    grown = {pid: peak - before[pid] for pid, peak in _peaks().items() if pid in before}
    bound = memory._working(case) + 4 * memory._observed(case)
    print(f"{name}: grew by {max(grown.values()) / memory.MIB:.0f} MiB of at most {bound / memory.MIB:.0f}")
    assert 8 * memory.MIB < max(grown.values()) < bound


# ---- what the source uses --------------------------------------------------------------------------------------

# Each runs code that is in its data, or may; a file from outside must never reach one.
MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "jsonpickle", "code")
CALLS = (
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "np.load",
    "numpy.load",
    "pandas.read_pickle",
    "os.system",
)
ALLOWED = {
    ("fuzz/rank.py", "pickle"): "calls and replies, in a folder of mode 700 that this run has made, read by its ranks",
    ("fuzz/ranks.py", "pickle"): "the parent's side of the same files",
    (
        "toy_models/planted/gradients.py",
        "__import__",
    ): "a module of megatron-core, by the name of what was imported from it",
    ("toy_models/planted/rewrite.py", "exec"): "compiles a function of the installed megatron-core, rewritten by us",
    ("toy_models/planted/rewrite.py", "compile"): "the same",
}


def _dangerous(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
            yield ast.unparse(node.func)


def test_nothing_that_runs_its_data_reads_a_file_from_outside() -> None:
    """The package unpickles what its own run has written, and nothing else; it evaluates nothing."""
    sources = [*(ROOT / "fuzz").rglob("*.py"), *(ROOT / "toy_models").rglob("*.py"), ROOT / "conftest.py"]
    used = {(str(path.relative_to(ROOT)), name) for path in sources for name in _dangerous(path)}
    assert used == set(ALLOWED)


def test_the_private_folder_is_private() -> None:
    """What is unpickled lies where no other user can write."""
    assert forking.home().stat().st_mode & 0o777 == 0o700
    assert forking.home().stat().st_uid == os.getuid()


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from yaml import load", "import torch\ntorch.load(p)", "eval(text)", "import marshal as m"],
)
def test_the_scan_sees_them(code: str, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(code)
    assert len(list(_dangerous(tmp_path / "x.py"))) == 1
