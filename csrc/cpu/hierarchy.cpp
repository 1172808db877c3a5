#include "hierarchy.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "../ops.h"
#include "items.h"
#include "launch.h"
#include "vec.h"

namespace lowcontext {
namespace {

// Halvings of a piece of x keys until every part is one key.
int64_t halvings(int64_t x) {
  int64_t levels = 0;
  while ((int64_t{1} << levels) < x) ++levels;
  return levels;
}

// Compares like (score, -index): of equal scores the lower index is the larger.
uint64_t rank_of(float score, size_t index) {
  const uint32_t bits = float_to_bits(score + 0.0f);  // -0 becomes 0
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

// Scored rows that read one KV head: fp32 [count, row_floats] in Workspace::rows.
struct RowSet {
  size_t offset;
  int64_t count;
  int64_t kv_head;
};

// Memory of a thread, kept between tasks.
struct Workspace {
  std::vector<float> rows, scores, best, head_best;
  std::vector<RowSet> row_sets;
  std::vector<int32_t> positions, left, right, next_left, next_right;
  std::vector<uint64_t> ranks;
};

Workspace& workspace() {
  thread_local Workspace space;
  return space;
}

class Task {
 public:
  Task(const Search& search, int64_t i)
      : s_(search), p_(search.problem), w_(workspace()), kernels_(active_kernels()) {
    const int64_t blocks = s_.blocks();
    block_ = blocks - 1 - i % blocks;  // those with the most candidates first
    list_ = i / blocks % s_.lists;
    batch_ = i / blocks / s_.lists;
    begin_ = (s_.first_block() + block_) * s_.block_q;
    last_ = std::min(begin_ + s_.block_q, p_.kv_len) - 1;
    low_ = ceil_div(s_.sink, s_.block_k);
    high_ = std::max(low_, std::max<int64_t>(begin_ - s_.behind - s_.window + 1, 0) / s_.block_k);
    row_floats_ = ceil_div(p_.head_dim, 16) * 16;
    const int64_t row = (batch_ * s_.lists + list_) * blocks + block_;
    count_ = s_.counts + row;
    starts_ = s_.starts + row * s_.width;
  }

  void tree(const Tree& tree);
  void stage(const Stage& stage);

 private:
  bool lists_all() const { return high_ - low_ <= s_.picks; }

  // -- scored rows ----------------------------------------------------------------------------

  void gather_rows(bool per_query_head) {
    const int64_t group = p_.q_heads / p_.kv_heads;
    const int64_t heads = p_.q_heads / s_.lists, first = list_ * heads;
    const int64_t step = per_query_head ? 1 : std::min(group, heads);
    w_.rows.clear();
    w_.row_sets.clear();
    for (int64_t h = first; h < first + heads; h += step) {
      const size_t offset = w_.rows.size();
      for (int64_t i = h; i < h + step; ++i) {
        switch (p_.dtype) {
          case DType::kFloat32:
            append_rows<float>(i);
            break;
          case DType::kBFloat16:
            append_rows<BFloat16>(i);
            break;
          case DType::kFloat16:
            append_rows<Float16>(i);
            break;
        }
      }
      // The kernel takes 1, 2 or a multiple of 4 rows: the last one is repeated.
      auto count = [&] { return static_cast<int64_t>(w_.rows.size() - offset) / row_floats_; };
      while (count() > 2 && count() % 4 != 0) {
        const size_t end = w_.rows.size();
        w_.rows.resize(end + static_cast<size_t>(row_floats_));
        std::copy_n(w_.rows.begin() + (end - row_floats_), row_floats_, w_.rows.begin() + end);
      }
      w_.row_sets.push_back({offset, count(), h / group});
    }
  }

  template <typename T>
  void append_rows(int64_t head) {
    const T* q = static_cast<const T*>(p_.q.data) + batch_ * p_.q.stride_b + head * p_.q.stride_h;
    const int64_t offset = p_.kv_len - p_.q_len;
    for (int64_t at = begin_; at <= last_; at += s_.row_stride) {
      const int64_t end = std::min(at + s_.row_stride, last_ + 1);
      const int64_t first = std::max(s_.mean_rows ? at : end - 1, offset);
      if (first >= end) continue;
      const size_t size = w_.rows.size();
      w_.rows.resize(size + static_cast<size_t>(row_floats_), 0.0f);
      float* row = w_.rows.data() + size;
      for (int64_t r = first; r < end; ++r) {
        const T* query = q + (r - offset) * p_.q.stride_l;
        for (int64_t d = 0; d < p_.head_dim; ++d) row[d] += to_float(query[d]);
      }
      const float queries = static_cast<float>(end - first);
      for (int64_t d = 0; d < p_.head_dim; ++d) row[d] /= queries;
    }
  }

  // -- scores ---------------------------------------------------------------------------------

  // scores[i] = best score of positions[i] among the rows of the set, and among what is there.
  void score(const RowSet& set, size_t count, bool accumulate) {
    ScoreCall call;
    call.dtype = p_.dtype;
    const int64_t head = batch_ * p_.k.stride_b + set.kv_head * p_.k.stride_h;
    const int64_t bytes = p_.dtype == DType::kFloat32 ? 4 : 2;
    call.keys = static_cast<const char*>(p_.k.data) + head * bytes;
    call.stride = p_.k.stride_l;
    call.positions = w_.positions.data();
    call.count = static_cast<int64_t>(count);
    call.rows = w_.rows.data() + set.offset;
    call.num_rows = set.count;
    call.row_stride = row_floats_;
    call.head_dim = p_.head_dim;
    call.accumulate = accumulate;
    if (w_.scores.size() < count) w_.scores.resize(count);
    call.out = w_.scores.data();
    kernels_.best_scores(call);
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

  // The rank of the worst of the `keep` best scores; keep is positive and at most their number.
  uint64_t worst_kept(const std::vector<float>& scores, size_t keep) {
    w_.ranks.resize(scores.size());
    for (size_t i = 0; i < scores.size(); ++i) w_.ranks[i] = rank_of(scores[i], i);
    const auto worst = w_.ranks.begin() + static_cast<std::ptrdiff_t>(keep - 1);
    std::nth_element(w_.ranks.begin(), worst, w_.ranks.end(), std::greater<uint64_t>());
    return *worst;
  }

  void score_nodes(const Tree& tree);
  void select_representatives(const Stage& stage);

  // -- output ---------------------------------------------------------------------------------

  // Sink, the tiles [found, found + num), window; those beyond the last query behind the count.
  void list_tiles(const int32_t* found, int64_t num) {
    const int64_t width = s_.block_k, end = (last_ + s_.ahead) / width + 1;
    int64_t n = 0;
    const auto add = [&](int64_t tile) {
      if (n < s_.width) starts_[n++] = static_cast<int32_t>(tile * width);
    };
    for (int64_t tile = 0; tile < std::min(low_, end); ++tile) add(tile);
    for (int64_t i = 0; i < num; ++i) add(found[i]);
    for (int64_t tile = high_; tile < end; ++tile) add(tile);
    *count_ = static_cast<int32_t>(std::upper_bound(starts_, starts_ + n, last_) - starts_);
    std::fill(starts_ + n, starts_ + s_.width, 0);
  }

  void list_all_tiles() {
    w_.positions.resize(static_cast<size_t>(high_ - low_));
    for (int64_t tile = low_; tile < high_; ++tile) {
      w_.positions[static_cast<size_t>(tile - low_)] = static_cast<int32_t>(tile);
    }
    list_tiles(w_.positions.data(), high_ - low_);
  }

  // Tiles that hold the keys, each with the best of its keys' scores; the best of them are listed.
  void vote(const std::vector<int32_t>& keys, std::vector<float>& scores) {
    std::vector<int32_t>& tiles = w_.positions;
    tiles.clear();
    for (size_t i = 0; i < keys.size(); ++i) {
      const int32_t tile = static_cast<int32_t>(keys[i] / s_.block_k);
      if (tiles.empty() || tiles.back() != tile) {
        tiles.push_back(tile);
        scores[tiles.size() - 1] = scores[i];
      } else {
        scores[tiles.size() - 1] = std::max(scores[tiles.size() - 1], scores[i]);
      }
    }
    scores.resize(tiles.size());
    if (static_cast<int64_t>(tiles.size()) > s_.picks) {
      const uint64_t worst = worst_kept(scores, static_cast<size_t>(s_.picks));
      size_t n = 0;
      for (size_t i = 0; i < tiles.size(); ++i) {
        if (rank_of(scores[i], i) >= worst) tiles[n++] = tiles[i];
      }
      tiles.resize(n);
    }
    list_tiles(tiles.data(), static_cast<int64_t>(tiles.size()));
  }

  const Search& s_;
  const Problem& p_;
  Workspace& w_;
  const KernelTable& kernels_;
  int64_t block_, list_, batch_;
  int64_t begin_, last_;  // positions of the block's first query and of its last one that exists
  int64_t low_, high_;    // candidate tiles
  int64_t row_floats_;
  int32_t* count_;
  int32_t* starts_;
};

// w.best = scores of the nodes [w.left, w.right), which are not empty.
void Task::score_nodes(const Tree& tree) {
  const size_t nodes = w_.left.size();
  const int64_t per_leaf = tree.leaf / tree.key_stride;
  w_.positions.clear();
  for (size_t i = 0; i < nodes; ++i) {
    if (s_.representative == Representative::kSpread) {
      const int64_t first = low_ * s_.block_k + w_.left[i] * tree.leaf;
      const int64_t keys = (w_.right[i] - w_.left[i]) * tree.leaf;
      for (int64_t u = 0; u < per_leaf; ++u) {
        w_.positions.push_back(static_cast<int32_t>(first + (2 * u + 1) * keys / (2 * per_leaf)));
      }
      continue;
    }
    const int64_t leaf = representative(w_.left[i], w_.right[i]);
    const int64_t key = low_ * s_.block_k + leaf * tree.leaf + tree.key_stride - 1;
    for (int64_t u = 0; u < per_leaf; ++u) {
      w_.positions.push_back(static_cast<int32_t>(key + u * tree.key_stride));
    }
  }
  for (size_t set = 0; set < w_.row_sets.size(); ++set) {
    score(w_.row_sets[set], w_.positions.size(), set > 0);
  }
  w_.best.resize(nodes);
  for (size_t i = 0; i < nodes; ++i) {
    const float* each = w_.scores.data() + i * static_cast<size_t>(per_leaf);
    w_.best[i] = *std::max_element(each, each + per_leaf);
  }
}

void Task::tree(const Tree& tree) {
  if (lists_all()) return list_all_tiles();
  gather_rows(false);
  const int64_t leaves = (high_ - low_) * (s_.block_k / tree.leaf);
  const int64_t beam = std::min(tree.beam, leaves);
  w_.left.clear();
  w_.right.clear();
  for (int64_t i = 0; i < beam; ++i) {
    w_.left.push_back(static_cast<int32_t>(i * leaves / beam));
    w_.right.push_back(static_cast<int32_t>((i + 1) * leaves / beam));
  }
  const int64_t levels = halvings(ceil_div(leaves, beam));
  if (levels == 0) score_nodes(tree);
  for (int64_t level = 0; level < levels; ++level) {
    w_.next_left.clear();
    w_.next_right.clear();
    for (size_t i = 0; i < w_.left.size(); ++i) {
      const int32_t left = w_.left[i], right = w_.right[i];
      const int32_t middle = left + (right - left + 1) / 2;
      w_.next_left.push_back(left);
      w_.next_right.push_back(middle);
      if (middle < right) {
        w_.next_left.push_back(middle);
        w_.next_right.push_back(right);
      }
    }
    w_.left.swap(w_.next_left);
    w_.right.swap(w_.next_right);
    score_nodes(tree);
    if (static_cast<int64_t>(w_.left.size()) <= beam) continue;
    const uint64_t worst = worst_kept(w_.best, static_cast<size_t>(beam));
    size_t n = 0;
    for (size_t i = 0; i < w_.left.size(); ++i) {
      if (rank_of(w_.best[i], i) < worst) continue;
      w_.left[n] = w_.left[i];
      w_.right[n] = w_.right[i];
      w_.best[n++] = w_.best[i];
    }
    w_.left.resize(n);
    w_.right.resize(n);
    w_.best.resize(n);
  }
  for (int32_t& leaf : w_.left) {
    leaf = static_cast<int32_t>(low_ * s_.block_k + leaf * tree.leaf);
  }
  vote(w_.left, w_.best);
}

// w.best = scores of the chunks that begin at w.next_left, the largest over the heads of the list.
void Task::select_representatives(const Stage& stage) {
  const std::vector<int32_t>& chunks = w_.next_left;
  const size_t n = chunks.size();
  const int64_t low = low_ * s_.block_k, high = high_ * s_.block_k;
  w_.positions.resize(2 * n);
  w_.left.resize(n);
  w_.right.resize(n);
  w_.best.assign(n, -kInfinity);
  w_.head_best.resize(n);
  for (const RowSet& set : w_.row_sets) {
    for (size_t i = 0; i < n; ++i) {
      w_.left[i] = static_cast<int32_t>(std::max<int64_t>(chunks[i], low));
      w_.right[i] = static_cast<int32_t>(std::min<int64_t>(chunks[i] + stage.chunk, high));
    }
    std::fill(w_.head_best.begin(), w_.head_best.end(), -kInfinity);
    for (int64_t round = std::max<int64_t>(1, halvings(stage.chunk)); round > 0; --round) {
      for (size_t i = 0; i < n; ++i) {
        const int64_t left = w_.left[i], right = w_.right[i];
        const int64_t middle = left + (right - left + 1) / 2;
        const int64_t first = representative(left, middle);
        w_.positions[2 * i] = static_cast<int32_t>(first);
        w_.positions[2 * i + 1] =
            static_cast<int32_t>(middle < right ? representative(middle, right) : first);
      }
      score(set, 2 * n, false);
      for (size_t i = 0; i < n; ++i) {
        const int32_t middle = w_.left[i] + (w_.right[i] - w_.left[i] + 1) / 2;
        const float a = w_.scores[2 * i], b = w_.scores[2 * i + 1];
        (a >= b ? w_.right[i] : w_.left[i]) = middle;
        const float winner = std::max(a, b);
        w_.head_best[i] = stage.last_score ? winner : std::max(w_.head_best[i], winner);
      }
    }
    for (size_t i = 0; i < n; ++i) w_.best[i] = std::max(w_.best[i], w_.head_best[i]);
  }
}

void Task::stage(const Stage& stage) {
  if (stage.final && lists_all()) return list_all_tiles();
  const int64_t low = low_ * s_.block_k, high = high_ * s_.block_k;
  std::vector<int32_t>& chunks = w_.next_left;
  chunks.clear();
  const auto add = [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += stage.chunk) {
      if (std::max(at, low) < std::min(at + stage.chunk, high))
        chunks.push_back(static_cast<int32_t>(at));
    }
  };
  if (stage.starts.data == nullptr) {
    add(low / stage.chunk * stage.chunk, high);
  } else {
    const int64_t kept =
        std::clamp<int64_t>(*stage.counts.at(batch_, list_, block_), 0, stage.starts.size);
    const int32_t* starts = stage.starts.at(batch_, list_, block_);
    for (int64_t i = 0; i < kept; ++i) add(starts[i], starts[i] + stage.chunk_before);
  }
  if (stage.final) {
    gather_rows(true);
    select_representatives(stage);
    return vote(chunks, w_.best);
  }
  if (static_cast<int64_t>(chunks.size()) > s_.width) {
    gather_rows(true);
    select_representatives(stage);
    const uint64_t worst = worst_kept(w_.best, static_cast<size_t>(s_.width));
    size_t n = 0;
    for (size_t i = 0; i < chunks.size(); ++i) {
      if (rank_of(w_.best[i], i) >= worst) chunks[n++] = chunks[i];
    }
    chunks.resize(n);
  }
  *count_ = static_cast<int32_t>(chunks.size());
  std::copy(chunks.begin(), chunks.end(), starts_);
  std::fill(starts_ + chunks.size(), starts_ + s_.width, 0);
}

template <typename Run>
void run_tasks(const Search& search, const Run& run) {
  run_items(search.problem.batch * search.lists * search.blocks(), false, [&](int64_t i) {
    Task task(search, i);
    run(task);
  });
}

}  // namespace

void run_tree(const Search& search, const Tree& tree) {
  run_tasks(search, [&](Task& task) { task.tree(tree); });
}

void run_stage(const Search& search, const Stage& stage) {
  run_tasks(search, [&](Task& task) { task.stage(stage); });
}

}  // namespace lowcontext
