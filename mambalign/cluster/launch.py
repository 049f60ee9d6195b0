"""Processes of one stage on one machine: started together, signalled together, ended together.

Not torchrun, which ends its workers 30 seconds after a SIGTERM and dies of SIGUSR2: a save may take longer. Also a
program, for job scripts: `python -m mambalign.cluster.launch --gpus 1,2,4 --slice 3600 -- COMMAND`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mambalign.cluster.attempts import PATIENCE, Attempts
from mambalign.cluster.keys import EXIT_SAVED

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
GRACE = 120.0  # seconds that the other processes of a stage get once one of them has failed
_PR_SET_PDEATHSIG = 1


class Group:
    """Several processes that live and die together. Signals to us go to each of them, once."""

    def __init__(self, command: Sequence[str], count: int, env: Mapping[str, str], output: Any = None):
        """Start `count` processes of `command` with torch's variables of process groups in their environment.

        Args:
            output: file for stdout and stderr; None leaves them ours.
        """
        self.received: list[int] = []
        self._first: list[int] = []  # exit codes of those that failed while nobody had been told to stop for it
        self._before = {number: signal.signal(number, self._forward) for number in FORWARDED}
        self.processes: list[subprocess.Popen[bytes]] = []
        self._port = _hold_port()
        for rank in range(count):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._port.getsockname()[1]}  # fmt: skip
            more = {name: str(value) for name, value in ranks.items()} if count > 1 else {}
            process = subprocess.Popen(
                command,
                env={**env, **more},
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,  # a Ctrl-C reaches them once, from us
                preexec_fn=_die_with_parent,
            )
            for number in self.received:  # what came before it was there
                process.send_signal(number)
            self.processes.append(process)

    def _forward(self, number: int, _: FrameType | None = None) -> None:
        self.received.append(number)
        self.signal(number)

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self, slice_seconds: float | None = None, tick: Callable[[], None] = lambda: None) -> int:
        """Wait for all; the exit code of the stage.

        85 also where a process died of a signal that was meant to stop it: the same command goes on from its newest
        checkpoint. `slice_seconds` after its start the stage is told to save and stop.
        """
        deadline = time.monotonic() + slice_seconds if slice_seconds else None
        kill_at: float | None = None
        try:
            while any(process.poll() is None for process in self.processes):
                now = time.monotonic()
                if deadline is not None and now > deadline:
                    deadline = None
                    self._forward(signal.SIGUSR1)
                if kill_at is None:
                    self._first = [code for p in self.processes if (code := p.poll()) not in (None, 0, EXIT_SAVED)]
                    if self._first:
                        kill_at = now + GRACE
                        self.signal(signal.SIGTERM)
                if kill_at is not None and now > kill_at:
                    self.signal(signal.SIGKILL)
                time.sleep(0.05)
                tick()
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._port.close()
        return self._code()

    def _code(self) -> int:
        codes = [int(process.returncode) for process in self.processes]
        saved = {EXIT_SAVED, *(-number for number in self.received), *(128 + number for number in self.received)}
        failed = [code for code in codes if code != 0]
        if not failed:
            return 0
        # Of a group that was told to stop, some may fail only because the others went away.
        if any(code in saved for code in failed) and all(code in saved or self.received for code in failed):
            return EXIT_SAVED
        # Others wait for the one that has gone, as NCCL does, and are killed: that is no reason of theirs.
        return _shell_code(self._first or failed)


def _shell_code(codes: Sequence[int]) -> int:
    own = next((code for code in codes if code not in (EXIT_SAVED, -signal.SIGTERM)), codes[0])
    return 128 - own if own < 0 else own


def _die_with_parent() -> None:
    """In the child: SIGTERM when the launcher is killed, so that no orphan trains on, holding the run's lock."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _hold_port() -> socket.socket:
    """A socket with a port for torch to meet at. It is bound and does not listen: so the kernel gives its port to no
    other program in the seconds until torch, which may use an address again, asks for it by name."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


def visible_gpus(env: Mapping[str, str]) -> int:
    """GPUs that this process may use, without asking a driver.

    HTCondor lists them by UUID, and says 10000 where it gave none.

    Example:
        >>> visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-a0223334,GPU-b1223334"})
        2
        >>> visible_gpus({"CUDA_VISIBLE_DEVICES": "10000"}), visible_gpus({"CUDA_VISIBLE_DEVICES": ""})
        (0, 0)
    """
    listed = env.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))
    words = [word.strip() for word in listed.split(",") if word.strip()]
    return 0 if words == ["10000"] else sum(word != "-1" for word in words)


def process_count(counts: Sequence[int], available: int) -> int:
    """Processes to start: the most of `counts` that the GPUs allow; one where there is no GPU."""
    return max((count for count in counts if count <= available), default=1) or 1


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m mambalign.cluster.launch", description=__doc__)
    parser.add_argument("--gpus", default="1", help="numbers of GPUs that the command can use, such as 1,2,4")
    parser.add_argument("--slice", type=float, default=None, help="seconds after which it is told to save and stop")
    parser.add_argument("--record", type=Path, required=True, help="file of the starts and ends so far")
    parser.add_argument("--output-dir", default=None, help="folder that tells how far it is")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(argv)
    record = Attempts(given.record)
    if record.is_stuck(given.output_dir):
        print(f"mambalign: started {PATIENCE} times without getting on; giving up", file=sys.stderr)
        return 1
    record.start(given.output_dir)
    count = process_count([int(word) for word in given.gpus.split(",")], visible_gpus(os.environ))
    code = Group(given.command, count, os.environ).wait(given.slice)
    record.end(code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
