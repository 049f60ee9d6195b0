"""One OpenAI-compatible endpoint and model: a call, and what went wrong with it.

Everything that can happen to a call is one of four: a `Reply`; `Again`, worth another try; `Refused`, no verdict for
this call; or a UserError, which every other call would meet too.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mambalign.recipe import UserError

OFFICIAL_HOST = "api.openai.com"
# Codes of a 429 that waiting does not cure, of OpenAI and those who speak like it.
OUT_OF_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
FILTERED = ("content_filter", "content_policy_violation", "invalid_prompt", "responsibleaipolicyviolation")
TOO_LONG = ("context_length_exceeded", "string_above_max_length")


class Again(Exception):
    """Worth another try. `wait`: seconds that the endpoint asked for. `throttled`: it has too much to do (429).
    `billed`: the call may have been worked on, so it may cost."""

    def __init__(self, reason: str, wait: float | None = None, throttled: bool = False, billed: bool = False):
        super().__init__(reason)
        self.wait, self.throttled, self.billed = wait, throttled, billed


class Refused(Exception):
    """This call gets no verdict, others may. `usage`: (tokens in, tokens out) that it cost; None: it did not say.
    `cut_off`: the longest answer was too short for it."""

    def __init__(self, reason: str, usage: tuple[int, int] | None = (0, 0), cut_off: bool = False):
        super().__init__(reason)
        self.usage, self.cut_off = usage, cut_off


class NotAccepted(UserError):
    """The endpoint does not take the request as it is (HTTP 400 or 422). `told`: what it complains about."""

    def __init__(self, message: str, told: str):
        super().__init__(message)
        self.told = told


@dataclass(frozen=True)
class Reply:
    """What the endpoint answered. `choice`: the first choice as it came. `usage`: (tokens in, tokens out), or None.
    `model`: the name that it gives itself. `time`: when it came, Unix seconds."""

    choice: dict[str, Any]
    usage: tuple[int, int] | None
    model: str | None = None
    system_fingerprint: str | None = None
    seconds: float = 0.0
    time: float = 0.0
    reasoning_tokens: int = 0

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Reply:
        """Back from what `to_row` made."""
        usage = row["usage"]
        return cls(**{one.name: row[one.name] for one in fields(cls)} | {"usage": tuple(usage) if usage else None})

    def to_row(self) -> dict[str, Any]:
        """As JSON."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @property
    def text(self) -> str:
        """The answer without thoughts that a server left in it; empty where there is none."""
        content: str = self.choice["message"]["content"] or ""
        thought, end, answer = content.partition("</think>")
        if (
            end
            and thought.count("<think>") <= 1
            and (thought.lstrip().startswith("<think>") or "<think>" not in thought)
        ):
            return answer
        return "" if content.lstrip().startswith("<think>") else content

    @property
    def finish_reason(self) -> str | None:
        return self.choice.get("finish_reason")

    @property
    def reasoned(self) -> bool:
        """Whether the model thought before it wrote."""
        message = self.choice["message"]
        thoughts = message.get("reasoning_content") or message.get("reasoning") or self.reasoning_tokens
        return bool(thoughts) or self.text != (message["content"] or "")

    @property
    def top_logprobs(self) -> dict[str, float] | None:
        """Natural log-probabilities of the likeliest first tokens; None where there are none."""
        try:
            top = self.choice["logprobs"]["content"][0]["top_logprobs"]
            return {str(one["token"]): float(one["logprob"]) for one in reversed(top)} or None
        except (KeyError, IndexError, TypeError, ValueError):
            return None


# They would make the judge another one than results name, or the reply another than one chat completion.
NOT_EXTRA = ("model", "messages", "n", "stream")


