"""The selective scan against the length of its sequences: ours, mamba-ssm's kernel, a plain loop, and two floors.

Correctness first: outputs and every gradient against float64 on the same inputs, in bf16 and in fp32, in rows and in
many short segments with forks. No time is shown unless ours is within 1e-2 (bf16) or 1e-5 (fp32), or no further off
than the peer, and a second run repeats the first bit for bit. Then forward, and forward + backward, in turn, medians.

The floors say what no kernel on this machine goes below: reading the inputs and writing the outputs once at the
bandwidth of a copy, and one exponential for every token, channel and state (two with the backward pass, which computes
the states again) at the rate of the units that have them.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from mambalign.bench.measure import DEVICE, Result, Row, free_memory, result_of, say, timed
from mambalign.bench.ops import Cases, Contestant, channels_last, check, measure, rows_first
from mambalign.ops import Segments, selective_scan
from mambalign.recipe import UserError

N = 16
BF16 = torch.bfloat16
UNEVEN = "ours, 100 uneven segments"
LOOP = "plain loop"
SLOW_MS = 10_000.0  # after a call that took longer the plain loop is left out
EXPONENTIALS_A_CYCLE = 16  # of a streaming multiprocessor, since compute capability 7.0 (CUDA C++ Programming Guide)

# What fits the machine where the user says nothing.
DEFAULTS: dict[str, Row] = {
    "cpu": {"channels": 512, "tokens": 2048, "lengths": tuple(2**i for i in range(7, 12)), "dtype": "float32",
            "repeats": 5, "minutes": 2.0},
    "cuda": {},
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """channels: of the layer (5,120 are mamba-2.8b's, 1,536 mamba-130m's). tokens: of a call; a longer sequence is a
    call of its own. lengths: of a sequence. minutes: no new length begins after them. tiny: checks on small shapes."""

    channels: int = 5120
    tokens: int = 16384
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    dtype: str = "bfloat16"
    repeats: int = 20
    minutes: float = 3.0
    tiny: bool = False


# ---------------------------------------------------------------------------------------------------------- contestants


def scan_inputs(tokens: int, channels: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Packed tensors with the statistics of a trained layer: step sizes around 0.01 to 0.1, A from -1 to -16."""

    def normal(width: int) -> Tensor:
        return torch.randn(tokens, width, device=DEVICE, dtype=dtype)

    made = {
        "u": normal(channels),
        "delta": normal(channels) * 0.5,
        "A": -torch.arange(1, N + 1, device=DEVICE).float().repeat(channels, 1),
        "B": normal(N),
        "C": normal(N),
        "D": torch.ones(channels, device=DEVICE),
        "z": normal(channels),
        "delta_bias": torch.empty(channels, device=DEVICE).uniform_(-4.6, -2.2),
    }
    return {name: value.requires_grad_() for name, value in made.items()}


def scan(batch: int, channels: int, length: int, dtype: torch.dtype = BF16, segments: Segments | None = None) -> Cases:
    """Ours in equal rows (or in `segments`), and mamba-ssm's on the same numbers where it is installed."""
    tokens = batch * length
    given = scan_inputs(tokens, channels, dtype)
    d_y = torch.randn(tokens, channels, device=DEVICE, dtype=dtype)
    rows = Segments.from_lengths([length] * batch)
    cases = {"ours": Contestant(partial(selective_scan, delta_softplus=True, segments=segments or rows), given, (d_y,))}
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return cases
    if segments is None:  # it knows nothing of them
        turned = {
            name: (rows_first(batch, value) if name in ("u", "delta", "B", "C", "z") else value.detach())
            for name, value in given.items()
        }
        turned = {name: value.requires_grad_() for name, value in turned.items()}
        theirs = partial(selective_scan_fn, delta_softplus=True)
        cases["mamba-ssm"] = Contestant(theirs, turned, (rows_first(batch, d_y),), channels_last)
    return cases


