"""The import table of the architecture, as data: who may import whom, checked in the source of every module.

Imports inside functions count; those under TYPE_CHECKING may also take what the table lists for types. The standard
library is free for all.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("fuzz", "toy_models")


@dataclass(frozen=True)
class Row:
    """What a module may import: a name stands for itself, and `name.*` for what is below it too."""

    may: str = ""
    types: str = ""  # under TYPE_CHECKING only


LAWS = Row(
    "torch.* fuzz.broken fuzz.case fuzz.lockstep fuzz.tensors fuzz.laws.* toy_models.batching toy_models.coordinates "
    "toy_models.routing toy_models.spec toy_models.weights"
)
REFERENCE = Row(
    "torch.* transformers.* toy_models.batching toy_models.spec toy_models.families toy_models.weights "
    "toy_models.precision toy_models.reference_model toy_models.reference_modules toy_models.reference_rollout "
    "toy_models.reference_update "
    "toy_models.routing"
)
SYSTEM = Row(
    "torch.* torch.distributed.* megatron.core.* toy_models.spec toy_models.families toy_models.weights "
    "toy_models.batching toy_models.coordinates toy_models.megatron_names toy_models.megatron_config "
    "toy_models.sharded_optimizer toy_models.releases "
    "toy_models.megatron_modules toy_models.precision toy_models.megatron toy_models.passes toy_models.readings "
    "toy_models.sampling toy_models.experience toy_models.ppo toy_models.planted.*"
)
PARENT = Row(
    "torch.* hypothesis.* pytest rich.* fuzz.case fuzz.case_json fuzz.strategies fuzz.forking fuzz.ranks fuzz.laws.* "
    "fuzz.broken fuzz.broken_strategies fuzz.device fuzz.known_refusals fuzz.refusals fuzz.timebox "
    "fuzz.known fuzz.plants fuzz.rehearsal fuzz.rows fuzz.space fuzz.trial fuzz.summary fuzz.search toy_models.spec "
    "toy_models.weights fuzz.functions.*"
)
PROMISED = Row("torch.* fuzz.functions.*")
TABLE = {
    "conftest": PARENT,
    "fuzz": Row(),
    "fuzz.case": Row("toy_models.spec", types="torch fuzz.lockstep"),
    "fuzz.__main__": Row(
        "fuzz.device fuzz.known fuzz.plants fuzz.recall fuzz.replay fuzz.bisect fuzz.show fuzz.deep.options"
    ),
    "fuzz.bisect": Row("rich.* fuzz fuzz.case_files fuzz.commands fuzz.environments fuzz.replay"),
    "fuzz.environments": Row("psutil fuzz.commands"),
    "fuzz.plants": Row(),
    "fuzz.device": Row("torch"),
    "fuzz.rehearsal": Row("hypothesis.* fuzz.case fuzz.rows fuzz.strategies"),
    "fuzz.hunt": Row(
        "hypothesis.* fuzz.case fuzz.order fuzz.progress fuzz.rehearsal fuzz.rows fuzz.space fuzz.strategies "
        "fuzz.timebox fuzz.trial"
    ),
    "fuzz.recall": Row(
        "rich.* fuzz.case fuzz.known fuzz.plants fuzz.recalled fuzz.replay fuzz.hunt fuzz.trial", types="fuzz.rows"
    ),
    "fuzz.recalled": Row(
        "rich.* matplotlib.* fuzz.case fuzz.case_json fuzz.folders fuzz.plants fuzz.progress fuzz.space "
        "toy_models.spec",
        types="fuzz.hunt",
    ),
    "fuzz.case_files": Row("fuzz.case fuzz.case_json"),
    "fuzz.case_json": Row("fuzz.case fuzz.memory toy_models.spec"),
    "fuzz.memory": Row("fuzz.case toy_models.batching toy_models.spec"),
    "fuzz.cpu_platform": Row("torch.* megatron.core.*"),
    "fuzz.gpu_platform": Row("torch megatron.core.*"),
    "fuzz.wire": Row(),
    "fuzz.messages": Row("torch.*"),
    "fuzz.group": Row("torch.* torch.distributed.* fuzz.messages fuzz.wire"),
    "fuzz.drive": Row(
        "torch.* torch.distributed.* megatron.core.* fuzz.case fuzz.cpu_platform fuzz.gpu_platform fuzz.group "
        "fuzz.messages fuzz.plants "
        "fuzz.probe fuzz.pulse fuzz.recorder "
        "toy_models.spec toy_models.weights toy_models.precision toy_models.megatron toy_models.sampling "
        "toy_models.experience toy_models.ppo toy_models.releases"
    ),
    "fuzz.trace": Row(
        "torch.* fuzz.case fuzz.drive fuzz.probe toy_models.megatron toy_models.passes toy_models.sampling "
        "toy_models.experience toy_models.ppo toy_models.precision toy_models.taps toy_models.weights"
    ),
    "fuzz.truth_trace": Row("torch.* fuzz.case fuzz.truth toy_models.reference_trace"),
    "fuzz.modules": Row("toy_models.spec"),
    "fuzz.alignment": Row("torch.* fuzz.case fuzz.modules fuzz.laws.* toy_models.batching toy_models.coordinates"),
    "fuzz.differences": Row(
        "torch.* fuzz.case fuzz.alignment fuzz.modules fuzz.laws.* toy_models.coordinates toy_models.weights"
    ),
    "fuzz.divergence": Row("torch.* fuzz.case fuzz.alignment fuzz.differences fuzz.modules fuzz.laws.* fuzz.trial"),
    "fuzz.heatmap": Row("matplotlib.* numpy fuzz.differences fuzz.divergence"),
    "fuzz.forking": Row("fuzz.case"),
    "fuzz.broken": Row("fuzz.case fuzz.order"),
    "fuzz.breakages": Row("fuzz.broken fuzz.case fuzz.order toy_models.batching"),
    "fuzz.broken_strategies": Row("hypothesis.* fuzz.breakages fuzz.broken fuzz.case fuzz.choices fuzz.strategies"),
    "fuzz.refuse": Row(
        "torch.* megatron.core.* fuzz.broken fuzz.drive fuzz.pulse toy_models.batching toy_models.megatron "
        "toy_models.megatron_config toy_models.passes toy_models.releases"
    ),
    "fuzz.refusals": Row("fuzz.broken fuzz.case fuzz.known_refusals fuzz.laws.* fuzz.trial"),
    "fuzz.known_refusals": Row("fuzz.broken fuzz.case fuzz.known toy_models.spec"),
    "fuzz.known": Row(
        "fuzz.case fuzz.known_bug fuzz.known_layers fuzz.known_recomputation toy_models.coordinates toy_models.spec"
    ),
    "fuzz.known_bug": Row("fuzz.case"),
    "fuzz.known_layers": Row("fuzz.case fuzz.known_bug toy_models.spec"),
    "fuzz.known_recomputation": Row("fuzz.case fuzz.known_bug toy_models.coordinates toy_models.spec"),
    "fuzz.laws.*": LAWS,
    "fuzz.probe": Row("torch.* toy_models.megatron"),
    "fuzz.endings": Row("fuzz.case fuzz.pulse fuzz.rank fuzz.watch"),
    "fuzz.lockstep": Row(),
    "fuzz.pulse": Row(),
    "fuzz.rank": Row("torch.* fuzz.pulse fuzz.tensors"),
    "fuzz.tensors": Row("torch.*"),
    "fuzz.ranks": Row("fuzz.case fuzz.endings fuzz.forking fuzz.lockstep fuzz.pulse fuzz.rank fuzz.watch"),
    "fuzz.collectives": Row("torch.* torch.distributed.*"),
    "fuzz.recorder": Row("torch.* torch.distributed.* fuzz.collectives fuzz.lockstep fuzz.pulse"),
    "fuzz.watch": Row("psutil fuzz.lockstep fuzz.pulse"),
    "fuzz.replay": Row(
        "psutil rich.* fuzz.case fuzz.case_files fuzz.forking fuzz.known fuzz.laws fuzz.memory fuzz.trial"
    ),
    "fuzz.folders": Row("fuzz.case_files fuzz.case_json fuzz.timebox"),
    "fuzz.investigate": Row(
        "fuzz.case fuzz.device fuzz.divergence fuzz.folders fuzz.heatmap fuzz.known fuzz.neighbourhood fuzz.report "
        "fuzz.repro fuzz.timebox fuzz.trial"
    ),
    "fuzz.progress": Row("rich.* fuzz.case fuzz.timebox toy_models.spec"),
    "fuzz.report": Row("fuzz.case fuzz.laws"),
    "fuzz.commands": Row(),
    "fuzz.repro": Row("fuzz.case fuzz.commands toy_models.spec"),
    "fuzz.search": Row(
        "rich.* fuzz.case fuzz.folders fuzz.investigate fuzz.progress fuzz.report fuzz.timebox fuzz.trial"
    ),
    "fuzz.timebox": Row("fuzz.case fuzz.order fuzz.descent"),
    "fuzz.show": Row(
        "rich.* fuzz.case fuzz.case_files fuzz.case_json fuzz.known toy_models.batching toy_models.coordinates"
    ),
    "fuzz.space": Row("fuzz.case toy_models.spec"),
    "fuzz.order": Row("fuzz.case fuzz.space"),
    "fuzz.neighbours": Row("fuzz.case fuzz.order fuzz.space toy_models.coordinates toy_models.spec"),
    "fuzz.descent": Row("fuzz.case fuzz.neighbours fuzz.order fuzz.space toy_models.spec"),
    "fuzz.neighbourhood": Row("fuzz.case fuzz.neighbours fuzz.order"),
    "fuzz.choices": Row("hypothesis.*"),
    "fuzz.coverage": Row("fuzz.case fuzz.space toy_models.batching toy_models.spec"),
    "fuzz.meetings": Row("fuzz.coverage fuzz.space toy_models.spec"),
    "fuzz.rows": Row("fuzz.case fuzz.choices fuzz.coverage fuzz.meetings fuzz.space fuzz.strategies toy_models.spec"),
    "fuzz.draws": Row("fuzz.choices fuzz.space"),
    "fuzz.layout_strategies": Row("hypothesis.* fuzz.choices fuzz.draws fuzz.space toy_models.spec"),
    "fuzz.model_strategies": Row("fuzz.choices fuzz.draws toy_models.spec"),
    "fuzz.strategies": Row(
        "hypothesis.* fuzz.case fuzz.choices fuzz.draws fuzz.layout_strategies fuzz.model_strategies fuzz.space "
        "toy_models.spec"
    ),
    "fuzz.summary": Row(
        "rich.* fuzz.coverage fuzz.known fuzz.laws.* fuzz.meetings fuzz.refusals fuzz.space fuzz.trial "
        "fuzz.functions.families fuzz.functions.judge"
    ),
    "fuzz.functions": Row(),
    "fuzz.functions.call": Row("fuzz.case toy_models.coordinates toy_models.spec"),
    "fuzz.functions.called.*": Row("torch.* torch.distributed.* megatron.core.* fuzz.functions.*"),
    "fuzz.functions.inputs": Row("torch.* fuzz.functions.call"),
    "fuzz.functions.promise": Row("torch.* fuzz.functions.call fuzz.functions.inputs"),
    "fuzz.functions.judge": Row("torch.* fuzz.case fuzz.functions.* fuzz.laws.* fuzz.trial"),
    "fuzz.functions.known": Row("fuzz.case fuzz.known fuzz.functions.call toy_models.spec"),
    "fuzz.functions.run": Row("torch.* torch.distributed.* megatron.core.* fuzz.drive fuzz.refuse fuzz.functions.*"),
    "fuzz.functions.strategies": Row(
        "hypothesis.* fuzz.choices fuzz.functions.* toy_models.coordinates toy_models.spec"
    ),
    "fuzz.functions.*": PROMISED,
    "fuzz.deep": Row(),
    "fuzz.deep.schema": Row(),
    "fuzz.deep.campaign": Row("fuzz.deep.schema"),
    "fuzz.deep.discovery": Row("fuzz.case fuzz.case_json fuzz.coverage fuzz.known fuzz.space toy_models.spec"),
    "fuzz.deep.arms": Row("fuzz.space"),
    "fuzz.deep.ledger": Row("fuzz.deep.arms fuzz.deep.campaign"),
    "fuzz.deep.database": Row("hypothesis.* redis"),
    "fuzz.deep.reading": Row("fuzz.deep.schema"),
    "fuzz.deep.judging": Row(
        "fuzz.broken fuzz.case fuzz.folders fuzz.investigate fuzz.progress fuzz.refusals fuzz.summary fuzz.timebox "
        "fuzz.trial fuzz.functions.* fuzz.deep.campaign fuzz.deep.discovery fuzz.deep.ledger toy_models.spec"
    ),
    "fuzz.deep.shard": Row(
        "hypothesis.* fuzz.case fuzz.device fuzz.known fuzz.rehearsal fuzz.replay fuzz.rows fuzz.space fuzz.strategies "
        "fuzz.test_ep_ppo_props fuzz.timebox fuzz.trial fuzz.functions.* fuzz.deep.*"
    ),
    "fuzz.deep.options": Row("fuzz.known fuzz.plants fuzz.deep.driver fuzz.deep.status fuzz.deep.page fuzz.deep.news"),
    "fuzz.deep.driver": Row("rich.* fuzz.known fuzz.deep.*"),
    "fuzz.deep.status": Row("rich.* fuzz.deep.reading fuzz.deep.sums"),
    "fuzz.deep.page": Row("fuzz.case_json fuzz.deep.charts fuzz.deep.reading fuzz.deep.sums"),
    "fuzz.deep.charts": Row("matplotlib.* fuzz.space fuzz.deep.discovery fuzz.deep.reading fuzz.deep.sums"),
    "fuzz.deep.sums": Row("fuzz.meetings fuzz.space fuzz.deep.discovery fuzz.deep.reading"),
    "fuzz.deep.news": Row("fuzz.deep.reading fuzz.deep.sums"),
    "fuzz.deep.keeper": Row("psutil"),
    "fuzz.deep.bar": Row("rich.* fuzz.deep.reading"),
    "fuzz.deep.cluster": Row("ray.* fuzz.deep.ledger fuzz.deep.shard"),
    "fuzz.test_functions": PARENT,
    "fuzz.test_ep_ppo_props": PARENT,
    "fuzz.trial": Row("fuzz.broken fuzz.case fuzz.laws.* fuzz.ranks toy_models.batching toy_models.spec"),
    "fuzz.truth": Row("torch.* fuzz.case toy_models.reference"),
    "toy_models": Row(),
    "toy_models.attention": Row("torch.* megatron.core.* toy_models.batching"),
    "toy_models.families": Row("torch.* transformers.* toy_models.spec"),
    "toy_models.megatron": SYSTEM,
    "toy_models.megatron_config": Row(
        "torch.* megatron.core.* toy_models.families toy_models.releases toy_models.spec"
    ),
    "toy_models.megatron_modules": Row("torch.* torch.distributed.* megatron.core.* toy_models.attention"),
    "toy_models.planted.*": SYSTEM,
    "toy_models.sharded_optimizer": Row("torch.* megatron.core.*"),
    "toy_models.passes": SYSTEM,
    "toy_models.readings": SYSTEM,
    "toy_models.sampling": SYSTEM,
    "toy_models.experience": SYSTEM,
    "toy_models.ppo": SYSTEM,
    "toy_models.precision": Row("torch.*"),
    "toy_models.releases": Row("torch.* torch.distributed.* megatron.core.*"),
    "toy_models.reference": REFERENCE,
    "toy_models.reference_model": REFERENCE,
    "toy_models.reference_modules": REFERENCE,
    "toy_models.reference_rollout": REFERENCE,
    "toy_models.reference_update": REFERENCE,
    "toy_models.reference_packing": REFERENCE,
    "toy_models.reference_trace": Row(
        f"{REFERENCE.may} toy_models.reference toy_models.reference_packing toy_models.taps"
    ),
    "toy_models.routing": Row("torch.* toy_models.spec"),
    "toy_models.taps": Row("torch.*"),
    "toy_models.checks": Row(),
    "toy_models.layout": Row("toy_models.checks"),
    "toy_models.model": Row("toy_models.checks"),
    "toy_models.spec": Row("toy_models.checks toy_models.layout toy_models.model"),
    "toy_models.coordinates": Row("toy_models.spec"),
    "toy_models.batching": Row("toy_models.spec"),
    "toy_models.megatron_names": Row("torch.* toy_models.spec toy_models.weights"),
    "toy_models.weights": Row("toy_models.coordinates torch.* transformers.* toy_models.batching toy_models.spec"),
}
APART = ("torch.distributed",)  # not meant by `torch.*`: only who communicates may have it

# What runs where: these modules, with all that they import in turn, must never reach the others.
NEVER = {
    "fuzz.refuse": "hypothesis pytest rich toy_models.reference fuzz.strategies fuzz.laws fuzz.ranks",
    "fuzz.functions.run": "hypothesis pytest rich toy_models.reference fuzz.strategies fuzz.laws fuzz.ranks",
    "fuzz.functions.families": "hypothesis megatron transformers torch.distributed fuzz.ranks fuzz.drive",
    "fuzz.functions.judge": "hypothesis pytest megatron transformers fuzz.drive",
    "fuzz.drive": "hypothesis pytest rich toy_models.reference fuzz.strategies fuzz.laws fuzz.ranks",
    "fuzz.rank": "hypothesis pytest rich megatron fuzz.laws",
    "fuzz.trace": "hypothesis pytest rich toy_models.reference fuzz.strategies fuzz.laws fuzz.ranks",
    "fuzz.truth_trace": "hypothesis pytest rich megatron torch.distributed toy_models.ppo fuzz.laws fuzz.ranks",
    "fuzz.truth": "hypothesis pytest rich megatron torch.distributed toy_models.ppo toy_models.megatron fuzz.laws",
    "fuzz.strategies": "torch megatron transformers fuzz.ranks",
    "fuzz.meetings": "torch megatron transformers hypothesis",
    "fuzz.rows": "torch megatron transformers fuzz.ranks",
    "fuzz.case_json": "torch megatron transformers hypothesis",
    "fuzz.known": "torch megatron transformers hypothesis",
    "fuzz.show": "torch megatron transformers hypothesis",
    "fuzz.laws": "hypothesis megatron transformers fuzz.ranks fuzz.drive toy_models.ppo",
    "fuzz.ranks": "hypothesis megatron fuzz.laws fuzz.drive",
    "fuzz.deep.ledger": "torch megatron transformers hypothesis ray",
    "fuzz.trial": "hypothesis pytest megatron transformers fuzz.drive toy_models.reference",
}


# ---- reading the source ----------------------------------------------------------------------------------------


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """Every module of ours, by its dotted name."""
    found = [path for folder in OURS for path in (ROOT / folder).rglob("*.py")]
    return {_name(path): path for path in sorted([*found, ROOT / "conftest.py"])}


@cache
def imports(module: str) -> tuple[frozenset[str], frozenset[str]]:
    """The modules that a module imports, functions included: at run time, and under TYPE_CHECKING."""
    tree = ast.parse(modules()[module].read_text())
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and _is_type_checking(node.test)]
    hidden = {id(node) for block in blocks for part in block.body for node in ast.walk(part)}
    run = {name for node in ast.walk(tree) if id(node) not in hidden for name in _imported(node)}
    types = {name for block in blocks for part in block.body for node in ast.walk(part) for name in _imported(node)}
    return frozenset(map(_foreign, run)) - {""}, frozenset(map(_foreign, types)) - {""}


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _imported(node: ast.AST) -> Iterator[str]:
    """What one statement imports; `import torch` and then `torch.distributed.x` count as what they reach."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "relative imports hide from the table"
        yield from (_module(node.module, alias.name) for alias in node.names)
    elif isinstance(node, ast.Attribute) and ast.unparse(node) in APART:
        yield ast.unparse(node)


