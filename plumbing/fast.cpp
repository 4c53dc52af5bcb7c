// Fast inference on the CPU: what fast.py compiles, and calls to read tokens and to make logits.
//
// To read a token, every weight is used once, so that the memory's bandwidth is the limit. PyTorch's
// operations reach a third of it: each starts and ends all threads, and for few rows F.linear reads at half
// of that speed. So read_token takes a token of each row through all layers in one call, summing in float32.
// Prompts are matrix products, which PyTorch does well; what lies between those is here, too.
//
// fast.py calls the five functions that are extern "C", and defines these constants:
//
//     DIM HIDDEN VOCAB LAYERS EPS   the model's
//     H K D                         query heads, key/value heads, and their dimension
//     VALUE                         the type of norms and caches
//     WEIGHT                        the type of matrices
//     TILE                          rows of x that are multiplied at once, at most 8
//     GROUP                         int8 weights of a row that share a scale
//     CHUNK                         weights that are converted at once; divides GROUP, DIM and HIDDEN
//     LANES                         floats of a vector; divides CHUNK and D
//     PAIRS                         1: bfloat16 is multiplied in pairs where the processor can; needs chunks
//                                   of 32 or 64

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>
#include <omp.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

struct bfloat16 {  // the upper half of a float
    uint16_t bits;
    bfloat16() = default;
    bfloat16(float x) {
        uint32_t u;
        memcpy(&u, &x, 4);
        bits = x != x ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;  // not a number, or the nearest
    }
    operator float() const { uint32_t u = uint32_t(bits) << 16; float x; memcpy(&x, &u, 4); return x; }
};
using Value = VALUE;
using Weight = WEIGHT;  // int8_t: times a scale for every GROUP in a row, or as many as divide its length
using Floats = float __attribute__((vector_size(4 * LANES)));
struct Matrix { const Weight* values; const float* scales; };
struct Layer {
    const Value* attention_norm; Matrix wq, wk, wv, wo;
    const Value* ffn_norm; Matrix w1, w3, w2;
};
struct Cache { Value *k, *v; };  // (B, room, K, D) each
constexpr bool INT8 = std::is_same_v<Weight, int8_t>;
static_assert(H * D == DIM && DIM % CHUNK == 0 && HIDDEN % CHUNK == 0);
static_assert(sizeof(Layer) == 16 * sizeof(void*));  // CompiledReader writes 16 addresses a layer.
static_assert(GROUP % CHUNK == 0 && CHUNK % LANES == 0 && D % LANES == 0 && TILE <= 8);

static Floats load(const float* x) { Floats v; memcpy(&v, x, sizeof v); return v; }
static float sum(Floats v) { float s = 0; for (int i = 0; i < LANES; i++) s += v[i]; return s; }

