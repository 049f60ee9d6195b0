"""What stands between the network and the API: who may ask, and how much.

A server on the loopback interface is reachable for every web page that is open in a browser on the same machine. Two
headers tell such a page apart, which it cannot forge: `Origin`, which browsers send with every POST, must be the
server's own or an allowed one; and without an API key `Host` must be an address, `localhost` or an allowed name, since
a page that points its own domain at 127.0.0.1 (DNS rebinding) is of the same origin, but has its domain in `Host`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from mambalign.generation.protocol import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

LINGER_SECONDS = 5.0  # of reading on behind a refusal, so that a client that is still sending sees it
LINGER_BYTES = 64 << 20


@dataclass(frozen=True)
class Rules:
    """keys: any of them lets in; none: everybody is. hosts: names beside addresses and localhost. body_bytes,
    body_seconds: of a request's body. open_requests: that are being read or answered at a time."""

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    open_requests: int = 1024


class Gate:
    """ASGI middleware: refuses what `rules` do not allow, hands on requests whose body is there, whole.

    `closed` says why no more requests are taken, or nothing. `answered(path, status)` is told of every request; status
    499 is a client that went away before it had an answer.
    """

    def __init__(
        self,
        app: App,
        rules: Rules,
        closed: Callable[[], str | None],
        answered: Callable[[str, int], None],
    ):
        self.app, self.rules, self.closed, self.answered = app, rules, closed, answered
        self.open = 0
        self._digests = [hashlib.sha256(key.encode()).digest() for key in rules.keys]

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.open += 1
        try:
            await self._pass(scope, receive, counted)
        finally:
            self.open -= 1
            self.answered(scope["path"], status)

    async def _pass(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        source = _Source(receive)
        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self._check_origin(headers)
            if scope["path"].startswith("/v1/") or scope["path"] == "/v1":
                self._check_key(headers)
                self._check_room()
            body = await self._body(headers, source)
        except ApiError as error:
            await _refuse(error, source, send)
            return
        if body is None:
            return
        await self.app(scope, _replaying(body, receive), send)

    def _check_origin(self, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if not self.rules.keys and not self._is_own_name(host):
            raise ApiError(
                403,
                f"this server does not answer to the name {host!r} (a web page could have pointed that name here); "
                "use an address or localhost, or start the server with --allow-host NAME",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is None or origin in self.rules.origins:
            return
        if origin.partition("://")[2].lower() != host.lower():
            raise ApiError(
                403,
                f"a web page of {origin!r} may not use this server; allow it with --allow-origin {origin}",
                code="origin_not_allowed",
            )

    def _is_own_name(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
        name = name.strip("[]").lower().removesuffix(".")
        if name == "localhost" or name in self.rules.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _check_key(self, headers: dict[str, str]) -> None:
        if not self._digests:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(
                401,
                "this server needs its API key: send the header 'Authorization: Bearer KEY'",
                code="missing_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        if not any([hmac.compare_digest(digest, known) for known in self._digests]):  # all are compared, always
            raise ApiError(
                401, "the API key is not the server's", code="invalid_api_key", headers={"www-authenticate": "Bearer"}
            )

    def _check_room(self) -> None:
        reason = self.closed()
        if reason:
            raise ApiError(503, reason, code="shutting_down", headers={"retry-after": "5", "connection": "close"})
        if self.open > self.rules.open_requests:
            raise ApiError(429, "too many open requests", code="too_many_requests", headers={"retry-after": "1"})

    async def _body(self, headers: dict[str, str], source: _Source) -> bytes | None:
        """The whole body; None if the client went away. Counted while it is read: its length may not be announced."""
        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self.rules.body_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self.rules.body_seconds):
                while True:
                    body += await source.read()
                    if len(body) > self.rules.body_bytes:
                        raise self._too_large()
                    if source.ended:
                        return None if source.gone else bytes(body)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not arrive within {self.rules.body_seconds:g} seconds",
                code="body_timeout",
                headers={"connection": "close"},
            ) from None

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self.rules.body_bytes:,} bytes (--max-body-bytes)",
            code="body_too_large",
            headers={"connection": "close"},
        )


def _replaying(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out `body`, then what comes after it (that the client went away)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


class _Source:
    """A request's body as it comes. ended: there is no more of it; gone: because the client went away."""

    def __init__(self, receive: Receive):
        self._receive = receive
        self.ended = self.gone = False

    async def read(self) -> bytes:
        message = await self._receive()
        self.gone = message["type"] == "http.disconnect"
        self.ended = self.gone or not message.get("more_body", False)
        return message.get("body", b"")


async def _refuse(error: ApiError, source: _Source, send: Send) -> None:
    """Answer with an error while the client may still be sending.

    The response is complete for the client, but not ended towards the server until the rest of the body is read and
    thrown away: a connection that is closed with unread bytes is reset, and takes the answer with it.
    """
    body = error.encoded()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    seen = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while not source.ended and seen <= LINGER_BYTES:
                seen += len(await source.read())
    await send({"type": "http.response.body", "body": b"", "more_body": False})
