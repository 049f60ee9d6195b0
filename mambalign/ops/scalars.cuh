// What every kernel starts from; put before each source. IO is the element type: 0 fp32, 1 bf16, 2 fp16.
// No headers are needed. Tests compile the same text as C++ with the primitives emulated (tests/ops/emulated.py).

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

typedef long long i64;

#ifndef EMULATED
typedef unsigned short half_bits;
__device__ __forceinline__ float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float from_bf16(half_bits x) { return __uint_as_float((unsigned)x << 16); }
__device__ __forceinline__ half_bits to_bf16(float x) { half_bits y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
__device__ __forceinline__ float from_fp16(half_bits x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
__device__ __forceinline__ half_bits to_fp16(float x) { half_bits y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
__device__ __forceinline__ float reciprocal(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float from_lane_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
#endif

// How values of an element type are stored, and read as fp32.
template <int KIND> struct Scalar;
template <> struct Scalar<0> {
  typedef float type;
  static __device__ __forceinline__ float widen(float x) { return x; }
  static __device__ __forceinline__ float narrow(float x) { return x; }
};
template <> struct Scalar<1> {
  typedef half_bits type;
  static __device__ __forceinline__ float widen(half_bits x) { return from_bf16(x); }
  static __device__ __forceinline__ half_bits narrow(float x) { return to_bf16(x); }
};
template <> struct Scalar<2> {
  typedef half_bits type;
  static __device__ __forceinline__ float widen(half_bits x) { return from_fp16(x); }
  static __device__ __forceinline__ half_bits narrow(float x) { return to_fp16(x); }
};

typedef Scalar<IO>::type io;
__device__ __forceinline__ float widen(io x) { return Scalar<IO>::widen(x); }
__device__ __forceinline__ io narrow(float x) { return Scalar<IO>::narrow(x); }

__device__ __forceinline__ float exp_fast(float x) { return exp2_fast(x * LOG2_E); }
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + exp_fast(-x)); }
