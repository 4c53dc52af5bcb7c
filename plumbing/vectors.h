// Vectors of the processor's registers, and memory for them: what fast.cpp and attention.cpp compute with.

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
