// Attention on a processor, vectorised over queries.
//
// Lanes of a vector are queries. The scores of a key are then sums of (one number of the key) times (a vector of
// numbers of the queries): keys and values are read as they lie in memory, maxima and sums of a softmax never cross
// lanes, and few queries over many keys, which is what an edit has, fill whole vectors. Only queries and results, which
// are few, are transposed.
//
//   scores  [key, lane]     = sum over channels of keys [key, channel]   times queries [channel, lane]
//   results [channel, lane] = sum over keys of     values [key, channel] times weights [key, lane]
//
// Keys go by in blocks that stay in the cache; results and sums so far are rescaled whenever a larger score comes (the
// online softmax of FlashAttention, arXiv 2205.14135). Sums are kept in float32. With BFLOAT16, queries, keys, values
// and results are bfloat16, and so are the weights of the softmax where the processor multiplies pairs of bfloat16
// (AVX512_BF16); elsewhere numbers are widened to float32 when a block is copied.

// Vectors of queries that are computed together, and with how many keys or channels at a time: sums stay in registers.
constexpr int WIDEST = 3;
constexpr int tile_of(int vectors) { return REGISTERS == 32 || vectors == 1 ? 8 : 4; }
constexpr int64_t TILE = 8; // a multiple of all of these
// Most keys of a block, bytes that these take about, and bytes of the queries that share a copied block.
constexpr int64_t BLOCK = 96, BLOCK_BYTES = 48 << 10, SHARED_BYTES = 512 << 10;
// Tasks for each thread, if there are enough, so that none waits long for the others.
constexpr int64_t TASKS = 4;

// 2 to the power of x, for x of 0 and less, to a few units in the last place; below -126 it is nearly 0, from -127 on 0;
// NaN stays NaN.
static inline Vector power_of_two(Vector x) {
  const Vector lowest = Vector{} - 127.0f, magic = Vector{} + 12582912.0f; // 1.5 * 2^23
  x = x < lowest ? lowest : x;
  const Vector rounded = x + magic; // the integer is in the last bits of the mantissa
  const Vector f = x - (rounded - magic);
  Vector p = f * 1.5403530e-4f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return (Vector)((Integers)p + ((Integers)rounded << 23));
}

// A tensor [sample, position, head, channel] of numbers; channels lie side by side.
struct Tensor {
  Number *data;
  int64_t sample, position, head;
  Tensor(const Number *data, const int64_t *strides)
      : data((Number *)data), sample(strides[0]), position(strides[1]), head(strides[2]) {}
  Number *at(int64_t of_sample, int64_t of_head) const { return data + of_sample * sample + of_head * head; }
};

struct Sizes {
  int64_t batch, heads, shared, queries, keys, depth, width;
};

// How a problem is cut into blocks.
struct Plan {
  int64_t steps;   // elements of a key
  int64_t columns; // channels of a value, a multiple of TILE
  int64_t block;   // keys of a block, a multiple of TILE
  int64_t vectors; // of queries
  int64_t parts;   // of up to WIDEST vectors
  int64_t group;   // parts that share copied blocks

  Plan(const Sizes &sizes, int64_t threads) {
    steps = divided_up(sizes.depth, NUMBERS);
    columns = multiple(sizes.width, TILE);
    const int64_t fitting = BLOCK_BYTES / (steps * (int64_t)sizeof(Element)) / TILE * TILE;
    const int64_t blocks = divided_up(sizes.keys, least(BLOCK, most(2 * TILE, fitting)));
    block = multiple(divided_up(sizes.keys, blocks), TILE);
    vectors = divided_up(sizes.queries, LANES);
    parts = divided_up(vectors, WIDEST);
    group = most(1, least(SHARED_BYTES / part_bytes(), sizes.batch * sizes.heads * parts / (TASKS * threads)));
  }
  int64_t first_vector(int64_t part) const { return vectors * part / parts; }
  // Everything that is kept of a part, and of a thread; multiples of a vector.
  int64_t part_bytes() const { return (steps + columns + 2) * WIDEST * (int64_t)sizeof(Vector); }
  int64_t keys_bytes() const { return multiple(block * steps * (int64_t)sizeof(Element), sizeof(Vector)); }
  int64_t values_bytes() const { return multiple(block * columns * (int64_t)sizeof(Element), sizeof(Vector)); }
  int64_t scores_bytes() const { return block * WIDEST * (int64_t)sizeof(Vector); }
  int64_t thread_bytes() const { return keys_bytes() + values_bytes() + 2 * scores_bytes() + group * part_bytes(); }
};

// Some queries: their vectors, the largest scores, sums of weights and results so far.
struct Part {
  int64_t first, count; // queries
  int vectors;
  Elements *queries;             // [steps, vectors]
  Vector *results;               // [columns, vectors]
  Vector *largest, *sums;        // [vectors]

