"""Which words of two or three dimensions can meet in one case, and in how small a world; no case is made to find out.

A rule says which words of its dimensions go together; words meet where all rules can be kept at once. The rules follow
`toy_models.spec`: they know nothing of how cases are drawn.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import SimpleNamespace

from fuzz.coverage import AIMED, ALL, DIMENSIONS, LAYOUT, Meeting, power_of_two, said, words
from fuzz.space import all_layouts, worlds
from toy_models.spec import NORMALISED, SHARED

Rule = tuple[tuple[str, ...], Callable[..., bool]]

MISSING = ("stage without experts", "last without experts")


def _empty_stage(empty: str, split: str, contents: str) -> bool:
    """Embedding and loss can count as the only layer of their stage; a list can leave out any."""
    if empty == "no":
        return True
    if split in ("loss", "both"):
        return contents == "last without experts"
    return split in ("embedding", "list") and contents in MISSING


def _two_stages(pp: str, vpp: str, empty: str, split: str, contents: str) -> bool:
    """Where one of two stages is empty, the other holds all layers."""
    if (pp, vpp, empty) != ("2", "1", "yes"):
        return True
    return split != "both" and (split, contents) != ("embedding", "last without experts")


def _no_dense(family: str, empty: str, split: str, contents: str) -> bool:
    """Mixtral has no dense layers: a stage without experts is an empty one."""
    if family not in NORMALISED or contents == "experts":
        return True
    return empty == "yes" and (split, contents) != ("embedding", "last without experts")


def _number(number: str, against: str, pp: str) -> bool:
    """As many micro-batches as stages, or fewer: 3 of 4 are no power of two, and below none is."""
    if against == "as many":
        return (number == "power of two") == power_of_two(int(pp))
    return against == "more" or number == "power of two" or int(pp) > 3


def _one_each(local: str, experts: str, ep: str) -> bool:
    """With one expert on each rank there are as many as ranks that share them."""
    return local == "several" or (experts == "power of two") == power_of_two(int(ep))


RULES: tuple[Rule, ...] = (
    (("vpp", "pp"), lambda vpp, pp: vpp == "1" or pp != "1"),
    (("split", "pp"), lambda split, pp: split == "even" or pp != "1"),
    (("contents", "pp"), lambda contents, pp: contents not in MISSING or pp != "1"),
    (("empty stage", "split", "contents"), _empty_stage),
    (("pp", "vpp", "empty stage", "split", "contents"), _two_stages),
    (("family", "empty stage", "split", "contents"), _no_dense),
    (("family", "top-k"), lambda family, top_k: family not in NORMALISED or top_k != "1"),
    (("family", "gates"), lambda family, gates: family not in NORMALISED or gates == "normalised"),
    (("score", "gates", "top-k"), lambda score, gates, k: score == "softmax" or (gates == "plain") == (k == "1")),
    (("expert bias", "score"), lambda bias, score: bias == "off" or score == "sigmoid"),
    (("bias rate", "expert bias"), lambda rate, bias: rate == "off" or bias == "on"),
    (("gates", "top-k"), lambda gates, top_k: gates == "plain" or top_k != "1"),
    (("query groups", "tp"), lambda groups, tp: groups == "many" or tp != "1"),
    (("experts", "ep"), lambda experts, ep: experts == "other" or power_of_two(int(ep))),
    (("path", "dispatcher"), lambda path, dispatcher: path.startswith(f"{dispatcher} ")),
    (("path", "experts cut"), lambda path, cut: path.endswith(f" {cut}")),
    (("local experts", "ep"), lambda local, ep: local == "several" or ep != "1"),
    (("local experts", "experts", "ep"), _one_each),
    (("local experts", "top-k", "ep"), lambda local, top_k, ep: (local, top_k, ep) != ("one", "some", "2")),
    (("response", "raggedness"), lambda response, raggedness: response != "1" or raggedness == "equal"),
    (("response", "holes"), lambda response, holes: response != "1" or holes == "off"),
    (("micro-batches to pp", "pp"), lambda against, pp: against != "fewer" or pp != "1"),
    (("micro-batches to pp", "vpp"), lambda against, vpp: against != "fewer" or vpp == "1"),
    (("micro-batches", "micro-batches to pp", "pp"), _number),
    (("group", "vpp"), lambda group, vpp: group == "off" or vpp != "1"),
    (("group", "micro-batches to pp"), lambda group, against: group == "off" or against == "more"),
    (("distributed", "optimizer"), lambda distributed, optimizer: distributed == "off" or optimizer == "adam"),
    (("overlap", "distributed"), lambda overlap, distributed: overlap != "gather" or distributed == "on"),
    (("coupled decay", "optimizer"), lambda coupled, optimizer: coupled == "off" or optimizer == "adam"),
    (("per token", "average"), lambda per_token, average: "off" in (per_token, average)),
    *(
        (("per token", loss), lambda per_token, loss: "off" in (per_token, loss))
        for loss in ("aux loss", "sequence aux loss", "global aux loss", "z loss")
    ),
    (("align", "overlap"), lambda align, overlap: align == "off" or overlap != "none"),
    (("buckets", "overlap"), lambda buckets, overlap: buckets == "default" or overlap != "none"),
    (("bucket padding", "distributed"), lambda padding, distributed: padding == "off" or distributed == "on"),
    (("bucket padding", "buckets"), lambda padding, buckets: padding == "off" or buckets == "default"),
    (("clamp", "gated"), lambda clamp, gated: clamp == "off" or gated == "on"),
    (("glu offset", "gated"), lambda offset, gated: offset == "off" or gated == "on"),
    (("biases", "family"), lambda biases, family: biases == "off" or family not in SHARED),
    (("biases", "etp"), lambda biases, etp: biases == "off" or etp == "1"),
    (("shared overlap", "family"), lambda overlap, family: overlap == "off" or family in SHARED),
    (("shared overlap", "dispatcher"), lambda overlap, dispatcher: overlap == "off" or dispatcher == "alltoall"),
    (("p2p", "vpp"), lambda p2p, vpp: p2p not in ("overlapped", "flushed") or vpp != "1"),
)
RULED = tuple(dict.fromkeys((*LAYOUT, *(name for names, _ in RULES for name in names))))


def related(name: str) -> set[str]:
    """The dimension and those to which a rule ties it."""
    return {name}.union(*(names for names, _ in RULES if name in names))


def pairs(max_ranks: int) -> dict[Meeting, int]:
    """Every two words that can meet, and the smallest world in which they do."""
    return _all(tuple(itertools.combinations(DIMENSIONS, 2)), tuple(worlds(max_ranks)))


def threes(max_ranks: int) -> dict[Meeting, int]:
    """Every three words that can meet, of the dimensions that are aimed at; as `pairs`."""
    return _all(tuple(itertools.combinations(AIMED, 3)), tuple(worlds(max_ranks)))


@cache
def _all(names: tuple[tuple[str, ...], ...], tried: tuple[int, ...]) -> dict[Meeting, int]:
    found = {}
    for some in names:
        for chosen in itertools.product(*(ALL[name].words for name in some)):
            word = dict(zip(some, chosen, strict=True))
            if world := smallest_world(word, tried):
                found[said(word, some)] = world
    return found


def smallest_world(word: Mapping[str, str], tried: Iterable[int]) -> int | None:
    """The first of the worlds in which these words meet; None where they never do."""
    ruled = tuple((name, word[name]) for name in RULED if name in word)
    return next((world for world in tried if _meet(world, ruled)), None)


def _parts() -> list[tuple[str, ...]]:
    """The ruled dimensions in parts that no rule ties to one another, once the layout is known."""
    parts: list[set[str]] = []
    for names, _ in RULES:
        tied = {name for name in names if name not in LAYOUT}
        joined = tied.union(*(part for part in parts if part & tied))
        parts = [*(part for part in parts if not part & tied), joined]
    return [tuple(name for name in RULED if name in part) for part in parts if part]


PARTS = _parts()


@cache
def _meet(world: int, ruled: tuple[tuple[str, str], ...]) -> bool:
    fixed = dict(ruled)
    fits = [words for words in _layouts(world) if all(words[name] == fixed.get(name, words[name]) for name in LAYOUT)]
    parts = [(part, tuple((name, fixed[name]) for name in part if name in fixed)) for part in PARTS]
    return any(all(_fills(tuple(layout.items()), *part) for part in parts) for layout in fits)


@cache
def _layouts(world: int) -> tuple[dict[str, str], ...]:
    return tuple(words(SimpleNamespace(layout=layout), LAYOUT) for layout in all_layouts(world))


@cache
def _fills(layout: tuple[tuple[str, str], ...], part: tuple[str, ...], fixed: tuple[tuple[str, str], ...]) -> bool:
    """Whether a part can have words, some of which are fixed, under a layout."""
    word = dict(layout) | dict(fixed)
    return _kept(word) and _completed(word, part)


def _completed(word: dict[str, str], part: tuple[str, ...]) -> bool:
    """Whether the dimensions of a part that still lack a word can have one."""
    name = next((name for name in part if name not in word), None)
    if name is None:
        return True
    tries = ({**word, name: value} for value in ALL[name].words)
    return any(_kept(more, name) and _completed(more, part) for more in tries)


def _kept(word: Mapping[str, str], name: str | None = None) -> bool:
    """Whether no rule (about a dimension) is broken, of those whose dimensions all have a word."""
    return all(
        keeps(*(word[x] for x in names))
        for names, keeps in RULES
        if (name is None or name in names) and all(x in word for x in names)
    )
