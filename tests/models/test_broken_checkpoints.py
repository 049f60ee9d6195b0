"""Checkpoints that are wrong: every way in which a folder can be, and the sentence that says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mambalign.models.checkpoint import convert, load_model, save_model
from mambalign.recipe import UserError
from tests.models.test_checkpoint import (
    OLD_CONFIG,
    STATE,
    logits,
    original_tensors,
    read_config,
    tiny_model,
    write_folder,
)

CONFIG_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"rms_norm": False}, "rms_norm is false"),
    ({"attn_layer_idx": [1]}, r"attn_layer_idx = \[1\]"),
    ({"d_intermediate": 64}, "d_intermediate = 64"),
    ({"ssm_cfg": {"layer": "Mamba3"}}, "'Mamba3'; Mamba1 and Mamba2 are read"),
    ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 8}}, "d_ssm = 8: such a layer is not supported"),
    ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim = True: such a layer is not supported"),
    ({"ssm_cfg": {"layer": "Mamba2", "dt_rank": 2}}, "unknown key 'dt_rank'"),
    ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": 1}}, "rmsnorm = 1 must be true or false"),
    ({"ssm_cfg": {"layer": "Mamba2", "dt_limit": [0.5, 0.1]}}, "dt_limit = .* must be two increasing numbers"),
    ({"ssm_cfg": {"layer": "Mamba2", "headdim": 5}}, "32 inner channels .* heads of 5"),
    ({"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "ngroups": 3}}, "in 3 equal groups"),
    ({"ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [1], "attn_cfg": {"num_heads": 2}}, "models with attention"),
    ({"ssm_cfg": {"layer": "Mamba2", "headdim": 16}}, r"A_log is \[32, 16\] there, \[2\] in the model"),
    ({"ssm_cfg": {"d_stat": 16}}, "did you mean 'd_state'"),
    ({"ssm_cfg": {"d_state": "16"}}, "d_state = '16' must be a positive integer"),
    ({"ssm_cfg": {"expand": 1.5}}, "expand = 1.5 must be a positive integer"),
    ({"ssm_cfg": {"expand": -1}}, "expand = -1 must be a positive integer"),
    ({"ssm_cfg": {"conv_bias": 1}}, "conv_bias = 1 must be true or false"),
    ({"tie_embeddings": "false"}, "tie_embeddings = 'false' must be true or false"),
    ({"ssm_cfg": [1]}, "must be an object"),
    ({"n_layer": 0}, "n_layer = 0"),
    ({"vocab_size": "many"}, "vocab_size = 'many'"),
    ({"tie_embedings": False}, "did you mean 'tie_embeddings'"),
    ({"vocab_size": 40}, r"embedding.weight has 48 rows.*which is 40"),
    ({"vocab_size": 45, "pad_vocab_size_multiple": 1}, r"has 48 rows.*which is 45"),
    ({"d_model": 32}, r"embeddings.weight is \[48, 16\] there, \[48, 32\] in the model.*and 19 more"),
    ({"n_layer": 3}, r"backbone.layers.2.*missing there"),
    ({"n_layer": 1}, r"backbone.layers.1.*no such parameter"),
]


@pytest.mark.parametrize(("change", "says"), CONFIG_FAULTS, ids=lambda value: str(value)[:40])
def test_faulty_original_config(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    write_folder(tmp_path / "m", OLD_CONFIG | change, original_tensors())
    with pytest.raises(UserError, match=says) as caught:
        load_model(tmp_path / "m")
    assert str(tmp_path / "m") in str(caught.value)
    with pytest.raises(UserError):
        convert(tmp_path / "m", tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


HF_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mamba2"}, "hidden_size \\* expand .* must equal num_heads"),
    ({"model_type": "llama"}, "not a Mamba"),
    ({"model_type": None}, "describes no Mamba"),
    ({"quantization_config": {"load_in_4bit": True}}, "quantised"),
    ({"num_hidden_layers": 3}, r"backbone.layers.2.*missing"),
    ({"num_hidden_layers": 1}, r"backbone.layers.1.*no such parameter"),
    ({"hidden_size": 32, "intermediate_size": 64}, r"in the model"),
    ({"vocab_size": 40}, r"\[48, 16\] there, \[40, 16\] in the model"),
    ({"hidden_size": "wide"}, "hidden_size"),
]


@pytest.mark.parametrize(("change", "says"), HF_FAULTS, ids=lambda value: str(value)[:40])
def test_faulty_hf_config(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    save_model(tiny_model(), tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(read_config(tmp_path / "m") | change))
    with pytest.raises(UserError, match=says) as caught:
        load_model(tmp_path / "m")
    assert str(tmp_path / "m") in str(caught.value)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_head_and_tie_must_agree(tmp_path: Path, kind: str) -> None:
    untied = original_tensors(tied=False)
    write_folder(tmp_path / "a", OLD_CONFIG, untied, kind)
    with pytest.raises(UserError, match=r"lm_head.weight differs from backbone.embedding.weight"):
        load_model(tmp_path / "a")
    del untied["lm_head.weight"]
    write_folder(tmp_path / "b", OLD_CONFIG | {"tie_embeddings": False}, untied, kind)
    with pytest.raises(UserError, match=r"tie_embeddings is false, but lm_head.weight is missing"):
        load_model(tmp_path / "b")
    save_model(tiny_model(tie_word_embeddings=False), tmp_path / "c")
    (tmp_path / "c" / "config.json").write_text(json.dumps(read_config(tmp_path / "c") | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match=r"lm_head.weight differs from backbone.embeddings.weight"):
        load_model(tmp_path / "c")


@pytest.mark.parametrize("layout", ["hf", "mamba-ssm"])
@pytest.mark.parametrize("kind", ["bin", "safetensors", "bin-shards", "safetensors-shards"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_truncated_weights_are_named(tmp_path: Path, layout: str, kind: str, keep: float) -> None:
    tensors, config = original_tensors(), OLD_CONFIG
    if layout == "hf":
        model = tiny_model(state_size=STATE)
        tensors, config = model.state_dict(), model.config.to_dict()
    folder = write_folder(tmp_path / "m", config, tensors, kind)
    load_model(folder)
    victim = sorted(file for file in folder.iterdir() if file.suffix in (".bin", ".safetensors"))[-1]
    victim.write_bytes(victim.read_bytes()[: int(keep * victim.stat().st_size)])
    with pytest.raises(UserError, match="cut off or damaged") as caught:
        load_model(folder)
    assert str(victim) in str(caught.value)
    victim.unlink()
    with pytest.raises(UserError, match="missing" if "shards" in kind else "no weights"):
        load_model(folder)


def test_folders_that_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny_model(), tmp_path / "model")

    def says(path: Any, pattern: str) -> None:
        with pytest.raises(UserError, match=pattern):
            load_model(path)

    says(tmp_path / "modle", r"no model folder.*did you mean .*model")
    monkeypatch.chdir(tmp_path)
    says("modle", "no model folder modle; did you mean model")
    says(str(tmp_path / "model" / "config.json"), "is a file")
    says(tmp_path, r"no config.json.*subfolders: model")
    (tmp_path / "empty").mkdir()
    says(tmp_path / "empty", "no config.json")
    bad = shutil.copytree(tmp_path / "model", tmp_path / "bad")
    (bad / "config.json").write_text('{"model_type": "mamba",\n oops}')
    says(bad, r"config.json:2:\d+: not valid JSON")
    (bad / "config.json").write_text("[1]")
    says(bad, "expected a JSON object, found list")
    (bad / "config.json").write_bytes(b"\xff\xfe\x00")
    says(bad, "not a text file")
    (bad / "model.safetensors").unlink()
    (bad / "adapter_config.json").write_text("{}")
    says(bad, "peft_type is None; LoRA and DoRA adapters can be read")


def test_weight_files_that_are_none(tmp_path: Path) -> None:
    for name, content, says in (
        ("list", [torch.zeros(1)], "expected a dictionary of tensors"),
        ("nested", {"state_dict": original_tensors()}, "expected a dictionary of tensors"),
        ("none", {}, "no weights of a model"),
        ("int8", {n: t.to(torch.int8) for n, t in original_tensors().items()}, "not of a floating-point type"),
        ("fp8", {n: t.to(torch.float8_e5m2) for n, t in original_tensors().items()}, "not of a floating-point type"),
        ("model", torch.nn.Linear(2, 2), "no plain dictionary of tensors"),
    ):
        folder = write_folder(tmp_path / name, OLD_CONFIG, original_tensors())
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(UserError, match=says):
            load_model(folder)
    shards = write_folder(tmp_path / "shards", OLD_CONFIG, original_tensors(), "bin-shards")
    for index in ("{}", '{"weight_map": {"lm_head.weight": 1}}'):
        (shards / "pytorch_model.bin.index.json").write_text(index)
        with pytest.raises(UserError, match="no weight_map"):
            load_model(shards)
    pointer = write_folder(tmp_path / "pointer", OLD_CONFIG, original_tensors(), "safetensors")
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        load_model(pointer)


def test_a_damaged_pickle_is_named_whatever_it_raises(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", OLD_CONFIG, original_tensors())
    whole = (folder / "pytorch_model.bin").read_bytes()
    start = whole.index(b"backbone.embedding.weight")
    for bad in (b"\xff" * 25, b"\x00" * 25, b"." * 25, b"R" * 25):  # not UTF-8, not a key, an early end, a call
        (folder / "pytorch_model.bin").write_bytes(whole[:start] + bad + whole[start + 25 :])
        with pytest.raises(UserError, match=r"pytorch_model.bin"):
            load_model(folder)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "attacked",)

    folder = write_folder(tmp_path / "m", OLD_CONFIG, original_tensors())
    torch.save({"backbone.embedding.weight": Attack()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin"):
        load_model(folder)
    assert not (tmp_path / "attacked").exists()


def test_old_torch_files_without_zip_are_read(tmp_path: Path) -> None:
    tensors = original_tensors()
    folder = write_folder(tmp_path / "m", OLD_CONFIG, tensors)
    expected = logits(load_model(folder))
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(logits(load_model(folder)), expected)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float23"}, "did you mean 'float"),
        ({"dtype": "double"}, "must be one of"),
        ({"dtype": torch.int8}, "torch.int8"),
        ({"torch_dtype": "bfloat16"}, "pass dtype='bfloat16'"),
        ({"device": "gpu"}, "'gpu' is unknown"),
        ({"device": f"cuda:{torch.cuda.device_count()}"}, "CUDA devices"),
    ],
)
def test_wrong_dtype_or_device(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    save_model(tiny_model(), tmp_path / "m")
    with pytest.raises(UserError, match=says):
        load_model(tmp_path / "m", **options)
