// One token of many sequences on a CPU, for Mamba-1 and Falcon-Mamba: see ops/cpu_decode.py.
//
// Threads go through the whole step together and meet five times a layer. A thread owns channels, or rows of a weight:
// so every number is computed by one thread in one order, whatever the number of threads and of sequences beside it.
//
// Weights are read where the model keeps them, `[outputs, inputs]`, in fp32 or bf16 (BF16); all else is fp32. Rows of
// channels are padded with zeros to whole blocks (their length is `wide`), so only products know of a remainder. What
// has a row of channels for each state lies block by block, so that all states of a block are read in one go.

#include <cstdint>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

typedef int64_t i64;

#if defined(__AVX512F__)
constexpr int L = 16;  // lanes of a vector
#elif defined(__AVX__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif
constexpr i64 BLOCK = 16;
// Sums of a tile live in registers: TALL rows of x times 4 of the weight, where there are 32 registers, else half.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TALL = 4;
#else
constexpr int TALL = 2;
#endif

typedef float Vec __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

#ifdef BF16
typedef uint16_t weight;
#else
typedef float weight;
#endif

struct Product {
  const weight* w;    // [outputs, inputs]
  const float* bias;  // or null
};

struct Layer {
  const float* norm;                // [wide H]
  Product in_proj, x_proj, out_proj;
  const float *dt_weight, *dt_bias;  // [blocks, R, BLOCK], [wide D]
  const float *taps, *conv_bias;     // [W, wide D], [wide D]
  const float *A, *D;                // [blocks, N, BLOCK], -exp(A_log) times log2(e); [wide D]
  float *window, *state;             // [rows, W - 1, wide D], oldest first; [rows, blocks, N, BLOCK]
};

struct Model {
  const Layer* layers;
  const float* norm;  // [wide H]
  const weight* embedding;  // [V, H]
  Product head;
  float *hidden, *normed;     // [rows, wide H]
  float *u, *z, *y;           // [rows, wide D]
  float *low, *logits;        // [rows, R + 2 N]; [rows, V]
  i64 num_layers, hidden_size, wide_hidden, channels, wide, states, taps, rank, vocabulary, threads;
  double eps, low_eps;  // low_eps < 0: no norm there
};

// ------------------------------------------------------------------------------------------------------- arithmetic

