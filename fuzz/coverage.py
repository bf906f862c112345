"""What there is to cover: the dimensions of a case, and its values in words. How much of it a run has covered.

Knows the parts of a case; knows nothing of how cases are drawn. What words can meet at all is in `fuzz.meetings`.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from fuzz.case import PRECISIONS, TWINS, Case
from fuzz.space import DEGREES
from toy_models import batching
from toy_models.spec import (
    ACTIVATIONS,
    DISPATCHERS,
    FAMILIES,
    FROZEN,
    GROUPS,
    MASKS,
    PIPES,
    RAGGEDNESS,
    ROUTER_DTYPES,
    SCORES,
    SINKS,
    SPLITS,
    Layout,
)

Meeting = tuple[str, ...]  # two or three words of different dimensions, such as ('tp=2', 'split=even')


class Dimension(NamedTuple):
    """`read` gives one of `words`."""

    words: tuple[str, ...]
    read: Callable[[Any], str]


def _one_of(path: str, words: tuple[str, ...]) -> Dimension:
    read = attrgetter(path)
    return Dimension(words, lambda case: str(read(case)))


def _on(path: str) -> Dimension:
    read = attrgetter(path)
    return Dimension(("off", "on"), lambda case: "on" if read(case) else "off")


def _many(path: str) -> Dimension:
    read = attrgetter(path)
    return Dimension(("1", "2+"), lambda case: "2+" if read(case) > 1 else "1")


def _degree(path: str) -> Dimension:
    return _one_of(path, tuple(map(str, DEGREES)))


def _either(no: str, yes: str, read: Callable[[Case], bool]) -> Dimension:
    return Dimension((no, yes), lambda case: yes if read(case) else no)


# ---- what is read from a case ----------------------------------------------------------------------------------


def micro_batches(case: Case) -> int:
    """Of one mini-batch, on one data-parallel rank."""
    return case.batch.rows // (case.ppo.mini_batches * case.layout.dp * case.batch.micro_rows)


def _against_pp(case: Case) -> str:
    number, pp = micro_batches(case), case.layout.pp
    return "fewer" if number < pp else "more" if number > pp else "as many"


def power_of_two(number: int) -> bool:
    """1, 2, 4, 8 ..."""
    return number & (number - 1) == 0


def _top_k(case: Case) -> str:
    model = case.model
    return "1" if model.top_k == 1 else "all" if model.top_k == model.experts else "some"


def _expert_groups(case: Case) -> str:
    return "limited" if case.model.group_topk else "idle" if case.model.expert_groups else "none"


def stages(case: Case) -> list[int]:
    """Layers of each stage, virtual ones too, in the order of the model."""
    number = case.layout.pp * case.layout.vpp
    return list(case.layout.stages) or [case.model.layers // number] * number


def _contents(case: Case) -> str:
    """Where experts are missing: nowhere, in some layers, in all of some stage, in all of the last."""
    ends = [0, *itertools.accumulate(stages(case))]
    moe = [any(layer in case.model.moe for layer in range(*cut)) for cut in itertools.pairwise(ends)]
    if all(moe):
        return "mixed" if case.model.dense else "experts"
    return "stage without experts" if moe[-1] else "last without experts"


def _etp(case: Case) -> str:
    layout = case.layout
    return "1" if layout.etp == 1 else "tp" if layout.etp == layout.tp else "other"


def _experts_cut(case: Any) -> str:
    """EP and ETP together are a path of their own through the dispatchers, which pairs of degrees do not aim at."""
    both = case.layout.ep > 1, case.layout.etp > 1
    return {(False, False): "no", (True, False): "ep", (False, True): "etp", (True, True): "both"}[both]


def _optimizer(case: Case) -> str:
    return "sgd with momentum" if case.ppo.momentum else case.ppo.optimizer


def _recompute(case: Case) -> str:
    return "full" if case.switches.recompute_layers else "none" if case.switches.recompute == "none" else "selective"


def _overlap(case: Case) -> str:
    return "gather" if case.switches.overlap_gather else "reduce" if case.switches.overlap_reduce else "none"


def _raggedness(case: Case) -> str:
    """As it is, not as it is asked for: rows of one response token each are equally long."""
    limits = batching.response_limits(case.batch, case.seed)
    return case.batch.raggedness if len(set(limits)) > 1 else "equal"


def _has_holes(case: Case) -> bool:
    """Whether the environment puts a token between two of a row: one before all others leaves nothing to carry over."""
    if not case.batch.holes:
        return False
    limits = enumerate(batching.response_limits(case.batch, case.seed))
    places = ((row, position) for row, limit in limits for position in range(1, limit - 1))
    return any(batching.forced_token(case.model, case.batch, case.seed, 0, *place) is not None for place in places)


# What a dispatcher does depends on both ways of cutting experts at once.
PATHS = tuple(f"{dispatcher} {cut}" for dispatcher in DISPATCHERS for cut in ("no", "ep", "etp", "both"))

# Capacity has no line: a fifth of its cases ends in a tie (`model_strategies._capacity`), and half of the rows would
# have it.
# A further option is one line here, and one among `meetings.RULES` where it cannot meet everything.
DIMENSIONS: dict[str, Dimension] = {
    "tp": _degree("layout.tp"),
    "pp": _degree("layout.pp"),
    "cp": _degree("layout.cp"),
    "ep": _degree("layout.ep"),
    "etp": _degree("layout.etp"),
    "experts cut": Dimension(("no", "ep", "etp", "both"), _experts_cut),
    "dp": _many("layout.dp"),
    "edp": _many("layout.edp"),
    "vpp": _many("layout.vpp"),
    "order": _either("default", "other", lambda case: case.layout.order != Layout().order),
    "split": _one_of("layout.split", SPLITS),
    "empty stage": _either("no", "yes", lambda case: 0 in stages(case)),
    "contents": Dimension(("experts", "mixed", "stage without experts", "last without experts"), _contents),
    "micro-batches to pp": Dimension(("fewer", "as many", "more"), _against_pp),
    "micro-batches": _either("power of two", "other", lambda case: not power_of_two(micro_batches(case))),
    "p2p": _one_of("switches.p2p", PIPES),
    "group": _on("switches.group"),
    "family": _one_of("model.family", FAMILIES),
    "experts": _either("power of two", "other", lambda case: not power_of_two(case.model.experts)),
    "local experts": _either("one", "several", lambda case: case.model.experts > case.layout.ep),
    "top-k": Dimension(("1", "some", "all"), _top_k),
    "gates": _either("plain", "normalised", lambda case: case.model.norm_topk_prob),
    "score": _one_of("model.score", SCORES),
    "expert bias": _on("model.expert_bias"),
    "bias rate": _on("model.bias_rate"),
    "scaling": _either("off", "on", lambda case: case.model.scaling != 1),
    "expert groups": Dimension(("none", "idle", "limited"), _expert_groups),
    "drops": _either("none", "by position", lambda case: case.model.drops == "position"),
    "router dtype": _one_of("switches.router_dtype", ROUTER_DTYPES),
    "query groups": _either("many", "fewer than tp", lambda case: case.model.kv_heads < case.layout.tp),
    "activation": _one_of("model.activation", ACTIVATIONS),
    "gated": _on("model.gated"),
    "clamp": _on("model.clamp"),
    "glu offset": _on("model.glu_offset"),
    "qk norm": _on("model.has_qk_norm"),
    "output gate": _on("model.output_gate"),
    "sinks": _one_of("model.sinks", SINKS),
    "biases": _on("model.biases"),
    "tied": _on("model.tied"),
    "skew": _on("model.skew"),
    "aux loss": _on("model.aux_loss"),
    "sequence aux loss": _on("model.seq_aux_loss"),
    "global aux loss": _on("model.global_aux_loss"),
    "z loss": _on("model.z_loss"),
    "rows of a micro-batch": _many("batch.micro_rows"),
    "response": _many("batch.response"),
    "raggedness": Dimension(RAGGEDNESS, _raggedness),
    "holes": _either("off", "on", _has_holes),
    "pad is eos": _on("batch.pad_is_eos"),
    "mini-batches": _many("ppo.mini_batches"),
    "epochs": _many("ppo.epochs"),
    "whiten": _on("ppo.whiten"),
    "kl": _on("ppo.kl_coef"),
    "entropy": _on("ppo.entropy_coef"),
    "optimizer": Dimension(("sgd", "sgd with momentum", "adam"), _optimizer),
    "clipping": _on("ppo.max_norm"),
    "weight decay": _on("ppo.weight_decay"),
    "frozen": _one_of("ppo.frozen", FROZEN),
    "dispatcher": _one_of("switches.dispatcher", DISPATCHERS),
    "path": Dimension(PATHS, lambda case: f"{case.switches.dispatcher} {_experts_cut(case)}"),
    "process groups": _one_of("switches.groups", GROUPS),
    "initialization": _on("switches.perform_initialization"),
    "deallocate": _on("switches.deallocate"),
    "forward sp": _on("switches.forward_sp"),
    "decoder input": _on("switches.decoder_input"),
    "padding mask": _one_of("switches.padding_mask", MASKS),
    "distributed": _on("switches.distributed"),
    "overlap": Dimension(("none", "reduce", "gather"), _overlap),
    "align": _on("switches.align"),
    "buckets": _either("default", "small", lambda case: case.switches.bucket > 0),
    "bucket padding": _on("switches.pad_buckets"),
    "average": _on("switches.average"),
    "check nan": _on("switches.check_nan"),
    "count zeros": _on("switches.count_zeros"),
    "per token": _on("switches.per_token"),
    "embedding rate": _on("ppo.embedding_lr"),
    "coupled decay": _on("ppo.coupled_decay"),
    "qk decay": _on("ppo.qk_decay"),
    "recompute": Dimension(("none", "full", "selective"), _recompute),  # each module would be forty rows more
    "qk scaling": _on("switches.qk_scaling"),
    "fp32 residual": _on("switches.fp32_residual"),
    "deterministic": _on("switches.deterministic"),
    "shared overlap": _on("switches.shared_overlap"),
    "precision": _one_of("precision", PRECISIONS),
    "twin": _one_of("twin", ("None", *TWINS)),
}

# Three at a time: how the degrees fold (only 1 and more told apart), rows and micro-batches, how losses are divided,
# balance losses, masks, biases (qwen2moe has them), what stages hold.
FOLDS: dict[str, Dimension] = {
    "tensor": _many("layout.tp"),
    "context": _many("layout.cp"),
    "expert": _many("layout.ep"),
    "expert tensor": Dimension(("1", "tp", "other"), _etp),
}
AIMED = (
    *FOLDS, "split", "contents", "family", "tied", "aux loss", "z loss", "rows of a micro-batch", "micro-batches",
    "mini-batches", "whiten", "holes", "raggedness", "padding mask",
)  # fmt: skip
ALL = DIMENSIONS | FOLDS
LAYOUT = ("tp", "pp", "cp", "ep", "etp", "experts cut", "dp", "edp", *FOLDS)  # what the degrees alone decide


def words(case: Any, names: Iterable[str]) -> dict[str, str]:
    """The case in these dimensions."""
    return {name: ALL[name].read(case) for name in names}


def said(word: Mapping[str, str], names: Iterable[str]) -> tuple[str, ...]:
    """The words as parts of a meeting."""
    return tuple(f"{name}={word[name]}" for name in names)


def pairs(word: Mapping[str, str]) -> Iterable[Meeting]:
    """Every two words of a case."""
    return itertools.combinations(said(word, DIMENSIONS), 2)


def threes(word: Mapping[str, str]) -> Iterable[Meeting]:
    """Every three words of the dimensions that are aimed at."""
    return itertools.combinations(said(word, AIMED), 3)


def code(case: Case) -> str:
    """All words of a case as one short string: what a tally carries."""
    return "".join(chr(ord("0") + dimension.words.index(dimension.read(case))) for dimension in ALL.values())


def decoded(text: str) -> dict[str, str]:
    """The words of a code."""
    return {name: ALL[name].words[ord(sign) - ord("0")] for name, sign in zip(ALL, text, strict=True)}
