"""The CUDA kernels without a GPU: the same source compiled as C++, lanes as fibers.

Slow and exact: it finds wrong arithmetic, indices, strides and lanes that part ways. A lane runs as far as it can
without the others of its warp, and a warp as far as it can without the others of its block, the first to the last or
(`BACKWARDS`) the last to the first: what one writes and another reads with no barrier between differs in the two. What
it cannot show is the compiler, hazards between blocks, and speed; tests marked `gpu` run the real thing.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mambalign.ops import cuda_conv, cuda_norm, cuda_scan, nvrtc

COMPILER = shutil.which("g++")
BACKWARDS = False  # which lane and warp comes first

PRELUDE = r"""
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>
#define EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define DYNAMIC_SHARED(type, name)                                   \
  static_assert(sizeof(type) == SHARED_BYTES, "as the host has it"); \
  static type name
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
struct alignas(8) float2 { float x, y; };
static float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(16) float4 { float x, y, z, w; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx, blockDim, gridDim;
static float rsqrtf(float x) { return 1.f / sqrtf(x); }
static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }

// A lane runs until it needs the others. All must get there: lanes that part ways are an error.
static ucontext_t scheduler, lanes[1024];
enum Waiting { RUNNING, AT_WARP, AT_BLOCK, DONE };
static Waiting places[1024];
static unsigned turns[1024];
static float exchanged[2][1024];
static void wait_for_others(Waiting place = AT_WARP) {
  const unsigned lane = threadIdx.x;
  ++turns[lane], places[lane] = place;
  swapcontext(&lanes[lane], &scheduler);
}
static void __syncwarp() { wait_for_others(); }
static void __syncthreads() { wait_for_others(AT_BLOCK); }
static float from_lane_xor(float x, int mask) {
  const unsigned lane = threadIdx.x, side = turns[lane] & 1;
  exchanged[side][lane] = x;
  wait_for_others();
  return exchanged[side][lane ^ mask];
}
static unsigned __float_as_uint(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }
static float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
static float tf32(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }
static float4 mma_tf32(float a0, float a1, float a2, float a3, float b0, float b1, float4 c) {
  static float posted[2][1024][6];
  const unsigned lane = threadIdx.x, side = turns[lane] & 1, warp = lane / 32 * 32, g = lane % 32 / 4, k = lane % 4;
  const float mine[6] = {tf32(a0), tf32(a1), tf32(a2), tf32(a3), tf32(b0), tf32(b1)};
  memcpy(posted[side][lane], mine, sizeof mine);
  wait_for_others();
  float d[4] = {c.x, c.y, c.z, c.w};
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned c = 0; c < 8; ++c) {  // row g + 8 (i / 2) of a, column 2 k + i % 2 of b
      const float* row = posted[side][warp + g * 4 + c % 4];
      const float* column = posted[side][warp + (2 * k + i % 2) * 4 + c % 4];
      d[i] += row[i / 2 + c / 4 * 2] * column[4 + c / 4];
    }
  return {d[0], d[1], d[2], d[3]};
}
static void prefetch(const void*) {}
template <class T> static T read_once(const T* from) { return *from; }
// What a lane has sent and not waited for is there at once or, where the last lane comes first, as late as can be.
extern "C" int backwards;
struct Copy { void* to; const void* from; unsigned size; };  // without a size: the end of a batch
static std::vector<Copy> sent[1024];
static void arrive(const Copy& copy) {
  if (copy.from) memcpy(copy.to, copy.from, copy.size); else memset(copy.to, 0, copy.size);
}
template <class T> static void send(T* to, const T* from, bool there) {
  const Copy copy = {to, there ? from : nullptr, sizeof(T)};
  if (backwards) sent[threadIdx.x].push_back(copy); else arrive(copy);
}
static void end_batch() { sent[threadIdx.x].push_back({}); }
template <int COUNT> static void all_but() {
  std::vector<Copy>& mine = sent[threadIdx.x];
  int batches = 0;
  for (const Copy& copy : mine) batches += !copy.size;
  while (batches > COUNT) {
    if (mine[0].size) arrive(mine[0]); else --batches;
    mine.erase(mine.begin());
  }
}
static int take(int* next) { return (*next)++; }
static void publish() {}
static void announce(int* flag) { *flag = 1; }
static void await(const int* flag) {  // blocks run one after the other: nobody would set it
  if (!*flag) abort();
}

