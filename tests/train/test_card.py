"""A run on its way to the hub, with a hub that is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from mambalign.recipe import Recipe, UserError
from mambalign.train.run import run

Make = Callable[..., Recipe]


class Hub:
    """Remembers what is asked of it, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.refusal: Exception | None = None

    def __call__(self) -> Hub:
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        if self.refusal is not None:
            raise self.refusal
        self.calls.append(("create", options))
        return SimpleNamespace(repo_id=f"somebody/{repo_id}")

    def upload_folder(self, **options: Any) -> Any:
        assert any(name == "create" for name, _ in self.calls), "nothing to upload to"
        self.calls.append(("upload", options))
        return SimpleNamespace(add_done_callback=lambda report: None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    return hub


@pytest.mark.parametrize(("strategy", "uploads"), [("every_save", [3, 6, None]), ("end", [None])])
def test_a_run_is_pushed(strategy: str, uploads: list[int | None], hub: Hub, recipe: Make, tmp_path: Path) -> None:
    run("sft", recipe("sft", push_to_hub=True, hub_strategy=strategy, max_steps=6, hub_private_repo=True))
    sent = [options for name, options in hub.calls if name == "upload"]
    folders = [tmp_path / "sft" / f"checkpoint-{step}" if step else tmp_path / "sft" for step in uploads]
    assert [options["folder_path"] for options in sent] == folders
    assert {options["repo_id"] for options in sent} == {"somebody/sft"}
    assert all(options["private"] for name, options in hub.calls if name == "create")
    assert (tmp_path / "sft" / "README.md").is_file()


@pytest.mark.parametrize("kind", [OSError, huggingface_hub.errors.HTTPError])
def test_a_hub_that_refuses_says_so_before_training(
    kind: type[Exception], hub: Hub, recipe: Make, tmp_path: Path
) -> None:
    hub.refusal = kind("nobody there")
    with pytest.raises(UserError, match=r"push_to_hub: the hub refuses the repository \(nobody there\)"):
        run("sft", recipe("sft", push_to_hub=True))
    assert not list(tmp_path.glob("sft/checkpoint-*"))
