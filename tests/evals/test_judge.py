"""The judge's client over real HTTP: what goes wrong, what it costs, what is kept."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from mambalign.evals.cost import Budget, Prices
from mambalign.evals.endpoint import Endpoint, Refused, Reply, read_key, retry_after
from mambalign.evals.judge import Call, Judge, NoLogprobs, Outcome, _why_no_verdict
from mambalign.evals.probe import probe
from mambalign.evals.rule_judge import MODEL, Faults, RuleJudge, running
from mambalign.evals.store import ReplyStore
from mambalign.recipe import UserError
from tests.waiting import PATIENCE

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


def calls(n: int, **more: Any) -> list[Call]:
    made = []
    for i in range(n):
        shown = f"[The Start of Assistant's Answer]\n{'word ' * i}number {i}\n[The End of Assistant's Answer]"
        made.append(Call((SYSTEM, {"role": "user", "content": shown}), max_tokens=64, **more))
    return made


def ask(
    url: str, folder: Path, wanted: list[Call], judge: Callable[[Judge], None] | None = None, **more: Any
) -> Outcome:
    """One command: store opened, asked, closed."""
    endpoint = Endpoint(url, more.pop("model", MODEL), more.pop("api_key", ""), more.pop("timeout", PATIENCE))

    async def run() -> Outcome:
        with ReplyStore(folder) as store:
            one = Judge(endpoint, store, **({"backoff": 0.01} | more))
            try:
                return await one.ask(wanted)
            finally:
                if judge:
                    judge(one)
                await endpoint.close()

    return asyncio.run(run())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "faults",
    [
        Faults(throttle_every=3, retry_after="0"),
        Faults(throttle_seconds=0.4, retry_after=""),
        Faults(throttle_seconds=0.3, retry_after="0.1"),
        Faults(error_every=3),
        Faults(drop_every=4),
        Faults(truncate_every=4),
        Faults(html_every=4),
    ],
    ids=lambda faults: str([name for name, value in vars(faults).items() if value != vars(Faults())[name]]),
)
def test_every_call_is_answered_once_through_trouble(faults: Faults, tmp_path: Path) -> None:
    with running(faults) as server:
        wanted = calls(30)
        outcome = ask(server.url, tmp_path, wanted)
        assert all(outcome.replies) and not outcome.failures and outcome.stopped is None
        assert len(server.judged) == 30  # none judged twice, whatever was tried again
        assert len(server.requests) > 31
        before = len(server.requests)
        again = ask(server.url, tmp_path, wanted)
        assert len(server.requests) == before and again.asked == 0
        assert [reply and reply.text for reply in again.replies] == [reply and reply.text for reply in outcome.replies]
    assert len(lines(tmp_path / "replies.jsonl")) == 30


def test_a_storm_makes_all_wait_as_long_as_it_says(tmp_path: Path) -> None:
    with running(Faults(throttle_seconds=1.2, retry_after="1")) as server:
        started = time.monotonic()
        assert all(ask(server.url, tmp_path, calls(40), concurrency=8).replies)
        assert time.monotonic() - started > 1
        refused = len(server.requests) - 41
        assert 1 <= refused <= 24  # a first wave, or what of it came within the storm, at most two more: nobody hammers


def test_waiting_longer_than_patience_is_said_not_done(tmp_path: Path) -> None:
    with running(Faults(throttle_seconds=60, retry_after="3600")) as server:
        started = time.monotonic()
        outcome = ask(server.url, tmp_path, calls(20), patience=3000.0)
        assert outcome.stopped and "asks for 3" in outcome.stopped
        assert time.monotonic() - started < PATIENCE


def test_retry_after_in_every_spelling() -> None:
    assert retry_after({"retry-after": "3", "retry-after-ms": "250"}) == 0.25
    soon = datetime.now(UTC) + timedelta(seconds=3000)
    assert 3000 - PATIENCE < (retry_after({"retry-after": format_datetime(soon, usegmt=True)}) or 0) <= 3000
    past = datetime.now(UTC) - timedelta(days=1)
    assert retry_after({"retry-after": format_datetime(past, usegmt=True)}) == 0
    for junk in ("nan", "inf", "soon", "", "Tue, 99 Foo 2026"):
        assert retry_after({"retry-after": junk}) is None
    assert retry_after({"retry-after": "-5"}) == 0
    assert retry_after({}) is None


def test_a_date_without_a_zone_is_in_gmt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "XYZ-5")
    time.tzset()
    try:
        soon = datetime.now(UTC).replace(tzinfo=None) + timedelta(seconds=30)
        assert 28 < (retry_after({"retry-after": format_datetime(soon)}) or 0) <= 30
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        (Faults(empty_every=4), "empty text"),
        (Faults(filter_every=4), "content filter"),
        (Faults(cut_every=4), "cut off before a verdict"),
    ],
)
def test_what_is_no_verdict_is_a_failure_and_asked_again(faults: Faults, reason: str, tmp_path: Path) -> None:
    wanted = calls(30, verdict=lambda text: "[[" in text)
    with running(faults) as server:
        outcome = ask(server.url, tmp_path, wanted, failures_in_a_row=100)
        assert 0 < len(outcome.failures) < 20
        assert all(reason in why for why in outcome.failures.values())
        assert all((reply is None) == (i in outcome.failures) for i, reply in enumerate(outcome.replies))
        assert len(lines(tmp_path / "replies.jsonl")) == 30 - len(outcome.failures)
        before = len(server.requests)
        server.faults = Faults()
        assert all(ask(server.url, tmp_path, wanted).replies)
        assert len(server.requests) - before == len(outcome.failures)


def test_too_many_failures_end_it(tmp_path: Path) -> None:
    with running(Faults(empty_every=1)) as server:
        outcome = ask(server.url, tmp_path, calls(200), concurrency=4)
        assert outcome.stopped and "5 calls in a row failed" in outcome.stopped and "empty text" in outcome.stopped
        assert len(server.requests) < 15
    with running(Faults(empty_every=2)) as server:
        outcome = ask(server.url, tmp_path / "b", calls(200), failures_in_a_row=1000)
        assert outcome.stopped and "20 calls failed" in outcome.stopped


def test_an_endpoint_that_dies_midway_ends_it(tmp_path: Path) -> None:
    with running() as server:
        ask(server.url, tmp_path, calls(1))
    outcome = ask(server.url, tmp_path, calls(50), tries=2)
    assert outcome.replies[0] and outcome.stopped and "no connection" in outcome.stopped


@pytest.mark.parametrize(
    ("faults", "more", "message"),
    [
        (Faults(api_key="sk-right"), {"api_key": "sk-wrong-key"}, "the key is wrong"),
        (Faults(api_key="sk-right"), {}, "no key was given"),
        (Faults(), {"model": "gpt-4"}, f"it lists {MODEL}"),
        (Faults(error_every=1), {}, "the judge does not answer: 500"),
        (Faults(delay=0.5), {"timeout": 0.05}, "no reply within 0.05 s"),
        (Faults(), {"concurrency": 0}, "--concurrency"),
    ],
)
def test_what_every_call_would_meet_is_said_before_any(
    faults: Faults, more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with running(faults) as server:
        with pytest.raises(UserError, match=message) as raised:
            ask(server.url, tmp_path, calls(50), **more)
        assert not server.judged and len(server.requests) <= 4
    assert "sk-wrong-key" not in str(raised.value)  # the server had repeated it


def test_the_key_is_written_nowhere(tmp_path: Path) -> None:
    with running(Faults(api_key="sk-secret-12345", error_every=5)) as server:
        ask(server.url, tmp_path, calls(20), api_key="sk-secret-12345")
    assert "sk-secret" not in repr(Endpoint(server.url, MODEL, "sk-secret-12345"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "sk-secret" in path.read_text()]


def test_keys_come_from_a_variable_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "abc")
    file = tmp_path / "key"
    file.write_text("def\n")
    assert (read_key("MY_KEY", None), read_key(None, file), read_key(None, None)) == ("abc", "def", "")
    for variable, path, message in (("NO_KEY", None, "no such variable"), ("MY_KEY", file, "give one")):
        with pytest.raises(UserError, match=message):
            read_key(variable, path)
    file.write_text("two words")
    with pytest.raises(UserError, match="nothing else"):
        read_key(None, file)
    file.write_bytes(b"\xef\xbb\xbfdef\r\n")  # as Windows' editor writes it
    assert read_key(None, file) == "def"
    for junk in ("schlüssel".encode(), b"\xff\xfe"):
        file.write_bytes(junk)
        with pytest.raises(UserError, match="printable ASCII"):
            read_key(None, file)
    monkeypatch.setenv("MY_KEY", "schlüssel")
    with pytest.raises(UserError, match="printable ASCII"):
        read_key("MY_KEY", None)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000/v1", "ftp://x/v1", "http://me:pass@x/v1", "http://x/v1?key=1", "http://"]
)
def test_addresses_that_are_none_or_hold_secrets_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="judge_base_url"):
        Endpoint(url, "m")


def test_nothing_makes_the_judge_another_than_results_name() -> None:
    for key in ("model", "messages", "n", "stream"):
        with pytest.raises(UserError, match=f"judge_extra: {key}"):
            Endpoint("http://127.0.0.1/v1", "m", extra={key: 1})
    Endpoint("http://127.0.0.1/v1", "m", extra={"reasoning_effort": "low"})


def test_an_error_in_a_list_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(handler: Any, status: int, message: str, code: str, headers: Any = None, param: Any = None) -> None:
        handler._reply(status, [{"error": {"code": status, "message": message, "status": "INVALID_ARGUMENT"}}], headers)

    with running(Faults(refuse=("temperature",))) as server:
        monkeypatch.setattr("mambalign.evals.rule_judge._Handler._error", error)
        assert all(ask(server.url, tmp_path, calls(1)).replies)
        assert len(server.requests) == 3  # what it said named the parameter: nothing else was tried


# The probe ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", ["temperature", "max_tokens", "logprobs", "top_p", "system"])
def test_the_probe_finds_what_is_refused(refused: str, tmp_path: Path) -> None:
    with running(Faults(refuse=(refused,))) as server:
        assert all(ask(server.url, tmp_path, calls(3)).replies)
        assert len(server.requests) == 2 + 3
        sent = server.judged[-1]
    (probe,) = lines(tmp_path / "probes.jsonl")
    able = probe["abilities"]
    assert able["model"] == MODEL and able["system_fingerprint"] == "rules-1"
    assert [name for name in ("temperature", "top_p", "logprobs", "system") if not able[name]] == [refused] * (
        refused != "max_tokens"
    )
    assert able["limit"] == ("max_completion_tokens" if refused == "max_tokens" else "max_tokens")
    assert sent.get("temperature") == (None if refused == "temperature" else 0)
    assert [message["role"] for message in sent["messages"]] == (
        ["user"] if refused == "system" else ["system", "user"]
    )
    assert SYSTEM["content"] in sent["messages"][0]["content"]


def test_all_refused_at_once_still_judges(tmp_path: Path) -> None:
    faults = Faults(refuse=("temperature", "max_tokens", "logprobs", "top_p", "system"))
    with running(faults) as server:
        assert all(ask(server.url, tmp_path, calls(3)).replies)
        assert set(server.judged[-1]) == {"model", "messages", "max_completion_tokens"}


def test_a_refusal_without_a_name_costs_no_other_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambalign.evals.rule_judge.REFUSALS", {"top_p": "Bad request."})
    with running(Faults(refuse=("top_p",))) as server:
        monkeypatch.setattr("mambalign.evals.rule_judge._Handler._error", _without_param)
        ask(server.url, tmp_path, calls(1))
    able = lines(tmp_path / "probes.jsonl")[0]["abilities"]
    assert not able["top_p"] and able["temperature"] and able["logprobs"] and able["system"]


def _without_param(handler: Any, status: int, message: str, code: str, headers: Any = None, param: Any = None) -> None:
    handler._reply(status, {"error": {"message": message}}, headers)


@pytest.mark.parametrize("faults", [Faults(no_logprobs=True), Faults(refuse=("logprobs",))])
def test_log_probabilities_that_are_not_given_are_never_waited_for(faults: Faults, tmp_path: Path) -> None:
    with running(faults) as server:
        with pytest.raises(NoLogprobs, match="gives no log-probabilities"):
            ask(server.url, tmp_path, calls(10, top_logprobs=5))
        assert not server.judged


def test_thoughts_are_not_the_answer() -> None:
    def reply(content: str | None) -> Reply:
        return Reply({"message": {"content": content}}, None)

    assert reply("<think>It says [[5]]?</think>\n[[7]]").text.strip() == "[[7]]"
    assert reply("It says [[5]]?</think>[[7]]").text == "[[7]]"
    assert reply("<think>never ends [[5]]").text == ""
    assert reply("It wrote <think>x</think>, so [[3]]").text.endswith("[[3]]")
    assert reply("It wrote <think>x</think>, so [[3]]").text.startswith("It wrote")
    assert reply(None).text == ""
    assert reply("<think>a</think>b").reasoned and not reply("b").reasoned


FIRST = [{"token": "\n", "logprob": -0.1}, {"token": "m", "logprob": -2.0}, {"token": "M", "logprob": -3.0}]


def told(message: dict[str, Any], top: list[dict[str, Any]] | None) -> bytes:
    logprobs = {"content": [{"token": top[0]["token"], "top_logprobs": top}]} if top else None
    return json.dumps({"choices": [{"message": message, "logprobs": logprobs, "finish_reason": "length"}]}).encode()


def test_log_probabilities_are_a_verdict_whatever_the_first_token_looks_like() -> None:
    """A judge whose likeliest first token is a line break has probabilities of "m" and "M" all the same."""
    endpoint = Endpoint("http://127.0.0.1/v1", "m")
    for content in ("\n", ""):
        reply = endpoint._read(told({"content": content}, FIRST), 0.0)
        assert reply.top_logprobs == {"\n": -0.1, "m": -2.0, "M": -3.0}
        assert _why_no_verdict(Call((), 1, top_logprobs=5), reply) is None
        assert _why_no_verdict(Call((), 100), reply) == "empty text"
    for message, top in (({"content": "\n"}, None), ({"content": "", "reasoning_content": "Hm."}, FIRST)):
        with pytest.raises(Refused, match="empty text"):
            endpoint._read(told(message, top), 0.0)


@pytest.mark.parametrize(("first", "usable"), [("<think>", False), ("m", True)])
def test_log_probabilities_of_a_thought_are_none_of_the_answer(first: str, usable: bool) -> None:
    async def call(params: dict[str, Any], messages: list[dict[str, str]]) -> Reply:
        top = [{"token": first, "logprob": 0.0}]
        message = {"content": "m", "reasoning_content": "Hm."}
        return Reply({"message": message, "logprobs": {"content": [{"top_logprobs": top}]}}, None)

    able = asyncio.run(probe(call, 100))
    assert able.reasons and able.logprobs is usable


# Money --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faults", [Faults(), Faults(no_usage=True), Faults(truncate_every=3), Faults(error_every=3)])
def test_max_cost_is_never_exceeded(faults: Faults, tmp_path: Path) -> None:
    prices, most, budgets = Prices(100.0, 100.0), 0.2, []
    with running(faults) as server:
        outcome = ask(
            server.url, tmp_path, calls(60), lambda judge: budgets.append(judge.budget), budget=Budget(prices, most)
        )
        really = sum(prices.of(len(str(b["messages"])) // 5 + 1, 64) for b in server.answered)
    assert outcome.stopped and "--max-cost 0.2" in outcome.stopped
    assert most - 0.06 < budgets[0].spent <= most  # less than the worst case of one call is left
    assert budgets[0].reserved == pytest.approx(0)
    assert any(outcome.replies) and not all(outcome.replies)
    assert really > 0  # something was bought for it


def test_a_bound_needs_prices() -> None:
    with pytest.raises(UserError, match="--price-in and --price-out"):
        Budget(None, 1.0)
    with pytest.raises(UserError, match="no price"):
        Prices(-1, 1)


def test_a_plan_asks_nothing_and_knows_the_store(tmp_path: Path) -> None:
    with running() as server:
        ask(server.url, tmp_path, calls(4))
        before = len(server.requests)
        judge = Judge(Endpoint(server.url, MODEL), ReplyStore(tmp_path), budget=Budget(Prices(10, 100)))
        plan = judge.plan([*calls(10), *calls(10)])
        assert (plan.calls, plan.stored, plan.tokens_out_at_most, plan.probed) == (10, 4, 6 * 64, True)
        new = sum(len(message["content"]) for call in calls(10)[4:] for message in call.messages)
        assert plan.tokens_in == round(new / 4.5) and plan.cost == Prices(10, 100).of(plan.tokens_in, 6 * 64)
        assert len(server.requests) == before
    assert not (tmp_path / "nowhere").exists()
    ReplyStore(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


# The store ----------------------------------------------------------------------------------------------------------


def test_what_was_asked_decides_what_is_known(tmp_path: Path) -> None:
    """Another sample, text, parameter, model or address is another question."""
    base = calls(1)[0]
    with running() as server:
        known = [base, Call(base.messages, 64, sample=1), Call(base.messages, 65), Call(base.messages, 64, 0.5)]
        ask(server.url, tmp_path, [*known, base])
        assert len(server.judged) == len(known)
    with running() as other:
        ask(other.url, tmp_path, known)
        assert len(other.judged) == len(known)


def test_torn_and_damaged_lines_cost_only_themselves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running() as server:
        ask(server.url, tmp_path, calls(6))
        file = tmp_path / "replies.jsonl"
        rows = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(rows[0] + b"\x00\x00\n" + b"".join(rows[2:5]) + rows[5][:-40])
        before = len(server.judged)
        assert all(ask(server.url, tmp_path, calls(6)).replies)
        assert len(server.judged) - before == 2
    assert "1 lines are damaged" in caplog.text
    assert len([line for line in file.read_bytes().splitlines() if line.startswith(b"{")]) == 6


def test_two_processes_do_not_share_a_store_at_once(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, pathlib\nfrom mambalign.evals.store import ReplyStore\n"
        "with ReplyStore(pathlib.Path(sys.argv[1])):\n    print('in', flush=True)\n    sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "in\n"
        with pytest.raises(UserError, match="another process writes"), ReplyStore(tmp_path):
            pass
        other.communicate("")
    with ReplyStore(tmp_path):
        pass


def test_half_surrogates_in_answers_can_be_sent(tmp_path: Path) -> None:
    shown = "[The Start of Assistant's Answer]\nbroken \ud83d here\n[The End of Assistant's Answer]"
    with running() as server:
        outcome = ask(server.url, tmp_path, [Call((SYSTEM, {"role": "user", "content": shown}), 64)])
        assert outcome.replies[0] and "broken ? here" in server.judged[0]["messages"][1]["content"]


def test_replies_come_back_from_the_store_as_they_were(tmp_path: Path) -> None:
    with running() as server:
        (first,) = ask(server.url, tmp_path, calls(1)).replies
        (second,) = ask(server.url, tmp_path, calls(1)).replies
    assert first == second and first and first.usage and first.model == MODEL and first.time > 0


def test_the_rule_judge_never_poses_as_a_model() -> None:
    with running() as server:
        assert isinstance(server, RuleJudge) and "not-a-language-model" in Endpoint(server.url, MODEL).name
