"""A judge: many calls of one endpoint, each answered once and for all.

What was answered is in a `ReplyStore` and never asked again. Calls run at once up to a bound; when the endpoint has too
much to do (429), all wait together as long as it says; after too many failures, or before too much money is spent, no
further call is begun, those under way are finished, and the outcome says why.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mambalign.evals.cost import Budget, estimated_tokens, most_tokens
from mambalign.evals.endpoint import Again, Endpoint, NotAccepted, Refused, Reply
from mambalign.evals.probe import Abilities, Messages, probe
from mambalign.evals.store import ReplyStore, content_key
from mambalign.recipe import UserError
from mambalign.support import encodable

log = logging.getLogger(__name__)

NO_USAGE_OUT = 16384  # tokens that an answer without a bound may have, for the worst case


class NoLogprobs(UserError):
    """Calls need them and the judge has none."""


@dataclass(frozen=True)
class Call:
    """What is asked, in the benchmarks' words; the endpoint's abilities turn it into a request.

    top_logprobs: how many likeliest first tokens must come back; None: none. sample: tells apart verdicts on the same.
    verdict: says whether a text holds a verdict; one that was cut off (finish_reason length) without is a failure.
    """

    messages: tuple[dict[str, str], ...]
    max_tokens: int
    temperature: float = 0.0
    top_logprobs: int | None = None
    sample: int = 0
    verdict: Callable[[str], bool] = field(default=bool, compare=False)


@dataclass(frozen=True)
class Outcome:
    """Of `Judge.ask`: a reply or None for each call, in their order.

    failures: why a call has none, by its number. stopped: why not all were asked, else None. asked: requests sent.
    """

    replies: list[Reply | None]
    failures: dict[int, str]
    stopped: str | None
    asked: int


@dataclass(frozen=True)
class Plan:
    """What `Judge.ask` would do: numbers of calls, and of those not in the store estimated tokens and money (or None).
    `most`: money if every answer is as long as it may be."""

    calls: int
    stored: int
    tokens_in: int
    tokens_out_at_most: int
    cost: float | None
    probed: bool


class Judge:
    """An endpoint, its store, and the bounds of one command.

    Args:
        concurrency: calls at once.
        budget: prices and the most to spend.
        reasoning_tokens: added to the longest answer of a model that reasons.
        tries: of one call, for troubles other than too many requests.
        patience: seconds without any success while the endpoint only says that it has too much to do, or that it asks
            to wait.
        backoff: seconds before a second try where the endpoint asks for none; doubled with each, at most 60.
        failures_in_a_row: calls that fail one after the other before it is given up.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        store: ReplyStore,
        *,
        concurrency: int = 16,
        budget: Budget | None = None,
        reasoning_tokens: int = 8192,
        tries: int = 8,
        patience: float = 900.0,
        backoff: float = 1.0,
        failures_in_a_row: int = 5,
    ):
        if concurrency < 1:
            raise UserError(f"--concurrency: {concurrency} calls at once are none")
        self.endpoint, self.store, self.concurrency = endpoint, store, concurrency
        self.budget = budget or Budget()
        self.reasoning_tokens, self.tries, self.patience, self.backoff = reasoning_tokens, tries, patience, backoff
        self.failures_in_a_row = failures_in_a_row
        self.asked = 0
        self._probe_key = content_key(endpoint=endpoint.base_url, model=endpoint.model, extra=dict(endpoint.extra))

    @property
    def abilities(self) -> Abilities | None:
        """What an earlier or this command's probe found."""
        row = self.store.probes.get(self._probe_key)
        return Abilities(**row["abilities"]) if row else None

    async def prepare(self, *, again: bool = False) -> Abilities:
        """What the endpoint takes: as stored, else by a probe, which is stored.

        Raises:
            UserError: it cannot be reached, refuses the key or the model, or cannot judge.
        """
        known = None if again else self.abilities
        if known is None:
            known = await probe(self._call_for_probe, self.reasoning_tokens)
            self.store.add_probe(
                {"key": self._probe_key, "endpoint": self.endpoint.base_url, "asked_for": self.endpoint.model}
                | {"abilities": known.to_row(), "time": time.time()}
            )
        for note in known.notes():
            log.info("the judge %s: %s", self.endpoint.name, note)
        if known.model not in (None, self.endpoint.model):
            log.info("the judge %s calls itself %s", self.endpoint.name, known.model)
        return known

    async def _call_for_probe(self, params: dict[str, Any], messages: Messages) -> Reply:
        for number in range(4):
            worst = _worst(params, messages)
            if not self.budget.reserve(worst):
                raise UserError(f"--max-cost {self.budget.most:g} does not even allow the call that probes the judge")
            used: tuple[int, int] | None = (0, 0)
            try:
                self.asked += 1
                reply = await self.endpoint.call(params, messages)
                used = reply.usage
                return reply
            except Refused as refusal:
                used = refusal.usage
                raise
            except Again as trouble:
                used = None if trouble.billed else used
                wait = self._wait(trouble, number)
                if number == 3 or wait > self.patience:
                    raise UserError(f"the judge does not answer: {trouble}") from trouble
                await asyncio.sleep(wait)
            except UserError as error:
                raise await self._with_models(error) from error
            finally:
                self.budget.settle(worst, used)
        raise AssertionError("unreachable")

    async def _with_models(self, error: UserError) -> UserError:
        """A 404 is clearer beside the names that the endpoint does have."""
        names = [] if isinstance(error, NotAccepted) or " 404" not in str(error) else await self.endpoint.models()
        return UserError(f"{error}; it lists {', '.join(sorted(names)[:20])}") if names else error

    def request(self, call: Call, able: Abilities) -> tuple[str, dict[str, Any], Messages]:
        """(key, parameters, messages) of a call."""
        params = able.params(
            call.max_tokens, call.temperature, call.top_logprobs, reasoning_tokens=self.reasoning_tokens
        )
        messages = able.messages([{name: encodable(text) for name, text in one.items()} for one in call.messages])
        key = content_key(
            endpoint=self.endpoint.base_url,
            model=self.endpoint.model,
            params=params | dict(self.endpoint.extra),
            messages=messages,
            sample=call.sample,
        )
        return key, params, messages

    def plan(self, calls: Sequence[Call]) -> Plan:
        """Asks nothing."""
        able = self.abilities or Abilities()
        requests = {key: (params, messages) for key, params, messages in (self.request(call, able) for call in calls)}
        new = [request for key, request in requests.items() if key not in self.store.replies]
        tokens_in = round(sum(estimated_tokens(messages) for _, messages in new))
        tokens_out = sum(_worst(params, messages)[1] for params, messages in new)
        cost = self.budget.prices.of(tokens_in, tokens_out) if self.budget.prices else None
        return Plan(len(requests), len(requests) - len(new), tokens_in, tokens_out, cost, self.abilities is not None)

    async def ask(self, calls: Sequence[Call], description: str = "judging") -> Outcome:
        """Get a reply to every call, from the store or the endpoint. Equal calls are asked once.

        Raises:
            UserError: the endpoint refuses the key, the model or the parameters, or the probe failed.
        """
        able = await self.prepare()
        for call in calls:
            if call.top_logprobs and not able.logprobs:
                raise NoLogprobs(f"the judge {self.endpoint.name} gives no log-probabilities")
        requests = [self.request(call, able) for call in calls]
        todo = {
            key: (call, params, messages)
            for call, (key, params, messages) in zip(calls, requests, strict=True)
            if key not in self.store.replies
        }
        run = _Run(self, deque(todo.items()))
        if todo:
            await run.all(description, len(requests) - len(todo))
        replies = [self.store.replies.get(key) for key, _, _ in requests]
        failures = {i: run.failed[key] for i, (key, _, _) in enumerate(requests) if key in run.failed}
        found = [Reply.from_row(row["reply"]) if row else None for row in replies]
        return Outcome(found, failures, run.stopped, run.asked)

    def _wait(self, trouble: Again, number: int) -> float:
        """Seconds before try `number` + 2, as asked for or exponential, never in step with others."""
        if trouble.wait is not None:
            return trouble.wait * random.uniform(1, 1.1) + random.uniform(0, 0.1 * self.backoff)
        return min(60.0, self.backoff * 2.0**number) * random.uniform(0.5, 1)


