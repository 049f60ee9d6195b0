"""Reference log-probs: computed once, from the initial weights, kept under a hash of all they depend on.

No second model is held in memory and no prompt is read twice. The pass is cut into parts of a few hundred pairs; each
is written when it is done, so an interrupted pass goes on where it stopped, and is checked against its own hash on
reuse.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from mambalign.data.packing import Collator, PackedRows
from mambalign.recipe import UserError
from mambalign.train.asking import target_logps
from mambalign.train.objectives import sequence_sums
from mambalign.train.preemption import Preemption

logger = logging.getLogger("mambalign")

PART = 256  # pairs in a part: a kill loses at most this many


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over every parameter's name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.state_dict().items()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_key(**facts: Any) -> str:
    """Hash of everything the log-probs depend on beyond rounding: weights, data, precision."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def reference_logps(
    model: nn.Module,
    rows: PackedRows,
    *,
    folder: Path,
    key: str,
    max_tokens: int | None,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    preemption: Preemption,
    description: str = "reference log-probs",
) -> Tensor:
    """fp32 `[N, 2]`: log-probs of chosen and rejected of pair i under `model`, from the cache where it holds them.

    Args:
        rows: pairs, in dataset order (`group_by_prompt=False`).
        folder: where parts are kept, in a sub-folder named by the key.
        key: see `cache_key`. max_tokens: bound of a forward pass.
    """
    store = folder / key[:16]
    store.mkdir(parents=True, exist_ok=True)
    collator = Collator("pairs", max_tokens)
    was_training = model.training
    model.eval()
    ranges = [range(start, min(start + PART, len(rows))) for start in range(0, len(rows), PART)]
    paths = [store / f"part-{number:05d}.safetensors" for number in range(len(ranges))]
    parts = [_read(path, key, len(indices)) for path, indices in zip(paths, ranges, strict=True)]
    missing = [number for number, part in enumerate(parts) if part is None]
    processes = PartialState()
    processes.wait_for_everyone()  # all have seen the same parts
    for number in _progress(missing[processes.process_index :: processes.num_processes], description):
        if preemption.reason is not None:
            break  # the parts so far are kept
        part = _compute(model, rows, ranges[number], collator, device, autocast)
        _write(paths[number], key, part)
    processes.wait_for_everyone()
    preemption.check(f"computing {description}")
    for number in missing:
        parts[number] = _read(paths[number], key, len(ranges[number]))
    model.train(was_training)
    reused = sum(len(indices) for number, indices in enumerate(ranges) if number not in missing)
    if reused:
        logger.info("%s: %d of %d pairs verified and reused from %s", description, reused, len(rows), store)
    whole = [part for part in parts if part is not None]
    assert len(whole) == len(parts), "a part that was just written cannot be read"
    return torch.cat(whole) if whole else torch.zeros(0, 2)


def _progress(steps: Sequence[int], description: str) -> Iterator[int]:
    return iter(hf_logging.tqdm(steps, desc=description, disable=len(steps) < 2))


@torch.no_grad()
def _compute(
    model: nn.Module,
    rows: PackedRows,
    indices: range,
    collator: Collator,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Tensor:
    part = torch.zeros(len(indices), 2)
    for batch in collator([rows[i] for i in indices]):
        batch = batch.to(device)
        assert batch.pairs is not None
        with autocast():
            logps = target_logps(model, batch)
        sums, _ = sequence_sums(logps, batch.target_sequence, batch.num_sequences)
        part[batch.indices - indices.start] = sums[batch.pairs].float().cpu()
    return part


def _digest(part: Tensor) -> str:
    return hashlib.sha256(part.numpy().tobytes()).hexdigest()


def _write(path: Path, key: str, part: Tensor) -> None:
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.write_bytes(save({"logps": part}, metadata={"key": key, "sha256": _digest(part)}))
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written ({error}); free space there and run again: the parts before it are kept"
        ) from error
    os.replace(beside, path)


def _read(path: Path, key: str, count: int) -> Tensor | None:
    """A part whose content matches what it says of itself; None (and a word why) if it is not there or damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            facts, part = file.metadata() or {}, file.get_tensor("logps")
    except (SafetensorError, OSError) as error:
        logger.warning("%s cannot be read (%s): computing it again", path, error)
        return None
    if facts.get("key") != key or facts.get("sha256") != _digest(part) or part.shape != (count, 2):
        logger.warning("%s does not match its own hash: computing it again", path)
        return None
    return part
