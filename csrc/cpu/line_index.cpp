#include "../common/line_index.h"

#include <limits>

#include "../ops.h"
#include "items.h"

namespace lowcontext {
namespace {

using torch::headeronly::ScalarType;
using Lists = std::tuple<Tensor, Tensor, Tensor, Tensor>;

void check_mask(const Tensor& t, const char* name, const Tensor& like) {
  LC_CHECK(t.is_cpu(), name, "a CPU tensor", "another device");
  LC_CHECK(t.scalar_type() == ScalarType::Bool, name, "dtype bool", "another");
  LC_CHECK(t.dim() == 3, name, "3 dimensions [B, H, N]", shape_text(t));
  LC_CHECK(t.size(0) == like.size(0) && t.size(1) == like.size(1) && t.size(2) == like.size(2),
           name, concat("shape ", shape_text(like)), shape_text(t));
}

Lists line_index(const Tensor& vertical, const Tensor& slash, int64_t q_len, int64_t block,
                 int64_t tiles, int64_t columns, std::optional<Tensor> dense_from) {
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
  check_mask(vertical, "vertical", vertical);
  check_mask(slash, "slash", vertical);
  const int64_t batch = vertical.size(0), heads = vertical.size(1), kv_len = vertical.size(2);
  LC_CHECK(block > 0 && kv_len <= kLargest - block, "vertical", "fewer than 2^31 - block keys",
           kv_len);
  LC_CHECK(q_len > 0 && q_len <= kv_len, "Lq", concat("1 to ", kv_len), q_len);
  LC_CHECK(tiles >= 0 && columns >= 0, "tiles", "widths of at least 0", tiles);
  if (dense_from.has_value()) {
    LC_CHECK(dense_from->is_cpu() && dense_from->scalar_type() == ScalarType::Int, "dense_from",
             "an int32 CPU tensor", "another");
    LC_CHECK(dense_from->dim() == 2 && dense_from->size(0) == batch && dense_from->size(1) == heads,
             "dense_from", concat("shape [", batch, ", ", heads, "]"), shape_text(*dense_from));
  }
  const int64_t first = (kv_len - q_len) / block;
  const int64_t blocks = (kv_len + block - 1) / block - first;
  const auto ints = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(vertical, shape, ScalarType::Int);
  };
  Tensor counts = ints({batch, heads, blocks}), starts = ints({batch, heads, blocks, tiles});
  Tensor column_counts = ints({batch, heads, blocks});
  Tensor listed = ints({batch, heads, blocks, columns});
  Tensor distances = ints({batch * heads, kv_len}), keys = ints({batch * heads, kv_len});
  const auto data = [](Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); };
  int32_t* const all_counts = data(counts);
  int32_t* const all_starts = data(starts);
  int32_t* const all_column_counts = data(column_counts);
  int32_t* const all_columns = data(listed);
  int32_t* const all_distances = data(distances);
  int32_t* const all_keys = data(keys);
  Tensor totals = ints({batch * heads, 2});
  int32_t* const all_totals = data(totals);
  const bool* const vertical_data = static_cast<const bool*>(vertical.const_data_ptr());
  const bool* const slash_data = static_cast<const bool*>(slash.const_data_ptr());

  const auto compact = [&](int64_t i) {
    const int64_t b = i / heads, h = i % heads;
    const bool* v = vertical_data + b * vertical.stride(0) + h * vertical.stride(1);
    const bool* s = slash_data + b * slash.stride(0) + h * slash.stride(1);
    int32_t* const to_keys = all_keys + i * kv_len;
    int32_t* const to_distances = all_distances + i * kv_len;
    int32_t n = 0, m = 0;
    for (int64_t j = 0; j < kv_len; ++j) {
      to_keys[n] = static_cast<int32_t>(j);
      n += v[j * vertical.stride(2)];
      const int64_t d = kv_len - 1 - j;
      to_distances[m] = static_cast<int32_t>(d);
      m += s[d * slash.stride(2)];
    }
    all_totals[2 * i] = n;
    all_totals[2 * i + 1] = m;
  };
  const auto list = [&](int64_t i) {
    const int64_t head = i / blocks, n = i % blocks;
    const Lines lines{all_distances + head * kv_len, all_totals[2 * head + 1],
                      all_keys + head * kv_len, all_totals[2 * head]};
    bool dense = false;
    if (dense_from.has_value()) {
      const int32_t* from = static_cast<const int32_t*>(dense_from->const_data_ptr());
      dense = block * (first + n + 1) >
              from[head / heads * dense_from->stride(0) + head % heads * dense_from->stride(1)];
    }
    BlockLists out{all_starts + i * tiles, tiles, all_columns + i * columns, columns, 0, 0};
    list_block(lines, first + n, block, dense, out);
    all_counts[i] = out.num_starts;
    all_column_counts[i] = out.num_columns;
  };
  run_items(batch * heads, false, compact);
  run_items(batch * heads * blocks, false, list);
  return {counts, starts, column_counts, listed};
}

}  // namespace
}  // namespace lowcontext

STABLE_TORCH_LIBRARY_IMPL(lowcontext, CPU, m) {
  m.impl("line_index", TORCH_BOX(&lowcontext::line_index));
}
