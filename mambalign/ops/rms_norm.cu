// Residual addition and RMS norm on a GPU, a block a row, each element read once: see ops/cuda_norm.py.
//
// Bound by memory. A block walks every gridDim.x-th row, and the next one is on its way, as it is stored, while this one is
// summed: loads then never wait for a barrier. Four neighbours a thread, so that whole sectors are read and written.
//
// Compiled for the element types of the input (X_IO), of the sum (SUM_IO), of the norm (IO) and of the weight (W_IO, all as
// in scalars.cuh), the row length WIDTH, THREADS a block, and FORWARD_BLOCKS or
// BLOCKS of these to a multiprocessor.

#define VEC 4
#define PACKS ((WIDTH + THREADS * VEC - 1) / (THREADS * VEC))  // that a thread owns of every row
#define WHOLE (WIDTH == PACKS * THREADS * VEC)

typedef Scalar<X_IO>::type x_io;
typedef Scalar<SUM_IO>::type sum_io;
typedef Scalar<W_IO>::type w_io;

struct Params {
  const x_io* x;           // [rows, WIDTH], like all but the last
  const sum_io* residual;  // added to x; or null
  sum_io* total;           // the sum; or null where it is not asked for
  const sum_io* saved;     // the sum, as the backward pass gets it
  const w_io* weight;      // [WIDTH]
  const io* d_y;
  const sum_io* d_total;  // what comes down the residual stream; or null
  io* y;
  x_io* d_x;
  sum_io* d_residual;  // the same numbers as d_x; or null
  w_io* d_weight;      // [WIDTH]
  float *scales, *d_weights;  // 1 / rms of every row; [shares, WIDTH]: the share of every block
  i64 num_rows, num_shares;
  double eps;
};

// What a thread owns of a row, as it is stored, and as numbers.
template <int KIND>
struct Stored {
  FourOf<KIND> pack[PACKS];
};
struct Row {
  Quad pack[PACKS];
};

__device__ __forceinline__ int column_of(int k) { return (k * THREADS + threadIdx.x) * VEC; }

// Whole packs where rows are a multiple of VEC long, else elements; zeros beyond the row.
template <int KIND>
__device__ __forceinline__ Stored<KIND> load(const typename Scalar<KIND>::type* row) {
  Stored<KIND> got;
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    const int column = column_of(k);
    got.pack[k] = FourOf<KIND>{};
    if (WIDTH % VEC == 0) {
      if (WHOLE || column < WIDTH) got.pack[k] = *(const FourOf<KIND>*)(row + column);
    } else {
      Quad quad = Quad{};
#pragma unroll
      for (int i = 0; i < VEC; ++i)
        if (column + i < WIDTH) quad.v[i] = Scalar<KIND>::widen(row[column + i]);
      got.pack[k] = narrow_to<KIND>(quad);
    }
  }
  return got;
}

template <int KIND>
__device__ __forceinline__ void store(typename Scalar<KIND>::type* row, const Row& from) {
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    const int column = column_of(k);
    if (WIDTH % VEC == 0) {
      if (WHOLE || column < WIDTH) *(FourOf<KIND>*)(row + column) = narrow_to<KIND>(from.pack[k]);
    } else {
#pragma unroll
      for (int i = 0; i < VEC; ++i)
        if (column + i < WIDTH) row[column + i] = Scalar<KIND>::narrow(from.pack[k].v[i]);
    }
  }
}

template <int KIND>
__device__ __forceinline__ Row numbers(const Stored<KIND>& stored) {
  Row row;
#pragma unroll
  for (int k = 0; k < PACKS; ++k) row.pack[k] = widen(stored.pack[k]);
  return row;
}

// The sum over a block, in every thread, in a fixed order. One barrier: a row's sums lie where those of the row before
// do not, and those of the row before that have been read when its barrier is passed.
__device__ __forceinline__ float over_block(float x, int turn) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x += from_lane_xor(x, mask);
  if (THREADS == 32) return x;
  __shared__ float sums[2][THREADS / 32];
  if (threadIdx.x % 32 == 0) sums[turn][threadIdx.x / 32] = x;
  __syncthreads();
  x = 0.f;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) x += sums[turn][warp];
  return x;
}

#define EACH(k, i)                  \
  _Pragma("unroll")                 \
  for (int k = 0; k < PACKS; ++k)   \
    _Pragma("unroll")               \
    for (int i = 0; i < VEC; ++i)

extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS) norm_forward(const Params p) {
  const Row weight = numbers(load<W_IO>(p.weight));
  i64 r = blockIdx.x;
  Stored<X_IO> next_x = load<X_IO>(p.x + r * WIDTH);
  Stored<SUM_IO> next_residual = Stored<SUM_IO>{};
  if (p.residual) next_residual = load<SUM_IO>(p.residual + r * WIDTH);
  for (int turn = 0; r < p.num_rows; turn ^= 1) {
    Row x = numbers(next_x);
    const Row residual = numbers(next_residual);
    const i64 next = r + gridDim.x;
    if (next < p.num_rows) {
      next_x = load<X_IO>(p.x + next * WIDTH);
      if (p.residual) next_residual = load<SUM_IO>(p.residual + next * WIDTH);
    }
    // Rounded to the sum's type: what the backward pass reads is what was normed.
    if (p.residual)
      EACH(k, i) x.pack[k].v[i] = Scalar<SUM_IO>::widen(Scalar<SUM_IO>::narrow(x.pack[k].v[i] + residual.pack[k].v[i]));
    if (p.total) store<SUM_IO>(p.total + r * WIDTH, x);
    float squares = 0.f;
    EACH(k, i) squares += x.pack[k].v[i] * x.pack[k].v[i];
    const float scale = rsqrtf(over_block(squares, turn) / WIDTH + (float)p.eps);
    EACH(k, i) x.pack[k].v[i] *= scale * weight.pack[k].v[i];
    store<IO>(p.y + r * WIDTH, x);
    if (threadIdx.x == 0) p.scales[r] = scale;
    r = next;
  }
}

// With g = weight * d_y and xhat = x * scale: d_weight = sum of d_y * xhat, and
// d_x = scale * (g - xhat * mean(g * xhat)) + d_total.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) norm_backward(const Params p) {
  const Row weight = numbers(load<W_IO>(p.weight));
  Row d_weight = Row{};
  i64 r = blockIdx.x;
  float next_scale = p.scales[r];
  Stored<SUM_IO> next_x = load<SUM_IO>(p.saved + r * WIDTH), next_d_total = Stored<SUM_IO>{};
  Stored<IO> next_d_y = load<IO>(p.d_y + r * WIDTH);
  if (p.d_total) next_d_total = load<SUM_IO>(p.d_total + r * WIDTH);
  for (int turn = 0; r < p.num_rows; turn ^= 1) {
    const float scale = next_scale;
    Row x = numbers(next_x), g = numbers(next_d_y);
    const Row d_total = numbers(next_d_total);
    const i64 next = r + gridDim.x;
    if (next < p.num_rows) {
      next_scale = p.scales[next];
      next_x = load<SUM_IO>(p.saved + next * WIDTH);
      next_d_y = load<IO>(p.d_y + next * WIDTH);
      if (p.d_total) next_d_total = load<SUM_IO>(p.d_total + next * WIDTH);
    }
    float dot = 0.f;
    EACH(k, i) {
      x.pack[k].v[i] *= scale;
      d_weight.pack[k].v[i] += g.pack[k].v[i] * x.pack[k].v[i];
      g.pack[k].v[i] *= weight.pack[k].v[i];
      dot += g.pack[k].v[i] * x.pack[k].v[i];
    }
    dot = over_block(dot, turn) / WIDTH;
    EACH(k, i) g.pack[k].v[i] = scale * (g.pack[k].v[i] - x.pack[k].v[i] * dot) + d_total.pack[k].v[i];
    store<X_IO>(p.d_x + r * WIDTH, g);
    if (p.d_residual) store<SUM_IO>(p.d_residual + r * WIDTH, g);
    r = next;
  }
  store<0>(p.d_weights + (i64)blockIdx.x * WIDTH, d_weight);
}

extern "C" __global__ void __launch_bounds__(32 * SUMMERS) sum_weight(const Params p) {
  const int column = blockIdx.x * 32 + threadIdx.x % 32;
  const float sum = sum_rows(p.d_weights + column, p.num_shares, WIDTH, column < WIDTH);
  if (threadIdx.x < 32 && column < WIDTH) p.d_weight[column] = Scalar<W_IO>::narrow(sum);
}
