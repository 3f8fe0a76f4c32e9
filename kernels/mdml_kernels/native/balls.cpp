// Gathers references into balls: most balls will be too far from a row to look into.
#include "balls.h"

#include <cmath>
#include <numeric>
#include <vector>

namespace mdml {
namespace {

constexpr int ROUNDS = 2;  // of the power iteration that finds where rows are spread

// Rows [n, stride] that are put in order, and their places along a direction.
struct Gathering {
  const float* rows;
  int64_t stride;  // a multiple of W
  int64_t* order;
  float* along;

  const float* row(int64_t i) const { return rows + order[i] * stride; }

  void add(float* to, const float* from, float factor) const {
    for (int64_t i = 0; i < stride; i += W) store(to + i, load(to + i) + factor * load(from + i));
  }

  // Rows such that each BALL of them are close together: half of them by where they are along the direction of their
  // spread, then half of each half, and so on.
  void gather(int64_t begin, int64_t end) const {
    const int64_t n = end - begin;
    if (n <= BALL) return;
    const std::vector<float> direction = spread(begin, end);
    for (int64_t i = begin; i < end; ++i) along[order[i]] = dot(row(i), direction.data(), stride);
    const int64_t cut = begin + std::max<int64_t>(1, n / BALL / 2) * BALL;
    const auto before = [this](int64_t a, int64_t b) { return along[a] < along[b]; };
    std::nth_element(order + begin, order + cut, order + end, before);
    gather(begin, cut);
    gather(cut, end);
  }

  // About the main direction of rows around their mean; zero where all are alike.
  std::vector<float> spread(int64_t begin, int64_t end) const {
    std::vector<float> mean(stride), direction(stride), next(stride);
    for (int64_t i = begin; i < end; ++i) add(mean.data(), row(i), 1.0f / static_cast<float>(end - begin));
    float farthest = -1.0f;
    for (int64_t i = begin; i < end; ++i) {
      std::copy(mean.begin(), mean.end(), next.begin());
      add(next.data(), row(i), -1.0f);
      const float squared = dot(next.data(), next.data(), stride);
      if (squared > farthest) farthest = squared, direction.swap(next);
    }
    for (int round = 0; round < ROUNDS; ++round) {
      const float length = std::sqrt(dot(direction.data(), direction.data(), stride));
      if (!(length > 0.0f)) break;
      for (float& value : direction) value /= length;
      const float centre = dot(mean.data(), direction.data(), stride);
      std::fill(next.begin(), next.end(), 0.0f);
      float total = 0.0f;
      for (int64_t i = begin; i < end; ++i) {
        const float place = dot(row(i), direction.data(), stride) - centre;
        add(next.data(), row(i), place);
        total += place;
      }
      add(next.data(), mean.data(), -total);
      direction.swap(next);
    }
    return direction;
  }
};

}  // namespace

extern "C" {

// order [n], whole numbers from 0 to n - 1: rows [n, c] such that each BALL of them that follow one another are close.
void mdml_gather(int64_t, int64_t, int64_t n, int64_t c, const float* rows, int64_t* order) {
  Buffer<float> buffer;
  std::vector<float> along(n);
  std::iota(order, order + n, 0);
  Gathering{Singles::stacked(rows, n, c, buffer), padded(c), order, along.data()}.gather(0, n);
}

// Balls from `begin` to `end` of references whose coarse coordinates are rows [n, c], BALL to each: columns
// [b, c, BALL], the squared lengths of these [b, BALL], infinite where there is no reference, and centres [b, c]. c is
// even. left_out: the share of lengths and squares that covers all rounding, but for that of what is kept.
void mdml_balls(int64_t begin, int64_t end, int64_t n, int64_t c, const float* rows, Coarse::Entry* columns,
                float* squares, Coarse::Stored* centres, Ball* balls, float left_out) {
  static thread_local Buffer<float> taken;
  static thread_local Buffer<Coarse::Entry> turned, narrow;
  // Products of bfloat16 take what is smaller than a normal number for nothing.
  const float lost = 4.0f * static_cast<float>(c) * std::numeric_limits<float>::min();
  float* own = taken.take((BALL + 2) * c);
  float *centre = own + BALL * c, *step = centre + c;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t m = std::min(BALL, n - b * BALL);
    for (int64_t i = 0; i < BALL; ++i) as_kept(rows + (b * BALL + std::min(i, m - 1)) * c, c, own + i * c);
    const int64_t n_entries = Coarse::depth(c) * BALL;
    memcpy(columns + b * n_entries, Coarse::turned(own, BALL, c, turned), n_entries * sizeof(*columns));
    for (int64_t j = 0; j < c; ++j) {
      step[j] = 0.0f;
      for (int64_t i = 0; i < BALL; ++i) step[j] += own[i * c + j] / BALL;
    }
    as_kept(step, c, centre);
    memcpy(centres + b * c, Coarse::stored(centre, c, narrow), c * sizeof(*centres));
    float longest = 0.0f, widest = 0.0f;
    for (int64_t i = 0; i < BALL; ++i) {
      const float square = dot(own + i * c, own + i * c, c);
      for (int64_t j = 0; j < c; ++j) step[j] = own[i * c + j] - centre[j];
      longest = std::max(longest, square), widest = std::max(widest, dot(step, step, c));
      squares[b * BALL + i] = i < m ? square * (1.0f - left_out) - lost : INFINITE;
    }
    balls[b] = {dot(centre, centre, c) * (1.0f - left_out) - lost, std::sqrt(widest) * (1.0f + left_out),
                std::sqrt(longest) * (ROUNDED + left_out)};
  }
}

}  // extern "C"
}  // namespace mdml
