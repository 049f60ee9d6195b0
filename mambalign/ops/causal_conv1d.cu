// Depthwise causal convolution on a GPU, forward and backward: see ops/cuda_conv.py.
//
// Bound by memory: a thread owns VEC neighbouring channels and walks a run of tokens of one segment with the window in
// registers, so every input is read once, but for W - 1 rows around each run.
//
// Compiled for one element type (IO as in scalars.cuh), number of taps W and vector width VEC.

#define GROUP 4  // tokens whose loads are in flight together

// Tokens [begin, begin + length) of `segment`; the segment ends at `end`, and `offset` of its tokens lie before `begin`.
struct Run {
  int begin, length, segment, offset, end;
};

struct Params {
  const io *x, *d_y, *d_y_again;  // the last: of the same outputs, from another user of theirs; or null
  const float *weight, *bias;  // [W, D]; [D] or null
  i64 x_stride, d_y_stride, d_y_again_stride, d_x_stride;
  const Run* runs;
  const int* windows;    // [S, W - 1]: rows of x before each segment on its path, oldest first; -1 - k: row k of `initial`
  const float* initial;  // [S * (W - 1), D] or null for zeros
  io *y, *d_x;           // contiguous [T, D]; [T, D] with a row stride
  float* d_weights;      // [runs, W + 1, D]: the shares of every run in the gradients of the taps and of the bias
  float* d_windows;      // [S * (W - 1), D]: gradient of what lies before each segment
  i64 num_channels, silu;
};

struct Row {
  float v[VEC];
};

struct alignas(VEC * sizeof(io)) Pack {
  io v[VEC];
};

__device__ __forceinline__ Row zero_row() {
  Row row;
#pragma unroll
  for (int i = 0; i < VEC; ++i) row.v[i] = 0.f;
  return row;
}

__device__ __forceinline__ Row load_row(const io* from) {
  const Pack pack = *(const Pack*)from;
  Row row;
#pragma unroll
  for (int i = 0; i < VEC; ++i) row.v[i] = widen(pack.v[i]);
  return row;
}

__device__ __forceinline__ void store_row(io* to, const Row& row) {
  Pack pack;
#pragma unroll
  for (int i = 0; i < VEC; ++i) pack.v[i] = narrow(row.v[i]);
  *(Pack*)to = pack;
}

__device__ __forceinline__ Row load_floats(const float* from) {
  Row row;
#pragma unroll
  for (int i = 0; i < VEC; ++i) row.v[i] = from[i];
  return row;
}

__device__ __forceinline__ void store_floats(float* to, const Row& row) {
#pragma unroll
  for (int i = 0; i < VEC; ++i) to[i] = row.v[i];
}

// The input `distance` tokens before the run's first one, on its path.
__device__ __forceinline__ Row before(const Params& p, const Run& run, int distance, int channel) {
  i64 row = run.begin - distance;
  if (distance > run.offset) {
    row = p.windows[run.segment * (W - 1) + (W - 1) - (distance - run.offset)];
    if (row < 0) return p.initial ? load_floats(p.initial + (-1 - row) * p.num_channels + channel) : zero_row();
  }
  return load_row(p.x + row * p.x_stride + channel);
}

__device__ __forceinline__ Row convolve(const Row (&taps)[W], const Row& bias, const Row (&window)[W]) {
  Row sum = bias;
#pragma unroll
  for (int k = 0; k < W; ++k)
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum.v[i] += taps[k].v[i] * window[k].v[i];
  return sum;
}

__device__ __forceinline__ void shift(Row (&rows)[W]) {
#pragma unroll
  for (int k = 0; k + 1 < W; ++k) rows[k] = rows[k + 1];
}

__device__ __forceinline__ void load_group(Row (&rows)[GROUP], const io* from, i64 stride, int first, int end, int channel) {
#pragma unroll
  for (int j = 0; j < GROUP; ++j) rows[j] = first + j < end ? load_row(from + (first + j) * stride + channel) : zero_row();
}

