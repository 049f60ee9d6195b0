"""What judging costs: estimated before, bounded during, summed up after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mambalign.recipe import UserError

CHARACTERS_A_TOKEN = 4.5  # of English judge prompts; 5.1 was measured on AlpacaEval's, so estimates are a little high
TEMPLATE_TOKENS = 100  # what a chat template may add to a prompt, at most


@dataclass(frozen=True)
class Prices:
    """Money for a million tokens, in any currency."""

    tokens_in: float
    tokens_out: float

    def __post_init__(self) -> None:
        for name, value in (("--price-in", self.tokens_in), ("--price-out", self.tokens_out)):
            if not 0 <= value < float("inf"):
                raise UserError(f"{name}: {value} is no price of a million tokens")

    def of(self, tokens_in: float, tokens_out: float) -> float:
        """Money for so many tokens."""
        return (tokens_in * self.tokens_in + tokens_out * self.tokens_out) / 1e6


def estimated_tokens(messages: Iterable[dict[str, str]]) -> float:
    """Of a prompt, from its characters; no tokenizer, since a judge's is rarely known."""
    return sum(len(message["content"]) for message in messages) / CHARACTERS_A_TOKEN


def most_tokens(messages: Iterable[dict[str, str]]) -> int:
    """Which a prompt cannot exceed: every token has at least one byte."""
    return TEMPLATE_TOKENS + sum(len(message["content"].encode(errors="replace")) for message in messages)


@dataclass
class Budget:
    """Tokens and money of one command.

    `most` bounds the money: a call is begun only if all that was spent, and the worst case of all that is under way
    with it, stay within. Calls whose reply was lost or told no usage count with their worst case (`unknown`).

    Raises:
        UserError: a bound without prices.
    """

    prices: Prices | None = None
    most: float | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    unknown_in: int = 0
    unknown_out: int = 0
    reserved: float = 0.0

    def __post_init__(self) -> None:
        if self.most is not None and self.prices is None:
            raise UserError("--max-cost needs the judge's prices of a million tokens: --price-in and --price-out")
        if self.most is not None and not self.most >= 0:
            raise UserError(f"--max-cost: {self.most} is no amount of money")

    @property
    def spent(self) -> float:
        """Money so far, at most."""
        prices = self.prices or Prices(0, 0)
        return prices.of(self.tokens_in + self.unknown_in, self.tokens_out + self.unknown_out)

    def reserve(self, worst: tuple[int, int]) -> bool:
        """Set aside what a call may cost at most; False where that is more than is left."""
        money = self.prices.of(*worst) if self.prices else 0.0
        if self.most is not None and self.spent + self.reserved + money > self.most:
            return False
        self.reserved += money
        return True

    def settle(self, worst: tuple[int, int], used: tuple[int, int] | None) -> None:
        """A call that reserved `worst` is over and used so much; None: nobody knows."""
        self.reserved = max(0.0, self.reserved - (self.prices.of(*worst) if self.prices else 0.0))
        if used is None:
            self.unknown_in += worst[0]
            self.unknown_out += worst[1]
        else:
            self.tokens_in += used[0]
            self.tokens_out += used[1]

    def summary(self) -> dict[str, Any]:
        """JSON-able; `cost` is there only where prices are."""
        told: dict[str, Any] = {"tokens_in": self.tokens_in, "tokens_out": self.tokens_out}
        if self.unknown_in:
            told["tokens_at_most_in_lost_replies"] = self.unknown_in + self.unknown_out
        if self.prices:
            told["cost"] = round(self.spent, 6)
        return told
