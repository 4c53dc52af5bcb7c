// Fast inference on the CPU: fast.py compiles this file and calls it to read tokens and to make logits.
//
// To multiply a matrix by few tokens, each weight is used a few times, and the memory's bandwidth is the
// limit; PyTorch reaches a third of it. To multiply it by many, arithmetic is the limit; PyTorch reaches a
// tenth of it in bfloat16, if the processor has no instructions for that, and less in int8. So there is a
// function for each, multiply_few and multiply_many. One library serves models of all sizes. fast.py defines
// two types:
//
//     VALUE   of caches, and of what lies between PyTorch's products: float, bfloat16 or float16
//     WEIGHT  of matrices: float, bfloat16, float16, or int8_t, of which each CHUNK in a row shares a scale
//
// It calls the functions that are extern "C":
//
//     read_tokens       takes tokens through all layers, and their keys and values into the caches
//     head              makes logits
//     add_and_norm      adds to the stream what a part of a layer made of it, and normalizes it
//     attend_to_prompt  is attention, for prompts whose products PyTorch makes
//     swiglu            is the feed-forward layer's gate, for the same
//     instructions      names the processor's instructions that are used

#include <cmath>
#include <type_traits>
#include <omp.h>
#include "vectors.h"

// -----------------------------------------------------------------------------
// Types

using Shorts = int16_t __attribute__((vector_size(4 * LANES)));

using Value = VALUE;
using Weight = WEIGHT;
constexpr bool INT8 = std::is_same_v<Weight, int8_t>;
constexpr int CHUNK = 64;  // weights of a row, or activations of a token, that are handled at once

// What weights and activations become for their product. Int8 weights are multiplied as integers, because
// to make floats of them takes longer. Activations become integers of 16 bits times a scale for each CHUNK,
// which is a hundred times as exact as the weights. Sums of a CHUNK, at most 64 * 127 * 32767, fit 32 bits.
// A pair of bfloat16 is multiplied at once where the processor can and the activations are bfloat16 anyway.
#ifdef __AVX512BF16__
constexpr bool ALL_BFLOAT16 = std::is_same_v<Weight, bfloat16> && std::is_same_v<Value, bfloat16>;
using Half = std::conditional_t<ALL_BFLOAT16, bfloat16, float>;
using Pairs = __m512bh;
#else
using Half = float;
using Pairs = Words;
#endif
using Input = std::conditional_t<INT8, int16_t, Half>;

// The vector that a type of inputs is loaded into, and the sums of its products
template <typename T> struct Types { using Vector = Floats; using Sums = Floats; };
template <> struct Types<int16_t> { using Vector = Shorts; using Sums = Ints; };
template <> struct Types<bfloat16> { using Vector = Pairs; using Sums = Floats; };

// -----------------------------------------------------------------------------
// Instructions

inline Floats add_product(Floats sums, Floats a, Floats b) { return sums + a * b; }

// Of integers of 16 bits: sums[i] + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]. And vectors of wider numbers.
#if defined(__AVX512BW__)
inline Ints add_product(Ints sums, Shorts a, Shorts b) {
#ifdef __AVX512VNNI__
    return (Ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#else
    return sums + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}
inline Shorts widen_8_bits(const void* x) { return (Shorts)_mm512_cvtepi8_epi16(load<__m256i>(x)); }
// With a mask of all lanes, as GCC 12 warns of what its own header does without one (bug 105593)
inline Words widen_16_bits(const void* x) {
    return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, load<__m256i>(x));
}
inline Floats widen_float16(const float16* x) { return _mm512_maskz_cvtph_ps(0xffff, load<__m256i>(x)); }
#elif defined(__AVX2__)
inline Ints add_product(Ints sums, Shorts a, Shorts b) {
#ifdef __AVXVNNI__
    return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#else
    return sums + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}
