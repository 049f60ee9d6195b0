// The selective scan on a GPU, forward and backward: see ops/cuda_scan.py for how the passes fit together.
//
// The state of a channel is diagonal: N <= 16 numbers that never meet those of another channel. Two lanes share a
// channel, 8 states each in registers, and walk time; no thread waits for another except to sum. Parallelism comes from
// channels x units, where a unit is a segment or a piece of a long one. Issue slots of fp32 instructions bind first, then
// exponentials (ex2, 16 lanes a clock and multiprocessor); loads are a tenth of either. So what counts is how few
// instructions a state takes, and that registers leave room for three warps a scheduler, each filling the others' waits.
//
// Layouts: token tensors are [T, D] or [T, N] with a row stride; states are fp32 [rows, 16, Dp] with Dp = D rounded up
// to whole blocks and zeros where N < 16 (a state whose A, B and C are zero stays zero and adds nothing).
//
// Time goes in tiles. What is per token and channel (step sizes and gates; afterwards outputs, or gradients of u, delta
// and z) is worked out once a tile, four channels a lane, and passed to and from the walk through shared memory.
// Sums over states end with one shuffle; sums over channels (dB, dC) are products with ones on the tensor cores.
//
// Compiled for one element type (IO as in scalars.cuh), with or without the gate z (GATED) and softplus (SOFTPLUS),
// for 32 * WARPS threads a block, HELD warps of the backward pass a multiprocessor and HELD_FORWARD of the forward pass,
// and for a RELAY or not. In a relay fewer warps have more registers: the next tile's inputs are read while one is walked.

#define N 16                    // states of a channel
#define HALF 8                  // of them in one lane
#define LANES 16                // channels of a warp
#define CHANNELS (LANES * WARPS)
#define THREADS (32 * WARPS)
#define TILE 32                 // tokens between stored states
#define SUB 4                   // tokens whose exponentials are in registers together
#define ROWS (TILE / 8)         // tokens of a tile that a lane prepares
#ifdef STATIC
#define PADDED(p) ((i64)(STATIC_WIDTH + CHANNELS - 1) / CHANNELS * CHANNELS)
#else
#define PADDED(p) ((p).padded_channels)
#endif
#define STATES(p) (ALIGNED_ROWS ? N : (int)(p).num_states)
#define GAPPED (LANES * SUB + 12)  // numbers of SUB tokens of a warp's channels in a `Numbers`

// Tokens [begin, begin + length) of one segment. `parent` is the unit before it on its path or -1; `slot` its row in
// the workspaces of units that are joined to others, -1 if it is not; `checkpoint` its first row of those.
// Without a slot a unit gets its first state from its parent, through row `before` of `starts`, and hands its last on to
// its children, through row `after`; gradients go the other way, through `ends`, where all children but the first to go
// backwards add theirs (`adds`). -1 where there is none.
struct Unit {
  int begin, length, segment, parent, slot, checkpoint, is_last, before, after, adds;
};

// A unit with a slot, and its parent's slot or -1: few words, and the next ones on their way, since whoever joins waits.
struct Join {
  int slot, parent, segment, flags;
};
#define HAS_CHILD 1
#define IS_LAST 2

// What all kernels take; ops/cuda_scan.py fills it by name. Every field is 8 bytes wide.
struct Params {
  const io *u, *delta, *B, *C, *z, *d_out;
  const float *A, *D, *bias;  // A * log2(e) as [16, Dp]; D and bias [Dp] or null
  i64 u_stride, delta_stride, B_stride, C_stride, z_stride, d_out_stride, d_z_stride;
  const Unit* units;
  const int *item_starts, *item_units;  // item i walks units item_units[item_starts[i] : item_starts[i + 1]]
  const Join* joined;                   // units with a slot, parents first; then perhaps -1 for room that is not used
  const float *initial, *d_final;       // [S, 16, Dp] or null
  float *starts, *ends, *sums;          // [slots, 16, Dp], the same, [slots, Dp]
  float *checkpoints, *finals;          // state before every TILE tokens; after the last token of every segment
  io *y, *d_u, *d_delta, *d_z;          // contiguous [T, D], but for d_z
  float4* d_BC;                         // [blocks, T, 8]: dB and dC of every block's channels, in the order of `add`
  io *d_B, *d_C;                        // [T, 16]
  float* d_vectors;  // [items, 16 + 2, Dp]: the share of every item (in a relay: row) in dA, dD and the bias' gradient
  float* d_initial;                     // [S, 16, Dp]
  i64 num_channels, padded_channels, num_states, num_tokens, num_blocks, num_joined;
  int* turns;  // of a relay: how many are taken, then for each 1 once it is over
  i64 num_turns, turns_apart;
};

__device__ __forceinline__ float step_size(float x) { return SOFTPLUS ? softplus(x) : x; }

__device__ __forceinline__ float step_size_slope(float x) { return SOFTPLUS ? sigmoid(x) : 1.f; }

__device__ __forceinline__ float gate(float z) { return GATED ? z * sigmoid(z) : 1.f; }

