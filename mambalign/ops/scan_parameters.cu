// The selective scan's parameters on their way to its kernels, and their gradients on the way back: see ops/cuda_scan.py.
// Small tensors, one launch each way.

#define STATES 16  // rows of a state in the scan's layout

struct Params {
  const float* A;    // [D, N], or with is_log the logarithm of -A
  float* rates;      // [16, Dp]: A * log2(e), zeros where no state or channel is
  const float* d_vectors;  // [items, 16 + 2, Dp]: the share of every item in dA, dD and the bias' gradient
  float *d_A, *d_D, *d_bias;  // [D, N], of the logarithm with is_log; [D] or null
  i64 num_channels, padded_channels, num_states, num_items, is_log;
};

__device__ __forceinline__ float rate(const Params& p, i64 channel, i64 n) {
  const float A = p.A[channel * p.num_states + n];
  return p.is_log ? -expf(A) : A;
}

// One thread a (state, channel).
extern "C" __global__ void scan_rates(const Params p) {
  const i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x, n = i / p.padded_channels, channel = i % p.padded_channels;
  if (n < STATES) p.rates[i] = n < p.num_states && channel < p.num_channels ? rate(p, channel, n) * LOG2_E : 0.f;
}

// Row blockIdx.y of the shares, 32 channels a block.
extern "C" __global__ void __launch_bounds__(32 * SUMMERS) sum_vectors(const Params p) {
  const i64 channel = blockIdx.x * 32 + threadIdx.x % 32, row = blockIdx.y;
  const bool exists = channel < p.num_channels && (row >= STATES || row < p.num_states);
  const float* from = p.d_vectors + row * p.padded_channels + channel;
  const float sum = sum_rows(from, p.num_items, (STATES + 2) * p.padded_channels, exists);
  if (threadIdx.x >= 32 || !exists) return;
  if (row < STATES)
    p.d_A[channel * p.num_states + row] = p.is_log ? sum * rate(p, channel, row) : sum;
  else if (row == STATES && p.d_D)
    p.d_D[channel] = sum;
  else if (row > STATES && p.d_bias)
    p.d_bias[channel] = sum;
}
