"""`repro.py`: the script of a failure report, which needs torch and megatron-core and computes what it expects.

Put together from the parts in `fuzz/scripts/`, which read as one program: a line that ends in `#? WORD` stays where
the case needs that. Laws of dispatch, of model and gradients, and of the optimizer have such scripts; for the others,
and where a script does not show the bug, `whole_case` runs the case through this package and says so.
"""

import re
import sys
import tempfile
import textwrap
from dataclasses import fields
from pathlib import Path
from string import Template

from fuzz import commands
from fuzz.case import Case, short
from toy_models.spec import Layout

PARTS = Path(__file__).parent / "scripts"
TAG = re.compile(r"^(?P<code>.*?)\s*#\? (?P<word>\w+)$")
CUT = re.compile(r"cut\((\w+\[name\]), p, name\)")
WIDTH = 99  # columns of a script
MOST_LINES = 120
ENDS = "Run `python repro.py`; it exits 1 while the bug is there."
KINDS = {
    "dispatch": (
        "routing is valid",
        "send splits equal receive splits",
        "every copy is delivered once",
        "combine of dispatch is the sum of probabilities",
    ),
    "gradients": ("logits match the reference", "log-probs match the reference", "gradients match the reference"),
    "norm": ("gradient norm is that of the observed gradients", "gradient norm matches the reference"),
    "step": ("the optimizer does its formula",),
}
FILES = {
    "dispatch": ("common", "dispatch"),
    "gradients": ("common", "models", "gradients", "compare", "main"),
    "alone": ("alone", "compare", "alone_main"),
    "norm": ("common", "models", "norm", "main"),
    "step": ("common", "models", "step", "compare", "main"),
}
SAYS = {
    "dispatch": "Expected: every copy of a token arrives once at its expert and comes back once.",
    "gradients": "Expected: the losses and gradients of the same model on one rank.",
    "alone": "Expected: the losses and gradients of the same model in plain torch.",
    "norm": "Expected: the norm over all parameters of the model, each counted once.",
    "step": "Expected: the formula of the optimizer.",
    "": "A whole PPO step against one process; it needs ep-ppo-fuzz (pip install ep-ppo-fuzz).",
}


def kind(case: Case, law: str) -> str:
    """Which self-contained script a law has; empty where it needs the whole PPO step. On one rank a wrong gate shows
    in losses that plain torch computes.

    Routers other than the plain one, a shared expert without a gate, and other load losses, are in none. Context
    parallelism needs an attention of its own, and virtual or uneven stages a map of layers: more lines than a script
    has. The ledger of the dispatch reads who is whose peer off the default order.
    """
    found = next((kind for kind, laws in KINDS.items() if law in laws), "")
    model, layout = case.model, case.layout
    long = layout.cp > 1 or layout.vpp > 1 or layout.split != "even" or (layout.pp > 1 and model.tied)
    if not model.plain_router or model.family in ("glm4moe", "gptoss") or model.seq_aux_loss or model.global_aux_loss:
        return ""
    if found != "dispatch" and _trained_otherwise(case):
        return ""
    if not (model.plain_attention and model.plain_mlp) or case.switches.shared_overlap:
        return ""
    if layout.world == 1 and (found == "gradients" or law == "routing is valid"):
        return "alone"
    return "" if long or (found == "dispatch" and (layout.order != Layout().order or model.dense)) else found


def _trained_otherwise(case: Case) -> bool:
    """Whether gradients are reduced, recomputed or applied as no script knows it."""
    switches, ppo = case.switches, case.ppo
    reduced = switches.distributed or switches.overlap_reduce or switches.average or switches.per_token
    return reduced or switches.recompute != "none" or ppo.embedding_lr > 0 or ppo.coupled_decay or ppo.qk_decay


