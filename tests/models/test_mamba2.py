"""Mamba-2 beyond what `test_mamba.py` asks of every family: gated norms, limits, chunks, and both layouts on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from mambalign.models import Mamba2ForCausalLM
from mambalign.models.checkpoint import convert, load_model, save_model
from mambalign.models.original import to_hf_config, to_original_config
from mambalign.ops import Segments
from mambalign.recipe import UserError
from tests.models.test_checkpoint import read_config, read_weights, write_folder
from tests.models.test_mamba import V, relative

D, LAYERS, STATE, HEAD, GROUPS, WIDTH = 16, 2, 4, 8, 2, 4
INNER, ROWS = 2 * D, 48
HEADS, CONV = INNER // HEAD, INNER + 2 * GROUPS * STATE
# As the hub's mamba2-130m has it, in small: 41 tokens, rows padded to 16.
CONFIG: dict[str, Any] = {
    "d_model": D,
    "d_intermediate": 0,
    "n_layer": LAYERS,
    "vocab_size": 41,
    "ssm_cfg": {"layer": "Mamba2", "d_state": STATE, "headdim": HEAD, "ngroups": GROUPS},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}


def original_tensors(dtype: torch.dtype = torch.float32, norm: bool = True, tied: bool = True) -> dict[str, Tensor]:
    """The state dict of mamba_ssm's MambaLMHeadModel with Mamba-2 layers, by its own shapes and names."""
    tensors = {"backbone.embedding.weight": torch.randn(ROWS, D)}
    for i in range(LAYERS):
        layer = f"backbone.layers.{i}"
        tensors |= {
            f"{layer}.mixer.dt_bias": torch.randn(HEADS) - 3,
            f"{layer}.mixer.A_log": torch.rand(HEADS) * 2.7,
            f"{layer}.mixer.D": torch.randn(HEADS),
            f"{layer}.mixer.in_proj.weight": torch.randn(INNER + CONV + HEADS, D) / 4,
            f"{layer}.mixer.conv1d.weight": torch.randn(CONV, 1, WIDTH) / 2,
            f"{layer}.mixer.conv1d.bias": torch.randn(CONV) / 4,
            f"{layer}.mixer.norm.weight": 1 + torch.randn(INNER) / 10,
            f"{layer}.mixer.out_proj.weight": torch.randn(D, INNER) / 4,
            f"{layer}.norm.weight": 1 + torch.randn(D) / 10,
        }
    tensors["backbone.norm_f.weight"] = 1 + torch.randn(D) / 10
    tensors = {n: t.to(dtype) for n, t in tensors.items() if norm or not n.endswith("mixer.norm.weight")}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"] if tied else torch.randn(ROWS, D).to(dtype)
    return tensors


def with_ssm(**changes: Any) -> dict[str, Any]:
    return CONFIG | {"ssm_cfg": CONFIG["ssm_cfg"] | changes}


