"""HTCondor's event logs, read without HTCondor.

An event is a line `NNN (cluster.process.subprocess) time text`, indented lines, and `...`. Older pools write the date
without a year. What is not understood is counted, never dropped in silence.
"""

from __future__ import annotations

import calendar
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

_HEAD = re.compile(
    r"(\d{3}) \((\d+)\.(\d+)\.(\d+)\) (?:(\d{4})-(\d\d)-(\d\d)|(\d\d)/(\d\d))[ T]"
    r"(\d\d):(\d\d):(\d\d)(?:\.\d+)?\S*\s*(.*)"
)
SUBMITTED, EXECUTING, EVICTED, TERMINATED, SHADOW, ABORTED, HELD, RELEASED = 0, 1, 4, 5, 7, 9, 12, 13
SUSPENDED, UNSUSPENDED, RESCHEDULED = 10, 11, 21
DISCONNECTED, RECONNECTED, RECONNECT_FAILED, TRANSFER = 22, 23, 24, 40
EVICTION_REASONS = {
    "1014": "the machine is being drained", "1022": "vacated", "1008": "the machine was lost",
    "1025": "its claim was used up", "1000": "periodic_vacate",
}  # fmt: skip


@dataclass(frozen=True)
class Event:
    """`time`: seconds since 1970 as if the log's clock were UTC: good for differences."""

    code: int
    cluster: int
    process: int
    time: int
    text: str
    body: tuple[str, ...] = ()


@dataclass
class JobHistory:
    """One job's fate: `state` is idle, running, held, disconnected, suspended, finished, failed or removed."""

    job: str
    state: str = "idle"
    starts: int = 0
    evictions: int = 0
    holds: int = 0
    lost: int = 0
    reason: str = ""
    machine: str = ""
    gpus: int | None = None
    exit_code: int | None = None
    submitted: int = 0
    since: int = 0
    saved: int | None = field(default=None, repr=False)


def read_events(text: str, year: int | None = None) -> tuple[list[Event], int]:
    """(events in the order of the file, blocks that were not understood).

    The last block may be half written: it is left for the next look, and not counted.
    """
    events: list[Event] = []
    unknown = 0
    blocks = re.split(r"^\.\.\.[ \t]*\r?$\n?", text, flags=re.MULTILINE)
    for block in blocks[:-1]:
        lines = [line for line in block.splitlines() if line.strip("\x00 \t")]
        if not lines:
            continue
        event = _event(lines, year or time.gmtime().tm_year)
        if event is None:
            unknown += 1
        else:
            events.append(event)
    return events, unknown


def _event(lines: list[str], year: int) -> Event | None:
    match = _HEAD.match(lines[0])
    if match is None:
        return None
    code, cluster, process, _, *date = match.groups()[:12]
    text = match.group(13)
    given, month, day, short_month, short_day, hour, minute, second = date
    moment = (int(given or year), int(month or short_month), int(day or short_day), int(hour), int(minute), int(second))
    if not (1 <= moment[1] <= 12 and 1 <= moment[2] <= 31 and moment[3] < 24 and moment[4] < 60 and moment[5] < 61):
        return None
    body = tuple(line.strip() for line in lines[1:])
    return Event(int(code), int(cluster), int(process), calendar.timegm((*moment, 0, 0, 0)), text.strip(), body)


def histories(events: Iterable[Event]) -> dict[str, JobHistory]:
    """`cluster.process` -> what became of it."""
    jobs: dict[str, JobHistory] = {}
    for event in events:
        name = f"{event.cluster}.{event.process}"
        job = jobs.setdefault(name, JobHistory(name, submitted=event.time, since=event.time))
        _apply(job, event)
    return jobs


def _apply(job: JobHistory, event: Event) -> None:
    before = job.state
    if event.code == EXECUTING:
        job.state, job.reason, job.starts = "running", "", job.starts + 1
        job.machine = _value(event, r"SlotName: (\S+)") or _angle(event.text)
        gpus = _value(event, r"GPUs = (\d+)$")
        job.gpus, job.saved = (int(gpus) if gpus else None), event.time
    elif event.code == TRANSFER and "output files" in event.text and event.text.startswith("Finished"):
        job.saved = event.time  # a checkpoint, or what a vacated job left, is safe
    elif event.code in (EVICTED, RESCHEDULED):
        _interrupted(job, event)
        job.evictions += event.code == EVICTED and before in ("running", "disconnected", "suspended")
        code = re.search(r"Code (\d+)", event.text + " ".join(event.body))
        said = _value(event, r"Reason: (.*)") or (EVICTION_REASONS.get(code[1], "") if code else "")
        job.state, job.reason = "idle", said
    elif event.code == TERMINATED:
        ended = _value(event, r"\(1\) Normal termination \(return value (-?\d+)\)")
        killed = _value(event, r"\(0\) Abnormal termination \(signal (\d+)\)")
        job.exit_code = int(ended) if ended else -int(killed) if killed else None
        job.state = "finished" if job.exit_code == 0 else "failed"
        job.reason = "" if job.exit_code == 0 else f"exit code {job.exit_code}" if ended else f"signal {killed}"
    elif event.code == HELD:
        _interrupted(job, event)
        job.state, job.holds = "held", job.holds + 1
        job.reason = " ".join(event.body)
    elif event.code == RELEASED:
        job.state, job.reason = "idle", "released"
    elif event.code == ABORTED:
        job.state, job.reason = "removed", " ".join(event.body)
    elif event.code == DISCONNECTED:
        job.state, job.reason = "disconnected", " ".join(event.body[:1])
    elif event.code == RECONNECTED:
        job.state, job.reason = "running", ""
    elif event.code == RECONNECT_FAILED:
        _interrupted(job, event)
        job.state, job.reason, job.evictions = "idle", " ".join(event.body[:1]), job.evictions + 1
    elif event.code == SUSPENDED:
        job.state = "suspended"
    elif event.code == UNSUSPENDED:
        job.state = "running"
    elif event.code == SHADOW:
        job.reason = " ".join(event.body[:1])
    if job.state != before:
        job.since = event.time


def _interrupted(job: JobHistory, event: Event) -> None:
    """Work since the last transfer home is lost; a machine that fell silent has worked until then."""
    if job.saved is not None:
        job.lost += max(0, (job.since if job.state == "disconnected" else event.time) - job.saved)
        job.saved = None


def _value(event: Event, pattern: str) -> str:
    found = (re.search(pattern, line) for line in event.body)
    return next((match[1] for match in found if match), "")


def _angle(text: str) -> str:
    match = re.search(r"<([^?>]+)", text)
    return match[1] if match else ""
