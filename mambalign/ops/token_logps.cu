// What token_logps does with a chunk of logits [rows, V], a warp a row, each element read once: see ops/cuda_logps.py.
//
// Compiled for one element type of the logits (IO as in scalars.cuh).

#define LANES 32
#define VEC 8
#define IGNORE -100
#define LOWEST -3e38f

struct Params {
  io* logits;  // [rows, V] contiguous; the backward pass writes their gradient in place
  const i64* labels;
  float *logps, *log_z;
  const float* d_logps;
  i64 vocabulary;
};

struct alignas(sizeof(io) * VEC < 16 ? sizeof(io) * VEC : 16) Pack {
  io v[VEC];
};

// One row: `pack(pack, index of its first element)` for every whole pack if rows are aligned, `one(element, index)` for the rest.
template <class Packs, class Ones>
__device__ __forceinline__ void over_row(io* row, i64 length, Packs packs, Ones ones) {
  const i64 whole = length % VEC ? 0 : length;
  for (i64 v = threadIdx.x * VEC; v < whole; v += LANES * VEC) packs(*(Pack*)(row + v), v);
  for (i64 v = whole + threadIdx.x; v < length; v += LANES) ones(row[v], v);
}

extern "C" __global__ void __launch_bounds__(32) logps_forward(const Params p) {
  const i64 r = blockIdx.x, label = p.labels[r];
  io* row = p.logits + r * p.vocabulary;
  // The sum of exp(x - most), `most` being the largest x seen so far.
  float most = LOWEST, sum = 0.f;
  over_row(
      row, p.vocabulary,
      [&](const Pack& pack, i64) {
        float x[VEC], high = most;
#pragma unroll
        for (int i = 0; i < VEC; ++i) x[i] = widen(pack.v[i]), high = fmaxf(high, x[i]);
        sum *= exp_fast(most - high);
        most = high;
#pragma unroll
        for (int i = 0; i < VEC; ++i) sum += exp_fast(x[i] - most);
      },
      [&](const io& element, i64) {
        const float x = widen(element), high = fmaxf(most, x);
        sum = sum * exp_fast(most - high) + exp_fast(x - high);
        most = high;
      });
#pragma unroll
  for (int mask = 16; mask; mask /= 2) {
    const float other = from_lane_xor(most, mask), others = from_lane_xor(sum, mask), high = fmaxf(most, other);
    sum = sum * exp_fast(most - high) + others * exp_fast(other - high);
    most = high;
  }
  if (threadIdx.x) return;
  const float log_z = most + logf(sum);
  p.log_z[r] = log_z;
  const bool known = label >= 0 && label < p.vocabulary;
  // A label outside the vocabulary becomes NaN, which stops a run, rather than a number read from elsewhere.
  p.logps[r] = label == IGNORE ? 0.f : known ? widen(row[label]) - log_z : sqrtf(-1.f);
}

// d logp / d logits = onehot(label) - softmax(logits), times d_logps.
extern "C" __global__ void __launch_bounds__(32) logps_backward(const Params p) {
  const i64 r = blockIdx.x, label = p.labels[r];
  const float log_z = p.log_z[r], d = label == IGNORE ? 0.f : p.d_logps[r];
  auto gradient = [&](io x, i64 v) { return narrow((float(v == label) - exp_fast(widen(x) - log_z)) * d); };
  over_row(
      p.logits + r * p.vocabulary, p.vocabulary,
      [&](Pack& pack, i64 v) {
        Pack out;
#pragma unroll
        for (int i = 0; i < VEC; ++i) out.v[i] = gradient(pack.v[i], v + i);
        pack = out;
      },
      [&](io& element, i64 v) { element = gradient(element, v); });
}
