// Mean distances of rows to their nearest references: a product rules most of them out, the last few are measured.
#include <algorithm>
#include <cmath>
#include <vector>

#include "wide.h"

namespace mdml {
namespace {

constexpr int64_t CHUNK = 512;  // references whose columns stay in the second-level cache for all rows
constexpr int64_t ROWS = 48;    // shortened at once: they stay in the cache
constexpr int64_t MOST = 64;    // neighbours of a row
constexpr float EPSILON = std::numeric_limits<float>::epsilon();

// The squared distance of two rows [d]: each square is rounded to float32, then added in double.
double squared_distance(const float* a, const float* b, int64_t d) {
  Doubles low = {}, high = {};
  int64_t i = 0;
  for (; i + W <= d; i += W) {
    const Floats step = load(a + i) - load(b + i), square = step * step;
    low += __builtin_convertvector(__builtin_shufflevector(square, square, 0, 1, 2, 3, 4, 5, 6, 7), Doubles);
    high += __builtin_convertvector(__builtin_shufflevector(square, square, 8, 9, 10, 11, 12, 13, 14, 15), Doubles);
  }
  const Doubles sums = low + high;
  double total = 0.0;
  for (int lane = 0; lane < W / 2; ++lane) total += sums[lane];
  for (; i < d; ++i) {
    const float step = a[i] - b[i];
    total += static_cast<double>(step * step);
  }
  return total;
}

// The squared distance of two rows [n] in float32; n is a multiple of W.
float short_distance(const float* a, const float* b, int64_t n) {
  Floats total = {};
  for (int64_t i = 0; i < n; i += W) {
    const Floats step = load(a + i) - load(b + i);
    total += step * step;
  }
  return reduce(total, sum<Floats>)[0];
}

// The k nearest so far.
struct Nearest {
  double squared[MOST];  // least first
  int64_t n = 0;
  float limit = INFINITE;  // what is farther out in short coordinates is not among them

  void meet(double value, int64_t k) {
    if (n == k && !(value < squared[n - 1])) return;
    int64_t i = n < k ? n++ : n - 1;
    for (; i && squared[i - 1] > value; --i) squared[i] = squared[i - 1];
    squared[i] = value;
    if (n == k) limit = squared[k - 1] > 0.0 ? static_cast<float>(squared[k - 1]) * (1.0f + EPSILON) : -INFINITE;
  }
};

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

// out [N] of rows [N, d] from `begin` to `end`: the mean distance to the k nearest of n references [n, d]; NaN where
// there is none. Families [N] and [n] (null: none): a row is not compared with its own.
// In coarse coordinates, [N, c] and [n, c], and in fine ones, [N, f] and [n, f] (null: none), nothing is farther apart
// than it is, but for their rounding.
void mdml_neighbour_distances(int64_t begin, int64_t end, int64_t n, int64_t d, int64_t c, int64_t f, int64_t k,
                              const float* rows, const float* references, const float* coarse_rows,
                              const float* coarse_references, const float* fine_rows, const float* fine_references,
                              const int64_t* families, const int64_t* reference_families, float* out) {
  static thread_local Buffer<float> turned, squares;
  // |a - b|² is computed as |a|² + |b|² - 2ab. What is left out of the squares is more than all rounding adds, also to
  // fine coordinates: their squares have the same sum.
  const float left_out = (std::max(c, f) + d) * EPSILON, kept = 1.0f - left_out;
  std::vector<Nearest> found(end - begin);
  std::vector<float> square_of_row(end - begin);
  for (int64_t i = begin; i < end; ++i)
    for (int64_t j = 0; j < c; ++j) square_of_row[i - begin] += coarse_rows[i * c + j] * coarse_rows[i * c + j];
  float tile[TILE_ROWS * CHUNK];
  for (int64_t first = 0; first < n; first += CHUNK) {
    const int64_t width = std::min(CHUNK, n - first);
    const float* columns = Singles::turned(coarse_references + first * c, width, c, turned);
    float* square = squares.take(CHUNK);
    for (int64_t j = 0; j < width; j += W) {
      Floats total = {};
      for (int64_t i = 0; i < c; ++i) {
        const Floats column = load(columns + i * padded(width) + j);
        total += column * column;
      }
      store_some(square + j, total * kept, width - j);
    }
    for (int64_t i = begin; i < end; i += TILE_ROWS) {
      const int64_t height = std::min<int64_t>(TILE_ROWS, end - i);
      const Operands<Singles> of = {coarse_rows + i * c, columns, c, 1, padded(width), c};
      product(of, height, width, [&tile, square](int64_t r, int64_t j, Floats sums, int64_t left) INLINE {
        store(tile + r * CHUNK + j, load_some(square + j, left, INFINITE) - 2.0f * sums);
      });
      for (int64_t r = i; r < i + height; ++r) {
        Nearest& nearest = found[r - begin];
        const float own = square_of_row[r - begin] * kept;
        const float* others = tile + (r - i) * CHUNK;
        for (int64_t j = 0; j < width; j += W)
          each_bit(where_less(load(others + j) + own, all(nearest.limit)), [&](int lane) {
            const int64_t at = first + j + lane;
            if (!(others[j + lane] + own < nearest.limit)) return;
            if (families && families[r] == reference_families[at]) return;
            if (fine_rows) {
              const float apart = short_distance(fine_rows + r * f, fine_references + at * f, f);
              if (!(apart - left_out * (own + square[j + lane]) < nearest.limit)) return;
            }
            nearest.meet(squared_distance(rows + r * d, references + at * d, d), k);
          });
      }
    }
  }
  for (int64_t i = begin; i < end; ++i) {
    const Nearest& nearest = found[i - begin];
    double total = 0.0;
    for (int64_t j = 0; j < nearest.n; ++j) total += std::sqrt(nearest.squared[j]);
    out[i] = nearest.n ? static_cast<float>(total / nearest.n) : std::nanf("");
  }
}

}  // extern "C"
}  // namespace mdml