Work = tuple[str, tuple[Call, dict[str, Any], Messages]]


class _Run:
    """One `ask`: the workers and what they share."""

    def __init__(self, judge: Judge, queue: deque[Work]):
        self.judge, self.queue = judge, queue
        self.failed: dict[str, str] = {}
        self.stopped: str | None = None
        self.asked = 0
        self._fatal: Exception | None = None
        self._stop = asyncio.Event()
        self._freed = asyncio.Event()  # set and replaced whenever a call is over
        self._under_way = 0
        self._all_wait_until = 0.0
        self._throttled_in_a_row = 0
        self._failed_in_a_row = 0
        self._last_success = time.monotonic()
        self._most_failures = max(20, len(queue) // 10)

    async def all(self, description: str, done: int) -> None:
        with _progress(description, done + len(self.queue), done, self) as self._advance:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.judge.concurrency, len(self.queue))):
                    group.create_task(self._work())
        if self._fatal:
            raise self._fatal

    async def _work(self) -> None:
        while self.queue and not self._stop.is_set():
            key, (call, params, messages) = self.queue.popleft()
            try:
                reason = await self._verdict(key, call, params, messages)
            except (UserError, OSError) as error:  # OSError: the store's disk is full
                self._fatal = error
                self._end(str(error))
                return
            if reason and not self._stop.is_set():
                self._fail(key, reason)
            self._advance()

    async def _verdict(self, key: str, call: Call, params: dict[str, Any], messages: Messages) -> str | None:
        """Ask until there is a reply, and store it; why there is none, otherwise."""
        tries = number = 0
        while await self._admitted(worst := _worst(params, messages)):
            used: tuple[int, int] | None = None  # of a call that is torn off
            try:
                reply = await self.judge.endpoint.call(params, messages)
                used = reply.usage
                why_not = _why_no_verdict(call, reply)
                if why_not:
                    return why_not
                await self.judge.store.add_reply(
                    {"key": key, "endpoint": self.judge.endpoint.base_url, "asked_for": self.judge.endpoint.model}
                    | {"params": params, "sample": call.sample, "reply": reply.to_row()}
                )
                self._throttled_in_a_row = self._failed_in_a_row = 0
                self._last_success = time.monotonic()
                return None
            except Refused as refusal:
                used = refusal.usage
                return str(refusal)
            except Again as trouble:
                used = None if trouble.billed else (0, 0)
                tries += not trouble.throttled
                if tries >= self.judge.tries:
                    return f"{trouble} ({tries} tries)"
                wait = self._back_off(trouble, number)
                number += 1
            except UserError:
                used = (0, 0)
                raise
            finally:
                self._over(worst, used)
            await self._sleep(wait)
        return None

    async def _admitted(self, worst: tuple[int, int]) -> bool:
        """Wait for one's turn; False if there is none any more."""
        while not self._stop.is_set():
            pause = self._all_wait_until - time.monotonic()
            if pause > 0:
                await self._sleep(pause + random.uniform(0, 0.1 * self.judge.backoff))
            elif self.judge.budget.reserve(worst):
                self._under_way += 1
                self.asked += 1
                self.judge.asked += 1
                return True
            elif self._under_way:
                await self._freed.wait()
            else:
                budget = self.judge.budget
                self._end(f"the next call might exceed --max-cost {budget.most:g} ({budget.spent:.4g} are spent)")
        return False

    def _over(self, worst: tuple[int, int], used: tuple[int, int] | None) -> None:
        self.judge.budget.settle(worst, used)
        self._under_way -= 1
        self._freed.set()
        self._freed = asyncio.Event()

    def _back_off(self, trouble: Again, number: int) -> float:
        """Seconds for this call to wait; after several 429s without a success between, all do."""
        wait = self.judge._wait(trouble, number)
        silent = time.monotonic() - self._last_success
        if trouble.throttled:
            self._throttled_in_a_row += 1
            if self._throttled_in_a_row >= max(2, self.judge.concurrency // 4):
                self._all_wait_until = max(self._all_wait_until, time.monotonic() + wait)
        if wait + silent * trouble.throttled > self.judge.patience:
            self._end(f"no verdict for {silent:.0f} s, and the judge asks for {wait:.0f} s more ({trouble})")
        return wait

    def _fail(self, key: str, reason: str) -> None:
        self.failed[key] = reason
        self.judge.store.add_failure({"key": key, "reason": reason, "time": time.time()})
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self.judge.failures_in_a_row:
            self._end(f"{self._failed_in_a_row} calls in a row failed, the last with: {reason}")
        elif len(self.failed) >= self._most_failures:
            self._end(f"{len(self.failed)} calls failed, the last with: {reason}")

    def _end(self, reason: str) -> None:
        """Begin no further call."""
        self.stopped = self.stopped or reason
        self._stop.set()
        self._freed.set()

    async def _sleep(self, seconds: float) -> None:
        """Until then, or until the end."""
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            pass


def _why_no_verdict(call: Call, reply: Reply) -> str | None:
    if call.top_logprobs and reply.top_logprobs is None:
        return "the reply has no log-probabilities"
    if not call.top_logprobs and not reply.text.strip():
        return "empty text"
    if reply.finish_reason == "length" and not call.top_logprobs and not call.verdict(reply.text):
        return f"cut off before a verdict: {' '.join(reply.text.split())[-200:]!r}"
    return None


def _worst(params: dict[str, Any], messages: Messages) -> tuple[int, int]:
    """Tokens (in, out) that a call may cost at most."""
    return most_tokens(messages), int(params.get("max_tokens") or params.get("max_completion_tokens") or NO_USAGE_OUT)


@contextmanager
def _progress(description: str, total: int, done: int, run: _Run) -> Iterator[Callable[[], None]]:
    """A bar with the money so far on a terminal; in a log file a line a minute."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    last = time.monotonic()

    def told() -> str:
        budget = run.judge.budget
        return (f"cost {budget.spent:.4g}" if budget.prices else "") + (f" failed {len(run.failed)}" * bool(run.failed))

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    terminal = sys.stderr.isatty()
    with Progress(
        *columns, TextColumn("{task.fields[told]}"), console=Console(stderr=True), disable=not terminal
    ) as bar:
        task = bar.add_task(description, total=total, completed=done, told=told())

        def advance() -> None:
            nonlocal last
            bar.update(task, advance=1, told=told())
            if not terminal and time.monotonic() - last > 60:
                last = time.monotonic()
                log.info("%s: %d of %d %s", description, bar.tasks[0].completed, total, told())

        yield advance