static inline Floats add_neighbours(Floats a, Floats b) {  // of a, and after them of b
    int32_t __attribute__((vector_size(4 * LANES))) even, odd;
    for (int i = 0; i < LANES; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// sums[i] = sum(v[i]) for N of at most 8, which together take a third of the steps.
template <int N>
static inline void add_up(const Floats* v, float* sums) {
    if (N < 3 || LANES < 16) {
        for (int i = 0; i < N; i++) sums[i] = sum(v[i]);
        return;
    }
    Floats partial[8];
    for (int i = 0; i < 8; i++) partial[i] = v[std::min(i, N - 1)];
    for (int n = 4; n > 0; n /= 2)
        for (int i = 0; i < n; i++) partial[i] = add_neighbours(partial[2 * i], partial[2 * i + 1]);
    partial[0] = add_neighbours(partial[0], partial[0]);
    memcpy(sums, partial, N * sizeof *sums);
}

static float exponential(float x) {  // to 4e-6, in a form that compilers vectorize
    x = std::min(std::max(x * 1.44269504f, -126.0f), 127.0f);
    float n = std::floor(x), f = x - n, power;
    uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
    memcpy(&power, &bits, 4);  // 2 to the n; times 2 to the f:
    return power * (1 + f * (0.693151312f + f * (0.24016445f + f * (0.055799913f
                       + f * (0.00901703029f + f * 0.00186713011f)))));
}

static float silu(float x) { return x / (1 + exponential(-x)); }

template <typename To>
static void norm(const float* x, const Value* weight, To* y) {
    float squares = 0;
    for (int i = 0; i < DIM; i++) squares += x[i] * x[i];
    float scale = 1 / std::sqrt(squares / DIM + EPS);
    for (int i = 0; i < DIM; i++) y[i] = x[i] * scale * weight[i];
}

template <typename From, typename To>
static void rotate(const From* x, const float* cos, const float* sin, To* y) {
    for (int i = 0; i < D / 2; i++) {
        float a = x[2 * i], b = x[2 * i + 1];
        y[2 * i] = a * cos[i] - b * sin[i];
        y[2 * i + 1] = a * sin[i] + b * cos[i];
    }
}

// -----------------------------------------------------------------------------
// Attention

// Of T tokens, at most QUERIES, and the G query heads that share keys and values. Softmax is that of the
// positions seen so far, rescaled with every further block of them (Milakov and Gimelshein, 2018).
constexpr int G = H / K, QUERIES = 8, BLOCK = 32;
template <typename From, typename To>
static void attend(int T, const From* q, const float* cos, const float* sin, const int64_t* positions,
                   const Value* keys, const Value* values, To* y) {
    float query[QUERIES * G][D], top[QUERIES * G], total[QUERIES * G], key[BLOCK][D], value[BLOCK][D];
    Floats sums[QUERIES * G][D / LANES];
    for (int i = 0; i < T * G; i++) {
        rotate(q + (i / G * H + i % G) * D, cos + i / G * D / 2, sin + i / G * D / 2, query[i]);
        for (int d = 0; d < D; d++) query[i][d] /= std::sqrt(float(D));
        top[i] = -INFINITY, total[i] = 0;
        memset(sums[i], 0, sizeof sums[i]);
    }
    for (int64_t begin = 0; begin <= positions[T - 1]; begin += BLOCK) {
        int size = std::min<int64_t>(BLOCK, positions[T - 1] + 1 - begin);
        for (int s = 0; s < size; s++)
            for (int d = 0; d < D; d++) {
                key[s][d] = keys[(begin + s) * K * D + d];
                value[s][d] = values[(begin + s) * K * D + d];
            }
        for (int i = 0; i < T * G; i++) {
            int seen = std::min<int64_t>(size, positions[i / G] + 1 - begin);
            float probs[BLOCK], before = top[i];
            for (int s = 0; s < seen; s += 8) {
                Floats products[8] = {};
                for (int d = 0; d < D; d += LANES)
                    for (int j = 0; j < 8; j++) products[j] += load(query[i] + d) * load(key[s + j] + d);
                add_up<8>(products, probs + s);
            }
            for (int s = 0; s < seen; s++) top[i] = std::max(top[i], probs[s]);
            Floats partial[D / LANES];  // a query's sums, in registers
            float kept = exponential(before - top[i]);
            for (int d = 0; d < D / LANES; d++) partial[d] = sums[i][d] * kept;
            total[i] *= kept;
            for (int s = 0; s < seen; s++) total[i] += probs[s] = exponential(probs[s] - top[i]);
            for (int s = 0; s < seen; s++)
                for (int d = 0; d < D / LANES; d++) partial[d] += probs[s] * load(value[s] + d * LANES);
            memcpy(sums[i], partial, sizeof partial);
        }
    }
    for (int i = 0; i < T * G; i++)
        for (int d = 0; d < D; d++)
            y[(i / G * H + i % G) * D + d] = sums[i][d / LANES][d % LANES] / total[i];
}

// Writes k and v (B, T, K, D) to the cache; y (B, T, H, D) becomes q's attention to it. All threads call it.
template <typename From, typename To>
static void attention(int64_t B, int64_t T, const From* q, const From* k, const From* v,
                      const float* cos, const float* sin, const int64_t* positions, Cache cache,
                      int64_t room, To* y) {
    #pragma omp for collapse(2)
    for (int64_t t = 0; t < B * T; t++)
        for (int h = 0; h < K; h++) {
            int64_t from = (t * K + h) * D, to = ((t / T * room + positions[t]) * K + h) * D;
            rotate(k + from, cos + t * D / 2, sin + t * D / 2, cache.k + to);
            for (int d = 0; d < D; d++) cache.v[to + d] = v[from + d];
        }
    #pragma omp for collapse(3) schedule(dynamic)
    for (int64_t b = 0; b < B; b++)
        for (int64_t begin = (T - 1) / QUERIES * QUERIES; begin >= 0; begin -= QUERIES)  // the longest first
            for (int h = 0; h < K; h++) {
                int64_t t = b * T + begin, at = (b * room * K + h) * D, head = (t * H + h * G) * D;
                attend(std::min<int>(QUERIES, T - begin), q + head, cos + t * D / 2, sin + t * D / 2,
                       positions + t, cache.k + at, cache.v + at, y + head);
            }
}

// -----------------------------------------------------------------------------
// A token of each row: products of matrices and few rows, and all layers in one call

// sum + x * w for the STEP elements that x and w point to
#if PAIRS && defined(__AVX512BF16__)
using Input = bfloat16;
constexpr int STEP = 32;
static Floats add_product(Floats sum, const Input* x, const Input* w) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(x), (__m512bh)_mm512_loadu_si512(w));
}
#else
using Input = float;
constexpr int STEP = LANES;
static Floats add_product(Floats sum, const Input* x, const Input* w) { return sum + load(x) * load(w); }
#endif
static_assert(CHUNK % STEP == 0);

