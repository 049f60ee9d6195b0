"""Where the benchmarks' files come from: pinned downloads, or a folder that holds them already.

None of it is part of this package: MT-Bench's files are Apache-2.0 (FastChat), AlpacaEval's prompts Apache-2.0 and its
data CC-BY-NC-4.0, for non-commercial use.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mambalign.recipe import UserError, nearest
from mambalign.support import sha256_file, write_json

DEFAULT_FOLDER = Path("~/.cache/mambalign/eval")
RECEIPT = "fetched.json"
FASTCHAT = "https://raw.githubusercontent.com/lm-sys/FastChat/v0.2.36/fastchat/llm_judge/data"
ALPACA_CODE = (
    "https://raw.githubusercontent.com/tatsu-lab/alpaca_eval/cd543a149df89434d8a54582c0151c0b945c3d20"
    "/src/alpaca_eval/evaluators_configs"
)
ALPACA_HUB = "https://huggingface.co/datasets/tatsu-lab/alpaca_eval/resolve/2edc6fad8be6b14ea7230aabfd08188da6b8b814"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class DataFile:
    """One file of a benchmark.

    path: where `fetch_data` puts it, relative to the data folder. url: pinned to a tag or commit. sha256: of its bytes;
    None: not known beforehand, then that of the first download is recorded and held to. other_names: what it may be
    called in a folder of the user's own.
    """

    path: str
    url: str
    sha256: str | None
    licence: str
    other_names: tuple[str, ...] = ()


APACHE, NON_COMMERCIAL = "Apache-2.0", "CC-BY-NC-4.0"
FILES: Mapping[str, DataFile] = {
    "mt-bench questions": DataFile(
        "mt_bench/question.jsonl",
        f"{FASTCHAT}/mt_bench/question.jsonl",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
        APACHE,
    ),
    "mt-bench references": DataFile(
        "mt_bench/reference_answer/gpt-4.jsonl",
        f"{FASTCHAT}/mt_bench/reference_answer/gpt-4.jsonl",
        "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
        APACHE,
        ("reference_answer_gpt-4.jsonl",),
    ),
    "mt-bench judge prompts": DataFile(
        "mt_bench/judge_prompts.jsonl",
        f"{FASTCHAT}/judge_prompts.jsonl",
        "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
        APACHE,
    ),
    "alpaca ranking prompt": DataFile(
        "alpaca_eval/evaluators/alpaca_eval_gpt4/alpaca_eval.txt",
        f"{ALPACA_CODE}/alpaca_eval_gpt4/alpaca_eval.txt",
        "cf4bace43fa6ac71944b9ca2506587ad7c509478a219e98a3950abf9d5b42a98",
        APACHE,
    ),
    "alpaca logprob prompt": DataFile(
        "alpaca_eval/evaluators/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt",
        f"{ALPACA_CODE}/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt",
        "784227e6dc2832fc08c43d2c8ea3a308e7523780187a1aaad2f85e30bac85f62",
        APACHE,
    ),
    "alpaca reference 1": DataFile(
        "alpaca_eval/alpaca_eval.json",
        f"{ALPACA_HUB}/alpaca_eval.json",
        "d92b92c51e8f1962a21193abe74e6f727c2bc8286035f4041505ff38a7c3ae51",
        NON_COMMERCIAL,
        ("alpaca_eval_text_davinci_003_reference.RECOVERED.json",),
    ),
    "alpaca reference 2": DataFile(
        "alpaca_eval/alpaca_eval_gpt4_baseline.json",
        f"{ALPACA_HUB}/alpaca_eval_gpt4_baseline.json",
        "83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4",
        NON_COMMERCIAL,
    ),
    "alpaca gamed": DataFile(
        "alpaca_eval/df_gamed.csv",
        f"{ALPACA_HUB}/df_gamed.csv",
        "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d",
        NON_COMMERCIAL,
    ),
    "alpaca difficulty": DataFile(
        "alpaca_eval/instruction_difficulty.csv",
        f"{ALPACA_HUB}/instruction_difficulty.csv",
        "e28d875bb334f75e17acd1e4ed659b261860e3db379cf5de29060301bed0a18b",
        NON_COMMERCIAL,
    ),
}


def find_data(name: str, folder: Path | None = None) -> Path:
    """The file `name` (a key of `FILES`) in a data folder: where `fetch_data` puts it, or under its own name at the
    folder's top or one level below, also with `.gz` behind it.

    Raises:
        UserError: it is not there; says how to get it.
    """
    if name not in FILES:
        raise UserError(f"there is no benchmark file {name!r}{nearest(name, FILES)}; known are {', '.join(FILES)}")
    wanted = FILES[name]
    root = (folder or DEFAULT_FOLDER).expanduser()
    names = [wanted.path, *dict.fromkeys((Path(wanted.path).name, *wanted.other_names))]
    places = [place for each in names for place in (each, f"mt_bench/{each}", f"alpaca_eval/{each}")]
    for place in places:
        for path in (root / place, root / f"{place}.gz"):
            if path.is_file():
                return path
    raise UserError(
        f"{root} lacks {wanted.path} ({name}); run `mambalign eval fetch-data` where there is a network, or put the "
        f"file there by hand and say --data-dir (it is {wanted.url})"
    )


def fetch_data(
    folder: Path | None = None,
    *,
    files: Mapping[str, DataFile] = FILES,
    report: Callable[[str], None] = print,
) -> list[Path]:
    """Download what is missing in `folder` and check all of it; returns the files.

    A file appears whole, with the right content, or not at all. Interrupted, the same call goes on with the rest.

    Raises:
        UserError: no connection, or a content that is not the pinned one.
    """
    root = (folder or DEFAULT_FOLDER).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    receipt = root / RECEIPT
    known: dict[str, str] = json.loads(receipt.read_text()) if receipt.is_file() else {}
    paths = []
    for name, file in files.items():
        path = root / file.path
        expected = file.sha256 or known.get(file.path)
        fresh = not path.is_file()
        if fresh:
            _download(file.url, path)
        digest = sha256_file(path)
        if expected and digest != expected:
            path.unlink() if fresh else None
            raise UserError(
                f"{file.url if fresh else path} is not the pinned {name}: SHA-256 {digest}, expected {expected}; "
                + ("nothing was kept" if fresh else "delete the file and run this again")
            )
        if not expected:
            report(f"{file.path}: no SHA-256 was known beforehand; this one's is recorded: {digest}")
        known[file.path] = digest
        write_json(receipt, known)
        report(f"{file.path}: {'fetched' if fresh else 'there already'}, {path.stat().st_size:,} bytes, {file.licence}")
        paths.append(path)
    if any(file.licence == NON_COMMERCIAL for file in files.values()):
        report("AlpacaEval's data are CC-BY-NC-4.0: not for commercial use, and not to be passed on inside other work")
    return paths


def _download(url: str, path: Path) -> None:
    """`url` to `path`, through `.partial` beside it, going on with what is there of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    have = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            mode = "ab" if have and answer.status == 206 else "wb"
            expected = answer.headers.get("Content-Length")
            with partial.open(mode) as file:
                start = file.tell()
                while chunk := answer.read(_CHUNK):
                    file.write(chunk)
                received = file.tell() - start
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # the rest is of another file, or the file was whole already
            partial.unlink()
            return _download(url, path)
        raise UserError(f"{url} could not be fetched: HTTP {error.code} {error.reason}") from error
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{url} could not be fetched ({reason}); run the same command again to go on, or, without a network, put "
            f"the file at {path} by hand or give the folder that holds it with --data-dir"
        ) from error
    if expected is not None and received != int(expected):
        raise UserError(f"{url}: the connection broke off; run the same command again to go on")
    os.replace(partial, path)
