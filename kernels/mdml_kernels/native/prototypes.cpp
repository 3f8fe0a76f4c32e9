// Whole episodes of a residual encoder and a prototype head: embeddings, logits, the outer loss (`bce`, of confidence
// `mass`) and its gradients, one episode after the other, so that all of it stays in the processor's own caches.
#include "bfloat16.h"
#include "layer.h"
#include "margin.h"

#include <cmath>

namespace mdml {

extern "C" {

// Of each episode, one behind the other: n_support rows, whose embeddings are the prototypes, and n_query rows of d
// features; the encoder z = x exp(log_scale) + outer relu(inner x + bias), inner [h, d] and outer [d, h]; the variance
// of the logits -|z - c|^2 / (2 variance); tau and the background (null: 1 and none); the loss, and the gradients to all
// of these but variance and tau. Products take operands of bfloat16 if asked; then n_support, d and h are even.
struct PrototypeProgram {
  int64_t n_support, n_query, d, h, bfloat16;
  const float *support, *query;
  const uint8_t* is_ood;
  const float *log_scale, *inner, *bias, *outer, *variance, *tau, *background;
  float *loss, *by_log_scale, *by_inner, *by_bias, *by_outer, *by_background;
};

}  // extern "C"

namespace {

// A thread's own memory for its episodes.
template <class Kind>
struct Space {
  Buffer<float> rows, z, half_squares, scale, logits, by_odds, by_z, by_center;
  Buffer<typename Kind::Stored> hidden, by_hidden;
  Buffer<typename Kind::Entry> stored, stored_z, stacked, turned;
};

template <class Kind>
class PrototypeEpisode {
 public:
  using Entry = typename Kind::Entry;
  using Stored = typename Kind::Stored;

  PrototypeEpisode(const PrototypeProgram& program, Space<Kind>& space)
      : of(program), n(of.n_support + of.n_query), d(of.d), h(of.h), space(space) {
    rows = space.rows.take(n * d), hidden = space.hidden.take(n * h), z = space.z.take(n * d);
    half_squares = space.half_squares.take(n), scale = space.scale.take(d);
    logits = space.logits.take(of.n_query * of.n_support), by_odds = space.by_odds.take(of.n_query);
    by_z = space.by_z.take(n * d), by_hidden = space.by_hidden.take(n * h);
    by_center = space.by_center.take(of.n_support);
  }

  void gradients(int64_t e) {
    memcpy(rows, of.support + e * of.n_support * d, of.n_support * d * sizeof(float));
    memcpy(rows + of.n_support * d, of.query + e * of.n_query * d, of.n_query * d * sizeof(float));
    embed(e);
    compare(e);
    margin_gradient(e);
    pull_logits(e);
    pull_embeddings(e);
  }

 private:
  const PrototypeProgram& of;
  const int64_t n, d, h;
  Space<Kind>& space;
  // Support, then query rows and their embeddings; logits become their own gradient.
  float *rows, *z, *half_squares, *scale, *logits, *by_odds, *by_z, *by_center;
  Stored *hidden, *by_hidden;
  const Stored* stored_queries;  // embeddings, as products take them

  const float* queries() const { return z + of.n_support * d; }

  // a [m, depth] b, b as Kind lays it out.
  template <class Finish>
  static void times(const Stored* a, const Entry* b, int64_t m, int64_t columns, int64_t depth, const Finish& finish) {
    const int64_t entries = Kind::depth(depth);
    product(Operands<Kind>{reinterpret_cast<const Entry*>(a), b, entries, 1, padded(columns), entries}, m, columns, finish);
  }

  void embed(int64_t e) {
    for (int64_t j = 0; j < d; ++j) scale[j] = std::exp(of.log_scale[e * d + j]);
    const Entry* inner = Kind::turned(of.inner + e * h * d, h, d, space.turned);
    layer_forward<Kind, Kind>({n, d, h}, Kind::stored(rows, n * d, space.stored), inner, of.bias + e * h, true, hidden);
    const Entry* outer = Kind::turned(of.outer + e * d * h, d, h, space.turned);
    times(hidden, outer, n, d, h, [=](int64_t i, int64_t j, Floats sums, int64_t left) INLINE {
      const Floats x = load_some(rows + i * d + j, left, 0.0f);
      store_some(z + i * d + j, sums + x * load_some(scale + j, left, 0.0f), left);
    });
    for (int64_t i = 0; i < n; ++i) {
      Floats squares = {};
      sweep(d, [&](int64_t j, int64_t left) INLINE {
        const Floats value = load_some(z + i * d + j, left, 0.0f);
        squares += value * value;
      });
      half_squares[i] = reduce(squares, sum<Floats>)[0] / 2;
    }
  }

