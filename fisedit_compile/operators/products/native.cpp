// Products of few rows with a weight that was brought, once, to the order in which it is read.
//
//   out [row, output] = bias [output] + sum over inputs of rows [row, input] times weight [panel, input, output in panel]
//
// A panel holds the weights of so many outputs as two vectors have lanes. With few rows the time is that of reading the
// weight, which is read once, from one end to the other, while what comes next is asked for ahead; with more rows it is
// that of multiplying, so a block of weights stays in the first-level cache for all of them. Sums are kept in float32,
// those of a block by themselves, as long sums round more.

// Vectors of a panel, rows that are multiplied together, steps of a block, and rows that share a block.
constexpr int VECTORS = 2;
constexpr int ROWS = REGISTERS == 32 ? 12 : 6;
constexpr int64_t STEPS = 256, GROUP = 8 * ROWS;
constexpr int64_t LINE = 64;
constexpr int64_t PANEL = VECTORS * LANES;

// Sums of some rows with one block of a panel. ahead: two streams of memory to be asked for, a line of each at a step.
template <int COUNT>
static void multiply_rows(Vector *sums, const Element *rows, int64_t stride, const Elements *weights, int64_t steps,
                          const char *ahead, int64_t apart, int64_t every) {
  Vector sum[COUNT][VECTORS] = {};
  for (int64_t step = 0; step < steps; ++step, ahead += every) {
    __builtin_prefetch(ahead, 0, 2);
    __builtin_prefetch(ahead + apart, 0, 2);
    Elements column[VECTORS];
#pragma GCC unroll 16
    for (int vector = 0; vector < VECTORS; ++vector) column[vector] = weights[step * VECTORS + vector];
#pragma GCC unroll 16
    for (int row = 0; row < COUNT; ++row) {
      const Element element = rows[row * stride + step];
#pragma GCC unroll 16
      for (int vector = 0; vector < VECTORS; ++vector)
        sum[row][vector] = accumulate(sum[row][vector], element, column[vector]);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < COUNT; ++row)
#pragma GCC unroll 16
    for (int vector = 0; vector < VECTORS; ++vector) sums[row * VECTORS + vector] += sum[row][vector];
}

typedef void (*Multiply)(Vector *, const Element *, int64_t, const Elements *, int64_t, const char *, int64_t, int64_t);
template <int... COUNTS> struct Table {
  Multiply of_count[sizeof...(COUNTS) + 1] = {nullptr, multiply_rows<COUNTS>...};
};
#if defined(__AVX512F__) || defined(__aarch64__)
static const Table<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12> multiplications;
#else
static const Table<1, 2, 3, 4, 5, 6> multiplications;
#endif

// How many outputs a panel has, or 0 where numbers of this kind are not multiplied.
extern "C" int panel() {
#if defined(BFLOAT16) && !PAIRS
  return 0;
#else
  return PANEL;
#endif
}

// out [count, panels * PANEL] of rows [count, stride], of which the first steps elements are multiplied.
extern "C" int product(const Number *row_data, int64_t count, int64_t stride, const Number *weight_data, int64_t steps,
                       int64_t panels, const Number *bias, Number *out, int threads) {
  const Element *rows = (const Element *)row_data, *weight = (const Element *)weight_data;
  // Groups of rows are tasks of their own where panels alone do not occupy the threads.
  const int64_t wanted = most(divided_up(count, GROUP), least(divided_up(count, ROWS), 2 * threads / panels));
  const int64_t groups = most(1, wanted), tasks = panels * groups;
  int failed = 0;
#pragma omp parallel for schedule(static) num_threads((int)least(threads, tasks))
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t panel = task / groups, group = task % groups;
    const int64_t first = count * group / groups, held = count * (group + 1) / groups - first;
    Vector *sums = (Vector *)memory_of_thread.of(held * VECTORS * (int64_t)sizeof(Vector));
    if (!sums) {
#pragma omp atomic write
      failed = 1;
      continue;
    }
    memset(sums, 0, held * VECTORS * sizeof(Vector));
    const int64_t passes = divided_up(held, ROWS);
    for (int64_t step = 0; step < steps; step += STEPS) {
      const int64_t now = least(STEPS, steps - step);
      const Elements *weights = (const Elements *)(weight + (panel * steps + step) * PANEL);
      const char *next = (const char *)(weights + now * VECTORS);
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t from = held * pass / passes, to = held * (pass + 1) / passes;
        // A step reads two lines of weights. The next block is asked for by one pass, or by halves by two.
        const char *ahead = passes == 1 ? next : pass < 2 ? next + pass * now * LINE : (const char *)weights;
        const int64_t apart = passes == 1 ? LINE : 0, every = passes == 1 ? 2 * LINE : pass < 2 ? LINE : 0;
        multiplications.of_count[to - from](sums + from * VECTORS, rows + (first + from) * stride + step, stride,
                                            weights, now, ahead, apart, every);
      }
    }
    const float *results = (const float *)sums;
    for (int64_t row = 0; row < held; ++row)
      for (int64_t at = 0; at < PANEL; ++at) {
        const int64_t output = panel * PANEL + at;
        narrow(results[row * PANEL + at] + (bias ? widen(bias[output]) : 0.0f),
               out + (first + row) * panels * PANEL + output);
      }
  }
  return failed;
}
