"""Make a new, random Mamba with a given tokenizer: what the first-run recipes start from.

python recipes/first-run/new_model.py TOKENIZER [FOLDER [HIDDEN_SIZE LAYERS]]     # runs/first/new, 256 wide, 8 layers
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import MambaConfig, MambaForCausalLM

from mambalign.models.checkpoint import load_tokenizer


def main(tokenizer_path: str, folder: Path, hidden_size: int, layers: int) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        initializer_range=0.02,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    MambaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    given = sys.argv[1:]
    tokenizer, folder, hidden_size, layers = given + [None, "runs/first/new", "256", "8"][len(given) :]
    main(tokenizer, Path(folder), int(hidden_size), int(layers))
