// token_scores, page_scores and quantize_keys: queries against keys, against bounds of pages of
// keys, and the keys in 8 or 4 bits that a score may read instead of the keys.
//
//   scores[b, h, r, i] = scale * q[b, h, r, :] . k[b, h / G, i, :]
//   lse[b, h, r] = log sum_i exp(scores[b, h, r, i])
//
// The keys are cut into items of kItemKeys for each KV head; an item scores its keys with all
// queries of that head and leaves its part of the LSE, which are summed in order at the end.
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "../common/votes.h"
#include "../ops.h"
#include "items.h"
#include "launch.h"

namespace lowcontext {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kItemKeys = 1024;
// A prefetch runs this far ahead: 131,072 keys of 128 floats in 6.4 ms with 2 KiB, 4.2 with 8, 4.8
// with 16; in bf16 3.5, 2.2 and 2.1 (one core, two heads, groups of four).
constexpr int64_t kAheadBytes = 8192;
// Below this many bytes of keys the start of other threads costs more than they save.
constexpr int64_t kSmallBytes = int64_t{1} << 18;
constexpr float kNone = -std::numeric_limits<float>::infinity();

KeyType key_type(const Tensor& k) {
  switch (k.scalar_type()) {
    case ScalarType::Float:
      return KeyType::kFloat32;
    case ScalarType::BFloat16:
      return KeyType::kBFloat16;
    case ScalarType::Half:
      return KeyType::kFloat16;
    case ScalarType::Char:
      return KeyType::kInt8;
    case ScalarType::Byte:
      return KeyType::kInt4;
    default:
      LC_CHECK(false, "k", "dtype float32, bfloat16, float16, int8 or uint8", "another");
  }
  return KeyType::kFloat32;
}

void expect(const Tensor& t, const char* name, int64_t dims) {
  LC_CHECK(t.is_cpu(), name, "a CPU tensor", "another device");
  LC_CHECK(t.dim() == dims, name, concat(dims, " dimensions"), shape_text(t));
  LC_CHECK(t.size(dims - 1) <= 1 || t.stride(dims - 1) == 1, name, "a contiguous last dimension",
           concat("stride ", t.stride(dims - 1)));
}

// Sizes, and the queries packed for the kernels: [B, Hkv, G * R, stride], zeros in the padding.
struct Queries {
  int64_t batch, kv_heads, group, length, dim;
  int64_t rows, padded_rows, stride, plane = 0;
  std::vector<float> packed;
  std::vector<int16_t> whole;  // for integer keys, in the place of `packed`
  std::vector<float> steps;    // [B, Hkv, padded rows]

