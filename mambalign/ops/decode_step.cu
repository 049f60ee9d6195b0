// One token of every sequence on a GPU: see ops/cuda_decode.py.
//
// Bound by memory: a state is read and written once, and neighbouring threads own neighbouring channels.
//
// Compiled for one element type (IO as in scalars.cuh), number of taps W, number of states N, and VEC, the channels that
// a thread of the convolution owns.

#define THREADS 128

struct Params {
  const io *x, *u, *delta, *z;  // rows of D channels, at these distances:
  i64 x_stride, u_stride, delta_stride, z_stride;
  io* low;  // rows of R + 2 N numbers: the step sizes' low rank, B and C
  i64 low_stride, rank;
  const float *weight, *A, *D, *bias;  // [W, D]; [N, D], -exp(A_log) times log2(e); [D]; [D] or null
  const io* window;                    // [rows, W - 1, D], oldest first
  const float* state;                  // [rows, N, D]
  io* next_window;                     // what they become; may be the same
  float* next_state;
  io* y;                               // [rows, D]
  i64 num_channels, silu;
  double eps;
};

struct alignas(VEC * sizeof(io)) Pack {
  io v[VEC];
};

// Shifts x into the window; y = act(bias + sum of taps times inputs), summed as in causal_conv1d.cu.
extern "C" __global__ void __launch_bounds__(THREADS) conv_step(const Params p) {
  const int channel = (blockIdx.x * THREADS + threadIdx.x) * VEC, row = blockIdx.y;
  if (channel >= p.num_channels) return;
  const i64 at = (i64)row * (W - 1) * p.num_channels + channel;
  Pack inputs[W], out;
#pragma unroll
  for (int k = 0; k + 1 < W; ++k) inputs[k] = *(const Pack*)(p.window + at + k * p.num_channels);
  inputs[W - 1] = *(const Pack*)(p.x + row * p.x_stride + channel);
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    float sum = p.bias ? p.bias[channel + i] : 0.f;
#pragma unroll
    for (int k = 0; k < W; ++k) sum += p.weight[k * p.num_channels + channel + i] * widen(inputs[k].v[i]);
    out.v[i] = narrow(p.silu ? sum * sigmoid(sum) : sum);
  }
#pragma unroll
  for (int k = 0; k + 1 < W; ++k) *(Pack*)(p.next_window + at + k * p.num_channels) = inputs[k + 1];
  *(Pack*)(p.y + row * p.num_channels + channel) = out;
}

// Falcon-Mamba's norms without a weight (arXiv 2410.05355, section 3.1): a warp for each part of a row of `low`.
extern "C" __global__ void __launch_bounds__(32) low_norm(const Params p) {
  const int part = blockIdx.x, size = part ? N : (int)p.rank;
  io* from = p.low + blockIdx.y * p.low_stride + (part ? p.rank + (part - 1) * N : 0);
  float squares = 0.f;
  for (int i = threadIdx.x; i < size; i += 32) squares += widen(from[i]) * widen(from[i]);
#pragma unroll
  for (int mask = 16; mask; mask /= 2) squares += from_lane_xor(squares, mask);
  const float scale = rsqrtf(squares / size + (float)p.eps);
  for (int i = threadIdx.x; i < size; i += 32) from[i] = narrow(widen(from[i]) * scale);
}

// dt = softplus(delta + bias); state = exp(dt A) state + dt u B; y = (C . state + D u) silu(z). A thread a channel.
extern "C" __global__ void __launch_bounds__(THREADS) state_step(const Params p) {
  const int channel = blockIdx.x * THREADS + threadIdx.x, row = blockIdx.y;
  const bool live = channel < p.num_channels;
  const i64 at = (i64)row * N * p.num_channels + channel;
  // All that a channel needs is asked for at once, before anything waits.
  float h[N], A[N], delta = 0.f, u = 0.f, z = 0.f, skip = 0.f;
  if (live) {
#pragma unroll
    for (int n = 0; n < N; ++n) h[n] = p.state[at + n * p.num_channels], A[n] = p.A[n * p.num_channels + channel];
    delta = widen(p.delta[row * p.delta_stride + channel]) + (p.bias ? p.bias[channel] : 0.f);
    u = widen(p.u[row * p.u_stride + channel]);
    z = widen(p.z[row * p.z_stride + channel]);
    skip = p.D[channel];
  }
  __shared__ float BC[2 * N];
  for (int i = threadIdx.x; i < 2 * N; i += THREADS) BC[i] = widen(p.low[row * p.low_stride + p.rank + i]);
  __syncthreads();
  if (!live) return;
  const float dt = softplus(delta), x = dt * u;
  float y[2] = {0.f, 0.f};
#pragma unroll
  for (int n = 0; n < N; ++n) {
    h[n] = exp2_fast(dt * A[n]) * h[n] + x * BC[n];
    y[n % 2] += BC[N + n] * h[n];
    p.next_state[at + n * p.num_channels] = h[n];
  }
  p.y[row * p.num_channels + channel] = narrow((y[0] + y[1] + skip * u) * z * sigmoid(z));
}
