// The margin loss of rows of logits and its parts, for tensors. Strides are counted in floats; null leaves out.
#include "rows.h"

#include <vector>

namespace mdml {
namespace {

// The rows of E episodes of N rows; sixteen at a time, a block, and none across two episodes.
struct Walk {
  const float* logits;
  int64_t episode_stride, row_stride, n_rows, n_classes;

  int64_t blocks() const { return (n_rows + W - 1) / W; }

  Rows rows(int64_t episode, int64_t i) const {
    const float* data = logits + episode * episode_stride + i * row_stride;
    return {data, row_stride, std::min<int64_t>(W, n_rows - i), n_classes};
  }
};

static inline void store_indices(int64_t* to, Ints value, int64_t n) {
  for (int64_t l = 0; l < n; ++l) to[l] = value[l];
}

static inline Ints load_indices(const int64_t* from, int64_t n) {
  Ints value = Ints{} - 1;
  for (int64_t l = 0; l < n; ++l) value[l] = static_cast<int32_t>(from[l]);
  return value;
}

// The weights of the mean over ID rows (negative) and over OOD rows, of n rows.
static inline Floats weights(const uint8_t* is_ood, int64_t n, float by_id, float by_ood) {
  Floats weight = {};
  for (int64_t l = 0; l < n; ++l) weight[l] = is_ood[l] ? by_ood : by_id;
  return weight;
}

}  // namespace

extern "C" {

// Blocks of rows from `begin` to `end`: log_sum [E, N] = log of the sum of e^x without m, whose index goes to first; of all, where first is null. top [E, N].
void mdml_row_statistics(int64_t begin, int64_t end, const float* logits, int64_t episode_stride, int64_t row_stride,
                         int64_t n_rows, int64_t n_classes, const float* tau, float* top, float* log_sum,
                         int64_t* first) {
  const Walk walk = {logits, episode_stride, row_stride, n_rows, n_classes};
  for (int64_t b = begin; b < end; ++b) {
    const int64_t e = b / walk.blocks(), i = b % walk.blocks() * W, at = e * n_rows + i;
    const Rows rows = walk.rows(e, i);
    const Statistics of = statistics(rows, all(tau[e]));
    store_some(top + at, of.top, rows.n);
    store_some(log_sum + at, first ? log_others(of) : log_all(of), rows.n);
    if (first) store_indices(first + at, of.first, rows.n);
  }
}

// Episodes from `begin` to `end`: the hinge loss [E], its slopes by the odds [E, N], and log_sum and first as above.
void mdml_hinge(int64_t begin, int64_t end, const float* logits, int64_t episode_stride, int64_t row_stride,
                int64_t n_rows, int64_t n_classes, const float* tau, const float* background, const uint8_t* is_ood,
                float margin, float* loss, float* slope, float* log_sum, int64_t* first) {
  const Walk walk = {logits, episode_stride, row_stride, n_rows, n_classes};
  for (int64_t e = begin; e < end; ++e) {
    const uint8_t* ood = is_ood + e * n_rows;
    float* odds = slope + e * n_rows;
    const int64_t n_ood = std::count_if(ood, ood + n_rows, [](uint8_t is) { return is; }), n_id = n_rows - n_ood;
    const float by_ood = n_ood ? 1.0f / n_ood : 0.0f, by_id = n_id ? -1.0f / n_id : 0.0f;
    Floats total = {};
    for (int64_t i = 0; i < n_rows; i += W) {
      const Rows rows = walk.rows(e, i);
      const Statistics of = statistics(rows, all(tau[e]));
      const Floats others = log_others(of);
      const Floats o = of.top - (background ? log_add(others, all(background[e])) : others);
      store_some(odds + i, o, rows.n);
      store_some(log_sum + e * n_rows + i, others, rows.n);
      store_indices(first + e * n_rows + i, of.first, rows.n);
      total += weights(ood + i, rows.n, by_id, by_ood) * (LANES < static_cast<int32_t>(rows.n) ? sigmoid_of(o) : all(0.0f));
    }
    // A side without rows: no loss, but for a NaN.
    const float gap = (reduce(total, sum<Floats>)[0] + margin) * (n_ood && n_id ? 1.0f : 0.0f);
    const bool met = gap <= 0.0f;  // which a NaN is not
    loss[e] = met ? 0.0f : gap;
    for (int64_t i = 0; i < n_rows; i += W) {
      const int64_t n = std::min<int64_t>(W, n_rows - i);
      const Floats o = load_some(odds + i, n, 0.0f), weight = met ? all(0.0f) : weights(ood + i, n, by_id, by_ood);
      store_some(odds + i, weight * sigmoid_of(o) * sigmoid_of(-o), n);
    }
  }
}

// Blocks of rows: slopes by the odds [E, N], times those by the losses [E] (null: 1), pulled back: to the logits [E, N, K]; to tau and
// the background, row by row. log_sum and first as above: first null is confidence `mass`.
void mdml_row_gradients(int64_t begin, int64_t end, const float* logits, int64_t episode_stride, int64_t row_stride,
                        int64_t n_rows, int64_t n_classes, const float* tau, const float* background,
                        const float* by_loss, const float* slope, const float* log_sum, const int64_t* first,
                        float* by_logits, float* by_tau, float* by_background) {
  const Walk walk = {logits, episode_stride, row_stride, n_rows, n_classes};
  for (int64_t b = begin; b < end; ++b) {
    const int64_t e = b / walk.blocks(), i = b % walk.blocks() * W, at = e * n_rows + i;
    const Rows rows = walk.rows(e, i);
    const Floats t = all(tau[e]), shift = load_some(log_sum + at, rows.n, 0.0f);
    const Floats by_odds = load_some(slope + at, rows.n, 0.0f) * (by_loss ? by_loss[e] : 1.0f) + (shift - shift);
    Floats kept = all(first ? -1.0f : 1.0f), dropped = all(first ? 0.0f : 1.0f);
    if (first && background) {
      const Floats ahead = shift - background[e];
      kept = -sigmoid_of(ahead), dropped = sigmoid_of(-ahead);
    }
    float* out = by_logits + at * n_classes;
    const Ints at_first = first ? load_indices(first + at, rows.n) : Ints{} - 1;
    gradients(rows, t, shift, by_odds * t * kept, by_odds * t, at_first, out);
    if (by_background) store_some(by_background + at, -(by_odds * dropped), rows.n);
    for (int64_t r = 0; by_tau && r < rows.n; ++r) {
      Floats total = {};
      for (int64_t k = 0; k < n_classes; k += W)
        total += load_some(out + r * n_classes + k, n_classes - k, 0.0f) * load_some(rows.at(r) + k, n_classes - k, 0.0f);
      by_tau[at + r] = reduce(total, sum<Floats>)[0];
    }
  }
}

}  // extern "C"
}  // namespace mdml