inline Shorts widen_8_bits(const void* x) { return (Shorts)_mm256_cvtepi8_epi16(load<__m128i>(x)); }
inline Words widen_16_bits(const void* x) { return (Words)_mm256_cvtepu16_epi32(load<__m128i>(x)); }
inline Floats widen_float16(const float16* x) { return _mm256_cvtph_ps(load<__m128i>(x)); }
#else
using Bytes = int8_t __attribute__((vector_size(2 * LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES)));
inline Ints add_product(Ints sums, Shorts a, Shorts b) {
    int32x4_t low = vmull_s16(vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
    return sums + (Ints)vpaddq_s32(low, vmull_high_s16((int16x8_t)a, (int16x8_t)b));
}
inline Shorts widen_8_bits(const void* x) { return __builtin_convertvector(load<Bytes>(x), Shorts); }
inline Words widen_16_bits(const void* x) { return __builtin_convertvector(load<Halves>(x), Words); }
inline Floats widen_float16(const float16* x) { return (Floats)vcvt_f32_f16(load<float16x4_t>(x)); }
#endif
#ifdef __AVX512BF16__
inline Floats add_product(Floats sums, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sums, a, b); }
#endif

// The next values, weights or cached ones, as a vector of inputs or of floats
template <typename To, typename From>
inline auto widen(const From* x) {
    if constexpr (std::is_same_v<From, int8_t>) return widen_8_bits(x);
    else if constexpr (std::is_same_v<To, bfloat16>) return load<Pairs>(x);
    else if constexpr (std::is_same_v<From, bfloat16>) return (Floats)(widen_16_bits(x) << 16);
    else if constexpr (std::is_same_v<From, float16>) return widen_float16(x);
    else return load<Floats>(x);
}

// The next n values widened, and zeros after them up to length
template <typename To, typename From>
inline void widen_row(const From* x, int64_t n, int64_t length, To* y) {
    int64_t i = 0;
    for (constexpr int step = 4 * LANES / sizeof(To); i + step <= n; i += step) {
        auto vector = widen<To>(x + i);
        memcpy(y + i, &vector, sizeof vector);
    }
    for (; i < n; i++) y[i] = x[i];
    std::fill(y + i, y + length, To(0));
}

inline Floats scaled(Floats sums, Floats) { return sums; }
inline Floats scaled(Ints sums, Floats scale) { return __builtin_convertvector(sums, Floats) * scale; }

// -----------------------------------------------------------------------------
// A tile of a product

// c (TILE, WIDTH) += a (TILE, n) times b (n, WIDTH). All sums stay in registers. An input of a is repeated
// in all lanes of one and multiplied by two vectors of b. Inputs of 16 bits come in pairs, (2i, 2i + 1),
// whose products are added up. Integers have a scale for each CHUNK.
template <typename T>
struct Operand { const T* inputs; int64_t stride; const float* scales = nullptr; int64_t chunks = 0; };
template <typename T>
[[gnu::noinline]] static void add_tile(int64_t n, Operand<T> a, Operand<T> b, float* c, int64_t c_stride) {
    using Vector = typename Types<T>::Vector;
    constexpr int PAIR = 4 / sizeof(T);
    constexpr bool has_scales = std::is_same_v<T, int16_t>;
    const int64_t length = has_scales ? CHUNK : n;
    for (int64_t begin = 0; begin < n; begin += length) {
        typename Types<T>::Sums sums[TILE][2] = {};
        for (int64_t k = begin; k < begin + length; k += PAIR) {
            Vector left = load<Vector>(b.inputs + k / PAIR * b.stride);
            Vector right = load<Vector>(b.inputs + k / PAIR * b.stride + LANES * PAIR);
            for (int r = 0; r < TILE; r++) {
                uint32_t word;
                memcpy(&word, a.inputs + r * a.stride + k, 4);
                Vector repeated = (Vector)(Words{} + word);
                sums[r][0] = add_product(sums[r][0], repeated, left);
                sums[r][1] = add_product(sums[r][1], repeated, right);
            }
        }
        for (int r = 0; r < TILE; r++)
            for (int v = 0; v < 2; v++) {
                float* place = c + r * c_stride + v * LANES;
                Floats scale = {};
                if (has_scales)
                    scale = a.scales[r * a.chunks + begin / CHUNK]
                        * load<Floats>(b.scales + begin / CHUNK * WIDTH + v * LANES);
                store(place, load<Floats>(place) + scaled(sums[r][v], scale));
            }
    }
}

