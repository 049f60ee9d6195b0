"""What an endpoint accepts, found with one tiny call (a few more where it refuses something)."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from mambalign.evals.endpoint import NotAccepted, Refused, Reply
from mambalign.recipe import UserError

Messages = list[dict[str, str]]
PROBE: Messages = [
    {"role": "system", "content": "You answer with a single letter."},
    {"role": "user", "content": "Is this a test? Answer m for yes or M for no, and nothing else."},
]
PROBE_TOKENS = 16
TOP_LOGPROBS = 5
# What an endpoint's complaint is about, by the words in it; where it names none, they are given up in this order.
FEATURES = {
    "logprobs": r"logprob",
    "temperature": r"temperature",
    "top_p": r"top_p|top-p",
    "system": r"system.?.?(role|message|prompt)|\broles?\b",
    "max_tokens": r"max_tokens|max_completion_tokens",
}


@dataclass(frozen=True)
class Abilities:
    """What a judge takes, and who it says it is.

    temperature, top_p, system: whether such a parameter or message may be sent. logprobs: whether the likeliest first
    tokens come back. limit: how the longest answer is called, or None. reasons: it thinks before it answers, so the
    limit must leave room for that. model, system_fingerprint: as its reply names them.
    """

    temperature: bool = True
    top_p: bool = True
    logprobs: bool = True
    system: bool = True
    limit: str | None = "max_tokens"
    reasons: bool = False
    model: str | None = None
    system_fingerprint: str | None = None

    def params(
        self, max_tokens: int, temperature: float, top_logprobs: int | None = None, *, reasoning_tokens: int = 0
    ) -> dict[str, Any]:
        """A request's parameters in this endpoint's words."""
        params: dict[str, Any] = {}
        if self.limit:
            params[self.limit] = max_tokens + (reasoning_tokens if self.reasons else 0)
        if self.temperature:
            params["temperature"] = temperature
        if self.top_p:
            params["top_p"] = 1.0  # some servers would take another from the model's generation_config.json
        if top_logprobs and self.logprobs:
            params |= {"logprobs": True, "top_logprobs": top_logprobs}
        return params

    def messages(self, messages: Messages) -> Messages:
        """A request's messages; without a system role its text begins the user's, as FastChat does it."""
        if self.system or messages[0]["role"] != "system":
            return messages
        system, user, *rest = messages
        return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]

    def notes(self) -> list[str]:
        """Where a call differs from what the benchmarks ask for, and so the number from theirs."""
        told = {
            "it takes no temperature: its verdicts are sampled at its own": not self.temperature,
            "it reasons before it answers": self.reasons,
            "it takes no system message: that text begins the user's": not self.system,
            "it gives no log-probabilities: alpaca_eval's weighted annotators cannot be used": not self.logprobs,
            "its answers have no bound": self.limit is None,
        }
        return [note for note, holds in told.items() if holds]

    def to_row(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


async def probe(call: Callable[[dict[str, Any], Messages], Awaitable[Reply]], reasoning_tokens: int) -> Abilities:
    """What the endpoint behind `call(params, messages)` accepts.

    Raises:
        UserError: it accepts nothing that could be a judge, or answers a harmless question with nothing.
    """

    async def attempt(able: Abilities) -> Abilities | NotAccepted:
        params = able.params(PROBE_TOKENS, 0.0, TOP_LOGPROBS, reasoning_tokens=reasoning_tokens)
        try:
            reply = await call(params, able.messages(PROBE))
        except NotAccepted as refusal:
            return refusal
        except Refused as refusal:
            if not able.reasons and refusal.cut_off:  # all of 16 tokens were thought
                return await attempt(replace(able, reasons=True))
            raise UserError(f"the judge answers a harmless question with: {refusal}") from refusal
        reasons, first = able.reasons or reply.reasoned, reply.top_logprobs
        return replace(
            able,
            # Of a model that thinks they may be those of its first thought, which say nothing of the answer.
            logprobs=able.logprobs and first is not None and (not reasons or bool({"m", "M"} & first.keys())),
            reasons=reasons,
            model=reply.model,
            system_fingerprint=reply.system_fingerprint,
        )

    able, left = Abilities(), [*FEATURES, "max_tokens"]  # the limit twice: it has another name to try
    while isinstance(found := await attempt(able), NotAccepted):
        refusal = found
        named = [name for name, words in FEATURES.items() if name in left and re.search(words, refusal.told, re.I)]
        if not named:  # it does not say what it dislikes: perhaps one thing alone
            for name in FEATURES:
                if isinstance(found := await attempt(_without(name, able)), Abilities):
                    return found
            named = left
        if not named:
            raise UserError(f"{refusal}; nothing that was left out made it accept a call") from refusal
        able = _without(named[0], able)
        left.remove(named[0])
    return found


def _without(feature: str, able: Abilities) -> Abilities:
    if feature == "max_tokens":
        return replace(able, limit="max_completion_tokens" if able.limit == "max_tokens" else None)
    return Abilities(**asdict(able) | {feature: False})
