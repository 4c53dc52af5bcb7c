// Attention for training on a CPU, forward and backward: attention.py compiles this file and calls it.
//
// A query sees the keys from its document's first one up to its own. PyTorch also computes scores that none
// sees, with documents even all T x T. Here only tiles in which something is seen are computed, and their
// sums stay in registers. As in FlashAttention (Dao et al., 2022) the scores never exist at once: they are
// made block by block, and the backward pass makes them again, for which one number is kept of each row, the
// logarithm of its sum of exponentials.
//
// Numbers are float32. q, y: (B, T, H, D). k, v: (B, T, K, D). logsum: (B, H, T). first: (B, T), int64, the
// first position that a query sees, which never falls along T. A gradient is its tensor's name behind a d.

#include <cmath>
#include "vectors.h"

constexpr int BLOCK = 96;  // positions at once; what is needed of them stays in the processor's cache
static_assert(BLOCK % TILE == 0 && BLOCK % WIDTH == 0);

// c (TILE, WIDTH) = a (TILE, n) times b (n, WIDTH), or += it. Steps lead from a row to the next, and in a
// from a column, so that it may lie transposed.
template <bool ADDS>
[[gnu::noinline]] static void make_tile(int64_t n, const float* a, int64_t row_step, int64_t column_step,
                                        const float* b, int64_t b_step, float* c, int64_t c_step) {
    Floats sums[TILE][2] = {};
    for (int64_t k = 0; k < n; k++) {
        Floats left = load<Floats>(b + k * b_step), right = load<Floats>(b + k * b_step + LANES);
        for (int r = 0; r < TILE; r++) {
            Floats repeated = Floats{} + a[r * row_step + k * column_step];
            sums[r][0] += repeated * left;
            sums[r][1] += repeated * right;
        }
    }
    for (int r = 0; r < TILE; r++)
        for (int v = 0; v < 2; v++) {
            float* place = c + r * c_step + v * LANES;
            store(place, ADDS ? load<Floats>(place) + sums[r][v] : sums[r][v]);
        }
}

// Of x up to 0, to 3e-7. In vectors, because compilers make branches of a number's limits.
inline Floats exponential(Floats x) {
    const Floats least = Floats{} - 87;  // Below, the exponential is no normal number, and 0 will do.
    Floats kept = x < least ? least : x;
    Ints n = __builtin_convertvector(kept * 1.44269504f + 127.5f, Ints) - 127;  // the nearest: it is above 0
    Floats r = kept - __builtin_convertvector(n, Floats) * 0.693147181f;  // x = n ln 2 + r
    Floats power = (Floats)((n + 127) << 23);  // 2 to the n; times e to the r, by its series:
    Floats high = 1 / 24.f + r * (1 / 120.f + r * (1 / 720.f));
    Floats y = power * (1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * high))));
    return x < least ? Floats{} : y;
}
inline float exponential(float x) { return exponential(Floats{} + x)[0]; }

// What a thread computes at a time, and its memory: one of the K heads of keys and values in one row of the
// batch, with the G query heads that share it. Positions are filled up to whole blocks, D to whole tiles.
struct Work {
    const int64_t T, H, K, D, G, width, all;
    const float scale;
    // The first line is of all positions, the second of a block of queries.
    Buffer<float> key, value, key_columns, value_columns, dkey, dvalue;
    Buffer<float> query, dout, scores, dscores, sums, top, total;
    const int64_t* first;
    int64_t t0, s0, n;  // the blocks at hand: their first query and key, and how many queries

    Work(int64_t T, int64_t H, int64_t K, int64_t D)
        : T(T), H(H), K(K), D(D), G(H / K), width(round_up(D, WIDTH)),
          all(round_up(T, BLOCK)), scale(1 / std::sqrt(float(D))), key(all * width),
          value(all * width), key_columns(all * D), value_columns(all * D), dkey(all * width),
          dvalue(all * width), query(BLOCK * width), dout(BLOCK * width), scores(BLOCK * BLOCK),
          dscores(BLOCK * BLOCK), sums(BLOCK * width), top(BLOCK), total(BLOCK) {}

