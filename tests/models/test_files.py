"""Saving a model: it appears whole or not at all, and nothing that is not a model is touched."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig

from mambalign.models.checkpoint import convert, load_model, save_model
from mambalign.models.files import replaced_folder
from mambalign.models.mamba import MambaForCausalLM
from mambalign.recipe import UserError


def tiny_model(layers: int = 2) -> Any:
    return MambaForCausalLM(MambaConfig(vocab_size=48, hidden_size=16, num_hidden_layers=layers, state_size=4)).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])).logits


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("words")
    with pytest.raises(UserError, match="holds no model"):
        save_model(tiny_model(), tmp_path / "thesis")
    assert [file.name for file in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    save_model(tiny_model(), tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "words"
    load_model(tmp_path / "thesis")
    with pytest.raises(UserError, match="a file of that name"):
        save_model(tiny_model(), tmp_path / "thesis" / "chapter.tex")
    with pytest.raises(UserError, match="not empty"):
        convert(tmp_path / "thesis", tmp_path / "thesis", "mamba-ssm")
    with pytest.raises(UserError, match="layout 'ssm' is unknown"):
        save_model(tiny_model(), tmp_path / "x", layout="ssm")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["here", "link", "after a kill"])
def test_an_empty_folder_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Also one that nothing can be renamed onto, as a mounted one in a container; `link` stands for it."""
    source, model = tmp_path / "source", tiny_model()
    save_model(model, source)
    empty = tmp_path / "empty"
    empty.mkdir()
    target = {"here": Path("."), "link": tmp_path / "link", "after a kill": empty}[kind]
    if kind == "here":
        monkeypatch.chdir(empty)
    elif kind == "link":
        target.symlink_to(empty)
    else:
        (empty / ".incomplete-save").mkdir()
    convert(source, target, "mamba-ssm")
    assert torch.equal(logits(load_model(target)), logits(model))
    assert {file.name for file in empty.iterdir()} >= {"config.json", "pytorch_model.bin"}
    assert not (empty / ".incomplete-save").exists()


def test_replacing_a_model_leaves_no_stale_weights(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "m", max_shard_size="8KB")
    (tmp_path / "m" / "notes.txt").write_text("kept")
    save_model(model, tmp_path / "m", layout="mamba-ssm")
    assert {file.name for file in (tmp_path / "m").iterdir()} == {"config.json", "pytorch_model.bin", "notes.txt"}
    save_model(model, tmp_path / "m")
    assert {file.name for file in (tmp_path / "m").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
    }
    assert torch.equal(logits(load_model(tmp_path / "m")), logits(model))


@pytest.mark.parametrize("layout", ["hf", "mamba-ssm"])
@pytest.mark.parametrize("there", ["absent", "empty", "model"])
def test_a_disk_that_fills_up(tmp_path: Path, layout: Any, there: str) -> None:
    """The kernel refuses files over 16 KB, as a full disk would in the middle of the weights."""
    small, large = tiny_model(), tiny_model(layers=6)
    target = tmp_path / "m"
    if there == "empty":
        target.mkdir()
    elif there == "model":
        save_model(small, target)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, before[1]))
    try:
        with pytest.raises(UserError, match=r"could not save to .*Nothing incomplete was left"):
            save_model(large, target, layout=layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if there == "model":
        assert torch.equal(logits(load_model(target)), logits(small))
    else:
        assert target.exists() == (there == "empty")
    assert [file.name for file in tmp_path.iterdir()] == ([] if there == "absent" else ["m"])
    save_model(large, target, layout=layout)
    assert torch.equal(logits(load_model(target)), logits(large))


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_replacement_that_was_killed_is_no_model_and_can_be_redone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    target = save_model(tiny_model(), tmp_path / "m")

    replace, moves = os.replace, iter(range(moved))

    def killed(*names: Any) -> None:
        if next(moves, None) is None:
            raise KeyboardInterrupt
        replace(*names)

    with monkeypatch.context() as patch:
        patch.setattr("mambalign.models.files.os.replace", killed)
        patch.setattr("mambalign.models.files.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            save_model(tiny_model(), target)
    assert not (target / "config.json").exists()
    with pytest.raises(UserError, match="saving it never finished"):
        load_model(target)
    model = tiny_model()
    save_model(model, target)
    assert torch.equal(logits(load_model(target)), logits(model))
    assert not list(target.glob(".*"))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_weights_have_the_mode_that_the_umask_gives(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        save_model(tiny_model(), tmp_path / "m")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "m").iterdir()} == {mode}


def test_folders_inside_are_replaced_too(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with replaced_folder(tmp_path / "m") as staging:
            save_model(tiny_model(), staging)
            (staging / "additional_chat_templates").mkdir()
            (staging / "additional_chat_templates" / "tools.jinja").write_text(content)
        assert (tmp_path / "m" / "additional_chat_templates" / "tools.jinja").read_text() == content
