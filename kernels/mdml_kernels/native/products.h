// Products of small matrices: tiles of the result stay in registers, whatever follows is done to them there.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "transpose.h"

namespace mdml {

#ifdef __AVX512F__
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;  // 24 of 32 registers
#else
constexpr int TILE_ROWS = 6, TILE_VECTORS = 2;  // 12 of 16 registers
#endif

static inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

// Memory that is taken again and again, never shrinks and is not cleared. It begins where a cache line does.
template <class T>
class Buffer {
 public:
  T* take(int64_t n) {
    if (n > size) {
      const size_t lines = (n * sizeof(T) + LINE - 1) / LINE;
      values.reset(static_cast<T*>(std::aligned_alloc(LINE, lines * LINE))), size = n;
    }
    return values.get();
  }

  T* get() const { return values.get(); }

 private:
  static constexpr size_t LINE = 64;

  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };

  std::unique_ptr<T[], Free> values;
  int64_t size = 0;
};

// a(i, k) at a[i * row + k * depth]; b(k, j) at b[k * stride + j], readable up to the next whole vector in j.
template <class Kind>
struct Operands {
  const typename Kind::Entry *a, *b;
  int64_t a_row, a_depth, b_stride, depth;
};

// Columns of a product in a vector of its sums.
template <class Kind>
constexpr int lanes = sizeof(typename Kind::Sums) / sizeof(typename Kind::Entry);

// f(0), f(1), … f(N - 1), unrolled however large f is, so that what it indexes can stay in registers.
template <int N, class F>
static inline INLINE void each(const F& f) {
  if constexpr (N > 0) {
    each<N - 1>(f);
    f(N - 1);
  }
}

template <class Kind, int R, int V, class Finish>
static inline INLINE void tile(const Operands<Kind>& of, int64_t i, int64_t j, int64_t n, const Finish& finish) {
  using Sums = typename Kind::Sums;
  constexpr int L = lanes<Kind>;
  Sums sums[R * V];
  const auto* a = of.a + i * of.a_row;
  const auto* b = of.b + j;
  each<R * V>([&](int t) INLINE { sums[t] = Sums{}; });
  for (int64_t k = 0; k < of.depth; ++k, a += of.a_depth, b += of.b_stride)
    each<R * V>([&](int t) INLINE { sums[t] = Kind::fma(sums[t], a[t / V * of.a_row], b + t % V * L); });
  if (n - j >= V * L) {  // a known length leaves no branches in what follows
    each<R * V>([&](int t) INLINE { finish(i + t / V, j + t % V * L, sums[t], int64_t{L}); });
  } else {
    Sums kept[R * V];  // a copy: if a loop indexed the sums themselves, they would be in memory all along
    each<R * V>([&](int t) INLINE { kept[t] = sums[t]; });
    for (int t = 0; t < R * V; ++t) finish(i + t / V, j + t % V * L, kept[t], n - j - t % V * L);
  }
}

// A function of its own, so that the tile has the registers to itself.
template <class Kind, int R, class Finish>
static __attribute__((noinline)) void tile_row(const Operands<Kind>& of, int64_t i, int64_t n, const Finish& finish) {
  constexpr int L = lanes<Kind>;
  int64_t j = 0;
  for (; j + (TILE_VECTORS - 1) * L < n; j += TILE_VECTORS * L) tile<Kind, R, TILE_VECTORS>(of, i, j, n, finish);
  for (; j < n; j += L) tile<Kind, R, 1>(of, i, j, n, finish);
}

// finish(i, j, sums, n): take n (or a whole vector) of a product's entries from (i, j) on. m rows, n columns. Each is
// summed in the order of the depth, so that its bits do not depend on what else is computed.
template <class Kind, class Finish>
static inline void product(const Operands<Kind>& of, int64_t m, int64_t n, const Finish& finish) {
  static_assert(TILE_ROWS == 6);
  const int64_t n_tiles = (m + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t t = 0; t < n_tiles; ++t) {  // tiles of nearly equal height: 64 rows are 9 of 6 and 2 of 5
    const int64_t begin = m * t / n_tiles, end = m * (t + 1) / n_tiles;
    switch (end - begin) {
      case 6: tile_row<Kind, 6>(of, begin, n, finish); break;
      case 5: tile_row<Kind, 5>(of, begin, n, finish); break;
      case 4: tile_row<Kind, 4>(of, begin, n, finish); break;
      case 3: tile_row<Kind, 3>(of, begin, n, finish); break;
      case 2: tile_row<Kind, 2>(of, begin, n, finish); break;
      default: tile_row<Kind, 1>(of, begin, n, finish);
    }
  }
}

// to[column * padded(n_rows) + row] = from[row * n_columns + column], zero where there is no such row. Of 32 bits each.
static inline void transpose(const int32_t* from, int64_t n_rows, int64_t n_columns, int32_t* to) {
  const int64_t stride = padded(n_rows);
  for (int64_t i = 0; i < n_rows; i += W)
    for (int64_t j = 0; j < n_columns; j += W)
      transpose_some(from + i * n_columns + j, n_columns, std::min<int64_t>(W, n_rows - i),
                     std::min<int64_t>(W, n_columns - j), to + j * stride + i, stride);
}

// How operands are kept: `Singles` one float32 by one; see bfloat16.h for `Pairs`, wide.h for doubles. Rows are stored
// side by side as `Stored`; a product takes entries, which lie along its depth, of which a row of n has depth(n).
struct Singles {
  using Entry = float;
  using Stored = float;
  using Sums = Floats;
  static constexpr Entry one = 1.0f;

  static int64_t depth(int64_t n) { return n; }
  static inline Floats fma(Floats sum, Entry a, const Entry* b) { return mdml::fma(sum, all(a), mdml::load(b)); }
  static inline Floats load(const Stored* from, int64_t n) { return load_some(from, n, 0.0f); }
  static inline void store(Stored* to, Floats value, int64_t n) { store_some(to, value, n); }
  static const Stored* stored(const float* rows, int64_t, Buffer<Entry>&) { return rows; }

  // Rows [n, width] one below the other, such that whole vectors can be read: themselves, or with zeros behind each.
  static const Entry* stacked(const Stored* rows, int64_t n, int64_t width, Buffer<Entry>& buffer) {
    const int64_t stride = padded(width);
    if (stride == width) return rows;
    float* to = buffer.take(n * stride);
    std::fill(to, to + n * stride, 0.0f);
    for (int64_t i = 0; i < n; ++i) memcpy(to + i * stride, rows + i * width, 4 * width);
    return to;
  }

  // Rows [n, width] turned: [width, padded(n)].
  static const Entry* turned(const float* rows, int64_t n, int64_t width, Buffer<Entry>& buffer) {
    float* to = buffer.take(width * padded(n));
    transpose(reinterpret_cast<const int32_t*>(rows), n, width, reinterpret_cast<int32_t*>(to));
    return to;
  }
};

}  // namespace mdml
