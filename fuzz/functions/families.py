"""The families of functions, and what each function promises. Knows no megatron-core."""

from collections.abc import Mapping

from fuzz.functions import mappings
from fuzz.functions.promise import Promise

FAMILIES: Mapping[str, Mapping[str, Promise]] = {
    "mappings": mappings.PROMISES,
}


def promise_of(function: str) -> Promise:
    """What "family.name" promises."""
    family, _, name = function.partition(".")
    return FAMILIES[family][name]
