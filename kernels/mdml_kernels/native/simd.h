// Vectors of sixteen floats in the compiler's own terms: it splits them where the machine's registers are narrower.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace mdml {

constexpr int W = 16;  // floats in a vector
using Floats = float __attribute__((vector_size(4 * W)));
using Ints = int32_t __attribute__((vector_size(4 * W)));
using UnalignedFloats = float __attribute__((vector_size(4 * W), aligned(4), may_alias));
using UnalignedInts = int32_t __attribute__((vector_size(4 * W), aligned(4), may_alias));

constexpr float LOWEST = std::numeric_limits<float>::lowest();
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr Ints LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

static inline Floats all(float value) { return Floats{} + value; }
static inline Floats load(const float* from) { return *reinterpret_cast<const UnalignedFloats*>(from); }
static inline void store(float* to, Floats value) { *reinterpret_cast<UnalignedFloats*>(to) = value; }

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

static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
static inline Ints smaller(Ints a, Ints b) { return a < b ? a : b; }

template <class V>
static inline V sum(V a, V b) {
  return a + b;
}

// Every lane the reduction of all lanes, always in the same order.
template <class V, class F>
static inline V reduce(V v, F f) {
  v = f(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = f(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3));
  v = f(v, __builtin_shufflevector(v, v, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1));
  return f(v, __builtin_shufflevector(v, v, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0));
}

// e^x for x up to 0 (and what rounding adds), 0 below -88; a NaN stays one. Cephes' polynomial, within 2 ulp.
static inline Floats exp_of(Floats x) {
  // At -88 the exponent's bits are 0, and so is the power of two. Adding 1.5 * 2^23 rounds to an integer.
  constexpr float low = -88.0f, to_integer = 12582912.0f;
  const Floats y = x < low ? all(low) : x;
  Floats n = y * 1.44269504088896341f + to_integer;
  const Ints power = ((Ints)n << 23) + 0x3f800000;
  n -= to_integer;
  Floats f = y - n * 0.693359375f;
  f += n * 2.12194440e-4f;
  Floats p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
  return p * (Floats)power;
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
