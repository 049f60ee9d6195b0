"""Checkpoints: both layouts in and out, bit-identical round trips, a converter that proves its work."""

from __future__ import annotations

import fnmatch
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FalconMambaConfig, MambaConfig

from mambalign.models import original
from mambalign.models.checkpoint import convert, load_model, load_tokenizer, save_model
from mambalign.models.mamba import FalconMambaForCausalLM, MambaForCausalLM
from mambalign.recipe import UserError

D, LAYERS, STATE, RANK, WIDTH = 16, 2, 16, 1, 4
INNER = 2 * D
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
# What the hub's mamba-130m has, in small: 45 tokens, 48 rows.
OLD_CONFIG: dict[str, Any] = {
    "d_model": D,
    "n_layer": LAYERS,
    "vocab_size": 45,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
NEW_CONFIG = OLD_CONFIG | {
    "d_intermediate": 0,
    "ssm_cfg": {"layer": "Mamba1", "d_state": 16, "dt_min": 0.001},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "tie_embeddings": True,
}


def original_tensors(dtype: torch.dtype = torch.float32, tied: bool = True, rows: int = 48) -> dict[str, torch.Tensor]:
    """The state dict of mamba_ssm's MambaLMHeadModel, by its own shapes and names."""
    A = torch.arange(1, STATE + 1, dtype=torch.float32).log().repeat(INNER, 1)
    tensors = {"backbone.embedding.weight": torch.randn(rows, D)}
    for i in range(LAYERS):
        layer = f"backbone.layers.{i}"
        tensors |= {
            f"{layer}.mixer.A_log": A + 0.1 * torch.rand(INNER, STATE),
            f"{layer}.mixer.D": torch.randn(INNER),
            f"{layer}.mixer.in_proj.weight": torch.randn(2 * INNER, D) / 4,
            f"{layer}.mixer.conv1d.weight": torch.randn(INNER, 1, WIDTH) / 2,
            f"{layer}.mixer.conv1d.bias": torch.randn(INNER) / 4,
            f"{layer}.mixer.x_proj.weight": torch.randn(RANK + 2 * STATE, INNER) / 4,
            f"{layer}.mixer.dt_proj.weight": torch.randn(INNER, RANK),
            f"{layer}.mixer.dt_proj.bias": torch.randn(INNER) - 3,
            f"{layer}.mixer.out_proj.weight": torch.randn(D, INNER) / 4,
            f"{layer}.norm.weight": 1 + torch.randn(D) / 10,
        }
    tensors["backbone.norm_f.weight"] = 1 + torch.randn(D) / 10
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"] if tied else torch.randn(rows, D).to(dtype)
    return tensors


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], kind: str = "bin") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif kind == "safetensors":
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    else:  # sharded
        stem, save = ("pytorch_model", torch.save) if kind == "bin-shards" else ("model", save_file)
        suffix = "bin" if kind == "bin-shards" else "safetensors"
        weight_map = {name: f"{stem}-{1 + i % 2:05d}-of-00002.{suffix}" for i, name in enumerate(tensors)}
        for file in set(weight_map.values()):
            save({name: tensors[name].clone() for name in tensors if weight_map[name] == file}, folder / file)
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.float().eval()(input_ids=IDS).logits


def tiny_model(kind: str = "mamba", **config: Any) -> Any:
    sizes = {"vocab_size": 48, "hidden_size": D, "num_hidden_layers": LAYERS, "state_size": 4} | config
    if kind == "mamba":
        return MambaForCausalLM(MambaConfig(**sizes)).eval()
    return FalconMambaForCausalLM(FalconMambaConfig(**sizes)).eval()


# --- original layout in, and back


def test_original_checkpoint_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    tensors = original_tensors()
    plain = transformers.MambaForCausalLM(MambaConfig(vocab_size=48, hidden_size=D, num_hidden_layers=LAYERS))
    state = {name.replace("embedding.", "embeddings."): tensor for name, tensor in tensors.items()}
    plain.load_state_dict(state)
    model = load_model(write_folder(tmp_path / "m", OLD_CONFIG, tensors))
    assert isinstance(model, MambaForCausalLM)
    assert not model.training
    assert model.config.vocab_size == 48
    assert model.lm_head.weight is model.backbone.embeddings.weight
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


