// Mean distances of rows to their nearest references, and which the nearest is: balls that are too far away are passed
// by, products of short coordinates rule out most of what is in the others, and the last few are measured.
#include <cmath>

#include "balls.h"
#include "wide.h"

namespace mdml {
namespace {

constexpr int64_t MOST = 64;    // neighbours of a row
constexpr int64_t BLOCK = 128;  // rows that meet the balls together

// The squared distance of two rows [d]: each square is rounded to float32, then added in double. In the same order
// whatever W is.
double squared_distance(const float* a, const float* b, int64_t d) {
  constexpr int N = 16, HALF = W / 2;  // added side by side
  static_assert(N % W == 0);
  Doubles sums[N / HALF] = {};
  int64_t i = 0;
  for (; i + N <= d; i += N)
    each<N / HALF>([&](int t) INLINE {
      Rounded x, y;
      memcpy(&x, a + i + t * HALF, sizeof x), memcpy(&y, b + i + t * HALF, sizeof y);
      const Rounded step = x - y;
      sums[t] += __builtin_convertvector(step * step, Doubles);
    });
  double total = 0.0;
  for (int t = 0; t < N / HALF / 2; ++t) {
    const Doubles both = sums[t] + sums[t + N / HALF / 2];
    for (int lane = 0; lane < HALF; ++lane) total += both[lane];
  }
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
  int64_t n = 0, first = -1;  // how many there are, and which is the nearest
  float limit = INFINITE;  // what is farther out, squared, in short coordinates is not among them

  void meet(double value, int64_t which, int64_t k) {
    if (n == k && !(value < squared[n - 1])) return;
    int64_t i = n < k ? n++ : n - 1;
    for (; i && squared[i - 1] > value; --i) squared[i] = squared[i - 1];
    squared[i] = value;
    if (i == 0) first = which;
    if (n == k) limit = squared[k - 1] > 0.0 ? static_cast<float>(squared[k - 1]) * (1.0f + EPSILON) : -INFINITE;
  }

  float mean() const {
    double total = 0.0;
    for (int64_t i = 0; i < n; ++i) total += std::sqrt(squared[i]);
    return n ? static_cast<float>(total / n) : std::nanf("");
  }
};

// What is compared; see mdml_neighbour_distances.
struct Search {
  int64_t n_balls, d, c, f, k;
  const Ball* balls;
  const Coarse::Entry *centres, *columns;
  const float *squares, *fine_references, *references;
  const int64_t* reference_families;
  const float *coarse_rows, *fine_rows, *rows;
  const int64_t* families;
  float left_out;
};

// Rows that meet the balls together.
class Block {
 public:
  Block(const Search& of, int64_t first, int64_t n) : of(of), first(first), n(n), depth(Coarse::depth(of.c)) {
    static thread_local Buffer<Coarse::Entry> narrow;
    static thread_local Buffer<float> rounded;
    const float* coarse = of.coarse_rows + first * of.c;
    entries = reinterpret_cast<const Coarse::Entry*>(Coarse::stored(coarse, n * of.c, narrow));
    float* kept = rounded.take(n * of.c);
    as_kept(coarse, n * of.c, kept);
    for (int64_t i = 0; i < n; ++i) {
      square[i] = dot(kept + i * of.c, kept + i * of.c, of.c) * (1.0f - of.left_out);
      update_reach(i);
    }
    std::fill(reach + n, reach + BLOCK, std::nanf(""));
  }

  // Let the rows meet all balls that may hold one of their nearest references.
  void search() {
    if (!of.n_balls) return;
    static thread_local Buffer<float> held;
    float* apart = held.take(of.n_balls * BLOCK);  // of each row from each centre, squared
    measure_centres(apart);
    meet_nearest(apart);
    for (int64_t b = 0; b < of.n_balls; ++b) {
      int32_t who[BLOCK];
      int64_t m = 0;
      const float surface = of.balls[b].radius + of.balls[b].error;
      for (int64_t i = 0; i < n; i += W) {
        const Floats touching = load(reach + i) + surface;
        each_bit(where_less(load(apart + b * BLOCK + i), touching * touching), [&](int lane) { who[m++] = i + lane; });
      }
      for (int64_t t = 0; t < m; t += TILE_ROWS) look(b, who + t, std::min<int64_t>(TILE_ROWS, m - t));
    }
  }

  const Nearest& nearest_of(int64_t i) const { return nearest[i]; }

 private:
  const Search& of;
  const int64_t first, n, depth;
  const Coarse::Entry* entries;  // coarse coordinates as they are kept [n, depth]
  float square[BLOCK] = {};      // of their lengths
  float reach[BLOCK];            // what is farther away in coarse coordinates is not among the nearest; NaN: nothing more is
  Nearest nearest[BLOCK];

  void update_reach(int64_t i) {
    // A limit below zero gives a NaN.
    reach[i] = std::sqrt(nearest[i].limit) * (1.0f + EPSILON) + (ROUNDED + of.left_out) * std::sqrt(square[i]);
  }

  void measure_centres(float* apart) const {
    static thread_local Buffer<Coarse::Entry> buffer;
    const Coarse::Entry* across = Coarse::turned(of.coarse_rows + first * of.c, n, of.c, buffer);
    const Operands<Coarse> operands = {of.centres, across, depth, 1, padded(n), depth};
    product(operands, of.n_balls, n, [&](int64_t b, int64_t i, Floats sums, int64_t) INLINE {
      store(apart + b * BLOCK + i, of.balls[b].square - 2.0f * sums + load(square + i));
    });
  }