static inline Vec all(float x) { return x - Vec{}; }
static inline Vec load(const float* p) { return *(const Vec*)p; }
static inline void store(float* p, Vec x) { *(Vec*)p = x; }
// Loaded once: left to themselves, compilers may read memory again for every use within an expression.
static inline Vec held(Vec x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}
static inline float widen(float x) { return x; }
static inline float widen(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
static inline Vec load(const uint16_t* p) {
  typedef uint16_t Halves __attribute__((vector_size(2 * L), aligned(2), may_alias));
  typedef uint32_t Words __attribute__((vector_size(4 * L)));
  return (Vec)(__builtin_convertvector(*(const Halves*)p, Words) << 16);
}

// 2^x within 2e-7 of itself, for x in [-126, 127], and at these bounds beyond; a NaN stays one. The nearest integer goes
// into the exponent, a polynomial takes the rest in [-1/2, 1/2] (fitted to the smallest largest relative error, 2e-9).
static inline Vec exp2(Vec x) {
  const Vec magic = all(12582912.f);  // 1.5 * 2^23: sums with it have no fraction
  Vec in = x < -126.f ? all(-126.f) : x > 127.f ? all(127.f) : x;
  Vec shifted = in + magic, f = in - (shifted - magic);
  Vec p = all(1.5345810794513656e-4f);
  p = p * f + 1.3399931210165883e-3f;
  p = p * f + 9.618488961624169e-3f;
  p = p * f + 5.550328776993715e-2f;
  p = p * f + 2.4022646890592247e-1f;
  p = p * f + 6.931472057372505e-1f;
  p = p * f + 1.f;
  Vec y = (Vec)((Ints)p + (((Ints)shifted - (Ints)magic) << 23));
  return x == x ? y : x;
}

constexpr float LOG2_E = 1.4426950408889634f;

static inline Vec sigmoid(Vec x) { return 1.f / (1.f + exp2(x * -LOG2_E)); }

// log(1 + e^x) = max(x, 0) + log1p(t) with t = e^-|x|, and log1p(t) = 2 atanh(s) at s = t / (2 + t) <= 1/3.
static inline Vec softplus(Vec x) {
  Vec size = (Vec)((Ints)x & 0x7fffffff), t = exp2(size * -LOG2_E), s = t / (2.f + t), q = s * s;
  Vec series = all(1.f / 15);
  series = series * q + 1.f / 13;
  series = series * q + 1.f / 11;
  series = series * q + 1.f / 9;
  series = series * q + 1.f / 7;
  series = series * q + 1.f / 5;
  series = series * q + 1.f / 3;
  series = series * q + 1.f;
  return 0.5f * (x + size) + 2.f * s * series;
}

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif
// Half of two vectors that lie in groups of G numbers each: of every group its first half plus its second.
#define HALVES(G, FIRST, SECOND) \
  static inline Vec halved##G(Vec a, Vec b) { return PICK(a, b, FIRST) + PICK(a, b, SECOND); }
#define LIST(...) __VA_ARGS__
#if defined(__AVX512F__)
HALVES(16, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23), LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
HALVES(8, LIST(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27), LIST(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
HALVES(4, LIST(0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29), LIST(2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31))
HALVES(2, LIST(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), LIST(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31))
#elif defined(__AVX__)
HALVES(8, LIST(0, 1, 2, 3, 8, 9, 10, 11), LIST(4, 5, 6, 7, 12, 13, 14, 15))
HALVES(4, LIST(0, 1, 4, 5, 8, 9, 12, 13), LIST(2, 3, 6, 7, 10, 11, 14, 15))
HALVES(2, LIST(0, 2, 4, 6, 8, 10, 12, 14), LIST(1, 3, 5, 7, 9, 11, 13, 15))
#else
HALVES(4, LIST(0, 1, 4, 5), LIST(2, 3, 6, 7))
HALVES(2, LIST(0, 2, 4, 6), LIST(1, 3, 5, 7))
#endif

// Lane i is the sum of vector i of L. Every sum is added up in the same order, whatever is beside it.
static inline Vec sums(const Vec* v) {
  Vec half[L];
  for (int i = 0; i < L; ++i) half[i] = v[i];
#if defined(__AVX512F__)
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) half[i] = halved16(half[2 * i], half[2 * i + 1]);
#endif
#if defined(__AVX__)
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) half[i] = halved8(half[2 * i], half[2 * i + 1]);
#endif
  return halved2(halved4(half[0], half[1]), halved4(half[2], half[3]));
}

static inline float sum_of(Vec x) {
  Vec alone[L] = {x};
  return sums(alone)[0];
}

// --------------------------------------------------------------------------------------------------------- products

// x . w from where whole vectors end: one function, so that every sum has its rest in the same bits.
static __attribute__((noinline)) float rest(const float* x, const weight* w, i64 from, i64 to) {
  float sum = 0.f;
  for (i64 i = from; i < to; ++i) sum += x[i] * widen(w[i]);
  return sum;
}

// out[r, o] (+)= x[r] . w[o] + bias[o] for R rows and 4 K outputs. The order within a sum is that of every other tile.
template <int R, int K>
static inline void tile(const float* x, i64 x_stride, const weight* w, i64 inputs, const float* bias, bool add, float* out, i64 out_stride) {
  Vec sum[R][4 * K] = {};
  const i64 whole = inputs / L * L;
  for (i64 i = 0; i < whole; i += L) {
    Vec of_x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) of_x[r] = held(load(x + r * x_stride + i));
#pragma GCC unroll 8
    for (int o = 0; o < 4 * K; ++o) {
      const Vec of_w = held(load(w + o * inputs + i));
      __builtin_prefetch(w + (o + 4 * K) * inputs + i);  // for the next tile
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][o] += of_x[r] * of_w;
    }
  }
  // As many sums at a time as a vector has lanes; they lie by row, four outputs each.
  constexpr int COUNT = 4 * K * R;
#pragma GCC unroll 16
  for (int at = 0; at < COUNT; at += L) {
    Vec of[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) of[i] = at + i < COUNT ? sum[(at + i) / (4 * K) % R][(at + i) % (4 * K)] : Vec{};
    Vec total = sums(of);
    if (whole < inputs)
      for (int i = 0; i < L && at + i < COUNT; ++i)
        total[i] += rest(x + (at + i) / (4 * K) * x_stride, w + (at + i) % (4 * K) * inputs, whole, inputs);
#pragma GCC unroll 4
    for (int i = 0; i < L; i += 4) {
      if (at + i >= COUNT) break;
      const int r = (at + i) / (4 * K), o = (at + i) % (4 * K);
      Four y;
      memcpy(&y, (const float*)&total + i, sizeof y);
      Four* to = (Four*)(out + r * out_stride + o);
      if (bias) y += *(const Four*)(bias + o);
      *to = add ? *to + y : y;
    }
  }
}

