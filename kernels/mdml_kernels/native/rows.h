// Rows of logits, W at a time: their largest and their sums of e^x, a lane for each; and gradients to them.
// x = tau * logits; m is the first largest x of a row. Short rows are turned into lanes, long ones taken one by one.
#pragma once

#include <algorithm>

#include "transpose.h"

namespace mdml {

constexpr int64_t SHORT = 64;  // above, a row's reductions cost less than turning it

// n rows (up to W) of n_classes logits, side by side in a row.
struct Rows {
  const float* data;
  int64_t stride, n, n_classes;

  const float* at(int64_t i) const { return data + i * stride; }
};

// Of each row: the largest x, the first index of it, the largest x of the others, and the sum of e^(x - second) of the
// others. A row with nothing but -inf beside m has second = -FLT_MAX and others = 1, one with a NaN or an infinity NaN.
struct Statistics {
  Floats top, second, others;
  Ints first;
};

// Logits of short rows by class: of each a vector with a lane for every row.
struct Turned {
  Floats by_class[SHORT];

  explicit Turned(const Rows& rows) {
    for (int64_t k = 0; k < rows.n_classes; k += W)
      transpose_some(reinterpret_cast<const int32_t*>(rows.data + k), rows.stride, rows.n,
                     std::min<int64_t>(W, rows.n_classes - k), reinterpret_cast<int32_t*>(by_class + k), W);
  }
};

static inline Floats not_positive(Floats x) { return lesser(all(0.0f), x); }

// The largest so far, the next largest, and where the first of the former was seen.
struct Leaders {
  Floats top = all(-INFINITE), second = all(LOWEST);
  Ints at = {};

  void meet(Floats x, Ints index) {
    const Floats loser = lesser(x, top);
    second = larger(loser, second);
    at = x > top ? index : at;
    top = larger(x, top);  // a NaN leaves it
  }
};

// m's term of a sum is made 1 and taken away again, which leaves what it was to rounding.
static inline Floats without_one(Floats total) {
  const Floats others = total - 1.0f;
  return others == 0.0f ? all(1.0f) : others;
}

static inline Statistics short_statistics(const Rows& rows, Floats tau) {
  const Turned turned(rows);
  Leaders lead;
  for (int32_t k = 0; k < rows.n_classes; ++k) lead.meet(turned.by_class[k] * tau, Ints{} + k);
  Floats total = {};
  for (int64_t k = 0; k < rows.n_classes; ++k) total += exp_of(not_positive(turned.by_class[k] * tau - lead.second));
  return {lead.top, lead.second, without_one(total) + (lead.top - lead.top), lead.at};
}

// f(k, how many) for the vectors of a row of n; a known length leaves no branches in f.
template <class F>
static inline void sweep(int64_t n, const F& f) {
  int64_t k = 0;
  for (; k + W <= n; k += W) f(k, int64_t{W});
  if (k < n) f(k, n - k);
}

// Lanes past the end of a row hold -inf: no entry is less, and they take no share of any exps.
static inline Floats scaled(const float* from, int64_t n, Floats tau) { return load_some(from, n, -INFINITE) * tau; }

// Each row's vectors are reduced to one; W of those, turned, to a lane for each row. Where it is not null, terms
// [n, n_classes] gets those of the sums, e^(x - second), side by side.
static inline Statistics long_statistics(const Rows& rows, Floats tau, float* terms) {
  Floats tops[W] = {}, seconds[W] = {}, totals[W] = {};
  Ints places[W] = {};
  for (int64_t i = 0; i < rows.n; ++i) {
    Leaders lead;
    Ints vector = {};
    sweep(rows.n_classes, [&](int64_t k, int64_t n) INLINE {
      lead.meet(scaled(rows.at(i) + k, n, tau), vector);
      vector += 1;
    });
    tops[i] = lead.top, seconds[i] = lead.second, places[i] = lead.at;
  }
  turn(tops), turn(seconds), turn(places);
  Statistics found = {tops[0], all(LOWEST), {}, Ints{} + INT32_MAX};
  for (int l = 1; l < W; ++l) found.top = larger(tops[l], found.top);
  for (int l = 0; l < W; ++l) {
    places[l] = tops[l] == found.top ? places[l] * W + l : Ints{} + INT32_MAX;
    found.first = smaller(places[l], found.first);
  }
  for (int l = 0; l < W; ++l) found.second = larger(places[l] == found.first ? seconds[l] : tops[l], found.second);
  for (int64_t i = 0; i < rows.n; ++i) {
    const float second = found.second[i];
    float* to = terms ? terms + i * rows.n_classes : nullptr;
    sweep(rows.n_classes, [&](int64_t k, int64_t n) INLINE {
      const Floats term = exp_of(not_positive(scaled(rows.at(i) + k, n, tau) - second));
      totals[i] += term;
      if (to) store_some(to + k, term, n);
    });
  }
  turn(totals);
  for (int l = 0; l < W; ++l) found.others += totals[l];
  found.others = without_one(found.others) + (found.top - found.top);
  found.first = found.first < static_cast<int32_t>(rows.n_classes) ? found.first : Ints{};
  return found;
}

// terms: of long rows alone, see there.
static inline Statistics statistics(const Rows& rows, Floats tau, float* terms = nullptr) {
  return rows.n_classes <= SHORT ? short_statistics(rows, tau) : long_statistics(rows, tau, terms);
}

// A sum of e^x, total times e^peak. Its logarithm would be rounded at its own size, which is that of what all x share.
struct Exps {
  Floats peak, total;

  Floats log_over(Floats x) const { return (peak - x) + log_of(total); }
};

// Of the others than m, and of all.
static inline Exps exps_of_others(const Statistics& of) { return {of.second, of.others}; }
static inline Exps exps_of_all(const Statistics& of) { return {of.top, 1.0f + of.others * exp_of(of.second - of.top)}; }

// grad [n, n_classes] = at_rest * e^(x - peak), but at_first at the entry first (-1: nowhere). May be in place.
static inline void gradients(const Rows& rows, Floats tau, Floats peak, Floats at_rest, Floats at_first, Ints first,
                             float* grad) {
  const int64_t n = rows.n_classes;
  for (int64_t i = 0; i < rows.n; ++i) {
    float* out = grad + i * n;
    const float rest = at_rest[i], from = peak[i];
    sweep(n, [&](int64_t k, int64_t left) INLINE {
      store_some(out + k, rest * exp_of(scaled(rows.at(i) + k, left, tau) - from), left);
    });
    if (first[i] >= 0) out[first[i]] = at_first[i];
  }
}

static inline void multiply(float* values, int64_t n, float by) {
  sweep(n, [&](int64_t k, int64_t left) INLINE {
    store_some(values + k, by * load_some(values + k, left, 0.0f), left);
  });
}

// `gradients` from the terms of `long_statistics`, in their place.
static inline void gradients_of_terms(const Rows& rows, Floats at_rest, Floats at_first, Ints first, float* terms) {
  for (int64_t i = 0; i < rows.n; ++i, terms += rows.n_classes) {
    multiply(terms, rows.n_classes, at_rest[i]);
    terms[first[i]] = at_first[i];
  }
}

}  // namespace mdml