def _module(source: str, name: str) -> str:
    """`from source import name` imports a module of that name where there is one, else from `source`."""
    whole = f"{source}.{name}"
    return whole if whole in modules() or whole in APART else source


def _foreign(name: str) -> str:
    return "" if name.split(".")[0] in sys.stdlib_module_names else name


def _row(module: str) -> Row | None:
    covering = [module, *(f"{module.rsplit('.', n)[0]}.*" for n in range(module.count(".") + 1)), f"{module}.*"]
    return next((TABLE[name] for name in covering if name in TABLE), None)


def _allowed(name: str, listed: str) -> bool:
    for pattern in listed.split():
        base = pattern.removesuffix(".*")
        below = pattern.endswith(".*") and name.startswith(f"{base}.")
        apart = any(_within(name, other) and not _within(base, other) for other in APART)
        if (name == base or below) and not apart:
            return True
    return False


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def reached(module: str) -> dict[str, str]:
    """All that importing a module imports in turn, and by whom; packages' `__init__` files too."""
    found, waiting = {}, [module]
    while waiting:
        here = waiting.pop()
        packages = [here.rsplit(".", n)[0] for n in range(1, here.count(".") + 1)]
        for name in [*(imports(here)[0] if here in modules() else ()), *packages]:
            if name not in found:
                found[name] = here
                waiting.append(name)
    return found


