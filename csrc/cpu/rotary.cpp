// rotate_to and gather_moved: keys turned to other positions, where they are or from a list.
#include "../common/rotary.h"

#include <algorithm>
#include <optional>

#include "../ops.h"
#include "arguments.h"
#include "items.h"
#include "launch.h"

namespace lowcontext {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kItemRows = 32;
// Below this many channels the start of other threads costs more than they save.
constexpr int64_t kSmall = int64_t{1} << 17;
constexpr int64_t kLargestDim = 256;

// Positions [B, H, L]: of a tensor, or first + step * l.
struct Positions {
  const int32_t* data32 = nullptr;
  const int64_t* data64 = nullptr;
  int64_t stride_b = 0, stride_h = 0, stride_l = 0;
  int64_t first = 0, step = 0;

  int64_t at(int64_t b, int64_t h, int64_t l) const {
    const int64_t offset = b * stride_b + h * stride_h + l * stride_l;
    if (data32 != nullptr) return data32[offset];
    return data64 != nullptr ? data64[offset] : first + step * l;
  }
};

Positions positions_of(const std::optional<Tensor>& t, const char* name, const Tensor& x,
                       int64_t first, int64_t step) {
  Positions p;
  p.first = first;
  p.step = step;
  if (!t.has_value()) return p;
  LC_CHECK(t->is_cpu(), name, "a CPU tensor", "another device");
  LC_CHECK(t->dim() == 3 && t->size(0) == x.size(0) && t->size(1) == x.size(1) &&
               t->size(2) == x.size(2),
           name, "shape [B, H, L] of x", shape_text(*t));
  p.stride_b = t->stride(0);
  p.stride_h = t->stride(1);
  p.stride_l = t->stride(2);
  if (t->scalar_type() == ScalarType::Int) {
    p.data32 = static_cast<const int32_t*>(t->const_data_ptr());
  } else {
    LC_CHECK(t->scalar_type() == ScalarType::Long, name, "dtype int32 or int64", "another");
    p.data64 = static_cast<const int64_t*>(t->const_data_ptr());
  }
  return p;
}

// What all rows of a tensor share.
TurnedRows turned_rows(const Tensor& x, const char* name, const Tensor& inv_freq,
                       bool interleaved) {
  TurnedRows rows;
  rows.dtype = dtype_of(x, name);
  rows.head_dim = x.size(3);
  LC_CHECK(rows.head_dim <= kLargestDim, name, concat("a head_dim of at most ", kLargestDim),
           rows.head_dim);
  LC_CHECK(inv_freq.is_cpu() && inv_freq.scalar_type() == ScalarType::Float, "inv_freq",
           "a float32 CPU tensor", "another");
  LC_CHECK(inv_freq.dim() == 1 && inv_freq.is_contiguous(), "inv_freq",
           "one contiguous dimension", shape_text(inv_freq));
  LC_CHECK(2 * inv_freq.size(0) <= rows.head_dim, "inv_freq",
           concat("at most ", rows.head_dim / 2, " pairs"), inv_freq.size(0));
  rows.inv_freq = static_cast<const float*>(inv_freq.const_data_ptr());
  rows.pairs = inv_freq.size(0);
  rows.interleaved = interleaved;
  return rows;
}

// One item: up to kItemRows rows, and where they come from and go to.
struct Chunk {
  int64_t rows[kItemRows], from[kItemRows], to[kItemRows];
  float* const table = thread_scratch(kItemRows * kLargestDim);

