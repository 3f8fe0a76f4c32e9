// Losses of one episode's rows by their log-odds, and what flows back to the logits. See `rows.h` for the letters.
#pragma once

#include "rows.h"

namespace mdml {

// Logits [N, K] of one episode, taken W rows at a time; tau, and the background or null.
struct EpisodeLogits {
  const float* data;
  int64_t row_stride, n_rows, n_classes;
  float tau;
  const float* background;

  Rows rows(int64_t i) const { return {data + i * row_stride, row_stride, std::min<int64_t>(W, n_rows - i), n_classes}; }
};

static inline void store_indices(int64_t* to, Ints value, int64_t n) {
  for (int64_t l = 0; l < n; ++l) to[l] = value[l];
}

static inline Ints load_indices(const int64_t* from, int64_t n) {
  Ints value = Ints{} - 1;
  for (int64_t l = 0; l < n; ++l) value[l] = static_cast<int32_t>(from[l]);
  return value;
}

// What a loss keeps of the rows [N]: its slopes by their odds, the sum of e^x without m, and m.
struct Kept {
  float *slope, *peak, *total;
  int64_t* first;

  Exps exps(int64_t i, int64_t n) const { return {load_some(peak + i, n, 0.0f), load_some(total + i, n, 1.0f)}; }
};

// The weights of the mean over ID rows (negative) and over OOD rows; 0 where a side has none.
struct Sides {
  const uint8_t* is_ood;
  float by_id, by_ood;

  Sides(const uint8_t* is_ood, int64_t n) : is_ood(is_ood) {
    const int64_t n_ood = std::count_if(is_ood, is_ood + n, [](uint8_t is) { return is; }), n_id = n - n_ood;
    by_id = n_id ? -1.0f / n_id : 0.0f, by_ood = n_ood ? 1.0f / n_ood : 0.0f;
  }

  bool both() const { return by_id != 0.0f && by_ood != 0.0f; }

