// The selective scan on a GPU, forward and backward: see ops/cuda_scan.py for how the passes fit together.
//
// The state of a channel is diagonal: N <= 16 numbers that never meet those of another channel. So a warp owns 32
// channels and walks time; no thread waits for another except to sum. Parallelism comes from channels x units, where a
// unit is a segment or a piece of a long one. Exponentials (ex2, 16 lanes a clock and multiprocessor) bind first, then
// the issue of fp32 instructions; loads are a tenth of either.
//
// Layouts: token tensors are [T, D] or [T, N] with a row stride; states are fp32 [rows, 16, Dp] with Dp = D rounded up
// to 32 and zeros where N < 16 (a state whose A, B and C are zero stays zero and adds nothing).
//
// In order issue makes latency the enemy: per-token work (step sizes, gates) is done for several tokens at once, without
// branches, so that the exponentials of one token overlap the sums of another.
//
// Compiled for one element type (IO as in scalars.cuh), with or without the gate z (GATED) and softplus (SOFTPLUS).

#define N 16       // states of a channel
#define LANES 32   // channels of a warp
#define TILE 32    // tokens between stored states
#define GROUP 4    // tokens whose loads are in flight together
#define SUB GROUP  // tokens whose states and decays the backward pass holds in registers

// Tokens [begin, begin + length) of one segment. `parent` is the unit before it on its path or -1; `slot` its row in
// the workspaces of units that have a parent or a child, -1 if it has neither; `checkpoint` its first row of those.
struct Unit {
  int begin, length, segment, parent, slot, checkpoint, is_last, has_child;
};

// What all kernels take; ops/cuda_scan.py fills it by name. Every field is 8 bytes wide.
struct Params {
  const io *u, *delta, *B, *C, *z, *d_out;
  const float *A, *D, *bias;  // A * log2(e) as [16, Dp]; D and bias [Dp] or null
  i64 u_stride, delta_stride, B_stride, C_stride, z_stride, d_out_stride;
  const Unit* units;
  const int *item_starts, *item_units;  // item i walks units item_units[item_starts[i] : item_starts[i + 1]]
  const int* joined;                    // units with a slot, parents first
  const float *initial, *d_final;       // [S, 16, Dp] or null
  float *starts, *ends, *sums;          // [slots, 16, Dp], the same, [slots, Dp]
  float *checkpoints, *finals;          // state before every TILE tokens; after the last token of every segment
  io *y, *d_u, *d_delta, *d_z;          // contiguous [T, D]
  float* d_BC;                          // [Dp / 32, T, 32]: dB and dC of every warp's channels
  float *d_A, *d_D, *d_bias;            // one row an item: [items, 16, Dp], [items, Dp], [items, Dp]
  float* d_initial;                     // [S, 16, Dp]
  i64 num_channels, padded_channels, num_states, num_tokens, num_joined;
};

// log(1 + exp(x)) as max(x, 0) + log1p(exp(-|x|)); log1p(e) = 2 artanh(e / (2 + e)) by its series, 1e-7 relative.
__device__ __forceinline__ float step_size(float x) {
  if (!SOFTPLUS) return x;
  const float e = exp_fast(-fabsf(x)), s = e * reciprocal(2.f + e), s2 = s * s;
  float series = 1.f / 13.f;
  series = series * s2 + 1.f / 11.f;
  series = series * s2 + 1.f / 9.f;
  series = series * s2 + 1.f / 7.f;
  series = series * s2 + 1.f / 5.f;
  series = series * s2 + 1.f / 3.f;
  return fmaxf(x, 0.f) + 2.f * (s + s * s2 * series);
}

// The derivative of softplus where its value is dt: 1 - exp(-dt), without cancellation for small steps.
__device__ __forceinline__ float step_size_slope(float dt) {
  if (!SOFTPLUS) return 1.f;
  const float small = dt * (1.f - dt * (0.5f - dt * (1.f / 6.f - dt * (1.f / 24.f - dt * (1.f / 120.f)))));
  return dt < 0.1f ? small : 1.f - exp_fast(-dt);
}

__device__ __forceinline__ float gate(float z) { return GATED ? z * sigmoid(z) : 1.f; }

