// Depthwise causal convolution on a GPU, forward and backward: see ops/cuda_conv.py.
//
// Bound by memory: a thread owns VEC neighbouring channels and walks a run of tokens of one segment with the window in
// registers, so every input is read once, but for W - 1 rows around each run. The next AHEAD rows are on their way to
// shared memory while these are worked on. Loads to registers would do no better than the next few: the compiler waits
// for all that are on their way at the end of a turn of a loop.
//
// Compiled for one element type (IO as in scalars.cuh), that of weight and bias (W_IO), number of taps W, vector width VEC
// (4 or 1), with or without the activation (SILU), for THREADS a block, BLOCKS of these a multiprocessor.

#define GROUP 4            // tokens of a turn of the loops
#define BATCH 2            // tokens whose rows are waited for together
#define AHEAD (2 * GROUP)  // tokens whose rows are on their way

typedef Scalar<W_IO>::type w_io;

// Tokens [begin, begin + length) of `segment`; the segment ends at `end`, and `offset` of its tokens lie before `begin`.
// Without tokens: room that is not used.
struct Run {
  int begin, length, segment, offset, end;
};

struct Params {
  const io *x, *d_y, *d_y_again;  // the last: of the same outputs, from another user of theirs; or null
  const w_io *weight, *bias;      // [D, W]; [D] or null
  i64 x_stride, d_y_stride, d_y_again_stride, d_x_stride;
  const Run* runs;
  const int* windows;    // [S, W - 1]: rows of x before each segment on its path, oldest first; -1 - k: row k of `initial`
  const float* initial;  // [S * (W - 1), D] or null for zeros
  io *y, *d_x;           // contiguous [T, D]; [T, D] with a row stride
  float* d_weights;      // [runs, W + 1, D]: the shares of every run in the gradients of the taps and of the bias
  float* d_windows;      // [S * (W - 1), D]: gradient of what lies before each segment
  w_io *d_weight, *d_bias;  // as weight and bias
  i64 num_channels, num_runs;
  const float* handed;  // a table as `d_windows`, whose rows are added to the tokens they belong to: token k of
  const int *handed_tokens, *handed_starts, *handed_rows;  // these gets rows [starts[k], starts[k + 1]) of the last
};

struct Row {
  float v[VEC];
};

// A row as it is stored; zeros are zeros in every type.
#if VEC == 4
typedef Four Pack;
__device__ __forceinline__ Row numbers(const Pack& pack) {
  const Quad quad = widen(pack);
  return Row{{quad.v[0], quad.v[1], quad.v[2], quad.v[3]}};
}
__device__ __forceinline__ Pack stored(const Row& row) { return narrow(Quad{{row.v[0], row.v[1], row.v[2], row.v[3]}}); }
#else
struct Pack {
  io v[1];
};
__device__ __forceinline__ Row numbers(const Pack& pack) { return Row{{widen(pack.v[0])}}; }
__device__ __forceinline__ Pack stored(const Row& row) { return Pack{{narrow(row.v[0])}}; }
#endif

__device__ __forceinline__ Pack load_pack(const io* from, bool there) { return there ? *(const Pack*)from : Pack{}; }

#define EACH(i) _Pragma("unroll") for (int i = 0; i < VEC; ++i)

__device__ __forceinline__ Row load_floats(const float* from) {
  Row row;
  EACH(i) row.v[i] = from[i];
  return row;
}

__device__ __forceinline__ void store_floats(float* to, const Row& row) {
  EACH(i) to[i] = row.v[i];
}

// What a thread convolves with. The taps of VEC channels lie together, in W packs.
struct Taps {
  Row tap[W], bias;
};

__device__ __forceinline__ Taps load_taps(const Params& p, int channel) {
  struct alignas(VEC * sizeof(w_io)) Piece {
    w_io v[VEC];
  } pieces[W];
  Taps taps;
#pragma unroll
  for (int k = 0; k < W; ++k) pieces[k] = *(const Piece*)(p.weight + channel * W + k * VEC);
#pragma unroll
  for (int k = 0; k < W; ++k)
    EACH(i) taps.tap[k].v[i] = Scalar<W_IO>::widen(pieces[(i * W + k) / VEC].v[(i * W + k) % VEC]);
  EACH(i) taps.bias.v[i] = p.bias ? Scalar<W_IO>::widen(p.bias[channel + i]) : 0.f;
  return taps;
}