def plain_loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor, rows: int
) -> Tensor:
    """What one has without kernels: all decays `[rows, L, D, N]` at once, then a step a token, in fp32."""
    dtype = u.dtype
    u, delta, B, C, z = (x.unflatten(0, (rows, -1)).float() for x in (u, delta, B, C, z))
    step = torch.nn.functional.softplus(delta + delta_bias)
    decay = torch.exp(step[..., None] * A)
    entering = (step * u)[..., None] * B[:, :, None]
    state = torch.zeros_like(decay[:, 0])
    outputs = []
    # Views made at once: slices one by one would each have a gradient of the whole length, a quadratic loop.
    for factor, new, read in zip(decay.unbind(1), entering.unbind(1), C.unbind(1), strict=True):
        state = factor * state + new
        outputs.append((state * read[:, None]).sum(-1))
    y = (torch.stack(outputs, 1) + u * D) * torch.nn.functional.silu(z)
    return y.flatten(0, 1).to(dtype)


def plain(ours: Contestant, batch: int) -> Contestant:
    return Contestant(partial(plain_loop, rows=batch), ours.given, ours.d_outputs)


def contestants(batch: int, channels: int, length: int, dtype: torch.dtype, loop: bool) -> Cases:
    """At several rows also the same tokens in 100 uneven segments; the plain loop if asked."""
    cases = scan(batch, channels, length, dtype)
    ours, tokens = cases["ours"], batch * length
    if batch > 1 and tokens > 200:
        cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(0))[:99].sort().values + 1
        segments = Segments(torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])]))
        apply = partial(selective_scan, delta_softplus=True, segments=segments)
        cases[UNEVEN] = Contestant(apply, ours.given, ours.d_outputs)
    if loop:
        cases[LOOP] = plain(ours, batch)
    return cases


# --------------------------------------------------------------------------------------------------------------- floors


def bandwidth() -> float:
    """Bytes a second of a copy that no cache holds, read and written."""
    size = 2**30 if DEVICE.type == "cuda" else 2**27
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    best = min(timed(lambda: target.copy_(source))[0] for _ in range(5))
    return 2 * size / best * 1e3


def exponential_rate() -> float | None:
    """float32 exponentials a second: of a card its special function units at their highest clock, of a CPU measured.

    None where the card does not say its clock.
    """
    if DEVICE.type != "cuda":
        x = torch.full((16384,), 0.5)  # stays in a core's cache
        out = torch.empty_like(x)
        return x.numel() / min(timed(lambda: torch.exp2(x, out=out), burst=200)[0] for _ in range(5)) * 1e3
    card = torch.cuda.get_device_properties(DEVICE)
    clock = getattr(card, "clock_rate", None) or _clock_rate()
    return None if not clock else card.multi_processor_count * EXPONENTIALS_A_CYCLE * clock * 1e3


def _clock_rate() -> int | None:
    """kHz of the card, of which older releases of torch do not tell; None without cuda-bindings."""
    with contextlib.suppress(ImportError):
        from cuda.bindings import driver

        asked = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CLOCK_RATE
        error, clock = driver.cuDeviceGetAttribute(asked, torch.cuda.current_device())
        return None if int(error) else int(clock)
    return None


def floors(tokens: int, channels: int, itemsize: int, bytes_a_second: float, exponentials: float | None) -> Row:
    """Milliseconds below which no kernel of the scan goes: u, delta, z, y and B, C, and with the backward pass also
    dy, du, ddelta, dz and dB, dC, each moved once; one exponential a state, two with the backward pass."""
    forward = tokens * itemsize * (4 * channels + 2 * N)
    backward = tokens * itemsize * (7 * channels + 4 * N)  # reads u, delta, z, dy; writes du, ddelta, dz
    states = tokens * channels * N
    row: Row = {
        "forward_bytes_ms": 1e3 * forward / bytes_a_second, "both_bytes_ms": 1e3 * (forward + backward) / bytes_a_second
    }  # fmt: skip
    if exponentials:
        row |= {
            "forward_exponentials_ms": 1e3 * states / exponentials, "both_exponentials_ms": 2e3 * states / exponentials
        }  # fmt: skip
    return row


