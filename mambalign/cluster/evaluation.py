"""Stages that evaluate a model: `mt-bench` and `alpaca`, as the commands of `mambalign eval` that one would type."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from mambalign.cluster.keys import ClusterError
from mambalign.support import nearest

EVALUATIONS = ("mt-bench", "alpaca")
RULES = "rule"  # the judge that is rule-based, not a language model; it needs no address and no name
_ABOUT_THE_JUDGE = ("base_url", "model", "key_env", "key_file", "extra")  # --judge-base-url and so on
_JUDGING = (*_ABOUT_THE_JUDGE, "concurrency", "timeout", "price_in", "price_out", "max_cost", "store")
_ANSWERING = ("model_id", "max_new_tokens", "trained_tokens", "device", "dtype")
OPTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "mt-bench": {
        "answer": (*_ANSWERING, "choices", "force_temperature", "parity"),
        "judge": (*_JUDGING, "references"),
        "report": ("duplicates",),
    },
    "alpaca": {
        "answer": (*_ANSWERING, "temperature", "top_p", "seed"),
        "judge": (*_JUDGING, "annotator", "reference", "tolerant"),
        "report": ("length_control",),
    },
}


def option(verb: str, name: str) -> str:
    """The verb's option of a key: `("judge", "base_url")` is `--judge-base-url`."""
    prefix = "judge-" if verb == "judge" and name in _ABOUT_THE_JUDGE else ""
    return f"--{prefix}{name.replace('_', '-')}"


def evaluation_command(
    kind: str,
    model: str,
    output_dir: str,
    options: Mapping[str, Mapping[str, Any]],
    data_dir: str | None,
    where: str,
) -> str:
    """Shell lines that answer, judge and report into `output_dir`; each goes on where an earlier attempt stopped.

    Args:
        options: of each verb ("answer", "judge", "report"), by the names in `OPTIONS`.
        data_dir: the folder with the benchmark's files; None: where `eval fetch-data` puts them.

    Raises:
        ClusterError: a key that the verb does not have, no judge, a name that cannot name a file.
    """
    if not model or not output_dir:
        raise ClusterError(f"{where}: {kind} needs `model:` (what to evaluate) and `output_dir:` (where to)")
    judge = options["judge"]
    if "base_url" not in judge or (judge["base_url"] != RULES and "model" not in judge):
        raise ClusterError(
            f"{where}: judge is missing: `judge: {{base_url: ADDRESS, model: NAME}}`, or "
            f"`judge: {{base_url: {RULES}}}` for the one that is rule-based, not a language model"
        )
    words = {verb: _words(kind, verb, given, where) for verb, given in options.items()}
    name = str(options["answer"].get("model_id", re.split(r"[/\\]", model.rstrip("/\\"))[-1]))
    if not re.fullmatch(r"[\w.][\w.-]*", name):
        raise ClusterError(f"{where}: answer: model_id: {name!r} must be letters, digits, dots, - and _")
    if "model_id" not in options["answer"]:
        words["answer"] += ["--model-id", name]
    data = ["--data-dir", data_dir] if data_dir else []
    verb = ["mambalign", "eval", kind]
    if kind == "mt-bench":
        answers, judged = f"{output_dir}/model_answer/{name}.jsonl", f"{output_dir}/model_judgment"
        verdicts, beside = f"{shlex.quote(judged)}/*_single.jsonl", ["--answers", answers]
    else:
        answers, judged = f"{output_dir}/{name}/model_outputs.json", output_dir
        verdicts, beside = f"{shlex.quote(f'{output_dir}/{name}')}/*/annotations.json", ["--outputs", answers]
    page = ["--out", f"{output_dir}/report.html"]
    lines = [
        shlex.join([*verb, "answer", model, "--out", answers, *words["answer"], *data]),
        shlex.join([*verb, "judge", answers, "--out", judged, *words["judge"], *data]),
        f"{shlex.join([*verb, 'report'])} {verdicts} {shlex.join([*beside, *page, *words['report'], *data])}",
    ]
    return " &&\n".join(lines)


def _words(kind: str, verb: str, given: Mapping[str, Any], where: str) -> list[str]:
    known = OPTIONS[kind][verb]
    words: list[str] = []
    for name, value in given.items():
        if name not in known:
            raise ClusterError(
                f"{where}: {verb}: unknown key {name!r}{nearest(name, known)}; it has {', '.join(known)}"
            )
        if value is None or isinstance(value, list):
            raise ClusterError(f"{where}: {verb}: {name} must be one value, not {value!r}")
        if isinstance(value, bool):
            words += [option(verb, name)] if value else []
        else:
            words += [option(verb, name), json.dumps(value) if isinstance(value, Mapping) else str(value)]
    return words