  TurnedRows of(TurnedRows turned, int64_t count) {
    turned.from = from;
    turned.to = to;
    turned.rows = rows;
    turned.count = count;
    turned.table = table;
    return turned;
  }
};

const char* head_of(const TensorView& view, int64_t element, int64_t b, int64_t h) {
  const char* data = static_cast<const char*>(view.data);
  return data + (b * view.stride_b + h * view.stride_h) * element;
}

Tensor rotate_to(const Tensor& x, const std::optional<Tensor>& old,
                 const std::optional<Tensor>& now, int64_t old_first, int64_t old_step,
                 int64_t new_first, int64_t new_step, const Tensor& inv_freq, bool interleaved) {
  const TensorView view = view_of(x, "x");
  const Positions from = positions_of(old, "old", x, old_first, old_step);
  const Positions to = positions_of(now, "new", x, new_first, new_step);
  const TurnedRows shared = turned_rows(x, "x", inv_freq, interleaved);
  const int64_t H = x.size(1), L = x.size(2), D = x.size(3), element = x.element_size();
  Tensor out = torch::stable::new_empty(x, {x.size(0), H, L, D});
  char* const data = static_cast<char*>(out.mutable_data_ptr());
  prefer_huge_pages(data, static_cast<size_t>(out.numel() * element));
  // Heads with the same positions share their angles.
  const int64_t groups = from.stride_h == 0 && to.stride_h == 0 ? 1 : H;
  const int64_t chunks = ceil_div(L, kItemRows);
  const KernelTable& kernels = active_kernels();
  run_items(x.size(0) * groups * chunks, out.numel() < kSmall, [&](int64_t item) {
    const int64_t first = item % chunks * kItemRows, count = std::min(L - first, kItemRows);
    const int64_t b = item / chunks / groups, group = item / chunks % groups;
    Chunk chunk;
    for (int64_t i = 0; i < count; ++i) {
      chunk.rows[i] = first + i;
      chunk.from[i] = from.at(b, group, first + i);
      chunk.to[i] = to.at(b, group, first + i);
    }
    TurnedRows turned = chunk.of(shared, count);
    kernels.rotary.angles(turned);
    for (int64_t h = group; h < group + H / groups; ++h) {
      turned.x = head_of(view, element, b, h);
      turned.stride = view.stride_l;
      turned.out = data + ((b * H + h) * L + first) * D * element;
      kernels.rotary.turn(turned);
    }
  });
  return out;
}

Outputs gather_moved(const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& first,
                     const Tensor& inv_freq, bool interleaved) {
  const TensorView k_view = view_of(k, "k"), v_view = view_of(v, "v");
  const TurnedRows shared = turned_rows(k, "k", inv_freq, interleaved);
  const int64_t B = k.size(0), H = k.size(1), Lk = k.size(2), D = k.size(3), Dv = v.size(3);
  LC_CHECK(v.scalar_type() == k.scalar_type(), "v", "the dtype of k", "another");
  LC_CHECK(v.size(0) == B && v.size(1) == H && v.size(2) == Lk, "v",
           concat("shape [", B, ", ", H, ", ", Lk, ", Dv]"), shape_text(v));
  LC_CHECK(keys.is_cpu() && keys.scalar_type() == ScalarType::Int, "keys", "an int32 CPU tensor",
           "another");
  LC_CHECK(keys.dim() == 3 && keys.size(0) == B && (keys.size(1) == 1 || keys.size(1) == H),
           "keys", concat("shape [", B, ", 1 or ", H, ", M]"), shape_text(keys));
  LC_CHECK(first.is_cpu() && first.scalar_type() == ScalarType::Int, "first",
           "an int32 CPU tensor", "another");
  LC_CHECK(first.dim() == 1 && first.size(0) == B, "first", concat("shape [", B, "]"),
           shape_text(first));
  const int64_t M = keys.size(2), groups = keys.size(1), element = k.element_size();
  Tensor moved = torch::stable::new_empty(k, {B, H, M, D});
  Tensor values = torch::stable::new_empty(v, {B, H, M, Dv});
  char* const moved_data = static_cast<char*>(moved.mutable_data_ptr());
  char* const values_data = static_cast<char*>(values.mutable_data_ptr());
  prefer_huge_pages(moved_data, static_cast<size_t>(moved.numel() * element));
  prefer_huge_pages(values_data, static_cast<size_t>(values.numel() * element));
  const int32_t* const lists = static_cast<const int32_t*>(keys.const_data_ptr());
  const int32_t* const begins = static_cast<const int32_t*>(first.const_data_ptr());
  const size_t bytes = static_cast<size_t>(Dv * element);
  const int64_t chunks = ceil_div(M, kItemRows);
  const KernelTable& kernels = active_kernels();
  run_items(B * groups * chunks, moved.numel() < kSmall, [&](int64_t item) {
    const int64_t begin = item % chunks * kItemRows, count = std::min(M - begin, kItemRows);
    const int64_t b = item / chunks / groups, group = item / chunks % groups;
    const int32_t* const list = lists + b * keys.stride(0) + group * keys.stride(1);
    Chunk chunk;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t key = list[(begin + i) * keys.stride(2)];
      const bool listed = begin + i >= begins[b * first.stride(0)] && key >= 0 && key < Lk;
      chunk.rows[i] = listed ? key : -1;
      chunk.to[i] = Lk - M + begin + i;
      chunk.from[i] = listed ? key : chunk.to[i];  // no angle for what is not read
    }
    TurnedRows turned = chunk.of(shared, count);
    kernels.rotary.angles(turned);
    for (int64_t h = group; h < group + H / groups; ++h) {
      turned.x = head_of(k_view, element, b, h);
      turned.stride = k_view.stride_l;
      turned.out = moved_data + ((b * H + h) * M + begin) * D * element;
      kernels.rotary.turn(turned);
      const char* const from = head_of(v_view, element, b, h);
      char* to = values_data + ((b * H + h) * M + begin) * Dv * element;
      for (int64_t i = 0; i < count; ++i, to += bytes) {
        if (chunk.rows[i] < 0) {
          std::fill(to, to + bytes, 0);
        } else {
          const char* const row = from + chunk.rows[i] * v_view.stride_l * element;
          std::copy(row, row + bytes, to);
        }
      }
    }
  });
  return {moved, values};
}

}  // namespace
}  // namespace lowcontext

STABLE_TORCH_LIBRARY_IMPL(lowcontext, CPU, m) {
  m.impl("rotate_to", TORCH_BOX(&lowcontext::rotate_to));
  m.impl("gather_moved", TORCH_BOX(&lowcontext::gather_moved));
}