  // So that most other balls are known to be too far away. A ball that was met is infinitely far from then on.
  void meet_nearest(float* apart) {
    for (int64_t i = 0; i < n; i += W) {
      Floats least = all(INFINITE);
      Ints which = {};
      for (int64_t b = 0; b < of.n_balls; ++b) {
        const Floats value = load(apart + b * BLOCK + i);
        const Ints less = value < least;
        least = less ? value : least, which = less ? Ints{} + static_cast<int32_t>(b) : which;
      }
      for (int32_t lane = 0; lane < std::min<int64_t>(W, n - i); ++lane) {
        const int32_t who = i + lane;
        look(which[lane], &who, 1);
        apart[which[lane] * BLOCK + who] = INFINITE;
      }
    }
  }

  // Let some rows, TILE_ROWS at most, meet the references in a ball.
  void look(int64_t ball, const int32_t* who, int64_t m) {
    static_assert(TILE_ROWS == 6);
    switch (m) {
      case 6: return look<6>(ball, who);
      case 5: return look<5>(ball, who);
      case 4: return look<4>(ball, who);
      case 3: return look<3>(ball, who);
      case 2: return look<2>(ball, who);
      default: return look<1>(ball, who);
    }
  }

  template <int R>
  __attribute__((noinline)) void look(int64_t ball, const int32_t* who) {
    constexpr int V = BALL / W;
    const Coarse::Entry *columns = of.columns + ball * depth * BALL, *row[R];
    Floats sums[R * V];
    each<R>([&](int r) INLINE { row[r] = entries + who[r] * depth; });
    each<R * V>([&](int t) INLINE { sums[t] = Floats{}; });
    for (int64_t i = 0; i < depth; ++i)
      each<R * V>([&](int t) INLINE { sums[t] = Coarse::fma(sums[t], row[t / V][i], columns + i * BALL + t % V * W); });
    const float* squares = of.squares + ball * BALL;
    each<R>([&](int r) INLINE {
      const int64_t i = who[r];
      const float limit = reach[i] + of.balls[ball].error;
      Floats apart[V];
      uint32_t near = 0;
      each<V>([&](int v) INLINE {
        apart[v] = load(squares + v * W) - 2.0f * sums[r * V + v] + square[i];
        near |= where_less(apart[v], all(limit * limit)) << (v * W);
      });
      if (!near) return;
      float aparts[BALL];
      each<V>([&](int v) INLINE { store(aparts + v * W, apart[v]); });
      measure(i, ball, near, aparts, squares);
    });
  }

  // Let a row meet those references in a ball that are near by their coarse coordinates.
  __attribute__((noinline)) void measure(int64_t i, int64_t ball, uint32_t near, const float* apart, const float* squares) {
    // The first to be met are the nearest, so that the others may be too far away.
    while (near && nearest[i].n < of.k) {
      int closest = __builtin_ctz(near);
      each_bit(near, [&](int at) { closest = apart[at] < apart[closest] ? at : closest; });
      meet(i, ball, closest, apart[closest], squares[closest]);
      near &= ~(1u << closest);
    }
    each_bit(near, [&](int at) { meet(i, ball, at, apart[at], squares[at]); });
  }

  inline INLINE void meet(int64_t i, int64_t ball, int place, float apart, float length) {
    const int64_t row = first + i, at = ball * BALL + place;
    const float coarse_limit = reach[i] + of.balls[ball].error, before = nearest[i].limit;
    if (!(apart < coarse_limit * coarse_limit)) return;
    if (of.families && of.families[row] == of.reference_families[at]) return;
    if (of.fine_rows) {
      const float finely = short_distance(of.fine_rows + row * of.f, of.fine_references + at * of.f, of.f);
      if (!(finely - of.left_out * (square[i] + length) < before)) return;
    }
    nearest[i].meet(squared_distance(of.rows + row * of.d, of.references + at * of.d, of.d), at, of.k);
    if (nearest[i].limit != before) update_reach(i);
  }
};

}  // namespace

extern "C" {

// What Python sizes memory by.
extern const int64_t mdml_ball = BALL, mdml_most = MOST;

// out [N] of rows [N, d] from `begin` to `end`: the mean distance to the k nearest of the references [n, d], NaN where
// there is none; which [N] (null: not asked for): the place of the nearest, -1 where there is none.
// Balls, centres, columns and squares are as mdml_balls makes them of the coarse coordinates of the references, which
// have to be in their order; nothing is farther apart in coarse coordinates, nor in the fine ones of rows [N, f] and
// references [n, f] (null: none), than it is, but for rounding. The share left_out, a float32's epsilon for each feature
// and coordinate, covers it: of lengths for how coordinates came about, of squares for how they are summed. Families [N] and [n] (null: none): a row is not compared with its own.
void mdml_neighbour_distances(int64_t begin, int64_t end, int64_t n_balls, int64_t d, int64_t c, int64_t f, int64_t k,
                              const Ball* balls, const Coarse::Entry* centres, const Coarse::Entry* columns,
                              const float* squares, const float* fine_references, const float* references,
                              const int64_t* reference_families, const float* coarse_rows, const float* fine_rows,
                              const float* rows, const int64_t* families, float left_out, float* out, int64_t* which) {
  const Search of = {n_balls, d, c, f, k, balls, centres, columns, squares, fine_references, references,
                     reference_families, coarse_rows, fine_rows, rows, families, left_out};
  for (int64_t first = begin; first < end; first += BLOCK) {
    const int64_t n = std::min(BLOCK, end - first);
    const auto block = std::make_unique<Block>(of, first, n);  // too large for the stack of a thread
    block->search();
    for (int64_t i = 0; i < n; ++i) {
      out[first + i] = block->nearest_of(i).mean();
      if (which) which[first + i] = block->nearest_of(i).first;
    }
  }
}

}  // extern "C"
}  // namespace mdml
