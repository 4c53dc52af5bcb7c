// Vectors of the processor's registers, memory for them, and numbers of 16 bits: what fast.cpp and
// attention.cpp compute with.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512BW__)
constexpr int LANES = 16, REGISTERS = 32;  // floats of a vector register, and how many there are
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
#error "the kernels need AVX2, AVX512 or 64-bit ARM"
#endif
using Floats = float __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));

// A product is made by tiles of so many rows and columns, whose sums all stay in registers.
constexpr int WIDTH = 2 * LANES, TILE = REGISTERS == 32 ? 12 : 6;

template <typename Vector>
inline Vector load(const void* from) { Vector v; memcpy(&v, from, sizeof v); return v; }
inline void store(float* to, Floats v) { memcpy(to, &v, sizeof v); }
inline float sum(Floats v) { float s = 0; for (int i = 0; i < LANES; i++) s += v[i]; return s; }

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Zeros, from the beginning of a line of the processor's cache on: loads across two lines take longer.
template <typename T>
class Buffer {
    struct alignas(64) Line { T values[64 / sizeof(T)]; };
    std::vector<Line> lines;
public:
    explicit Buffer(int64_t size) : lines(size * sizeof(T) / 64 + 1) {}
    operator T*() { return lines[0].values; }
    operator const T*() const { return lines[0].values; }
    void clear() { std::fill(lines.begin(), lines.end(), Line{}); }
};

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

#ifdef __x86_64__
struct float16 {
    uint16_t bits;
    float16() = default;
    float16(float x) : bits(_cvtss_sh(x, 0)) {}
    operator float() const { return _cvtsh_ss(bits); }
};
#else
using float16 = __fp16;
#endif