typedef unsigned short half_bits;
static float exp2_fast(float x) { return exp2f(x); }
static float reciprocal(float x) { return 1.f / x; }
static float from_bf16(half_bits x) { uint32_t y = (uint32_t)x << 16; float z; memcpy(&z, &y, 4); return z; }
static half_bits to_bf16(float x) {
  uint32_t y; memcpy(&y, &x, 4);
  return std::isnan(x) ? 0x7fc0 : (y + 0x7fff + (y >> 16 & 1)) >> 16;
}
static unsigned two_to_bf16(float low, float high) { return to_bf16(low) | (unsigned)to_bf16(high) << 16; }
static float from_fp16(half_bits x) { _Float16 y; memcpy(&y, &x, 2); return y; }
static half_bits to_fp16(float x) { _Float16 y = x; half_bits z; memcpy(&z, &y, 2); return z; }
"""

LAUNCHER = r"""
static void (*kernel)(const Params);
static Params params;
static void lane_main() {
  kernel(params);
  places[threadIdx.x] = DONE;
}
int backwards = 0;
// Lanes `first ... last` up to a barrier of their block, or their end; false where they part ways.
static bool run_warp(int first, int last) {
  do {
    for (int i = first; i <= last; ++i) {
      const int t = backwards ? first + last - i : i;
      places[t] = RUNNING, threadIdx = {(unsigned)t, 0, 0};
      swapcontext(&scheduler, &lanes[t]);
    }
    for (int t = first; t <= last; ++t)
      if (places[t] != places[first] || turns[t] != turns[first]) return false;
  } while (places[first] == AT_WARP);
  return true;
}
extern "C" int launch(void (*what)(const Params), const Params* with, int gx, int gy, int threads) {
  static std::vector<char> stacks[1024];
  kernel = what, params = *with, blockDim = {(unsigned)threads, 1, 1}, gridDim = {(unsigned)gx, (unsigned)gy, 1};
  const int warps = (threads + 31) / 32;
  for (int y = 0; y < gy; ++y)
    for (int x = 0; x < gx; ++x) {
      blockIdx = {(unsigned)x, (unsigned)y, 0};
      for (int t = 0; t < threads; ++t) {
        stacks[t].resize(1 << 16), turns[t] = 0, sent[t].clear();
        getcontext(&lanes[t]);
        lanes[t].uc_stack.ss_sp = stacks[t].data(), lanes[t].uc_stack.ss_size = stacks[t].size();
        lanes[t].uc_link = &scheduler;
        makecontext(&lanes[t], lane_main, 0);
      }
      do {
        for (int i = 0; i < warps; ++i) {
          const int first = 32 * (backwards ? warps - 1 - i : i);
          if (!run_warp(first, min(first + 31, threads - 1))) return 1;
        }
        for (int t = 0; t < threads; t += 32) if (places[t] != places[0]) return 1;
      } while (places[0] != DONE);
    }
  return 0;
}
"""


class EmulatedModule:
    """Stands in for `nvrtc.Module` where tensors are on the CPU."""

    def __init__(self, source: Path, macros: tuple[tuple[str, int], ...], folder: Path):
        assert COMPILER is not None
        self.source, self.macros = source, dict(macros)
        text, library = folder / f"{source.stem}.cpp", folder / f"{source.stem}.so"
        folder.mkdir(parents=True, exist_ok=True)
        text.write_text(f'{PRELUDE}\n#include "{nvrtc.PREAMBLE}"\n#include "{source}"\n{LAUNCHER}')
        defined = [f"-D{name}={value}" for name, value in macros]
        subprocess.run(
            [COMPILER, "-O2", "-std=c++17", "-w", "-shared", "-fPIC", *defined, str(text), "-o", str(library)],
            check=True,
        )
        self._library = ctypes.CDLL(str(library))

    def launch(self, name: str, grid: tuple[int, int], threads: int, values: dict[str, Any], shared: int = 0) -> None:
        ctypes.c_int.in_dll(self._library, "backwards").value = BACKWARDS
        params = nvrtc.pack(self.source, values)
        failed = self._library.launch(getattr(self._library, name), ctypes.byref(params), *grid, threads)
        assert not failed, f"{name}: the lanes of a warp parted ways at a barrier or a shuffle"


@cache
def module(source: Path, macros: tuple[tuple[str, int], ...], folder: Path) -> EmulatedModule:
    """Compiled once per test process."""
    return EmulatedModule(source, macros, folder / "-".join(f"{name}{value}" for name, value in macros))


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """From here on CPU tensors take the CUDA backends; `forget` what they chose afterwards."""
    monkeypatch.setattr(nvrtc, "module", lambda source, macros, device: module(source, macros, folder / source.stem))
    monkeypatch.setattr(nvrtc, "_unavailable", lambda device: None)
    monkeypatch.setattr(nvrtc, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(cuda_scan, "STATIC", False)  # one build for all shapes
    monkeypatch.setattr(cuda_conv, "STATIC", False)
    monkeypatch.setattr(cuda_conv, "LONGEST", cuda_conv.RUN)  # segments of several runs
    forget()


def forget() -> None:
    """The kernels that ops hold on to, emulated or not."""
    for cached in (cuda_conv._compiled, cuda_norm._launcher):
        cached.cache_clear()