// One token's row of B or C; a lane holds a token of the tile. Zero beyond the tokens and the states that exist.
struct alignas(16) Row {
  io v[N];
};

__device__ __forceinline__ Row fetch_row(const io* from, bool here, int states) {
  Row row;
#if ALIGNED_ROWS
  if (here) return *(const Row*)from;
#pragma unroll
  for (int n = 0; n < N; ++n) row.v[n] = 0;
#else
#pragma unroll
  for (int n = 0; n < N; ++n) row.v[n] = here && n < states ? from[n] : narrow(0.f);
#endif
  return row;
}

__device__ __forceinline__ void put_row(float (&to)[N], const Row& row) {
#pragma unroll
  for (int n = 0; n < N; n += 4)
    *(float4*)(to + n) = make_float4(widen(row.v[n]), widen(row.v[n + 1]), widen(row.v[n + 2]), widen(row.v[n + 3]));
}

// Row lengths that are known when compiling (STATIC) make addresses free; the host passes the same ones in Params.
#ifdef STATIC
#define WIDTH(p) STATIC_WIDTH
#define STRIDE(p, name) STATIC_##name
#else
#define WIDTH(p) ((int)(p).num_channels)
#define STRIDE(p, name) ((int)(p).name##_stride)
#endif

// Where a lane's channel of a unit begins in each token tensor. Offsets from there fit 32 bits: units are short enough.
struct Source {
  const io *delta, *u, *z, *d_out;
};

__device__ __forceinline__ Source source_of(const Params& p, const Unit& unit, int channel) {
  return Source{
      p.delta + (i64)unit.begin * STRIDE(p, delta) + channel, p.u + (i64)unit.begin * STRIDE(p, u) + channel,
      GATED ? p.z + (i64)unit.begin * STRIDE(p, z) + channel : 0, p.d_out + (i64)unit.begin * STRIDE(p, d_out) + channel};
}

// What one lane reads of GROUP tokens of its channel, from token `first` of the unit on; zeros outside [0, length).
struct Inputs {
  io delta[GROUP], u[GROUP], z[GROUP], d_out[GROUP];
};

template <bool WITH_DELTA, bool WITH_U, bool WITH_Z, bool WITH_D_OUT>
__device__ __forceinline__ Inputs load_group(const Params& p, const Source& from, int first, int length, bool exists) {
  Inputs in;
  const io zero = narrow(0.f);
  const io *delta = from.delta + first * STRIDE(p, delta), *u = from.u + first * STRIDE(p, u);
  const io *z = from.z + first * STRIDE(p, z), *d_out = from.d_out + first * STRIDE(p, d_out);
#pragma unroll
  for (int j = 0; j < GROUP; ++j) {
    const bool here = exists && first + j >= 0 && first + j < length;
    in.delta[j] = WITH_DELTA && here ? delta[j * STRIDE(p, delta)] : zero;
    in.u[j] = WITH_U && here ? u[j * STRIDE(p, u)] : zero;
    in.z[j] = WITH_Z && GATED && here ? z[j * STRIDE(p, z)] : zero;
    in.d_out[j] = WITH_D_OUT && here ? d_out[j * STRIDE(p, d_out)] : zero;
  }
  return in;
}

struct Quad {
  float v[4];
};

__device__ __forceinline__ Quad quad(const float* from) {
  const float4 x = *(const float4*)from;
  return Quad{{x.x, x.y, x.z, x.w}};
}

