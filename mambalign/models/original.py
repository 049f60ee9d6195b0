"""The original state-spaces checkpoint layout (what `mamba_ssm` reads and writes), to and from transformers' names.

    config.json        d_model, n_layer, vocab_size, ssm_cfg, rms_norm, residual_in_fp32, fused_add_norm,
                       pad_vocab_size_multiple, tie_embeddings: missing ones have mamba_ssm's defaults
    pytorch_model.bin  the names of transformers, but backbone.embedding.weight; lm_head.weight even where tied

Two things differ in substance. `vocab_size` (50277) is the tokenizer's, the tensors have it rounded up to
`pad_vocab_size_multiple` (50280), which transformers calls `vocab_size`. And the layout has no place for token ids or
for an epsilon. So that the way back is bit-identical, the transformers config carries a record of where it came from
(`RECORD`), which plain transformers keeps through load and save.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Mamba2Config, MambaConfig, PretrainedConfig, PreTrainedModel

from mambalign.models.files import CONFIG, SAFETENSORS, TORCH_BIN, TensorSpec
from mambalign.models.mamba2 import GATE_FIRST, NO_NORM, NORM_FIRST, gated_norm
from mambalign.recipe import UserError

RECORD = "mamba_ssm_checkpoint"
EMBEDDING = "backbone.embedding.weight"
HEAD = "lm_head.weight"

# mamba_ssm's MambaConfig. rms_norm False and attention or MLP layers are other architectures than transformers' Mamba.
_DEFAULTS: dict[str, Any] = {
    "d_model": 2560,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
# Left in config.json by forks that made mamba_ssm's config a transformers one; they do not change the model.
_HARMLESS = {
    "_name_or_path",
    "architectures",
    "dtype",
    "model_type",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# ssm_cfg key -> (transformers name, its type). The dt_* but dt_limit only steer initialisation.
_SSM_KEYS: dict[str, tuple[str, type]] = {
    "d_state": ("state_size", int),
    "d_conv": ("conv_kernel", int),
    "expand": ("expand", int),
    "dt_rank": ("time_step_rank", int),
    "dt_min": ("time_step_min", float),
    "dt_max": ("time_step_max", float),
    "dt_init": ("time_step_init_scheme", str),
    "dt_scale": ("time_step_scale", float),
    "dt_init_floor": ("time_step_floor", float),
    "conv_bias": ("use_conv_bias", bool),
    "bias": ("use_bias", bool),
}
_SSM2_KEYS: dict[str, tuple[str, type]] = {
    **{key: value for key, value in _SSM_KEYS.items() if key not in ("dt_rank", "dt_init", "dt_scale")},
    "headdim": ("head_dim", int),
    "ngroups": ("n_groups", int),
    "dt_limit": ("time_step_limit", tuple),
    "chunk_size": ("chunk_size", int),
}
# These two together are `gated_norm` (see `mamba2.py`).
_SSM2_NORM: dict[str, tuple[str, type]] = {
    "rmsnorm": ("rmsnorm", bool),
    "norm_before_gate": ("norm_before_gate", bool),
}
# transformers has no place for these; read with mamba_ssm's defaults only.
_SSM2_ONLY_DEFAULT = {"d_ssm": None, "D_has_hdim": False}
_KINDS = {
    int: "a positive integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    tuple: "two increasing numbers from 0 on",
}
# Kernels, processes, and what only steers initialisation.
_SSM_IGNORED = {"layer", "use_fast_path"}
_SSM2_IGNORED = {
    "layer", "use_mem_eff_path", "process_group", "sequence_parallel", "A_init_range", "conv_init",
}  # fmt: skip
# What makes two transformers configs the same network (the vocabulary apart, which may have grown since).
_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "state_size",
    "conv_kernel",
    "use_conv_bias",
    "use_bias",
    "residual_in_fp32",
    "layer_norm_epsilon",
    "hidden_act",
)
_FAMILY_ARCHITECTURE = {
    "mamba": ("intermediate_size", "time_step_rank"),
    "mamba2": ("expand", "head_dim", "n_groups"),
}


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config.json is of the original layout."""
    return "d_model" in config and "n_layer" in config and "hidden_size" not in config


