"""Model folders on disk: find them (local or hub), look into their weight files, replace them whole.

Nothing here knows Mamba. Every error names the file and the way out, because a wrong path, a cut-off download and a
full disk are the three things that happen to model folders.
"""

from __future__ import annotations

import difflib
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import errors, snapshot_download
from safetensors import SafetensorError, safe_open

from mambalign.recipe import UserError

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
TORCH_BIN = "pytorch_model.bin"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINED = "trained.safetensors"  # beside a checkpoint's adapter: what trains, as it is in memory
LINEAGE = "lineage.json"  # what a model or an adapter was made from
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")

_WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
_STAGING = ".incomplete-save"
_LFS_POINTER = b"version https://git-lfs"
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class TensorSpec(NamedTuple):
    """What a weight file says about one tensor, read without its data. dtype None: not a plain float type."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is meant as a folder here: it exists, or it cannot be a hub id ("name" or "owner/name")."""
    text = os.fspath(path)
    return os.path.exists(os.path.expanduser(text)) or text.startswith((".", "~", "/")) or text.count("/") > 1


def resolve_folder(path: str | os.PathLike[str], revision: str | None = None, **hub: Any) -> Path:
    """The local folder with `path`'s config.json and weights, or with its adapter (see `is_adapter`).

    A hub id is downloaded (or found in the cache) first.

    hub: `cache_dir`, `token`, `local_files_only`, `force_download`, as in transformers. Raises UserError.
    """
    # Every Mamba on the hub has an owner, so a bare name is a folder that is not there.
    if not is_local(path) and "/" in os.fspath(path):
        return _download(os.fspath(path), revision, hub)
    folder = Path(path).expanduser()
    if folder.is_file():
        raise UserError(f"{folder} is a file; a model is a folder with {CONFIG} and weights: give its folder")
    if not folder.is_dir():
        raise UserError(f"there is no model folder {folder}{_did_you_mean(folder)}")
    if not is_adapter(folder) and not (folder / CONFIG).is_file():
        inner = sorted(entry.parent.name for entry in folder.glob(f"[!.]*/{CONFIG}"))
        hint = f"; did you mean one of its subfolders: {', '.join(inner[-3:])}?" if inner else ""
        raise UserError(f"{folder} holds no {CONFIG}, so it is not a model folder (or saving it never finished){hint}")
    return folder


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter, and no weights of a model beside it."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    return not any(_WEIGHT_FILE.fullmatch(entry.name) for entry in folder.iterdir())


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; a UserError with line and column where it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}:{error.colno}: not valid JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a text file ({error.reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def weight_files(folder: Path, names: Iterable[str] = (SAFETENSORS, TORCH_BIN)) -> list[Path]:
    """The weight files of a model folder: of the first of `names` that is there, whole or sharded by an index."""
    for name in names:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = [folder / shard for shard in shard_names(index)]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise UserError(f"{index} names {len(files)} files, {len(missing)} missing: {', '.join(missing[:3])}")
            return files
    raise UserError(f"{folder} has a {CONFIG} but no weights ({' or '.join(names)}, whole or sharded)")


def shard_names(index: Path) -> list[str]:
    """The weight files that an index names, in order."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index}: no weight_map in it, so it cannot say which files hold the weights")
    return sorted(set(weight_map.values()))


def tensor_specs(files: Iterable[Path]) -> dict[str, TensorSpec]:
    """Name -> (dtype, shape) of every tensor in `files`, without reading their data.

    A file that is cut off or is no weight file at all raises a UserError that names it.
    """
    specs: dict[str, TensorSpec] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with _reading(file), safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    part = opened.get_slice(name)
                    specs[name] = TensorSpec(_SAFETENSORS_DTYPES.get(part.get_dtype()), tuple(part.get_shape()))
        else:
            for name, tensor in _load_torch_file(file, "meta").items():
                dtype = tensor.dtype if tensor.dtype in _SAFETENSORS_DTYPES.values() else None
                specs[name] = TensorSpec(dtype, tuple(tensor.shape))
    return specs


def read_tensors(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """Every tensor of `files` on the CPU, memory-mapped where the format allows."""
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with _reading(file), safe_open(file, framework="pt") as opened:
                tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        else:
            tensors.update(_load_torch_file(file, "cpu"))
    return tensors


@contextmanager
def replaced_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to write a model into; on leaving it without an error its files become `path`.

    A `path` that is not there appears by one rename, so it is whole or absent. In a folder that is empty, or holds a
    model already (or with `overwrite`, anything), the model's files are replaced one by one and everything else
    is kept: config.json is removed first and comes back last, so an interrupted replacement is never taken for a
    model. On an error (a full disk) the staging folder is removed and `path` is as it was.
    """
    target = Path(path).expanduser()
    if target.exists() and not target.is_dir():
        raise UserError(f"cannot save a model to {target}: a file of that name is in the way")
    exists = target.is_dir()
    if exists and not overwrite and not is_vacant(target) and not _is_replaceable(target):
        raise UserError(
            f"{target} is not empty and holds no model; it is left alone. "
            "Choose another folder, or pass overwrite=True to put the model beside its files"
        )
    # Nothing can be renamed onto ".", a link or a mount, so a folder that exists is filled from the inside.
    staging = target / _STAGING if exists else target.parent / f".{target.name}{_STAGING}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        for weights in staging.glob(f"*{Path(SAFETENSORS).suffix}"):
            shutil.copymode(staging / CONFIG, weights)  # safetensors writes for the owner alone, whatever the umask
        _flush(staging)
        if exists:
            _move_model_files(staging, target)
        else:
            os.replace(staging, target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"could not save to {target}: {error}. Nothing incomplete was left there") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def is_vacant(path: Path) -> bool:
    """Whether `path` is absent, or a folder with nothing in it but what a save that was killed left behind."""
    return not path.is_dir() or all(entry.name == _STAGING for entry in path.iterdir())


def _is_replaceable(folder: Path) -> bool:
    if (folder / _STAGING).is_dir():  # a replacement was interrupted here
        return True
    return (folder / CONFIG).is_file() and any(_WEIGHT_FILE.fullmatch(entry.name) for entry in folder.iterdir())


def _move_model_files(staging: Path, target: Path) -> None:
    (target / CONFIG).unlink(missing_ok=True)
    for entry in target.iterdir():
        if _WEIGHT_FILE.fullmatch(entry.name) or entry.name == "generation_config.json":
            entry.unlink()
    # The config goes last: it is what makes the folder a model.
    for entry in sorted(staging.iterdir(), key=lambda entry: entry.name == CONFIG):
        if entry.is_dir():  # a tokenizer with several chat templates
            shutil.rmtree(target / entry.name, ignore_errors=True)
        os.replace(entry, target / entry.name)


def _flush(folder: Path) -> None:
    """Push the files to the disk, so that the rename cannot survive a power cut that the data did not."""
    for entry in (*folder.iterdir(), folder):
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except pickle.UnpicklingError as error:  # torch's own text advises to load it all the same
        raise _damaged(file, "it is no plain dictionary of tensors") from error
    except Exception as error:  # a damaged pickle fails with whatever its bytes happen to mean
        raise _damaged(file, str(error).strip() or type(error).__name__) from error


def _damaged(file: Path, reason: str) -> UserError:
    with file.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return UserError(f"{file} is only a Git LFS pointer to the weights; run `git lfs pull` in its folder")
    return UserError(
        f"{file} ({file.stat().st_size:,} bytes) cannot be read as weights: {reason.splitlines()[0]}. "
        "It is cut off or damaged; copy or download it again, or use an earlier checkpoint"
    )


def _load_torch_file(file: Path, device: str) -> dict[str, torch.Tensor]:
    with file.open("rb") as opened:
        starts_as_zip = opened.read(2) == b"PK"
    is_zip = zipfile.is_zipfile(file)  # looks at the end, where the archive's directory is
    if starts_as_zip and not is_zip:
        raise _damaged(file, "the end of the archive is missing")
    with _reading(file):
        # Files older than torch 1.6 are no zip archives and cannot be memory-mapped.
        content = torch.load(file, map_location=device, weights_only=True, mmap=is_zip)
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{file}: expected a dictionary of tensors (a state dict) and found something else")
    return content


def _download(name: str, revision: str | None, hub: dict[str, Any]) -> Path:
    folder = snapshot(name, revision, hub, (CONFIG, ADAPTER_CONFIG, "generation_config.json"))
    if is_adapter(folder):
        return snapshot(name, folder.name, hub, (ADAPTER_CONFIG, ADAPTER_WEIGHTS, LINEAGE))
    if not (folder / CONFIG).is_file():
        raise UserError(f"{name} on the hub holds no {CONFIG}, so it is not a model")
    for weights in (SAFETENSORS, TORCH_BIN):
        stem, ending = weights.split(".")
        # The folder is named by its commit: all files are of one version.
        snapshot(name, folder.name, hub, (CONFIG, weights, f"{weights}.index.json", f"{stem}-*-of-*.{ending}"))
        if (folder / weights).is_file() or (folder / f"{weights}.index.json").is_file():
            return folder
    raise UserError(f"{name} on the hub has no weights in {SAFETENSORS} or {TORCH_BIN}")


def snapshot(name: str, revision: str | None, hub: dict[str, Any], wanted: Iterable[str]) -> Path:
    """The local folder with those `wanted` files (names or patterns) that the hub repository has.

    The hub is asked once however many they are: without a network the answer, or what the cache holds, comes at once.
    """
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted), **hub))
    except (errors.HTTPError, OSError, ValueError) as error:  # type: ignore[attr-defined]
        raise UserError(
            f"{name} is not a folder here, and a hub repository of that name could not be read: "
            f"{' '.join(str(error).split())} Without a network, download it where there is one and give the path of "
            "its folder"
        ) from error


def fetch(name: str, file: str, revision: str | None, hub: dict[str, Any]) -> Path | None:
    """One file of a hub repository through the cache; None where the repository has none of that name."""
    found = snapshot(name, revision, hub, (file,)) / file
    return found if found.is_file() else None


def _did_you_mean(folder: Path) -> str:
    siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, siblings, n=1)
    return f"; did you mean {folder.parent / near[0]}?" if near else ""
