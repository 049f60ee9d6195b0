"""Make what the tiny recipes train on: a random Mamba of 0.1 million parameters, its tokenizer, and small data.

python recipes/tiny/prepare.py [FOLDER]     # default data/tiny, where the recipes look from the working directory
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import MambaConfig, MambaForCausalLM

from mambalign.demo.benchmark import write_alpaca, write_mt_bench
from mambalign.demo.tasks import chat_rows, held_out_conversations, held_out_problems, preference_rows
from mambalign.demo.tokenizer import build_tokenizer


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main(folder: Path) -> None:
    chats = list(chat_rows(200, seed=0))
    write_jsonl(folder / "sft" / "train.jsonl", chats)
    write_jsonl(folder / "sft" / "test.jsonl", chat_rows(20, seed=0, held_out=True))
    write_jsonl(folder / "dpo" / "train.jsonl", preference_rows(200, seed=0))
    write_jsonl(folder / "dpo" / "test.jsonl", preference_rows(20, seed=0, held_out=True))

    tokenizer = build_tokenizer(message["content"] for chat in chats for message in chat["messages"])
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=64,
        state_size=8,
        num_hidden_layers=2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    MambaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write_mt_bench(folder / "eval", held_out_conversations(2, seed=0))
    write_alpaca(folder / "eval", held_out_problems(2, seed=0))
    print(f"wrote {folder}/base, {folder}/sft, {folder}/dpo and {folder}/eval")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data/tiny"))