// Walk the units of an item forwards. With OUTPUT: y, checkpoints and final states from the known starts. Without: the
// state that a unit with a child would end in if it started from zero, and the sum of its step sizes.
template <bool OUTPUT>
__device__ __forceinline__ void walk_forward(const Params& p) {
  __shared__ __align__(16) float rows_B[TILE][N], rows_C[TILE][N];
  const int lane = threadIdx.x, channel = blockIdx.x * LANES + lane;
  const i64 Dp = p.padded_channels;
  const float bias = p.bias ? p.bias[channel] : 0.f, skip = OUTPUT && p.D ? p.D[channel] : 0.f;
  const bool exists = channel < WIDTH(p);
  float A[N], h[N];
#pragma unroll
  for (int n = 0; n < N; ++n) A[n] = p.A[n * Dp + channel];
  for (int item = p.item_starts[blockIdx.y]; item < p.item_starts[blockIdx.y + 1]; ++item) {
    const Unit unit = p.units[p.item_units[item]];
    const float* start = 0;
    if (OUTPUT) start = unit.slot >= 0 ? p.starts + unit.slot * N * Dp : p.initial ? p.initial + unit.segment * N * Dp : 0;
#pragma unroll
    for (int n = 0; n < N; ++n) h[n] = start ? start[n * Dp + channel] : 0.f;
    float sum = 0.f;
    const io *from_B = p.B + (unit.begin + lane) * p.B_stride, *from_C = p.C + (unit.begin + lane) * p.C_stride;
    Row next_B = fetch_row(from_B, lane < unit.length, p.num_states), next_C = next_B;
    if (OUTPUT) next_C = fetch_row(from_C, lane < unit.length, p.num_states);
    const Source from = source_of(p, unit, channel);
    Inputs next = load_group<true, true, OUTPUT, false>(p, from, 0, unit.length, exists);
    float* checkpoint = p.checkpoints + (i64)unit.checkpoint * N * Dp + channel;
    io* out = p.y + (i64)unit.begin * WIDTH(p) + channel;
    for (int tile = 0; tile < unit.length; tile += TILE) {
      __syncwarp();
      put_row(rows_B[lane], next_B);
      if (OUTPUT) {
        put_row(rows_C[lane], next_C);
#pragma unroll
        for (int n = 0; n < N; ++n) checkpoint[n * Dp] = h[n];
        checkpoint += N * Dp;
      }
      __syncwarp();
      const bool more = tile + TILE + lane < unit.length;
      next_B = fetch_row(from_B + (tile + TILE) * p.B_stride, more, p.num_states);
      if (OUTPUT) next_C = fetch_row(from_C + (tile + TILE) * p.C_stride, more, p.num_states);
      const int end = min(TILE, unit.length - tile);
      for (int first = 0; first < end; first += GROUP) {
        const Inputs in = next;
        next = load_group<true, true, OUTPUT, false>(p, from, tile + first + GROUP, unit.length, exists);
        float dt[GROUP], x[GROUP], y[GROUP];
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
          // A token that is not there has step size zero: it leaves the state alone.
          dt[j] = first + j < end ? step_size(widen(in.delta[j]) + bias) : 0.f;
          x[j] = dt[j] * widen(in.u[j]);
          sum += dt[j];
        }
        // All exponentials first: they take their time, and nothing has to wait for one.
        float decay[GROUP][N];
#pragma unroll
        for (int j = 0; j < GROUP; ++j)
#pragma unroll
          for (int n = 0; n < N; ++n) decay[j][n] = exp2_fast(dt[j] * A[n]);
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
          float parts[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
          for (int n = 0; n < N; n += 4) {
            const Quad B = quad(&rows_B[first + j][n]), C = OUTPUT ? quad(&rows_C[first + j][n]) : B;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              h[n + i] = decay[j][n + i] * h[n + i] + x[j] * B.v[i];
              if (OUTPUT) parts[i] += C.v[i] * h[n + i];
            }
          }
          y[j] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
        }
        if (OUTPUT)
#pragma unroll
          for (int j = 0; j < GROUP; ++j) {
            const float gated = (y[j] + skip * widen(in.u[j])) * gate(widen(in.z[j]));
            if (exists && first + j < end) out[(tile + first + j) * WIDTH(p)] = narrow(gated);
          }
      }
    }
    float* last = OUTPUT ? (unit.is_last ? p.finals + unit.segment * N * Dp : 0) : p.ends + unit.slot * N * Dp;
    if (last)
#pragma unroll
      for (int n = 0; n < N; ++n) last[n * Dp + channel] = h[n];
    if (!OUTPUT) p.sums[unit.slot * Dp + channel] = sum;
  }
}

