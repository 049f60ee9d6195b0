// Residual addition and RMS norm on a GPU, a block a row, each element read once: see ops/cuda_norm.py.
//
// Compiled for the element types of the input (X_IO), of the sum (SUM_IO) and of the norm (IO, all as in scalars.cuh) and
// the row length WIDTH.

#define THREADS 128
#define VEC 4
#define PACKS ((WIDTH + THREADS * VEC - 1) / (THREADS * VEC))  // that a thread owns of every row

typedef Scalar<X_IO>::type x_io;
typedef Scalar<SUM_IO>::type sum_io;

struct Params {
  const x_io* x;           // [rows, WIDTH], like all but the last
  const sum_io* residual;  // added to x; or null
  sum_io* total;           // the sum; or null where it is not asked for
  const sum_io* saved;     // the sum, as the backward pass gets it
  const float* weight;     // [WIDTH]
  const io* d_y;
  const sum_io* d_total;  // what comes down the residual stream; or null
  io* y;
  x_io* d_x;
  sum_io* d_residual;  // the same numbers as d_x; or null
  float *scales, *d_weights;  // 1 / rms of every row; [grid, WIDTH]: the share of every block
  i64 num_rows;
  double eps;
};

template <int KIND>
struct alignas(VEC * sizeof(typename Scalar<KIND>::type)) Pack {
  typename Scalar<KIND>::type v[VEC];
};

// The sum over a block, in every thread, in a fixed order.
__device__ __forceinline__ float over_block(float x) {
  __shared__ float sums[THREADS / 32];
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x += from_lane_xor(x, mask);
  __syncthreads();  // the sums of the row before have been read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0.f;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) x += sums[warp];
  return x;
}

// Whole packs where rows are a multiple of VEC long, else elements; zeros beyond the row.
template <int KIND>
__device__ __forceinline__ void load(float (&to)[PACKS][VEC], const typename Scalar<KIND>::type* row) {
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    const int column = (k * THREADS + threadIdx.x) * VEC;
    Pack<KIND> pack;
    if (WIDTH % VEC == 0 && column < WIDTH) pack = *(const Pack<KIND>*)(row + column);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      if (WIDTH % VEC && column + i < WIDTH) pack.v[i] = row[column + i];
      to[k][i] = column + i < WIDTH ? Scalar<KIND>::widen(pack.v[i]) : 0.f;
    }
  }
}

template <int KIND>
__device__ __forceinline__ void store(typename Scalar<KIND>::type* row, const float (&from)[PACKS][VEC]) {
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    const int column = (k * THREADS + threadIdx.x) * VEC;
    Pack<KIND> pack;
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      pack.v[i] = Scalar<KIND>::narrow(from[k][i]);
      if (WIDTH % VEC && column + i < WIDTH) row[column + i] = pack.v[i];
    }
    if (WIDTH % VEC == 0 && column < WIDTH) *(Pack<KIND>*)(row + column) = pack;
  }
}

// Adds a row, and rounds to its type: what the backward pass reads is what was normed.
template <int KIND>
__device__ __forceinline__ void add(float (&to)[PACKS][VEC], const typename Scalar<KIND>::type* row) {
  float other[PACKS][VEC];
  load<KIND>(other, row);
#pragma unroll
  for (int k = 0; k < PACKS; ++k)
#pragma unroll
    for (int i = 0; i < VEC; ++i) to[k][i] = Scalar<KIND>::widen(Scalar<KIND>::narrow(to[k][i] + other[k][i]));
}

extern "C" __global__ void __launch_bounds__(THREADS) norm_forward(const Params p) {
  float weight[PACKS][VEC];
  load<0>(weight, p.weight);
  for (i64 r = blockIdx.x; r < p.num_rows; r += gridDim.x) {
    float x[PACKS][VEC], squares = 0.f;
    load<X_IO>(x, p.x + r * WIDTH);
    if (p.residual) add<SUM_IO>(x, p.residual + r * WIDTH);
    if (p.total) store<SUM_IO>(p.total + r * WIDTH, x);
#pragma unroll
    for (int k = 0; k < PACKS; ++k)
#pragma unroll
      for (int i = 0; i < VEC; ++i) squares += x[k][i] * x[k][i];
    const float scale = rsqrtf(over_block(squares) / WIDTH + (float)p.eps);
#pragma unroll
    for (int k = 0; k < PACKS; ++k)
#pragma unroll
      for (int i = 0; i < VEC; ++i) x[k][i] *= scale * weight[k][i];
    store<IO>(p.y + r * WIDTH, x);
    if (threadIdx.x == 0) p.scales[r] = scale;
  }
}

// With g = weight * d_y and xhat = x * scale: d_weight = sum of d_y * xhat, and
// d_x = scale * (g - xhat * mean(g * xhat)) + d_total.
extern "C" __global__ void __launch_bounds__(THREADS) norm_backward(const Params p) {
  float weight[PACKS][VEC], d_weight[PACKS][VEC];
  load<0>(weight, p.weight);
#pragma unroll
  for (int k = 0; k < PACKS; ++k)
#pragma unroll
    for (int i = 0; i < VEC; ++i) d_weight[k][i] = 0.f;
  for (i64 r = blockIdx.x; r < p.num_rows; r += gridDim.x) {
    float x[PACKS][VEC], g[PACKS][VEC], dot = 0.f;
    const float scale = p.scales[r];
    load<SUM_IO>(x, p.saved + r * WIDTH);
    load<IO>(g, p.d_y + r * WIDTH);
#pragma unroll
    for (int k = 0; k < PACKS; ++k)
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        x[k][i] *= scale;
        d_weight[k][i] += g[k][i] * x[k][i];
        g[k][i] *= weight[k][i];
        dot += g[k][i] * x[k][i];
      }
    dot = over_block(dot) / WIDTH;
#pragma unroll
    for (int k = 0; k < PACKS; ++k)
#pragma unroll
      for (int i = 0; i < VEC; ++i) g[k][i] = scale * (g[k][i] - x[k][i] * dot);
    if (p.d_total) {
      load<SUM_IO>(x, p.d_total + r * WIDTH);
#pragma unroll
      for (int k = 0; k < PACKS; ++k)
#pragma unroll
        for (int i = 0; i < VEC; ++i) g[k][i] += x[k][i];
    }
    store<X_IO>(p.d_x + r * WIDTH, g);
    if (p.d_residual) store<SUM_IO>(p.d_residual + r * WIDTH, g);
  }
  store<0>(p.d_weights + (i64)blockIdx.x * WIDTH, d_weight);
}
