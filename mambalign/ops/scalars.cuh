// What every kernel starts from; put before each source. IO is the element type: 0 fp32, 1 bf16, 2 fp16.
// No headers are needed. Tests compile the same text as C++ with the primitives emulated (tests/ops/emulated.py).

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

typedef long long i64;

// Row lengths that are known when compiling (STATIC) make addresses free; the host passes the same ones in Params.
#ifdef STATIC
#define ROW_LENGTH(p) STATIC_WIDTH
#define STRIDE(p, name) STATIC_##name
#else
#define ROW_LENGTH(p) ((int)(p).num_channels)
#define STRIDE(p, name) ((int)(p).name##_stride)
#endif

#ifndef EMULATED
// What the threads of a block share, where it is more than a kernel may declare: launched with as many bytes.
#define DYNAMIC_SHARED(type, name)                                  \
  extern __shared__ __align__(16) unsigned char name##_bytes[];     \
  static_assert(sizeof(type) == SHARED_BYTES, "as the host has it"); \
  type& name = *(type*)name##_bytes
typedef unsigned short half_bits;
__device__ __forceinline__ float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float from_bf16(half_bits x) { return __uint_as_float((unsigned)x << 16); }
__device__ __forceinline__ half_bits to_bf16(float x) { half_bits y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
__device__ __forceinline__ unsigned two_to_bf16(float low, float high) { unsigned y; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)); return y; }
__device__ __forceinline__ float from_fp16(half_bits x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
__device__ __forceinline__ half_bits to_fp16(float x) { half_bits y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
__device__ __forceinline__ float reciprocal(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float from_lane_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
// d = a b + c for a [16, 8] and b [8, 8], both rounded towards zero to 11 bits, the sum in fp32. Of lane 4 g + k:
// a0 = a[g, k], a1 = a[g + 8, k], a2 = a[g, k + 4], a3 = a[g + 8, k + 4]; b0 = b[k, g], b1 = b[k + 4, g]; d = d[g, 2k],
// d[g, 2k + 1] and the same of row g + 8.
__device__ __forceinline__ float4 mma_tf32(float a0, float a1, float a2, float a3, float b0, float b1, float4 c) {
  float4 d;
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d.x), "=f"(d.y), "=f"(d.z), "=f"(d.w)
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)), "f"(c.x), "f"(c.y), "f"(c.z), "f"(c.w));
  return d;
}
__device__ __forceinline__ void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
// What is read once, and is not to stay in the caches.
__device__ __forceinline__ float read_once(const float* from) {
  float x;
  asm("ld.global.cs.f32 %0, [%1];" : "=f"(x) : "l"(from));
  return x;
}
__device__ __forceinline__ float4 read_once(const float4* from) {
  float4 x;
  asm("ld.global.cs.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(from));
  return x;
}
__device__ __forceinline__ float tf32(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }
// A copy to shared memory, of zeros if it is not `there`, that its thread does not wait for. Copies go in batches: after
// `all_but<COUNT>` no more than the last COUNT are on their way. (16 bits alone are copied at once.)
template <class T>
__device__ __forceinline__ void send(T* to, const T* from, bool there) {
  if constexpr (sizeof(T) < 4)
    *to = there ? *from : T{};
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from),
                 "n"(sizeof(T)), "r"(there ? (int)sizeof(T) : 0) : "memory");
}
__device__ __forceinline__ void end_batch() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int COUNT> __device__ __forceinline__ void all_but() { asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory"); }
// What blocks of one launch tell each other: a number that no other gets; a flag that is set, and waited for. All that a
// block has written and published before it sets a flag is there for one that has waited for it.
__device__ __forceinline__ int take(int* next) { return atomicAdd(next, 1); }
__device__ __forceinline__ void publish() { __threadfence(); }
__device__ __forceinline__ void announce(int* flag) { asm volatile("st.release.gpu.s32 [%0], 1;" ::"l"(flag) : "memory"); }
__device__ __forceinline__ void await(const int* flag) {
  int is_set = 0;
  do asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(is_set) : "l"(flag) : "memory");
  while (!is_set);
}
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

// Four neighbours of a row as they are stored, in whole registers, and as numbers.
template <int KIND>
struct alignas(4 * sizeof(typename Scalar<KIND>::type)) FourOf {
  unsigned words[sizeof(typename Scalar<KIND>::type)];
};
typedef FourOf<IO> Four;

