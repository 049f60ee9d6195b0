"""`mambalign doctor`: versions, devices, the backend of every op and why, and where data and models would come from."""

from __future__ import annotations

import os
import platform
import shutil
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any

import mambalign

REQUIRED = (
    "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "huggingface-hub", "peft",
    "tensorboard",
)  # fmt: skip
# What each adds here; none is needed for training on a CPU or one GPU.
OPTIONAL = {
    "cuda-bindings": "GPU kernels",
    "fla-core": "GPU kernels of Mamba-2's scan",
    "bitsandbytes": "8-bit optimizers, 4-bit weights",
    "wandb": "report_to: wandb",
    "openai": "judges with an OpenAI-compatible API",
    "scikit-learn": "length-controlled win rates",
    "fastapi": "serving",
    "trl": "parity tests",
    "mamba-ssm": "not used; its kernels are replaced by ours",
    "causal-conv1d": "not used; its kernels are replaced by ours",
}
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def diagnose() -> dict[str, dict[str, Any]]:
    """Everything `mambalign doctor` prints, by heading; plain values only."""
    return {
        "versions": _versions(REQUIRED) | {"python": platform.python_version(), "mambalign": mambalign.__version__},
        "optional": {name: f"{_version(name) or 'not installed'} ({what})" for name, what in OPTIONAL.items()},
        "machine": _machine(),
        "devices": _devices(),
        "backends": _backends(),
        "files": _files(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _versions(names: tuple[str, ...]) -> dict[str, Any]:
    return {name: _version(name) or "MISSING" for name in names}


def _machine() -> dict[str, Any]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": f"{usable} usable of {os.cpu_count()}",
        "torch_threads": torch.get_num_threads(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    return facts


def _devices() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"torch_built_for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"}
    if not torch.cuda.is_available():
        why = "this torch is a CPU build" if not torch.version.cuda else "no driver or no device is visible"
        facts["cuda"] = f"no ({why})"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        facts[f"cuda:{index}"] = (
            f"{device.name}, {device.total_memory / 1e9:.0f} GB, compute capability {device.major}.{device.minor}, "
            f"bfloat16 {'yes' if device.major >= 8 else 'slow'}"
        )
    if torch.backends.mps.is_available():
        facts["mps"] = "yes"
    return facts


def _backends() -> dict[str, Any]:
    import torch

    from mambalign.ops.backends import chosen_backends

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ops = {op: f"{name}: {reason}" for op, (name, reason) in chosen_backends("auto", device).items()}
    return ops | {"generation_on_a_cpu": _native_step()}


def _native_step() -> str:
    import torch

    from mambalign.ops import cpu_decode, native

    try:
        cpu_decode.compiled(torch.float32)
    except native.Unavailable as error:
        return f"eager: plain PyTorch's calls, since {error}; a C++ compiler makes it several times faster"
    return "native: Mamba-1's and Falcon-Mamba's step, compiled for this processor"


def hub_problem(seconds: float = 3.0) -> str | None:
    """Why the hub cannot be used, or None. One request: the hub's own client would try each file for half a minute."""
    offline = [name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON")]
    if offline:
        return f"switched off by {', '.join(offline)}"
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError:
        return None  # an answer, of whatever kind
    except (OSError, ValueError) as error:
        return f"{address} cannot be reached ({getattr(error, 'reason', error)})"
    return None


def _files() -> dict[str, Any]:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    existing = next(p for p in (home, *home.absolute().parents) if p.exists())
    problem = hub_problem()
    return {
        "hugging_face_home": f"{home}{'' if home.exists() else ' (not there yet)'}",
        "free_there_gb": round(shutil.disk_usage(existing).free / 1e9, 1),
        "free_here_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "hub": f"offline, {problem}: only what is cached can be used" if problem else "online",
    }
