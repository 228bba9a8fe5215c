// Group norm of rows with statistics that are updated: sums of each row, totals of the mixed map, and the norm itself.
// What PyTorch computes by ten operators over the rows each, these compute by reading them once.

// CHANNELS is defined by whoever compiles this: for so many a thread keeps scales and shifts on its stack.

// Rows that a thread takes at a time at least.
constexpr int64_t SHARE = 16;

static int threads_for(int64_t rows, int threads) { return (int)most(1, least(threads, rows / SHARE)); }

// Sums over groups of x - center and its square: rows [batch, count, groups * width] to [batch, count, 2, groups].
extern "C" void partials(const Number *rows, const float *center, float *out, int64_t batch, int64_t count,
                         int64_t groups, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(batch * count, threads))
  for (int64_t row = 0; row < batch * count; ++row) {
    const Number *numbers = rows + row * groups * width;
    const float *centers = center + row / count * groups;
    float *first = out + row * 2 * groups, *second = first + groups;
    for (int64_t group = 0; group < groups; ++group, numbers += width) {
      float sum = 0.0f, squares = 0.0f;
      for (int64_t channel = 0; channel < width; ++channel) {
        const float centered = widen(numbers[channel]) - centers[group];
        sum += centered;
        squares += centered * centered;
      }
      first[group] = sum;
      second[group] = squares;
    }
  }
}

// Totals [batch, size] without the old and with the new sums of rows: recorded [batch, positions, size], fresh
// [batch, count, size], index and valid [batch or 1, count] with strides from sample to sample; valid may be null.
extern "C" void totals(const float *before, const float *recorded, const float *fresh, const int64_t *index,
                       int64_t index_stride, const uint8_t *valid, int64_t valid_stride, float *out, int64_t batch,
                       int64_t positions, int64_t count, int64_t size) {
  for (int64_t sample = 0; sample < batch; ++sample) {
    const float *old = recorded + sample * positions * size, *now = fresh + sample * count * size;
    for (int64_t first = 0; first < size; first += LANES) {
      const int64_t lanes = least(LANES, size - first);
      double sums[LANES] = {}; // of many small numbers
      for (int64_t row = 0; row < count; ++row) {
        if (valid && !valid[sample * valid_stride + row]) continue;
        const float *gone = old + index[sample * index_stride + row] * size + first, *come = now + row * size + first;
        for (int64_t lane = 0; lane < lanes; ++lane) sums[lane] += come[lane] - gone[lane];
      }
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t at = sample * size + first + lane;
        out[at] = (float)(before[at] + sums[lane]);
      }
    }
  }
}

// Normalised rows [batch, count, groups * width]: center [batch, groups], sums [batch, 2, groups] of elements of a group,
// weight and bias [groups * width] or null. Channels are at most CHANNELS.
extern "C" void normalise(const Number *rows, const float *center, const float *sums, const Number *weight,
                          const Number *bias, float eps, double elements, Number *out, int64_t batch, int64_t count,
                          int64_t groups, int64_t width, int threads) {
  const int64_t channels = groups * width;
  const int wanted = threads_for(batch * count, threads);
#pragma omp parallel num_threads(wanted)
  for (int64_t sample = 0; sample < batch; ++sample) {
    float scale[CHANNELS], shift[CHANNELS];
    for (int64_t group = 0; group < groups; ++group) {
      const double offset = sums[2 * sample * groups + group] / elements;
      const double square = sums[(2 * sample + 1) * groups + group] / elements;
      const double variance = square - offset * offset;
      // Written so that a NaN stays one.
      const float factor = 1.0f / __builtin_sqrtf((float)(variance < 0.0 ? 0.0 : variance) + eps);
      const float mean = (float)(center[sample * groups + group] + offset);
      for (int64_t channel = group * width; channel < (group + 1) * width; ++channel) {
        scale[channel] = weight ? factor * widen(weight[channel]) : factor;
        shift[channel] = (bias ? widen(bias[channel]) : 0.0f) - mean * scale[channel];
      }
    }
#pragma omp for schedule(static)
    for (int64_t row = sample * count; row < (sample + 1) * count; ++row) {
      const Number *numbers = rows + row * channels;
      Number *results = out + row * channels;
      for (int64_t channel = 0; channel < channels; ++channel)
        narrow(widen(numbers[channel]) * scale[channel] + shift[channel], results + channel);
    }
  }
}
