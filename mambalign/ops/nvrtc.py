"""CUDA C++ compiled at run time: `pip` is the only installer, no compiler is needed.

NVRTC comes with CUDA builds of torch; `cuda-bindings` (the extra `gpu`) is its Python face. A source is compiled for a
device and a set of macros in a few seconds, once: machine code is kept in `~/.cache/mambalign/kernels`.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import logging
import os
import re
import struct
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("mambalign")

CACHE = Path(os.path.expanduser("~/.cache/mambalign/kernels"))  # unlike Path.home(), never an error
PREAMBLE = Path(__file__).with_name("scalars.cuh")
IO = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in the preamble
SUMMERS = 8 * 32  # threads of a block that calls the preamble's `sum_rows`


def unavailable(device: torch.device, *inputs: Tensor | None) -> str | None:
    """Why no kernel can run on `device`, or on these inputs; None if one can."""
    if any(t is not None and t.dtype == torch.float64 for t in inputs):
        return "computes in fp32, and an input is fp64"
    return _unavailable(device)


@cache
def _unavailable(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return "needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0 (Ampere) or newer"
    try:
        importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    except (ImportError, OSError, RuntimeError) as error:  # the package, or the library that it looks for
        return f"needs cuda-bindings and NVRTC: pip install 'mambalign[gpu]' ({' '.join(str(error).split())})"
    return None


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def fields(source: Path) -> dict[str, int]:
    """The members of `struct Params` in `source`, and their order."""
    body = re.search(r"struct Params \{(.*?)\n\};", source.read_text(), re.S)
    assert body, f"{source.name} has no struct Params"
    code = re.sub(r"//.*", "", body.group(1))
    return {name: index for index, name in enumerate(re.findall(r"(\w+)\s*[,;]", code))}


@cache
def _layout(source: Path) -> Any:
    """The type of as many words. Kept: ctypes makes an array type anew, in 15 us, once no one holds it."""
    return ctypes.c_int64 * len(fields(source))


def in_fours(rows: Tensor) -> bool:
    """Whether four neighbours can be read at once, anywhere in the rows."""
    return rows.data_ptr() % (4 * rows.itemsize) == 0 and rows.stride(0) % 4 == 0


def pack(source: Path, values: dict[str, Any]) -> Any:
    """`struct Params` as 8-byte words: tensors become addresses; None, and what is not named, 0.

    Called at every launch, and a small model's step is launches: hence no more than a loop.
    """
    order, layout = fields(source), _layout(source)
    words = [0] * len(order)
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, Tensor):
            value = value.data_ptr()
        elif isinstance(value, float):
            value = int.from_bytes(struct.pack("<d", value), "little", signed=True)
        words[order[name]] = value  # a KeyError: no such member
    return layout(*words)


class Module:
    """The kernels of one compiled source on one device; each takes a single `struct Params`.

    The macro CARVEOUT is what they would like to have of the L1 cache as shared memory, in percent; 100 if not given.
    """

    def __init__(self, source: Path, macros: tuple[tuple[str, int], ...], device: torch.device):
        from cuda.bindings import driver

        self._driver, self.source, self.macros = driver, source, dict(macros)
        self._carveout = self.macros.get("CARVEOUT", 100)
        self.device = device if device.index is not None else torch.device(device.type, torch.cuda.current_device())
        started = time.perf_counter()
        self._image = _compile(source, macros, device)
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # makes torch's context current
            self._context = _checked(driver.cuCtxGetCurrent())
            self._library = _checked(driver.cuModuleLoadData(self._image))
        self._functions: dict[str, Any] = {}
        logger.info("%s compiled for %s in %.1f s", source.name, device, time.perf_counter() - started)

    def launch(self, name: str, grid: tuple[int, int], threads: int, values: dict[str, Any], shared: int = 0) -> None:
        """Start kernel `name` on the current stream; nothing is started for an empty grid.

        `shared`: bytes of shared memory a block besides what the kernel declares, at every launch as at the first.
        """
        if 0 in grid:
            return
        if torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self.launch(name, grid, threads, values, shared)
        function = self._functions.get(name) or self._function(name, shared)
        params = pack(self.source, values)
        pointers = ctypes.c_void_p(ctypes.addressof(params))
        # As Triton asks for it: a tenth of the time of `torch.cuda.current_stream()`.
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        arguments = function, *grid, 1, threads, 1, 1, shared, stream, ctypes.addressof(pointers), 0
        launched = self._driver.cuLaunchKernel(*arguments)
        if launched[0] == self._driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            # A thread of autograd's, which has called nothing of CUDA's before: the first op to go backwards is ours.
            _checked(self._driver.cuCtxSetCurrent(self._context))
            launched = self._driver.cuLaunchKernel(*arguments)
        _checked(launched)

    def _function(self, name: str, shared: int) -> Any:
        driver = self._driver
        function = _checked(driver.cuModuleGetFunction(self._library, name.encode()))
        attributes = driver.CUfunction_attribute
        carveout = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        _checked(driver.cuFuncSetAttribute(function, carveout, self._carveout))
        if shared:
            most = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(function, most, shared))
        self._functions[name] = function
        return function


@cache
def module(source: Path, macros: tuple[tuple[str, int], ...], device: torch.device) -> Module:
    """`source` compiled with `macros` for `device`, once per process."""
    return Module(source, macros, device)


def _compile(source: Path, macros: tuple[tuple[str, int], ...], device: torch.device) -> bytes:
    """Machine code for `device`, from the cache where an earlier process made the same."""
    from cuda.bindings import nvrtc

    major, minor = torch.cuda.get_device_capability(device)
    options = [f"--gpu-architecture=sm_{major}{minor}", *(f"-D{name}={value}" for name, value in macros)]
    text = PREAMBLE.read_bytes() + b'#line 1 "' + source.name.encode() + b'"\n' + source.read_bytes()
    version = nvrtc.nvrtcVersion()[1:]
    kept = CACHE / f"{source.stem}-{hashlib.sha256(repr((version, options)).encode() + text).hexdigest()}.cubin"
    if kept.exists():
        return kept.read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(text, source.name.encode(), 0, [], []))
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{source.name}: {error}\n{log.decode(errors='replace')}")
    image = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, image))
    _keep(kept, image)
    return image


def _keep(path: Path, image: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(image)
        os.replace(file.name, path)
    except OSError as error:
        logger.debug("%s is not kept (%s): the next process compiles it again", path, error)


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a call of CUDA's, which returns (error, value)."""
    error, *values = result
    if int(error):
        raise RuntimeError(f"CUDA: {error!r}")
    return values[0] if values else None
