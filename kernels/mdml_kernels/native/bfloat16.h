// Operands of bfloat16, summed in float32: two along the depth to an entry, by the processor's own instruction; or, where
// it has none, each in a float32 of its own.
#pragma once

#include "products.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace mdml {

// Of rows [n, width] the width is even; an odd n is filled up with a row of zeros.
struct Pairs {
  using Entry = int32_t;
  using Stored = uint16_t;
  using Sums = Floats;
  static constexpr Entry one = 0x3f803f80;

  static int64_t depth(int64_t n) { return (n + 1) / 2; }

  static inline Floats fma(Floats sum, Entry a, const Entry* b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)_mm512_loadu_si512(b));
  }

  static inline Floats load(const Stored* from, int64_t n) {
    return (Floats)((Ints)_mm512_cvtepu16_epi32(some(from, n)) << 16);
  }

  static inline void store(Stored* to, Floats value, int64_t n) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)value);
    if (n >= W) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)rounded);
    memcpy(to, &rounded, 2 * n);
  }

  static const Stored* stored(const float* rows, int64_t n, Buffer<Entry>& buffer) {
    auto* to = reinterpret_cast<Stored*>(buffer.take(depth(n)));
    for (int64_t i = 0; i < n; i += W) store(to + i, load_some(rows + i, n - i, 0.0f), n - i);
    return to;
  }

  // Rows [n, width] two by two: [depth(n), padded(width)].
  template <class Value>
  static const Entry* stacked(const Value* rows, int64_t n, int64_t width, Buffer<Entry>& buffer) {
    const int64_t stride = padded(width);
    Entry* to = buffer.take(depth(n) * stride);
    for (int64_t i = 0; i < n; i += 2)
      for (int64_t j = 0; j < width; j += W) {
        const Value* first = rows + i * width + j;
        const Halves pairs = zipped(first, i + 1 < n ? first + width : nullptr, std::min<int64_t>(W, width - j));
        memcpy(to + i / 2 * stride + j, &pairs, sizeof pairs);
      }
    return to;
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
  using Halves = uint16_t __attribute__((vector_size(4 * W)));

  // n values of two rows (null: zeros), by turns.
  static inline Halves zipped(const float* first, const float* second, int64_t n) {
    const Floats a = load_some(first, n, 0.0f), b = second ? load_some(second, n, 0.0f) : Floats{};
    return by_turns((Halves)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
  }

  static inline Halves zipped(const Stored* first, const Stored* second, int64_t n) {
    const __m256i a = some(first, n), b = second ? some(second, n) : __m256i{};
    return by_turns((Halves)_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
  }

  static inline Halves by_turns(Halves rows) {
    return __builtin_shufflevector(rows, rows, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10,
                                   26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }

  static inline __m256i some(const Stored* from, int64_t n) {
    if (n >= W) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    __m256i bits = {};
    memcpy(&bits, from, 2 * n);
    return bits;
  }
};

using Bfloat16 = Pairs;

}  // namespace mdml
#else
namespace mdml {

// To the nearest number of bfloat16, to the even one where two are; a NaN stays one.
static inline Floats to_bfloat16(Floats x) {
  const Ints bits = (Ints)x, nearest = (bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff;
  return x == x ? (Floats)nearest : x;
}

struct Narrow : Singles {
  static inline void store(Stored* to, Floats value, int64_t n) { store_some(to, to_bfloat16(value), n); }

  static const Stored* stored(const float* rows, int64_t n, Buffer<Entry>& buffer) {
    float* to = buffer.take(n);
    for (int64_t i = 0; i < n; i += W) store(to + i, load(rows + i, n - i), n - i);
    return to;
  }

  static const Entry* stacked(const float* rows, int64_t n, int64_t width, Buffer<Entry>& buffer) {
    const int64_t stride = padded(width);
    float* to = buffer.take(n * stride);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < width; j += W) store(to + i * stride + j, load(rows + i * width + j, width - j), W);
    return to;
  }

  static const Entry* turned(const float* rows, int64_t n, int64_t width, Buffer<Entry>& buffer) {
    Singles::turned(rows, n, width, buffer);
    float* to = buffer.get();
    for (int64_t i = 0; i < width * padded(n); i += W) store(to + i, mdml::load(to + i), W);
    return to;
  }
};

using Bfloat16 = Narrow;

}  // namespace mdml
#endif
