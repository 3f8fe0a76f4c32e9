// The margin loss of rows of logits and its parts, for tensors. Strides are counted in floats; null leaves out.
#include "margin.h"

namespace mdml {
namespace {

constexpr int64_t BLOCK = 16;  // rows to a block, none in two episodes

struct Episodes {
  const float* logits;
  int64_t episode_stride, row_stride, n_rows, n_classes;
  const float *tau, *background;

  // f(e, i) for every W rows of the blocks from `begin` to `end`: row i of episode e is the first of them.
  template <class F>
  void each_of_blocks(int64_t begin, int64_t end, const F& f) const {
    const int64_t n_blocks = (n_rows + BLOCK - 1) / BLOCK;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b % n_blocks * BLOCK;
      for (int64_t i = first; i < std::min(first + BLOCK, n_rows); i += W) f(b / n_blocks, i);
    }
  }

  EpisodeLogits at(int64_t e) const {
    const float scale = std::max(tau[e], std::numeric_limits<float>::min());  // T = inf: 0 times -inf would be NaN
    return {logits + e * episode_stride, row_stride, n_rows, n_classes, scale, background ? background + e : nullptr};
  }
};

}  // namespace

extern "C" {

// What Python sizes memory by.
extern const int64_t mdml_block = BLOCK, mdml_short = SHORT;

// Blocks of rows from `begin` to `end`: the largest x; the sum of e^x [E, N] without m, whose index goes to first, as its
// peak and total; of all, where first is null.
void mdml_row_statistics(int64_t begin, int64_t end, const float* logits, int64_t episode_stride, int64_t row_stride,
                         int64_t n_rows, int64_t n_classes, const float* tau, float* top, float* peak,
                         float* total, int64_t* first) {
  const Episodes episodes = {logits, episode_stride, row_stride, n_rows, n_classes, tau, nullptr};
  episodes.each_of_blocks(begin, end, [=](int64_t e, int64_t i) {
    const int64_t at = e * n_rows + i;
    const EpisodeLogits logits = episodes.at(e);
    const Rows rows = logits.rows(i);
    const Statistics of = statistics(rows, all(logits.tau));
    const Exps exps = first ? exps_of_others(of) : exps_of_all(of);
    store_some(top + at, of.top, rows.n);
    store_some(peak + at, exps.peak, rows.n);
    store_some(total + at, exps.total, rows.n);
    if (first) store_indices(first + at, of.first, rows.n);
  });
}

// Episodes from `begin` to `end`: the hinge loss [E], its slopes by the odds [E, N], and peak, total and first as above.
// Of rows longer than SHORT also the gradient [E, N, K] of ahead times each loss, or null.
void mdml_hinge(int64_t begin, int64_t end, const float* logits, int64_t episode_stride, int64_t row_stride,
                int64_t n_rows, int64_t n_classes, const float* tau, const float* background, const uint8_t* is_ood,
                float margin, float* loss, float* slope, float* peak, float* total, int64_t* first, float ahead,
                float* grad) {
  const Episodes episodes = {logits, episode_stride, row_stride, n_rows, n_classes, tau, background};
  for (int64_t e = begin; e < end; ++e) {
    const int64_t at = e * n_rows;
    const Kept kept = {slope + at, peak + at, total + at, first + at};
    loss[e] = hinge(episodes.at(e), is_ood + at, margin, kept, ahead, grad ? grad + at * n_classes : nullptr);
  }
}

// What `mdml_hinge` made of episodes of `size` logits becomes the gradient of by_loss [E] times each loss; where that
// is ahead, it is so already.
void mdml_reweigh(int64_t begin, int64_t end, const float* by_loss, float ahead, int64_t size, float* grad) {
  for (int64_t e = begin; e < end; ++e)
    if (by_loss[e] != ahead) multiply(grad + e * size, size, by_loss[e] / ahead);
}

// Blocks of rows: slopes by the odds [E, N], times those by the losses [E] (null: 1), pulled back: to the logits; to
// tau and the background, row by row. peak, total and first as above: first null is confidence `mass`.
void mdml_row_gradients(int64_t begin, int64_t end, const float* logits, int64_t episode_stride, int64_t row_stride,
                        int64_t n_rows, int64_t n_classes, const float* tau, const float* background,
                        const float* by_loss, const float* slope, const float* peak, const float* total,
                        const int64_t* first, float* by_logits, float* by_tau, float* by_background) {
  const Episodes episodes = {logits, episode_stride, row_stride, n_rows, n_classes, tau, background};
  episodes.each_of_blocks(begin, end, [=](int64_t e, int64_t i) {
    const int64_t at = e * n_rows + i;
    const EpisodeLogits of = episodes.at(e);
    const Rows rows = of.rows(i);
    const Floats by_odds = load_some(slope + at, rows.n, 0.0f) * (by_loss ? by_loss[e] : 1.0f);
    const Ints entries = first ? load_indices(first + at, rows.n) : Ints{} - 1;
    float* out = by_logits + at * n_classes;
    const Exps exps = {load_some(peak + at, rows.n, 0.0f), load_some(total + at, rows.n, 1.0f)};
    const Floats by_b = pull_odds(of, i, by_odds, exps, entries, !first, out);
    if (by_background) store_some(by_background + at, by_b, rows.n);
    for (int64_t r = 0; by_tau && r < rows.n; ++r) {
      Floats total = {};
      for (int64_t k = 0; k < n_classes; k += W) {
        const Floats logit = load_some(rows.at(r) + k, n_classes - k, 0.0f);
        const Floats reached = logit == -INFINITE ? all(0.0f) : logit;  // what is barred has no share of anything
        total += load_some(out + r * n_classes + k, n_classes - k, 0.0f) * reached;
      }
      by_tau[at + r] = reduce(total, sum<Floats>)[0];
    }
  });
}

}  // extern "C"
}  // namespace mdml