// -----------------------------------------------------------------------------
// The model, and inputs of its products

struct Matrix { const Weight* values; const float* scales; };
struct Layer {
    const float* attention_norm; Matrix wq, wk, wv, wo;
    const float* ffn_norm; Matrix w1, w3, w2;
};
struct Cache { Value *k, *v; };  // (B, room, n_kv_heads, head_dim) each
struct Model {
    int64_t dim, hidden_dim, vocab_size, n_layers, n_heads, n_kv_heads, head_dim;
    double norm_eps;
    const Layer* layers;
    int64_t q_dim() const { return n_heads * head_dim; }
    int64_t kv_dim() const { return n_kv_heads * head_dim; }
};
// fast.py makes these structs, and asserts the same of what it makes.
static_assert(sizeof(Layer) == 16 * 8 && sizeof(Cache) == 2 * 8 && sizeof(Model) == 9 * 8);

// The largest |x|; NaN if one is NaN. The bits of floats above 0 are in their order, NaN above infinity.
static float largest(const float* x, int64_t n) {
    uint32_t top = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        top = std::max(top, bits & 0x7fffffff);
    }
    return load<float>(&top);
}

constexpr int64_t FEW = 8;  // tokens, up to which multiply_few is faster than multiply_many

// What count tokens have to be multiplied, width elements each. Few tokens lie one behind the other, many
// in panels of WIDTH tokens: first the first element (or pair) of each, then the second of each, and so on.
class Inputs {
    Buffer<Input> inputs;
    Buffer<float> scales;
public:
    const int64_t count, width;
    const int64_t chunks;  // of a token, the last one filled up with zeros
    const bool in_panels;

    Inputs(int64_t count, int64_t width)
        : inputs(round_up(count, WIDTH) * round_up(width, CHUNK)),
          scales(round_up(count, WIDTH) * round_up(width, CHUNK) / CHUNK),
          count(count), width(width), chunks(round_up(width, CHUNK) / CHUNK), in_panels(count > FEW) {}

    // Chunk j of token t, or of the panel that token t begins
    int64_t place(int64_t t, int64_t j) const { return t * chunks + j * (in_panels ? WIDTH : 1); }
    const Input* at(int64_t t, int64_t j) const { return inputs + place(t, j) * CHUNK; }
    const float* scale(int64_t t, int64_t j) const { return scales + place(t, j); }

    void set(int64_t t, const float* row) {
        constexpr int PAIR = 4 / sizeof(Input);
        int64_t in_panel = in_panels ? t % WIDTH : 0;
        for (int64_t j = 0; j < chunks; j++, row += CHUNK) {
            int64_t n = std::min<int64_t>(CHUNK, width - j * CHUNK);
            float scale = INT8 ? std::max(largest(row, n), 1e-30f) / 32767 : 1;
            alignas(64) Input chunk[CHUNK] = {};
            for (int64_t k = 0; k < n; k++)
                chunk[k] = INT8 ? Input(std::rint(row[k] / scale)) : Input(row[k]);
            int64_t to = place(t - in_panel, j);
            scales[to + in_panel] = scale;
            if (!in_panels) memcpy(inputs + to * CHUNK, chunk, sizeof chunk);
            else for (int k = 0; k < CHUNK; k += PAIR)
                memcpy(inputs + to * CHUNK + k * WIDTH + in_panel * PAIR, chunk + k, 4);
        }
    }
};

// -----------------------------------------------------------------------------
// Products: y (x.count, rows) = x times the matrix (rows, x.width). All threads call them, none waits.

