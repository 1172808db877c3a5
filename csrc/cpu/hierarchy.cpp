#include "hierarchy.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>

#include "../common/order.h"
#include "../ops.h"
#include "items.h"
#include "launch.h"
#include "vec.h"

namespace lowcontext {
namespace {

// Blocks of queries that a task searches together, at most.
constexpr int64_t kTaskBlocks = 8;
// Tasks for each thread where there are fewer blocks than that takes.
constexpr int64_t kTasksPerThread = 4;
// Keys are scored stretch by stretch, each for all blocks of a task, so that they come from memory
// once: a stretch and the rows fit a level-2 cache of 1 MiB.
constexpr int64_t kStretchBytes = int64_t{1} << 19;

// Halvings of a piece of x keys until every part is one key.
int64_t halvings(int64_t x) {
  int64_t levels = 0;
  while ((int64_t{1} << levels) < x) ++levels;
  return levels;
}

// Compares like (score, -index): of equal scores the lower index is the larger.
uint64_t rank_of(float score, size_t index) {
  const uint32_t last = 0xffffffffu - static_cast<uint32_t>(index);
  return static_cast<uint64_t>(order_key(score)) << 32 | last;
}

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

// Memory of a thread, kept between tasks.
struct Workspace {
  std::vector<Block> blocks;
  std::vector<int32_t> positions, left, right;
  std::vector<float> scores, head_best;
  std::vector<uint64_t> ranks;
};

Workspace& workspace() {
  thread_local Workspace space;
  return space;
}

class Task {
 public:
  Task(const Search& search, int64_t batch, int64_t list, int64_t first, int64_t count)
      : s_(search),
        p_(search.problem),
        w_(workspace()),
        kernels_(active_kernels()),
        batch_(batch),
        list_(list),
        low_(ceil_div(s_.sink, s_.block_k)),
        row_floats_(ceil_div(p_.head_dim, 16) * 16) {
    w_.blocks.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      Block& b = w_.blocks[static_cast<size_t>(i)];
      b.number = first + i;
      b.begin = (s_.first_block() + b.number) * s_.block_q;
      b.last = std::min(b.begin + s_.block_q, p_.kv_len) - 1;
      const int64_t keys = b.begin - s_.behind - s_.window + 1;
      b.high = std::max(low_, std::max<int64_t>(keys, 0) / s_.block_k);
      const int64_t row = (batch * s_.lists + list) * s_.blocks() + b.number;
      b.count = s_.counts + row;
      b.starts = s_.starts + row * s_.width;
      b.node = 1;
      b.left.clear();
      b.right.clear();
      b.listed = false;
    }
  }

  void tree(const Tree& tree);
  void stage(const Stage& stage);

 private:
  bool lists_all(const Block& b) const { return b.high - low_ <= s_.picks; }
  int64_t key_bytes() const { return p_.dtype == DType::kFloat32 ? 4 : 2; }

  // -- scored rows ----------------------------------------------------------------------------

  // The rows of each KV head together, or of each query head for itself.
  void gather_rows(Block& b, bool per_query_head) {
    const int64_t group = p_.q_heads / p_.kv_heads;
    const int64_t heads = p_.q_heads / s_.lists, first = list_ * heads;
    const int64_t step = per_query_head ? 1 : std::min(group, heads);
    b.rows.clear();
    b.row_sets.clear();
    for (int64_t h = first; h < first + heads; h += step) {
      const size_t offset = b.rows.size();
      for (int64_t i = h; i < h + step; ++i) {
        switch (p_.dtype) {
          case DType::kFloat32:
            append_rows<float>(b, i);
            break;
          case DType::kBFloat16:
            append_rows<BFloat16>(b, i);
            break;
          case DType::kFloat16:
            append_rows<Float16>(b, i);
            break;
        }
      }
      // The kernel takes 1, 2 or a multiple of 4 rows: the last one is repeated.
      auto count = [&] { return static_cast<int64_t>(b.rows.size() - offset) / row_floats_; };
      while (count() > 2 && count() % 4 != 0) {
        const size_t end = b.rows.size();
        b.rows.resize(end + static_cast<size_t>(row_floats_));
        std::copy_n(b.rows.begin() + (end - row_floats_), row_floats_, b.rows.begin() + end);
      }
      b.row_sets.push_back({offset, count(), h / group});
    }
  }