MIXED = "float16, A_log float32"
ROUND_TRIPS = [
    # dtype, file format, lm_head stored, tied, config
    ("float32", "bin", True, True, OLD_CONFIG),
    ("float32", "bin", False, True, NEW_CONFIG),
    ("float32", "safetensors", True, True, OLD_CONFIG),
    ("float16", "bin", True, True, OLD_CONFIG),
    ("float16", "safetensors", False, True, NEW_CONFIG),
    ("float16", "bin", True, False, NEW_CONFIG | {"tie_embeddings": False}),
    ("bfloat16", "safetensors", True, False, OLD_CONFIG | {"tie_embeddings": False}),
    (MIXED, "bin", True, True, OLD_CONFIG),
    ("float32", "bin-shards", True, True, OLD_CONFIG),
    ("float16", "safetensors-shards", False, True, OLD_CONFIG | {"vocab_size": 48, "ssm_cfg": {"dt_rank": "auto"}}),
]


@pytest.mark.parametrize(("dtype", "kind", "head", "tied", "config"), ROUND_TRIPS)
def test_original_to_hf_to_original_is_bit_identical(
    tmp_path: Path, dtype: str, kind: str, head: bool, tied: bool, config: dict[str, Any]
) -> None:
    tensors = original_tensors(getattr(torch, dtype.split(",")[0]), tied)
    if dtype == MIXED:
        tensors = {name: tensor.float() if name.endswith("A_log") else tensor for name, tensor in tensors.items()}
        tensors["backbone.layers.1.norm.weight"] = tensors["backbone.layers.1.norm.weight"].float()
    if not head:
        del tensors["lm_head.weight"]
    source = write_folder(tmp_path / "original", config, tensors, kind)

    report = convert(source, tmp_path / "hf", "hf")
    assert report.layout == "hf"
    assert report.max_abs_logit_difference == 0
    assert report.tensors == len(tensors) - (1 if head and tied else 0)
    hf = read_weights(tmp_path / "hf")
    assert hf["backbone.layers.0.mixer.A_log"].dtype == torch.float32
    if dtype == MIXED:  # one norm is float32, so the rest must not be narrower
        assert hf["backbone.embeddings.weight"].dtype == torch.float32
    else:
        assert hf["backbone.embeddings.weight"].dtype == getattr(torch, dtype)

    convert(tmp_path / "hf", tmp_path / "back", "mamba-ssm")
    assert (tmp_path / "back" / "model.safetensors").exists() == ("safetensors" in kind)
    back = read_weights(tmp_path / "back")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name
    assert read_config(tmp_path / "back") == config


def test_a_recurrence_wider_than_the_rest_comes_back_whole(tmp_path: Path) -> None:
    tensors = original_tensors(torch.bfloat16)
    wide = {name: tensor.double() + 1e-12 for name, tensor in tensors.items() if name.endswith("A_log")}
    convert(write_folder(tmp_path / "original", NEW_CONFIG, tensors | wide), tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "back", "mamba-ssm")
    for name, tensor in read_weights(tmp_path / "back").items():
        expected = (tensors | wide)[name]
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("layout", ["hf", "mamba-ssm"])
def test_an_untied_head_equal_to_the_embedding_has_memory_of_its_own(tmp_path: Path, layout: str) -> None:
    """torch.save keeps tensors that were one as one; a head that shared memory would be trained twice, saved never."""
    if layout == "hf":
        model = tiny_model()
        source = write_folder(
            tmp_path / "m", model.config.to_dict() | {"tie_word_embeddings": False}, model.state_dict()
        )
    else:
        source = write_folder(tmp_path / "m", OLD_CONFIG | {"tie_embeddings": False}, original_tensors())
    model = load_model(source)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    again = load_model(save_model(model, tmp_path / "out"))
    assert torch.equal(again.lm_head.weight, again.get_input_embeddings().weight + 1)


