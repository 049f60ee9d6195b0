"""Runs what the documents say CI runs: page after page, in one folder, in a shell of its own for every block.

A `mambalign` costs seconds of imports, and a `python` that loads a model the same. Here both are a small program that
hands its arguments, folder, environment and streams to a process that has imported all already and forks. What runs is
the same `mambalign.cli.main()`, or the same script.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import check
import hooks

SECONDS = 120  # of one block
PRELOADED = (
    "datasets", "matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "peft",
    "torch.utils.tensorboard", "transformers.trainer", "mambalign.check", "mambalign.cli", "mambalign.evals.judging",
    "mambalign.evals.rule_judge", "mambalign.generation.engine", "mambalign.generation.scoring", "mambalign.train.run",
)  # fmt: skip
_CLIENT = """\
#!{python} -SE
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
said = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(said).to_bytes(4, "big")], [0, 1, 2])
server.sendall(said)
sys.exit(int(server.recv(8) or b"137"))
"""


def run_pages(folder: Path, environment: dict[str, str]) -> list[str]:
    """Problems of all blocks that CI runs; a page's later blocks are not run after a failure."""
    problems = []
    for page in check.pages():
        found = check.blocks(page)
        runnable = [block for block in found if block.is_run]
        if runnable:
            check.write_files(found, folder)
            failed = next(filter(None, (run(block, folder, environment) for block in runnable)), None)
            problems += [failed] if failed else []
    return problems


def run(block: check.Block, folder: Path, environment: dict[str, str]) -> str | None:
    """Run a block; what went wrong, with the end of what it said."""
    program = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": ["python", "-c"]}[block.language]
    shell = [shutil.which(program[0], path=environment["PATH"]) or program[0], *program[1:]]
    begun = time.monotonic()
    try:
        done = subprocess.run(
            [*shell, block.text], cwd=folder, env=environment, stdin=subprocess.DEVNULL, timeout=SECONDS,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"{block.place}: not done after {SECONDS} s"
    if os.environ.get("DOCS_TIMES"):
        print(f"{time.monotonic() - begun:6.1f} s  {block.place}", file=sys.stderr)
    return f"{block.place}: exit code {done.returncode}\n{done.stdout[-2000:]}" if done.returncode else None


@contextmanager
def ready() -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder with the recipes in it, and the environment of its shells."""
    scratch = Path(tempfile.mkdtemp(prefix="mambalign-docs-"))
    folder, tools, address = scratch / "work", scratch / "bin", str(scratch / "socket")
    folder.mkdir(), tools.mkdir()
    for name in ("recipes", "benchmarks"):
        (folder / name).symlink_to(hooks.ROOT / name)
    for name in ("mambalign", "python"):
        client = tools / name
        client.write_text(_CLIENT.format(python=sys.executable, address=address), encoding="utf-8")
        client.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(hooks.ROOT), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "hub"),
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    server = subprocess.Popen([sys.executable, __file__, address], env=environment, start_new_session=True)
    try:
        while not Path(address).exists():
            assert server.poll() is None, "the process that runs the documents' commands did not start"
            time.sleep(0.05)
        yield folder, environment
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        shutil.rmtree(scratch, ignore_errors=True)


def serve(address: str) -> None:
    """Import what the verbs need, then run every command that comes in a fork."""
    for module in PRELOADED:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    listener = socket.socket(socket.AF_UNIX)
    beside = f"{address}.new"
    listener.bind(beside)
    listener.listen()
    os.rename(beside, address)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            code = _answer(connection)
            connection.sendall(str(code).encode())
            os._exit(0)
        connection.close()


def _answer(connection: socket.socket) -> int:
    """Be the program that asked, and return its exit code."""
    head, streams, _, _ = socket.recv_fds(connection, 4, 3)
    size = int.from_bytes(head, "big")
    words, folder, environment = json.loads(connection.recv(size, socket.MSG_WAITALL))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    program, sys.argv = Path(words[0]).name, words
    try:
        _python() if program == "python" else _mambalign()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _mambalign() -> None:
    import mambalign.cli

    mambalign.cli.main()


def _python() -> None:
    """`python FILE ...`, `python -c TEXT ...` or `python -m MODULE ...`."""
    what, *rest = sys.argv[1:]
    sys.path[0] = os.getcwd() if what.startswith("-") else str(Path(what).parent)
    if what == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif what == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [what, *rest]
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
