// Walks the keys that an item reads: its tiles, then its columns (or every key, when dense), cut to
// the positions that exist and to one split of the list. Nothing outside [low, high) comes out,
// whatever the index holds.
#pragma once

#include <cstdint>

#include "plan.h"
#include "vec.h"

namespace lowcontext {
namespace {

LC_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
LC_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
LC_INLINE int64_t clamp64(int64_t x, int64_t low, int64_t high) {
  return max64(low, min64(x, high));
}

class KeyWalker {
 public:
  KeyWalker(const Problem& p, const Plan& plan, const Item& item) {
    const int64_t first = p.kv_len - p.q_len + item.row;  // position of the first row
    low_ = max64(0, p.first_key(item.batch));
    high_ = first + item.rows;
    if (p.window > 0) low_ = max64(low_, first - p.window + 1);
    int64_t keys;
    if (p.sparse) {
      // The index may have a head per query head, per KV head, or one.
      const int64_t h = p.index_heads == 1 ? 0 : item.head;
      tiles_ = clamp64(*p.num_blocks.at(item.batch, h, item.block), 0, p.starts.size);
      starts_ = p.starts.at(item.batch, h, item.block);
      block_k_ = p.block_k;
      if (p.columns.data != nullptr) {
        num_columns_ = clamp64(*p.num_columns.at(item.batch, h, item.block), 0, p.columns.size);
        columns_ = p.columns.at(item.batch, h, item.block);
      }
      keys = tiles_ * block_k_ + num_columns_;
    } else {
      dense_start_ = static_cast<int32_t>(low_);
      starts_ = nullptr;
      tiles_ = 1;
      block_k_ = max64(1, high_ - low_);
      keys = high_ > low_ ? block_k_ : 0;
    }
    slot_ = 0;
    end_ = keys;
    if (plan.splits > 1) {
      slot_ = min64(keys, item.split * plan.split_keys);
      end_ = min64(keys, slot_ + plan.split_keys);
    }
    tile_ = slot_ / block_k_;
    offset_ = slot_ - tile_ * block_k_;
  }

  // The next positions, at most limit of them; 0 at the end.
  int64_t next(int32_t* positions, int64_t limit) {
    int64_t count = 0;
    while (count < limit && slot_ < end_) {
      if (tile_ < tiles_) {
        const int64_t start = starts_ != nullptr ? starts_[tile_] : dense_start_;
        const int64_t stop = min64(block_k_, offset_ + (end_ - slot_));  // within the tile
        const int64_t a = max64(start + offset_, low_);
        const int64_t b = min64(start + stop, high_);
        const int64_t n = min64(b - a, limit - count);
        for (int64_t i = 0; i < n; ++i) positions[count + i] = static_cast<int32_t>(a + i);
        int64_t taken = stop - offset_;
        if (n > 0) {
          count += n;
          if (a + n < b) taken = a + n - (start + offset_);
        }
        slot_ += taken;
        offset_ += taken;
        if (offset_ == block_k_) {
          offset_ = 0;
          ++tile_;
        }
      } else {
        const int64_t column = columns_[slot_ - tiles_ * block_k_];
        if (column >= low_ && column < high_) positions[count++] = static_cast<int32_t>(column);
        ++slot_;
      }
    }
    return count;
  }

 private:
  int64_t low_, high_;
  const int32_t* starts_ = nullptr;
  const int32_t* columns_ = nullptr;
  int64_t tiles_ = 0, block_k_ = 1, num_columns_ = 0;
  int32_t dense_start_ = 0;
  int64_t slot_, end_;
  int64_t tile_, offset_;
};

template <typename T>
LC_INLINE const T* head_base(const TensorView& view, int64_t b, int64_t h) {
  return static_cast<const T*>(view.data) + b * view.stride_b + h * view.stride_h;
}

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// Logits come out of the dot product in units of log2 (softcap off) or of the cap (softcap on).
LC_INLINE float query_scale(const Problem& p) {
  return p.softcap > 0.0f ? p.scale / p.softcap : p.scale * kLog2E;
}

// Natural log of the sum, from its maximum in log2 units; -inf for a row with no visible key.
LC_INLINE float log_sum(float maximum, float sum) {
  return sum == 0.0f ? -kInfinity : (maximum + __builtin_log2f(sum)) * kLn2;
}

}  // namespace
}  // namespace lowcontext
