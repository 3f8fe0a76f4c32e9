// Operands of bfloat16, two along the depth to an entry, summed in float32 by the processor's own instruction.
#pragma once

#include "products.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace mdml {

// Of rows [n, width] the width is even; an odd n is filled up with a row of zeros.
struct Pairs {
  using Entry = int32_t;
  using Stored = uint16_t;
  static constexpr Entry one = 0x3f803f80;

  static int64_t depth(int64_t n) { return (n + 1) / 2; }

  static inline Floats fma(Floats sum, Entry a, const Entry* b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)_mm512_loadu_si512(b));
  }

  static inline Floats load(const Stored* from, int64_t n) { return (Floats)(extended(from, n) << 16); }

  static inline void store(Stored* to, Floats value, int64_t n) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)value);
    memcpy(to, &rounded, n >= W ? 2 * W : 2 * n);
  }

  static const Stored* stored(const float* rows, int64_t n, Buffer<Entry>& buffer) {
    auto* to = reinterpret_cast<Stored*>(buffer.take(depth(n)));
    for (int64_t i = 0; i < n; i += W) store(to + i, load_some(rows + i, n - i, 0.0f), n - i);
    return to;
  }

  // Rows [n, width] two by two: [depth(n), padded(width)].
  static const Entry* stacked(const Stored* rows, int64_t n, int64_t width, Buffer<Entry>& buffer) {
    return paired(n, width, buffer, [=](int64_t i, int64_t j) { return extended(rows + i * width + j, width - j); });
  }

  static const Entry* stacked(const float* rows, int64_t n, int64_t width, Buffer<Entry>& buffer) {
    return paired(n, width, buffer, [=](int64_t i, int64_t j) {
      return (Ints)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)load_some(rows + i * width + j, width - j, 0.0f)));
    });
  }

  // Rows [n, width] turned: [depth(width), padded(n)].
  static const Entry* turned(const float* rows, int64_t n, int64_t width, Buffer<Entry>& buffer) {
    static thread_local Buffer<Entry> narrow;
    const Stored* from = stored(rows, n * width, narrow);
    Entry* to = buffer.take(depth(width) * padded(n));
    transpose(reinterpret_cast<const int32_t*>(from), n, depth(width), to);
    return to;
  }

 private:
  static inline Ints extended(const Stored* from, int64_t n) {
    __m256i bits = {};
    if (n >= W)
      bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    else
      memcpy(&bits, from, 2 * n);
    return (Ints)_mm512_cvtepu16_epi32(bits);
  }

  template <class Row>
  static const Entry* paired(int64_t n, int64_t width, Buffer<Entry>& buffer, const Row& row) {
    const int64_t stride = padded(width);
    Entry* to = buffer.take(depth(n) * stride);
    for (int64_t i = 0; i < n; i += 2)
      for (int64_t j = 0; j < width; j += W) {
        const Ints second = i + 1 < n ? row(i + 1, j) : Ints{};
        const Ints pairs = row(i, j) | second << 16;
        memcpy(to + i / 2 * stride + j, &pairs, 4 * W);
      }
    return to;
  }
};

}  // namespace mdml
#endif
