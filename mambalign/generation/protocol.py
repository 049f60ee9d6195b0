"""The bodies of OpenAI's API: what may be asked and how it is checked, errors, and the shapes of answers.

What would change an answer and is not supported is refused by name (`tools`, `response_format`, `logit_bias`, the two
additive penalties, ...), unless it has the value that changes nothing. An unknown key is refused, as by OpenAI, and the
nearest known one named: a misspelt `temprature` must not pass for 1.0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mambalign.generation.requests import Sampling
from mambalign.recipe import UserError, nearest

MAX_TOP_LOGPROBS = 20
COMPLETION_TOKENS = 16  # OpenAI's default of the older endpoint

# Accepted and without effect here: they are about accounts, billing and caches elsewhere.
_NO_EFFECT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
}  # fmt: skip
# Values that change nothing; any other is refused. None always changes nothing.
_NEUTRAL: dict[str, tuple[list[Any], str]] = {
    "tools": ([[]], "this server calls no tools; describe them in the system message and parse the text"),
    "tool_choice": (["none", "auto"], "this server calls no tools"),
    "parallel_tool_calls": ([True, False], "this server calls no tools"),
    "functions": ([[]], "this server calls no functions"),
    "function_call": (["none", "auto"], "this server calls no functions"),
    "response_format": ([{"type": "text"}], "only plain text is generated; ask for the format in the prompt"),
    "frequency_penalty": ([0], "only repetition_penalty is supported"),
    "presence_penalty": ([0], "only repetition_penalty is supported"),
    "logit_bias": ([{}], "logits are not changed by request"),
    "modalities": ([["text"]], "only text is generated"),
    "audio": ([], "only text is generated"),
    "prediction": ([], "predicted outputs are not supported"),
    "web_search_options": ([], "this server searches nothing"),
    "reasoning_effort": (["none"], "these models have no reasoning mode"),
    "verbosity": (["medium"], "ask for short or long answers in the prompt"),
    "suffix": ([""], "text cannot be inserted before a suffix: the model reads from left to right"),
    "best_of": ([1], "ask for n answers and choose yourself"),
}

Body = TypeVar("Body", bound="Asked")


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form: `{"error": {message, type, param, code}}`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def encoded(self) -> bytes:
        """ASCII only: a message may quote half a surrogate pair, which UTF-8 cannot spell."""
        return json.dumps(self.body()).encode()


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Stop = Annotated[str, Field(max_length=1000)]


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against listeners on the wire; has no effect here


class Asked(_Strict):
    """What both endpoints share. `top_k`, `min_p`, `repetition_penalty` and `ignore_eos` are not OpenAI's (`extra_body`
    of its client)."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for key, (neutral, why) in _NEUTRAL.items():
            if key in given and given[key] is not None and given[key] not in neutral:
                raise ApiError(400, f"{key} is not supported: {why}", param=key, code="unsupported_parameter")
        return {key: value for key, value in given.items() if key not in _NEUTRAL and key not in _NO_EFFECT}

    @property
    def answers(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def new_tokens(self) -> int | None:
        """How many new tokens are asked for; None: as many as the server gives by itself."""
        return self.max_tokens

    def alternatives(self) -> int | None:
        """`Sampling.logprobs`."""
        raise NotImplementedError

    def sampling(self, max_new_tokens: int, seed: int) -> Sampling:
        """
        Raises:
            ApiError: 400, for values that `Sampling` refuses.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        defaults = Sampling()
        try:
            return Sampling(
                n=self.answers,
                max_new_tokens=max_new_tokens,
                temperature=defaults.temperature if self.temperature is None else self.temperature,
                top_p=self.top_p or defaults.top_p,
                top_k=max(self.top_k or 0, 0),
                min_p=self.min_p or 0.0,
                repetition_penalty=self.repetition_penalty or 1.0,
                seed=seed if self.seed is None else self.seed,
                stop=stop,
                logprobs=self.alternatives(),
                ignore_end=bool(self.ignore_eos),
            )
        except UserError as error:
            raise ApiError(400, str(error), param=str(error).partition(":")[0]) from error


class Part(_Strict):
    type: str
    text: str | None = None


class Said(_Strict):
    """A message. The keys from `name` on come back in answers of OpenAI's client; only nothing may be in them."""

    role: str
    content: str | list[Part] | None = None
    name: None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _parts_are_text(cls, given: Any) -> Any:
        parts = given.get("content") if isinstance(given, dict) else None
        for part in parts if isinstance(parts, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise ApiError(400, f"this model reads text only; a part of type {kind!r} is not supported",
                               param="messages")  # fmt: skip
        return given

    def text(self) -> str | None:
        if isinstance(self.content, list):
            return "".join(part.text or "" for part in self.content)
        return self.content


class ChatAsked(Asked):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Said], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def alternatives(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def turns(self) -> list[dict[str, str | None]]:
        """Messages for a template; OpenAI's newer name of the system's role is the older one here."""
        roles = {"developer": "system"}
        return [{"role": roles.get(said.role, said.role), "content": said.text()} for said in self.messages]


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class TextAsked(Asked):
    """The body of `/v1/completions`."""

    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    def new_tokens(self) -> int | None:
        return self.max_tokens or COMPLETION_TOKENS

    def alternatives(self) -> int | None:
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "logprobs of an echoed prompt are not computed here; leave out echo or logprobs",
                           param="logprobs", code="unsupported_parameter")  # fmt: skip
        return self.logprobs

    def prompts(self) -> Sequence[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


def read_body(kind: type[Body], raw: bytes) -> Body:
    """The body as `kind`.

    Raises:
        ApiError: 400, naming the key: no JSON, too deep, unknown or unsupported keys, wrong types or values.
    """
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        _refuse(kind, error)


def _refuse(kind: type[Asked], error: ValidationError) -> NoReturn:
    found = error.errors(include_url=False, include_input=False)
    # A misspelt key is why another one is missing.
    first = next((item for item in found if item["type"] == "extra_forbidden"), found[0])
    if first["type"] == "json_invalid":
        reason = first["ctx"]["error"]
        raise ApiError(400, f"the body is not JSON that can be read: {reason}", code="invalid_json") from None
    if not first["loc"]:
        raise ApiError(400, f"the body must be a JSON object, such as {_example(kind)}", code="invalid_json") from None
    param = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        known = [*kind.model_fields, *_NEUTRAL, *_NO_EFFECT] if len(first["loc"]) == 1 else []
        hint = nearest(str(first["loc"][-1]), known)
        raise ApiError(400, f"unknown key {param!r}{hint}", param=param, code="unknown_parameter") from None
    if first["type"] == "missing":
        raise ApiError(400, f"{param} is missing, such as {_example(kind)}", param=param) from None
    # Of a union (a text or a list of texts) every member complains.
    problems = dict.fromkeys(
        item["msg"][:1].lower() + item["msg"][1:] for item in found if _path(item["loc"]).startswith(param)
    )
    raise ApiError(400, f"{param}: {'; or '.join(list(problems)[:3])}", param=param) from None


def _path(places: Iterable[int | str]) -> str:
    """OpenAI's way to name a place: `messages[0].content`."""
    text = ""
    for place in places:
        if isinstance(place, int):
            text += f"[{place}]"
        elif place == "str" or place.startswith(("list[", "constrained")):  # a member of a union
            break
        else:
            text += f".{place}" if text else place
    return text


def _example(kind: type[Asked]) -> str:
    if kind is ChatAsked:
        return '{"model": "...", "messages": [{"role": "user", "content": "Hello"}]}'
    return '{"model": "...", "prompt": "Once upon a time"}'


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """Token counts. completion: decoded tokens, without the one that ends a turn; cached: of the prompt's, those whose
    state was known already."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