def test_the_record_survives_plain_transformers(tmp_path: Path) -> None:
    tensors = original_tensors(torch.float16)
    convert(write_folder(tmp_path / "original", NEW_CONFIG, tensors), tmp_path / "hf", "hf")
    # dtype="float32": plain transformers would otherwise narrow A_log, which is exact here, too.
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="float32").save_pretrained(tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "back", "mamba-ssm")
    back = read_weights(tmp_path / "back")
    assert all(back[name].dtype == torch.float16 and torch.equal(back[name], tensors[name]) for name in tensors)
    assert read_config(tmp_path / "back") == NEW_CONFIG


def test_trained_weights_are_not_narrowed_to_the_recorded_dtype(tmp_path: Path) -> None:
    model = load_model(write_folder(tmp_path / "m", OLD_CONFIG, original_tensors(torch.float16)))
    with torch.no_grad():
        model.backbone.layers[0].mixer.D.add_(1e-6)
    save_model(model, tmp_path / "out", layout="mamba-ssm")
    written = read_weights(tmp_path / "out")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert torch.equal(written["backbone.layers.0.mixer.D"], model.backbone.layers[0].mixer.D)


def test_trained_headless_checkpoint_is_saved_so_that_mamba_ssm_reads_it(tmp_path: Path) -> None:
    tensors = original_tensors()
    del tensors["lm_head.weight"]
    model = load_model(write_folder(tmp_path / "m", OLD_CONFIG, tensors, "safetensors"))
    save_model(model, tmp_path / "out", layout="mamba-ssm")
    written = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert set(written) == {*tensors, "lm_head.weight"}


def test_published_config_gives_the_published_shape() -> None:
    slimpj = OLD_CONFIG | {"d_model": 2560, "n_layer": 64, "vocab_size": 50277}
    config = original.to_hf_config(slimpj, "config.json")
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (50280, 2560, 64)
    assert (config.intermediate_size, config.time_step_rank, config.state_size) == (5120, 160, 16)
    assert config.tie_word_embeddings


def test_ssm_cfg_shapes_the_model() -> None:
    ssm = {"d_state": 8, "d_conv": 3, "expand": 4, "dt_rank": 5, "conv_bias": False, "bias": True, "dt_max": 1}
    config = original.to_hf_config(OLD_CONFIG | {"ssm_cfg": ssm}, "config.json")
    assert (config.state_size, config.conv_kernel, config.expand, config.time_step_rank) == (8, 3, 4, 5)
    assert (config.use_conv_bias, config.use_bias, config.time_step_max) == (False, True, 1.0)
    model = MambaForCausalLM(config)
    assert original.to_original_config(model)["ssm_cfg"] == ssm | {"dt_max": 1.0}


# --- what we write


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
@pytest.mark.parametrize("tied", [True, False])
def test_plain_transformers_loads_what_we_write(tmp_path: Path, kind: str, tied: bool) -> None:
    model = tiny_model(kind, tie_word_embeddings=tied)
    save_model(model, tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert type(plain).__module__.startswith("transformers.")
    config = read_config(tmp_path / "m")
    assert config["architectures"] == [type(plain).__name__]
    assert "auto_map" not in config
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)
    again = load_model(tmp_path / "m")
    assert type(again) is type(model)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) is tied
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_rescaled_initialisation_is_not_repeated_on_loading(tmp_path: Path, kind: str) -> None:
    """transformers 5.23 divides out_proj by sqrt(layers) again whenever it loads a config that asks for it."""
    model = tiny_model(kind, rescale_prenorm_residual=True)
    model.save_pretrained(tmp_path / "theirs")
    for path in (tmp_path / "theirs", save_model(model, tmp_path / "ours")):
        loaded = load_model(path)
        assert torch.equal(logits(loaded), logits(model))
        assert not loaded.config.rescale_prenorm_residual
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_mamba_ssm_layout_of_a_native_hf_model(tmp_path: Path, tied: bool, weights: Any) -> None:
    model = tiny_model(tie_word_embeddings=tied, state_size=STATE)
    save_model(model, tmp_path / "m", layout="mamba-ssm", weights=weights)
    assert {file.name for file in (tmp_path / "m").iterdir()} == {
        "config.json",
        "pytorch_model.bin" if weights == "bin" else "model.safetensors",
    }
    written, expected = read_weights(tmp_path / "m"), original_tensors()
    assert {name: tensor.shape for name, tensor in written.items()} == {n: t.shape for n, t in expected.items()}
    assert read_config(tmp_path / "m") == OLD_CONFIG | {"vocab_size": 48} | ({} if tied else {"tie_embeddings": False})
    again = load_model(tmp_path / "m")
    assert torch.equal(logits(again), logits(model))


