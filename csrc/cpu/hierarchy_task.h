// A task of a search: some consecutive blocks of queries of one batch row and list. Rows and scores
// are in hierarchy_scores.cpp, the searches themselves in hierarchy.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "hierarchy.h"
#include "plan.h"

namespace lowcontext {
namespace hierarchy {

// Keys are scored stretch by stretch, each for all blocks of a task, so that they come from memory
// once: a stretch and the rows fit a level-2 cache of 1 MiB.
constexpr int64_t kStretchBytes = int64_t{1} << 19;
// Panels of keys that a thread has at a time: those of a stretch, and of the last node of each
// block, which is shorter and has a middle of its own.
constexpr int64_t kPanelBytes = kStretchBytes / 4 * 5;

// Scored rows that read one KV head: fp32 [count, row_floats] in Block::rows.
struct RowSet {
  size_t offset;
  int64_t count;
  int64_t kv_head;
};

// One block of queries, its scored rows, and the nodes or chunks that are left of its candidates.
struct Block {
  int64_t number;       // in the call
  int64_t begin, last;  // positions of its first query, in this call or not, and of its last one
  int64_t high;         // end of the candidate tiles
  int64_t node;         // leaves of a whole node of this level
  int32_t* count;
  int32_t* starts;
  std::vector<float> rows;
  std::vector<RowSet> row_sets;
  std::vector<int32_t> left, right;  // nodes [left, right) in leaves; first keys of chunks
  std::vector<float> best;           // their scores
  size_t scored;                     // nodes or chunks that the pass over the keys has scored
  bool listed;                       // the result is written
};

// Unit u of a grid stands for the keys origin + u * size + offset + i * step, 0 <= i < keys.
struct Units {
  int64_t origin, size, offset, keys, step;
};

// Consecutive keys that are scored for all blocks of a task before the next ones.
struct Stretch {
  int64_t begin, keys;
};

// Memory of a thread, kept between tasks.
struct Workspace {
  std::vector<Block> blocks;
  std::vector<int32_t> positions, left, right;
  std::vector<int32_t> units;
  std::vector<int32_t> unpacked;  // first keys of panels
  std::vector<int32_t> slots;     // first panel of each unit of the stretch and row set; -1: none
  std::vector<float> scores, head_best;
  std::vector<uint64_t> ranks;
};

class Task {
 public:
  Task(const Search& search, int64_t batch, int64_t list, int64_t first, int64_t count);

  void tree(const Tree& tree);
  void stage(const Stage& stage);

 private:
  bool lists_all(const Block& b) const { return b.high - low_ <= s_.picks; }
  const void* head_keys(int64_t kv_head) const {
    const int64_t at = batch_ * p_.k.stride_b + kv_head * p_.k.stride_h;
    return static_cast<const char*>(p_.k.data) + at * (p_.dtype == DType::kFloat32 ? 4 : 2);
  }

  // -- scored rows ----------------------------------------------------------------------------

  // Row sets of a block where those of a KV head are together.
  int64_t sets() const {
    const int64_t heads = p_.q_heads / s_.lists;
    return heads / std::min(p_.q_heads / p_.kv_heads, heads);
  }

  void gather_rows(Block& b, bool per_query_head);
  template <typename T>
  void append_rows(Block& b, int64_t head);

  // -- scores ---------------------------------------------------------------------------------

  // Keys of a stretch: whole nodes or chunks of `size` keys, of which `scored` are scored for `sets`
  // row sets.
  int64_t stretch_keys(int64_t size, int64_t scored, int64_t sets) const {
    const int64_t bytes = scored * sets * p_.head_dim * static_cast<int64_t>(sizeof(float));
    return std::max<int64_t>(1, kStretchBytes / bytes) * size;
  }

  // Calls run(block, from, to, stretch) for the nodes or chunks [from, to) of each block whose
  // first keys, which ascend, lie in the stretch.
  template <typename FirstKey, typename Run>
  void by_stretch(int64_t keys, const FirstKey& first_key, const Run& run) {
    size_t left = 0;
    for (Block& b : w_.blocks) {
      b.scored = 0;
      b.best.resize(b.left.size());
      left += b.left.size();
    }
    for (Stretch stretch = {low_ * s_.block_k, keys}; left > 0; stretch.begin += keys) {
      w_.slots.clear();
      for (Block& b : w_.blocks) {
        const size_t from = b.scored;
        while (b.scored < b.left.size() && first_key(b.left[b.scored]) < stretch.begin + keys) {
          ++b.scored;
        }
        if (b.scored > from) run(b, from, b.scored, stretch);
        left -= b.scored - from;
      }
    }
  }

  int64_t representative(int64_t left, int64_t right) const {
    switch (s_.representative) {
      case Representative::kCenter:
        return left + (right - left) / 2;
      case Representative::kFirst:
        return left;
      case Representative::kLast:
      case Representative::kSpread:
        break;
    }
    return right - 1;
  }

  // A call for the rows of a set, with w.scores as its result.
  template <typename Call>
  Call row_scores(const Block& b, const RowSet& set, size_t count, bool accumulate);
  void score(const Block& b, const RowSet& set, bool accumulate);
  void score_units(const Units& units, const Stretch& stretch, Block& b, size_t from);
  void score_panels(const Units& units, const Stretch& stretch, Block& b, size_t from);
  void spread_nodes(const Tree& tree, Block& b, size_t from, size_t to);
  void select_representatives(const Stage& stage, Block& b, size_t from, size_t to);

  // -- selection ------------------------------------------------------------------------------

  uint64_t worst_kept(const std::vector<float>& scores, size_t keep);
  void keep_best(Block& b, int64_t keep);
  void vote(Block& b);
  void list_tiles(Block& b);
  void list_all_tiles(Block& b);
  void list_chunks(Block& b);

  const Search& s_;
  const Problem& p_;
  Workspace& w_;
  const KernelTable& kernels_;
  int64_t batch_, list_;
  int64_t low_;  // first candidate tile
  int64_t row_floats_;
  int64_t panels_ = 0;  // in use
};

}  // namespace hierarchy
}  // namespace lowcontext