    // From a tensor to rows; back; and to blocks (D, BLOCK), as the right side of a product has to lie
    void copy(int64_t positions, const float* from, int64_t heads, float factor, float* to) {
        for (int64_t t = 0; t < positions; t++)
            for (int64_t d = 0; d < D; d++) to[t * width + d] = from[t * heads * D + d] * factor;
    }
    void copy_back(int64_t positions, const float* from, int64_t heads, float factor, float* to) {
        for (int64_t t = 0; t < positions; t++)
            for (int64_t d = 0; d < D; d++) to[t * heads * D + d] = from[t * width + d] * factor;
    }
    void transpose(const float* from, float* to) {
        for (int64_t t = 0; t < T; t++)
            for (int64_t d = 0; d < D; d++)
                to[(t / BLOCK * D + d) * BLOCK + t % BLOCK] = from[t * K * D + d];
    }

    // Of the keys in the block, those that queries r to end - 1 see; of the queries, those that see keys s
    // to end - 1. Both are runs, as first never falls. A query may see no key of the block.
    struct Run { int64_t begin, end; };
    Run keys_seen(int64_t r, int64_t end) {
        int64_t last = std::min<int64_t>(t0 + std::min(end, n) - s0, BLOCK);
        return {r < n ? std::clamp<int64_t>(first[t0 + r] - s0, 0, last) : last, last};
    }
    Run queries_seeing(int64_t s, int64_t end) {
        int64_t last = std::upper_bound(first + t0, first + t0 + n, s0 + end - 1) - (first + t0);
        return {std::clamp<int64_t>(s0 + s - t0, 0, last), last};
    }

    // c (BLOCK, BLOCK) = rows (BLOCK, D) times columns (D, BLOCK) where a query sees a key, else anything
    void multiply(const float* rows, const float* columns, float* c) {
        for (int64_t r = 0; r < n; r += TILE) {
            Run seen = keys_seen(r, r + TILE);
            for (int64_t s = seen.begin / WIDTH * WIDTH; s < seen.end; s += WIDTH)
                make_tile<false>(D, rows + r * width, width, 1, columns + s, BLOCK,
                                 c + r * BLOCK + s, BLOCK);
        }
    }
    // To each query's row of c (BLOCK, width) the sum of the keys' rows, times weights (BLOCK, BLOCK); and
    // to each key's the sum of the queries' rows
    void add_to_queries(const float* weights, const float* rows, float* c) {
        for (int64_t r = 0; r < n; r += TILE) {
            Run seen = keys_seen(r, r + TILE);
            for (int64_t d = 0; d < width; d += WIDTH)
                make_tile<true>(seen.end - seen.begin, weights + r * BLOCK + seen.begin, BLOCK, 1,
                                rows + seen.begin * width + d, width, c + r * width + d, width);
        }
    }
    void add_to_keys(const float* weights, const float* rows, float* c) {
        for (int64_t s = 0; s < BLOCK; s += TILE) {
            Run seen = queries_seeing(s, s + TILE);
            for (int64_t d = 0; d < width; d += WIDTH)
                make_tile<true>(seen.end - seen.begin, weights + seen.begin * BLOCK + s, 1, BLOCK,
                                rows + seen.begin * width + d, width, c + s * width + d, width);
        }
    }

    // The scores of query r, with those hidden that it doesn't see
    float* masked(int64_t r) {
        Run seen = keys_seen(r, r + 1);
        float* row = scores + r * BLOCK;
        std::fill(row, row + seen.begin, -INFINITY);
        std::fill(row + seen.end, row + BLOCK, -INFINITY);
        return row;
    }

    // One query head. Softmax is that of the keys seen so far, rescaled with every further block of them
    // (Milakov and Gimelshein, 2018).
    void forward(const float* q, float* y, float* logsum) {
        for (t0 = 0; t0 < T; t0 += BLOCK) {
            n = std::min<int64_t>(BLOCK, T - t0);
            copy(n, q + t0 * H * D, H, scale, query);
            sums.clear();
            total.clear();
            std::fill_n((float*)top, BLOCK, -1e30f);
            for (s0 = first[t0] / BLOCK * BLOCK; s0 <= t0; s0 += BLOCK) {
                multiply(query, key_columns + s0 * D, scores);
                for (int64_t r = 0; r < n; r++) add_to_softmax(r);
                add_to_queries(scores, value + s0 * width, sums);
            }
            for (int64_t r = 0; r < n; r++) {
                copy_back(1, sums + r * width, H, 1 / total[r], y + (t0 + r) * H * D);
                logsum[t0 + r] = top[r] + std::log(total[r]);
            }
        }
    }