// The W inputs that the last of them is convolved with, before the first token of a run. No load waits for another.
__device__ __forceinline__ void load_window(Row (&window)[W], const Params& p, const Run& run, int channel) {
  i64 rows[W];
  Pack packs[W];
#pragma unroll
  for (int k = 1; k < W; ++k) {
    const int distance = W - k;  // to the run's first token, on its path
    rows[k] = run.begin - distance;
    if (distance > run.offset) rows[k] = p.windows[run.segment * (W - 1) + (W - 1) - (distance - run.offset)];
  }
#pragma unroll
  for (int k = 1; k < W; ++k) packs[k] = load_pack(p.x + rows[k] * STRIDE(p, x) + channel, rows[k] >= 0);
#pragma unroll
  for (int k = 1; k < W; ++k) {
    window[k] = numbers(packs[k]);
    if (rows[k] < 0 && p.initial) window[k] = load_floats(p.initial + (-1 - rows[k]) * ROW_LENGTH(p) + channel);
  }
}

__device__ __forceinline__ Row convolve(const Taps& taps, const Row (&window)[W]) {
  Row sum = taps.bias;
#pragma unroll
  for (int k = 0; k < W; ++k)
    EACH(i) sum.v[i] += taps.tap[k].v[i] * window[k].v[i];
  return sum;
}

__device__ __forceinline__ void shift(Row (&rows)[W], const Row& last) {
#pragma unroll
  for (int k = 0; k + 1 < W; ++k) rows[k] = rows[k + 1];
  rows[W - 1] = last;
}

// Rows of a tensor on their way to the threads of a block. A thread reads what it has sent for itself: none waits for
// another. Row t is in place t % AHEAD.
typedef Pack Ring[AHEAD][THREADS];

struct Batch {
  Pack row[BATCH];
};

// Sends for a batch, `rows` on from `from`; zeros for those that are not among the first `left`.
__device__ __forceinline__ void send_for(Ring& ring, int place, const io* from, int stride, int rows, int left) {
#pragma unroll
  for (int j = 0; j < BATCH; ++j)
    send(&ring[place + j][threadIdx.x], (const Pack*)(from + (rows + j) * stride), rows + j < left);
}

__device__ __forceinline__ Batch take(const Ring& ring, int place) {
  Batch batch;
#pragma unroll
  for (int j = 0; j < BATCH; ++j) batch.row[j] = ring[place + j][threadIdx.x];
  return batch;
}

// Until the oldest of the batches that are on their way is there.
__device__ __forceinline__ void wait_for_batch() { all_but<AHEAD / BATCH - 1>(); }

// Where the rows of a run begin.
#define FROM(name) (p.name + (i64)run.begin * STRIDE(p, name) + channel)