# ------------------------------------------------------------------------------------------------------------ measuring


def check_all(loop: bool, batch: int = 3, channels: int = 256, length: int = 700) -> Row:
    """`ops.check` in both precisions, in rows and in 100 segments with forks; the errors by precision and case."""
    odd = batch * length // 100
    tree = Segments.from_lengths([odd] * 100, [-1, 0, 0, 1] * 25)
    found: Row = {}
    for dtype in (BF16, torch.float32):
        rows = scan(batch, channels, length, dtype)
        if loop:
            rows[LOOP] = plain(rows["ours"], batch)
        for op, cases in (
            ("scan", rows),
            ("scan, 100 segments and forks", scan(1, channels, 100 * odd, dtype, tree)),
        ):
            found[f"{op}, {str(dtype).removeprefix('torch.')}"] = check(op, cases, dtype)
    return found


def run(options: Options) -> Result:
    """Check, then measure; a row for each contestant and length.

    Raises:
        UserError: an option that makes no sense.
        NoNumbers: ours is wrong, or not repeatable.
    """
    if options.dtype not in ("bfloat16", "float16", "float32"):
        raise UserError(f"--dtype {options.dtype!r}: choose bfloat16, float16 or float32")
    if not options.lengths or min(*options.lengths, options.channels, options.tokens) < 1:
        raise UserError("--lengths, --channels and --tokens must be at least 1")
    deadline = time.monotonic() + 60 * options.minutes
    torch.manual_seed(0)
    loop = DEVICE.type == "cpu"
    errors = check_all(loop, *((2, 16, 150) if options.tiny else ()))
    dtype = getattr(torch, options.dtype)
    speed, exponentials = bandwidth(), exponential_rate()
    rate = "an unknown number of" if exponentials is None else f"{exponentials / 1e9:,.1f}"
    say(f"this machine copies {speed / 1e9:,.0f} GB/s and makes {rate} exponentials a nanosecond")
    rows: list[Row] = []
    for length in sorted(options.lengths):
        if rows and time.monotonic() > deadline:
            say(f"{options.minutes:g} minutes are over: no length from {length:,} on")
            break
        batch = max(1, options.tokens // length)
        free_memory()
        cases = contestants(batch, options.channels, length, dtype, loop)
        shape = f"{batch} x {length:,} x {options.channels:,}"
        left = max(1.0, deadline - time.monotonic())
        burst = 5 if DEVICE.type == "cuda" else 1
        found = measure("selective_scan", shape, cases, options.repeats, burst, seconds=min(20.0, left / 4))
        facts = {"length": length, "batch": batch, "channels": options.channels, "tokens": batch * length}
        limits = floors(batch * length, options.channels, dtype.itemsize, speed, exponentials)
        rows += [row | facts | limits for row in found]
        spent = next((row["both_ms"] for row in found if row["who"] == LOOP), 0.0)
        if loop and spent > SLOW_MS:
            loop = False
            say(f"{LOOP}: left out from here on, a call took {spent / 1e3:.1f} s")
        del cases
    settings = {**asdict(options), "bytes_per_second": speed, "exponentials_per_second": exponentials, "errors": errors}
    return result_of("scan", rows, settings, _summary(rows))


def _summary(rows: list[Row]) -> Row:
    """Ours over each other contestant, forward + backward, by length."""
    times = {(row["who"], row["length"]): row["both_ms"] for row in rows}
    found: Row = {}
    for (who, length), ms in times.items():
        if who not in ("ours", UNEVEN) and ("ours", length) in times:
            found.setdefault(f"times as fast as {who}", {})[str(length)] = ms / times["ours", length]
    return found
