"""Make a new, random Mamba of 16.5 million parameters with a given tokenizer: what the first-run recipes start from.

python recipes/first-run/new_model.py TOKENIZER [FOLDER]     # default folder runs/first/new
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import MambaConfig, MambaForCausalLM

from mambalign.models.checkpoint import load_tokenizer


def main(tokenizer_path: str, folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=256,
        num_hidden_layers=8,
        initializer_range=0.02,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    MambaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "runs/first/new"))