// For few tokens, COLUMNS at a time. A thread reads its share of the matrix in several places at once,
// because the memory then delivers up to twice as much. MOST_SUMS fit the registers beside what is added.
constexpr int MOST_SUMS = REGISTERS == 32 ? 24 : 12, MOST_COLUMNS = MOST_SUMS / 3;
template <int COLUMNS>
static void multiply_few(const Inputs& x, Matrix matrix, int64_t rows, float* y) {
    constexpr int PLACES = std::min(4, MOST_SUMS / COLUMNS);
    constexpr int STEP = 4 * LANES / sizeof(Input);
    using Vector = typename Types<Input>::Vector;
    int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    int64_t begin = rows * thread / threads, end = rows * (thread + 1) / threads;
    int64_t distance = (end - begin + PLACES - 1) / PLACES;
    for (int64_t i = begin; i < begin + distance; i++) {
        int64_t row[PLACES];
        for (int r = 0; r < PLACES; r++) row[r] = std::min(i + r * distance, end - 1);
        for (int64_t t = 0; t < x.count; t += COLUMNS) {
            Floats totals[PLACES][COLUMNS] = {};
            for (int64_t j = 0; j < x.chunks; j++) {
                const Weight* w[PLACES];
                for (int r = 0; r < PLACES; r++) w[r] = matrix.values + row[r] * x.width + j * CHUNK;
                Weight filled_up[PLACES][CHUNK];
                if (j == x.width / CHUNK)  // the last chunk of a row, if it is not full
                    for (int r = 0; r < PLACES; r++) {
                        std::fill_n(std::copy_n(w[r], x.width % CHUNK, filled_up[r]),
                                    CHUNK - x.width % CHUNK, Weight(0));
                        w[r] = filled_up[r];
                    }
                typename Types<Input>::Sums sums[PLACES][COLUMNS] = {};
                if constexpr (!INT8) memcpy(sums, totals, sizeof sums);
                for (int k = 0; k < CHUNK; k += STEP) {
                    Vector tokens[COLUMNS];
                    for (int c = 0; c < COLUMNS; c++) tokens[c] = load<Vector>(x.at(t + c, j) + k);
                    for (int r = 0; r < PLACES; r++) {
                        Vector weights = widen<Input>(w[r] + k);
                        for (int c = 0; c < COLUMNS; c++)
                            sums[r][c] = add_product(sums[r][c], weights, tokens[c]);
                    }
                }
                for (int r = 0; r < PLACES; r++)
                    for (int c = 0; c < COLUMNS; c++)
                        if constexpr (INT8)
                            totals[r][c] += scaled(sums[r][c], Floats{}
                                + matrix.scales[row[r] * x.chunks + j] * *x.scale(t + c, j));
                        else totals[r][c] = sums[r][c];
            }
            for (int r = 0; r < PLACES && i + r * distance < end; r++)
                for (int c = 0; c < COLUMNS && t + c < x.count; c++)
                    y[(t + c) * rows + row[r]] = sum(totals[r][c]);
        }
    }
}

