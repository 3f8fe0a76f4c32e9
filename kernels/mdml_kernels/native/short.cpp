// Few coordinates for many: no two rows are farther apart in them than they are.
#include <cmath>

#include "products.h"

namespace mdml {
namespace {

constexpr int64_t ROWS = 48;  // shortened at once: they stay in the cache

}  // namespace

extern "C" {

// fine [N, f]: the short coordinates of rows [N, d], which are first taken from the centre [d]: along f - 1 orthonormal
// directions [d, f], whose last column is zero, and then how far a row is from what these span. coarse [N, c] (null:
// none): along the first c - 1 of them, and then how far it is from those. f and c are multiples of W.
void mdml_short_coordinates(int64_t begin, int64_t end, int64_t d, int64_t f, int64_t c, const float* rows,
                            const float* centre, const float* directions, float* fine, float* coarse) {
  static thread_local Buffer<float> inputs, turned;
  float* x = inputs.take(ROWS * padded(d));
  const float* back = Singles::turned(directions, d, f, turned);
  for (int64_t first = begin; first < end; first += ROWS) {
    const int64_t n = std::min(ROWS, end - first);
    float* along = fine + first * f;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < padded(d); ++j) x[i * padded(d) + j] = j < d ? rows[(first + i) * d + j] - centre[j] : 0.0f;
    product(Operands<Singles>{x, directions, padded(d), 1, f, d}, n, f,
            [=](int64_t i, int64_t j, Floats sums, int64_t) INLINE { store(along + i * f + j, sums); });
    // What is left is measured, not computed from the norms: their difference would be all rounding.
    product(Operands<Singles>{along, back, f, 1, padded(d), f}, n, d, [=](int64_t i, int64_t j, Floats sums, int64_t) INLINE {
      store(x + i * padded(d) + j, load(x + i * padded(d) + j) - sums);
    });
    for (int64_t i = 0; i < n; ++i) {
      Floats squared = {};
      for (int64_t j = 0; j < d; j += W) squared += load(x + i * padded(d) + j) * load(x + i * padded(d) + j);
      along[i * f + f - 1] = std::sqrt(reduce(squared, sum<Floats>)[0]);
    }
    for (int64_t i = 0; coarse && i < n; ++i) {
      const float* from = along + i * f;
      float *to = coarse + (first + i) * c, squared = 0.0f;
      std::copy(from, from + c, to);
      for (int64_t j = c - 1; j < f; ++j) squared += from[j] * from[j];
      to[c - 1] = std::sqrt(squared);
    }
  }
}

}  // extern "C"
}  // namespace mdml
