#include "hierarchy_task.h"
#include "launch.h"
#include "vec.h"

namespace lowcontext {
namespace hierarchy {
namespace {

// Halvings of a piece of x keys until every part is one key.
int64_t halvings(int64_t x) {
  int64_t levels = 0;
  while ((int64_t{1} << levels) < x) ++levels;
  return levels;
}

}  // namespace

template <typename T>
void Task::append_rows(Block& b, int64_t head) {
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

// The rows of each KV head together, or of each query head for itself.
void Task::gather_rows(Block& b, bool per_query_head) {
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

template <typename Call>
Call Task::row_scores(const Block& b, const RowSet& set, size_t count, bool accumulate) {
  if (w_.scores.size() < count) w_.scores.resize(count);
  Call call;
  call.rows = b.rows.data() + set.offset;
  call.num_rows = set.count;
  call.row_stride = row_floats_;
  call.head_dim = p_.head_dim;
  call.count = static_cast<int64_t>(count);
  call.accumulate = accumulate;
  call.out = w_.scores.data();
  return call;
}

// w.scores[i] = best score of w.positions[i] among the rows of the set, and among what is there.
void Task::score(const Block& b, const RowSet& set, bool accumulate) {
  auto call = row_scores<ScoreCall>(b, set, w_.positions.size(), accumulate);
  call.dtype = p_.dtype;
  call.keys = head_keys(set.kv_head);
  call.stride = p_.k.stride_l;
  call.positions = w_.positions.data();
  kernels_.best_scores(call);
}

// b.best[from + i] = the best score of the keys of unit w.units[i].
void Task::score_units(const Units& units, const Stretch& stretch, Block& b, size_t from) {
  // One query reads each key once: its score costs no more than a transposition would. The choice
  // rests on the settings alone, since the two round differently.
  if (s_.block_q > 1 && units.keys % kernels_.shape.key_lanes == 0) {
    return score_panels(units, stretch, b, from);
  }
  w_.positions.clear();
  for (const int64_t unit : w_.units) {
    const int64_t key = units.origin + unit * units.size + units.offset;
    for (int64_t i = 0; i < units.keys; ++i) {
      w_.positions.push_back(static_cast<int32_t>(key + i * units.step));
    }
  }
  for (size_t set = 0; set < b.row_sets.size(); ++set) score(b, b.row_sets[set], set > 0);
  const float* each = w_.scores.data();
  for (size_t i = 0; i < w_.units.size(); ++i, each += units.keys) {
    b.best[from + i] = *std::max_element(each, each + units.keys);
  }
}

// The same by panels of keys, which the blocks of the task share while the stretch is theirs.
void Task::score_panels(const Units& units, const Stretch& stretch, Block& b, size_t from) {
  const int64_t sets = this->sets();
  const int64_t lanes = kernels_.shape.key_lanes, per_unit = units.keys / lanes;
  const int64_t floats = p_.head_dim * lanes;
  const int64_t needed = per_unit * sets;  // panels of a unit
  const int64_t capacity =
      std::max(needed, kPanelBytes / (floats * static_cast<int64_t>(sizeof(float))));
  float* panels = thread_scratch(static_cast<size_t>(capacity * floats));
  const int64_t first = (stretch.begin - units.origin) / units.size;
  if (w_.slots.empty()) {
    w_.slots.assign(static_cast<size_t>(stretch.keys / units.size * sets), -1);
    panels_ = 0;
  }
  const auto slot = [&](size_t i, int64_t set) -> int32_t& {
    return w_.slots[static_cast<size_t>((w_.units[i] - first) * sets + set)];
  };
  const size_t step = static_cast<size_t>(capacity / needed), count = w_.units.size();
  for (size_t begin = 0; begin < count; begin += step) {
    const size_t end = std::min(count, begin + step);
    int64_t missing = 0;
    for (size_t i = begin; i < end; ++i) missing += slot(i, 0) < 0;
    if (panels_ + missing * needed > capacity) {
      std::fill(w_.slots.begin(), w_.slots.end(), -1);
      panels_ = 0;
    }
    for (int64_t set = 0; set < sets; ++set) {
      const RowSet& rows = b.row_sets[static_cast<size_t>(set)];
      KeyPanelCall pack;
      pack.out = panels + panels_ * floats;
      w_.positions.clear();
      w_.unpacked.clear();
      for (size_t i = begin; i < end; ++i) {
        int32_t& panel = slot(i, set);
        if (panel < 0) {
          panel = static_cast<int32_t>(panels_);
          panels_ += per_unit;
          const int64_t key = units.origin + w_.units[i] * units.size + units.offset;
          for (int64_t u = 0; u < per_unit; ++u) {
            w_.unpacked.push_back(static_cast<int32_t>(key + u * lanes * units.step));
          }
        }
        for (int32_t u = 0; u < per_unit; ++u) w_.positions.push_back(panel + u);
      }
      pack.dtype = p_.dtype;
      pack.keys = head_keys(rows.kv_head);
      pack.stride = p_.k.stride_l;
      pack.positions = w_.unpacked.data();
      pack.count = static_cast<int64_t>(w_.unpacked.size());
      pack.step = units.step;
      pack.head_dim = p_.head_dim;
      kernels_.pack_keys(pack);
      auto call = row_scores<PanelScoreCall>(b, rows, w_.positions.size(), set > 0);
      call.keys = panels;
      call.panels = w_.positions.data();
      kernels_.best_of_panels(call);
    }
    const float* each = w_.scores.data();
    for (size_t i = begin; i < end; ++i, each += per_unit) {
      b.best[from + i] = *std::max_element(each, each + per_unit);
    }
  }
}

// b.best[from, to) = scores of the nodes [from, to), each by keys from all over it.
void Task::spread_nodes(const Tree& tree, Block& b, size_t from, size_t to) {
  const int64_t per_node = tree.leaf / tree.key_stride;
  w_.positions.clear();
  for (size_t i = from; i < to; ++i) {
    const int64_t first = low_ * s_.block_k + b.left[i] * tree.leaf;
    const int64_t keys = (b.right[i] - b.left[i]) * tree.leaf;
    for (int64_t u = 0; u < per_node; ++u) {
      w_.positions.push_back(static_cast<int32_t>(first + (2 * u + 1) * keys / (2 * per_node)));
    }
  }
  for (size_t set = 0; set < b.row_sets.size(); ++set) score(b, b.row_sets[set], set > 0);
  const float* each = w_.scores.data();
  for (size_t i = from; i < to; ++i, each += per_node) {
    b.best[i] = *std::max_element(each, each + per_node);
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

}  // namespace hierarchy
}  // namespace lowcontext