  template <typename T>
  void append_rows(Block& b, int64_t head) {
    const T* q = static_cast<const T*>(p_.q.data) + batch_ * p_.q.stride_b + head * p_.q.stride_h;
    const int64_t offset = p_.kv_len - p_.q_len;
    for (int64_t at = b.begin; at <= b.last; at += s_.row_stride) {
      const int64_t end = std::min(at + s_.row_stride, b.last + 1);
      const int64_t first = std::max(s_.mean_rows ? at : end - 1, offset);
      if (first >= end) continue;
      const size_t size = b.rows.size();
      b.rows.resize(size + static_cast<size_t>(row_floats_), 0.0f);
      float* row = b.rows.data() + size;
      for (int64_t r = first; r < end; ++r) {
        const T* query = q + (r - offset) * p_.q.stride_l;
        for (int64_t d = 0; d < p_.head_dim; ++d) row[d] += to_float(query[d]);
      }
      const float queries = static_cast<float>(end - first);
      for (int64_t d = 0; d < p_.head_dim; ++d) row[d] /= queries;
    }
  }

  // -- scores ---------------------------------------------------------------------------------

  // Calls run(block, from, to) for the nodes or chunks [from, to) of each block whose first keys,
  // which ascend, lie in one stretch of the keys; stretch by stretch. One key in `sparsity` is
  // scored.
  template <typename FirstKey, typename Run>
  void by_stretch(int64_t sparsity, const FirstKey& first_key, const Run& run) {
    const int64_t scored = std::max<int64_t>(1, kStretchBytes / (p_.head_dim * key_bytes()));
    const int64_t keys = scored * sparsity;
    size_t left = 0;
    for (Block& b : w_.blocks) {
      b.scored = 0;
      b.best.resize(b.left.size());
      left += b.left.size();
    }
    for (int64_t end = low_ * s_.block_k + keys; left > 0; end += keys) {
      for (Block& b : w_.blocks) {
        const size_t from = b.scored;
        while (b.scored < b.left.size() && first_key(b.left[b.scored]) < end) ++b.scored;
        if (b.scored > from) run(b, from, b.scored);
        left -= b.scored - from;
      }
    }
  }

