"""Text of an answer while it grows: whole characters, and nothing that a stop string may still take back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character (yet)
WINDOW = 16  # tokens after which a decoded window begins anew


class TextStream:
    """Turns tokens into text as they come.

    The pieces that `push` and `finish` return make up `tokenizer.decode(tokens, skip_special_tokens=True)`, up to the
    first stop string. A character whose bytes lie in several tokens comes with the last of them. `stopped` says that a
    stop string was met: nothing more comes.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        # The tokenizers library's own decoder costs a tenth of the wrapper's call, and differs by the clean-up alone.
        self._tidies = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._backend = None if self._tidies else getattr(tokenizer, "backend_tokenizer", None)
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []  # of the window
        self._taken = 0  # characters of the window's text that are dealt with
        self._whole = 0  # tokens of the window behind which a character ends
        self._held = ""  # decoded, and may be the beginning of a stop string
        self.stopped = False

    def _decode(self, tokens: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        if self._backend is not None:
            return str(self._backend.decode(tokens, skip_special_tokens=True))
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def push(self, token: int) -> str:
        """The text that became certain with `token`."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        # A tidying decoder joins " ." and " n't" to the word before: nothing is certain from the last space on.
        certain = len(text[: text.rfind(" ")] if self._tidies and " " in text else text.rstrip(REPLACEMENT))
        fresh, self._taken = text[self._taken : certain], max(certain, self._taken)
        if certain == len(text) and not self._tidies:
            # Decoding goes on from a token behind which a character ended, with one such before it for context.
            if len(self._tokens) > WINDOW and self._whole:
                self._tokens = self._tokens[self._whole :]
                self._taken = len(self._decode(self._tokens))
            self._whole = len(self._tokens)
        return self._release(fresh)

    def finish(self) -> str:
        """What is left: no token follows."""
        fresh = self._decode(self._tokens)[self._taken :]
        text = self._release(fresh)
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, fresh: str) -> str:
        if not self._stop:
            return fresh
        text = self._held + fresh
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
