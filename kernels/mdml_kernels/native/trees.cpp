// Decision trees, each walked by a block of rows side by side: what one row waits for is loaded while others compare.
#include <algorithm>
#include <cstdint>

namespace mdml {
namespace {

constexpr int64_t BLOCK = 256;       // rows that share a tree's nodes while these are in the cache
constexpr int LEVELS = 5;            // between two looks at who has arrived
constexpr int64_t SIDE_BY_SIDE = 8;  // rows whose changes are noted together

// Its left child is the next node, its right one `right` nodes away. A leaf has 0 there, and a NaN as threshold.
struct Node {
  float threshold;
  uint16_t feature, right;

  // Not by a branch: it would be foreseen wrongly every other time.
  const Node* next(const float* row) const {
    const int64_t left = row[feature] <= threshold;
    return this + left + (right & -int64_t{!(row[feature] <= threshold)});
  }
};

// Rows on their way through a tree.
struct Walkers {
  const Node* at[BLOCK];
  const float* row[BLOCK];
  int64_t place[BLOCK], n;

  // Not inlined: the compiler would send one walker down several levels, each of which waits for the one before.
  __attribute__((noinline)) void descend() {
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; ++j) at[j] = at[j]->next(row[j]);
  }

  // Note in leaves [BLOCK] how far each has come; those that have arrived are left behind.
  void note(const Node** leaves) {
    int64_t walking = 0;
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; ++j) {
      const Node* const node = at[j];
      const float* const own = row[j];
      const int64_t i = place[j];
      leaves[i] = node;
      at[walking] = node, row[walking] = own, place[walking] = i;
      walking += node->right != 0;
    }
    n = walking;
  }
};

}  // namespace

extern "C" {

// means [N], of rows [N, d] from `begin` to `end`: of the values of the leaves they arrive at in all trees, whose roots
// are at roots [trees].
void mdml_tree_means(int64_t begin, int64_t end, int64_t n_trees, int64_t d, const Node* nodes, const int64_t* roots,
                     const float* values, const float* rows, float* means) {
  Walkers walkers;
  const Node* arrived[BLOCK];
  for (int64_t first = begin; first < end; first += BLOCK) {
    const int64_t height = std::min(BLOCK, end - first);
    double totals[BLOCK] = {};
    for (int64_t t = 0; t < n_trees; ++t) {
      for (int64_t i = 0; i < height; ++i)
        walkers.at[i] = nodes + roots[t], walkers.row[i] = rows + (first + i) * d, walkers.place[i] = i;
      for (walkers.n = height; walkers.n; walkers.note(arrived))
        for (int level = 0; level < LEVELS; ++level) walkers.descend();
      for (int64_t i = 0; i < height; ++i) totals[i] += values[arrived[i] - nodes];
    }
    for (int64_t i = 0; i < height; ++i) means[first + i] = static_cast<float>(totals[i] / n_trees);
  }
}

// out [N, d], zero before: of rows [N, d] the changes of value at each split on their ways down, summed by the split's
// feature and averaged over the trees.
void mdml_tree_changes(int64_t begin, int64_t end, int64_t n_trees, int64_t d, const Node* nodes, const int64_t* roots,
                       const float* values, const float* rows, float* out) {
  for (int64_t first = begin; first < end; first += SIDE_BY_SIDE) {
    const int64_t n = std::min(SIDE_BY_SIDE, end - first);
    for (int64_t t = 0; t < n_trees; ++t) {
      const Node* at[SIDE_BY_SIDE];
      std::fill(at, at + n, nodes + roots[t]);
      for (bool walking = true; walking;) {
        walking = false;
        for (int64_t i = 0; i < n; ++i) {  // who has arrived stays, and changes by nothing
          const Node* next = at[i]->next(rows + (first + i) * d);
          out[(first + i) * d + at[i]->feature] += (values[next - nodes] - values[at[i] - nodes]) / n_trees;
          at[i] = next;
          walking |= next->right != 0;
        }
      }
    }
  }
}

}  // extern "C"
}  // namespace mdml
