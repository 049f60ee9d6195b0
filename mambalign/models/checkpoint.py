"""Checkpoints in and out: one loader for both layouts, one writer for both, a converter that proves its work.

"hf" is transformers' layout (`MambaForCausalLM`, `FalconMambaForCausalLM`, `Mamba2ForCausalLM`), "mamba-ssm" the
original state-spaces one (see `original.py`). Loading never leaves a parameter to chance: what is missing, left over
or of another shape is an error. What is written appears whole or not at all (see `files.replaced_folder`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mambalign.models import files, original
from mambalign.models.mamba import FAMILIES, FP32_PARAMETERS, model_class
from mambalign.models.mamba2 import GATE_FIRST, gated_norm
from mambalign.models.reward import is_reward_config, reward_class
from mambalign.recipe import UserError

Layout = Literal["hf", "mamba-ssm"]
Head = Literal["lm", "reward"]
LAYOUTS: tuple[Layout, ...] = ("hf", "mamba-ssm")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_CARRIED_FILES = (
    *_TOKENIZER_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_READ_FILES = (*_CARRIED_FILES, files.CONFIG, "additional_chat_templates/*.jinja")  # the config may name the class


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    device: str | torch.device | None = None,
    head: Head = "lm",
    **hf_kwargs: Any,
) -> PreTrainedModel:
    """Load a Mamba-1, Falcon-Mamba or Mamba-2 from a folder or hub id, in the Hugging Face or the original layout.

    Returns our class (a subclass of the transformers one), in eval mode on `device` (default: CPU). A folder with a
    PEFT adapter is loaded as its base model with the adapter merged into it, in float32 (see `lineage.load_adapter`).
    dtype: of the weights; "auto" keeps the stored one (the widest, if several). `A_log`, `D` and the bias of the step
    sizes are float32 with any half dtype. head: "lm" for a language model, "reward" for a reward model (see
    `reward.py`); the other kind is refused. hf_kwargs go to `from_pretrained` (`cache_dir`, `token`, ...).

    Raises UserError: no such folder or hub model, not a Mamba, an adapter on another base than it was trained on, a
    quantised checkpoint, damaged files, a model with the other head, and any parameter missing from the weights,
    unknown to the model or of another shape.

    >>> model = load_model("state-spaces/mamba-130m")  # doctest: +SKIP
    """
    if "torch_dtype" in hf_kwargs:
        raise UserError(f"torch_dtype is called dtype now: pass dtype={hf_kwargs['torch_dtype']!r}")
    wanted = _dtype(dtype)
    hub = {key: hf_kwargs.pop(key) for key in files.HUB_OPTIONS if key in hf_kwargs}
    folder = files.resolve_folder(path, revision, **hub)
    if files.is_adapter(folder):
        from mambalign.models.adapters import merge  # PEFT takes seconds to import
        from mambalign.models.lineage import load_adapter

        model = merge(load_adapter(path, revision=revision, **hub, **hf_kwargs)[0])
        model.name_or_path = os.fspath(path)
        return model.to(device=None if device is None else _device(device), dtype=wanted)
    raw = files.read_json(folder / files.CONFIG)
    _check_head(path, raw, head)
    if original.is_original(raw):
        model = _load_original(folder, raw, wanted, hf_kwargs)
    else:
        model = _load_hf(folder, raw, wanted, hf_kwargs)
    model.config._name_or_path = model.name_or_path = os.fspath(path)
    return model if device is None else model.to(_device(device))


def load_tokenizer(path: str | os.PathLike[str], *, revision: str | None = None, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or hub repository. UserError where there is none, as in every original checkpoint."""
    advice = (
        "the original Mamba checkpoints come without one and use GPT-NeoX's: set "
        "tokenizer_name_or_path: EleutherAI/gpt-neox-20b (or the path of a folder with that tokenizer)"
    )
    if files.is_local(path):
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise UserError(f"there is no tokenizer folder {folder}")
    else:
        try:
            folder = files.snapshot(os.fspath(path), revision, hub, _READ_FILES)
        except UserError as error:
            raise UserError(f"{error}; {advice}") from error
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"{path} holds no tokenizer; {advice}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # tokenizers raises bare Exception for a file it cannot parse, so nothing narrower will do.
    except Exception as error:
        raise UserError(f"the tokenizer of {path} cannot be read: {' '.join(str(error).split())}") from error
    tokenizer.name_or_path = os.fspath(path)
    return tokenizer