// Which part a lane has. In a walk: one channel, and states 8 * half to 8 * half + 7 of it; the lane with the other half
// is lane ^ 4. In preparing a tile: tokens row, row + 8, ..., four channels. All share an item and a block of channels.
struct Place {
  int lane, warp, half, own, channel, row, corner, first_channel, block, item;
};

// index: of a pair of an item and a block of channels.
__device__ __forceinline__ Place place(const Params& p, int index) {
  Place at;
  at.lane = threadIdx.x % 32, at.warp = threadIdx.x / 32;
  at.half = at.lane / 4 % 2, at.own = at.lane % 4 + at.lane / 8 * 4;
  at.row = at.lane / 4, at.corner = at.lane % 4 * 4;
  const int blocks = (int)(PADDED(p) / CHANNELS);
  at.item = index / blocks, at.block = index % blocks;
  const int first = at.block * CHANNELS + at.warp * LANES;
  at.channel = first + at.own, at.first_channel = first + at.corner;
  return at;
}

// Of the four channels that a lane prepares, those that exist: any number from 4 on where all do. Known when compiling
// where rows are whole blocks.
__device__ __forceinline__ int existing(const Params& p, const Place& lane) {
  return ROW_LENGTH(p) == PADDED(p) ? 4 : ROW_LENGTH(p) - lane.first_channel;
}

// A number per token of SUB and channel of a warp. The gaps keep the writes of a warp, four channels of eight tokens,
// in different banks.
typedef float Numbers[GAPPED];

// SUB tokens of a lane's own channel.
__device__ __forceinline__ float* own(Numbers& numbers, const Place& lane) {
  return &numbers[lane.own * SUB + (lane.own & 8)];
}

// Channel c of those that a lane prepares, of its token in these SUB: row + 8 i is in those of `group(i)`.
__device__ __forceinline__ float& prepared(Numbers& numbers, int c, const Place& lane) {
  return (&numbers[lane.corner * SUB + (lane.corner & 8) + lane.row % SUB])[c * SUB];
}

__device__ __forceinline__ int group(int i, const Place& lane) { return lane.row / SUB + i * (8 / SUB); }

// A thread's part of B or C of a tile of tokens, which the whole block reads from shared memory.
struct Staged {
  Four part[TILE * N / 4 / THREADS];
};

__device__ __forceinline__ Staged fetch_rows(const io* from, int stride, int count, int states) {
  Staged got;
#pragma unroll
  for (int k = 0; k < TILE * N / 4 / THREADS; ++k) {
    const int t = threadIdx.x / 4 + k * THREADS / 4, n = threadIdx.x % 4 * 4;
    got.part[k] = fetch<ALIGNED_ROWS>(from + t * stride + n, t < count ? states - n : 0);
  }
  return got;
}

__device__ __forceinline__ void stage(float (&rows)[TILE][N], const Staged& got) {
#pragma unroll
  for (int k = 0; k < TILE * N / 4 / THREADS; ++k) {
    const int t = threadIdx.x / 4 + k * THREADS / 4, n = threadIdx.x % 4 * 4;
    *(float4*)&rows[t][n] = as_float4(widen(got.part[k]).v);
  }
}

// What a lane prepares of a tile of one token tensor.
struct Prepared {
  Four row[ROWS];
};

template <bool WANTED>
__device__ __forceinline__ Prepared prepare(const io* from, int stride, const Place& lane, int count, int exist) {
  Prepared got;
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const int t = lane.row + 8 * i;
    got.row[i] = fetch<ALIGNED_TOKENS>(from + t * stride, WANTED && t < count ? exist : 0);
  }
  return got;
}

// 1 for the i-th token that a lane prepares, 0 if it is not there: it then has step size zero and leaves the state alone.
// A factor, since a choice would become a branch around every step size.
__device__ __forceinline__ float here(int i, int count, const Place& lane) { return lane.row + 8 * i < count ? 1.f : 0.f; }

// A warp's part of a tile that is wanted next, on its way from memory to the cache: a token a lane.
__device__ __forceinline__ void prefetch_tile(const io* from, int stride, const Place& lane, int count, int exist) {
  if (lane.lane < count && exist + lane.corner > 0) prefetch(from + lane.lane * stride - lane.corner);
}

// The token tensors at a lane's four channels, from the first token of a unit on. Offsets from there fit 32 bits.
#define FROM(name) (p.name + (i64)unit.begin * STRIDE(p, name) + lane.first_channel)

// D, or the bias, at the four channels that a lane prepares.
__device__ __forceinline__ Quad vector(const float* from, const Place& lane) {
  return from ? quad(from + lane.first_channel) : Quad{};
}

__device__ __forceinline__ void load_states(float (&states)[HALF], const float* row, const Place& lane, i64 Dp) {
#pragma unroll
  for (int n = 0; n < HALF; ++n) states[n] = row ? row[(lane.half * HALF + n) * Dp + lane.channel] : 0.f;
}

__device__ __forceinline__ void add_states(float (&states)[HALF], const float* row, const Place& lane, i64 Dp) {
#pragma unroll
  for (int n = 0; n < HALF; ++n) states[n] += row[(lane.half * HALF + n) * Dp + lane.channel];
}

