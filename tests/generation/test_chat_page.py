"""The chat page in a real browser, driven through the DevTools protocol. Skipped aloud where there is no Chromium."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import websockets

from mambalign.generation.gate import Rules
from tests.generation.serving import ANSWER, FakeEngine, Live, running
from tests.waiting import PATIENCE, until

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on PATH: the chat page is not tested")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The DevTools address of a headless Chromium."""
    profile = tmp_path_factory.mktemp("chromium")
    options = (
        "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking".split()
    )
    options += ["--no-first-run", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [str(CHROMIUM), *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        port = profile / "DevToolsActivePort"
        until(lambda: process.poll() is not None or (port.exists() and port.read_text().count("\n")))
        assert process.poll() is None, "Chromium does not start"
        yield f"http://127.0.0.1:{port.read_text().splitlines()[0]}"
    finally:
        process.terminate()
        process.wait(PATIENCE)


class Page:
    """A tab. `problems` are what its console and its network complained about."""

    def __init__(self, socket: Any):
        self.socket, self.number = socket, 0
        self.problems: list[str] = []
        self.requests: list[str] = []

    async def send(self, method: str, **params: Any) -> Any:
        self.number += 1
        await self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            message = json.loads(await asyncio.wait_for(self.socket.recv(), PATIENCE))
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self.note(message)

    def note(self, message: Any) -> None:
        if message["method"] == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        if message["method"] == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(message["params"]["exceptionDetails"]))
        if message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] in ("warning", "error"):
            self.problems.append(message["params"]["entry"]["text"])

    async def run(self, script: str) -> Any:
        found = await self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str) -> None:
        end = time.monotonic() + PATIENCE
        while not await self.run(script):
            assert time.monotonic() < end, (script, await self.run("document.body.innerText"), self.problems)
            await asyncio.sleep(0.02)

    async def say(self, text: str) -> None:
        """Type a message and press Enter, as a person does."""
        await self.run("document.getElementById('message').focus()")
        await self.send("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            await self.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)

    async def texts(self) -> list[list[str]]:
        """Who said what, as it is on the page."""
        return await self.run(
            "[...document.querySelectorAll('article')].map(a => [a.className, a.querySelector('.text').textContent])"
        )


@asynccontextmanager
async def opened(browser: str, url: str) -> AsyncIterator[Page]:
    request = urllib.request.Request(f"{browser}/json/new?about:blank", method="PUT")
    tab = json.loads(await asyncio.to_thread(lambda: urllib.request.urlopen(request).read()))
    async with websockets.connect(tab["webSocketDebuggerUrl"], max_size=None) as socket:
        page = Page(socket)
        for domain in ("Page", "Runtime", "Network", "Log"):
            await page.send(f"{domain}.enable")
        await page.send("Page.navigate", url=url)
        await page.until("document.readyState === 'complete' && location.href !== 'about:blank'")
        yield page
        await page.send("Page.close")


def on_page(browser: str, live: Live, steps: Callable[[Page], Awaitable[None]]) -> None:
    async def main() -> None:
        async with opened(browser, live.base + "/") as page:
            await steps(page)

    asyncio.run(main())


IDLE = "document.getElementById('stop').disabled"


def test_a_conversation(browser: str) -> None:
    with running(FakeEngine()) as live:

        async def steps(page: Page) -> None:
            await page.until("document.getElementById('model').textContent === 'tiny'")
            for number, question in enumerate(("hello", "and more"), 1):
                await page.say(question)
                await page.until(f"document.querySelectorAll('article.assistant').length === {number} && {IDLE}")
            assert await page.texts() == [
                ["user", "hello"], ["assistant", ANSWER], ["user", "and more"], ["assistant", ANSWER],
            ]  # fmt: skip
            assert await page.run("document.getElementById('message').value") == ""
            assert page.problems == []
            # Nothing comes from elsewhere.
            assert {url for url in page.requests if not url.startswith(("data:", live.base))} == set()
            await page.run("document.getElementById('reset').click()")
            assert await page.texts() == []

        on_page(browser, live, steps)
        assert live.engine.requests[1].state is not None  # the turns came as they were said
        assert live.engine.requests[0].sampling.temperature == 0.7


def test_what_a_model_says_is_text_and_never_markup(browser: str) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>**b** &lt;"
    with running(FakeEngine(answer=evil)) as live:

        async def steps(page: Page) -> None:
            await page.say("<b>hi</b><script>document.title='owned'</script>")
            await page.until(f"document.querySelectorAll('article.assistant').length === 1 && {IDLE}")
            (_, asked), (_, said) = await page.texts()
            assert asked.startswith("<b>hi</b>") and said == evil
            assert await page.run("document.querySelectorAll('article img, article script, article b').length") == 0
            assert "owned" not in await page.run("document.title")
            # And were a script to come in, the policy would not run it.
            await page.run("document.body.append(Object.assign(document.createElement('script'), "
                           "{textContent: \"document.title = 'owned'\"}))")  # fmt: skip
            assert "owned" not in await page.run("document.title")

        on_page(browser, live, steps)


def test_stop_keeps_what_was_said_and_frees_the_slot(browser: str) -> None:
    engine = FakeEngine(answer="word ", endless=True, step_seconds=0.01)
    with running(engine, max_new_tokens=100_000, max_tokens=200_000) as live:

        async def steps(page: Page) -> None:
            await page.say("talk")
            await page.until("document.querySelectorAll('article.assistant .text').length === 1")
            assert await page.run("document.getElementById('send').disabled")
            await page.run("document.getElementById('stop').click()")
            await page.until(IDLE)
            assert await page.run("document.getElementById('status').textContent") == "Stopped"
            assert "word word".startswith((await page.texts())[1][1][:9])
            live.until_free()
            await page.run("document.getElementById('max_tokens').value = 5")
            await page.say("again")
            await page.until(f"document.querySelectorAll('article.assistant').length === 2 && {IDLE}")
            assert (await page.texts())[3] == ["assistant", "word "]
            assert "Cut off" in await page.run("document.getElementById('status').textContent")

        on_page(browser, live, steps)
        assert engine.cancelled


def test_the_key_is_asked_for_where_there_is_one_and_settings_are_sent(browser: str) -> None:
    with running(FakeEngine(), rules=Rules(keys=("s3cret",))) as live:

        async def steps(page: Page) -> None:
            await page.until("document.getElementById('settings').open")
            assert "API key" in await page.run("document.getElementById('status').textContent")
            await page.say("hello")
            await page.until("document.querySelectorAll('article.error').length === 1")
            assert await page.run("document.getElementById('message').value") == "hello"  # it is not lost
            await page.run(
                "for (const [id, to] of [['key', 's3cret'], ['system', 'be brief'], ['seed', 5], ['temperature', 0]])"
                "{ const e = document.getElementById(id); e.value = to; e.dispatchEvent(new Event('change')); }"
            )
            await page.until("document.getElementById('model').textContent === 'tiny'")
            await page.run("document.getElementById('form').requestSubmit()")
            await page.until(f"document.querySelectorAll('article.assistant').length === 1 && {IDLE}")
            assert "s3cret" not in await page.run("document.body.innerText + location.href + document.cookie")

        on_page(browser, live, steps)
        sampling = live.engine.requests[0].sampling
        assert (sampling.seed, sampling.temperature) == (5, 0)
        assert "be brief" in live.engine.tokenizer.decode(live.engine.requests[0].prompt)


def test_a_failing_engine_is_told(browser: str) -> None:
    with running(FakeEngine(fail_at=3)) as live:

        async def steps(page: Page) -> None:
            await page.say("hello")
            await page.until("document.querySelectorAll('article.error').length === 1")
            assert "fell off the bus" in (await page.texts())[-1][1]
            assert await page.run(f"{IDLE} && !document.getElementById('send').disabled")

        on_page(browser, live, steps)
        live.engine.running.clear()


def test_it_can_be_used_without_a_mouse_or_eyes(browser: str, live: Live) -> None:
    async def steps(page: Page) -> None:
        unnamed = await page.run(
            "[...document.querySelectorAll('input, textarea, button')]"
            ".filter(e => !(e.labels?.length || e.textContent.trim())).map(e => e.id)"
        )
        assert unnamed == []
        assert await page.run("document.documentElement.lang") == "en"
        assert await page.run("document.getElementById('log').getAttribute('aria-live')") == "polite"
        colours = []
        for scheme in ("light", "dark"):
            await page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            colours.append(await page.run("getComputedStyle(document.body).backgroundColor"))
        assert colours == ["rgb(255, 255, 255)", "rgb(22, 24, 28)"]

    on_page(browser, live, steps)


def test_the_page_names_nothing_from_elsewhere(repository: Path) -> None:
    page = (repository / "mambalign/generation/chat.html").read_text(encoding="utf-8")
    assert "http:" not in page and "https:" not in page and "innerHTML" not in page