def save_model(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    layout: Layout = "hf",
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    weights: Literal["bin", "safetensors"] | None = None,
) -> Path:
    """Write `model` (and `tokenizer`) to the folder `path`, whole or not at all; returns it.

    layout "hf": what plain transformers and vLLM load (safetensors). "mamba-ssm": what `mamba_ssm` loads
    (`weights="bin"`, the default there; "safetensors" is for other readers), with lm_head.weight even where tied.
    A folder that holds another model is replaced file by file, other files in it stay; one that holds anything else
    is refused unless `overwrite`. Raises UserError also for a full disk, leaving nothing that looks complete.
    """
    _check_layout(layout)
    if layout == "hf" and weights == "bin":
        raise UserError("the hf layout is written as safetensors; leave weights= out")
    if layout == "mamba-ssm":
        if is_reward_config({"architectures": [type(model).__name__]}):
            raise UserError("mamba_ssm knows no reward models; save it in the hf layout")
        original.to_original_config(model)  # refuse before anything is touched
    with files.replaced_folder(path, overwrite=overwrite) as staging:
        if layout == "hf":
            write_hf(model, staging)
        else:
            original.write_original(model, staging, weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
    return Path(path).expanduser()


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did and proved: all parameters bit-identical, logits on random ids this far apart at most."""

    source: str
    destination: str
    layout: Layout
    max_abs_logit_difference: float
    tensors: int
    bytes: int
    notes: tuple[str, ...] = ()


def convert(src: str | os.PathLike[str], dst: str | os.PathLike[str], to: Layout, **hub: Any) -> ConversionReport:
    """Rewrite the model `src` in the layout `to` as the new folder `dst`, with its tokenizer files if it has any.

    Before `dst` appears, what was written is loaded again and compared with `src` in float32: every parameter bit for
    bit, and the logits of random token ids. original -> hf -> original gives back every tensor, dtype and config
    entry. Raises UserError (and leaves no `dst`) where `dst` is not empty, or `to` cannot express the model, or the
    comparison fails.
    """
    _check_layout(to)
    target = Path(dst).expanduser()
    if not files.is_vacant(target):
        raise UserError(f"{target} is not empty; convert writes a new folder, give another name")
    model = load_model(src, dtype="auto", **hub)
    with files.replaced_folder(target) as staging:
        if to == "hf":
            write_hf(model, staging)
        else:
            original.write_original(model, staging, as_it_came=True)
        difference = _prove_equal(model, staging, src)
        carry_files(src, staging, **hub)
        written = files.weight_files(staging)
        report = ConversionReport(
            source=os.fspath(src),
            destination=str(target),
            layout=to,
            max_abs_logit_difference=difference,
            tensors=len(files.tensor_specs(written)),
            bytes=sum(file.stat().st_size for file in written),
            notes=_notes(staging, written, to),
        )
    return report


def add_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pad_to_multiple_of: int = 8,
    new_ids: int | Iterable[int] = (),
) -> int:
    """Give every token of `tokenizer` a usable row in the embedding and the head; returns by how many rows they grew.

    new_ids: the ids that the tokenizer just got, or how many it got at its end. Their rows, which may be padding that
    the checkpoint already has (50277 tokens, 50280 rows), become the mean of the trained rows, and so do all rows that
    are added. Rows are added only where the tokenizer needs them, up to a multiple of `pad_to_multiple_of`, and never
    taken away. Ties, dtype, device and requires_grad stay; `config.vocab_size` follows.

    Padding rows are not told from trained ones by looking: an id missing from `new_ids` keeps its row.
    """
    vocabulary = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
    ids = set(range(len(tokenizer) - new_ids, len(tokenizer)) if isinstance(new_ids, int) else new_ids)
    outside = sorted(i for i in ids if not 0 <= i < vocabulary)
    if outside:
        raise ValueError(f"new_ids: {outside[0]} is no id of the tokenizer, which has {vocabulary}")
    if pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of = {pad_to_multiple_of} must be at least 1")
    old_rows = model.get_input_embeddings().weight.shape[0]
    head = model.get_output_embeddings()  # a reward model has none
    tied = head is not None and original.is_tied(model)
    trained = torch.tensor([i for i in range(min(old_rows, vocabulary)) if i not in ids], dtype=torch.long)
    rows = old_rows
    if vocabulary > old_rows:
        rows = -(-vocabulary // pad_to_multiple_of) * pad_to_multiple_of
        model.resize_token_embeddings(rows, mean_resizing=False)
    untrained = torch.tensor(sorted(ids | set(range(old_rows, rows))), dtype=torch.long)
    _fill_with_mean(model.get_input_embeddings().weight, untrained, trained)
    if head is not None:
        if not tied:
            _fill_with_mean(model.get_output_embeddings().weight, untrained, trained)
        assert original.is_tied(model) == tied
    assert model.config.vocab_size == rows
    return rows - old_rows


@torch.no_grad()
def _fill_with_mean(weight: torch.Tensor, untrained: torch.Tensor, trained: torch.Tensor) -> None:
    if len(untrained) and len(trained):
        mean = weight[trained.to(weight.device)].mean(dim=0, dtype=torch.float32)
        weight[untrained.to(weight.device)] = mean.to(weight.dtype)


def holds_reward_model(path: str | os.PathLike[str], revision: str | None = None) -> bool:
    """Whether a model folder or hub id is a reward model's. UserError where it is no model at all."""
    folder = files.resolve_folder(path, revision)
    return not files.is_adapter(folder) and is_reward_config(files.read_json(folder / files.CONFIG))


def _check_head(path: str | os.PathLike[str], raw: dict[str, Any], head: Head) -> None:
    is_reward = is_reward_config(raw)
    if is_reward and head == "lm":
        raise UserError(
            f"{path} holds a reward model ({raw['architectures'][0]}): it scores answers and cannot write any. Use it "
            'with `mambalign score`, or load_model(path, head="reward")'
        )
    if not is_reward and head == "reward":
        raise UserError(
            f"{path} holds a language model, which has no score to give; `mambalign reward` trains a reward model from "
            "it"
        )


def write_hf(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    config = files.read_json(folder / files.CONFIG)
    if config.get("rescale_prenorm_residual"):
        # It asks for out_proj to be divided by sqrt(layers) at initialisation. transformers 5.23 does so after loading
        # as well, without a word, so a finished model must not ask for it.
        config["rescale_prenorm_residual"] = False
        (folder / files.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _load_original(
    folder: Path, raw: dict[str, Any], dtype: torch.dtype | None, hf_kwargs: dict[str, Any]
) -> PreTrainedModel:
    source = folder / files.CONFIG
    config = _checked_config(lambda: original.to_hf_config(raw, source), source)
    # mamba_ssm reads only the .bin, so where a folder has both that is the model.
    weights = files.weight_files(folder, (files.TORCH_BIN, files.SAFETENSORS))
    specs = files.tensor_specs(weights)
    original.check_vocabulary(raw, specs, weights[0])
    stored = _stored_dtype(specs, weights[0])
    setattr(config, original.RECORD, original.make_record(raw, specs, weights[0]))
    state = original.to_hf_state_dict(files.read_tensors(weights), raw, weights[0])
    return _from_pretrained(None, config, dtype or stored, weights[0], {"state_dict": state, **hf_kwargs})


def _load_hf(
    folder: Path, raw: dict[str, Any], dtype: torch.dtype | None, hf_kwargs: dict[str, Any]
) -> PreTrainedModel:
    source = folder / files.CONFIG
    kind = raw.get("model_type")
    if kind is None:
        raise UserError(f"{source} has neither a model_type nor d_model and n_layer: it describes no Mamba")
    if kind not in FAMILIES:
        raise UserError(
            f"{source}: model_type is {kind!r}; that is not a Mamba this version can train (it can: "
            f"{', '.join(FAMILIES)})"
        )
    if raw.get("quantization_config"):
        raise UserError(f"{source}: a quantised checkpoint; quantisation is not in this version yet, take the original")
    config = _checked_config(lambda: AutoConfig.from_pretrained(folder, trust_remote_code=False), source)
    _checked_config(lambda: gated_norm(config), source)
    weights = files.weight_files(folder)
    stored = _stored_dtype(files.tensor_specs(weights), weights[0])
    return _from_pretrained(folder, config, dtype or stored, weights[0], hf_kwargs)


def _checked_config(build: Callable[[], Any], source: Path) -> Any:
    try:
        return build()
    except UserError:
        raise
    # transformers' strict configs raise their own error types, which are none of Python's.
    except Exception as error:
        raise UserError(f"{source}: {' '.join(str(error).split())}") from error


def _from_pretrained(
    folder: Path | None, config: Any, dtype: torch.dtype, source: Path, hf_kwargs: dict[str, Any]
) -> PreTrainedModel:
    """`from_pretrained`, but with nothing left to chance: see the errors of `load_model`."""
    config.rescale_prenorm_residual = False  # see write_hf
    family = reward_class if is_reward_config(vars(config)) else model_class
    model, info = family(config).from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they are listed, and refused, below
        **hf_kwargs,
    )
    mismatched = sorted(info["mismatched_keys"])  # transformers keeps them in sets
    problems = [
        *(f"{name} is {list(found)} there, {list(want)} in the model" for name, found, want in mismatched),
        *(f"{name} is missing there" for name in sorted(info["missing_keys"])),
        *(f"{name} is there, the model has no such parameter" for name in sorted(info["unexpected_keys"])),
        *info["error_msgs"],
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(
            f"the weights in {source} do not fit the model that config.json describes: {'; '.join(problems[:3])}{more}"
        )
    if model.get_output_embeddings() is None:
        return model
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if head is not embedding and head.data_ptr() == embedding.data_ptr():
        head.data = head.data.clone()  # a .bin keeps equal tensors as one; trained apart, they must not share memory
    if config.tie_word_embeddings and not original.is_tied(model):
        raise UserError(
            f"{source}: lm_head.weight differs from backbone.embeddings.weight though the config ties them; if the "
            'head was trained on its own, write "tie_word_embeddings": false into config.json'
        )
    return model


def _stored_dtype(specs: dict[str, files.TensorSpec], source: Path) -> torch.dtype:
    """The narrowest dtype that holds every stored tensor exactly, given that some are float32 in any case."""
    for name, spec in specs.items():
        if spec.dtype is None:
            raise UserError(
                f"{source}: {name} is not of a floating-point type from 16 to 64 bits; "
                "a quantised checkpoint cannot be read"
            )
    dtypes = [
        spec.dtype
        for name, spec in specs.items()
        if spec.dtype and (spec.dtype == torch.float64 or not name.endswith(FP32_PARAMETERS))
    ]
    if not dtypes:
        raise UserError(f"{source}: no weights of a model in it")
    return reduce(torch.promote_types, dtypes)


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None: as stored."""
    if isinstance(dtype, torch.dtype):
        if dtype not in DTYPES.values():
            raise UserError(f"dtype = {dtype} must be one of {', '.join(DTYPES)}")
        return dtype
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return None
    if name not in DTYPES:
        near = difflib.get_close_matches(name, [*DTYPES, "auto"], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it must be one of {', '.join(DTYPES)}, auto"
        raise UserError(f"dtype = {dtype!r} is unknown{hint}")
    return DTYPES[name]


def _device(device: str | torch.device) -> torch.device:
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device = {device!r} is unknown; it must be like 'cpu', 'cuda' or 'cuda:1'") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device = {str(device)!r}, but torch sees {torch.cuda.device_count()} CUDA devices; use 'cpu'")
    return wanted


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is unknown; it must be {' or '.join(map(repr, LAYOUTS))}")


def carry_files(src: str | os.PathLike[str], staging: Path, revision: str | None = None, **options: Any) -> None:
    """Copy the tokenizer's files of `src`, a folder or a hub id, as they are."""
    hub = {key: options[key] for key in files.HUB_OPTIONS if key in options}
    local = files.is_local(src)
    folder = Path(src).expanduser() if local else files.snapshot(os.fspath(src), revision, hub, _READ_FILES)
    for name in _CARRIED_FILES:
        if (folder / name).is_file() and not (staging / name).exists():
            shutil.copyfile(folder / name, staging / name)


def _notes(folder: Path, written: list[Path], layout: Layout) -> tuple[str, ...]:
    notes = []
    if layout == "mamba-ssm":
        if written[0].suffix == ".safetensors":
            notes.append("the weights came, and go back, as safetensors; mamba_ssm itself reads only pytorch_model.bin")
        if original.HEAD not in files.tensor_specs(written):
            notes.append("the weights came, and go back, without lm_head.weight, which mamba_ssm itself wants")
    elif (norm := files.read_json(folder / files.CONFIG).get("gated_norm", GATE_FIRST)) != GATE_FIRST:
        notes.append(f"plain transformers does not know gated_norm {norm!r} and computes something else without a word")
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        notes.append("no tokenizer came with it; set tokenizer_name_or_path: EleutherAI/gpt-neox-20b")
    return tuple(notes)


def _prove_equal(model: PreTrainedModel, folder: Path, src: str | os.PathLike[str]) -> float:
    """Max abs logit difference of `model` (turned to float32) and the one in `folder`; UserError if not the same."""
    model = model.float()
    before, logits = _digests(model), probe_logits(model)
    for parameter in model.parameters():  # the two models need not be in memory together
        parameter.data = torch.empty(0)
    written = load_model(folder, dtype="float32")
    after = _digests(written)
    differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if differing:
        raise UserError(f"{src} does not survive the conversion: {', '.join(differing[:3])} came back changed")
    difference = (probe_logits(written) - logits).abs().max().item()
    if not difference <= 1e-5 * max(1.0, logits.abs().max().item()):  # also when it is NaN
        raise UserError(f"{src}: the logits after conversion differ by {difference:.3g} (or are not finite)")
    return difference


def _digests(model: PreTrainedModel) -> dict[str, str]:
    return {
        name: hashlib.sha256(parameter.detach().contiguous().view(torch.uint8).numpy()).hexdigest()
        for name, parameter in model.named_parameters()
    }


@torch.no_grad()
def probe_logits(model: PreTrainedModel, length: int = 64) -> torch.Tensor:
    ids = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids).logits.float()