  // The logits of the query rows: (z c - |z|^2 / 2 - |c|^2 / 2) / variance.
  void compare(int64_t e) {
    const float by = 1.0f / of.variance[e], *of_rows = half_squares + of.n_support;
    const int64_t k = of.n_support;
    stored_queries = Kind::stored(queries(), of.n_query * d, space.stored_z);
    const Entry* centers = Kind::turned(z, k, d, space.turned);
    times(stored_queries, centers, of.n_query, k, d, [=](int64_t i, int64_t j, Floats sums, int64_t left) INLINE {
      sums -= of_rows[i] + load_some(half_squares + j, left, 0.0f);
      store_some(logits + i * k + j, sums * by, left);
    });
  }

  void margin_gradient(int64_t e) {
    const int64_t k = of.n_support;
    const EpisodeLogits episode = {logits, k, of.n_query, k, of.tau ? of.tau[e] : 1.0f,
                                   of.background ? of.background + e : nullptr};
    float* by_background = of.by_background ? of.by_background + e : nullptr;
    of.loss[e] = bce_gradient(episode, of.is_ood + e * of.n_query, logits, by_odds, by_background);
  }

  // To the embeddings: of query rows (G c - z ΣG) / variance, of prototypes (G^T z - c ΣG) / variance. A row of G is its
  // slope by the odds times shares that sum to 1.
  void pull_logits(int64_t e) {
    const int64_t k = of.n_support;
    const float by = 1.0f / of.variance[e], *z_of_rows = queries();
    float* by_rows = by_z + k * d;
    const Stored* by_logits = Kind::stored(logits, of.n_query * k, space.stored);
    const Entry* centers = Kind::stacked(z, k, d, space.stacked);
    times(by_logits, centers, of.n_query, d, k, [=](int64_t i, int64_t j, Floats sums, int64_t left) INLINE {
      sums -= by_odds[i] * load_some(z_of_rows + i * d + j, left, 0.0f);
      store_some(by_rows + i * d + j, sums * by, left);
    });
    const Entry* stacked = Kind::stacked(stored_queries, of.n_query, d, space.stacked);
    layer_step<Kind>({of.n_query, d, k}, by_logits, stacked, 1.0f, {}, {by_z, by_center});
    for (int64_t i = 0; i < k; ++i)
      sweep(d, [&](int64_t j, int64_t left) INLINE {
        const Floats sums = load_some(by_z + i * d + j, left, 0.0f);
        store_some(by_z + i * d + j, (sums - by_center[i] * load_some(z + i * d + j, left, 0.0f)) * by, left);
      });
  }

  void pull_embeddings(int64_t e) {
    sweep(d, [&](int64_t j, int64_t left) INLINE {
      Floats total = {};
      for (int64_t i = 0; i < n; ++i)
        total += load_some(by_z + i * d + j, left, 0.0f) * load_some(rows + i * d + j, left, 0.0f);
      store_some(of.by_log_scale + e * d + j, total * load_some(scale + j, left, 0.0f), left);
    });
    const Stored* stored = Kind::stored(by_z, n * d, space.stored);
    layer_step<Kind>({n, h, d}, stored, Kind::stacked(hidden, n, h, space.stacked), 1.0f, {},
                     {of.by_outer + e * d * h, nullptr});
    layer_pull<Kind>({n, h, d}, stored, Kind::stacked(of.outer + e * d * h, d, h, space.stacked), hidden, by_hidden);
    layer_step<Kind>({n, d, h}, by_hidden, Kind::stacked(rows, n, d, space.stacked), 1.0f, {},
                     {of.by_inner + e * h * d, of.by_bias + e * h});
  }
};

template <class Kind>
void run(const PrototypeProgram& program, int64_t begin, int64_t end) {
  static thread_local Space<Kind> space;
  PrototypeEpisode<Kind> episode(program, space);
  for (int64_t e = begin; e < end; ++e) episode.gradients(e);
}

}  // namespace

extern "C" {

extern const int64_t mdml_prototype_program = sizeof(PrototypeProgram);

// Of the episodes from `begin` to `end`.
void mdml_prototype_gradients(int64_t begin, int64_t end, const PrototypeProgram* program) {
  if (program->bfloat16) return run<Bfloat16>(*program, begin, end);
  run<Singles>(*program, begin, end);
}

}  // extern "C"
}  // namespace mdml