// From `ends` as if every unit started from zero to `starts` and true ends, parents first. One thread a (state, channel).
extern "C" __global__ void join_forward(const Params p) {
  const i64 Dp = p.padded_channels, element = blockIdx.x * (i64)blockDim.x + threadIdx.x, row = N * Dp;
  if (element >= row) return;
  const float A = p.A[element];
  for (int k = 0; k < p.num_joined; ++k) {
    const Unit unit = p.units[p.joined[k]];
    float start = p.initial ? p.initial[unit.segment * row + element] : 0.f;
    if (unit.parent >= 0) start = p.ends[p.units[unit.parent].slot * row + element];
    p.starts[unit.slot * row + element] = start;
    if (unit.has_child) p.ends[unit.slot * row + element] += exp2_fast(A * p.sums[unit.slot * Dp + element % Dp]) * start;
  }
}

// The mirror image: `starts` holds what each unit with a parent hands to the state before it if nothing came from
// behind its end; `ends` becomes the gradient of every unit's last state, from the caller and from all its children.
extern "C" __global__ void join_backward(const Params p) {
  const i64 Dp = p.padded_channels, element = blockIdx.x * (i64)blockDim.x + threadIdx.x, row = N * Dp;
  if (element >= row) return;
  const float A = p.A[element];
  for (int k = 0; k < p.num_joined; ++k) {
    const Unit unit = p.units[p.joined[k]];
    p.ends[unit.slot * row + element] = unit.is_last && p.d_final ? p.d_final[unit.segment * row + element] : 0.f;
  }
  for (int k = p.num_joined - 1; k >= 0; --k) {
    const Unit unit = p.units[p.joined[k]];
    if (unit.parent < 0) continue;
    const float decay = exp2_fast(A * p.sums[unit.slot * Dp + element % Dp]);
    p.ends[p.units[unit.parent].slot * row + element] +=
        p.starts[unit.slot * row + element] + decay * p.ends[unit.slot * row + element];
  }
}

// Walk units that have a parent backwards from a zero gradient: what reaches the state before their first token.
__device__ __forceinline__ void walk_tails(const Params& p) {
  __shared__ __align__(16) float rows_C[TILE][N];
  const int lane = threadIdx.x, channel = blockIdx.x * LANES + lane;
  const i64 Dp = p.padded_channels;
  const float bias = p.bias ? p.bias[channel] : 0.f;
  const bool exists = channel < WIDTH(p);
  float A[N];
#pragma unroll
  for (int n = 0; n < N; ++n) A[n] = p.A[n * Dp + channel];
  for (int item = p.item_starts[blockIdx.y]; item < p.item_starts[blockIdx.y + 1]; ++item) {
    const Unit unit = p.units[p.item_units[item]];
    float g[N], sum = 0.f;
#pragma unroll
    for (int n = 0; n < N; ++n) g[n] = 0.f;
    const int last = unit.length ? (unit.length - 1) / TILE * TILE : -TILE;
    const io* from_C = p.C + (unit.begin + lane) * p.C_stride;
    Row next_C = fetch_row(from_C + last * p.C_stride, last >= 0 && last + lane < unit.length, p.num_states);
    const Source from = source_of(p, unit, channel);
    Inputs next = load_group<true, false, true, true>(p, from, last + TILE - GROUP, unit.length, exists);
    for (int tile = last; tile >= 0; tile -= TILE) {
      __syncwarp();
      put_row(rows_C[lane], next_C);
      __syncwarp();
      next_C = fetch_row(from_C + (tile - TILE) * p.C_stride, tile > 0, p.num_states);
      for (int first = TILE - GROUP; first >= 0; first -= GROUP) {
        const Inputs in = next;
        next = load_group<true, false, true, true>(p, from, tile + first - GROUP, unit.length, exists);
        float dt[GROUP], d_y[GROUP];
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
          dt[j] = tile + first + j < unit.length ? step_size(widen(in.delta[j]) + bias) : 0.f;
          d_y[j] = widen(in.d_out[j]) * gate(widen(in.z[j]));
          sum += dt[j];
        }
        float decay[GROUP][N];
#pragma unroll
        for (int j = 0; j < GROUP; ++j)
#pragma unroll
          for (int n = 0; n < N; ++n) decay[j][n] = exp2_fast(dt[j] * A[n]);
#pragma unroll
        for (int j = GROUP - 1; j >= 0; --j) {
#pragma unroll
          for (int n = 0; n < N; n += 4) {
            const Quad C = quad(&rows_C[first + j][n]);
#pragma unroll
            for (int i = 0; i < 4; ++i) g[n + i] = decay[j][n + i] * (g[n + i] + C.v[i] * d_y[j]);
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) p.starts[unit.slot * N * Dp + n * Dp + channel] = g[n];
    p.sums[unit.slot * Dp + channel] = sum;
  }
}

// Sum K values over the two lanes that differ in `mask`; each keeps half of them, chosen by its own bit.
template <int K>
__device__ __forceinline__ void halve(float (&values)[K], int mask) {
  const bool upper = threadIdx.x & mask;
#pragma unroll
  for (int i = 0; i < K / 2; ++i) {
    const float keep = upper ? values[i + K / 2] : values[i], send = upper ? values[i] : values[i + K / 2];
    values[i] = keep + from_lane_xor(send, mask);
  }
}

// Sum over the four lanes that share 4 channels: each lane is left with its own channel's sum.
__device__ __forceinline__ float over_states(float (&values)[4]) {
  halve(values, 2);
  float (&two)[2] = *(float (*)[2])values;
  halve(two, 1);
  return two[0];
}

// The same over lane bits 4 and 3, of four sums over channels; bit 2 is left for the caller.
__device__ __forceinline__ float over_channels(float (&values)[4]) {
  halve(values, 16);
  float (&two)[2] = *(float (*)[2])values;
  halve(two, 8);
  return two[0];
}

// One 4 x 4 block of [16, Dp] states: 4 states of 4 channels.
__device__ __forceinline__ void load_block(float (&block)[4][4], const float* rows, i64 Dp) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const Quad row = quad(rows + n * Dp);
#pragma unroll
    for (int c = 0; c < 4; ++c) block[c][n] = row.v[c];
  }
}

