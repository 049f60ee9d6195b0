"""The demo's own tokenizer: a byte-level BPE of under a thousand tokens, learned from the demo's own sentences."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TURN = "</s>"
PADDING = "<pad>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
MAX_VOCABULARY = 1024


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer learned from `texts`, the same for the same texts.

    All 256 bytes are in its alphabet, so any text encodes and decodes unchanged; every word of the demo becomes one
    token, which keeps its examples at some thirty tokens. Padding is on the left, as batched generation needs it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=[PADDING, END_OF_TURN, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        additional_special_tokens=list(ROLES),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
