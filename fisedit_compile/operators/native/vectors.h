// What the compiled code shares: vectors of float32, numbers, products, memory. Other files start with it.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(BFLOAT16) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define PAIRS 1
#include <immintrin.h>
#else
#define PAIRS 0
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif

#ifdef BFLOAT16
typedef uint16_t Number;
#else
typedef float Number;
#endif

// What products are made of: a number, or two bfloat16 numbers that follow each other along the summed dimension.
#if PAIRS
typedef uint32_t Element;
constexpr int64_t NUMBERS = 2;
#else
typedef float Element;
constexpr int64_t NUMBERS = 1;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef Element Elements __attribute__((vector_size(4 * LANES)));

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t divided_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }
static int64_t multiple(int64_t count, int64_t unit) { return divided_up(count, unit) * unit; }

static float widen(float number) { return number; }
static float widen(uint16_t bits) {
  uint32_t word = (uint32_t)bits << 16;
  float number;
  memcpy(&number, &word, sizeof number);
  return number;
}

static void narrow(float number, float *out) { *out = number; }
static void narrow(float number, uint16_t *out) {
  uint32_t word;
  memcpy(&word, &number, sizeof word);
  const bool nan = (word & 0x7fffffff) > 0x7f800000;
  *out = nan ? 0x7fc0 : (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16); // to nearest, ties to even
}

static inline Vector accumulate(Vector sum, Element element, Elements elements) {
#if PAIRS
  return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)element), (__m512bh)elements);
#else
  return sum + element * elements;
#endif
}

// sum[row][vector] += the sum over steps of one[row, step] times other[step, vector].
template <int ROWS, int VECTORS>
static inline __attribute__((always_inline)) void multiply(Vector (&sum)[ROWS][VECTORS], const Element *one,
                                                           int64_t row_stride, int64_t step_stride,
                                                           const Elements *other, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step) {
    Elements column[VECTORS];
#pragma GCC unroll 8
    for (int vector = 0; vector < VECTORS; ++vector) column[vector] = other[step * VECTORS + vector];
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
      const Element element = one[row * row_stride + step * step_stride];
#pragma GCC unroll 8
      for (int vector = 0; vector < VECTORS; ++vector)
        sum[row][vector] = accumulate(sum[row][vector], element, column[vector]);
    }
  }
}

// Memory of a thread, kept for the next call: some systems give new memory slowly.
struct Memory {
  char *data = nullptr;
  int64_t bytes = 0;
  char *of(int64_t wanted) {
    if (wanted > bytes) {
      free(data);
      data = (char *)aligned_alloc(64, multiple(wanted, 64));
      bytes = data ? wanted : 0;
    }
    return data;
  }
  ~Memory() { free(data); }
};
static thread_local Memory memory_of_thread;
