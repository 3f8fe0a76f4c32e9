// Vectors of as many floats as a register of the machine holds, in the compiler's own terms. Wider ones would be split,
// and kept in memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define INLINE __attribute__((always_inline))

namespace mdml {

// Floats in a vector.
#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
using Floats = float __attribute__((vector_size(4 * W)));
using Ints = int32_t __attribute__((vector_size(4 * W)));

constexpr float LOWEST = std::numeric_limits<float>::lowest();
constexpr float INFINITE = std::numeric_limits<float>::infinity();

using Lanes = std::make_integer_sequence<int, W>;

template <int... L>
constexpr Ints numbered(std::integer_sequence<int, L...>) {
  return Ints{L...};
}
constexpr Ints LANES = numbered(Lanes());

static inline Floats all(float value) { return value - Floats{}; }  // adding 0 would have to be done, as of -0 it is 0
static inline void store(float* to, Floats value) { memcpy(to, &value, sizeof value); }
static inline Floats load(const float* from) {
  Floats value;
  memcpy(&value, from, sizeof value);
  return value;
}

// The first n lanes from memory, the others as given.
static inline Floats load_some(const float* from, int64_t n, float others) {
  if (n >= W) return load(from);
  Floats value = all(others);
  memcpy(&value, from, 4 * n);
  return value;
}

static inline void store_some(float* to, Floats value, int64_t n) {
  if (n >= W) return store(to, value);
  memcpy(to, &value, 4 * n);
}

// The larger and the lesser, the second where one is a NaN; and a bit for each lane in which a is less than b, the first
// lane's the lowest, not where one is a NaN.
#if defined(__AVX512F__)
static inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
static inline Floats lesser(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
static inline uint32_t where_less(Floats a, Floats b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ); }
#elif defined(__AVX2__)
static inline Floats larger(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
static inline Floats lesser(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
static inline uint32_t where_less(Floats a, Floats b) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ));
}
#else
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
static inline Floats lesser(Floats a, Floats b) { return a < b ? a : b; }
static inline uint32_t where_less(Floats a, Floats b) {
  const Ints holds = a < b;
  uint32_t found = 0;
  for (int lane = 0; lane < W; ++lane) found |= (holds[lane] & 1u) << lane;
  return found;
}
#endif

// f(lane) for each bit.
template <class F>
static inline INLINE void each_bit(uint32_t bits, const F& f) {
  for (; bits; bits &= bits - 1) f(__builtin_ctz(bits));
}

static inline Ints smaller(Ints a, Ints b) { return a < b ? a : b; }

template <class V>
static inline V sum(V a, V b) {
  return a + b;
}

template <int BY, class V, int... L>
static inline V rotated(V v, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(v, v, ((L + BY) % W)...);
}

// Every lane the reduction of all lanes, always in the same order.
template <int BY = W / 2, class V, class F>
static inline V reduce(V v, F f) {
  v = f(v, rotated<BY>(v, Lanes()));
  if constexpr (BY > 1)
    return reduce<BY / 2>(v, f);
  else
    return v;
}

// sum + a b, rounded once where x86 can. Left to the compiler it may be so here and not there, and bits would depend on
// how a loop was unrolled.
#if defined(__AVX512F__)
static inline Floats fma(Floats sum, Floats a, Floats b) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
}
#elif defined(__AVX2__) && defined(__FMA__)
static inline Floats fma(Floats sum, Floats a, Floats b) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
}
#else
static inline Floats fma(Floats sum, Floats a, Floats b) { return sum + a * b; }
#endif

// value * 2^n for a whole n that e^NOTHING gives, and for larger ones up to 0, for that one 0; and the nearest whole
// number.
#ifdef __AVX512F__
constexpr float NOTHING = -105.0f;
static inline Floats times_power(Floats value, Floats n) { return (Floats)_mm512_scalef_ps((__m512)value, (__m512)n); }
static inline Floats rounded(Floats x) { return (Floats)_mm512_roundscale_ps((__m512)x, 0); }
#else
constexpr float NOTHING = -88.0f;  // where the exponent's bits become 0
static inline Floats times_power(Floats value, Floats n) {
  return value * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
}
static inline Floats rounded(Floats x) {
  constexpr float coarse = 12582912.0f;  // 1.5 * 2^23, to which no fraction can be added
  return (x + coarse) - coarse;
}
#endif

// e^x for x up to 0 (and what rounding adds), 0 up to NOTHING; a NaN stays one. Within 2 ulp from -5 on; log2 e is one
// float, which below that costs a quarter of -x ulp.
static inline Floats exp_of(Floats x) {
  const Floats y = larger(all(NOTHING), x), log2_e = all(1.44269504088896341f);
  const Floats n = rounded(y * log2_e);
  const Floats f = fma(-n, y, log2_e);
  // Minimax of 2^f on half of 1 to either side, to 2e-9 of it.
  Floats p = f * 1.534581e-4f + 1.3399931e-3f;
  p = p * f + 9.618489e-3f;
  p = p * f + 5.5503286e-2f;
  p = p * f + 2.4022646e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return times_power(p, n);
}

// log x for normal x > 0; a NaN or an infinity gives NaN. Cephes' polynomial, within 2 ulp.
static inline Floats log_of(Floats x) {
  const Ints bits = (Ints)x;
  Ints exponent = (bits >> 23) - 127;
  Floats f = (Floats)((bits & 0x007fffff) | 0x3f800000);
  const Ints large = f > 1.41421356237f;
  exponent = large ? exponent + 1 : exponent;
  f = (large ? f * 0.5f : f) - 1.0f;
  const Floats e = __builtin_convertvector(exponent, Floats), square = f * f;
  Floats p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * square - e * 2.12194440e-4f - square * 0.5f;
  return f + p + e * 0.693359375f + (x - x);
}

static inline Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

// 1 / (1 + e^-x)
static inline Floats sigmoid_of(Floats x) {
  const Floats e = exp_of(-magnitude(x));
  return (x < 0.0f ? e : all(1.0f)) / (1.0f + e);
}

// log(e^a + e^b)
static inline Floats log_add(Floats a, Floats b) {
  return larger(a, b) + log_of(1.0f + exp_of(-magnitude(a - b)));
}

}  // namespace mdml
