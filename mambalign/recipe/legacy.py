"""The keys of earlier recipes: the 2024 alignment-handbook, TRL and transformers 4 names.

A key is renamed where its meaning is the same, ignored aloud where it has none here, and an error otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mambalign.recipe.values import UserError
from mambalign.support import nearest

RENAMED = {
    "torch_dtype": "dtype",
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "dataset_num_proc": "preprocessing_num_workers",
    "dataset_text_field": "text_column",
    "hub_model_revision": "hub_revision",
    "no_cuda": "use_cpu",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "bias": "lora_bias",
    "lora_task_type": "task_type",
    "truncation_side": "truncation",
    "truncation_mode": "truncation",
    "resume_from_checkpoint": "resume",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}

_NO_ATTENTION = "a Mamba has no attention"
_NO_PADDING = "batches are laid flat here, nothing is padded"
_IGNORED_ALWAYS = {
    "use_flash_attention_2": _NO_ATTENTION,
    "attn_implementation": _NO_ATTENTION,
    "overwrite_output_dir": "the same command resumes a run; --resume never starts it afresh",
    "remove_unused_columns": "only the columns that are needed are ever read",
    "do_train": "the verb says what to do",
    "group_by_length": _NO_PADDING,
    "padding_free": _NO_PADDING,
    "logging_dir": "TensorBoard files lie in the run folder",
    "precompute_ref_log_probs": "reference log-probs are always computed once, before training",
}
# Keys whose only harmless values are listed; any other value would be lost silently, so it is an error.
_IGNORED_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "task_type": (("CAUSAL_LM", None), "only causal language models are trained here"),
    "trust_remote_code": ((False, None), "code from a model repository is never run here"),
    "base_model_revision": ((None, "main"), "adapters name their base in their own config"),
    "model_code_revision": ((None, "main"), "code from a model repository is never run here"),
    "use_cache": ((False, None), "the cache is off in training"),
    "generate_during_eval": ((False, None), "use `mambalign demo` or the benchmarks to see samples"),
    "average_tokens_across_devices": ((True, None), "the loss is always normalised by the tokens of all devices"),
    "tokenizer_padding_side": (("left", "right", None), _NO_PADDING),
}
_HARMLESS_DATASET_KWARGS = {"add_special_tokens": False, "append_concat_token": False, "skip_prepare_dataset": False}
_VALUES: dict[str, dict[Any, Any]] = {
    "truncation": {"left": "keep_end", "right": "keep_start"},
    "resume": {None: "auto", True: "auto", False: "never"},
}


def _ignored_note(key: str, value: Any) -> str | None:
    """Why `key: value` of another stack means nothing here; None when there is no such key."""
    if key in _IGNORED_ALWAYS:
        return _IGNORED_ALWAYS[key]
    if key in _IGNORED_VALUES:
        harmless, why = _IGNORED_VALUES[key]
        if value not in harmless:
            raise UserError(f"{key}: {value!r} is not supported ({why}); remove the key")
        return why
    if key == "dataset_kwargs":
        wrong = {k: v for k, v in (value or {}).items() if _HARMLESS_DATASET_KWARGS.get(k, object()) != v}
        if wrong:
            raise UserError(f"dataset_kwargs: {wrong!r} is not supported; the chat template alone decides the tokens")
        return "the chat template alone decides which special tokens there are"
    return None


def _refuse(key: str, value: Any) -> None:
    """Keys whose meaning would be lost without a word: say how to write it instead."""
    if key == "hub_token":
        raise UserError("hub_token: recipes are kept in run folders and model cards; use `hf auth login` instead")
    if key == "dataset_mixture":
        raise UserError(f"dataset_mixture is not read here; write{_mixture_as_mixer(value)}")


def _mixture_as_mixer(value: Any) -> str:
    entries = value.get("datasets") if isinstance(value, dict) else None
    if not isinstance(entries, list) or not all(isinstance(e, dict) and "id" in e for e in entries):
        return " dataset_mixer: {id: fraction} and dataset_splits: [train, test]"
    weights = {e["id"]: e.get("weight", 1.0) for e in entries}
    splits = list(dict.fromkeys(e.get("split", "train") for e in entries))
    return f" dataset_mixer: {weights!r} and dataset_splits: {splits!r} (splits named test are only evaluated)"


def rename_keys(values: Mapping[str, Any], known: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Values under today's keys, and one note for every key that was renamed or has no meaning here.

    Raises:
        UserError: an unknown key (names the nearest), both names of a key, or a value that would be lost.
    """
    known = set(known)
    result: dict[str, Any] = {}
    notes: list[str] = []
    origin: dict[str, str] = {}
    for old, value in values.items():
        key = RENAMED.get(old, old)
        _refuse(key, value)
        why = None if key in known else _ignored_note(key, value)
        if why is not None:
            notes.append(f"{old} is ignored: {why}")
            continue
        if key not in known:
            hint = nearest(old, [*known, *RENAMED])
            raise UserError(f"unknown key {old!r}{hint} (`mambalign recipes keys` lists all)")
        if key in result:
            raise UserError(f"{origin[key]} and {old} are the same key; keep {key}")
        if key != old:
            notes.append(f"{old} is now called {key}")
        mapping = _VALUES.get(key, {})
        result[key] = mapping[value] if isinstance(value, str | bool | None) and value in mapping else value
        origin[key] = old
    return result, notes