extern "C" __global__ void __launch_bounds__(128) conv_forward(const Params p) {
  const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * VEC;
  if (channel >= p.num_channels) return;
  const Run run = p.runs[blockIdx.x];
  const Row bias = p.bias ? load_floats(p.bias + channel) : zero_row();
  Row taps[W], window[W], next[GROUP];
#pragma unroll
  for (int k = 0; k < W; ++k) taps[k] = load_floats(p.weight + k * p.num_channels + channel);
#pragma unroll
  for (int k = 0; k + 1 < W; ++k) window[k + 1] = before(p, run, W - 1 - k, channel);
  const int end = run.begin + run.length;
  load_group(next, p.x, p.x_stride, run.begin, end, channel);
  for (int t = run.begin; t < end; t += GROUP) {
    Row x[GROUP];
#pragma unroll
    for (int j = 0; j < GROUP; ++j) x[j] = next[j];
    load_group(next, p.x, p.x_stride, t + GROUP, end, channel);
#pragma unroll
    for (int j = 0; j < GROUP; ++j) {
      if (t + j >= end) break;
      shift(window);
      window[W - 1] = x[j];
      Row y = convolve(taps, bias, window);
      if (p.silu)
#pragma unroll
        for (int i = 0; i < VEC; ++i) y.v[i] *= sigmoid(y.v[i]);
      store_row(p.y + (t + j) * p.num_channels + channel, y);
    }
  }
}

__device__ __forceinline__ void load_gradients(Row (&rows)[GROUP], const Params& p, int first, int end, int channel) {
  load_group(rows, p.d_y, p.d_y_stride, first, end, channel);
  if (!p.d_y_again) return;
  Row others[GROUP];
  load_group(others, p.d_y_again, p.d_y_again_stride, first, end, channel);
#pragma unroll
  for (int j = 0; j < GROUP; ++j)
#pragma unroll
    for (int i = 0; i < VEC; ++i) rows[j].v[i] += others[j].v[i];
}

// Walks the run and W - 1 tokens on: the gradient of an input is whole when the last output that saw it has been.
extern "C" __global__ void __launch_bounds__(128) conv_backward(const Params p) {
  const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * VEC;
  if (channel >= p.num_channels) return;
  const Run run = p.runs[blockIdx.x];
  const Row bias = p.bias ? load_floats(p.bias + channel) : zero_row();
  Row taps[W], window[W], d_pre[W], d_taps[W], d_bias = zero_row(), next_x[GROUP], next_d[GROUP];
#pragma unroll
  for (int k = 0; k < W; ++k) {
    taps[k] = load_floats(p.weight + k * p.num_channels + channel);
    d_taps[k] = d_pre[k] = window[k] = zero_row();
  }
#pragma unroll
  for (int k = 0; k + 1 < W; ++k) window[k + 1] = before(p, run, W - 1 - k, channel);
  const int own = run.begin + run.length, last = own + W - 1, end = min(last, run.end);
  load_group(next_x, p.x, p.x_stride, run.begin, end, channel);
  load_gradients(next_d, p, run.begin, end, channel);
  for (int t = run.begin; t < last; t += GROUP) {
    Row x[GROUP], d_y[GROUP];
#pragma unroll
    for (int j = 0; j < GROUP; ++j) x[j] = next_x[j], d_y[j] = next_d[j];
    load_group(next_x, p.x, p.x_stride, t + GROUP, end, channel);
    load_gradients(next_d, p, t + GROUP, end, channel);
#pragma unroll
    for (int j = 0; j < GROUP; ++j) {
      if (t + j >= last) break;
      shift(window);
      shift(d_pre);
      window[W - 1] = x[j];
      Row d = d_y[j];  // zero past the segment's end
      if (p.silu) {
        const Row pre = convolve(taps, bias, window);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          const float gate = sigmoid(pre.v[i]);
          d.v[i] *= gate * (1.f + pre.v[i] * (1.f - gate));
        }
      }
      d_pre[W - 1] = d;
      if (t + j < own) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          d_bias.v[i] += d.v[i];
#pragma unroll
          for (int k = 0; k < W; ++k) d_taps[k].v[i] += d.v[i] * window[k].v[i];
        }
      }
      // Input t - (W - 1): d_pre[k] is the gradient of the output k tokens after it, which saw it through tap W - 1 - k.
      Row d_x = zero_row();
#pragma unroll
      for (int k = 0; k < W; ++k)
#pragma unroll
        for (int i = 0; i < VEC; ++i) d_x.v[i] += d_pre[k].v[i] * taps[W - 1 - k].v[i];
      const int token = t + j - (W - 1);
      if (token >= run.begin)
        store_row(p.d_x + token * p.d_x_stride + channel, d_x);
      else if (run.offset == 0)
        store_floats(p.d_windows + (run.segment * (W - 1) + t + j - run.begin) * p.num_channels + channel, d_x);
    }
  }
  float* share = p.d_weights + blockIdx.x * (W + 1) * p.num_channels + channel;
#pragma unroll
  for (int k = 0; k < W; ++k) store_floats(share + k * p.num_channels, d_taps[k]);
  store_floats(share + W * p.num_channels, d_bias);
}