  Part(const Plan &plan, const Sizes &sizes, int64_t number, char *memory) {
    first = plan.first_vector(number) * LANES;
    vectors = (int)(plan.first_vector(number + 1) - plan.first_vector(number));
    count = least(sizes.queries - first, (int64_t)vectors * LANES);
    queries = (Elements *)memory;
    results = (Vector *)memory + plan.steps * WIDEST;
    largest = results + plan.columns * WIDEST;
    sums = largest + WIDEST;
  }
};

// A block of keys and values as copied, and what is computed from it for one part after the other.
struct Block {
  int64_t count;     // keys
  Element *keys;     // [block, steps]
  Element *values;   // [block / NUMBERS, columns]
  Vector *scores;    // [block, WIDEST]
  Elements *weights; // [block / NUMBERS, WIDEST]
};

static void copy_keys(const Plan &plan, const Number *from, int64_t stride, int64_t depth, Block &block) {
  for (int64_t key = 0; key < multiple(block.count, TILE); ++key, from += stride) {
    Element *row = block.keys + key * plan.steps;
    if (key >= block.count) {
      memset(row, 0, plan.steps * sizeof(Element));
      continue;
    }
#if PAIRS
    row[plan.steps - 1] = 0;
    memcpy(row, from, depth * sizeof(Number));
#else
    for (int64_t channel = 0; channel < depth; ++channel) row[channel] = widen(from[channel]);
#endif
  }
}

static void copy_values(const Plan &plan, const Number *from, int64_t stride, int64_t width, Block &block) {
  for (int64_t key = 0; key < multiple(block.count, TILE); key += NUMBERS, from += NUMBERS * stride) {
    Element *row = block.values + key / NUMBERS * plan.columns;
    memset(row + width, 0, (plan.columns - width) * sizeof(Element));
    if (key >= block.count) {
      memset(row, 0, width * sizeof(Element));
      continue;
    }
#if PAIRS
    const bool both = key + 1 < block.count;
    for (int64_t channel = 0; both && channel < width; ++channel)
      row[channel] = from[channel] | (Element)from[stride + channel] << 16;
    for (int64_t channel = 0; !both && channel < width; ++channel) row[channel] = from[channel];
#else
    for (int64_t channel = 0; channel < width; ++channel) row[channel] = widen(from[channel]);
#endif
  }
}

static void start_part(const Plan &plan, const Number *from, int64_t stride, int64_t depth, Part &part) {
  const int64_t lanes = part.vectors * LANES;
  Element *out = (Element *)part.queries;
  memset(out, 0, plan.steps * lanes * sizeof(Element));
  for (int64_t lane = 0; lane < part.count; ++lane)
    for (int64_t channel = 0; channel < depth; ++channel) {
      const Number number = from[(part.first + lane) * stride + channel];
#if PAIRS
      out[channel / 2 * lanes + lane] |= (Element)number << (channel % 2 * 16);
#else
      out[channel * lanes + lane] = widen(number);
#endif
    }
  for (int vector = 0; vector < part.vectors; ++vector) {
    part.largest[vector] = Vector{} - __builtin_inff();
    part.sums[vector] = Vector{};
  }
  memset(part.results, 0, plan.columns * part.vectors * sizeof(Vector));
}

static void finish_part(const Part &part, int64_t width, Number *out, int64_t stride) {
  const int64_t lanes = part.vectors * LANES;
  const float *results = (const float *)part.results, *sums = (const float *)part.sums;
  for (int64_t lane = 0; lane < part.count; ++lane) {
    const float share = 1.0f / sums[lane];
    Number *row = out + (part.first + lane) * stride;
    for (int64_t channel = 0; channel < width; ++channel)
      narrow(results[channel * lanes + lane] * share, row + channel);
  }
}

#if PAIRS
// Two vectors of float32 as one of pairs of bfloat16, rounded to nearest.
static inline Elements paired(Vector even, Vector odd) {
  alignas(64) static const uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (Elements)_mm512_permutexvar_epi16(_mm512_load_si512(ORDER), halves);
}
#endif