  // Of n rows from i on.
  Floats weights(int64_t i, int64_t n) const {
    Floats weight = {};
    for (int64_t l = 0; l < n; ++l) weight[l] = is_ood[i + l] ? by_ood : by_id;
    return weight;
  }
};

// Values of the first n lanes, 0 in the others, whatever is there.
static inline Floats in_use(Floats value, int64_t n) { return LANES < static_cast<int32_t>(n) ? value : all(0.0f); }

// The log-odds of W rows, from the sum of e^x of the others than m, or of all (`mass`).
static inline Floats odds_of(const EpisodeLogits& of, const Statistics& found, const Exps& exps, bool mass) {
  if (mass) return exps.log_over(all(of.background ? *of.background : 0.0f));
  return of.background ? -log_add(exps.log_over(found.top), *of.background - found.top) : -exps.log_over(found.top);
}

// Slopes by the odds of W rows, as they reach e^(x - peak), the entry m, and the background (0 without one).
struct Pulled {
  Floats at_rest, at_first, by_background;
};

// exps is that sum of e^x of all but m; of all (`mass`).
static inline Pulled pulled(const EpisodeLogits& of, Floats by_odds, const Exps& exps, bool mass) {
  by_odds += exps.total - exps.total;  // a row with a NaN or an infinity has one in all its gradients
  const Floats scaled = by_odds * of.tau, share = scaled / exps.total;
  if (mass) return {share, scaled, -by_odds};
  if (!of.background) return {-share, scaled, all(0.0f)};
  const Floats ahead = exps.log_over(all(*of.background));
  return {-share * sigmoid_of(ahead), scaled, -by_odds * sigmoid_of(-ahead)};
}

// The hinge loss at confidence `max`. Where grad [N, K] is not null, it gets the gradient to long rows, times ahead.
static inline float hinge(const EpisodeLogits& of, const uint8_t* is_ood, float margin, const Kept& kept,
                          float ahead = 1.0f, float* grad = nullptr) {
  const Sides sides(is_ood, of.n_rows);
  Floats total = {};
  for (int64_t i = 0; i < of.n_rows; i += W) {
    const Rows rows = of.rows(i);
    const Statistics found = statistics(rows, all(of.tau), grad ? grad + i * of.n_classes : nullptr);
    const Floats odds = odds_of(of, found, exps_of_others(found), false);
    store_some(kept.slope + i, odds, rows.n);
    store_some(kept.peak + i, found.second, rows.n);
    store_some(kept.total + i, found.others, rows.n);
    store_indices(kept.first + i, found.first, rows.n);
    total += sides.weights(i, rows.n) * in_use(sigmoid_of(odds), rows.n);
  }
  // A side without rows: no loss, but for a NaN.
  const float gap = (reduce(total, sum<Floats>)[0] + margin) * (sides.both() ? 1.0f : 0.0f);
  const bool met = gap <= 0.0f;  // which a NaN is not
  for (int64_t i = 0; i < of.n_rows; i += W) {
    const Rows rows = of.rows(i);
    const Floats odds = load_some(kept.slope + i, rows.n, 0.0f);
    const Floats weight = met ? all(0.0f) : sides.weights(i, rows.n);
    const Floats slope = weight * sigmoid_of(odds) * sigmoid_of(-odds);
    store_some(kept.slope + i, slope, rows.n);
    if (!grad) continue;
    const Pulled to = pulled(of, slope * ahead, kept.exps(i, rows.n), false);
    gradients_of_terms(rows, to.at_rest, to.at_first, load_indices(kept.first + i, rows.n), grad + i * of.n_classes);
  }
  return met ? 0.0f : gap;
}

// Slopes by the odds of W rows pulled back to their logits [n, K]; the result is that by the background. Letters
// as in `pulled`; first is m, or -1 (`mass`).
static inline Floats pull_odds(const EpisodeLogits& of, int64_t i, Floats by_odds, const Exps& exps, Ints first, bool mass,
                               float* by_logits) {
  const Pulled to = pulled(of, by_odds, exps, mass);
  gradients(of.rows(i), all(of.tau), exps.peak, to.at_rest, to.at_first, first, by_logits);
  return to.by_background;
}

// The logits of an episode, side by side, become the gradient of their one-class loss: the mean of -log S.
static inline void one_class_gradient(const EpisodeLogits& of, bool mass, float* logits) {
  for (int64_t i = 0; i < of.n_rows; i += W) {
    const Statistics found = statistics(of.rows(i), all(of.tau));
    const Exps exps = mass ? exps_of_all(found) : exps_of_others(found);
    const Floats by_odds = sigmoid_of(-odds_of(of, found, exps, mass)) * (-1.0f / of.n_rows);
    pull_odds(of, i, by_odds, exps, mass ? Ints{} - 1 : found.first, mass, logits + i * of.n_classes);
  }
}

// The logits of an episode, side by side, become the gradient of the bce loss at confidence `mass`; by_odds [N] gets what
// the entries of each row sum to. Null leaves by_background out.
static inline float bce_gradient(const EpisodeLogits& of, const uint8_t* is_ood, float* logits, float* by_odds,
                                 float* by_background) {
  const Sides sides(is_ood, of.n_rows);
  Floats total = {}, background = {};
  for (int64_t i = 0; i < of.n_rows; i += W) {
    const int64_t n = of.rows(i).n;
    const Statistics found = statistics(of.rows(i), all(of.tau));
    const Exps exps = exps_of_all(found);
    const Floats odds = odds_of(of, found, exps, true), weight = sides.weights(i, n);
    // -log S of ID rows, -log (1 - S) of OOD rows: log(1 + e^y) of minus or plus the odds.
    const Floats y = weight < 0.0f ? -odds : odds, slope = weight * sigmoid_of(y);
    total += in_use(magnitude(weight) * log_add(all(0.0f), y), n);
    background += in_use(pull_odds(of, i, slope, exps, Ints{} - 1, true, logits + i * of.n_classes), n);
    store_some(by_odds + i, slope * of.tau, n);
  }
  if (by_background) *by_background = reduce(background, sum<Floats>)[0];
  return reduce(total, sum<Floats>)[0];
}

}  // namespace mdml
