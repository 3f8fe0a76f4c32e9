// Residual encoders, x exp(s) + B relu(A x + b), of many rows: computed in double, rounded once; and what features add
// to distances between what they give.
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

// out [D, N, d], from row `begin` to `end`: what the coordinates of steps s [V, N, d], which end at rows x [V, N, d],
// add to |z(x) - z(x - s)|²; see `Encoders.pull_back`. A hidden unit that changes by no more than no_change has no slope
// of its own. All else as above, in float32.
void mdml_pull_back(int64_t begin, int64_t end, int64_t n_views, int64_t n_rows, int64_t d, int64_t n_encoders,
                    int64_t h, const float* rows, const float* steps, const float* inner, const float* bias,
                    const float* outer, const float* log_scale, float no_change, float* out) {
  static thread_local Buffer<float> inners, outers, inners_back, outers_back, biases, scales;
  static thread_local Buffer<float> at_rows, slopes, units, differences;
  const int64_t high = padded(h), wide = padded(d);
  float *at_row = at_rows.take(ROWS * high), *slope = slopes.take(ROWS * high), *unit = units.take(ROWS * high);
  float *difference = differences.take(ROWS * wide), *scale = scales.take(wide), *shift = biases.take(high);
  for (int64_t e = 0; e < n_encoders; ++e) {
    const float* a = Singles::turned(inner + e * h * d, h, d, inners);
    const float* b = Singles::turned(outer + e * d * h, d, h, outers);
    const float* a_back = Singles::stacked(inner + e * h * d, h, d, inners_back);
    const float* b_back = Singles::stacked(outer + e * d * h, d, h, outers_back);
    for (int64_t j = 0; j < wide; ++j) scale[j] = j < d ? std::exp(log_scale[e * d + j]) : 0.0f;
    for (int64_t j = 0; j < high; ++j) shift[j] = j < h ? bias[e * h + j] : 0.0f;
    for (int64_t first = begin; first < end; first += ROWS) {
      const int64_t n = std::min(ROWS, end - first), from = (e % n_views * n_rows + first) * d;
      const float *x = rows + from, *step = steps + from;
      float* to = out + (e * n_rows + first) * d;
      product(Operands<Singles>{x, a, d, 1, high, d}, n, h, [=](int64_t i, int64_t j, Floats sums, int64_t) INLINE {
        store(at_row + i * high + j, sums + load(shift + j));
      });
      product(Operands<Singles>{step, a, d, 1, high, d}, n, h,
              [=](int64_t i, int64_t j, Floats change, int64_t) INLINE {
                const Floats zero = {}, here = load(at_row + i * high + j);
                const Floats way = larger(here, zero) - larger(here - change, zero);
                const Floats own = magnitude(change) > no_change ? way / change : all(0.5f);
                store(slope + i * high + j, own);
                store(unit + i * high + j, own * change);
              });
      product(Operands<Singles>{unit, b, high, 1, wide, h}, n, d,
              [=](int64_t i, int64_t j, Floats sums, int64_t left) INLINE {
                store(difference + i * wide + j, sums + load_some(step + i * d + j, left, 0.0f) * load(scale + j));
              });
      product(Operands<Singles>{difference, b_back, wide, 1, high, d}, n, h,
              [=](int64_t i, int64_t j, Floats sums, int64_t) INLINE {
                store(unit + i * high + j, sums * load(slope + i * high + j));
              });
      product(Operands<Singles>{unit, a_back, high, 1, wide, h}, n, d,
              [=](int64_t i, int64_t j, Floats sums, int64_t left) INLINE {
                store_some(to + i * d + j, sums + load(difference + i * wide + j) * load(scale + j), left);
              });
    }
  }
}

}  // extern "C"
}  // namespace mdml
