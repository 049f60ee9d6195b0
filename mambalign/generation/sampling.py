"""Several answers to one prompt. The one place that generates here, for a faster engine to replace."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mambalign.data.chat import end_of_turn_id
from mambalign.recipe import UserError


@dataclass(frozen=True)
class Sampling:
    """n: answers a prompt. top_p: nucleus sampling (arXiv 1904.09751, section 3.1). seed: with the prompt's tokens it
    decides the answers, in whatever order prompts come."""

    n: int = 8
    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_new_tokens < 1:
            raise UserError(f"n ({self.n}) and max_new_tokens ({self.max_new_tokens}) must be at least 1")
        if not self.temperature > 0:
            raise UserError(f"temperature: {self.temperature} must be above 0; at 0 all answers would be the same")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} must be above 0 and at most 1")

    def prompt_seed(self, prompt: Sequence[int]) -> int:
        digest = hashlib.sha256(f"{self.seed}:{','.join(map(str, prompt))}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class Sample:
    """An answer without its end-of-turn token. `finished`: the model ended it, before max_new_tokens did."""

    text: str
    finished: bool


@torch.inference_mode()
def sample(model: Any, tokenizer: Any, prompt: Sequence[int], sampling: Sampling) -> list[Sample]:
    """`sampling.n` answers to the token ids `prompt`, which is computed once: its state is copied to every answer."""
    ids = torch.tensor([list(prompt)], device=model.device)
    cache = None
    if ids.shape[1] > 1:
        cache = model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1).cache_params
        cache.reorder_cache(torch.zeros(sampling.n, dtype=torch.long, device=model.device))
    last = ids[:, -1:].repeat(sampling.n, 1)
    end = end_of_turn_id(tokenizer)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(sampling.prompt_seed(prompt))
        out = model.generate(
            input_ids=last,
            attention_mask=torch.ones_like(last),
            cache_params=cache,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            eos_token_id=end,
            pad_token_id=end,
        )
    samples = []
    for row in out[:, 1:].tolist():
        finished = end in row
        kept = row[: row.index(end)] if finished else row
        samples.append(Sample(tokenizer.decode(kept, skip_special_tokens=True), finished))
    return samples