def script(case: Case, law: str, plants: tuple[str, ...] = (), sentence: str = "", seen_on: str = "") -> str:
    """The self-contained script of a law; `whole_case` where it has none of few lines. `plants`: module:function."""
    found = kind(case, law)
    if not found:
        return whole_case(case, law, plants, sentence, seen_on)
    text = "".join((PARTS / f"{part}.txt").read_text() for part in FILES[found])
    words = _words(case, found)
    body = Template(_kept(text, words)).substitute(_numbers(case, found))
    body = body if "cut" in words else CUT.sub(r"\1", body)
    for lines in (3, 2, 1):
        made = _head(law, found, sentence, seen_on, lines) + _with(body, plants)
        if made.count("\n") <= MOST_LINES:
            return made
    return whole_case(case, law, plants, sentence, seen_on)


def whole_case(case: Case, law: str, plants: tuple[str, ...] = (), sentence: str = "", seen_on: str = "") -> str:
    """A script that runs the case through this package and exits 1 while the law is broken."""
    text = (PARTS / "whole_case.txt").read_text()
    quoted = [f'"{plant}",' for plant in plants]
    listed = f"({''.join(quoted)})" if len(quoted) < 2 else "(\n    " + "\n    ".join(quoted) + "\n)"
    return _head(law, "", sentence, seen_on) + Template(text).substitute(case=_literal(case), law=law, plants=listed)


def check(path: Path, seconds: float) -> str:
    """Run a script as a user would: empty where it shows the bug, else what it did instead."""
    with tempfile.TemporaryDirectory() as folder:
        code, said = commands.run([sys.executable, str(path.resolve())], Path(folder), seconds)
    last = said.strip().splitlines()[-1:]
    return "" if code == 1 and "Traceback" not in said and "Error: " not in said else f"exit code {code}, {last}"


def _words(case: Case, found: str) -> set[str]:
    """What of the script this case needs."""
    layout, forward, optimizer = case.layout, found in ("dispatch", "gradients"), case.ppo.optimizer
    wanted = {
        "models": found != "dispatch",
        "forward": forward,
        "parallel_norm": forward and layout.tp > 1,
        "uneven": forward and layout.ep > 1 and layout.etp > 1,
        "cut": max(layout.tp, layout.etp) > 1,
        "pp": layout.pp > 1,
        "schedule": layout.pp > 1 or case.model.aux_loss > 0,
        "once": layout.pp == 1 and not case.model.aux_loss,
        "plain": layout.pp == 1 and not case.model.tied,
        "zeros": not forward or layout.pp > 1 or case.model.aux_loss > 0,
        "order": layout.order != Layout().order,
        "usual": layout.order == Layout().order,
        "moved": found != "dispatch" and layout.ep * layout.pp > 1,
        "unmoved": layout.ep * layout.pp == 1,
        "dense": bool(case.model.dense),
        "all_moe": not case.model.dense,
        "tied": case.model.tied,
        "untied": not case.model.tied,
        "aux": case.model.aux_loss > 0,
        "z": case.model.z_loss > 0,
        "balance": case.model.aux_loss + case.model.z_loss > 0,
        "shared": case.model.shared_ffn > 0,
        "uninitialized": not case.switches.perform_initialization and found != "dispatch",
        "optimizer": not forward,
        "step_adam": found == "step" and optimizer == "adam",
        "pre_softmax": not case.model.norm_topk_prob,
        "post_softmax": case.model.norm_topk_prob,
    }
    return {found, optimizer} | {word for word, needed in wanted.items() if needed}


def _kept(text: str, words: set[str]) -> str:
    """The lines without a mark, and those whose mark is wanted."""
    lines = [(line, TAG.match(line)) for line in text.splitlines()]
    kept = [found["code"] if found else line for line, found in lines if not found or found["word"] in words]
    return "\n".join(kept) + "\n"