  // w.scores[i] = best score of w.positions[i] among the rows of the set, and among what is there.
  void score(const Block& b, const RowSet& set, bool accumulate) {
    const size_t count = w_.positions.size();
    ScoreCall call;
    call.dtype = p_.dtype;
    const int64_t head = batch_ * p_.k.stride_b + set.kv_head * p_.k.stride_h;
    call.keys = static_cast<const char*>(p_.k.data) + head * key_bytes();
    call.stride = p_.k.stride_l;
    call.positions = w_.positions.data();
    call.count = static_cast<int64_t>(count);
    call.rows = b.rows.data() + set.offset;
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

  void score_nodes(const Tree& tree, Block& b, size_t from, size_t to);
  void select_representatives(const Stage& stage, Block& b, size_t from, size_t to);
  void score_keys(int64_t unit, Block& b, size_t from, size_t to);

  // -- selection ------------------------------------------------------------------------------

  // The rank of the worst of the `keep` best scores; keep is positive and at most their number.
  uint64_t worst_kept(const std::vector<float>& scores, size_t keep) {
    w_.ranks.resize(scores.size());
    for (size_t i = 0; i < scores.size(); ++i) w_.ranks[i] = rank_of(scores[i], i);
    const auto worst = w_.ranks.begin() + static_cast<std::ptrdiff_t>(keep - 1);
    std::nth_element(w_.ranks.begin(), worst, w_.ranks.end(), std::greater<uint64_t>());
    return *worst;
  }

  // Drops all but the best `keep` nodes or chunks.
  void keep_best(Block& b, int64_t keep) {
    if (static_cast<int64_t>(b.left.size()) <= keep) return;
    const uint64_t worst = worst_kept(b.best, static_cast<size_t>(keep));
    size_t n = 0;
    for (size_t i = 0; i < b.left.size(); ++i) {
      if (rank_of(b.best[i], i) < worst) continue;
      b.left[n] = b.left[i];
      if (!b.right.empty()) b.right[n] = b.right[i];
      b.best[n++] = b.best[i];
    }
    b.left.resize(n);
    if (!b.right.empty()) b.right.resize(n);
    b.best.resize(n);
  }

  // The best tiles that the keys b.left lie in are listed, each scored as the best of its keys.
  void vote(Block& b) {
    size_t n = 0;
    for (size_t i = 0; i < b.left.size(); ++i) {
      const int32_t tile = static_cast<int32_t>(b.left[i] / s_.block_k);
      if (n > 0 && b.left[n - 1] == tile) {
        b.best[n - 1] = std::max(b.best[n - 1], b.best[i]);
      } else {
        b.left[n] = tile;
        b.best[n++] = b.best[i];
      }
    }
    b.left.resize(n);
    b.best.resize(n);
    b.right.clear();
    keep_best(b, s_.picks);
    list_tiles(b);
  }

  // Writes sink, the tiles b.left and window; those beyond the last query behind the count.
  void list_tiles(Block& b) {
    const int64_t width = s_.block_k, end = (b.last + s_.ahead) / width + 1;
    int64_t n = 0;
    const auto add = [&](int64_t tile) {
      if (n < s_.width) b.starts[n++] = static_cast<int32_t>(tile * width);
    };
    for (int64_t tile = 0; tile < std::min(low_, end); ++tile) add(tile);
    for (const int32_t tile : b.left) add(tile);
    for (int64_t tile = b.high; tile < end; ++tile) add(tile);
    *b.count = static_cast<int32_t>(std::upper_bound(b.starts, b.starts + n, b.last) - b.starts);
    std::fill(b.starts + n, b.starts + s_.width, 0);
    b.left.clear();
    b.listed = true;
  }

  void list_all_tiles(Block& b) {
    b.left.clear();
    for (int64_t tile = low_; tile < b.high; ++tile) b.left.push_back(static_cast<int32_t>(tile));
    list_tiles(b);
  }

  void list_chunks(Block& b) {
    *b.count = static_cast<int32_t>(b.left.size());
    std::copy(b.left.begin(), b.left.end(), b.starts);
    std::fill(b.starts + b.left.size(), b.starts + s_.width, 0);
    b.left.clear();
    b.listed = true;
  }

  const Search& s_;
  const Problem& p_;
  Workspace& w_;
  const KernelTable& kernels_;
  int64_t batch_, list_;
  int64_t low_;  // first candidate tile
  int64_t row_floats_;
};

// b.best[from, to) = scores of the nodes [from, to), which are not empty.
void Task::score_nodes(const Tree& tree, Block& b, size_t from, size_t to) {
  const int64_t per_node = tree.leaf / tree.key_stride;
  w_.positions.clear();
  for (size_t i = from; i < to; ++i) {
    if (s_.representative == Representative::kSpread) {
      const int64_t first = low_ * s_.block_k + b.left[i] * tree.leaf;
      const int64_t keys = (b.right[i] - b.left[i]) * tree.leaf;
      for (int64_t u = 0; u < per_node; ++u) {
        w_.positions.push_back(static_cast<int32_t>(first + (2 * u + 1) * keys / (2 * per_node)));
      }
      continue;
    }
    const int64_t leaf = representative(b.left[i], b.right[i]);
    const int64_t key = low_ * s_.block_k + leaf * tree.leaf + tree.key_stride - 1;
    for (int64_t u = 0; u < per_node; ++u) {
      w_.positions.push_back(static_cast<int32_t>(key + u * tree.key_stride));
    }
  }
  for (size_t set = 0; set < b.row_sets.size(); ++set) score(b, b.row_sets[set], set > 0);
  const float* each = w_.scores.data();
  for (size_t i = from; i < to; ++i, each += per_node) {
    b.best[i] = *std::max_element(each, each + per_node);
  }
}

void Task::tree(const Tree& tree) {
  for (Block& b : w_.blocks) {
    if (lists_all(b)) {
      list_all_tiles(b);
      continue;
    }
    gather_rows(b, false);
    const int64_t leaves = (b.high - low_) * (s_.block_k / tree.leaf);
    while (ceil_div(leaves, b.node) > 2 * tree.beam) b.node *= 2;
    for (int64_t left = 0; left < leaves; left += b.node) {
      b.left.push_back(static_cast<int32_t>(left));
      b.right.push_back(static_cast<int32_t>(std::min(left + b.node, leaves)));
    }
  }
  const auto first_key = [&](int64_t left) { return low_ * s_.block_k + left * tree.leaf; };
  for (bool searching = true; searching;) {
    int64_t node = 1;
    for (const Block& b : w_.blocks) node = std::max(node, b.node);
    by_stretch(node * tree.key_stride, first_key,
               [&](Block& b, size_t from, size_t to) { score_nodes(tree, b, from, to); });
    searching = false;
    for (Block& b : w_.blocks) {
      if (b.listed) continue;
      keep_best(b, tree.beam);
      if (b.node == 1) {
        for (int32_t& left : b.left) left = static_cast<int32_t>(first_key(left));
        vote(b);
        continue;
      }
      searching = true;
      b.node /= 2;
      w_.left.clear();
      w_.right.clear();
      for (size_t i = 0; i < b.left.size(); ++i) {
        const int32_t left = b.left[i], right = b.right[i];
        const int32_t middle = static_cast<int32_t>(std::min<int64_t>(left + b.node, right));
        w_.left.push_back(left);
        w_.right.push_back(middle);
        if (middle < right) {
          w_.left.push_back(middle);
          w_.right.push_back(right);
        }
      }
      b.left.swap(w_.left);
      b.right.swap(w_.right);
    }
  }
}

// b.best[from, to) = scores of the chunks [from, to), the largest over the row sets.
void Task::select_representatives(const Stage& stage, Block& b, size_t from, size_t to) {
  const size_t n = to - from;
  const int64_t low = low_ * s_.block_k, high = b.high * s_.block_k;
  w_.positions.resize(2 * n);
  w_.left.resize(n);
  w_.right.resize(n);
  w_.head_best.resize(n);
  std::fill(b.best.begin() + from, b.best.begin() + to, -kInfinity);
  for (const RowSet& set : b.row_sets) {
    for (size_t i = 0; i < n; ++i) {
      const int64_t chunk = b.left[from + i];
      w_.left[i] = static_cast<int32_t>(std::max(chunk, low));
      w_.right[i] = static_cast<int32_t>(std::min(chunk + stage.chunk, high));
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
      score(b, set, false);
      for (size_t i = 0; i < n; ++i) {
        const int32_t middle = w_.left[i] + (w_.right[i] - w_.left[i] + 1) / 2;
        const float first = w_.scores[2 * i], second = w_.scores[2 * i + 1];
        (first >= second ? w_.right[i] : w_.left[i]) = middle;
        const float winner = std::max(first, second);
        w_.head_best[i] = stage.last_score ? winner : std::max(w_.head_best[i], winner);
      }
    }
    for (size_t i = 0; i < n; ++i) {
      b.best[from + i] = std::max(b.best[from + i], w_.head_best[i]);
    }
  }
}

// b.best[from, to) = largest scores of the keys of the units [from, to), all of which are scored.
void Task::score_keys(int64_t unit, Block& b, size_t from, size_t to) {
  const int64_t low = low_ * s_.block_k, high = b.high * s_.block_k;
  const auto end_of = [&](size_t i) { return std::min(b.left[i] + unit, high); };
  w_.positions.clear();
  for (size_t i = from; i < to; ++i) {
    for (int64_t key = std::max<int64_t>(b.left[i], low); key < end_of(i); ++key) {
      w_.positions.push_back(static_cast<int32_t>(key));
    }
  }
  for (size_t set = 0; set < b.row_sets.size(); ++set) score(b, b.row_sets[set], set > 0);
  const float* each = w_.scores.data();
  for (size_t i = from; i < to; ++i) {
    const int64_t keys = end_of(i) - std::max<int64_t>(b.left[i], low);
    b.best[i] = *std::max_element(each, each + keys);
    each += keys;
  }
}

void Task::stage(const Stage& stage) {
  // SelectRep scores both keys of a chunk of two, whichever wins, for every head. A last stage of
  // such chunks then comes to a vote of all keys: they are scored in larger units and for all heads
  // at once.
  const bool every_key = stage.final && stage.chunk <= 2;
  const bool first = stage.starts.data == nullptr;
  const int64_t unit =
      every_key ? std::gcd(s_.block_k, first ? s_.block_k : stage.chunk_before) : stage.chunk;
  for (Block& b : w_.blocks) {
    if (stage.final && lists_all(b)) {
      list_all_tiles(b);
      continue;
    }
    const int64_t low = low_ * s_.block_k, high = b.high * s_.block_k;
    const auto add = [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; at += unit) {
        if (std::max(at, low) < std::min(at + unit, high)) {
          b.left.push_back(static_cast<int32_t>(at));
        }
      }
    };
    if (first) {
      add(low / unit * unit, high);
    } else {
      const int64_t kept =
          std::clamp<int64_t>(*stage.counts.at(batch_, list_, b.number), 0, stage.starts.size);
      const int32_t* starts = stage.starts.at(batch_, list_, b.number);
      for (int64_t i = 0; i < kept; ++i) add(starts[i], starts[i] + stage.chunk_before);
    }
    if (!stage.final && static_cast<int64_t>(b.left.size()) <= s_.width) {
      list_chunks(b);
      continue;
    }
    gather_rows(b, !every_key);
  }
  by_stretch(1, [](int64_t chunk) { return chunk; },
             [&](Block& b, size_t from, size_t to) {
               if (every_key) return score_keys(unit, b, from, to);
               select_representatives(stage, b, from, to);
             });
  for (Block& b : w_.blocks) {
    if (b.listed) continue;
    if (stage.final) {
      vote(b);
    } else {
      keep_best(b, s_.width);
      list_chunks(b);
    }
  }
}

template <typename Run>
void run_tasks(const Search& search, const Run& run) {
  const int64_t lists = search.problem.batch * search.lists, blocks = search.blocks();
  const int64_t wanted = kTasksPerThread * torch::stable::get_num_threads();
  const int64_t count = std::clamp<int64_t>(lists * blocks / wanted, 1, kTaskBlocks);
  const int64_t groups = ceil_div(blocks, count);
  run_items(lists * groups, false, [&](int64_t i) {
    const int64_t list = i / groups;
    const int64_t first = (groups - 1 - i % groups) * count;  // those with most candidates first
    Task task(search, list / search.lists, list % search.lists, first,
              std::min(count, blocks - first));
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
