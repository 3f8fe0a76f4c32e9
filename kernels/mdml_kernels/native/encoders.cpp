// Residual encoders, x exp(s) + B relu(A x + b), of many rows: computed in double, rounded once.
#include <cmath>

#include "wide.h"

namespace mdml {
namespace {

constexpr int64_t ROWS = 48;  // at once: they and their hidden units stay in the cache

}  // namespace

extern "C" {

// out [D, N, d] of rows [V, N, d], from row `begin` to `end`: encoder e takes view e % V. The encoders: inner [D, h, d],
// bias [D, h], outer [D, d, h], log_scale [D, d].
void mdml_residual_encoders(int64_t begin, int64_t end, int64_t n_views, int64_t n_rows, int64_t d, int64_t n_encoders,
                            int64_t h, const float* rows, const float* inner, const float* bias, const float* outer,
                            const float* log_scale, float* out) {
  static thread_local Buffer<double> inners, biases, outers, scales, inputs, units;
  for (int64_t e = 0; e < n_encoders; ++e) {
    const double* a = Wide::widened(inner + e * h * d, d, h, 1, d, inners);
    const double* b = Wide::widened(outer + e * d * h, h, d, 1, h, outers);
    const double* shift = Wide::widened(bias + e * h, 1, h, h, 1, biases);
    double* scale = Wide::widened(log_scale + e * d, 1, d, d, 1, scales);
    for (int64_t j = 0; j < d; ++j) scale[j] = std::exp(scale[j]);
    for (int64_t first = begin; first < end; first += ROWS) {
      const int64_t n = std::min(ROWS, end - first);
      const double* x = Wide::widened(rows + (e % n_views * n_rows + first) * d, n, d, d, 1, inputs);
      double* hidden = units.take(n * padded(h));
      float* to = out + (e * n_rows + first) * d;
      product(Operands<Wide>{x, a, padded(d), 1, padded(h), d}, n, h,
              [=](int64_t i, int64_t j, Doubles sums, int64_t) INLINE {
                sums += Wide::load(shift + j);
                Wide::store(hidden + i * padded(h) + j, sums < 0.0 ? Doubles{} : sums);
              });
      product(Operands<Wide>{hidden, b, padded(h), 1, padded(d), h}, n, d,
              [=](int64_t i, int64_t j, Doubles sums, int64_t left) INLINE {
                Wide::round(to + i * d + j, sums + Wide::load(x + i * padded(d) + j) * Wide::load(scale + j), left);
              });
    }
  }
}

}  // extern "C"
}  // namespace mdml
