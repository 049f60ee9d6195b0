"""Real conversations and preferences as token ids in one small file each, for a GPU machine without `datasets`.

    python benchmarks/real_data.py --sft DATA/sft --dpo DATA/dpo --tokenizer DATA/tokenizer --out data

writes `sft.npz` (conversations), `dpo.npz` (pairs) and `hh.npz` (pairs of more than one turn whose `source` names
hh-rlhf), read, masked and cut to 2,048 tokens by the project's own data code, in a random order that is always the
same. `sft_real.py` and `dpo_real.py` take them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Example = dict[str, Any]
MAX_LENGTH = 2048


def save(path: Path, columns: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Lists of small integers, each column end to end beside the lengths of its rows."""
    arrays = {}
    for name, rows in columns.items():
        arrays[name] = np.concatenate([np.asarray(row, dtype=np.uint16) for row in rows])
        arrays[f"{name}.lengths"] = np.array([len(row) for row in rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


def load(path: Path, count: int | None = None) -> list[Example]:
    """The first `count` examples as the collators take them: int64 columns and `index`."""
    try:
        file = np.load(path)
    except FileNotFoundError:
        raise SystemExit(f"{path} does not exist; benchmarks/real_data.py makes it") from None
    columns = {}
    for name in file.files:
        if not name.endswith(".lengths"):
            ends = np.cumsum(file[f"{name}.lengths"])
            columns[name] = np.split(file[name].astype(np.int64), ends[:-1])
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True), index=index) for index, row in enumerate(rows)][:count]


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    from mambalign.data import chat

    tokenizer = AutoTokenizer.from_pretrained(path)
    chat.apply_template(tokenizer, "zephyr")
    return tokenizer


def _mix(path: Path, split: str) -> tuple[Any, Any]:
    """The recipe, and its rows in random order."""
    from mambalign.data.mixer import load_mix
    from mambalign.recipe import Recipe

    recipe = Recipe(
        dataset_mixer={str(path): 1.0}, dataset_splits=[split], chat_template="zephyr", max_length=MAX_LENGTH
    )
    return recipe, load_mix(recipe, "train").shuffle(seed=0)


def _write(path: Path, tokenized: Any, count: int) -> None:
    kept = tokenized.dataset.select(range(min(count, len(tokenized.dataset))))
    save(path, {name: kept[name][:] for name in kept.column_names if name != "row_id"})
    print(f"{path}: {len(kept)} examples, {path.stat().st_size / 2**20:.1f} MiB; {tokenized.report}")


def _multi_turn(path: Path, folder: Path) -> Path:
    """A folder with those rows of the split that are hh-rlhf's and go on after the first answer."""
    import datasets

    rows = datasets.load_dataset("parquet", data_files=str(path / "train_prefs.parquet"), split="train")
    rows = rows.filter(lambda row: "hh_rlhf" in row["source"] and len(row["chosen"]) > 2)
    rows.to_parquet(folder / "train_prefs.parquet")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", type=Path, required=True, help="folder with a split train_sft of `messages`")
    parser.add_argument("--dpo", type=Path, required=True, help="folder with train_prefs.parquet, pairs with a source")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("data"))
    parser.add_argument("--conversations", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=1000)
    options = parser.parse_args()

    from mambalign.data.mixer import tokenize_preferences, tokenize_sft

    tokenizer = _tokenizer(options.tokenizer)
    with tempfile.TemporaryDirectory() as temporary:
        for name, folder, split, tokenize, count in (
            ("sft", options.sft, "train_sft", tokenize_sft, options.conversations),
            ("dpo", options.dpo, "train_prefs", tokenize_preferences, options.pairs),
            ("hh", _multi_turn(options.dpo, Path(temporary)), "train_prefs", tokenize_preferences, options.pairs),
        ):
            recipe, mix = _mix(folder, split)
            some = mix.select(range(min(2 * count, len(mix))))  # a few are skipped
            _write(options.out / f"{name}.npz", tokenize(some, tokenizer, recipe), count)


if __name__ == "__main__":
    main()