// The same for one output: what is left over of a weight whose outputs are no multiple of 4.
static void single(const float* x, i64 x_stride, i64 rows, const weight* w, i64 inputs, const float* bias, bool add, float* out, i64 out_stride) {
  for (i64 r = 0; r < rows; ++r) {
    const float* row = x + r * x_stride;
    Vec sum = {};
    const i64 whole = inputs / L * L;
    for (i64 i = 0; i < whole; i += L) sum += load(row + i) * load(w + i);
    float y = sum_of(sum);
    if (whole < inputs) y += rest(row, w, whole, inputs);
    if (bias) y += *bias;
    out[r * out_stride] = add ? out[r * out_stride] + y : y;
  }
}

// Outputs `from ... to` for all rows of x.
static void multiply(const Product& by, i64 inputs, const float* x, i64 x_stride, i64 rows, i64 from, i64 to, float* out, i64 out_stride, bool add = false) {
  i64 o = from;
#define TILE(R, K) tile<R, K>(x + r * x_stride, x_stride, by.w + o * inputs, inputs, by.bias ? by.bias + o : nullptr, add, out + r * out_stride + o, out_stride)
  if (rows == 1)
    for (const i64 r = 0; o + 8 <= to; o += 8) TILE(1, 2);
  for (; o + 4 <= to; o += 4) {
    i64 r = 0;
    for (; r + TALL <= rows; r += TALL) TILE(TALL, 1);
    for (; r < rows; ++r) TILE(1, 1);
  }
#undef TILE
  for (; o < to; ++o)
    single(x, x_stride, rows, by.w + o * inputs, inputs, by.bias ? by.bias + o : nullptr, add, out + o, out_stride);
}

// ------------------------------------------------------------------------------------------------- the parts of a step

// The part of `size` things, in whole `unit`s, that is this thread's.
struct Share {
  i64 from, to;
  Share(i64 size, i64 unit, int thread, int threads) {
    const i64 units = (size + unit - 1) / unit, end = units * (thread + 1) / threads * unit;
    from = units * thread / threads * unit, to = end < size ? end : size;
  }
};

static void rms_norm(const float* x, const float* norm, i64 size, i64 wide, double eps, float* out) {
  Vec squares = {};
  for (i64 i = 0; i < wide; i += L) squares += load(x + i) * load(x + i);
  const float scale = 1.f / __builtin_sqrtf(sum_of(squares) / size + (float)eps);
  for (i64 i = 0; i < wide; i += L) store(out + i, load(x + i) * scale * load(norm + i));
}

// Falcon-Mamba's norm without a weight (arXiv 2410.05355, section 3.1).
static void low_norm(float* x, i64 size, double eps) {
  float squares = 0.f;
  for (i64 i = 0; i < size; ++i) squares += x[i] * x[i];
  const float scale = 1.f / __builtin_sqrtf(squares / size + (float)eps);
  for (i64 i = 0; i < size; ++i) x[i] *= scale;
}

// u = silu(bias + taps . (window, u)), which moves into the window; z = silu(z). Channels `from ... to`.
static void convolve(const Model& m, const Layer& layer, i64 row, i64 from, i64 to) {
  float *window = layer.window + row * (m.taps - 1) * m.wide, *u = m.u + row * m.wide, *z = m.z + row * m.wide;
  for (i64 c = from; c < to; c += L) {
    Vec sum = load(layer.conv_bias + c), next = load(u + c);
    for (i64 k = m.taps - 1; k >= 0; --k) {
      sum += load(layer.taps + k * m.wide + c) * next;
      if (k == 0) break;
      float* place = window + (k - 1) * m.wide + c;
      const Vec older = load(place);
      store(place, next);
      next = older;
    }
    store(u + c, sum * sigmoid(sum));
    const Vec gate = load(z + c);
    store(z + c, gate * sigmoid(gate));
  }
}