// For many tokens, a block of the matrix and of tokens after the other. A block's weights are widened once
// for all its tokens. They stay in the second level of the processor's cache, part of a panel in the first.
static void multiply_many(const Inputs& x, Matrix matrix, int64_t rows, float* y) {
    constexpr int BLOCK_ROWS = 48, BLOCK_TOKENS = 128;
    constexpr int LENGTH = 24 * 1024 / (WIDTH * sizeof(Input)), DEPTH = LENGTH / CHUNK;  // in chunks
    static_assert(BLOCK_ROWS % TILE == 0 && BLOCK_TOKENS % WIDTH == 0);
    Buffer<Input> widened(BLOCK_ROWS * LENGTH);
    Buffer<float> scales(BLOCK_ROWS * DEPTH), sums(BLOCK_ROWS * BLOCK_TOKENS);
    #pragma omp for collapse(2) schedule(dynamic) nowait
    for (int64_t row = 0; row < rows; row += BLOCK_ROWS)
        for (int64_t token = 0; token < x.count; token += BLOCK_TOKENS) {
            int64_t block_rows = std::min<int64_t>(BLOCK_ROWS, rows - row);
            int64_t tokens = std::min<int64_t>(BLOCK_TOKENS, x.count - token);
            sums.clear();
            for (int64_t j = 0; j < x.chunks; j += DEPTH) {
                int64_t depth = std::min<int64_t>(DEPTH, x.chunks - j);
                for (int64_t r = 0; r < block_rows; r++) {
                    const Weight* w = matrix.values + (row + r) * x.width + j * CHUNK;
                    widen_row(w, std::min(depth * CHUNK, x.width - j * CHUNK), depth * CHUNK,
                              widened + r * LENGTH);
                    if (INT8)
                        std::copy_n(matrix.scales + (row + r) * x.chunks + j, depth, scales + r * DEPTH);
                }
                for (int64_t t = 0; t < tokens; t += WIDTH)
                    for (int64_t r = 0; r < block_rows; r += TILE)
                        add_tile<Input>(
                            depth * CHUNK, {widened + r * LENGTH, LENGTH, scales + r * DEPTH, DEPTH},
                            {x.at(token + t, j), WIDTH * 4 / sizeof(Input), x.scale(token + t, j)},
                            sums + r * BLOCK_TOKENS + t, BLOCK_TOKENS);
            }
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t r = 0; r < block_rows; r++)
                    y[(token + t) * rows + row + r] = sums[r * BLOCK_TOKENS + t];
        }
}

static void multiply(const Inputs& x, Matrix matrix, int64_t rows, float* y) {
    if (x.in_panels) return multiply_many(x, matrix, rows, y);
    int64_t times = (x.count + MOST_COLUMNS - 1) / MOST_COLUMNS;
    switch ((x.count + times - 1) / times) {
        case 1: return multiply_few<1>(x, matrix, rows, y);
        case 2: return multiply_few<2>(x, matrix, rows, y);
        case 3: return multiply_few<3>(x, matrix, rows, y);
        case 4: return multiply_few<4>(x, matrix, rows, y);
        case 5: case 6: return multiply_few<std::min(6, MOST_COLUMNS)>(x, matrix, rows, y);
        default: return multiply_few<MOST_COLUMNS>(x, matrix, rows, y);
    }
}

// -----------------------------------------------------------------------------
// Between the products

constexpr int BLOCK = 64;  // numbers that are handled at once, and positions in attention

// To 4e-6. In vectors, because compilers make branches of a number's limits, and multiply in each of them.
inline Floats exponential(Floats x) {
    const Floats least = Floats{} - 126, most = Floats{} + 126;
    x *= 1.44269504f;
    x = x < least ? least : x > most ? most : x;
    Ints n = __builtin_convertvector(x + 127, Ints);  // rounded down, as it is above 0
    Floats f = x - __builtin_convertvector(n - 127, Floats);
    Floats power = (Floats)(n << 23);  // 2 to the n - 127; times 2 to the f:
    return power * (1 + f * (0.693151312f + f * (0.24016445f + f * (0.055799913f
                       + f * (0.00901703029f + f * 0.00186713011f)))));
}
inline float exponential(float x) { return exponential(Floats{} + x)[0]; }

// y (n) = silu(gate) * up, for the feed-forward layer
template <typename From, typename To>
static void apply_gate(int64_t n, const From* gate, const From* up, To* y) {
    float row[BLOCK];
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        int64_t size = std::min<int64_t>(BLOCK, n - begin);
        widen_row(gate + begin, size, BLOCK, row);
        for (int i = 0; i < BLOCK; i += LANES) {
            Floats x = load<Floats>(row + i);
            store(row + i, x / (1 + exponential(-x)));
        }
        for (int64_t i = 0; i < size; i++) y[begin + i] = row[i] * up[begin + i];
    }
}