@dataclass(frozen=True)
class Endpoint:
    """Where a judge is asked.

    Args:
        base_url: as the openai package takes it, mostly ending in /v1.
        model: the judge's name there.
        api_key: sent as a bearer token, shown and stored nowhere.
        timeout: seconds for one whole call.
        extra: more keys of the request's body, such as {"reasoning_effort": "low"}; none of `NOT_EXTRA`.

    Raises:
        UserError: what these say cannot be an endpoint.
    """

    base_url: str
    model: str
    api_key: str = field(default="", repr=False)
    timeout: float = 300.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url.rstrip("/"))
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError(f"judge_base_url: {self.base_url!r} is no http(s) address such as http://127.0.0.1:8000/v1")
        if url.username or url.password or url.query or url.fragment:
            raise UserError(
                "judge_base_url: no user, password or query may be in the address, since results name it; "
                "a key goes by --judge-key-env or --judge-key-file"
            )
        if url.path.endswith("/completions"):
            raise UserError(f"judge_base_url: leave out what follows /v1 in {self.base_url}")
        if not self.model:
            raise UserError("judge_model: an endpoint needs to be told which model")
        taken = [key for key in NOT_EXTRA if key in self.extra]
        if taken:
            raise UserError(f"judge_extra: {taken[0]} is not for it to say: results name the judge that was asked")
        object.__setattr__(self, "base_url", url.geturl())

    @property
    def name(self) -> str:
        """The judge's name in every result: of OpenAI's own endpoint the model's, else also where it runs.

        >>> Endpoint("http://127.0.0.1:8000/v1", "gpt-4").name
        'gpt-4@127.0.0.1'
        """
        host = urlsplit(self.base_url).hostname
        return self.model if host == OFFICIAL_HOST else f"{self.model}@{host}"

    @property
    def file_name(self) -> str:
        """`name` without what separates folders."""
        return "".join("-" if char in '/\\:*?"<>| ' else char for char in self.name)

    @cached_property
    def _client(self) -> Any:
        try:
            from openai import AsyncOpenAI, DefaultAsyncHttpxClient
        except ImportError as error:
            raise UserError("judging needs the package openai: pip install 'mambalign[eval]'") from error
        loopback = urlsplit(self.base_url).hostname in ("localhost", "127.0.0.1", "::1")
        return AsyncOpenAI(
            base_url=self.base_url,
            api_key=self.api_key or "none",
            max_retries=0,  # ours know of each other, of the budget and of what was stored
            timeout=self.timeout,
            http_client=DefaultAsyncHttpxClient(trust_env=not loopback),  # no proxy leads to one's own machine
        )

    async def close(self) -> None:
        await self._client.close()
        self.__dict__.pop("_client", None)

    async def models(self) -> list[str]:
        """Names that the endpoint lists; empty where it lists none."""
        import openai

        try:
            async with asyncio.timeout(min(self.timeout, 20)):
                page = await self._client.models.with_raw_response.list()
            listed = json.loads(page.http_response.text).get("data") or []
            return [str(one["id"]) for one in listed]
        except (openai.OpenAIError, TimeoutError, ValueError, AttributeError, KeyError, TypeError):
            return []  # only a hint hangs on it

    async def call(self, params: Mapping[str, Any], messages: list[dict[str, str]]) -> Reply:
        """One HTTP call.

        Raises:
            Again, Refused, UserError: as the module says.
        """
        import openai

        started = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout):
                raw = await self._client.chat.completions.with_raw_response.create(
                    model=self.model, messages=messages, **params, extra_body=dict(self.extra) or None
                )
                body = raw.http_response.content
        except (TimeoutError, openai.APITimeoutError) as error:
            raise Again(f"no reply within {self.timeout:g} s", billed=True) from error
        except openai.APIStatusError as error:
            raise self._trouble(error) from error
        except openai.APIConnectionError as error:
            cause = self._clean(str(error.__cause__ or error)) or type(error.__cause__ or error).__name__
            never_sent = type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout")
            raise Again(f"no connection to {self.base_url} ({cause})", billed=not never_sent) from error
        return self._read(body, time.monotonic() - started)

    def _read(self, body: bytes, seconds: float) -> Reply:
        try:
            answer = json.loads(body)
        except ValueError as error:
            begins = self._clean(body[:80].decode(errors="replace"))
            raise Again(f"the reply is no JSON: {begins!r}", billed=True) from error
        if isinstance(answer, dict) and answer.get("error") and not answer.get("choices"):
            raise self._error_in_a_200(answer["error"])
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not (isinstance(choices, list) and choices and _is_choice(choices[0])):
            raise Again(f"the reply is no chat completion: {self._clean(str(answer)[:80])!r}", billed=True)
        reply = Reply(
            choices[0],
            _usage(answer),
            model=_text(answer.get("model")),
            system_fingerprint=_text(answer.get("system_fingerprint")),
            seconds=round(seconds, 3),
            time=time.time(),
            reasoning_tokens=_reasoning_tokens(answer),
        )
        refusal = reply.choice["message"].get("refusal")
        if reply.finish_reason == "content_filter" or refusal:
            raise Refused(f"refused: {self._clean(str(refusal or 'its content filter stopped it'))[:200]}", reply.usage)
        if not reply.text.strip() and (reply.reasoned or reply.top_logprobs is None):
            cut_off = reply.finish_reason == "length"
            why = " (all its tokens went into reasoning)" if cut_off else ""
            raise Refused(f"empty text, finish_reason {reply.finish_reason!r}{why}", reply.usage, cut_off)
        return reply

    def _error_in_a_200(self, error: Any) -> Exception:
        """Gateways put errors of those behind them into a reply that says OK."""
        told = self._clean(str(error.get("message") if isinstance(error, dict) else error))[:300]
        code = str(error.get("code")) if isinstance(error, dict) else ""
        return self._by_status(int(code) if code.isdecimal() else 500, told, code.lower(), None)

    def _trouble(self, error: Any) -> Exception:
        body = error.body
        if isinstance(body, list) and body:  # Google's endpoint puts its error into a list
            body = body[0].get("error") if isinstance(body[0], dict) else None
        body = body if isinstance(body, dict) else {}
        told = self._clean(str(body.get("message") or error.message))[:300]
        code = str(body.get("code") or body.get("type") or "").lower()
        trouble = self._by_status(error.status_code, told, code, retry_after(error.response.headers))
        if isinstance(trouble, NotAccepted):
            trouble.told = f"{body.get('param') or ''} {told}"
        return trouble

    def _by_status(self, status: int, told: str, code: str, wait: float | None) -> Exception:
        said = f"{self.base_url} says {status}: {told}"
        if status in (401, 403):
            how = "the key is wrong" if self.api_key else "no key was given"
            return UserError(f"{said} ({how}; --judge-key-env VARIABLE or --judge-key-file FILE says where it is)")
        if status == 404:
            return UserError(f"{said} (is the model {self.model!r} served there, and does the address end in /v1?)")
        if status == 402 or (status == 429 and code in OUT_OF_MONEY):
            return UserError(f"{said} (the account has no money left; pay, then run the same command again)")
        if status == 429:
            return Again(f"{status}: {told}", wait, throttled=True)
        if status in (408, 409, 425) or status >= 500:
            return Again(f"{status}: {told}", wait)
        if code in FILTERED:
            return Refused(f"refused: {told}")
        if status == 413 or code in TOO_LONG or "maximum context length" in told:
            return Refused(f"too long for the judge: {told}")
        return NotAccepted(said, told)

    def _clean(self, text: str) -> str:
        """`text` without the key, which some endpoints repeat in their errors."""
        text = " ".join(text.split())
        return text.replace(self.api_key, "***") if self.api_key else text