// CHUNK weights as inputs: where they are, or converted and times their scale
static const Input* as_inputs(const Input* w, float, Input*) { return w; }
template <typename From>
static const Input* as_inputs(const From* w, float scale, Input* converted) {
    for (int i = 0; i < CHUNK; i++) converted[i] = w[i] * scale;
    return converted;
}

// store(b * OUT + i, row i of a matrix (OUT, IN) times row b of x (B, IN)), for this thread's share of the
// matrix. It is read in several places at once, which is faster. x has room for TILE - 1 rows more.
template <int OUT, int IN, typename Store>
static void multiply(int64_t B, const Input* x, Matrix matrix, Store store) {
    constexpr int ROWS = std::max(2, std::min(4, 24 / TILE));  // whose sums fit the registers
    int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    int64_t begin = OUT * thread / threads, end = OUT * (thread + 1) / threads;
    int64_t rows = (end - begin + ROWS - 1) / ROWS;
    for (int64_t i = begin; i < begin + rows; i++)
        for (int64_t tile = 0; tile < B; tile += TILE) {
            Floats sums[ROWS][TILE] = {};
            for (int j = 0; j < IN; j += CHUNK) {
                alignas(64) Input converted[ROWS][CHUNK];
                const Input* w[ROWS];
                for (int r = 0; r < ROWS; r++) {
                    int64_t at = std::min(i + r * rows, end - 1) * IN + j;
                    float scale = INT8 ? matrix.scales[at / std::gcd(GROUP, IN)] : 1;
                    w[r] = as_inputs(matrix.values + at, scale, converted[r]);
                }
                for (int k = 0; k < CHUNK; k += STEP)
                    for (int b = 0; b < TILE; b++)
                        for (int r = 0; r < ROWS; r++)
                            sums[r][b] = add_product(sums[r][b], x + (tile + b) * IN + j + k, w[r] + k);
            }
            for (int r = 0; r < ROWS && i + r * rows < end; r++) {
                float y[TILE];
                add_up<TILE>(sums[r], y);
                for (int b = 0; b < TILE && tile + b < B; b++) store((tile + b) * OUT + i + r * rows, y[b]);
            }
        }
}

