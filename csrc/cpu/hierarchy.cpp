#include <algorithm>
#include <functional>
#include <numeric>

#include "../common/order.h"
#include "../ops.h"
#include "hierarchy_task.h"
#include "items.h"
#include "launch.h"

namespace lowcontext {
namespace hierarchy {
namespace {

// Blocks of queries that a task searches together, at most: a MiB of nodes at a beam of 512.
constexpr int64_t kTaskBlocks = 64;
// Tasks for each thread where there are fewer blocks than that takes.
constexpr int64_t kTasksPerThread = 2;

// Compares like (score, -index): of equal scores the lower index is the larger.
uint64_t rank_of(float score, size_t index) {
  const uint32_t last = 0xffffffffu - static_cast<uint32_t>(index);
  return static_cast<uint64_t>(order_key(score)) << 32 | last;
}

Workspace& workspace() {
  thread_local Workspace space;
  return space;
}

}  // namespace

Task::Task(const Search& search, int64_t batch, int64_t list, int64_t first, int64_t count)
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

// The rank of the worst of the `keep` best scores; keep is positive and at most their number.
uint64_t Task::worst_kept(const std::vector<float>& scores, size_t keep) {
  w_.ranks.resize(scores.size());
  for (size_t i = 0; i < scores.size(); ++i) w_.ranks[i] = rank_of(scores[i], i);
  const auto worst = w_.ranks.begin() + static_cast<std::ptrdiff_t>(keep - 1);
  std::nth_element(w_.ranks.begin(), worst, w_.ranks.end(), std::greater<uint64_t>());
  return *worst;
}

// Drops all but the best `keep` nodes or chunks.
void Task::keep_best(Block& b, int64_t keep) {
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
void Task::vote(Block& b) {
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
void Task::list_tiles(Block& b) {
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

void Task::list_all_tiles(Block& b) {
  b.left.clear();
  for (int64_t tile = low_; tile < b.high; ++tile) b.left.push_back(static_cast<int32_t>(tile));
  list_tiles(b);
}

void Task::list_chunks(Block& b) {
  *b.count = static_cast<int32_t>(b.left.size());
  std::copy(b.left.begin(), b.left.end(), b.starts);
  std::fill(b.starts + b.left.size(), b.starts + s_.width, 0);
  b.left.clear();
  b.listed = true;
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
  const int64_t low = low_ * s_.block_k;
  const Units units = {low, tree.leaf, tree.key_stride - 1, tree.leaf / tree.key_stride,
                       tree.key_stride};
  const auto first_key = [&](int64_t left) { return low + left * tree.leaf; };
  for (bool searching = true; searching;) {
    int64_t node = 1;
    for (const Block& b : w_.blocks) node = std::max(node, b.node);
    by_stretch(stretch_keys(node * tree.leaf, units.keys, sets()), first_key,
               [&](Block& b, size_t from, size_t to, const Stretch& stretch) {
                 if (s_.representative == Representative::kSpread) {
                   return spread_nodes(tree, b, from, to);
                 }
                 w_.units.clear();
                 for (size_t i = from; i < to; ++i) {
                   w_.units.push_back(static_cast<int32_t>(representative(b.left[i], b.right[i])));
                 }
                 score_units(units, stretch, b, from);
               });
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

void Task::stage(const Stage& stage) {
  // SelectRep scores both keys of a chunk of two, whichever wins, for every head. A last stage of
  // such chunks then comes to a vote of all keys: they are scored in larger units and for all heads
  // at once.
  const bool every_key = stage.final && stage.chunk <= 2;
  const bool first = stage.starts.data == nullptr;
  const int64_t unit =
      every_key ? std::gcd(s_.block_k, first ? s_.block_k : stage.chunk_before) : stage.chunk;
  const int64_t low = low_ * s_.block_k;
  for (Block& b : w_.blocks) {
    if (stage.final && lists_all(b)) {
      list_all_tiles(b);
      continue;
    }
    const int64_t high = b.high * s_.block_k;
    // Chunks ascend and lie on the grid, whatever `starts` holds.
    const auto add = [&](int64_t begin, int64_t end) {
      for (int64_t at = begin / unit * unit; at < end; at += unit) {
        if (std::max(at, low) < std::min(at + unit, high) &&
            (b.left.empty() || at > b.left.back())) {
          b.left.push_back(static_cast<int32_t>(at));
        }
      }
    };
    if (first) {
      add(low, high);
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
  const Units units = {low, unit, 0, unit, 1};
  by_stretch(stretch_keys(unit, unit, every_key ? sets() : 1), [](int64_t chunk) { return chunk; },
             [&](Block& b, size_t from, size_t to, const Stretch& stretch) {
               if (!every_key) return select_representatives(stage, b, from, to);
               w_.units.clear();
               for (size_t i = from; i < to; ++i) {
                 w_.units.push_back(static_cast<int32_t>((b.left[i] - low) / unit));
               }
               score_units(units, stretch, b, from);
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

namespace {

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
}  // namespace hierarchy

void run_tree(const Search& search, const Tree& tree) {
  hierarchy::run_tasks(search, [&](hierarchy::Task& task) { task.tree(tree); });
}

void run_stage(const Search& search, const Stage& stage) {
  hierarchy::run_tasks(search, [&](hierarchy::Task& task) { task.stage(stage); });
}

}  // namespace lowcontext
