"""Pipelines without files: recipes are read by a stand-in unless a test wants real ones."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mambalign.cluster.pipeline import RecipeFacts

HTCONDOR = "htcondor==24.0.24"


def fake_recipe(kind: str, path: str, overrides: Mapping[str, Any]) -> RecipeFacts:
    """A recipe of 16 rows a step, 2 a device, that starts from hub/base and writes out/KIND."""
    if path.startswith("nowhere"):
        raise ValueError(f"recipe {path} does not exist")

    def accumulation(devices: int) -> int:
        if 16 % (2 * devices):
            raise ValueError(f"global_batch_size 16 is not a multiple of 2 x {devices} device(s)")
        return 16 // (2 * devices)

    return RecipeFacts(
        text=f"# {kind}\n",
        output_dir=str(overrides.get("output_dir", f"out/{kind}")),
        model=str(overrides.get("model_name_or_path", "hub/base")),
        inputs=(f"data/{kind}",),
        fixed_batch="accumulating" not in path,
        accumulation=accumulation,
    )


def chain(**changes: Any) -> dict[str, Any]:
    """sft -> dpo -> eval, as a pipeline's map."""
    stages = {
        "sft": {"recipe": "sft/recipe.yaml"},
        "dpo": {"recipe": "dpo/recipe.yaml", "model": "sft"},
        "eval": {
            "command": "judge ${dpo.output_dir} --out out/eval",
            "output_dir": "out/eval",
            "resources": {"gpus": 1},
        },
    }
    resources = {"gpus": "1-4", "cpus": 8, "memory": "64GB", "gpu_memory": "38GB", "gpu_capability": 8.0,
                 "disk": "60GB", "time": "4h", "slice": "30m"}  # fmt: skip
    return {"name": "chain", "resources": resources, "env": {"NAME": 'it\'s "me"'}, "stages": stages} | changes


def on_a_leash(folder: Path) -> Path:
    """A program to name as the cluster's Python: `mambalign VERB` goes as far as VERB.leash in this folder says."""
    program = folder / "python-on-a-leash"
    program.write_text(
        f"#!/bin/bash\npython={shlex.quote(sys.executable)} folder={shlex.quote(str(folder))}\n"
        '[ "$1 $2" = "-m mambalign" ] && exec "$python" -m tests.train.leash "$folder/$3.leash" "${@:3}"\n'
        'exec "$python" "$@"\n'
    )
    program.chmod(0o755)
    return program


@pytest.fixture(scope="session")
def htcondor_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with HTCondor's Python bindings, which expand and check submit files without any daemon."""
    folder = tmp_path_factory.mktemp("htcondor")
    words = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    done = subprocess.run([*words, "--target", str(folder), HTCONDOR], capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"{HTCONDOR} cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
    return folder
