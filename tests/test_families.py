"""The real families made tiny: names, shapes and values agree; and `keep_float64` keeps its word."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from toy_models import families, weights
from toy_models.precision import keep_float64
from toy_models.spec import FAMILIES, MoEModel

MODELS = {
    "qwen3moe": MoEModel(layers=2, experts=4, top_k=2, norm_topk_prob=True, heads=4, kv_heads=2, ffn=6),
    "qwen2moe": MoEModel(family="qwen2moe", layers=2, experts=3, heads=2, kv_heads=1, shared_ffn=6),
    "mixtral": MoEModel(family="mixtral", experts=4, top_k=2, norm_topk_prob=True, heads=2, tied=True),
    "gptoss": MoEModel(
        family="gptoss", layers=2, experts=4, top_k=2, norm_topk_prob=True, hidden=12, heads=4, kv_heads=2, ffn=6,
        activation="quick_gelu", clamp=0.5, glu_offset=1.0, sinks="learnable", biases=True,
    ),
    "glm4moe": MoEModel(
        family="glm4moe", layers=2, experts=4, top_k=2, norm_topk_prob=True, heads=2, kv_heads=1, ffn=6, shared_ffn=6,
        dense=(0,), dense_ffn=5, score="sigmoid", scaling=2.5, expert_groups=2, group_topk=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_names_and_shapes_are_those_of_transformers(family: str) -> None:
    model = MODELS[family]
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(families.hf_config(model))
    expected = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
    ours = families.to_hf(model, weights.canonical(model, "actor", seed=0))
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == expected


@pytest.mark.parametrize("role", weights.ROLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_to_hf_and_back_is_the_same(family: str, role: str) -> None:
    model = MODELS[family]
    canonical = weights.canonical(model, role, seed=1)
    back = families.from_hf(model, families.to_hf(model, canonical))
    assert set(back) == set(weights.shapes(model, role))
    assert all(torch.equal(back[name], canonical[name]) for name in canonical)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_float64_and_eager_without_dropout(family: str) -> None:
    config = families.hf_config(MODELS[family])
    assert config.dtype is torch.float64
    assert (config._attn_implementation, config._experts_implementation) == ("eager", "eager")
    assert config.attention_dropout == 0 and config.pad_token_id is None
    sliding = set(getattr(config, "layer_types", None) or ()) != {"full_attention"}
    assert not sliding or not getattr(config, "sliding_window", None)
    assert config.rms_norm_eps == families.rms_norm_eps(family)
    assert config.rope_parameters["rope_theta"] == families.rope_theta(family)


def test_inv_freq_is_the_usual_formula_in_float64() -> None:
    frequencies = families.inv_freq(10000.0, 8)
    assert frequencies.dtype is torch.float64
    assert frequencies.tolist() == pytest.approx([1, 0.1, 0.01, 0.001], rel=1e-15)


CONVERSIONS = {
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float32),
    "to keyword": lambda x: x.to(dtype=torch.float32),
    "to device and dtype": lambda x: x.to("cpu", torch.float32),
    "type": lambda x: x.type(torch.float32),
    "type by name": lambda x: x.type("torch.FloatTensor"),
    "torch.softmax": lambda x: torch.softmax(x, dim=-1, dtype=torch.float32),
    "torch.softmax by name": lambda x: torch.softmax(input=x, dim=-1, dtype=torch.float32),
    "F.softmax": lambda x: F.softmax(x, dim=-1, dtype=torch.float32),
    "Tensor.softmax": lambda x: x.softmax(-1, torch.float32),
    "torch.log_softmax": lambda x: torch.log_softmax(x, -1, dtype=torch.float32),
    "F.log_softmax": lambda x: F.log_softmax(x, dim=-1, dtype=torch.float32),
    "Tensor.log_softmax": lambda x: x.log_softmax(-1, dtype=torch.float32),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_keep_float64_keeps_float64_and_touches_nothing_else(name: str) -> None:
    convert = CONVERSIONS[name]
    wide, narrow = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.bfloat16)
    with keep_float64():
        assert convert(wide).dtype is torch.float64
        assert convert(narrow).dtype is torch.float32
        with keep_float64(False):
            assert convert(wide).dtype is torch.float64
    assert convert(wide).dtype is torch.float32


def test_keep_float64_leaves_other_arguments_alone() -> None:
    wide = torch.randn(3, dtype=torch.float64)
    with keep_float64():
        assert wide.to(torch.bfloat16).dtype is torch.bfloat16
        assert wide.to(torch.ones(1, dtype=torch.int64)).dtype is torch.int64
        assert wide.type() == "torch.DoubleTensor"


def test_keep_float64_is_undone_on_exit_and_on_an_error() -> None:
    names = ("float", "to", "type", "softmax", "log_softmax")
    before = [vars(torch.Tensor).get(name) for name in names] + [torch.softmax, F.softmax, F.log_softmax]
    with pytest.raises(KeyError), keep_float64(), keep_float64():
        raise KeyError
    assert before == [vars(torch.Tensor).get(name) for name in names] + [
        torch.softmax,
        F.softmax,
        F.log_softmax,
    ]


def _plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (x / ((x * x).mean(-1, keepdim=True) + families.rms_norm_eps("mixtral")) ** 0.5)


def test_gradients_through_a_norm_and_a_softmax_keep_fourteen_digits() -> None:
    norm = MixtralRMSNorm(6, eps=families.rms_norm_eps("mixtral")).double()
    seeded = torch.Generator().manual_seed(1)  # an x by chance can have gradients that are small as a whole
    x = torch.randn(4, 6, dtype=torch.float64, generator=seeded, requires_grad=True)
    with keep_float64():
        kept = torch.softmax(norm(x), dim=-1, dtype=torch.float32)
    upcast = torch.softmax(norm(x), dim=-1, dtype=torch.float32)
    plain = torch.exp(_plain_norm(x, norm.weight))
    plain = plain / plain.sum(-1, keepdim=True)
    grads = [torch.autograd.grad((y.double()[:, 0] ** 3).sum(), x)[0] for y in (plain, kept, upcast)]
    assert (grads[1] - grads[0]).abs().max() < 1e-14
    assert (grads[2] - grads[0]).abs().max() > 1e-10