    // Makes weights of the scores of query r.
    void add_to_softmax(int64_t r) {
        float* weights = masked(r);
        Floats most = load<Floats>(weights);
        for (int s = LANES; s < BLOCK; s += LANES) {
            Floats others = load<Floats>(weights + s);
            most = most > others ? most : others;
        }
        float before = top[r], now = before;
        for (int s = 0; s < LANES; s++) now = std::max(now, most[s]);
        float kept = exponential(before - now);
        Floats added = {};
        for (int s = 0; s < BLOCK; s += LANES) {
            Floats weight = exponential(load<Floats>(weights + s) - now);
            store(weights + s, weight);
            added += weight;
        }
        top[r] = now;
        total[r] = total[r] * kept + sum(added);
        for (int64_t d = 0; d < width; d++) sums[r * width + d] *= kept;
    }

    // One query head. With p = softmax(scores) and y = p v, dp is dy times v transposed. The gradient of the
    // scores is p (dp - mean), where the mean of dp, weighted by p, is also the product of y and dy.
    void backward(const float* q, const float* y, const float* dy, const float* logsum, float* dq) {
        for (t0 = 0; t0 < T; t0 += BLOCK) {
            const int64_t at = t0 * H * D;
            n = std::min<int64_t>(BLOCK, T - t0);
            copy(n, q + at, H, scale, query);
            copy(n, dy + at, H, 1, dout);
            for (int64_t r = 0; r < n; r++) {
                float products = 0;
                for (int64_t d = 0; d < D; d++) products += dout[r * width + d] * y[at + r * H * D + d];
                total[r] = products;
            }
            sums.clear();
            for (s0 = first[t0] / BLOCK * BLOCK; s0 <= t0; s0 += BLOCK) {
                multiply(query, key_columns + s0 * D, scores);
                multiply(dout, value_columns + s0 * D, dscores);
                for (int64_t r = 0; r < n; r++) {
                    float *weights = masked(r), *changes = dscores + r * BLOCK;
                    const float log_total = logsum[t0 + r], mean = total[r];
                    for (int s = 0; s < BLOCK; s += LANES) {
                        Floats weight = exponential(load<Floats>(weights + s) - log_total);
                        store(weights + s, weight);
                        store(changes + s, weight * (load<Floats>(changes + s) - mean));
                    }
                }
                add_to_keys(scores, dout, dvalue + s0 * width);
                add_to_keys(dscores, query, dkey + s0 * width);
                add_to_queries(dscores, key + s0 * width, sums);
            }
            copy_back(n, sums, H, scale, dq + at);
        }
    }
};

// Calls f for each head of keys, with where this, its first head of queries and the logsum of that begin.
template <typename F>
static void for_each_head(int64_t B, int64_t T, int64_t H, int64_t K, int64_t D, const int64_t* first, F f) {
    #pragma omp parallel
    {
        Work work(T, H, K, D);
        #pragma omp for collapse(2) schedule(dynamic)
        for (int64_t b = 0; b < B; b++)
            for (int64_t g = 0; g < K; g++) {
                work.first = first + b * T;
                f(work, (b * T * K + g) * D, (b * T * H + g * work.G) * D, (b * H + g * work.G) * T);
            }
    }
}

// Makes y and logsum.
extern "C" void attend(int64_t B, int64_t T, int64_t H, int64_t K, int64_t D, const float* q, const float* k,
                       const float* v, const int64_t* first, float* y, float* logsum) {
    for_each_head(B, T, H, K, D, first, [&](Work& work, int64_t shared, int64_t own, int64_t row) {
        work.transpose(k + shared, work.key_columns);
        work.copy(T, v + shared, K, 1, work.value);
        for (int64_t i = 0; i < work.G; i++)
            work.forward(q + own + i * D, y + own + i * D, logsum + row + i * T);
    });
}

// Makes dq, dk and dv.
extern "C" void attend_backward(int64_t B, int64_t T, int64_t H, int64_t K, int64_t D, const float* q,
                                const float* k, const float* v, const int64_t* first, const float* y,
                                const float* logsum, const float* dy, float* dq, float* dk, float* dv) {
    for_each_head(B, T, H, K, D, first, [&](Work& work, int64_t shared, int64_t own, int64_t row) {
        work.copy(T, k + shared, K, 1, work.key);
        work.transpose(k + shared, work.key_columns);
        work.transpose(v + shared, work.value_columns);
        work.dkey.clear();
        work.dvalue.clear();
        for (int64_t i = 0; i < work.G; i++)
            work.backward(q + own + i * D, y + own + i * D, dy + own + i * D, logsum + row + i * T,
                          dq + own + i * D);
        work.copy_back(T, work.dkey, K, 1, dk + shared);
        work.copy_back(T, work.dvalue, K, 1, dv + shared);
    });
}