def _numbers(case: Case, found: str) -> dict[str, object]:
    """What fills the script."""
    layout, model, batch, ppo = case.layout, case.model, case.batch, case.ppo
    return {
        **{name: getattr(layout, name) for name in ("world", "tp", "ep", "etp")},
        "layout": _layout(layout),
        "gpt": "gpt =" if found in ("dispatch", "gradients") and layout.tp > 1 else "return",
        **{name: getattr(model, name) for name in ("experts", "top_k", "layers", "hidden", "heads", "kv_heads")},
        **{name: getattr(model, name) for name in ("head_dim", "ffn", "shared_ffn", "vocab")},
        **{name: getattr(ppo, name) for name in ("lr", "weight_decay", "momentum", "eps", "max_norm", "optimizer")},
        "title": {"sgd": "SGD", "adam": "AdamW"}[ppo.optimizer],
        "dp": layout.dp,
        "order": layout.order,
        "dense_ffn": model.dense_ffn or model.ffn,
        "moe_freq": [int(layer in model.moe) for layer in range(model.layers)],
        "dense_layers": list(model.dense),
        "aux_loss": model.aux_loss,
        "z_loss": model.z_loss,
        "block": layout.ep * layout.etp,
        "share": batch.rows // layout.dp,
        "rows": batch.rows,
        "width": -(-(batch.prompt + batch.response) // layout.tp) * layout.tp,
        "pre_softmax": not model.norm_topk_prob,
        "dispatcher": case.switches.dispatcher,
        "expected": {
            "gradients": "losses and gradients of one rank",
            "alone": "losses and gradients",
            "norm": "the norm",
            "step": "the formula",
        }.get(found),
    }


def _layout(layout: Layout) -> str:
    """The degrees above 1 as lines; megatron-core takes ETP to be TP unless it is told."""
    names = {"tp": "tensor_model", "pp": "pipeline_model", "ep": "expert_model", "etp": "expert_tensor"}
    usual = {"tp": 1, "pp": 1, "ep": 1, "etp": layout.tp}
    told = [f'"{names[x]}_parallel_size": {getattr(layout, x)}' for x in names if getattr(layout, x) != usual[x]]
    pairs = [", ".join(told[at : at + 2]) for at in range(0, len(told), 2)] or [""]
    return "\n".join(f"LAYOUT {'|=' if at else '='} {{{pair}}}" for at, pair in enumerate(pairs))


def _head(law: str, found: str, sentence: str, seen_on: str, most: int = 3) -> str:
    """What the script is about, for who reads it first; the sentence in at most so many lines."""
    seen = f"Seen on {seen_on}. " if seen_on else ""
    lines = [f"The law: {law}.", "", *_wrapped(sentence, most), *_wrapped(f"{seen}{SAYS[found]} {ENDS}")]
    text = "\n".join(lines).replace("\\", "\\\\").replace('"""', "'''")
    return f'"""{text}\n"""\n\n'


def _wrapped(text: str, most: int = 3) -> list[str]:
    printable = "".join(c if c.isprintable() else " " for c in text)  # a NUL is no source
    return textwrap.wrap(" ".join(printable.split()), WIDTH, max_lines=most, break_on_hyphens=False)


def _with(body: str, plants: tuple[str, ...]) -> str:
    """The script with what is planted: imported, and called in each rank before process groups exist."""
    named = [plant.rsplit(":", 1) for plant in plants]
    imports = "".join(_import(module, name) for module, name in named)
    calls = "".join(f"    {name}()\n" for _, name in named)
    body = body.replace("\nWORLD, ", f"{imports}\nWORLD, ", 1)
    return body.replace("    dist.init_process_group(", f"{calls}    dist.init_process_group(", 1)


def _import(where: str, name: str) -> str:
    """Of a function that is planted; a file is found by its folder."""
    path = f'import sys\n\nsys.path.append("{Path(where).parent}")\n' if where.endswith(".py") else ""
    module = Path(where).stem if path else where
    return f"{path}from {module} import {name}  # planted on purpose\n"


def _literal(case: Case) -> str:
    """The case as an expression, one part to a line, in lines that fit."""
    changed = {f.name: getattr(case, f.name) for f in fields(case) if getattr(case, f.name) != f.default}
    parts = "".join(f"    {name}={_part(name, value)},\n" for name, value in changed.items())
    return f"Case(\n{parts})" if parts else "Case()"


def _part(name: str, value: object) -> str:
    text = short(value).replace("'", '"')
    if len(text) + len(name) + 6 <= WIDTH + 1:
        return text
    before, _, arguments = text.removesuffix(")").partition("(")
    inner = "".join(f"        {argument},\n" for argument in re.split(r", (?=\w+[=(])", arguments))
    return f"{before}(\n{inner}    )"