  // What the kernel is told of the queries of batch row b and KV head h.
  void describe(ScoreRun& run, int64_t b, int64_t h) const {
    const int64_t head = (b * kv_heads + h) * padded_rows;
    if (whole.empty()) {
      run.q = packed.data() + head * stride;
    } else {
      run.whole_q = whole.data() + head * stride;
      run.q_steps = steps.data() + head;
    }
    run.q_stride = stride;
    run.q_plane = plane;
    run.rows = rows;
  }
};

// Calls take(packed row, q's row of D elements) for every query.
template <typename Take>
void for_queries(const Tensor& q, const Queries& sizes, const Take& take) {
  const float* data = static_cast<const float*>(q.const_data_ptr());
  for (int64_t b = 0; b < sizes.batch; ++b) {
    for (int64_t h = 0; h < q.size(1); ++h) {
      const int64_t head = (b * sizes.kv_heads + h / sizes.group) * sizes.padded_rows +
                           h % sizes.group * sizes.length;
      for (int64_t r = 0; r < sizes.length; ++r) {
        take(head + r, data + b * q.stride(0) + h * q.stride(1) + r * q.stride(2));
      }
    }
  }
}

Queries query_sizes(const Tensor& q, int64_t kv_heads) {
  expect(q, "q", 4);
  LC_CHECK(q.scalar_type() == ScalarType::Float, "q", "dtype float32", "another");
  LC_CHECK(kv_heads > 0 && q.size(1) > 0 && q.size(1) % kv_heads == 0, "q",
           concat("a multiple of ", kv_heads, " heads"), q.size(1));
  Queries out;
  out.batch = q.size(0);
  out.kv_heads = kv_heads;
  out.group = q.size(1) / kv_heads;
  out.length = q.size(2);
  out.dim = q.size(3);
  out.rows = out.group * out.length;
  out.padded_rows = ceil_div(out.rows, 8) * 8;
  return out;
}

// With `split`, an element becomes two: min(q, 0) in the first half and max(q, 0) in the second.
Queries pack_queries(const Tensor& q, int64_t kv_heads, float scale, bool split) {
  Queries out = query_sizes(q, kv_heads);
  const int64_t D = out.dim;
  if (split) out.dim = 2 * D;
  out.stride = ceil_div(out.dim, 32) * 32;
  out.packed.assign(static_cast<size_t>(out.batch * kv_heads * out.padded_rows * out.stride), 0.0f);
  for_queries(q, out, [&](int64_t at, const float* row) {
    float* packed = out.packed.data() + at * out.stride;
    for (int64_t d = 0; d < D; ++d) {
      const float value = row[d] * scale;
      packed[d] = split ? std::fmin(value, 0.0f) : value;
      if (split) packed[D + d] = std::fmax(value, 0.0f);
    }
  });
  return out;
}

// Nearest integer of |x| < 2^22, ties to even: adding 1.5 * 2^23 leaves the fraction no bits.
inline int32_t nearest(float x) {
  volatile const float shifted = x + 12582912.0f;
  return static_cast<int32_t>(shifted - 12582912.0f);
}

// Queries for integer keys: each row in steps of its largest element / levels.
Queries pack_whole_queries(const Tensor& q, int64_t kv_heads, float scale, KeyType type) {
  Queries out = query_sizes(q, kv_heads);
  const int64_t D = out.dim, half = D / 2;
  const bool nibbles = type == KeyType::kInt4;
  LC_CHECK(!nibbles || D % 2 == 0, "q", "an even last dimension with uint8 keys", D);
  out.plane = ceil_div(half, 64) * 32;
  out.stride = nibbles ? 4 * out.plane : ceil_div(D, 32) * 32;
  const size_t rows = static_cast<size_t>(out.batch * kv_heads * out.padded_rows);
  out.whole.assign(rows * static_cast<size_t>(out.stride), 0);
  out.steps.assign(rows, 0.0f);
  // Sums of D products of 127 * levels stay below 2^31.
  const float levels = static_cast<float>(
      std::min<int64_t>(32767, 2147483647 / (127 * std::max<int64_t>(D, 1))));
  for_queries(q, out, [&](int64_t at, const float* row) {
    int16_t* packed = out.whole.data() + at * out.stride;
    float largest = 0.0f;
    for (int64_t d = 0; d < D; ++d) largest = std::max(largest, std::fabs(row[d]));
    const float step = largest / levels;
    out.steps[at] = step * scale;
    for (int64_t d = 0; d < D && step > 0.0f; ++d) {
      int64_t slot = d;
      if (nibbles) {
        const int64_t byte = d % half, plane = byte % 2 * 2 + d / half;
        slot = plane * out.plane + byte / 2;
      }
      packed[slot] = static_cast<int16_t>(nearest(row[d] / step));
    }
  });
  return out;
}

struct Keys {
  KeyType type;
  const char* data;
  int64_t element, stride_b, stride_h, stride_l, count, dim;
  const float* scales = nullptr;  // of integer keys: [B, Hkv, N]
  int64_t scales_b = 0, scales_h = 0;

