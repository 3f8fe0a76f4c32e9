// W times W values of 32 bits turned in registers.
#pragma once

#include "simd.h"

namespace mdml {

template <int D, class Vector, int... L>
static inline void exchange(Vector& a, Vector& b, std::integer_sequence<int, L...>) {
  const Vector low = __builtin_shufflevector(a, b, (L & D ? W + L - D : L)...);
  b = __builtin_shufflevector(a, b, (L & D ? W + L : L + D)...);
  a = low;
}

template <int D, class Vector>
static inline void exchange_all(Vector (&rows)[W]) {
  for (int i = 0; i < W; ++i)
    if (!(i & D)) exchange<D>(rows[i], rows[i + D], Lanes());
}

template <int D = W / 2, class Vector>
static inline void turn(Vector (&block)[W]) {
  exchange_all<D>(block);
  if constexpr (D > 1) turn<D / 2>(block);
}

// n_columns vectors, `to_stride` apart, from n_rows rows, `from_stride` apart; lanes without a row become zero.
static inline void transpose_some(const int32_t* from, int64_t from_stride, int64_t n_rows, int64_t n_columns,
                                  int32_t* to, int64_t to_stride) {
  if (n_rows == W && n_columns == W) {  // known lengths: no calls
    Ints block[W];
    for (int r = 0; r < W; ++r) memcpy(&block[r], from + r * from_stride, 4 * W);
    turn(block);
    for (int c = 0; c < W; ++c) memcpy(to + c * to_stride, &block[c], 4 * W);
    return;
  }
  Ints block[W] = {};
  for (int64_t r = 0; r < n_rows; ++r) memcpy(&block[r], from + r * from_stride, 4 * n_columns);
  turn(block);
  for (int64_t c = 0; c < n_columns; ++c) memcpy(to + c * to_stride, &block[c], 4 * W);
}

}  // namespace mdml
