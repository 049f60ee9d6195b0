// What token_logps does with a chunk of logits [rows, V]: see ops/cuda_logps.py. Bound by memory. One way at a time, a warp
// has a row and reads each element once. Both ways at once a block has it: the few rows that are worked on at a time are
// still in the cache when they are read again.
//
// Compiled for one element type of the logits (IO as in scalars.cuh).

#define LANES 32
#define BLOCK 512
#define VEC 8
#define IGNORE -100
#define LOWEST -3e38f

struct Params {
  io* logits;  // [rows, V] contiguous; the backward pass writes their gradient in place
  const i64* labels;
  float *logps, *log_z;
  const float* d_logps;
  i64 vocabulary;
  const float *wide, *factor;  // `count` numbers, and what they are multiplied by
  io* scaled;
  i64 count;
};

struct alignas(sizeof(io) * VEC < 16 ? sizeof(io) * VEC : 16) Pack {
  io v[VEC];
};

// One row by THREADS threads: `packs(pack, index of its first element)` for every whole pack if rows are aligned,
// `ones(element, index)` for the rest.
template <int THREADS, class Packs, class Ones>
__device__ __forceinline__ void over_row(io* row, i64 length, Packs packs, Ones ones) {
  const i64 whole = length % VEC ? 0 : length;
  for (i64 v = threadIdx.x * VEC; v < whole; v += THREADS * VEC) packs(*(Pack*)(row + v), v);
  for (i64 v = whole + threadIdx.x; v < length; v += THREADS) ones(row[v], v);
}

// The sum of exp(x - most), `most` being the largest x seen so far.
struct Sum {
  float most, sum;
};

__device__ __forceinline__ Sum joined(const Sum& a, const Sum& b) {
  const float high = fmaxf(a.most, b.most);
  return Sum{high, a.sum * exp_fast(a.most - high) + b.sum * exp_fast(b.most - high)};
}

// Of a row, what each of the warps that share it has seen.
template <int THREADS>
__device__ __forceinline__ Sum sum_of(io* row, i64 length) {
  Sum seen = Sum{LOWEST, 0.f};
  over_row<THREADS>(
      row, length,
      [&](const Pack& pack, i64) {
        float x[VEC], high = seen.most;
#pragma unroll
        for (int i = 0; i < VEC; ++i) x[i] = widen(pack.v[i]), high = fmaxf(high, x[i]);
        seen.sum *= exp_fast(seen.most - high);
        seen.most = high;
#pragma unroll
        for (int i = 0; i < VEC; ++i) seen.sum += exp_fast(x[i] - high);
      },
      [&](const io& element, i64) { seen = joined(seen, Sum{widen(element), 1.f}); });
#pragma unroll
  for (int mask = 16; mask; mask /= 2)
    seen = joined(seen, Sum{from_lane_xor(seen.most, mask), from_lane_xor(seen.sum, mask)});
  return seen;
}

// The label's logit; NaN for a label outside the vocabulary, which stops a run, rather than a number read from elsewhere.
__device__ __forceinline__ float labelled(const Params& p, const io* row, i64 label) {
  return label >= 0 && label < p.vocabulary ? widen(row[label]) : sqrtf(-1.f);
}

__device__ __forceinline__ void write(const Params& p, i64 r, i64 label, float logit, float log_z) {
  p.log_z[r] = log_z;
  p.logps[r] = label == IGNORE ? 0.f : logit - log_z;
}

extern "C" __global__ void __launch_bounds__(LANES) logps_forward(const Params p) {
  const i64 r = blockIdx.x, label = p.labels[r];
  io* row = p.logits + r * p.vocabulary;
  const Sum all = sum_of<LANES>(row, p.vocabulary);
  if (threadIdx.x == 0) write(p, r, label, labelled(p, row, label), all.most + logf(all.sum));
}

// d logp / d logits = onehot(label) - softmax(logits), times d.
template <int THREADS>
__device__ __forceinline__ void differentiate(io* row, i64 length, i64 label, float log_z, float d) {
  const auto gradient = [&](io x, i64 v) { return narrow((float(v == label) - exp_fast(widen(x) - log_z)) * d); };
  over_row<THREADS>(
      row, length,
      [&](Pack& pack, i64 v) {
        Pack out;
#pragma unroll
        for (int i = 0; i < VEC; ++i) out.v[i] = gradient(pack.v[i], v + i);
        pack = out;
      },
      [&](io& element, i64 v) { element = gradient(element, v); });
}

extern "C" __global__ void __launch_bounds__(LANES) logps_backward(const Params p) {
  const i64 r = blockIdx.x, label = p.labels[r];
  differentiate<LANES>(p.logits + r * p.vocabulary, p.vocabulary, label, p.log_z[r], label == IGNORE ? 0.f : p.d_logps[r]);
}

// Log-probs, and in the place of the logits the gradient of their sum.
extern "C" __global__ void __launch_bounds__(BLOCK, 2) logps_both(const Params p) {
  __shared__ Sum seen[BLOCK / 32];
  const i64 r = blockIdx.x, label = p.labels[r];
  io* row = p.logits + r * p.vocabulary;
  const float logit = labelled(p, row, label);
  const Sum mine = sum_of<BLOCK>(row, p.vocabulary);
  if (threadIdx.x % 32 == 0) seen[threadIdx.x / 32] = mine;
  __syncthreads();
  Sum all = seen[0];
#pragma unroll
  for (int warp = 1; warp < BLOCK / 32; ++warp) all = joined(all, seen[warp]);
  const float log_z = all.most + logf(all.sum);
  if (threadIdx.x == 0) write(p, r, label, logit, log_z);
  differentiate<BLOCK>(row, p.vocabulary, label, log_z, label == IGNORE ? 0.f : 1.f);
}

// Four a thread.
extern "C" __global__ void __launch_bounds__(BLOCK) scale(const Params p) {
  const i64 first = (blockIdx.x * (i64)BLOCK + threadIdx.x) * 4, left = p.count - first;
  const float factor = *p.factor;
  if (left >= 4) {
    Quad four = quad(p.wide + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) four.v[i] *= factor;
    *(Four*)(p.scaled + first) = narrow(four);
  } else {
    for (int i = 0; i < left; ++i) p.scaled[first + i] = narrow(p.wide[first + i] * factor);
  }
}