__device__ __forceinline__ void store_states(float* row, const float (&states)[HALF], const Place& lane, i64 Dp) {
#pragma unroll
  for (int n = 0; n < HALF; ++n) row[(lane.half * HALF + n) * Dp + lane.channel] = states[n];
}

// In a relay a block takes turn after turn, each a pair of an item and a block of channels, in their order. The one
// before it on its row is `turns_apart` earlier, so it is taken, and nearly always over. Whoever waits for it waits for a
// block that runs: none waits for a later turn, so it does not matter how many blocks run at a time.
__device__ __forceinline__ int next_turn(const Params& p) {
  __shared__ int turn;
  __syncthreads();
  if (threadIdx.x == 0) {
    turn = take(p.turns);
    if (turn < p.num_turns && turn >= p.turns_apart) await(p.turns + 1 + turn - p.turns_apart);
  }
  __syncthreads();
  return turn;
}

// What the block has written in this turn is there for the one after it.
__device__ __forceinline__ void end_turn(const Params& p, int turn) {
  publish();
  __syncthreads();
  if (threadIdx.x == 0) announce(p.turns + 1 + turn);
}

// Two sums over the two lanes of a channel: half 0 is left with that of `first`, half 1 with that of `second`.
__device__ __forceinline__ float over_halves(float first, float second, int half) {
  return (half ? second : first) + from_lane_xor(half ? first : second, 4);
}

// What SUB tokens multiply a lane's states by: all exponentials first, since they take their time.
__device__ __forceinline__ void decays(float (&decay)[SUB][HALF], const Quad& dt, const float (&A)[HALF]) {
#pragma unroll
  for (int i = 0; i < SUB * HALF; ++i) decay[i / HALF][i % HALF] = exp2_fast(dt.v[i / HALF] * A[i % HALF]);
}

// Walk the units of an item forwards. With OUTPUT: y, checkpoints and final states from the known starts. Without: the
// state that a unit with a child would end in if it started from zero, and the sum of its step sizes.
template <bool OUTPUT>
__device__ __forceinline__ void walk_forward(const Params& p, int index) {
  __shared__ __align__(16) float rows_B[TILE][N], rows_C[OUTPUT ? TILE : 1][N];
  __shared__ __align__(16) struct { Numbers dt, x; } tiles[WARPS][TILE / SUB];
  const Place lane = place(p, index);
  auto& groups = tiles[lane.warp];
  const i64 Dp = PADDED(p);
  const int exist = existing(p, lane);
  float A[HALF], h[HALF];
  load_states(A, p.A, lane, Dp);
  for (int item = p.item_starts[lane.item]; item < p.item_starts[lane.item + 1]; ++item) {
    const Unit unit = p.units[p.item_units[item]];
    const float* start = 0;
    if (OUTPUT) start = p.initial ? p.initial + unit.segment * N * Dp : 0;
    if (OUTPUT && max(unit.slot, unit.before) >= 0) start = p.starts + max(unit.slot, unit.before) * N * Dp;
    load_states(h, start, lane, Dp);
    float sum = 0.f;
    const io *from_delta = FROM(delta), *from_u = FROM(u), *from_z = OUTPUT && GATED ? FROM(z) : 0;
    const io *from_B = p.B + (i64)unit.begin * STRIDE(p, B), *from_C = p.C + (i64)unit.begin * STRIDE(p, C);
    struct Inputs {
      Prepared delta, u, z;
      Staged B, C;
    };
    const auto read = [&](int tile) {  // nothing where no tile is
      const int count = unit.length - tile;
      Inputs got;
      got.delta = prepare<true>(from_delta + tile * STRIDE(p, delta), STRIDE(p, delta), lane, count, exist);
      got.u = prepare<true>(from_u + tile * STRIDE(p, u), STRIDE(p, u), lane, count, exist);
      got.z = prepare<OUTPUT && GATED>(from_z + tile * STRIDE(p, z), STRIDE(p, z), lane, count, exist);
      got.B = fetch_rows(from_B + tile * STRIDE(p, B), STRIDE(p, B), count, STATES(p));
      if (OUTPUT) got.C = fetch_rows(from_C + tile * STRIDE(p, C), STRIDE(p, C), count, STATES(p));
      return got;
    };
    Inputs now;
    Quad bias, skip;
    if (RELAY) now = read(0), bias = vector(p.bias, lane), skip = vector(p.D, lane);
    for (int tile = 0; tile < unit.length; tile += TILE) {
      const int count = min(TILE, unit.length - tile);
      if (!RELAY) now = read(tile), bias = vector(p.bias, lane);
      stage(rows_B, now.B);
      if constexpr (OUTPUT) stage(rows_C, now.C);
      if (OUTPUT) store_states(p.checkpoints + (i64)(unit.checkpoint + tile / TILE) * N * Dp, h, lane, Dp);
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const Quad before_bias = widen(now.delta.row[i]), inputs = widen(now.u.row[i]);
        const float present = here(i, count, lane);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float dt = present * step_size(before_bias.v[c] + bias.v[c]);
          prepared(groups[group(i, lane)].dt, c, lane) = dt;
          prepared(groups[group(i, lane)].x, c, lane) = dt * inputs.v[c];
        }
      }
      __syncthreads();
      const int next = tile + TILE, left = unit.length - next;
      Inputs coming;
      if (RELAY) {
        coming = read(next);
      } else {
        prefetch_tile(from_delta + next * STRIDE(p, delta), STRIDE(p, delta), lane, left, exist);
        prefetch_tile(from_u + next * STRIDE(p, u), STRIDE(p, u), lane, left, exist);
        if (OUTPUT && GATED) prefetch_tile(from_z + next * STRIDE(p, z), STRIDE(p, z), lane, left, exist);
      }
      for (int first = 0; first < count; first += SUB) {
        auto& tokens = groups[first / SUB];
        const Quad dt = quad(own(tokens.dt, lane)), x = quad(own(tokens.x, lane));
        if (!OUTPUT) sum += (dt.v[0] + dt.v[1]) + (dt.v[2] + dt.v[3]);
        float decay[SUB][HALF], y[SUB];
        decays(decay, dt, A);
#pragma unroll
        for (int j = 0; j < SUB; ++j) {
          y[j] = 0.f;
#pragma unroll
          for (int n = 0; n < HALF; n += 4) {
            const Quad B = quad(&rows_B[first + j][lane.half * HALF + n]);
            const Quad C = OUTPUT ? quad(&rows_C[first + j][lane.half * HALF + n]) : B;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              h[n + i] = decay[j][n + i] * h[n + i] + x.v[j] * B.v[i];
              if (OUTPUT) y[j] += C.v[i] * h[n + i];
            }
          }
        }
        if (OUTPUT)
#pragma unroll
          for (int j = 0; j < SUB; j += 2)  // in the place of x, which both lanes of the channel have read
            own(tokens.x, lane)[j + lane.half] = over_halves(y[j], y[j + 1], lane.half);
      }
      if (OUTPUT) {
        if (!RELAY) skip = vector(p.D, lane);
        io* out = p.y + (i64)(unit.begin + tile) * ROW_LENGTH(p) + lane.first_channel;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          const int t = lane.row + 8 * i;
          const Quad inputs = widen(now.u.row[i]), gates = widen(now.z.row[i]);
          Quad gated;
#pragma unroll
          for (int c = 0; c < 4; ++c)
            gated.v[c] = (prepared(groups[group(i, lane)].x, c, lane) + skip.v[c] * inputs.v[c]) * gate(gates.v[c]);
          store<ALIGNED_TOKENS>(out + t * ROW_LENGTH(p), gated, t < count ? exist : 0);
        }
      }
      __syncthreads();
      if (RELAY) now = coming;
    }
    float* last = OUTPUT ? (unit.is_last && p.finals ? p.finals + unit.segment * N * Dp : 0) : p.ends + unit.slot * N * Dp;
    if (last) store_states(last, h, lane, Dp);
    if (OUTPUT && unit.after >= 0) store_states(p.starts + unit.after * N * Dp, h, lane, Dp);
    if (!OUTPUT && lane.half == 0) p.sums[unit.slot * Dp + lane.channel] = sum;
  }
}

