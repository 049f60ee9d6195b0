"""C++ for this machine's processor, compiled once by the compiler that is here, if there is one.

Nothing depends on it: what is compiled has a definition in PyTorch, too, which is used where no compiler is found.
Libraries are kept in `~/.cache/mambalign/kernels`, under names that hold all that decides them, the processor included.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

from mambalign.ops.nvrtc import CACHE

logger = logging.getLogger("mambalign")

COMPILERS = ("c++", "g++", "clang++")  # CXX in the environment comes before them
# "For this processor" is another word on Arm.
OPTIONS = (
    "-std=c++17",
    "-O3",
    "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native",
    "-shared",
    "-fPIC",
)
SECONDS = 120


class Unavailable(Exception):
    """There is no compiled library, and this is why."""


@cache
def library(source: Path, macros: tuple[str, ...] = ()) -> ctypes.CDLL:
    """`source` compiled with `macros` defined, with OpenMP where the compiler has it.

    Raises:
        Unavailable: no compiler, or it does not compile the source, or what it makes cannot be loaded.
    """
    compiler = _compiler()
    options = [*OPTIONS, *(f"-D{name}" for name in macros)]
    # What a compiler predefines says its version and what it knows of this processor.
    known = _run([*compiler, *OPTIONS[:3], "-dM", "-E", "-x", "c++", os.devnull])
    digest = hashlib.sha256("\0".join((known, *compiler, *options, source.read_text())).encode()).hexdigest()
    kept = CACHE / f"{source.stem}-{digest}.so"
    with contextlib.suppress(OSError):  # not there, or damaged
        return ctypes.CDLL(str(kept))
    try:
        with tempfile.TemporaryDirectory(dir=_writable(kept.parent)) as folder:
            made = Path(folder) / kept.name
            started = time.perf_counter()
            try:
                _run([*compiler, *options, "-fopenmp", str(source), "-o", str(made)])
            except Unavailable:
                _run([*compiler, *options, str(source), "-o", str(made)])
            logger.info("%s compiled by %s in %.1f s", source.name, compiler[0], time.perf_counter() - started)
            if made.parent.parent != kept.parent:
                return ctypes.CDLL(str(made))
            os.replace(made, kept)
        return ctypes.CDLL(str(kept))
    except OSError as error:
        raise Unavailable(f"what {compiler[0]} made of {source.name} cannot be loaded ({error})") from error


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise Unavailable(
        f"CXX names {named[0]}, which is not here" if named else f"none of {', '.join(COMPILERS)} is here"
    )


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} does not run ({error})") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise Unavailable(f"{command[0]} does not compile it ({first})")
    return done.stdout


def _writable(folder: Path) -> Path | None:
    """`folder`, made if need be; None (the system's folder for temporary files) where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None