def naive_logits(tensors: dict[str, Tensor], ids: Tensor, ssm: dict[str, Any]) -> Tensor:
    """mamba_ssm's Mamba-2 in plain words, one sequence, one token at a time, in float64."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    low, high = ssm.get("dt_limit", (0.0, float("inf")))

    def norm(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        parts = [p / (p.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() for p in x.chunk(groups, -1)]
        return torch.cat(parts, -1) * weight

    def mixer(x: Tensor, w: Any) -> Tensor:
        z, xBC, dt = (x @ w("in_proj.weight").T).split([INNER, CONV, HEADS], -1)
        padded = F.pad(xBC, (0, 0, WIDTH - 1, 0))
        taps = w("conv1d.weight")[:, 0].T
        xBC = torch.stack([(padded[t : t + WIDTH] * taps).sum(0) for t in range(len(x))]) + w("conv1d.bias")
        u, B, C = F.silu(xBC).split([INNER, GROUPS * STATE, GROUPS * STATE], -1)
        dt = F.softplus(dt + w("dt_bias")).clamp(low, high)
        y = torch.empty(len(x), HEADS, HEAD, dtype=torch.float64)
        for h in range(HEADS):
            group = slice(h // (HEADS // GROUPS) * STATE, (h // (HEADS // GROUPS) + 1) * STATE)
            state = torch.zeros(HEAD, STATE, dtype=torch.float64)
            for t in range(len(x)):
                value = u[t, h * HEAD : (h + 1) * HEAD]
                state = (-w("A_log")[h].exp() * dt[t, h]).exp() * state + dt[t, h] * value[:, None] * B[t, group]
                y[t, h] = state @ C[t, group] + w("D")[h] * value
        y = y.flatten(1)
        if not ssm.get("rmsnorm", True):
            y = y * F.silu(z)
        elif ssm.get("norm_before_gate", False):
            y = norm(y, w("norm.weight"), GROUPS) * F.silu(z)
        else:
            y = norm(y * F.silu(z), w("norm.weight"), GROUPS)
        return y @ w("out_proj.weight").T

    hidden = weights["backbone.embedding.weight"][ids]
    for i in range(LAYERS):
        layer = f"backbone.layers.{i}"
        normed = norm(hidden, weights[f"{layer}.norm.weight"])
        hidden = hidden + mixer(normed, lambda name, layer=layer: weights[f"{layer}.mixer.{name}"])
    return norm(hidden, weights["backbone.norm_f.weight"]) @ weights["lm_head.weight"].T


VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm_before_gate": True},
    {"rmsnorm": False},
    {"dt_limit": [0.02, 0.1]},
]


@pytest.mark.parametrize("ssm", VARIANTS, ids=str)
def test_the_original_layout_is_read_as_mamba_ssm_means_it(ssm: dict[str, Any], tmp_path: Path) -> None:
    tensors = original_tensors(norm=ssm.get("rmsnorm", True))
    model = load_model(write_folder(tmp_path / "m", with_ssm(**ssm), tensors), dtype="float64")
    assert isinstance(model, Mamba2ForCausalLM) and model.config.eos_token_id == 0
    ids = torch.randint(41, (9,))
    assert relative(model(ids[None]).logits[0], naive_logits(tensors, ids, ssm)) < 1e-9
    if not ssm:  # what transformers can express, it computes the same from what we write
        save_model(model.float(), tmp_path / "hf")
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert type(plain) is transformers.Mamba2ForCausalLM
        assert relative(plain(ids[None]).logits[0], naive_logits(tensors, ids, ssm)) < 1e-5


ROUND_TRIPS = [
    ("float32", "bin", True, CONFIG),
    ("float16", "safetensors", True, with_ssm(dt_limit=[0.0, float("inf")], chunk_size=256, A_init_range=[1, 16])),
    ("bfloat16", "bin-shards", False, with_ssm(norm_before_gate=True) | {"tie_embeddings": False}),
    ("float32", "bin", True, with_ssm(rmsnorm=False, dt_limit=[0.01, 0.5])),
]


@pytest.mark.parametrize(("dtype", "kind", "tied", "config"), ROUND_TRIPS, ids=lambda v: str(v)[:12])
def test_original_to_hf_to_original_is_bit_identical(
    dtype: str, kind: str, tied: bool, config: dict[str, Any], tmp_path: Path
) -> None:
    tensors = original_tensors(getattr(torch, dtype), config["ssm_cfg"].get("rmsnorm", True), tied)
    report = convert(write_folder(tmp_path / "original", config, tensors, kind), tmp_path / "hf", "hf")
    assert report.max_abs_logit_difference == 0
    hf = read_weights(tmp_path / "hf")
    kept = ("A_log", ".D", "dt_bias")
    assert all(t.dtype == (torch.float32 if n.endswith(kept) else getattr(torch, dtype)) for n, t in hf.items())
    warned = any("plain transformers" in note for note in report.notes)
    assert warned == (config["ssm_cfg"].get("norm_before_gate") is True or config["ssm_cfg"].get("rmsnorm") is False)
    convert(tmp_path / "hf", tmp_path / "back", "mamba-ssm")
    back = read_weights(tmp_path / "back")
    assert set(back) == set(tensors)
    assert all(back[n].dtype == t.dtype and torch.equal(back[n], t) for n, t in tensors.items())
    assert read_config(tmp_path / "back") == config


@pytest.mark.parametrize("gated_norm", ["gate_first", "norm_first", "none"])
def test_a_native_hf_model_in_the_original_layout(gated_norm: str, tmp_path: Path) -> None:
    config = transformers.Mamba2Config(
        vocab_size=ROWS, hidden_size=D, num_hidden_layers=LAYERS, state_size=STATE, num_heads=HEADS, head_dim=HEAD,
        n_groups=GROUPS, gated_norm=gated_norm, tie_word_embeddings=True, time_step_limit=(0.0, 0.5),
    )  # fmt: skip
    model = Mamba2ForCausalLM(config).eval()
    save_model(model, tmp_path / "m", layout="mamba-ssm")
    written, expected = read_weights(tmp_path / "m"), original_tensors(norm=gated_norm != "none")
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in expected.items()}
    gates = {"gate_first": {}, "norm_first": {"norm_before_gate": True}, "none": {"rmsnorm": False}}
    assert read_config(tmp_path / "m")["ssm_cfg"] == with_ssm(dt_limit=[0.0, 0.5], **gates[gated_norm])["ssm_cfg"]
    again = load_model(tmp_path / "m")
    ids = torch.randint(ROWS, (2, 7))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_published_configs_give_the_published_shape() -> None:
    written = CONFIG | {"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}}
    config = to_hf_config(written, "config.json")
    assert (config.vocab_size, config.num_heads, config.head_dim, config.n_groups) == (50288, 80, 64, 1)
    assert (config.state_size, config.conv_kernel, config.tie_word_embeddings) == (128, 4, True)
    assert tuple(config.time_step_limit) == (0.0, float("inf"))


def test_what_the_original_layout_cannot_express_is_refused() -> None:
    sizes = dict(vocab_size=ROWS, hidden_size=D, num_hidden_layers=1, num_heads=HEADS, head_dim=HEAD, n_groups=1)
    for change, says in (({"hidden_act": "gelu"}, "'gelu'"), ({"layer_norm_epsilon": 1e-6}, "1e-06")):
        with pytest.raises(UserError, match=says):
            to_original_config(Mamba2ForCausalLM(transformers.Mamba2Config(**sizes | change)))


def tiny_config(**changes: Any) -> Any:
    sizes = dict(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=8, n_groups=2)
    return transformers.Mamba2Config(**sizes | changes)


@pytest.mark.parametrize(
    "changes",
    [{"norm_before_gate": True, "rms_norm": True}, {"time_step_limit": (0.005, 0.02)}, {"n_groups": 1}],
    ids=str,
)
def test_long_rows_equal_transformers_whatever_the_config_says(changes: dict[str, Any], tmp_path: Path) -> None:
    """Over several chunks of both; and published configs say `norm_before_gate: true` of models that gate first."""
    plain = transformers.Mamba2ForCausalLM(tiny_config(chunk_size=32, **changes)).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain.save_pretrained(tmp_path / "m")
    ours = load_model(tmp_path / "m")
    ids = torch.randint(V, (1, 150))
    expected, got = plain(ids, labels=ids), ours(ids, labels=ids)
    assert relative(got.logits, expected.logits) < 1e-5
    expected.loss.backward()
    got.loss.backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, gradients[name].grad) < 1e-4, name


@pytest.mark.parametrize("changes", [{"use_bias": True, "time_step_limit": (0.01, 0.05)}, {"gated_norm": "norm_first"},
                                     {"gated_norm": "none"}], ids=str)  # fmt: skip
def test_pads_and_caches_are_exact_in_every_variant(changes: dict[str, Any]) -> None:
    """transformers lets the biases of left pads into the convolution, and a step of its cache ignores the limits."""
    model = Mamba2ForCausalLM(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(2, V, (1, 9))
    for side in ("left", "right"):
        pads = torch.zeros(1, 4, dtype=torch.long)
        row = torch.cat([pads, ids] if side == "left" else [ids, pads], 1)
        logits = model(row, attention_mask=(row != 0).long()).logits[row != 0]
        assert relative(logits, model(ids).logits[0]) < 1e-5
    fork = Segments.from_lengths([5, 4, 4], [-1, 0, 0])
    forked = model(torch.cat([ids, ids[:, 5:]], 1), segments=fork).logits[0]
    assert relative(forked[9:], model(ids).logits[0, 5:]) < 1e-5
    first = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    for length in range(9, 14):
        assert int(model(first[:, :length]).logits[0, -1].argmax()) == int(first[0, length])


def test_the_norm_must_be_a_known_one(tmp_path: Path) -> None:
    model = Mamba2ForCausalLM(tiny_config())
    save_model(model, tmp_path / "m")
    config = read_config(tmp_path / "m") | {"gated_norm": "before"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"config.json: gated_norm is 'before'; it must be one of gate_first, norm_first"
    ):
        load_model(tmp_path / "m")