// Attention of one part over one block of keys.
template <int VECTORS> static void attend(const Plan &plan, const Block &block, float scale, Part &part) {
  constexpr int ROWS = tile_of(VECTORS);
  const int64_t padded = multiple(block.count, TILE);
  Vector largest[VECTORS], before[VECTORS], total[VECTORS];
  for (int vector = 0; vector < VECTORS; ++vector) largest[vector] = part.largest[vector];
  for (int64_t key = 0; key < padded; key += ROWS) {
    Vector sum[ROWS][VECTORS] = {};
    multiply<ROWS, VECTORS>(sum, block.keys + key * plan.steps, plan.steps, 1, part.queries, plan.steps);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 8
      for (int vector = 0; vector < VECTORS; ++vector) {
        const Vector score = key + row < block.count ? sum[row][vector] * scale : Vector{} - __builtin_inff();
        block.scores[(key + row) * VECTORS + vector] = score;
        largest[vector] = score > largest[vector] ? score : largest[vector];
      }
  }
  for (int vector = 0; vector < VECTORS; ++vector) {
    before[vector] = power_of_two(part.largest[vector] - largest[vector]);
    part.largest[vector] = largest[vector];
    total[vector] = part.sums[vector] * before[vector];
  }
  for (int64_t key = 0; key < padded; key += NUMBERS)
#pragma GCC unroll 8
    for (int vector = 0; vector < VECTORS; ++vector) {
      const Vector *scores = block.scores + key * VECTORS + vector;
      const Vector weights = power_of_two(scores[0] - largest[vector]);
      total[vector] += weights;
#if PAIRS
      const Vector next = power_of_two(scores[VECTORS] - largest[vector]);
      total[vector] += next;
      block.weights[key / 2 * VECTORS + vector] = paired(weights, next);
#else
      block.weights[key * VECTORS + vector] = weights;
#endif
    }
  for (int vector = 0; vector < VECTORS; ++vector) part.sums[vector] = total[vector];
  for (int64_t column = 0; column < plan.columns; column += ROWS) {
    Vector sum[ROWS][VECTORS];
    Vector *results = part.results + column * VECTORS;
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 8
      for (int vector = 0; vector < VECTORS; ++vector)
        sum[row][vector] = results[row * VECTORS + vector] * before[vector];
    multiply<ROWS, VECTORS>(sum, block.values + column, 1, plan.columns, block.weights, padded / NUMBERS);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 8
      for (int vector = 0; vector < VECTORS; ++vector) results[row * VECTORS + vector] = sum[row][vector];
  }
}

// Attention of queries [batch, queries, heads, depth] over keys [batch, keys, heads / shared, depth] and values
// [batch, keys, heads / shared, width]; results are [batch, queries, heads, width].
//
// size: batch, heads, shared, queries, keys, depth, width, all positive. stride: of samples, positions and heads of
// queries, keys, values and results, in numbers. scale: of the scores. Returns 0, or 1 when there is no memory.
extern "C" int attention(const Number *query_data, const Number *key_data, const Number *value_data, Number *out,
                         const int64_t *size, const int64_t *stride, float scale, int threads) {
  const Sizes sizes = {size[0], size[1], size[2], size[3], size[4], size[5], size[6]};
  const Tensor queries(query_data, stride), keys(key_data, stride + 3), values(value_data, stride + 6),
      results(out, stride + 9);
  const Plan plan(sizes, threads);
  const int64_t groups = divided_up(plan.parts, plan.group), tasks = sizes.batch * sizes.heads * groups;
  const float scale_of_two = scale * 1.44269504088896340736f; // exp(x) = 2^(x / log(2))
  int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads((int)least(threads, tasks))
  for (int64_t task = 0; task < tasks; ++task) {
    char *memory = memory_of_thread.of(plan.thread_bytes());
    if (!memory) {
#pragma omp atomic write
      failed = 1;
      continue;
    }
    Block block;
    block.keys = (Element *)memory;
    block.values = (Element *)(memory += plan.keys_bytes());
    block.scores = (Vector *)(memory += plan.values_bytes());
    block.weights = (Elements *)(memory += plan.scores_bytes());
    memory += plan.scores_bytes();
    const int64_t head = task / groups % sizes.heads, sample = task / groups / sizes.heads;
    const int64_t first = task % groups * plan.group, last = least(plan.parts, first + plan.group);
    const Number *head_keys = keys.at(sample, head / sizes.shared);
    const Number *head_values = values.at(sample, head / sizes.shared);
    for (int64_t number = first; number < last; ++number) {
      Part part(plan, sizes, number, memory + (number - first) * plan.part_bytes());
      start_part(plan, queries.at(sample, head), queries.position, sizes.depth, part);
    }
    for (int64_t key = 0; key < sizes.keys; key += plan.block) {
      block.count = least(plan.block, sizes.keys - key);
      copy_keys(plan, head_keys + key * keys.position, keys.position, sizes.depth, block);
      copy_values(plan, head_values + key * values.position, values.position, sizes.width, block);
      for (int64_t number = first; number < last; ++number) {
        Part part(plan, sizes, number, memory + (number - first) * plan.part_bytes());
        if (part.vectors == 1) attend<1>(plan, block, scale_of_two, part);
        if (part.vectors == 2) attend<2>(plan, block, scale_of_two, part);
        if (part.vectors == 3) attend<3>(plan, block, scale_of_two, part);
      }
    }
    for (int64_t number = first; number < last; ++number) {
      const Part part(plan, sizes, number, memory + (number - first) * plan.part_bytes());
      finish_part(part, sizes.width, results.at(sample, head), results.position);
    }
  }
  return failed;
}
