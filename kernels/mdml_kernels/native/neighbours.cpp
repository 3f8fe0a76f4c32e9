// Mean distances of rows to their nearest references: a product finds candidates, which are then measured exactly.
#include <cmath>
#include <vector>

#include "products.h"

namespace mdml {
namespace {

constexpr int64_t CHUNK = 512;  // references whose columns stay in the second-level cache for all rows
constexpr int64_t MOST = 64;    // candidates of a row

// The nearest so far, nearest first.
struct Candidates {
  float squared[MOST];
  int32_t place[MOST];
  int64_t n = 0, most;

  float bound() const { return n < most ? INFINITE : squared[most - 1]; }

  void meet(float value, int32_t at) {
    int64_t i = n < most ? n++ : most - 1;
    for (; i && squared[i - 1] > value; --i) squared[i] = squared[i - 1], place[i] = place[i - 1];
    squared[i] = value, place[i] = at;
  }
};

// The sum of squares is rounded to float32 square by square, then added in double.
double squared_distance(const float* a, const float* b, int64_t d) {
  double total = 0.0;
  for (int64_t i = 0; i < d; ++i) {
    const float step = a[i] - b[i];
    total += static_cast<double>(step * step);
  }
  return total;
}

// A NaN is no distance: the other one is nearer.
Floats nearer(Floats a, Floats b) { return a < b ? a : b == b ? b : a; }

// Those of squared [n], whose first is reference `begin`, that are nearer than the candidates so far. Padding is far.
void take(const float* squared, int64_t n, int64_t begin, const int64_t* families, int64_t own, Candidates& found) {
  constexpr int64_t step = 4 * W;
  for (int64_t j = 0; j < n; j += step) {
    const float* at = squared + j;
    const Floats least = nearer(nearer(load(at), load(at + W)), nearer(load(at + 2 * W), load(at + 3 * W)));
    const float bound = found.bound();
    if (!(reduce(least < bound ? least : all(INFINITE), nearer)[0] < bound)) continue;
    for (int64_t l = j; l < std::min(n, j + step); ++l)
      if (squared[l] < found.bound() && !(families && families[begin + l] == own))
        found.meet(squared[l], static_cast<int32_t>(begin + l));
  }
}

}  // namespace

extern "C" {

// out [N] of rows [N, d] from `begin` to `end`: the mean distance to the k nearest of n references [n, d], among `most`
// candidates; NaN where there is none. Families [N] and [n] (null: none): a row is not compared with its own.
void mdml_neighbour_distances(int64_t begin, int64_t end, int64_t n, int64_t d, int64_t k, int64_t most,
                              const float* rows, const float* references, const int64_t* families,
                              const int64_t* reference_families, float* out) {
  static thread_local Buffer<float> turned, squares;
  std::vector<Candidates> found(end - begin);
  for (Candidates& one : found) one.most = std::min<int64_t>(most, MOST);
  float tile[TILE_ROWS * CHUNK];
  for (int64_t first = 0; first < n; first += CHUNK) {
    const int64_t width = std::min(CHUNK, n - first);
    if (width < CHUNK) std::fill(tile, tile + TILE_ROWS * CHUNK, INFINITE);
    const float* columns = Singles::turned(references + first * d, width, d, turned);
    float* square = squares.take(padded(CHUNK));
    for (int64_t j = 0; j < width; j += W) {
      Floats total = {};
      for (int64_t i = 0; i < d; ++i) {
        const Floats column = load(columns + i * padded(width) + j);
        total += column * column;
      }
      store(square + j, total);
    }
    for (int64_t i = begin; i < end; i += TILE_ROWS) {
      const int64_t height = std::min<int64_t>(TILE_ROWS, end - i);
      const Operands<Singles> of = {rows + i * d, columns, d, 1, padded(width), d};
      product(of, height, width, [&tile, square](int64_t r, int64_t j, Floats sums, int64_t left) INLINE {
        store_some(tile + r * CHUNK + j, load_some(square + j, left, 0.0f) - 2.0f * sums, left);
      });
      for (int64_t r = 0; r < height; ++r)
        take(tile + r * CHUNK, width, first, families ? reference_families : nullptr, families ? families[i + r] : 0,
             found[i + r - begin]);
    }
  }
  double exact[MOST];
  for (int64_t i = begin; i < end; ++i) {
    const Candidates& near = found[i - begin];
    for (int64_t c = 0; c < near.n; ++c) exact[c] = squared_distance(rows + i * d, references + near.place[c] * d, d);
    const int64_t counted = std::min(k, near.n);
    std::partial_sort(exact, exact + counted, exact + near.n);
    double total = 0.0;
    for (int64_t c = 0; c < counted; ++c) total += std::sqrt(exact[c]);
    out[i] = counted ? static_cast<float>(total / counted) : std::nanf("");
  }
}

}  // extern "C"
}  // namespace mdml
