// Balls of references: some of them in each, told by a few coarse coordinates.
#pragma once

#include "bfloat16.h"

namespace mdml {

// How coarse coordinates are kept: rounded where that doubles the rate of products, by at most so much of their size.
#ifdef __AVX512BF16__
using Coarse = Pairs;
constexpr float ROUNDED = 1.0f / 256;
#else
using Coarse = Singles;
constexpr float ROUNDED = 0.0f;
#endif

constexpr int64_t BALL = 16;  // references in a ball
static_assert(BALL % W == 0 && BALL <= 32);  // whole vectors, and a bit for each

constexpr float EPSILON = std::numeric_limits<float>::epsilon();

struct Ball {
  float square;  // of its centre's length
  float radius;  // from there to the farthest of its references
  float error;   // how far rounding may have moved one of them
};

static inline float dot(const float* a, const float* b, int64_t n) {
  Floats total = {};
  for (int64_t i = 0; i < n; i += W) total += load_some(a + i, n - i, 0.0f) * load_some(b + i, n - i, 0.0f);
  return reduce(total, sum<Floats>)[0];
}

// Coarse coordinates [n] as they are kept, in float32 again.
static inline void as_kept(const float* from, int64_t n, float* to) {
  static thread_local Buffer<Coarse::Entry> buffer;
  const Coarse::Stored* kept = Coarse::stored(from, n, buffer);
  for (int64_t i = 0; i < n; i += W) store_some(to + i, Coarse::load(kept + i, n - i), n - i);
}

}  // namespace mdml