template <typename To>
static void norm(const Model& model, const float* x, const float* weight, To* y) {
    float squares = 0;
    for (int64_t i = 0; i < model.dim; i++) squares += x[i] * x[i];
    float scale = 1 / std::sqrt(squares / model.dim + float(model.norm_eps));
    for (int64_t i = 0; i < model.dim; i++) y[i] = x[i] * scale * weight[i];
}

template <typename From, typename To>
static void rotate(int64_t D, const From* x, const float* cos, const float* sin, To* y) {
    for (int64_t i = 0; i < D / 2; i++) {
        float a = x[2 * i], b = x[2 * i + 1];
        y[2 * i] = a * cos[i] - b * sin[i];
        y[2 * i + 1] = a * sin[i] + b * cos[i];
    }
}

// -----------------------------------------------------------------------------
// Attention

// The attention of some tokens in the G query heads that share one head of keys and values, and its memory.
// There is a row for each token and query head. Rows are a multiple of TILE, widths of WIDTH.
struct Attention {
    const int64_t H, D, G, stride, width;  // stride: from one position in the cache to the next
    const int64_t tokens, rows;  // at most
    Buffer<float> query, scores, sums, key, value, top, total;

    Attention(const Model& model, int64_t T)
        : H(model.n_heads), D(model.head_dim), G(H / model.n_kv_heads), stride(model.kv_dim()),
          width(round_up(D, WIDTH)), tokens(std::clamp<int64_t>(96 / G, 1, T)),
          rows(round_up(tokens * G, TILE)), query(rows * width), scores(rows * BLOCK), sums(rows * width),
          key(BLOCK * width), value(BLOCK * width), top(rows), total(rows) {}

    // Softmax is that of the positions seen so far, rescaled with every further block of them (Milakov and
    // Gimelshein, 2018).
    template <typename Number>
    void attend(int64_t T, const Number* q, const float* cos, const float* sin, const int64_t* positions,
                const Value* keys, const Value* values, Number* y) {
        const int64_t used = T * G;
        for (int64_t i = 0; i < used; i++) {
            int64_t angle = i / G * D / 2;
            rotate(D, q + (i / G * H + i % G) * D, cos + angle, sin + angle, query + i * width);
            for (int64_t d = 0; d < D; d++) query[i * width + d] /= std::sqrt(float(D));
            top[i] = -INFINITY;
            total[i] = 0;
        }
        sums.clear();
        for (int64_t begin = 0; begin <= positions[T - 1]; begin += BLOCK) {
            int64_t size = std::min<int64_t>(BLOCK, positions[T - 1] + 1 - begin);
            for (int64_t s = 0; s < size; s++) {
                const Value* from = keys + (begin + s) * stride;
                if (T == 1) widen_row(from, D, D, key + s * width);
                else for (int64_t d = 0; d < D; d++) key[d * BLOCK + s] = from[d];
                widen_row(values + (begin + s) * stride, D, D, value + s * width);
            }
            // One token's products are sums across vectors. The many of a prompt need none, as they are made
            // from transposed keys.
            scores.clear();
            for (int64_t s = 0; T == 1 && s < size; s++)
                for (int64_t i = 0; i < G; i++) {
                    Floats products = {};
                    for (int64_t d = 0; d < width; d += LANES)
                        products += load<Floats>(query + i * width + d) * load<Floats>(key + s * width + d);
                    scores[i * BLOCK + s] = sum(products);
                }
            for (int64_t s = 0; T > 1 && s < size; s += WIDTH)
                for (int64_t i = 0; i < used; i += TILE)
                    add_tile<float>(D, {query + i * width, width}, {key + s, BLOCK}, scores + i * BLOCK + s,
                                    BLOCK);
            for (int64_t i = 0; i < used; i++)
                add_to_softmax(i, std::clamp<int64_t>(positions[i / G] + 1 - begin, 0, size));
            for (int64_t d = 0; d < width; d += WIDTH)
                for (int64_t i = 0; i < used; i += TILE)
                    add_tile<float>(size, {scores + i * BLOCK, BLOCK}, {value + d, width},
                                    sums + i * width + d, width);
        }
        for (int64_t i = 0; i < used; i++)
            for (int64_t d = 0; d < D; d++) y[(i / G * H + i % G) * D + d] = sums[i * width + d] / total[i];
    }

