#include "plan.h"

#include <algorithm>

namespace lowcontext {
namespace {

// Lanes (rows x heads) of an item of the panel kernel: enough to amortise the gather of its keys,
// few enough for queries and output (2 x 256 x 128 floats = 256 KiB) to stay in a level-2 cache.
constexpr int64_t kLanes = 256;
// Splitting stops at this many items, or at this many keys in a split.
constexpr int64_t kSplitItems = 128;
constexpr int64_t kSplitKeys = 256;

// The length of the longest list, in keys.
int64_t longest_list(const Problem& p) {
  if (!p.sparse) return p.window > 0 ? std::min(p.kv_len, p.window + p.q_len) : p.kv_len;
  const int64_t batches = p.num_blocks.stride_b == 0 ? 1 : p.batch;
  const int64_t blocks = ceil_div(p.kv_len, p.block_q) - (p.kv_len - p.q_len) / p.block_q;
  int64_t longest = 0;
  for (int64_t b = 0; b < batches; ++b) {
    for (int64_t h = 0; h < p.index_heads; ++h) {
      for (int64_t n = 0; n < blocks; ++n) {
        int64_t keys = std::clamp<int64_t>(*p.num_blocks.at(b, h, n), 0, p.starts.size) * p.block_k;
        if (p.columns.data != nullptr) {
          keys += std::clamp<int64_t>(*p.num_columns.at(b, h, n), 0, p.columns.size);
        }
        longest = std::max(longest, keys);
      }
    }
  }
  return longest;
}

}  // namespace

Plan make_plan(const Problem& p, const KernelShape& shape) {
  Plan plan;
  const int64_t group = p.q_heads / p.kv_heads;
  const bool shared = !p.sparse || p.index_heads != p.q_heads || group == 1;
  plan.heads = shared ? p.kv_heads : p.q_heads;
  plan.group = shared ? group : 1;
  const int64_t first = p.kv_len - p.q_len;
  const int64_t lanes =
      std::max<int64_t>(shape.panel_lanes, kLanes * 128 / std::max<int64_t>(128, p.head_dim));
  if (p.sparse) {
    plan.block_q = p.block_q;
    plan.shift = first % p.block_q;
    plan.blocks = ceil_div(p.kv_len, p.block_q) - first / p.block_q;
  } else {
    plan.block_q = std::min(p.q_len, std::max<int64_t>(1, lanes / plan.group));
    plan.blocks = ceil_div(p.q_len, plan.block_q);
  }
  const int64_t rows = std::min(plan.block_q, p.q_len);
  plan.decode = rows * plan.group <= shape.decode_lanes;
  plan.chunk_rows = plan.decode ? rows : std::min(rows, std::max<int64_t>(1, lanes / plan.group));
  plan.chunks = ceil_div(rows, plan.chunk_rows);
  plan.items = p.batch * plan.heads * plan.blocks * plan.chunks;
  if (plan.items > 0 && plan.items < kSplitItems) {
    const int64_t keys = longest_list(p);
    plan.splits =
        std::clamp<int64_t>(ceil_div(keys, kSplitKeys), 1, ceil_div(kSplitItems, plan.items));
    plan.split_keys = ceil_div(keys, plan.splits);
    plan.items *= plan.splits;
  }
  return plan;
}

// Heads outermost, for threads to share the keys in a cache; late blocks first, for the long items
// to start first.
Item get_item(const Problem& p, const Plan& plan, int64_t i) {
  Item item;
  item.split = i % plan.splits;
  item.first_item = i - item.split;
  i /= plan.splits;
  const int64_t chunk = plan.chunks - 1 - i % plan.chunks;
  i /= plan.chunks;
  item.block = plan.blocks - 1 - i % plan.blocks;
  i /= plan.blocks;
  item.head = i % plan.heads;
  item.batch = i / plan.heads;
  const int64_t begin = std::max<int64_t>(0, item.block * plan.block_q - plan.shift);
  const int64_t end = std::min(p.q_len, (item.block + 1) * plan.block_q - plan.shift);
  item.row = begin + chunk * plan.chunk_rows;
  item.rows = std::clamp<int64_t>(end - item.row, 0, plan.chunk_rows);
  return item;
}

const Item* ItemQueue::peek() {
  if (!taken_) {
    index_ = __atomic_fetch_add(counter_, 1, __ATOMIC_RELAXED);
    taken_ = true;
    if (index_ < plan_.items) item_ = get_item(problem_, plan_, index_);
  }
  return index_ < plan_.items ? &item_ : nullptr;
}

}  // namespace lowcontext
