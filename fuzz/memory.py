"""How much memory a case may need at most, computed from its numbers before anything runs. Stdlib only.

A case file comes from strangers, and sizes that are each within bounds can still exhaust a laptop together. The factors
are twice what was measured on cases that are large in one dimension only (`tests/test_trust.py` measures again); all
ranks are taken to hold all weights and all tokens, as if nothing were sharded.
"""

from fuzz.case import Case, Rollout, Update
from toy_models.batching import padded_width
from toy_models.spec import MoEModel

KIB, MIB, GIB = 2**10, 2**20, 2**30
MOST = 8 * GIB  # that a case file may ask for: half a laptop of 16 GiB
BASE = 640 * MIB  # parent, fork server, keeper, reference and the libraries that all share; 500 measured
RANK = 96 * MIB  # of a rank by itself; 60 measured
NAME, SEEN = 64 * KIB, 2 * KIB  # of objects, per tensor of a model (31 measured) and per observed tensor (1 measured)
NUMBER = 8  # bytes; the reference is float64 whatever the case is


def weights(model: MoEModel) -> int:
    """Numbers in the weights of one role, token head and biases included."""
    heads, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    attention = ((2 + model.output_gate) * heads + 2 * keys) * model.hidden + 2 * heads + 2 * keys + 2 * model.head_dim
    attention += model.heads * (model.sinks == "learnable") + (heads + model.hidden) * model.biases
    up = 2 + model.gated
    moe = (model.experts * (up * model.ffn + 1) + up * model.shared_ffn + 1) * model.hidden
    moe += model.experts * (2 * model.ffn + model.hidden + 1) * model.biases
    mlps = len(model.moe) * moe + len(model.dense) * up * model.dense_ffn * (model.hidden + model.biases)
    return ((2 - model.tied) * model.vocab + 2) * model.hidden + model.layers * (attention + 2 * model.hidden) + mlps


def _names(model: MoEModel) -> int:
    return 3 + model.layers * (3 * (1 + model.biases) * model.experts + 24)


def _tokens(case: Case) -> int:
    return case.batch.rows * padded_width(case.layout, case.batch)


def _activations(case: Case) -> int:
    """Numbers per token in the forward and backward pass of one role."""
    model, width = case.model, padded_width(case.layout, case.batch)
    heads, copies = model.heads * model.head_dim, model.top_k * (model.hidden + model.ffn)
    layer = 24 * model.hidden + 16 * heads + 6 * model.heads * width + 12 * copies + 64 * model.experts
    return 64 + 24 * model.vocab + model.layers * (layer + 8 * max(model.shared_ffn, model.dense_ffn))


def _working(case: Case) -> int:
    """Bytes that one process works with: four models, of which two are trained, and the activations of one."""
    return NAME * _names(case.model) + NUMBER * (32 * weights(case.model) + _tokens(case) * _activations(case))


def _steps(case: Case) -> int:
    return sum(type(op) is Update for op in case.program) * case.ppo.epochs * case.ppo.mini_batches


def _observed(case: Case) -> int:
    """Bytes that one rank or the reference observes: outputs and routing of each iteration, weights of each step."""
    model, iterations, steps = case.model, sum(type(op) is Rollout for op in case.program), _steps(case)
    token = model.vocab + 16 + model.layers * ((4 + model.top_k) * model.hidden + 6 * model.experts)
    numbers = 8 * steps * weights(model) + iterations * _tokens(case) * token
    return NUMBER * numbers + SEEN * (steps * (8 * _names(model) + 2) + iterations * (20 + 12 * model.layers))


def needed(case: Case) -> int:
    """Bytes that running a case takes at most, over all processes.

    Observations lie in the rank, in its reply, and twice in the parent where the case has a twin; the reference is run
    up to six times where its movement is asked for, one after the other.
    """
    working, observed = _working(case), _observed(case)
    return BASE + case.layout.world * (RANK + working + 4 * observed) + 2 * working + 8 * observed


def check(case: Case) -> None:
    """ValueError where a case could need more memory than a case file may ask for."""
    if (asked := needed(case)) > MOST:
        sizes = (
            f"{case.layout.world} ranks, {weights(case.model)} weights, {_tokens(case)} tokens, {_steps(case)} steps"
        )
        raise ValueError(f"a case of {sizes} may take {shown(asked)} of memory; at most {shown(MOST)} may be")


def shown(size: int) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.1f} GiB"