  ScoreRun run(int64_t b, int64_t h, int64_t first) const {
    ScoreRun run;
    run.type = type;
    run.keys = data + (b * stride_b + h * stride_h + first * stride_l) * element;
    run.key_stride = stride_l;
    run.dim = dim;
    run.ahead = ceil_div(kAheadBytes, std::max<int64_t>(1, dim * element)) * stride_l * element;
    if (scales != nullptr) run.scales = scales + b * scales_b + h * scales_h + first;
    return run;
  }
};

Keys view_keys(const Tensor& k, const char* name) {
  expect(k, name, 4);
  return {key_type(k),
          static_cast<const char*>(k.const_data_ptr()),
          static_cast<int64_t>(k.element_size()),
          k.stride(0),
          k.stride(1),
          k.stride(2),
          k.size(2),
          k.size(3)};
}

// The keys that are scored: all, or `width` keys from each start.
struct Lists {
  const int32_t* data = nullptr;
  int64_t stride_b = 0, stride_h = 0, pages = 0, width = 1;
};

Outputs token_scores(const Tensor& q, const Tensor& k, std::optional<Tensor> scales,
                     std::optional<Tensor> starts, int64_t width, double scale, bool causal) {
  Keys keys = view_keys(k, "k");
  const int64_t batch = k.size(0), kv_heads = k.size(1);
  const bool whole = is_integer(keys.type);
  const float factor = static_cast<float>(scale);
  const Queries queries = whole ? pack_whole_queries(q, kv_heads, factor, keys.type)
                                : pack_queries(q, kv_heads, factor, false);
  const int64_t row_size = keys.type == KeyType::kInt4 ? queries.dim / 2 : queries.dim;
  LC_CHECK(queries.batch == batch && keys.dim == row_size, "k",
           concat("shape [", queries.batch, ", Hkv, N, ", row_size, "]"), shape_text(k));
  LC_CHECK(scales.has_value() == whole, "scales", "given with integer keys and with no others",
           scales.has_value() ? "scales" : "none");
  if (scales.has_value()) {
    expect(*scales, "scales", 3);
    LC_CHECK(scales->scalar_type() == ScalarType::Float && scales->size(0) == batch &&
                 scales->size(1) == kv_heads && scales->size(2) == keys.count,
             "scales", concat("float32 [", batch, ", ", kv_heads, ", ", keys.count, "]"),
             shape_text(*scales));
    keys.scales = static_cast<const float*>(scales->const_data_ptr());
    keys.scales_b = scales->stride(0);
    keys.scales_h = scales->stride(1);
  }
  Lists lists;
  int64_t total = keys.count;
  if (starts.has_value()) {
    expect(*starts, "starts", 3);
    LC_CHECK(starts->scalar_type() == ScalarType::Int, "starts", "dtype int32", "another");
    LC_CHECK((starts->size(0) == 1 || starts->size(0) == batch) &&
                 (starts->size(1) == 1 || starts->size(1) == kv_heads),
             "starts", concat("shape [1 or ", batch, ", 1 or ", kv_heads, ", M]"),
             shape_text(*starts));
    LC_CHECK(width > 0 && width <= keys.count, "width", concat("1 to ", keys.count), width);
    LC_CHECK(!causal, "causal", "false with starts", "true");
    lists.data = static_cast<const int32_t*>(starts->const_data_ptr());
    lists.stride_b = starts->size(0) == 1 ? 0 : starts->stride(0);
    lists.stride_h = starts->size(1) == 1 ? 0 : starts->stride(1);
    lists.pages = starts->size(2);
    lists.width = width;
    total = lists.pages * width;
  }
  const int64_t heads = kv_heads * queries.group;
  Tensor out = torch::stable::new_empty(q, {batch, heads, queries.length, total});
  Tensor lse = torch::stable::new_empty(q, {batch, heads, queries.length}, ScalarType::Float);
  float* out_data = static_cast<float*>(out.mutable_data_ptr());
  float* lse_data = static_cast<float*>(lse.mutable_data_ptr());

  const VoteKernels& kernels = active_kernels().votes;
  // An item of a list is whole pages.
  const int64_t item_pages = std::max<int64_t>(1, kItemKeys / lists.width);
  const int64_t item_keys = lists.data == nullptr ? kItemKeys : item_pages * lists.width;
  const int64_t chunks = ceil_div(total, item_keys);
  const int64_t rows = queries.rows;
  std::vector<float> maxima(static_cast<size_t>(batch * kv_heads * chunks * rows));
  std::vector<float> sums(maxima.size());
  const bool small = batch * kv_heads * total * keys.dim * keys.element < kSmallBytes;
  run_items(batch * kv_heads * chunks, small, [&](int64_t item) {
    const int64_t first = item % chunks * item_keys;
    const int64_t count = std::min(item_keys, total - first);
    const int64_t b = item / chunks / kv_heads, h = item / chunks % kv_heads;
    float* scores = out_data + (b * heads + h * queries.group) * queries.length * total + first;
    if (lists.data == nullptr) {
      ScoreRun run = keys.run(b, h, first);
      queries.describe(run, b, h);
      run.count = count;
      run.out = scores;
      run.out_stride = total;
      kernels.score(run);
    } else {
      const int32_t* list = lists.data + b * lists.stride_b + h * lists.stride_h;
      const auto start_of = [&](int64_t page) {
        return std::clamp<int64_t>(list[std::min(page, lists.pages - 1)], 0,
                                   keys.count - lists.width);
      };
      for (int64_t i = 0; i < count; i += lists.width) {
        const int64_t page = (first + i) / lists.width, start = start_of(page);
        ScoreRun run = keys.run(b, h, start);
        run.ahead = (start_of(page + 1) - start) * keys.stride_l * keys.element;
        queries.describe(run, b, h);
        run.count = lists.width;
        run.out = scores + i;
        run.out_stride = total;
        kernels.score(run);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      float* line = scores + row * total;
      const int64_t visible = causal ? total - (queries.length - 1 - row % queries.length) : total;
      for (int64_t i = std::max<int64_t>(0, visible - first); i < count; ++i) line[i] = kNone;
      float top;
      sums[item * rows + row] = kernels.exp_sum(line, count, &top);
      maxima[item * rows + row] = top;
    }
  });
  for (int64_t group = 0; group < batch * kv_heads; ++group) {
    for (int64_t row = 0; row < rows; ++row) {
      const size_t base = static_cast<size_t>(group * chunks * rows + row);
      float top = kNone;
      for (int64_t c = 0; c < chunks; ++c) top = std::max(top, maxima[base + c * rows]);
      double sum = 0.0;
      for (int64_t c = 0; c < chunks && top > kNone; ++c) {
        sum += sums[base + c * rows] * std::exp(static_cast<double>(maxima[base + c * rows] - top));
      }
      lse_data[group * rows + row] = sum > 0.0 ? top + static_cast<float>(std::log(sum)) : kNone;
    }
  }
  return {out, lse};
}

Tensor page_scores(const Tensor& q, const Tensor& bounds) {
  const Keys keys = view_keys(bounds, "bounds");
  LC_CHECK(!is_integer(keys.type), "bounds", "a floating dtype", "integers");
  const int64_t batch = bounds.size(0), kv_heads = bounds.size(1), pages = keys.count;
  const Queries queries = pack_queries(q, kv_heads, 1.0f, true);
  LC_CHECK(queries.batch == batch && bounds.size(3) == queries.dim, "bounds",
           concat("shape [", queries.batch, ", Hkv, P, ", queries.dim, "]"), shape_text(bounds));
  Tensor out =
      torch::stable::new_empty(q, {batch, kv_heads * queries.group, queries.length, pages});
  float* out_data = static_cast<float*>(out.mutable_data_ptr());
  const VoteKernels& kernels = active_kernels().votes;
  const int64_t chunks = ceil_div(pages, kItemKeys / 2);
  const bool small = batch * kv_heads * pages * queries.dim * keys.element < kSmallBytes;
  run_items(batch * kv_heads * chunks, small, [&](int64_t item) {
    const int64_t first = item % chunks * (kItemKeys / 2);
    const int64_t group = item / chunks;
    ScoreRun run = keys.run(group / kv_heads, group % kv_heads, first);
    queries.describe(run, group / kv_heads, group % kv_heads);
    run.count = std::min(kItemKeys / 2, pages - first);
    run.out = out_data + group * queries.rows * pages + first;
    run.out_stride = pages;
    kernels.score(run);
  });
  return out;
}

template <typename T>
float as_float(const T* p) {
  return static_cast<float>(*p);
}
template <>
float as_float<BFloat16>(const BFloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
template <>
float as_float<Float16>(const Float16* p) {
  return static_cast<float>(*reinterpret_cast<const torch::headeronly::Half*>(p));
}

template <typename T>
void quantize_row(const T* key, int64_t dim, bool nibbles, int8_t* out, float* scale) {
  float largest = 0.0f;
  for (int64_t d = 0; d < dim; ++d) largest = std::max(largest, std::fabs(as_float(key + d)));
  const float levels = nibbles ? 7.0f : 127.0f;
  *scale = largest / levels;
  const float factor = largest > 0.0f ? levels / largest : 0.0f;
  const auto level = [&](int64_t d) { return nearest(as_float(key + d) * factor); };
  if (nibbles) {
    const int64_t half = dim / 2;
    for (int64_t d = 0; d < half; ++d) {
      out[d] = static_cast<int8_t>((level(d) & 15) | level(half + d) << 4);
    }
  } else {
    for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<int8_t>(level(d));
  }
}

Outputs quantize_keys(const Tensor& k, int64_t bits) {
  const Keys keys = view_keys(k, "k");
  LC_CHECK(!is_integer(keys.type), "k", "dtype float32, bfloat16 or float16", "integers");
  LC_CHECK(bits == 8 || bits == 4, "bits", "8 or 4", bits);
  const bool nibbles = bits == 4;
  const int64_t heads = k.size(1), N = k.size(2), D = k.size(3);
  LC_CHECK(!nibbles || D % 2 == 0, "k", "an even last dimension for 4 bits", D);
  const int64_t width = nibbles ? D / 2 : D;
  const ScalarType type = nibbles ? ScalarType::Byte : ScalarType::Char;
  Tensor out = torch::stable::new_empty(k, {k.size(0), heads, N, width}, type);
  Tensor scales = torch::stable::new_empty(k, {k.size(0), heads, N}, ScalarType::Float);
  int8_t* data = static_cast<int8_t*>(out.mutable_data_ptr());
  float* factors = static_cast<float*>(scales.mutable_data_ptr());
  const int64_t chunks = ceil_div(N, kItemKeys);
  const bool small = k.size(0) * heads * N * D * keys.element < kSmallBytes;
  run_items(k.size(0) * heads * chunks, small, [&](int64_t item) {
    const int64_t group = item / chunks, first = item % chunks * kItemKeys;
    for (int64_t n = first; n < std::min(N, first + kItemKeys); ++n) {
      const void* key = keys.run(group / heads, group % heads, n).keys;
      int8_t* row = data + (group * N + n) * width;
      float* scale = factors + group * N + n;
      if (keys.type == KeyType::kFloat32) {
        quantize_row(static_cast<const float*>(key), D, nibbles, row, scale);
      } else if (keys.type == KeyType::kBFloat16) {
        quantize_row(static_cast<const BFloat16*>(key), D, nibbles, row, scale);
      } else {
        quantize_row(static_cast<const Float16*>(key), D, nibbles, row, scale);
      }
    }
  });
  return {out, scales};
}

}  // namespace
}  // namespace lowcontext

STABLE_TORCH_LIBRARY_IMPL(lowcontext, CPU, m) {
  m.impl("token_scores", TORCH_BOX(&lowcontext::token_scores));
  m.impl("page_scores", TORCH_BOX(&lowcontext::page_scores));
  m.impl("quantize_keys", TORCH_BOX(&lowcontext::quantize_keys));
}