// From `ends` as if every unit started from zero to `starts` and true ends, parents first. One thread a (state, channel).
extern "C" __global__ void join_forward(const Params p) {
  const i64 Dp = p.padded_channels, element = blockIdx.x * (i64)blockDim.x + threadIdx.x, row = N * Dp;
  if (element >= row) return;
  const float A = p.A[element];
  Join next = p.joined[0];
  for (int k = 0; k < p.num_joined && next.slot >= 0; ++k) {
    const Join unit = next;
    next = p.joined[min(k + 1, (int)p.num_joined - 1)];
    float start = p.initial ? p.initial[unit.segment * row + element] : 0.f;
    if (unit.parent >= 0) start = p.ends[unit.parent * row + element];
    p.starts[unit.slot * row + element] = start;
    if (unit.flags & HAS_CHILD)
      p.ends[unit.slot * row + element] += exp2_fast(A * p.sums[unit.slot * Dp + element % Dp]) * start;
  }
}

// The mirror image: `starts` holds what each unit with a parent hands to the state before it if nothing came from
// behind its end; `ends` becomes the gradient of every unit's last state, from the caller and from all its children.
extern "C" __global__ void join_backward(const Params p) {
  const i64 Dp = p.padded_channels, element = blockIdx.x * (i64)blockDim.x + threadIdx.x, row = N * Dp;
  if (element >= row) return;
  const float A = p.A[element];
  int joined = 0;
  for (; joined < p.num_joined && p.joined[joined].slot >= 0; ++joined) {
    const Join unit = p.joined[joined];
    p.ends[unit.slot * row + element] = unit.flags & IS_LAST && p.d_final ? p.d_final[unit.segment * row + element] : 0.f;
  }
  Join next = p.joined[max(joined - 1, 0)];
  for (int k = joined - 1; k >= 0; --k) {
    const Join unit = next;
    next = p.joined[max(k - 1, 0)];
    if (unit.parent < 0) continue;
    const float decay = exp2_fast(A * p.sums[unit.slot * Dp + element % Dp]);
    p.ends[unit.parent * row + element] += p.starts[unit.slot * row + element] + decay * p.ends[unit.slot * row + element];
  }
}