def to_hf_config(original: dict[str, Any], source: str | Path) -> MambaConfig | Mamba2Config:
    """The transformers config of an original config.json. UserError naming `source` and the key it cannot follow."""
    unknown = sorted(set(original) - set(_DEFAULTS) - _HARMLESS)
    if unknown:
        raise UserError(f"{source}: {_unknown(unknown[0], _DEFAULTS)}")
    config = _DEFAULTS | original
    for key, default in _DEFAULTS.items():
        if isinstance(default, bool) and not isinstance(config[key], bool):
            raise UserError(f"{source}: {key} = {config[key]!r} must be true or false")
    if not config["rms_norm"]:
        raise UserError(f"{source}: rms_norm is false; only RMSNorm models can be read (every published Mamba is one)")
    if config["attn_layer_idx"] or config["d_intermediate"]:
        key = "attn_layer_idx" if config["attn_layer_idx"] else "d_intermediate"
        raise UserError(f"{source}: {key} = {config[key]!r}: models with attention or MLP layers are not supported")
    for key in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"):
        if not isinstance(config[key], int) or isinstance(config[key], bool) or config[key] < 1:
            raise UserError(f"{source}: {key} = {config[key]!r} must be a positive integer")
    common = {
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"],
        "vocab_size": padded_vocab_size(config),
        "residual_in_fp32": config["residual_in_fp32"],
        "tie_word_embeddings": config["tie_embeddings"],
    }
    ssm_cfg = config["ssm_cfg"] or {}
    if not isinstance(ssm_cfg, dict):
        raise UserError(f"{source}: ssm_cfg = {ssm_cfg!r} must be an object")
    layer = ssm_cfg.get("layer", "Mamba1")
    if layer == "Mamba1":
        return MambaConfig(**common, **_ssm_fields(ssm_cfg, _SSM_KEYS, _SSM_IGNORED, source))
    if layer == "Mamba2":
        return _mamba2_config(common, ssm_cfg, source)
    raise UserError(f"{source}: ssm_cfg.layer is {layer!r}; Mamba1 and Mamba2 are read")