__device__ __forceinline__ void store_block(float* rows, const float (&block)[4][4], i64 Dp) {
#pragma unroll
  for (int n = 0; n < 4; ++n)
    *(float4*)(rows + n * Dp) = make_float4(block[0][n], block[1][n], block[2][n], block[3][n]);
}

// Gradients of everything. A lane owns 4 states of 4 channels for the walk, and one channel for what is per channel, so
// that a sum over states costs 3 shuffles and one over channels 7 for dB and dC together. A tile is walked forwards once
// to have a state every SUB tokens, then those SUB tokens again, holding states and decays, then backwards.
__device__ __forceinline__ void walk_backward(const Params& p) {
  __shared__ __align__(16) float rows_B[TILE][N], rows_C[TILE][N];
  __shared__ __align__(16) float tile_dt[TILE][LANES], tile_x[TILE][LANES], tile_dy[TILE][LANES];
  __shared__ float4 saved[TILE / SUB - 1][4][LANES];
  const int lane = threadIdx.x, q = lane % 4 * 4, group = lane / 4 * 4;
  const int channel = blockIdx.x * LANES + lane;
  const i64 Dp = p.padded_channels;
  const i64 corner = q * Dp + blockIdx.x * LANES + group;  // of this lane's block in [16, Dp]
  const float bias = p.bias ? p.bias[channel] : 0.f, skip = p.D ? p.D[channel] : 0.f;
  const bool exists = channel < WIDTH(p);
  const bool for_C = lane & 4;  // lanes with bit 2 clear finish dB, the others dC
  const int column = (for_C ? N : 0) + q + (lane >> 4 & 1) * 2 + (lane >> 3 & 1);
  float A[4][4], d_A[4][4], d_bias = 0.f, d_D = 0.f;
  load_block(A, p.A + corner, Dp);
#pragma unroll
  for (int i = 0; i < 16; ++i) d_A[i / 4][i % 4] = 0.f;
  for (int item = p.item_starts[blockIdx.y]; item < p.item_starts[blockIdx.y + 1]; ++item) {
    const Unit unit = p.units[p.item_units[item]];
    const Source from = source_of(p, unit, channel);
    float g[4][4];
    const float* end = unit.slot >= 0 ? p.ends + unit.slot * N * Dp : p.d_final ? p.d_final + unit.segment * N * Dp : 0;
    if (end) load_block(g, end + corner, Dp);
    else
#pragma unroll
      for (int i = 0; i < 16; ++i) g[i / 4][i % 4] = 0.f;
    for (int tile = unit.length ? (unit.length - 1) / TILE * TILE : -1; tile >= 0; tile -= TILE) {
      const int count = min(TILE, unit.length - tile);
      const i64 token = unit.begin + tile;
      float h[4][4];
      load_block(h, p.checkpoints + (i64)(unit.checkpoint + tile / TILE) * N * Dp + corner, Dp);
      const Row B = fetch_row(p.B + (token + lane) * p.B_stride, lane < count, p.num_states);
      const Row C = fetch_row(p.C + (token + lane) * p.C_stride, lane < count, p.num_states);
      Inputs ahead[2];  // a group is done sooner than the next one arrives
#pragma unroll
      for (int k = 0; k < 2; ++k)
        ahead[k] = load_group<true, true, true, true>(p, from, tile + k * GROUP, unit.length, exists);
      __syncwarp();
      put_row(rows_B[lane], B);
      put_row(rows_C[lane], C);
      for (int pair = 0; pair < TILE; pair += 2 * GROUP) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int first = pair + k * GROUP;
          const Inputs in = ahead[k];
          ahead[k] = load_group<true, true, true, true>(p, from, tile + first + 2 * GROUP, unit.length, exists);
#pragma unroll
          for (int j = 0; j < GROUP; ++j) {
            const float dt = first + j < count ? step_size(widen(in.delta[j]) + bias) : 0.f;
            tile_dt[first + j][lane] = dt;
            tile_x[first + j][lane] = dt * widen(in.u[j]);
            tile_dy[first + j][lane] = widen(in.d_out[j]) * gate(widen(in.z[j]));
          }
        }
      }
      __syncwarp();
      const int subs = (count + SUB - 1) / SUB;
      for (int sub = 0; sub + 1 < subs; ++sub) {
#pragma unroll
        for (int c = 0; c < 4; ++c) saved[sub][c][lane] = make_float4(h[c][0], h[c][1], h[c][2], h[c][3]);
#pragma unroll
        for (int j = 0; j < SUB; ++j) {
          const int t = sub * SUB + j;
          const Quad dt = quad(&tile_dt[t][group]), x = quad(&tile_x[t][group]), B = quad(&rows_B[t][q]);
#pragma unroll
          for (int i = 0; i < 16; ++i) {
            const int c = i / 4, n = i % 4;
            h[c][n] = exp2_fast(dt.v[c] * A[c][n]) * h[c][n] + x.v[c] * B.v[n];
          }
        }
      }
      for (int sub = subs - 1; sub >= 0; --sub) {
        const int first = sub * SUB;
        if (sub + 1 < subs)
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const float4 row = saved[sub][c][lane];
            h[c][0] = row.x, h[c][1] = row.y, h[c][2] = row.z, h[c][3] = row.w;
          }
        float before[SUB][4][4], decay[SUB][4][4], y[SUB], d_BC[SUB], d_x[SUB], d_exponents[SUB];
#pragma unroll
        for (int j = 0; j < SUB; ++j) {
          const int t = first + j;
          const Quad dt = quad(&tile_dt[t][group]), x = quad(&tile_x[t][group]), d_y = quad(&tile_dy[t][group]);
          const Quad B = quad(&rows_B[t][q]), C = quad(&rows_C[t][q]);
          float y_sum[4] = {0.f, 0.f, 0.f, 0.f}, d_C_sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
          for (int i = 0; i < 16; ++i) {
            const int c = i / 4, n = i % 4;
            before[j][c][n] = h[c][n];
            const float a = exp2_fast(dt.v[c] * A[c][n]);
            if (j) decay[j][c][n] = a;  // the first is made again: 16 registers are worth 16 exponentials here
            h[c][n] = a * h[c][n] + x.v[c] * B.v[n];
            if (GATED) y_sum[c] += C.v[n] * h[c][n];
            d_C_sum[n] += d_y.v[c] * h[c][n];
          }
          y[j] = GATED ? over_states(y_sum) : 0.f;
          d_BC[j] = over_channels(d_C_sum);
        }
        Inputs in;  // of this lane's channel, wanted at the end
#pragma unroll
        for (int j = SUB - 1; j >= 0; --j) {
          const int t = first + j;
          const Quad dt = quad(&tile_dt[t][group]), x = quad(&tile_x[t][group]), d_y = quad(&tile_dy[t][group]);
          const Quad B = quad(&rows_B[t][q]), C = quad(&rows_C[t][q]);
          float d_B_sum[4] = {0.f, 0.f, 0.f, 0.f}, d_x_sum[4] = {0.f, 0.f, 0.f, 0.f}, d_dt_sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
          for (int i = 0; i < 16; ++i) {
            const int c = i / 4, n = i % 4;
            const float d_h = g[c][n] + C.v[n] * d_y.v[c];
            d_B_sum[n] += d_h * x.v[c];
            d_x_sum[c] += d_h * B.v[n];
            g[c][n] = (j ? decay[j][c][n] : exp2_fast(dt.v[c] * A[c][n])) * d_h;
            // d/d(dt A) of exp(dt A) h_before is decay * h_before, times d_h.
            const float d_exponent = g[c][n] * before[j][c][n];
            d_dt_sum[c] += d_exponent * A[c][n];
            d_A[c][n] += d_exponent * dt.v[c];
          }
          const float d_B = over_channels(d_B_sum), d_C = d_BC[j];
          d_BC[j] = (for_C ? d_C : d_B) + from_lane_xor(for_C ? d_B : d_C, 4);
          d_x[j] = over_states(d_x_sum);
          d_exponents[j] = over_states(d_dt_sum);
          if (j == SUB - 1) {  // early enough to arrive in time, late enough for registers to be free
            __syncwarp();
            in = load_group<false, true, GATED, GATED>(p, from, tile + first, unit.length, exists);
          }
        }
        const i64 at = (token + first) * WIDTH(p) + channel;
        float* to_BC = p.d_BC + (blockIdx.x * p.num_tokens + token + first) * (2 * N) + column;
#pragma unroll
        for (int j = 0; j < SUB; ++j) {
          const float dt = tile_dt[first + j][lane], d_y = tile_dy[first + j][lane], u = widen(in.u[j]);
          // A is in units of log2(e) here, and x = dt u.
          const float d_delta = (LN_2 * d_exponents[j] + d_x[j] * u) * step_size_slope(dt);
          const float z = widen(in.z[j]), s = sigmoid(z);
          const float d_z = widen(in.d_out[j]) * (y[j] + skip * u) * s * (1.f + z * (1.f - s));
          const bool here = first + j < count;
          d_bias += here ? d_delta : 0.f;
          d_D += d_y * u;
          if (here) to_BC[j * 2 * N] = d_BC[j];
          if (here && exists) {
            p.d_u[at + j * WIDTH(p)] = narrow(d_x[j] * dt + skip * d_y);
            p.d_delta[at + j * WIDTH(p)] = narrow(d_delta);
            if (GATED) p.d_z[at + j * WIDTH(p)] = narrow(d_z);
          }
        }
      }
    }
    if (p.d_initial && unit.parent < 0) store_block(p.d_initial + unit.segment * N * Dp + corner, g, Dp);
  }
  store_block(p.d_A + blockIdx.y * N * Dp + corner, d_A, Dp);
  p.d_D[blockIdx.y * Dp + channel] = d_D;
  p.d_bias[blockIdx.y * Dp + channel] = d_bias;
}

extern "C" __global__ void __launch_bounds__(32) scan_heads(const Params p) { walk_forward<false>(p); }
extern "C" __global__ void __launch_bounds__(32) scan_forward(const Params p) { walk_forward<true>(p); }
extern "C" __global__ void __launch_bounds__(32) scan_tails(const Params p) { walk_tails(p); }
extern "C" __global__ void __launch_bounds__(32) scan_backward(const Params p) { walk_backward(p); }