// Walk units that have a parent backwards from a zero gradient: what reaches the state before their first token.
__device__ __forceinline__ void walk_tails(const Params& p, int index) {
  __shared__ __align__(16) float rows_C[TILE][N];
  __shared__ __align__(16) struct { Numbers dt, dy; } tiles[WARPS][TILE / SUB];
  const Place lane = place(p, index);
  auto& groups = tiles[lane.warp];
  const i64 Dp = PADDED(p);
  const int exist = existing(p, lane);
  float A[HALF];
  load_states(A, p.A, lane, Dp);
  for (int item = p.item_starts[lane.item]; item < p.item_starts[lane.item + 1]; ++item) {
    const Unit unit = p.units[p.item_units[item]];
    float g[HALF], sum = 0.f;
    load_states(g, 0, lane, Dp);
    const io *from_delta = FROM(delta), *from_z = GATED ? FROM(z) : 0, *from_d_out = FROM(d_out);
    for (int tile = unit.length ? (unit.length - 1) / TILE * TILE : -1; tile >= 0; tile -= TILE) {
      const int count = min(TILE, unit.length - tile);
      const Prepared delta = prepare<true>(from_delta + tile * STRIDE(p, delta), STRIDE(p, delta), lane, count, exist);
      const Prepared z = prepare<GATED>(from_z + tile * STRIDE(p, z), STRIDE(p, z), lane, count, exist);
      const Prepared d_out = prepare<true>(from_d_out + tile * STRIDE(p, d_out), STRIDE(p, d_out), lane, count, exist);
      const Quad bias = vector(p.bias, lane);
      stage(rows_C, fetch_rows(p.C + (i64)(unit.begin + tile) * STRIDE(p, C), STRIDE(p, C), count, STATES(p)));
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const Quad before_bias = widen(delta.row[i]), gates = widen(z.row[i]), d_outs = widen(d_out.row[i]);
        const float present = here(i, count, lane);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          prepared(groups[group(i, lane)].dt, c, lane) = present * step_size(before_bias.v[c] + bias.v[c]);
          prepared(groups[group(i, lane)].dy, c, lane) = d_outs.v[c] * gate(gates.v[c]);
        }
      }
      __syncthreads();
      const int next = tile - TILE, left = tile;
      prefetch_tile(from_delta + next * STRIDE(p, delta), STRIDE(p, delta), lane, left, exist);
      prefetch_tile(from_d_out + next * STRIDE(p, d_out), STRIDE(p, d_out), lane, left, exist);
      if (GATED) prefetch_tile(from_z + next * STRIDE(p, z), STRIDE(p, z), lane, left, exist);
      for (int first = (count - 1) / SUB * SUB; first >= 0; first -= SUB) {
        auto& tokens = groups[first / SUB];
        const Quad dt = quad(own(tokens.dt, lane)), d_y = quad(own(tokens.dy, lane));
        sum += (dt.v[0] + dt.v[1]) + (dt.v[2] + dt.v[3]);
        float decay[SUB][HALF];
        decays(decay, dt, A);
#pragma unroll
        for (int j = SUB - 1; j >= 0; --j)
#pragma unroll
          for (int n = 0; n < HALF; n += 4) {
            const Quad C = quad(&rows_C[first + j][lane.half * HALF + n]);
#pragma unroll
            for (int i = 0; i < 4; ++i) g[n + i] = decay[j][n + i] * (g[n + i] + C.v[i] * d_y.v[j]);
          }
      }
      __syncthreads();
    }
    store_states(p.starts + unit.slot * N * Dp, g, lane, Dp);
    if (lane.half == 0) p.sums[unit.slot * Dp + lane.channel] = sum;
  }
}

// Sums of eight dB and eight dC over channels. Lanes 4r to 4r + 3 hold four channels with the same states (half r % 2);
// a product of [16, 8] values with [8, 8] zeros and ones adds each of them over those four lanes, and puts it in a column
// of its own. Left with a lane: states 2 (lane % 4) and the next of dB, then of dC.
//
// Adds four values a lane, of states n and n + 1: `one` is 1 in the lanes whose row is n, `two` where it is n + 1.
__device__ __forceinline__ float4 add(float4 sums, float d_B, float d_C, float next_d_B, float next_d_C, float one, float two) {
  if (IO == 0)  // the tensor cores see 11 bits of each; the rest of them first
    sums = mma_tf32(d_B - tf32(d_B), d_C - tf32(d_C), next_d_B - tf32(next_d_B), next_d_C - tf32(next_d_C), one, two, sums);
  return mma_tf32(d_B, d_C, next_d_B, next_d_C, one, two, sums);
}

// What a warp has of SUB tokens, prepared and walked forwards. The walk backwards leaves y in the place of dy, the
// gradient of x in that of x; dB and dC, and the exponents' gradients, in the places of the states before these tokens.
struct Group {
  Numbers dt, x, dy;
  float4 kept[64];
};

// What the blocks of the backward pass share: more than a kernel may declare itself.
struct Shared {
  float rows_B[TILE][N], rows_C[TILE][N];
  Group tiles[WARPS][TILE / SUB];
  float4 passed[WARPS][64];
};