def test_the_inner_width_is_that_of_the_tensors(tmp_path: Path) -> None:
    """Falcon-Mamba's configs, for one, give an intermediate_size that `expand` does not lead to."""
    model = tiny_model(expand=16, intermediate_size=INNER, hidden_act="swish")
    save_model(model, tmp_path / "m", layout="mamba-ssm")
    assert read_config(tmp_path / "m")["ssm_cfg"] == {"d_state": 4, "expand": 2}
    assert torch.equal(logits(load_model(tmp_path / "m")), logits(model))


def test_added_rows_reach_the_original_config(tmp_path: Path) -> None:
    model = load_model(write_folder(tmp_path / "m", OLD_CONFIG, original_tensors()))
    for rows, (vocab_size, multiple) in {56: (56, 8), 57: (57, 1)}.items():
        model.resize_token_embeddings(rows, mean_resizing=False)
        config = original.to_original_config(model)
        assert (config["vocab_size"], config["pad_vocab_size_multiple"]) == (vocab_size, multiple)
        assert original.padded_vocab_size(config) == rows
    save_model(model, tmp_path / "out", layout="mamba-ssm")
    assert load_model(tmp_path / "out").config.vocab_size == 57


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: tiny_model("falcon_mamba"), "no norms on B, C and dt"),
        (lambda: tiny_model(hidden_act="gelu"), "'gelu'"),
        (lambda: tiny_model(layer_norm_epsilon=1e-6), "1e-06"),
        (lambda: tiny_model(intermediate_size=24), "intermediate_size 24"),
    ],
)
def test_what_the_original_layout_cannot_express_is_refused(
    tmp_path: Path, model: Callable[[], Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        save_model(model(), tmp_path / "out", layout="mamba-ssm")
    assert not list(tmp_path.iterdir())


# --- Hugging Face layout in


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_sharded_and_bin_checkpoints_of_transformers(tmp_path: Path, kind: str) -> None:
    model = tiny_model(kind)
    plain = getattr(transformers, type(model).__name__)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    write_folder(tmp_path / "bin", read_config(tmp_path / "shards"), plain.state_dict())
    for folder in ("shards", "bin"):
        assert torch.equal(logits(load_model(tmp_path / folder)), logits(model))


@pytest.mark.parametrize("layout", ["hf", "mamba-ssm"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_half_precision_keeps_the_recurrence_in_float32(tmp_path: Path, layout: Any, dtype: Any) -> None:
    save_model(tiny_model(), tmp_path / "m", layout=layout)
    model = load_model(tmp_path / "m", dtype=dtype)
    half = torch.bfloat16 if dtype == "bfloat16" else dtype
    for name, parameter in model.named_parameters():
        single = name.endswith((".A_log", ".D", ".dt_proj.bias"))
        assert parameter.dtype == (torch.float32 if single else half), name
    save_model(model, tmp_path / "half", layout=layout)
    again = load_model(tmp_path / "half", dtype="auto")
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    assert {parameter.dtype for parameter in load_model(tmp_path / "half").parameters()} == {torch.float32}


# --- the hub, by its cache


def test_hub_ids_are_resolved_through_the_cache(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name, layout in (("hf", "hf"), ("ssm", "mamba-ssm")):
        repository = tmp_path / f"models--someone--{name}"
        save_model(tiny_model(), repository / "snapshots" / commit, layout=layout)  # type: ignore[arg-type]
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        (repository / "snapshots" / commit / "tokenizer.json").write_text("{}")
        model = load_model(f"someone/{name}", cache_dir=str(tmp_path), local_files_only=True)
        assert model.name_or_path == f"someone/{name}"
        report = convert(f"someone/{name}", tmp_path / f"{name}-out", "hf", cache_dir=str(tmp_path))
        assert report.source == f"someone/{name}"
        assert report.notes == ()
        assert (tmp_path / f"{name}-out" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(UserError, match=r"someone/other is not a folder here.*give the path of its folder"):
        load_model("someone/other", cache_dir=str(tmp_path))
    with pytest.raises(UserError, match="someone/hf"):
        load_model("someone/hf", revision="v2", cache_dir=str(tmp_path))


@pytest.mark.parametrize("layout", ["hf", "mamba-ssm"])
def test_the_hub_is_asked_once_and_nothing_is_fetched_in_vain(
    layout: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub = save_model(tiny_model(), tmp_path / "hub", layout=layout)
    for extra in ("optimizer.pt", "model.fp16.safetensors", "flax_model.msgpack"):
        (hub / extra).write_text("large")
    cache, asked = tmp_path / "cache" / commit, []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(revision)
        cache.mkdir(parents=True, exist_ok=True)
        for file in hub.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(file, cache / file.name)
        return str(cache)

    monkeypatch.setattr("mambalign.models.files.snapshot_download", download)
    load_model("someone/m", revision="v1")
    assert asked[0] == "v1" and set(asked[1:]) == {commit}
    assert {file.name for file in cache.iterdir()} == {file.name for file in hub.iterdir()} - {
        "optimizer.pt", "model.fp16.safetensors", "flax_model.msgpack",
    }  # fmt: skip

    def unreachable(*_: Any, **__: Any) -> str:
        asked.append("in vain")
        raise OSError("Name or service not known")

    monkeypatch.setattr("mambalign.models.files.snapshot_download", unreachable)
    for load in (load_model, load_tokenizer):
        asked.clear()
        with pytest.raises(UserError, match="Name or service not known Without a network"):
            load("someone/m")
        assert asked == ["in vain"]


# --- convert proves its work


@pytest.mark.parametrize("damage", ["one bit", "nan"])
def test_convert_refuses_what_came_back_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    source = save_model(tiny_model(), tmp_path / "m")
    write = original.write_original

    def faulty(model: Any, *args: Any, **options: Any) -> None:
        with torch.no_grad():
            D_parameter = model.backbone.layers[1].mixer.D
            kept = D_parameter.clone()
            D_parameter[0] = math.nan if damage == "nan" else math.nextafter(1.0, 2.0) + 1e-7
            write(model, *args, **options)
            D_parameter.copy_(kept)

    monkeypatch.setattr(original, "write_original", faulty)
    with pytest.raises(UserError, match=r"backbone.layers.1.mixer.D came back changed"):
        convert(source, tmp_path / "out", "mamba-ssm")
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_convert_refuses_a_model_that_is_broken_already(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.backbone.norm_f.weight[0] = math.nan
    save_model(model, tmp_path / "m")
    with pytest.raises(UserError, match="not finite"):
        convert(tmp_path / "m", tmp_path / "out", "mamba-ssm")
    assert not (tmp_path / "out").exists()


def test_convert_carries_the_tokenizer_and_says_what_to_know(tmp_path: Path) -> None:
    source = save_model(tiny_model(), tmp_path / "m")
    assert any("tokenizer_name_or_path" in note for note in convert(source, tmp_path / "a", "mamba-ssm").notes)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).write_text(f"the {name}")
    report = convert(source, tmp_path / "b", "mamba-ssm")
    assert report.notes == ()
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "the chat_template.jinja"
    assert report.bytes == (tmp_path / "b" / "pytorch_model.bin").stat().st_size
