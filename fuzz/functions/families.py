"""The families of functions, and what each function promises. Knows no megatron-core."""

from collections.abc import Mapping

from fuzz.functions import (
    activations,
    balance,
    clipping,
    dispatchers,
    entropy,
    helpers,
    mappings,
    permutation,
    routing,
    sequences,
    stages,
    state,
)
from fuzz.functions.promise import Promise

FAMILIES: Mapping[str, Mapping[str, Promise]] = {
    "mappings": mappings.PROMISES,
    "routing": routing.PROMISES,
    "permutation": {**permutation.PROMISES, **dispatchers.PROMISES},
    "balance": balance.PROMISES,
    "clipping": clipping.PROMISES,
    "entropy": entropy.PROMISES,
    "stages": stages.PROMISES,
    "helpers": {**helpers.PROMISES, **sequences.PROMISES, **activations.PROMISES},
    "state": state.PROMISES,
}


def promise_of(function: str) -> Promise:
    """What "family.name" promises."""
    family, _, name = function.partition(".")
    return FAMILIES[family][name]
