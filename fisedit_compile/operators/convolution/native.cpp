// The transforms of Winograd's F(2x2, 3x3) (arXiv 1509.09308, section 4.1) around the products of a convolution.
//
// A tile reads a patch of 4x4 positions and gives 2x2 outputs. patches reads the positions where the table says and
// writes transformed patches; outputs reads 16 products for each tile and writes the rows that are wanted, wherever their
// tiles are. Both go through memory once.

typedef float Loose __attribute__((vector_size(4 * LANES), aligned(4)));

static inline Vector load(const float *from) { return *(const Loose *)from; }
static inline void store(Vector vector, float *to) { *(Loose *)to = vector; }

// One dimension of the transform of a patch: of four values that lie so far apart.
static inline void transform(Vector *values, int apart) {
  const Vector first = values[0], second = values[apart], third = values[2 * apart], fourth = values[3 * apart];
  values[0] = first - third;
  values[apart] = second + third;
  values[2 * apart] = third - second;
  values[3 * apart] = second - fourth;
}

// Transformed patches [16, count, channels] of the tiles first to first + count of all samples.
//
// source: [batch, length, channels]. table: [batch or 1, tiles, 16], positions in a sample's source; table_stride: from
// sample to sample, 0 where all have one. channels are a multiple of LANES.
extern "C" void patches(const float *source, int64_t length, int64_t channels, const int64_t *table,
                        int64_t table_stride, int64_t tiles, int64_t first, int64_t count, float *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t number = 0; number < count; ++number) {
    const int64_t sample = (first + number) / tiles, tile = (first + number) % tiles;
    const int64_t *positions = table + sample * table_stride + tile * 16;
    const float *from[16];
    for (int tap = 0; tap < 16; ++tap) from[tap] = source + (sample * length + positions[tap]) * channels;
    for (int64_t channel = 0; channel < channels; channel += LANES) {
      Vector values[16];
#pragma GCC unroll 16
      for (int tap = 0; tap < 16; ++tap) values[tap] = load(from[tap] + channel);
#pragma GCC unroll 4
      for (int column = 0; column < 4; ++column) transform(values + column, 4);
#pragma GCC unroll 4
      for (int row = 0; row < 4; ++row) transform(values + 4 * row, 1);
#pragma GCC unroll 16
      for (int tap = 0; tap < 16; ++tap) store(values[tap], out + (tap * count + number) * channels + channel);
    }
  }
}

// Rows [batch, count, channels] from products.
//
// products: 16 for each step tiles of all samples, of [step, channels], the last ones of fewer tiles. place, which:
// [batch or 1, count], the tile of each row and which of its outputs (row by row) it is; strides as for patches. bias:
// [channels] or null. channels are a multiple of LANES.
extern "C" void outputs(const float *const *products, int64_t step, int64_t channels, const int64_t *place,
                        int64_t place_stride, const int64_t *which, int64_t which_stride, int64_t tiles, int64_t batch,
                        int64_t count, const float *bias, float *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t number = 0; number < batch * count; ++number) {
    const int64_t sample = number / count, row = number % count;
    // Padding rows may have any place.
    const int64_t tile = sample * tiles + most(0, least(place[sample * place_stride + row], tiles - 1));
    const int64_t output = which[sample * which_stride + row];
    const int down = output / 2 % 2, across = output % 2;
    // An output sums three of four taps in each dimension: all of the first three, or the second less the others.
    const float *from[9];
    for (int tap = 0; tap < 9; ++tap)
      from[tap] = products[tile / step * 16 + (tap / 3 + down) * 4 + tap % 3 + across] + tile % step * channels;
    const float vertical = down ? -1.0f : 1.0f, horizontal = across ? -1.0f : 1.0f;
    for (int64_t channel = 0; channel < channels; channel += LANES) {
      Vector sums[3];
#pragma GCC unroll 3
      for (int tap = 0; tap < 3; ++tap)
        sums[tap] = load(from[3 * tap] + channel) +
                    horizontal * (load(from[3 * tap + 1] + channel) + load(from[3 * tap + 2] + channel));
      Vector sum = sums[0] + vertical * (sums[1] + sums[2]);
      if (bias) sum += load(bias + channel);
      store(sum, out + number * channels + channel);
    }
  }
}