// Room for inputs that begins with a line of the processor's cache: loads across two lines take longer.
struct alignas(64) Line { Input inputs[64 / sizeof(Input)]; };
static std::vector<Line> make_lines(int64_t n) { return std::vector<Line>(n * sizeof(Input) / 64 + 1); }

// Takes x (B, DIM), a token of each row, through all layers, in place.
extern "C" void read_token(int64_t B, float* x, const float* cos, const float* sin,
                           const int64_t* positions, const Layer* layers, const Cache* caches,
                           int64_t room) {
    auto lines = make_lines((B + TILE) * (2 * DIM + HIDDEN));
    Input* normed = lines[0].inputs;
    Input* attended = normed + (B + TILE) * DIM;
    Input* gated = attended + (B + TILE) * DIM;
    std::vector<float> q(B * DIM), k(B * K * D), v(B * K * D), gate(B * HIDDEN);
    auto normalize = [&](const Value* weight) {
        #pragma omp for
        for (int64_t b = 0; b < B; b++) norm(x + b * DIM, weight, normed + b * DIM);
    };
    auto add_to_x = [&](int64_t i, float y) { x[i] += y; };
    #pragma omp parallel
    for (int l = 0; l < LAYERS; l++) {
        const Layer& layer = layers[l];
        normalize(layer.attention_norm);
        multiply<DIM, DIM>(B, normed, layer.wq, [&](int64_t i, float y) { q[i] = y; });
        multiply<K * D, DIM>(B, normed, layer.wk, [&](int64_t i, float y) { k[i] = y; });
        multiply<K * D, DIM>(B, normed, layer.wv, [&](int64_t i, float y) { v[i] = y; });
        #pragma omp barrier
        attention(B, 1, q.data(), k.data(), v.data(), cos, sin, positions, caches[l], room, attended);
        multiply<DIM, DIM>(B, attended, layer.wo, add_to_x);
        #pragma omp barrier
        normalize(layer.ffn_norm);
        // Without a barrier between: a thread has the same rows of w1 and w3.
        multiply<HIDDEN, DIM>(B, normed, layer.w1, [&](int64_t i, float y) { gate[i] = silu(y); });
        multiply<HIDDEN, DIM>(B, normed, layer.w3, [&](int64_t i, float y) { gated[i] = gate[i] * y; });
        #pragma omp barrier
        multiply<DIM, HIDDEN>(B, gated, layer.w2, add_to_x);
        #pragma omp barrier
    }
}

// x (B, DIM), normalized -> y (B, VOCAB)
extern "C" void head(int64_t B, const Value* x, const Matrix* output, float* y) {
    auto lines = make_lines((B + TILE) * DIM);
    std::copy(x, x + B * DIM, lines[0].inputs);
    #pragma omp parallel
    multiply<VOCAB, DIM>(B, lines[0].inputs, *output, [&](int64_t i, float logit) { y[i] = logit; });
}

// -----------------------------------------------------------------------------
// What lies between a prompt's matrix products, and the last norm

// Adds to x (N, DIM) what a part of a layer made of it, if any; y (N, DIM) becomes x normalized.
extern "C" void add_and_norm(int64_t N, float* x, const Value* added, const Value* weight, Value* y) {
    #pragma omp parallel for
    for (int64_t t = 0; t < N; t++) {
        for (int i = 0; added && i < DIM; i++) x[t * DIM + i] += added[t * DIM + i];
        norm(x + t * DIM, weight, y + t * DIM);
    }
}

extern "C" void attend_to_prompt(int64_t B, int64_t T, const Value* q, const Value* k, const Value* v,
                                 const float* cos, const float* sin, const int64_t* positions,
                                 const Cache* cache, int64_t room, Value* y) {
    #pragma omp parallel
    attention(B, T, q, k, v, cos, sin, positions, *cache, room, y);
}

// gate = silu(gate) * up
extern "C" void swiglu(int64_t N, Value* gate, const Value* up) {
    #pragma omp parallel for
    for (int64_t i = 0; i < N; i++) gate[i] = silu(gate[i]) * up[i];
}
