"""The reference's own router, experts, MLPs and attention against transformers' classes that have the same formula."""

import pytest
import torch
from transformers import GptOssConfig, Qwen3NextConfig
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssMLP
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeAttention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention, Qwen3MoeExperts, Qwen3MoeMLP
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention

from toy_models import families, reference_modules
from toy_models.precision import keep_float64
from toy_models.spec import ACTIVATIONS, MoEModel

OSS = MoEModel(
    family="qwen3moe", experts=5, top_k=2, norm_topk_prob=True, hidden=8, heads=4, kv_heads=2, head_dim=4, ffn=6,
    activation="quick_gelu", clamp=0.7, glu_offset=1.0, qk_norm="off", sinks="learnable", biases=True,
)  # fmt: skip
THEIR_NAMES = {"squared_relu": "relu2"}


def oss_config() -> GptOssConfig:
    config = GptOssConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
        intermediate_size=6, num_local_experts=5, num_experts_per_tok=2, swiglu_limit=0.7,
        layer_types=["full_attention"],
    )  # fmt: skip
    config._attn_implementation = config._experts_implementation = "eager"
    return config


def filled(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """With float64 weights of about one, so that gates, clamps and norms matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return module


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def turns(width: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of rotary embeddings for one row, [1, W, size]."""
    angles = torch.arange(width)[:, None] * families.inv_freq(10000.0, size)
    return tuple(part[None] for part in (torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()))


def mask(width: int) -> torch.Tensor:
    """What transformers adds to scores."""
    return torch.zeros(1, 1, width, width, dtype=torch.float64).masked_fill(
        torch.ones(width, width, dtype=torch.bool).triu(1), torch.finfo(torch.float64).min
    )


def same_attention(model: MoEModel, theirs: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    ours = reference_modules.Attention(model).double()
    ours.load_state_dict(state)
    hidden = noise(2, 5, model.hidden)
    cos, sin = turns(5, model.head_dim)
    half = (cos[..., : model.head_dim // 2], sin[..., : model.head_dim // 2])
    given = half if isinstance(theirs, GptOssAttention) else (cos, sin)
    with keep_float64():
        expected, _ = theirs(hidden, position_embeddings=given, attention_mask=mask(5))
        found, _ = ours(hidden, (cos, sin))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_are_those_of_transformers(kind: str) -> None:
    model, x = MoEModel(activation=kind, gated=False), 3 * noise(50)
    expected = ACT2FN[THEIR_NAMES.get(kind, kind)](x)
    torch.testing.assert_close(reference_modules.activated(model, x), expected, rtol=1e-14, atol=1e-14)


def test_gpt_oss_attention_has_sinks_and_biases() -> None:
    theirs = filled(GptOssAttention(oss_config(), 0))
    same_attention(OSS, theirs, theirs.state_dict())


def test_attention_of_families_that_have_norms_or_biases() -> None:
    for family, made, changes in (
        ("qwen3moe", Qwen3MoeAttention, {"head_dim": 6}),
        ("qwen2moe", Qwen2MoeAttention, {"shared_ffn": 4}),
    ):
        model = MoEModel(family=family, hidden=8, heads=2, kv_heads=1, **{"head_dim": 4, **changes})
        theirs = filled(made(families.hf_config(model), 0))
        same_attention(model, theirs, theirs.state_dict())


def test_qwen3_next_attention_gates_its_output() -> None:
    config = Qwen3NextConfig(hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    config._attn_implementation = "eager"
    theirs = filled(Qwen3NextAttention(config, 0))
    state = dict(theirs.state_dict())
    packed = state.pop("q_proj.weight").unflatten(0, (4, 2, 4))  # per head: its query, then its gate
    state |= {"q_proj.weight": packed[:, 0].flatten(0, 1), "g_proj.weight": packed[:, 1].flatten(0, 1)}
    state |= {f"{x}_norm.weight": 1 + state[f"{x}_norm.weight"] for x in "qk"}  # theirs are kept less one
    model = MoEModel(hidden=8, heads=4, kv_heads=2, head_dim=4, output_gate=True)
    assert families.rms_norm_eps("qwen3moe") == config.rms_norm_eps
    same_attention(model, theirs, state)


def test_gpt_oss_router_and_experts_have_biases_a_clamp_and_an_offset() -> None:
    theirs = filled(GptOssMLP(oss_config()))
    router, experts = reference_modules.Router(OSS), reference_modules.Experts(OSS)
    router.double().load_state_dict(theirs.router.state_dict())
    state = {name: x.transpose(1, 2) if x.dim() == 3 else x for name, x in theirs.experts.state_dict().items()}
    for name in ("gate_up_proj", "gate_up_proj_bias"):  # gates and ups of theirs take turns
        state[name] = torch.cat([state[name][:, ::2], state[name][:, 1::2]], dim=1)
    experts.double().load_state_dict(state)
    hidden = noise(1, 7, 8)
    _, gates, chosen = router(hidden[0])
    found = experts(hidden[0], chosen, gates)
    torch.testing.assert_close(found, theirs(hidden)[0][0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gated_experts_and_mlps_are_those_of_qwen3(kind: str) -> None:
    model = MoEModel(experts=3, hidden=8, ffn=6, activation=kind)
    config = families.hf_config(model)
    config.hidden_act = THEIR_NAMES.get(kind, kind)
    hidden, chosen = noise(5, 8), torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]])
    gates = noise(5, 2).abs()
    for ours, theirs, given in (
        (reference_modules.Experts(model), Qwen3MoeExperts(config), (hidden, chosen, gates)),
        (reference_modules.MLP(model, 6), Qwen3MoeMLP(config, 6), (hidden,)),
    ):
        ours.double().load_state_dict(filled(theirs).state_dict())
        torch.testing.assert_close(ours(*given), theirs(*given), rtol=1e-13, atol=1e-13)


def test_plain_experts_are_two_products_with_an_activation_between() -> None:
    model = MoEModel(experts=2, hidden=8, ffn=6, activation="squared_relu", gated=False, biases=True)
    experts = filled(reference_modules.Experts(model))
    hidden, chosen, gates = noise(3, 8), torch.tensor([[0], [1], [1]]), noise(3, 1)
    up, down = experts.gate_up_proj[chosen[:, 0]], experts.down_proj[chosen[:, 0]]
    bent = ((up @ hidden[..., None])[..., 0] + experts.gate_up_proj_bias[chosen[:, 0]]).relu() ** 2
    expected = ((down @ bent[..., None])[..., 0] + experts.down_proj_bias[chosen[:, 0]]) * gates
    torch.testing.assert_close(experts(hidden, chosen, gates), expected, rtol=1e-13, atol=1e-13)


def test_a_sink_that_is_not_learned_has_a_score_of_zero() -> None:
    model = MoEModel(hidden=8, heads=2, kv_heads=2, qk_norm="off", sinks="off-by-one")
    attention = filled(reference_modules.Attention(model))
    learned = reference_modules.Attention(MoEModel(hidden=8, heads=2, kv_heads=2, qk_norm="off", sinks="learnable"))
    learned.double().load_state_dict(attention.state_dict() | {"sinks": torch.zeros(2, dtype=torch.float64)})
    hidden, given = noise(1, 4, 8), turns(4, model.head_dim)
    assert torch.equal(attention(hidden, given)[0], learned(hidden, given)[0])