    // Makes weights of row i's scores, of which it sees the first ones.
    void add_to_softmax(int64_t i, int64_t seen) {
        float* weights = scores + i * BLOCK;
        std::fill(weights + seen, weights + BLOCK, -INFINITY);
        Floats most = load<Floats>(weights);
        for (int s = LANES; s < BLOCK; s += LANES) {
            Floats others = load<Floats>(weights + s);
            most = most > others ? most : others;
        }
        float before = top[i];
        for (int s = 0; s < LANES; s++) top[i] = std::max(top[i], most[s]);
        float kept = exponential(before - top[i]), added = 0;
        for (int s = 0; s < BLOCK; s += LANES) {
            Floats weight = exponential(load<Floats>(weights + s) - top[i]);
            store(weights + s, weight);
            added += sum(weight);
        }
        std::fill(weights + seen, weights + BLOCK, 0.0f);
        total[i] = total[i] * kept + added;
        for (int64_t d = 0; d < width; d++) sums[i * width + d] *= kept;
    }
};

// Writes k and v (B, T, K, D) to the cache; y (B, T, H, D) becomes q's attention to it. All threads call it.
template <typename Number>
static void attention(const Model& model, int64_t B, int64_t T, const Number* q, const Number* k,
                      const Number* v, const float* cos, const float* sin, const int64_t* positions,
                      Cache cache, int64_t room, Number* y) {
    const int64_t D = model.head_dim, H = model.n_heads, K = model.n_kv_heads;
    #pragma omp for collapse(2)
    for (int64_t t = 0; t < B * T; t++)
        for (int64_t h = 0; h < K; h++) {
            int64_t from = (t * K + h) * D, to = ((t / T * room + positions[t]) * K + h) * D;
            rotate(D, k + from, cos + t * D / 2, sin + t * D / 2, cache.k + to);
            for (int64_t d = 0; d < D; d++) cache.v[to + d] = v[from + d];
        }
    Attention work(model, T);
    const int64_t tokens = work.tokens;
    #pragma omp for collapse(3) schedule(dynamic)
    for (int64_t b = 0; b < B; b++)
        for (int64_t begin = (T - 1) / tokens * tokens; begin >= 0; begin -= tokens)  // the longest first
            for (int64_t h = 0; h < K; h++) {
                int64_t t = b * T + begin, at = (b * room * K + h) * D, head = (t * H + h * H / K) * D;
                work.attend(std::min(tokens, T - begin), q + head, cos + t * D / 2, sin + t * D / 2,
                            positions + t, cache.k + at, cache.v + at, y + head);
            }
}

// -----------------------------------------------------------------------------
// Entry points