// dt = softplus(low W^T + bias); h = exp(dt A) h + dt u B; y = (C . h + D u) z. Channels `from ... to`.
static void advance(const Model& m, const Layer& layer, i64 row, i64 from, i64 to) {
  const float *low = m.low + row * (m.rank + 2 * m.states), *B = low + m.rank, *C = B + m.states;
  for (i64 c = from; c < to; c += L) {
    const i64 block = c / BLOCK, at = c % BLOCK;
    const float *dt_weight = layer.dt_weight + block * m.rank * BLOCK + at, *A = layer.A + block * m.states * BLOCK + at;
    float* state = layer.state + (row * m.wide / BLOCK + block) * m.states * BLOCK + at;
    Vec delta = load(layer.dt_bias + c);
    for (i64 r = 0; r < m.rank; ++r) delta += low[r] * load(dt_weight + r * BLOCK);
    const Vec dt = softplus(delta), u = load(m.u + row * m.wide + c), x = dt * u;
    Vec y = load(layer.D + c) * u;
    for (i64 n = 0; n < m.states; ++n) {
      float* place = state + n * BLOCK;
      const Vec h = exp2(dt * load(A + n * BLOCK)) * load(place) + x * B[n];
      store(place, h);
      y += h * C[n];
    }
    store(m.y + row * m.wide + c, y * load(m.z + row * m.wide + c));
  }
}

static inline void meet() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

static void normalise(const Model& m, const float* norm, Share rows) {
  for (i64 r = rows.from; r < rows.to; ++r)
    rms_norm(m.hidden + r * m.wide_hidden, norm, m.hidden_size, m.wide_hidden, m.eps, m.normed + r * m.wide_hidden);
  meet();
}

static void run(const Model& m, const i64* tokens, i64 count, int thread, int threads) {
  const Share rows(count, 1, thread, threads), mine(m.channels, BLOCK, thread, threads), outputs(m.hidden_size, 4, thread, threads);
  const i64 D = m.channels, low = m.rank + 2 * m.states, wide_to = (mine.to + BLOCK - 1) / BLOCK * BLOCK;
  const Share low_outputs(low, 4, thread, threads), words(m.vocabulary, 4, thread, threads);
  for (i64 r = rows.from; r < rows.to; ++r)
    for (i64 i = 0; i < m.hidden_size; ++i) m.hidden[r * m.wide_hidden + i] = widen(m.embedding[tokens[r] * m.hidden_size + i]);
  for (i64 number = 0; number < m.num_layers; ++number) {
    const Layer& layer = m.layers[number];
    const Product of_z = {layer.in_proj.w + D * m.hidden_size, layer.in_proj.bias ? layer.in_proj.bias + D : nullptr};
    normalise(m, layer.norm, rows);
    multiply(layer.in_proj, m.hidden_size, m.normed, m.wide_hidden, count, mine.from, mine.to, m.u, m.wide);
    multiply(of_z, m.hidden_size, m.normed, m.wide_hidden, count, mine.from, mine.to, m.z, m.wide);
    for (i64 r = 0; r < count; ++r) convolve(m, layer, r, mine.from, wide_to);
    meet();
    multiply(layer.x_proj, D, m.u, m.wide, count, low_outputs.from, low_outputs.to, m.low, low);
    meet();
    if (m.low_eps >= 0) {
      for (i64 r = rows.from; r < rows.to; ++r) {
        float* parts = m.low + r * low;
        low_norm(parts, m.rank, m.low_eps);
        low_norm(parts + m.rank, m.states, m.low_eps);
        low_norm(parts + m.rank + m.states, m.states, m.low_eps);
      }
      meet();
    }
    for (i64 r = 0; r < count; ++r) advance(m, layer, r, mine.from, wide_to);
    meet();
    multiply(layer.out_proj, D, m.y, m.wide, count, outputs.from, outputs.to, m.hidden, m.wide_hidden, true);
    meet();
  }
  normalise(m, m.norm, rows);
  multiply(m.head, m.hidden_size, m.normed, m.wide_hidden, count, words.from, words.to, m.logits, m.vocabulary);
}

// Takes rows `0 ... count - 1` one token further: their logits, windows and states.
extern "C" void step(const Model* model, const i64* tokens, i64 count) {
#ifdef _OPENMP
  if (model->threads > 1) {
#pragma omp parallel num_threads(model->threads)
    run(*model, tokens, count, omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  run(*model, tokens, count, 0, 1);
}
