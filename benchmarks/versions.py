"""Which findings live in which releases: `python benchmarks/versions.py [--python PATH] [--again NAME] [--seconds 100]`

Runs the scripts of docs/findings on each release as `python -m fuzz bisect` does; writes docs/findings/versions.json
and docs/versions.md. What is in the JSON already is not run again; after `--seconds` it stops, and goes on next time.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from fuzz.bisect import Asked, judged
from fuzz.environments import OtherPython, interpreter, place, python_of

FOLDER = Path(__file__).parents[1] / "docs" / "findings"
DATA, PAGE = FOLDER / "versions.json", FOLDER.parent / "versions.md"
VERSIONS = ("0.13.1", "0.14.0", "0.15.3", "0.16.1", "0.19.2")
SIGNS = {"VIOLATED": "**lives**", "HOLDS": "–", "INCONCLUSIVE": "?", "SKIPPED": ""}
HEAD = """# Findings by releases of megatron-core

Made by `python benchmarks/versions.py` from `docs/findings/versions.json`; each entry is a run of the finding's script
on that release. **lives**: the script shows the bug, or one of several; –: it does not; ?: the script cannot be run
there, since the release lacks a function or an argument, or asks for a CUDA device; empty: not run. Layouts are those
of the scripts; bugs that need none show on one rank. What no script shows (refusals, for one) stands on the pages.

"""
LAYOUTS = {  # the smallest one, as the scripts make it
    "all_reduce_of_a_copy": "TP=2",
    "biases_of_other_experts": "TP=2 EP=2 ETP=1, linear biases",
    "distributed_optimizer_in_one_config": "DP=2",
    "expert_biases_of_other_groups": "PP=2, groups handed in",
    "experts_before_tensors": "EP=2 ETP=2, EP before TP in the order",
    "experts_of_other_replicas": "TP=2 CP=2 ETP=2 EP=1, CP before TP in the order",
    "gates_of_other_heads": "TP=2, one query group",
    "interleaved_two_stages": "PP=2 VPP=2",
    "layout_of_another_pipeline": "PP=2, groups handed in, a pipeline layout",
    "norm_of_uninitialized_shards": "TP=2, perform_initialization=False",
    "per_token_loss_without_tokens": "DP=2",
    "sinks_left_out_of_the_norm": "TP=2, learnable softmax",
    "smoothing_over_a_share": "TP=2, label smoothing",
    "uneven_ends_of_two_stages": "PP=2 VPP=2, both ends given",
}


def page(data: dict[str, dict[str, str]]) -> str:
    """`docs/versions.md`."""
    rows = [("finding", "smallest layout", *VERSIONS), ("---",) * (2 + len(VERSIONS))]
    for name, seen in sorted(data.items()):
        title = name.replace("_", "-")
        signs = (SIGNS[seen.get(version, "SKIPPED")] for version in VERSIONS)
        rows.append((f"[{title}](findings/{title}.md)", LAYOUTS.get(name, "one rank"), *signs))
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write(data: dict[str, dict[str, str]]) -> None:
    DATA.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
    PAGE.write_text(page(data))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", action="append", default=[], help="another Python with torch, for 0.17 and later")
    parser.add_argument("--again", action="append", default=[], help="run this script again")
    parser.add_argument("--seconds", type=float, default=100.0)
    asked, began = parser.parse_args(), time.monotonic()
    data = json.loads(DATA.read_text()) if DATA.exists() else {}
    scripts = sorted(FOLDER.glob("*.py"))
    data = {script.stem: {} if script.stem in asked.again else data.get(script.stem, {}) for script in scripts}
    bases = [interpreter(path) for path in (sys.executable, *asked.python)]
    for script, version in ((script, version) for script in scripts for version in VERSIONS):
        if version in data[script.stem] or time.monotonic() - began > asked.seconds:
            continue
        for base in bases:
            try:
                found = judged(version, python_of(version, base, place()), Asked(case=script, seconds=60.0))
            except OtherPython:
                continue
            data[script.stem][version] = found.outcome
            print(f"{script.stem} {version}: {found.outcome} {found.why}", flush=True)
            write(data)
            break
    write(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