# ---- the table -------------------------------------------------------------------------------------------------


def test_every_module_has_a_row() -> None:
    """A new module decides who it is before it imports anybody."""
    assert [module for module in modules() if _row(module) is None] == []


def test_every_row_has_a_module() -> None:
    """A row that nothing answers to is a rename that nobody noticed."""
    gone = [name for name in TABLE if not any(_within(module, name.removesuffix(".*")) for module in modules())]
    assert gone == []


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_what_its_row_allows(module: str) -> None:
    """The system knows nothing of the tester, the reference nothing of megatron, the laws nothing of processes."""
    row, (run, types) = _row(module) or Row(), imports(module)
    wrong = sorted(name for name in run if not _allowed(name, row.may))
    wrong += sorted(f"{name} (types)" for name in types if not _allowed(name, f"{row.may} {row.types}"))
    assert wrong == []


@pytest.mark.parametrize("module", NEVER)
def test_nothing_forbidden_is_reached_by_a_detour(module: str) -> None:
    """Ranks never import Hypothesis, the reference never reaches megatron, strategies cost no torch."""
    found = reached(module)
    wrong = {name: by for name, by in found.items() if any(_within(name, bad) for bad in NEVER[module].split())}
    assert wrong == {}


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("def f():\n    import megatron.core", "megatron.core"),
        ("from fuzz import ranks as r", "fuzz.ranks"),
        ("from fuzz.case import Case", "fuzz.case"),
        ("from torch import distributed", "torch.distributed"),
        ("import torch\ntorch.distributed.barrier()", "torch.distributed"),
    ],
)
def test_no_import_hides_from_the_table(source: str, seen: str) -> None:
    """Wherever and however a module is imported, the table sees it."""
    names = {name for node in ast.walk(ast.parse(source)) for name in _imported(node)}
    assert seen in names and not _allowed(seen, "torch.* toy_models.*")


# ---- what importing costs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [name for name, path in modules().items() if path.name == "__init__.py"])
def test_packages_hold_a_docstring_at_most(module: str) -> None:
    """Importing a part never imports the whole; fuzz.laws alone is a table of its modules."""
    body = ast.parse(modules()[module].read_text()).body
    text = [node for node in body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    assert module == "fuzz.laws" or (len(body) <= 1 and body == text)


def test_the_parts_of_a_case_cost_nothing() -> None:
    """`import toy_models.spec` takes the standard library and nothing else."""
    code = "import sys; old = set(sys.modules); import toy_models.spec; print(*sorted(set(sys.modules) - old))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = {name for name in done.stdout.split() if name.split(".")[0] not in sys.stdlib_module_names}
    assert loaded == {"toy_models", *(f"toy_models.{name}" for name in ("checks", "layout", "model", "spec"))}