struct Quad {
  float v[4];
};

template <int KIND>
__device__ __forceinline__ Quad widen(const FourOf<KIND>& four) {
  const unsigned* w = four.words;
  if constexpr (KIND == 0)
    return Quad{{__uint_as_float(w[0]), __uint_as_float(w[1]), __uint_as_float(w[2]), __uint_as_float(w[3])}};
  else if constexpr (KIND == 1)
    return Quad{{__uint_as_float(w[0] << 16), __uint_as_float(w[0] & 0xffff0000u), __uint_as_float(w[1] << 16),
                 __uint_as_float(w[1] & 0xffff0000u)}};
  else
    return Quad{{from_fp16(w[0]), from_fp16(w[0] >> 16), from_fp16(w[1]), from_fp16(w[1] >> 16)}};
}

template <int KIND>
__device__ __forceinline__ FourOf<KIND> narrow_to(const Quad& quad) {
  const float* v = quad.v;
  if constexpr (KIND == 0)
    return FourOf<KIND>{{__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])}};
  else if constexpr (KIND == 1)
    return FourOf<KIND>{{two_to_bf16(v[0], v[1]), two_to_bf16(v[2], v[3])}};
  else
    return FourOf<KIND>{{to_fp16(v[0]) | (unsigned)to_fp16(v[1]) << 16, to_fp16(v[2]) | (unsigned)to_fp16(v[3]) << 16}};
}

__device__ __forceinline__ Four narrow(const Quad& quad) { return narrow_to<IO>(quad); }

__device__ __forceinline__ Quad quad(const float* from) {
  const float4 x = *(const float4*)from;
  return Quad{{x.x, x.y, x.z, x.w}};
}

__device__ __forceinline__ float4 as_float4(const float* x) { return make_float4(x[0], x[1], x[2], x[3]); }

// The first `exist` (<= 0: none) of four neighbours of a row, in one access where rows are aligned to that; else zeros.
template <bool ALIGNED>
__device__ __forceinline__ Four fetch(const io* from, int exist) {
  Four four = Four{};
  if (ALIGNED) {
    if (exist > 0) four = *(const Four*)from;
    return four;
  }
  Quad values = Quad{};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < exist) values.v[i] = widen(from[i]);
  return narrow(values);
}

// And the way back: to the first `exist`.
template <bool ALIGNED>
__device__ __forceinline__ void store(io* to, const Quad& values, int exist) {
  if (ALIGNED) {
    if (exist > 0) *(Four*)to = narrow(values);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < exist) to[i] = narrow(values.v[i]);
}

__device__ __forceinline__ float4 operator+(const float4& a, const float4& b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// The sum of every `stride`-th number (or four) from `from` on, `rows` of them, by a block of SUMMERS warps in a fixed
// order: a lane has its own column, which may not exist, and every warp a share of the rows.
#define SUMMERS 8
template <class T>
__device__ __forceinline__ T sum_rows(const T* from, i64 rows, i64 stride, bool exists) {
  __shared__ T parts[SUMMERS][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T sum = T{};
  if (exists)
#pragma unroll 10
    for (i64 r = warp; r < rows; r += SUMMERS) sum = sum + read_once(from + r * stride);
  parts[warp][lane] = sum;
  __syncthreads();
  sum = T{};
#pragma unroll
  for (int w = 0; w < SUMMERS; ++w) sum = sum + parts[w][lane];
  return sum;
}

__device__ __forceinline__ float exp_fast(float x) { return exp2_fast(x * LOG2_E); }
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + exp_fast(-x)); }

// log(1 + exp(x)) as max(x, 0) + log1p(exp(-|x|)); log1p(e) = 2 artanh(s) for s = e / (2 + e) <= 1/3. The polynomial is
// the best of its degree for (artanh(s) / s - 1) / s^2, in relative error of the whole: 5e-9.
__device__ __forceinline__ float softplus(float x) {
  const float e = exp_fast(-fabsf(x)), s = e * reciprocal(2.f + e), s2 = s * s;
  float series = 0.14012229f;
  series = series * s2 + 0.13999571f;
  series = series * s2 + 0.2001085f;
  series = series * s2 + 0.33333206f;
  return fmaxf(x, 0.f) + 2.f * (s + s * s2 * series);
}