// Takes x (B, T, dim) through all layers, in place: tokens of each row at positions (B, T), which come one
// after the other. cos, sin: (B, T, head_dim / 2). caches: one for each layer, for room positions.
extern "C" void read_tokens(const Model* pointer, int64_t B, int64_t T, float* x, const float* cos,
                            const float* sin, const int64_t* positions, const Cache* caches, int64_t room) {
    const Model& model = *pointer;
    const int64_t N = B * T, dim = model.dim, hidden = model.hidden_dim;
    const int64_t q_dim = model.q_dim(), kv_dim = model.kv_dim();
    Buffer<float> q(N * q_dim), k(N * kv_dim), v(N * kv_dim), attended(N * q_dim), added(N * dim);
    Buffer<float> gate(N * hidden), up(N * hidden);
    Inputs narrow(N, dim), heads(N, q_dim), wide(N, hidden);
    #pragma omp parallel
    {
        std::vector<float> row(std::max(dim, hidden));  // each thread's own
        auto add_and_normalize = [&](const float* weight) {
            #pragma omp for
            for (int64_t t = 0; t < N; t++) {
                for (int64_t i = t * dim; i < (t + 1) * dim; i++) x[i] += added[i];
                norm(model, x + t * dim, weight, row.data());
                narrow.set(t, row.data());
            }
        };
        for (int64_t l = 0; l < model.n_layers; l++) {
            const Layer& layer = model.layers[l];
            add_and_normalize(layer.attention_norm);
            multiply(narrow, layer.wq, q_dim, q);
            multiply(narrow, layer.wk, kv_dim, k);
            multiply(narrow, layer.wv, kv_dim, v);
            #pragma omp barrier
            attention<float>(model, B, T, q, k, v, cos, sin, positions, caches[l], room, attended);
            #pragma omp for
            for (int64_t t = 0; t < N; t++) heads.set(t, attended + t * q_dim);
            multiply(heads, layer.wo, dim, added);
            #pragma omp barrier
            add_and_normalize(layer.ffn_norm);
            multiply(narrow, layer.w1, hidden, gate);
            multiply(narrow, layer.w3, hidden, up);
            #pragma omp barrier
            #pragma omp for
            for (int64_t t = 0; t < N; t++) {
                apply_gate(hidden, gate + t * hidden, up + t * hidden, row.data());
                wide.set(t, row.data());
            }
            multiply(wide, layer.w2, dim, added);
            #pragma omp barrier
        }
        #pragma omp for
        for (int64_t i = 0; i < N * dim; i++) x[i] += added[i];
    }
}

// x (B, dim), normalized -> y (B, vocab_size)
extern "C" void head(const Model* model, int64_t B, const Value* x, const Matrix* output, float* y) {
    Inputs inputs(B, model->dim);
    std::vector<float> row(model->dim);
    for (int64_t b = 0; b < B; b++) {
        std::copy(x + b * model->dim, x + (b + 1) * model->dim, row.begin());
        inputs.set(b, row.data());
    }
    #pragma omp parallel
    multiply(inputs, *output, model->vocab_size, y);
}

// Adds to x (N, dim) what a part of a layer made of it, if any; y (N, dim) becomes x normalized.
extern "C" void add_and_norm(const Model* model, int64_t N, float* x, const Value* added,
                             const float* weight, Value* y) {
    const int64_t dim = model->dim;
    #pragma omp parallel for
    for (int64_t t = 0; t < N; t++) {
        for (int64_t i = t * dim; added && i < (t + 1) * dim; i++) x[i] += added[i];
        norm(*model, x + t * dim, weight, y + t * dim);
    }
}

// A prompt's q (B, T, H, D) becomes its attention; k and v (B, T, K, D) go to the cache.
extern "C" void attend_to_prompt(const Model* model, int64_t B, int64_t T, Value* q, const Value* k,
                                 const Value* v, const float* cos, const float* sin,
                                 const int64_t* positions, const Cache* cache, int64_t room) {
    #pragma omp parallel
    attention<Value>(*model, B, T, q, k, v, cos, sin, positions, *cache, room, q);
}

// gate = silu(gate) * up
extern "C" void swiglu(int64_t N, Value* gate, const Value* up) {
    #pragma omp parallel for
    for (int64_t i = 0; i < N; i += BLOCK)
        apply_gate(std::min<int64_t>(BLOCK, N - i), gate + i, up + i, gate + i);
}

extern "C" const char* instructions() {
#if defined(__AVX512BF16__)
    return "AVX512-BF16";
#elif defined(__AVX512VNNI__)
    return "AVX512-VNNI";
#elif defined(__AVX512BW__)
    return "AVX512";
#elif defined(__AVXVNNI__)
    return "AVX-VNNI";
#elif defined(__AVX2__)
    return "AVX2";
#else
    return "NEON";
#endif
}