def read_key(variable: str | None, file: Path | None) -> str:
    """The API key in an environment variable or a file; empty where neither is named.

    Raises:
        UserError: it is not there.
    """
    if variable and file:
        raise UserError("the key is in a variable or in a file; give one of --judge-key-env and --judge-key-file")
    if variable:
        key = os.environ.get(variable, "").strip()
        if not key:
            raise UserError(f"--judge-key-env {variable}: there is no such variable, or it is empty")
        return _sendable(key, f"--judge-key-env {variable}")
    return read_key_file(file, "--judge-key-file") if file else ""


def read_key_file(file: Path, option: str) -> str:
    """The key in a file. Raises UserError, which names the `option`."""
    key = file.expanduser().read_text(encoding="utf-8-sig", errors="replace").strip()
    if not key or len(key.split()) > 1:
        raise UserError(f"{option} {file}: it must hold the key and nothing else")
    return _sendable(key, f"{option} {file}")


def _sendable(key: str, where: str) -> str:
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{where}: a key must be of printable ASCII characters: it travels in a header")
    return key


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that `Retry-After` (a number or a date) or `retry-after-ms` asks to wait; None where neither does.

    >>> retry_after({"retry-after": "7"}), retry_after({"retry-after": "soon"})
    (7.0, None)
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    value = headers.get("retry-after")
    seconds = _number(value)
    if seconds is not None or value is None:
        return seconds
    try:
        date = parsedate_to_datetime(value)
        # HTTP's dates are in GMT; one that does not say so is not in this machine's zone for that.
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return max(0.0, value) if math.isfinite(value) else None


def _is_choice(choice: Any) -> bool:
    message = choice.get("message") if isinstance(choice, dict) else None
    return isinstance(message, dict) and isinstance(message.setdefault("content", None), str | None)


def _usage(answer: dict[str, Any]) -> tuple[int, int] | None:
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        return None
    tokens_in, tokens_out = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not (isinstance(tokens_in, int) and isinstance(tokens_out, int) and min(tokens_in, tokens_out) >= 0):
        return None
    return tokens_in, tokens_out


def _reasoning_tokens(answer: dict[str, Any]) -> int:
    try:
        return int(answer["usage"]["completion_tokens_details"]["reasoning_tokens"])
    except (KeyError, TypeError, ValueError):
        return 0


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
