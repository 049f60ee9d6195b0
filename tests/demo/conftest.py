"""One finished demo for all tests of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mambalign.demo import main


@pytest.fixture(scope="session")
def finished_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    main.run_demo(folder, quick=True)
    return folder