__device__ __forceinline__ Numbers& d_exponents_of(Group& tokens) { return *(Numbers*)&tokens.kept[32]; }

// Sums over the two lanes of a channel: one leaves those of the first tokens, the other those of the last.
__device__ __forceinline__ void leave(Numbers& numbers, const float (&shares)[SUB], const Place& lane) {
  float sums[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) sums[j] = over_halves(shares[j], shares[j + 2], lane.half);
  *(float2*)&own(numbers, lane)[2 * lane.half] = make_float2(sums[0], sums[1]);
}

// Gradients of everything. A tile is walked forwards once to have a state every SUB tokens, then those SUB tokens again,
// holding states and decays, then backwards.
__device__ __forceinline__ void walk_backward(const Params& p, int index) {
  DYNAMIC_SHARED(Shared, shared);
  float(&rows_B)[TILE][N] = shared.rows_B, (&rows_C)[TILE][N] = shared.rows_C;
  const Place lane = place(p, index);
  Group(&groups)[TILE / SUB] = shared.tiles[lane.warp];
  const i64 Dp = PADDED(p);
  const int exist = existing(p, lane);
  float A[HALF], d_A[HALF], picks[HALF];
  Quad d_bias = Quad{}, d_D = Quad{};  // of the tokens and channels that the lane prepares
  load_states(A, p.A, lane, Dp);
  // In a relay a row's turns add up in one share of the vectors' gradients, the last turn's, in their order.
  const Unit& first_unit = p.units[p.item_units[p.item_starts[lane.item]]];
  float* share = p.d_vectors + (RELAY ? first_unit.segment : lane.item) * (N + 2) * Dp;
  const bool goes_on = RELAY && first_unit.after >= 0;
  load_states(d_A, goes_on ? share : 0, lane, Dp);
#pragma unroll
  for (int n = 0; n < HALF; ++n) picks[n] = lane.lane / 4 == n ? 1.f : 0.f;
  for (int item = p.item_starts[lane.item]; item < p.item_starts[lane.item + 1]; ++item) {
    const Unit unit = p.units[p.item_units[item]];
    float g[HALF];
    const int from = max(unit.slot, unit.after);
    load_states(g, from >= 0 ? p.ends + from * N * Dp : 0, lane, Dp);
    if (p.d_final && unit.slot < 0 && unit.is_last) add_states(g, p.d_final + unit.segment * N * Dp, lane, Dp);
    struct Inputs {
      Prepared delta, u, d_out, z;
    };
    struct Starts {
      Staged B, C;
      float h[HALF];
    };
    const auto count_of = [&](int tile) { return tile < 0 ? 0 : min(TILE, unit.length - tile); };
    const auto read = [&](int tile) {  // nothing where no tile is
      const int count = count_of(tile);
      Inputs got;
      got.delta = prepare<true>(FROM(delta) + tile * STRIDE(p, delta), STRIDE(p, delta), lane, count, exist);
      got.u = prepare<true>(FROM(u) + tile * STRIDE(p, u), STRIDE(p, u), lane, count, exist);
      got.d_out = prepare<true>(FROM(d_out) + tile * STRIDE(p, d_out), STRIDE(p, d_out), lane, count, exist);
      got.z = prepare<GATED>(GATED ? FROM(z) + tile * STRIDE(p, z) : 0, STRIDE(p, z), lane, count, exist);
      return got;
    };
    const auto read_starts = [&](int tile) {
      const int count = count_of(tile);
      Starts got;
      load_states(got.h, count ? p.checkpoints + (i64)(unit.checkpoint + tile / TILE) * N * Dp : 0, lane, Dp);
      got.B = fetch_rows(p.B + (i64)(unit.begin + tile) * STRIDE(p, B), STRIDE(p, B), count, STATES(p));
      got.C = fetch_rows(p.C + (i64)(unit.begin + tile) * STRIDE(p, C), STRIDE(p, C), count, STATES(p));
      return got;
    };
    const int last_tile = unit.length ? (unit.length - 1) / TILE * TILE : -TILE;
    Inputs now;
    Starts starts;
    Quad bias, skip;
    if (RELAY) now = read(last_tile), starts = read_starts(last_tile), bias = vector(p.bias, lane), skip = vector(p.D, lane);
    for (int tile = last_tile; tile >= 0; tile -= TILE) {
      const int count = count_of(tile);
      if (!RELAY) now = read(tile), starts = read_starts(tile), bias = vector(p.bias, lane);
      float h[HALF];
#pragma unroll
      for (int n = 0; n < HALF; ++n) h[n] = starts.h[n];
      stage(rows_B, starts.B), stage(rows_C, starts.C);
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const Quad before_bias = widen(now.delta.row[i]), inputs = widen(now.u.row[i]);
        const Quad gates = widen(now.z.row[i]), d_outs = widen(now.d_out.row[i]);
        const float present = here(i, count, lane);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float dt = present * step_size(before_bias.v[c] + bias.v[c]);
          prepared(groups[group(i, lane)].dt, c, lane) = dt;
          prepared(groups[group(i, lane)].x, c, lane) = dt * inputs.v[c];
          prepared(groups[group(i, lane)].dy, c, lane) = d_outs.v[c] * gate(gates.v[c]);
        }
      }
      __syncthreads();
      const int next = tile - TILE, left = tile;
      prefetch_tile(FROM(delta) + next * STRIDE(p, delta), STRIDE(p, delta), lane, left, exist);
      prefetch_tile(FROM(u) + next * STRIDE(p, u), STRIDE(p, u), lane, left, exist);
      prefetch_tile(FROM(d_out) + next * STRIDE(p, d_out), STRIDE(p, d_out), lane, left, exist);
      if (GATED) prefetch_tile(FROM(z) + next * STRIDE(p, z), STRIDE(p, z), lane, left, exist);
      if (tile) prefetch(p.checkpoints + ((i64)(unit.checkpoint + tile / TILE - 1) * N + lane.lane / 2) * Dp + lane.channel - lane.own);
      const int subs = (count + SUB - 1) / SUB;
      for (int sub = 0;; ++sub) {
        auto& tokens = groups[sub];
        tokens.kept[lane.lane] = as_float4(h), tokens.kept[32 + lane.lane] = as_float4(h + 4);
        if (sub + 1 == subs) break;
        const Quad dt = quad(own(tokens.dt, lane)), x = quad(own(tokens.x, lane));
        float decay[SUB][HALF];
        decays(decay, dt, A);
#pragma unroll
        for (int j = 0; j < SUB; ++j)
#pragma unroll
          for (int n = 0; n < HALF; n += 4) {
            const Quad B = quad(&rows_B[sub * SUB + j][lane.half * HALF + n]);
#pragma unroll
            for (int i = 0; i < 4; ++i) h[n + i] = decay[j][n + i] * h[n + i] + x.v[j] * B.v[i];
          }
      }
      for (int sub = subs - 1; sub >= 0; --sub) {
        const int first = sub * SUB;
        auto& tokens = groups[sub];
        *(float4*)h = tokens.kept[lane.lane], *(float4*)(h + 4) = tokens.kept[32 + lane.lane];
        const Quad dt = quad(own(tokens.dt, lane)), x = quad(own(tokens.x, lane)), d_y = quad(own(tokens.dy, lane));
        float before[SUB][HALF], decay[SUB][HALF], y[SUB], d_x[SUB], d_exponents[SUB];
#pragma unroll
        for (int j = 0; j < SUB; ++j) {
          y[j] = 0.f;
#pragma unroll
          for (int n = 0; n < HALF; n += 4) {
            const Quad B = quad(&rows_B[first + j][lane.half * HALF + n]);
            const Quad C = GATED ? quad(&rows_C[first + j][lane.half * HALF + n]) : B;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              before[j][n + i] = h[n + i];
              decay[j][n + i] = exp2_fast(dt.v[j] * A[n + i]);
              h[n + i] = decay[j][n + i] * h[n + i] + x.v[j] * B.v[i];
              if (GATED) y[j] += C.v[i] * h[n + i];
            }
          }
        }
        float4 sums[SUB];
#pragma unroll
        for (int j = SUB - 1; j >= 0; --j) {
          d_x[j] = d_exponents[j] = 0.f;
          sums[j] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
          for (int n = 0; n < HALF; n += 2) {
            const float* B = &rows_B[first + j][lane.half * HALF];
            const float* C = &rows_C[first + j][lane.half * HALF];
            float d_B[2], d_C[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float d_h = g[n + i] + C[n + i] * d_y.v[j];
              d_x[j] += d_h * B[n + i];
              d_B[i] = d_h * x.v[j];
              d_C[i] = d_y.v[j] * (j + 1 < SUB ? before[j + 1][n + i] : h[n + i]);
              g[n + i] = decay[j][n + i] * d_h;
              // d/d(dt A) of exp(dt A) h_before is decay * h_before, times d_h.
              const float d_exponent = g[n + i] * before[j][n + i];
              d_exponents[j] += d_exponent * A[n + i];
              d_A[n + i] += d_exponent * dt.v[j];
            }
            sums[j] = add(sums[j], d_B[0], d_C[0], d_B[1], d_C[1], picks[n], picks[n + 1]);
          }
        }
        __syncwarp();
#pragma unroll
        for (int j = 0; j < SUB; ++j)  // [SUB][4 groups of channels][8], in two places of 64
          (j < 2 ? tokens.kept : shared.passed[lane.warp])[j % 2 * 32 + lane.lane] = sums[j];
        __syncwarp();
        const float4* parts = lane.lane < 16 ? tokens.kept : shared.passed[lane.warp];
        parts += lane.lane / 8 % 2 * 32 + lane.lane % 8;
        const float4 total = (parts[0] + parts[8]) + (parts[16] + parts[24]);
        __syncwarp();
        tokens.kept[lane.lane] = total;
        // In the places of what both lanes of a channel have read.
        if (GATED) leave(tokens.dy, y, lane);
        leave(tokens.x, d_x, lane), leave(d_exponents_of(tokens), d_exponents, lane);
      }
      __syncwarp();
      Inputs coming;
      if (RELAY)
        coming = read(next), starts = read_starts(next);
      else  // again, since there were no registers to keep it in
        now = read(tile), bias = vector(p.bias, lane), skip = vector(p.D, lane);
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const int t = lane.row + 8 * i;
        if (t >= count) break;
        auto& tokens = groups[group(i, lane)];
        const Quad before_bias = widen(now.delta.row[i]), inputs = widen(now.u.row[i]);
        const Quad gates = widen(now.z.row[i]), d_outs = widen(now.d_out.row[i]);
        Quad d_u, d_delta, d_z;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float dt = prepared(tokens.dt, c, lane), d_x = prepared(tokens.x, c, lane);
          const float d_exponent = prepared(d_exponents_of(tokens), c, lane);
          float d_y = d_outs.v[c];
          if (GATED) {
            const float s = sigmoid(gates.v[c]), d_gated = d_outs.v[c] * s, y = prepared(tokens.dy, c, lane);
            d_y = d_gated * gates.v[c];
            d_z.v[c] = (d_gated + d_y * (1.f - s)) * (y + skip.v[c] * inputs.v[c]);
          }
          d_u.v[c] = d_x * dt + skip.v[c] * d_y;
          // A is in units of log2(e) here, and x = dt u.
          d_delta.v[c] = (LN_2 * d_exponent + d_x * inputs.v[c]) * step_size_slope(before_bias.v[c] + bias.v[c]);
          d_bias.v[c] += d_delta.v[c];
          d_D.v[c] += d_y * inputs.v[c];
        }
        const i64 to = (i64)(unit.begin + tile + t) * ROW_LENGTH(p) + lane.first_channel;
        store<ALIGNED_TOKENS>(p.d_u + to, d_u, exist);
        store<ALIGNED_TOKENS>(p.d_delta + to, d_delta, exist);
        if (GATED) store<ALIGNED_TOKENS>(p.d_z + (i64)(unit.begin + tile + t) * STRIDE(p, d_z) + lane.first_channel, d_z, exist);
      }
      __syncthreads();
      float4* to_BC = p.d_BC + (lane.block * p.num_tokens + unit.begin + tile) * 8 + lane.lane;
