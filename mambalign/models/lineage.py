"""What a model was made from: `lineage.json` in every run folder, checkpoint and merged model.

`model`, `revision`: what the run was given. `base`: the whole model under it (for a run on an adapter, the one that
the adapter is for) by the hash of its weights. `adapter`: the hash of the adapter it started from. `token_ids`: what
the model ends and pads with. `from`: the lineage of what it was given, and so on to the beginning.

An adapter is loaded onto the weights it was trained on, or not at all.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from mambalign.models import files, original
from mambalign.models.checkpoint import carry_files, load_model, probe_logits, write_hf
from mambalign.recipe import Recipe, UserError
from mambalign.support import sha256_file, write_json

if TYPE_CHECKING:  # PEFT takes seconds to import
    from mambalign.models.lora import AdapterState

logger = logging.getLogger("mambalign")


def read(folder: Path) -> dict[str, Any]:
    """What a model or adapter was made from, as its folder says; empty where it does not."""
    return files.read_json(folder / files.LINEAGE) if (folder / files.LINEAGE).is_file() else {}


def weights_hash(path: str | os.PathLike[str], revision: str | None = None, **hub: Any) -> str:
    """SHA-256 of a model's weights as they lie on disk: the same in both layouts and in any float type that holds them.

    Over every tensor's Hugging Face name, shape and float32 values (float64 stays), a tied head left out.
    """
    folder = files.resolve_folder(path, revision, **hub)
    if files.is_adapter(folder):
        raise UserError(f"{path} is an adapter, not a whole model")
    raw = files.read_json(folder / files.CONFIG)
    if original.is_original(raw):
        weights = files.weight_files(folder, (files.TORCH_BIN, files.SAFETENSORS))
        tensors = original.to_hf_state_dict(files.read_tensors(weights), raw, weights[0])
    else:
        tensors = files.read_tensors(files.weight_files(folder))
        # As transformers' own loading: early conversions have the original name.
        tensors = {k.replace(original.EMBEDDING, "backbone.embeddings.weight"): v for k, v in tensors.items()}
    head, embedding = tensors.get(original.HEAD), tensors.get("backbone.embeddings.weight")
    if head is not None and embedding is not None and torch.equal(head, embedding):
        del tensors[original.HEAD]
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(exact.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def record(recipe: Recipe, stage: str, config: Any) -> dict[str, Any]:
    """The lineage of a run of `recipe`. config: the model's, with the rows and the ids that added tokens brought."""
    path = str(recipe.model_name_or_path)
    folder = files.resolve_folder(path, recipe.model_revision)
    commit = recipe.model_revision if files.is_local(path) else folder.name
    before = read(folder)
    base: dict[str, Any] = {"path": path, "revision": commit}
    adapter = None
    if files.is_adapter(folder):
        adapter = sha256_file(folder / files.ADAPTER_WEIGHTS)
        named = files.read_json(folder / files.ADAPTER_CONFIG)
        base = {"path": named["base_model_name_or_path"], "revision": named.get("revision")}
    base["weights"] = before.get("base", {}).get("weights") if adapter else None
    base["weights"] = base["weights"] or weights_hash(base["path"], base["revision"])
    return {
        "stage": stage,
        "model": path,
        "revision": commit,
        "base": base | {"vocab_size": config.vocab_size},
        "adapter": adapter,
        "token_ids": {name: getattr(config, name) for name in ("eos_token_id", "pad_token_id")},
        "recipe": {key: value for key, value in recipe.to_dict().items() if value != getattr(Recipe(), key)},
        "from": before or None,
    }


def check_resumed(checkpoint: Path, now: dict[str, Any]) -> None:
    """UserError if a checkpoint was made from other weights than those the run would start from today."""
    then = read(checkpoint)
    for key in ("adapter", "weights") if then else ():
        held, found = (line["adapter"] if key == "adapter" else line["base"]["weights"] for line in (then, now))
        if held != found:
            raise UserError(
                f"resume: {checkpoint} was made from {then['model']} ({str(held)[:12]}), and {now['model']} holds "
                f"other weights now ({str(found)[:12]}); put the old ones back, or pass --resume never to set the run "
                "aside and start afresh"
            )


def steps(lineage: dict[str, Any]) -> list[dict[str, Any]]:
    """The lineage as a list, the latest stage first."""
    found = []
    line: dict[str, Any] | None = lineage
    while line:
        found.append(line)
        line = line.get("from")
    return found