def padded_vocab_size(original: dict[str, Any]) -> int:
    """Rows of the embedding: vocab_size rounded up to pad_vocab_size_multiple.

    >>> padded_vocab_size({"vocab_size": 50277})
    50280
    """
    multiple = original.get("pad_vocab_size_multiple", _DEFAULTS["pad_vocab_size_multiple"])
    return -(-original.get("vocab_size", _DEFAULTS["vocab_size"]) // multiple) * multiple


def _mamba2_config(common: dict[str, Any], ssm_cfg: dict[str, Any], source: str | Path) -> Mamba2Config:
    for key, default in _SSM2_ONLY_DEFAULT.items():
        if ssm_cfg.get(key, default) != default:
            raise UserError(
                f"{source}: ssm_cfg.{key} = {ssm_cfg[key]!r}: such a layer is not supported, nor by transformers"
            )
    ignored = _SSM2_IGNORED | set(_SSM2_ONLY_DEFAULT)
    fields = _ssm_fields(ssm_cfg, _SSM2_KEYS | _SSM2_NORM, ignored, source)
    norm, norm_first = fields.pop("rmsnorm", True), fields.pop("norm_before_gate", False)
    if not norm or norm_first:
        fields["gated_norm"] = NORM_FIRST if norm else NO_NORM
    fields = {"n_groups": 1, "head_dim": 64} | fields  # mamba_ssm's defaults; transformers' n_groups is another
    inner = fields.get("expand", 2) * common["hidden_size"]
    if inner % fields["head_dim"] or inner // fields["head_dim"] % fields["n_groups"]:
        raise UserError(
            f"{source}: {inner} inner channels (expand x d_model) do not make heads of {fields['head_dim']} "
            f"(ssm_cfg.headdim) in {fields['n_groups']} equal groups (ssm_cfg.ngroups)"
        )
    # The token ids are those of GPT-NeoX's end of text, as in transformers' config of a Mamba-1.
    token = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    return Mamba2Config(num_heads=inner // fields["head_dim"], **common, **fields, **token)


def _ssm_fields(
    ssm_cfg: dict[str, Any], keys: dict[str, tuple[str, type]], ignored: set[str], source: str | Path
) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in ssm_cfg.items():
        if key in ignored:
            continue
        if key not in keys:
            raise UserError(f"{source}: in ssm_cfg, {_unknown(key, keys)}")
        name, kind = keys[key]
        automatic = key == "dt_rank" and value == "auto"
        if not automatic and not _is_a(value, kind):
            raise UserError(f"{source}: ssm_cfg.{key} = {value!r} must be {_KINDS[kind]}")
        fields[name] = value if automatic else tuple(map(float, value)) if kind is tuple else kind(value)
    return fields


def _is_a(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:  # expand is sometimes written 2.0
        return not isinstance(value, bool) and isinstance(value, (int, float)) and value > 0 and value % 1 == 0
    if kind is tuple:
        two = isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_a(v, float) for v in value)
        return two and 0 <= value[0] < value[1]
    return isinstance(value, kind)


def _unknown(key: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}")


def check_vocabulary(original: dict[str, Any], specs: dict[str, TensorSpec], source: str | Path) -> None:
    """UserError unless embedding (and head, where there is one) have the rows that the config promises."""
    rows = padded_vocab_size(original)
    for name in (EMBEDDING, HEAD):
        if name in specs and specs[name].shape[0] != rows:
            raise UserError(
                f"{source}: {name} has {specs[name].shape[0]} rows, but config.json says vocab_size "
                f"{original.get('vocab_size')} padded to a multiple of "
                f"{original.get('pad_vocab_size_multiple', _DEFAULTS['pad_vocab_size_multiple'])}, which is {rows}. "
                "The config or the weights are of another model"
            )


def to_hf_state_dict(
    tensors: dict[str, torch.Tensor], original: dict[str, Any], source: str | Path
) -> dict[str, torch.Tensor]:
    """Rename to transformers' names; a tied head is checked against the embedding and left out. Shares memory."""
    state = {name.replace(EMBEDDING, "backbone.embeddings.weight"): tensor for name, tensor in tensors.items()}
    tied = original.get("tie_embeddings", _DEFAULTS["tie_embeddings"])
    if not tied:
        if HEAD not in state:
            raise UserError(f"{source}: tie_embeddings is false, but {HEAD} is missing from the weights")
        return state
    head = state.pop(HEAD, None)
    if head is not None and EMBEDDING in tensors and not torch.equal(head, tensors[EMBEDDING]):
        raise UserError(
            f"{source}: {HEAD} differs from {EMBEDDING} though the config ties them; "
            'if the head was trained on its own, write "tie_embeddings": false into config.json'
        )
    return state


def make_record(original: dict[str, Any], specs: dict[str, TensorSpec], weights: Path) -> dict[str, Any]:
    """What the way back needs: the config, the dtypes of the tensors, whether there was a head, the file format."""
    return {
        "config": original,
        "dtypes": _pack_dtypes({name: str(spec.dtype).removeprefix("torch.") for name, spec in specs.items()}),
        "lm_head": HEAD in specs,
        "weights": "safetensors" if weights.suffix == ".safetensors" else "bin",
    }


def _pack_dtypes(dtypes: dict[str, str]) -> dict[str, str]:
    """Name -> dtype in a few lines: "*" is the most common, then what differs (layers.* where all layers agree)."""
    common = Counter(dtypes.values()).most_common(1)[0][0]
    groups: dict[str, set[str]] = {}
    for name, dtype in dtypes.items():
        groups.setdefault(_any_layer(name), set()).add(dtype)
    packed = {"*": common}
    for name, dtype in dtypes.items():
        key = _any_layer(name) if len(groups[_any_layer(name)]) == 1 else name
        if dtype != common:
            packed[key] = dtype
    return packed


def _any_layer(name: str) -> str:
    return re.sub(r"\.layers\.\d+\.", ".layers.*.", name)


def _recorded_dtype(name: str, packed: dict[str, str]) -> torch.dtype:
    return getattr(torch, packed.get(name) or packed.get(_any_layer(name)) or packed["*"])


def to_original_config(model: PreTrainedModel) -> dict[str, Any]:
    """The original config.json of a transformers Mamba or Mamba-2; key by key the one it came from where its record
    still fits.

    UserError for what the layout cannot express (Falcon-Mamba's norms, another activation, another epsilon).
    """
    config = model.config
    if config.model_type not in _FAMILY_ARCHITECTURE:
        raise UserError(
            f"a {config.model_type} model cannot be written in the mamba-ssm layout: mamba_ssm knows no "
            "norms on B, C and dt. Save it in the hf layout"
        )
    if config.model_type == "mamba" and config.intermediate_size % config.hidden_size:
        raise UserError(
            "mamba_ssm's inner width is a multiple of d_model; this model has intermediate_size "
            f"{config.intermediate_size} and hidden_size {config.hidden_size}: save it in the hf layout"
        )
    if config.hidden_act not in ("silu", "swish") or config.layer_norm_epsilon != 1e-5:
        raise UserError(
            "mamba_ssm fixes hidden_act to 'silu' and the norms' epsilon to 1e-5; this model has "
            f"{config.hidden_act!r} and {config.layer_norm_epsilon}: save it in the hf layout"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    original = _config_of_record(config) or _fresh_config(config)
    if padded_vocab_size(original) != rows:  # tokens were added
        original["vocab_size"] = rows
        if padded_vocab_size(original) != rows:
            original["pad_vocab_size_multiple"] = 1
    tied = is_tied(model)
    if original.get("tie_embeddings", True) != tied:
        original["tie_embeddings"] = tied
    return original


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head is the embedding (one parameter), whatever the config says."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _config_of_record(config: PretrainedConfig) -> dict[str, Any] | None:
    record = getattr(config, RECORD, None)
    if not isinstance(record, dict) or not {"config", "dtypes", "lm_head", "weights"} <= set(record):
        return None
    recorded = to_hf_config(record["config"], f"{RECORD} in {CONFIG}")
    return dict(record["config"]) if _architecture(recorded) == _architecture(config) else None


def _architecture(config: PretrainedConfig) -> list[Any]:
    facts = [getattr(config, name) for name in (*_ARCHITECTURE, *_FAMILY_ARCHITECTURE[config.model_type])]
    return facts + ([gated_norm(config), *config.time_step_limit] if config.model_type == "mamba2" else [])


def _fresh_config(config: PretrainedConfig) -> dict[str, Any]:
    """Only keys that every mamba_ssm knows: tie_embeddings came late and, missing, means tied."""
    return {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": _fresh_ssm_cfg(config),
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8 if config.vocab_size % 8 == 0 else 1,
    }


def _fresh_ssm_cfg(config: PretrainedConfig) -> dict[str, Any]:
    """What differs from mamba_ssm's defaults."""
    ssm_cfg: dict[str, Any] = {}
    keys, defaults = _SSM_KEYS, MambaConfig(hidden_size=config.hidden_size)
    if config.model_type == "mamba2":
        ssm_cfg["layer"] = "Mamba2"
        keys, defaults = _SSM2_KEYS, to_hf_config({"d_model": 64, "n_layer": 1, "ssm_cfg": ssm_cfg}, CONFIG)
        norm = gated_norm(config)
        if norm != GATE_FIRST:
            ssm_cfg |= {"norm_before_gate": True} if norm == NORM_FIRST else {"rmsnorm": False}
    for key, (name, kind) in keys.items():
        value, default = getattr(config, name), getattr(defaults, name)
        if (tuple(value) != tuple(default)) if kind is tuple else (value != default):
            ssm_cfg[key] = value
    # A config may give intermediate_size beside another `expand`; the tensors have the former.
    if config.model_type == "mamba" and config.intermediate_size != config.expand * config.hidden_size:
        ssm_cfg["expand"] = config.intermediate_size // config.hidden_size
    return ssm_cfg


def write_original(model: PreTrainedModel, folder: Path, weights: str | None = None, as_it_came: bool = False) -> None:
    """Write config.json and the weights of `model` into the empty `folder`.

    weights: "bin" (default; the only one mamba_ssm reads) or "safetensors". `as_it_came` follows the record instead:
    the format it came in, without lm_head.weight if it came without. The recorded dtypes are restored where every
    tensor survives that exactly (an unchanged fp16 checkpoint does, one that was trained in fp32 does not).
    """
    record = getattr(model.config, RECORD, None) if _config_of_record(model.config) else None
    original = to_original_config(model)
    tensors = {
        name.replace("backbone.embeddings.weight", EMBEDDING): parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
    }
    if record is not None:
        tensors = _restore_dtypes(tensors, record["dtypes"])
    if is_tied(model) and not (as_it_came and record and not record["lm_head"]):
        tensors[HEAD] = tensors[EMBEDDING]
    if weights is None:
        weights = record["weights"] if as_it_came and record else "bin"
    _write_tensors(tensors, folder, weights)
    (folder / CONFIG).write_text(json.dumps(original, indent=4) + "\n", encoding="utf-8")


def _restore_dtypes(tensors: dict[str, torch.Tensor], packed: dict[str, str]) -> dict[str, torch.Tensor]:
    restored = {name: tensor.to(_recorded_dtype(name, packed)) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        widened = restored[name].dtype.itemsize > tensor.dtype.itemsize  # the model was narrowed since, on purpose
        if widened or not torch.equal(restored[name].to(tensor.dtype), tensor):
            return tensors
    return restored


def _write_tensors(tensors: dict[str, torch.Tensor], folder: Path, weights: str) -> None:
    if weights == "safetensors":  # has no notion of two names for one tensor
        if HEAD in tensors:
            tensors = tensors | {HEAD: tensors[HEAD].clone()}
        save_file(tensors, folder / SAFETENSORS, metadata={"format": "pt"})
    elif weights == "bin":
        try:
            torch.save(tensors, folder / TORCH_BIN)
        except RuntimeError as error:  # how torch reports a write that the disk refused
            raise OSError(f"writing {TORCH_BIN} failed ({str(error).splitlines()[0]}); is the disk full?") from error
    else:
        raise UserError(f"weights = {weights!r} must be 'bin' or 'safetensors'")