#pragma unroll 2
      for (int sub = lane.warp; sub < subs; sub += WARPS) {
        float4 total = shared.tiles[0][sub].kept[lane.lane];
#pragma unroll
        for (int warp = 1; warp < WARPS; ++warp) total = total + shared.tiles[warp][sub].kept[lane.lane];
        if (sub * SUB + lane.lane / 8 < count) to_BC[sub * SUB * 8] = total;
      }
      if (RELAY) now = coming;
    }
    if (unit.adds) add_states(g, p.ends + unit.before * N * Dp, lane, Dp);
    if (unit.before >= 0) store_states(p.ends + unit.before * N * Dp, g, lane, Dp);
    if (p.d_initial && unit.parent < 0) store_states(p.d_initial + unit.segment * N * Dp, g, lane, Dp);
  }
  store_states(share, d_A, lane, Dp);
#pragma unroll
  for (int c = 0; c < 4; ++c) {  // over the lanes that prepare these channels
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
      d_D.v[c] += from_lane_xor(d_D.v[c], mask);
      d_bias.v[c] += from_lane_xor(d_bias.v[c], mask);
    }
    if (lane.row < 2) {
      float& sum = share[(N + lane.row) * Dp + lane.first_channel + c];
      sum = (goes_on ? sum : 0.f) + (lane.row ? d_bias.v[c] : d_D.v[c]);
    }
  }
}

