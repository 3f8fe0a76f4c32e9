// Products summed in double, of what was float32 and becomes float32 again, rounded once.
#pragma once

#include "products.h"

namespace mdml {

using Doubles = double __attribute__((vector_size(4 * W)));
using Rounded = float __attribute__((vector_size(2 * W)));

struct Wide {
  using Entry = double;
  using Sums = Doubles;

  static inline Doubles load(const double* from) {
    Doubles value;
    memcpy(&value, from, sizeof value);
    return value;
  }
  static inline void store(double* to, Doubles value) { memcpy(to, &value, sizeof value); }
#if defined(__AVX512F__)
  static inline Doubles fma(Doubles sum, Entry a, const Entry* b) {
    return (Doubles)_mm512_fmadd_pd(_mm512_set1_pd(a), (__m512d)load(b), (__m512d)sum);
  }
#elif defined(__AVX2__) && defined(__FMA__)
  static inline Doubles fma(Doubles sum, Entry a, const Entry* b) {
    return (Doubles)_mm256_fmadd_pd(_mm256_set1_pd(a), (__m256d)load(b), (__m256d)sum);
  }
#else
  static inline Doubles fma(Doubles sum, Entry a, const Entry* b) { return sum + a * load(b); }
#endif

  // The first n lanes.
  static inline void round(float* to, Doubles value, int64_t n) {
    const Rounded rounded = __builtin_convertvector(value, Rounded);
    memcpy(to, &rounded, n >= lanes<Wide> ? sizeof rounded : 4 * n);
  }

  // [n, padded(width)] of entries from[i * row + j * column], zeros behind.
  static double* widened(const float* from, int64_t n, int64_t width, int64_t row, int64_t column,
                         Buffer<double>& buffer) {
    double* to = buffer.take(n * padded(width));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < width; ++j) to[i * padded(width) + j] = from[i * row + j * column];
      std::fill(to + i * padded(width) + width, to + (i + 1) * padded(width), 0.0);
    }
    return to;
  }
};

}  // namespace mdml
