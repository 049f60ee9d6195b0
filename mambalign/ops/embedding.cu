// The gradient of an embedding: rows of `d`, summed by the token they belong to; see ops/embedding.py.
//
// Rows come sorted by token, those of one token in their order. A block sums the runs of CHUNK of them. A run that lies
// in one chunk is done with that. Of one that does not, every chunk leaves its piece, and the pieces are summed in order:
// so the most frequent token takes a few steps, and results repeat bit for bit, which atomics' would not.
//
// Compiled for one element type (IO as in scalars.cuh), rows that are whole and aligned
// fours or not (ALIGNED_ROWS), THREADS a block.

#define CHUNK 32

struct Params {
  const int *tokens, *rows;  // [T]: sorted, and the row of `d` that each comes with
  const io* d;               // [T, H] contiguous
  io* d_weight;              // [V, H], zeros
  float *began, *going_on;   // [chunks, H]: of a run that began in an earlier chunk; of one that goes on in the next
  i64 num_tokens, width;
};

__device__ __forceinline__ int column() { return (blockIdx.y * THREADS + threadIdx.x) * 4; }

// A piece of a run, fp32.
__device__ __forceinline__ void keep(float* to, const Quad& sum, int exist) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < exist) to[i] = sum.v[i];
}

extern "C" __global__ void __launch_bounds__(THREADS) sum_runs(const Params p) {
  const int at = column(), exist = (int)p.width - at;
  if (exist <= 0) return;
  const i64 first = blockIdx.x * (i64)CHUNK, chunk = blockIdx.x * p.width + at;
  const int count = (int)(p.num_tokens - first < CHUNK ? p.num_tokens - first : CHUNK);
  const int* tokens = p.tokens + first;
  const bool last_goes_on = first + count < p.num_tokens && tokens[count] == tokens[count - 1];
  bool began = first > 0 && tokens[-1] == tokens[0];
  Quad sum = Quad{};
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const Quad row = widen(fetch<ALIGNED_ROWS>(p.d + p.rows[first + i] * p.width + at, exist));
#pragma unroll
    for (int k = 0; k < 4; ++k) sum.v[k] += row.v[k];
    if (i + 1 < count && tokens[i + 1] == tokens[i]) continue;
    if (began)
      keep(p.began + chunk, sum, exist);
    else if (i + 1 == count && last_goes_on)
      keep(p.going_on + chunk, sum, exist);
    else
      store<ALIGNED_ROWS>(p.d_weight + tokens[i] * p.width + at, sum, exist);
    sum = Quad{}, began = false;
  }
}

// The run that begins in chunk blockIdx.x and goes on in the next, if there is one.
extern "C" __global__ void __launch_bounds__(THREADS) sum_pieces(const Params p) {
  const int at = column(), exist = (int)p.width - at;
  const i64 first = blockIdx.x * (i64)CHUNK;
  i64 next = first + CHUNK;
  if (exist <= 0 || next >= p.num_tokens) return;
  const int token = p.tokens[next - 1];
  if (p.tokens[next] != token || (first > 0 && p.tokens[first] == token && p.tokens[first - 1] == token)) return;
  Quad sum = Quad{};
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (k < exist) sum.v[k] = p.going_on[blockIdx.x * p.width + at + k];
  for (; next < p.num_tokens && p.tokens[next] == token; next += CHUNK) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < exist) sum.v[k] += p.began[next / CHUNK * p.width + at + k];
  }
  store<ALIGNED_ROWS>(p.d_weight + token * p.width + at, sum, exist);
}