def load_adapter(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    base: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, AdapterState]:
    """The base model of a PEFT adapter with the adapter on it, frozen and not merged; and what was read.

    base: the base model where it is not (or no longer) at the path that the adapter names. kwargs: of `load_model`.

    Raises UserError: the base's weights are not those that the adapter's `lineage.json` says it was trained on, and
    all that `load_model` and `adapters.read` raise.
    """
    from mambalign.models import lora
    from mambalign.models.adapters import stack

    hub = {key: kwargs[key] for key in files.HUB_OPTIONS if key in kwargs}
    folder = files.resolve_folder(path, revision, **hub)
    state = lora.read(folder)
    where = base or state.config.get("base_model_name_or_path")
    if not where:
        raise UserError(f"{folder / files.ADAPTER_CONFIG} names no base_model_name_or_path; give the base model's")
    pinned = None if base else state.config.get("revision")
    line = read(folder)
    record = line.get("base", {})
    try:
        found = weights_hash(where, pinned, **hub)
    except UserError as error:
        raise UserError(f"the base model of the adapter {path}: {error}") from error
    if not record.get("weights"):
        logger.warning("%s does not say which weights it was trained on: %s is taken at its word", path, where)
    elif record["weights"] != found:
        raise UserError(
            f"the adapter {path} was trained on {record['path']} (weights {record['weights'][:12]}), and {where} holds "
            f"other weights ({found[:12]}); give it the base model it was trained on"
        )
    model = load_model(where, dtype=dtype, revision=pinned, **kwargs)
    rows = record.get("vocab_size", model.config.vocab_size)
    if rows > model.config.vocab_size:  # tokens were added, and the new rows come with the adapter
        model.resize_token_embeddings(rows, mean_resizing=False)
    for config in (model.config, model.generation_config):
        for name, value in line.get("token_ids", {}).items():
            setattr(config, name, value)
    stack(model, state)
    return model, state


@dataclass(frozen=True)
class MergeReport:
    """What `merge_adapter` did and proved: logits before merging and as written are this far apart at most."""

    source: str
    base: str
    destination: str
    max_abs_logit_difference: float
    bytes: int
    notes: tuple[str, ...] = ()


def merge_adapter(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    **hub: Any,
) -> MergeReport:
    """Put the adapter `src` into its base model and write the result as the new folder `dst`, with its tokenizer.

    In float32, and into the base model's own weights, also where the adapter was trained on quantised ones. Before
    `dst` appears, what was written is loaded again and its logits on random ids are compared with those of the base
    model with the adapter on it. base: see `load_adapter`. Raises UserError (and leaves no `dst`) where `src` is no
    adapter, `dst` is not empty, or the comparison fails.
    """
    from mambalign.models.adapters import merge

    folder, target = files.resolve_folder(src, **hub), Path(dst).expanduser()
    if not files.is_adapter(folder):
        raise UserError(f"{src} is a whole model, no adapter: there is nothing to merge")
    if not files.is_vacant(target):
        raise UserError(f"{target} is not empty; merge writes a new folder, give another name")
    model, state = load_adapter(src, base=base, **hub)
    before = probe_logits(model)
    model = merge(model)
    notes = []
    if state.base_is_tied and not original.is_tied(model):
        notes.append("embedding and head are two matrices now (tie_word_embeddings false): the adapter moved one")
    came = read(folder)
    if {"load_in_4bit", "load_in_8bit"} & came.get("recipe", {}).keys():
        notes.append("trained on quantised weights, merged into the full ones: training saw logits a little different")
    with files.replaced_folder(target) as staging:
        write_hf(model, staging)
        for parameter in model.parameters():  # the two models need not be in memory together
            parameter.data = torch.empty(0)
        difference = (probe_logits(load_model(staging)) - before).abs().max().item()
        if not difference <= 1e-5 * max(1.0, before.abs().max().item()):  # also when it is NaN
            raise UserError(f"{src}: the logits after merging differ by {difference:.3g} (or are not finite)")
        carry_files(src, staging, **hub)
        if came:
            line = {"stage": "merge", "model": os.fspath(src), "from": came}
            line = {"revision": None, "base": came["base"], "adapter": came["adapter"], "recipe": {}} | line
            write_json(staging / files.LINEAGE, line)
        size = sum(file.stat().st_size for file in files.weight_files(staging))
    where = os.fspath(base or state.config["base_model_name_or_path"])
    return MergeReport(os.fspath(src), where, str(target), difference, size, tuple(notes))