// dB and dC from those of every block of channels. A column is a float4 of a token.
extern "C" __global__ void __launch_bounds__(32 * SUMMERS) sum_BC(const Params p) {
  const i64 i = blockIdx.x * 32ll + threadIdx.x % 32, all = p.num_tokens * 8;
  const float4 total = sum_rows(p.d_BC + i, p.num_blocks, all, i < all);
  if (threadIdx.x >= 32 || i >= all) return;
  const i64 to = i / 8 * N + i % 8 * 2;  // of half i / 4 % 2, states 2 (i % 4) and the next
  p.d_B[to] = narrow(total.x), p.d_B[to + 1] = narrow(total.y);
  p.d_C[to] = narrow(total.z), p.d_C[to + 1] = narrow(total.w);
}

// A pair of an item and a block of channels for each block; in a relay whatever turns it gets.
#define WALK(walk)                                                                          \
  if (!RELAY) return walk(p, blockIdx.x);                                                   \
  for (int turn = next_turn(p); turn < p.num_turns; turn = next_turn(p)) walk(p, turn), end_turn(p, turn)

extern "C" __global__ void __launch_bounds__(THREADS, 20 / WARPS) scan_heads(const Params p) { walk_forward<false>(p, blockIdx.x); }
extern "C" __global__ void __launch_bounds__(THREADS, HELD_FORWARD / WARPS) scan_forward(const Params p) { WALK(walk_forward<true>); }
extern "C" __global__ void __launch_bounds__(THREADS, 20 / WARPS) scan_tails(const Params p) { walk_tails(p, blockIdx.x); }
extern "C" __global__ void __launch_bounds__(THREADS, HELD / WARPS) scan_backward(const Params p) { WALK(walk_backward); }
