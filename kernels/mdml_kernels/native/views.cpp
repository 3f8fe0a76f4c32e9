// The views of rows: what mdml_fast/data/views.py computes, in one pass; in double, rounded once.
#include <cmath>
#include <limits>

#include "wide.h"

namespace mdml {
namespace {

constexpr int64_t ROWS = 96;  // at once: they stay in the cache

// How far x lies beyond an interval: signed, on a log scale.
double beyond(double x, double low, double high) {
  return x > high ? std::log1p(x - high) : x < low ? -std::log1p(low - x) : 0.0;
}

template <size_t N>
double polynomial(const double (&coefficients)[N], double x) {
  double value = 0.0;
  for (double coefficient : coefficients) value = value * x + coefficient;
  return value;
}

// The normal quantile of a level in (e^-32, 1 - e^-32), or 0 or 1: Moshier, Cephes, ndtri.c.
double normal_quantile(double level) {
  constexpr double P0[] = {-59.96335010141079, 98.00107541859997, -56.67628574690703, 13.931260938727968,
                           -1.2391658386738125};
  constexpr double Q0[] = {1.0, 1.9544885833814176, 4.676279128988815, 86.36024213908905, -225.46268785411937,
                           200.26021238006066, -82.03722561683334, 15.90562251262117, -1.1833162112133};
  constexpr double P1[] = {4.0554489230596245, 31.525109459989388, 57.16281922464213, 44.08050738932008,
                           14.684956192885803, 2.1866330685079025, -0.1402560791713545, -0.03504246268278482,
                           -0.0008574567851546854};
  constexpr double Q1[] = {1.0, 15.779988325646675, 45.39076351288792, 41.3172038254672, 15.04253856929075,
                           2.504649462083094, -0.14218292285478779, -0.03808064076915783, -0.0009332594808954574};
  const double y = level - 0.5, smaller = std::min(level, 1.0 - level);
  if (smaller <= 0.0) return std::copysign(std::numeric_limits<double>::infinity(), y);
  if (smaller > 0.13533528323661270) {  // e^-2
    const double square = y * y;
    return 2.50662827463100050 * (y + y * (square * polynomial(P0, square) / polynomial(Q0, square)));  // √2π
  }
  const double x = std::sqrt(-2.0 * std::log(smaller)), z = 1.0 / x;
  const double tail = x - std::log(x) * z - z * polynomial(P1, z) / polynomial(Q1, z);
  return std::copysign(tail, y);
}

// upper [n]: how many of `left` knots lie below each x [n]. All of them take a step before any takes the next.
void search(const float* x, int64_t n, const float* knots, int64_t left, int32_t* upper) {
  std::fill(upper, upper + n, 0);
  for (int64_t half; left; left -= half) {
    half = (left + 1) / 2;
    for (int64_t i = 0; i < n; ++i) upper[i] += knots[upper[i] + half - 1] < x[i] ? half : 0;
  }
}

// The empirical cdf at x, linear between the knots below and above.
double level_at(double x, const float* knots, const float* levels) {
  const double from = knots[0], low = levels[0], high = levels[1];
  const double share = std::clamp((x - from) / std::max(knots[1] - from, 1e-12), 0.0, 1.0);
  return share < 0.5 ? low + share * (high - low) : high - (1.0 - share) * (high - low);
}

// What is fitted to a column.
struct Column {
  const float *knots, *levels;
  int64_t n_knots;
  double clip, mean;
};

// Three views of values of a column, not yet scaled.
struct Viewed {
  double clipped[ROWS], cdf[ROWS], quantile[ROWS];
};

void view(const float* x, int64_t n, const Column& column, Viewed& viewed) {
  int32_t upper[ROWS];
  search(x, n, column.knots, column.n_knots, upper);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t below = std::clamp<int64_t>(upper[i], 1, column.n_knots - 1) - 1;
    const double level = level_at(x[i], column.knots + below, column.levels + below);
    const double outside = beyond(x[i], column.knots[0], column.knots[column.n_knots - 1]);
    const double within = std::clamp<double>(x[i], -column.clip, column.clip);
    viewed.clipped[i] = within + beyond(x[i], -column.clip, column.clip) - column.mean;
    viewed.cdf[i] = 3.46410161513775459 * (level - 0.5) + outside;  // √12 makes the variance 1
    viewed.quantile[i] = normal_quantile(level) + outside;
  }
}

}  // namespace

extern "C" {

// out [4, N, d] of rows [N, d], from row `begin` to `end`. Fitted: knots and levels [d, K], mean [d], whitening
// [d, d], scales [4].
void mdml_views(int64_t begin, int64_t end, int64_t n_rows, int64_t d, int64_t n_knots, float clip, const float* rows,
                const float* knots, const float* levels, const float* mean, const float* whitening, const float* scales,
                float* out) {
  static thread_local Buffer<double> columns, inputs;
  const double* whiten = Wide::widened(whitening, d, d, d, 1, columns);
  double* clipped = inputs.take(ROWS * d);
  Viewed viewed;
  float x[ROWS];
  int32_t run[ROWS];
  for (int64_t first = begin; first < end; first += ROWS) {
    const int64_t n = std::min(ROWS, end - first);
    float* to[4];
    for (int v = 0; v < 4; ++v) to[v] = out + (v * n_rows + first) * d;
    for (int64_t j = 0; j < d; ++j) {
      int64_t n_runs = 0;  // many columns hold few values: a run of equal ones is computed once
      for (int64_t i = 0; i < n; ++i) {
        const float value = rows[(first + i) * d + j];
        if (!n_runs || value != x[n_runs - 1]) x[n_runs++] = value;
        run[i] = static_cast<int32_t>(n_runs - 1);
      }
      view(x, n_runs, {knots + j * n_knots, levels + j * n_knots, n_knots, clip, mean[j]}, viewed);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = i * d + j;
        clipped[at] = viewed.clipped[run[i]];
        to[0][at] = static_cast<float>(scales[0] * clipped[at]);
        to[1][at] = static_cast<float>(scales[1] * viewed.cdf[run[i]]);
        to[2][at] = static_cast<float>(scales[2] * viewed.quantile[run[i]]);
      }
    }
    product(Operands<Wide>{clipped, whiten, d, 1, padded(d), d}, n, d,
            [=, whitened = to[3]](int64_t i, int64_t j, Doubles sums, int64_t left) INLINE {
              Wide::round(whitened + i * d + j, scales[3] * sums, left);
            });
  }
}

}  // extern "C"
}  // namespace mdml