// Outputs of GROUP tokens, `left` of which (ALL: all) are the run's. Their rows begin at `place` of the ring.
template <bool ALL>
__device__ __forceinline__ void forward_group(const Params& p, const Taps& taps, Row (&window)[W], Ring& ring, int place,
                                              const io* from, io* to, int left) {
#pragma unroll
  for (int b = 0; b < GROUP; b += BATCH) {
    wait_for_batch();
    const Batch x = take(ring, place + b);
    send_for(ring, place + b, from, STRIDE(p, x), AHEAD + b, left);
    end_batch();
#pragma unroll
    for (int j = b; j < b + BATCH; ++j) {
      shift(window, numbers(x.row[j - b]));
      Row y = convolve(taps, window);
      if (SILU) EACH(i) y.v[i] *= sigmoid(y.v[i]);
      if (ALL || j < left) *(Pack*)(to + j * ROW_LENGTH(p)) = stored(y);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2 * BLOCKS) conv_forward(const Params p) {
  __shared__ Ring ring;
  const int channel = (blockIdx.y * THREADS + threadIdx.x) * VEC;
  if (channel >= ROW_LENGTH(p)) return;
  const Run run = p.runs[blockIdx.x];
  if (run.length == 0) return;
  const io* from = FROM(x);
  io* to = p.y + (i64)run.begin * ROW_LENGTH(p) + channel;
#pragma unroll
  for (int b = 0; b < AHEAD; b += BATCH) send_for(ring, b, from, STRIDE(p, x), b, run.length), end_batch();
  const Taps taps = load_taps(p, channel);
  Row window[W];
  load_window(window, p, run, channel);
  int place = 0;
  for (int left = run.length; left > 0; left -= GROUP) {
    if (left >= GROUP)
      forward_group<true>(p, taps, window, ring, place, from, to, left);
    else
      forward_group<false>(p, taps, window, ring, place, from, to, left);
    from += GROUP * STRIDE(p, x), to += GROUP * ROW_LENGTH(p), place ^= GROUP;
  }
}

struct Rings {
  Ring x, d_y, d_y_again;
};

// What a thread carries from token to token on its way through a run, from where it reads and to where it writes.
struct Backward {
  Taps taps, d_taps;
  Row window[W], d_pre[W];  // d_pre: gradients of the last W outputs before their activation
  const io *from_x, *from_d, *from_again;
  io* to;
  int place;
};

// Sends for a batch, `rows` on from where a thread is; zeros past the segment's end, `left` rows on.
__device__ __forceinline__ void send_for(const Params& p, const Backward& at, Rings& rings, int place, int rows, int left) {
  send_for(rings.x, place, at.from_x, STRIDE(p, x), rows, left);
  send_for(rings.d_y, place, at.from_d, STRIDE(p, d_y), rows, left);
  send_for(rings.d_y_again, place, at.from_again, STRIDE(p, d_y_again), rows, p.d_y_again ? left : 0);
  end_batch();
}

// The token j tokens on from where a thread is, `token` of the run, whose inputs are the first three. The gradient of an
// input is whole when the last output that saw it has been: that of token - (W - 1) is written with it. INSIDE says that
// both are the run's.
template <bool INSIDE>
__device__ __forceinline__ void backward_token(const Params& p, Backward& at, const Run& run, const Pack& x, const Pack& d_y,
                                               const Pack& d_y_again, int j, int token, int channel) {
  shift(at.window, numbers(x));
  Row d = numbers(d_y);
  const Row again = numbers(d_y_again);
  EACH(i) d.v[i] += again.v[i];
  if (SILU) {
    const Row pre = convolve(at.taps, at.window);
    EACH(i) {  // gate (1 + pre (1 - gate)) is the slope
      const float gate = sigmoid(pre.v[i]), part = d.v[i] * gate;
      d.v[i] = part + part * (pre.v[i] - pre.v[i] * gate);
    }
  }
  shift(at.d_pre, d);
  if (INSIDE || token < run.length) {
#pragma unroll
    for (int k = 0; k < W; ++k)
      EACH(i) at.d_taps.tap[k].v[i] += d.v[i] * at.window[k].v[i];
    EACH(i) at.d_taps.bias.v[i] += d.v[i];
  }
  // d_pre[k] is the gradient of the output k tokens after the input, which saw it through tap W - 1 - k.
  Row d_x = Row{};
#pragma unroll
  for (int k = 0; k < W; ++k)
    EACH(i) d_x.v[i] += at.d_pre[k].v[i] * at.taps.tap[W - 1 - k].v[i];
  const int input = token - (W - 1);
  if (INSIDE || (input >= 0 && input < run.length))
    *(Pack*)(at.to + j * STRIDE(p, d_x)) = stored(d_x);
  else if (input < 0 && run.offset == 0)
    store_floats(p.d_windows + (i64)(run.segment * (W - 1) + token) * ROW_LENGTH(p) + channel, d_x);
}

// The GROUP tokens from t on, counted from the run's first.
template <bool INSIDE>
__device__ __forceinline__ void backward_group(const Params& p, Backward& at, Rings& rings, const Run& run, int t, int end,
                                               int channel) {
#pragma unroll
  for (int b = 0; b < GROUP; b += BATCH) {
    wait_for_batch();
    const Batch x = take(rings.x, at.place + b), d_y = take(rings.d_y, at.place + b);
    const Batch again = take(rings.d_y_again, at.place + b);
    send_for(p, at, rings, at.place + b, AHEAD + b, end - t);
#pragma unroll
    for (int j = 0; j < BATCH; ++j)
      backward_token<INSIDE>(p, at, run, x.row[j], d_y.row[j], again.row[j], b + j, t + b + j, channel);
  }
}

// Walks the run and W - 1 tokens on.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv_backward(const Params p) {
  __shared__ Rings rings;
  const int channel = (blockIdx.y * THREADS + threadIdx.x) * VEC;
  if (channel >= ROW_LENGTH(p)) return;
  const Run run = p.runs[blockIdx.x];
  float* share = p.d_weights + (i64)blockIdx.x * (W + 1) * ROW_LENGTH(p) + channel;
  if (run.length == 0) {
#pragma unroll
    for (int k = 0; k <= W; ++k) store_floats(share + k * ROW_LENGTH(p), Row{});
    return;
  }
  const int last = run.length + W - 1, end = min(last, run.end - run.begin);
  Backward at;
  at.from_x = FROM(x), at.from_d = FROM(d_y), at.from_again = p.d_y_again ? FROM(d_y_again) : at.from_d;
  at.to = p.d_x + (i64)(run.begin - (W - 1)) * STRIDE(p, d_x) + channel, at.place = 0;
#pragma unroll
  for (int b = 0; b < AHEAD; b += BATCH) send_for(p, at, rings, b, b, end);
  at.taps = load_taps(p, channel), at.d_taps = Taps{};
#pragma unroll
  for (int k = 0; k < W; ++k) at.d_pre[k] = Row{};
  load_window(at.window, p, run, channel);
  for (int t = 0; t < last; t += GROUP) {
    if (t >= W - 1 && t + GROUP <= run.length)
      backward_group<true>(p, at, rings, run, t, end, channel);
    else
      backward_group<false>(p, at, rings, run, t, end, channel);
    at.from_x += GROUP * STRIDE(p, x), at.from_d += GROUP * STRIDE(p, d_y), at.to += GROUP * STRIDE(p, d_x);
    at.from_again += GROUP * STRIDE(p, d_y_again), at.place ^= GROUP;
  }
#pragma unroll
  for (int k = 0; k < W; ++k) store_floats(share + k * ROW_LENGTH(p), at.d_taps.tap[k]);
  store_floats(share + W * ROW_LENGTH(p), at.d_taps.bias);
}

// To the gradient of a token what the windows of other segments hand back to it, in the order of the rows. One channel a
// thread: there are few such tokens.
extern "C" __global__ void __launch_bounds__(THREADS) hand_back(const Params p) {
  const int channel = blockIdx.y * THREADS + threadIdx.x, begin = p.handed_starts[blockIdx.x];
  const int end = p.handed_starts[blockIdx.x + 1];
  if (channel >= ROW_LENGTH(p) || begin == end) return;
  io* at = p.d_x + (i64)p.handed_tokens[blockIdx.x] * STRIDE(p, d_x) + channel;
  float total = widen(*at);
  for (int k = begin; k < end; ++k) total += p.handed[(i64)p.handed_rows[k] * ROW_LENGTH(p) + channel];
  *at = narrow(total);
}

// The gradients of weight and bias from the shares of all runs. Tap blockIdx.y, or the bias, of 32 channels a block.
extern "C" __global__ void __launch_bounds__(32 * SUMMERS) sum_taps(const Params p) {
  const int channel = blockIdx.x * 32 + threadIdx.x % 32, tap = blockIdx.y;
  const bool exists = channel < ROW_LENGTH(p);
  const float sum = sum_rows(p.d_weights + tap * ROW_LENGTH(p) + channel, p.num_runs, (W + 1) * ROW_LENGTH(p), exists);
  if (threadIdx.x >= 32 || !exists) return;
  if (tap < W)
    p.d_weight[channel * W + tap] = Scalar<W_IO>::narrow(sum);
  else if (p.d_bias)
    p.d_bias[channel] = Scalar<W_IO>::narrow(sum);
}
