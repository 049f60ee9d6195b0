"""What every test gets: fixed seeds, one torch thread a worker, no network, and real data where there is some."""

from __future__ import annotations

import atexit
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before any import of the Hugging Face libraries, which read these once: no test may reach a hub or a user's cache.
_CACHE = tempfile.mkdtemp(prefix="mambalign-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ.update(HF_HOME=_CACHE, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.pop("HF_DATASETS_CACHE", None)
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker, for the subprocesses of tests too
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DEFAULT = ("data/sft", "data/dpo", "data/text", "data/tokenizer")
SHARED_MISSING = "shared data missing"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shared",
        type=Path,
        default=REPOSITORY.parent / "shared",
        help="folder of the real data that some tests need (default: shared/ beside the repository)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say aloud what did not run: a green line over skipped tests must not look like a full run."""
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", []) if report.longrepr]
    lacking = [reason for reason in reasons if SHARED_MISSING in reason]
    if lacking:
        terminalreporter.section("real data", sep="-", yellow=True)
        terminalreporter.write_line(f"{len(lacking)} tests skipped for lack of shared data:")
        for reason in sorted(set(lacking)):
            terminalreporter.write_line(f"  {lacking.count(reason)} x {reason.removeprefix('Skipped: ')}")
    for reason in sorted({reason for reason in reasons if "chromium" in reason or "CUDA devices" in reason}):
        terminalreporter.write_line(f"{reasons.count(reason)} x {reason.removeprefix('Skipped: ')}")
    if not torch.cuda.is_available():
        terminalreporter.write_line("tests marked gpu: left out, no CUDA device here")


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Every test starts from the same random state and leaves torch's settings and our log's level as it found them."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dtype, threads, grad = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    log, level = logging.getLogger("mambalign"), logging.getLogger("mambalign").level
    yield
    log.setLevel(level)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)
    torch.use_deterministic_algorithms(strict, warn_only=warn_only)


@pytest.fixture
def shared_data(request: pytest.FixtureRequest) -> Path:
    """The shared data root. Skips, naming what is missing, unless all of SHARED_DEFAULT (or of the test's
    ``@pytest.mark.shared("data/sft/x.jsonl", ...)``) is there."""
    root: Path = request.config.getoption("--shared").resolve()
    marker = request.node.get_closest_marker("shared")
    needed = marker.args if marker else SHARED_DEFAULT
    missing = [name for name in needed if not (root / name).exists()]
    if missing:
        pytest.skip(f"{SHARED_MISSING}: no {', '.join(missing)} under {root} (put them there or say --shared PATH)")
    return root


@pytest.fixture
def repository() -> Path:
    """The root of the checkout, where recipes/ and docs/ are."""
    return REPOSITORY
