// The walk that turns chosen distances and keys of one head into the tiles and columns of one block
// of queries. Free of torch.
//
// With end = block * (m + 1), a distance d < end asks for the window of `block` keys that ends at
// max(end - d, block). `reach` is the end of the last range; the next window that reaches past it
// is that of the largest d below end - reach, and it adds one tile: at its own start where that
// lies past `reach` (a new range), else at `reach` (the range grows by a block). So each step emits
// a tile, and reach never falls.
#pragma once

#include <cstdint>

namespace lowcontext {

// The chosen lines of one head.
struct Lines {
  const int32_t* distances;  // descending
  int64_t num_distances;
  const int32_t* keys;  // ascending
  int64_t num_keys;
};

struct BlockLists {
  int32_t* starts;
  int64_t most_starts;
  int32_t* columns;
  int64_t most_columns;
  int32_t num_starts;
  int32_t num_columns;
};

// Lists more than fit are cut at the right.
inline void list_block(const Lines& lines, int64_t m, int64_t block, bool dense, BlockLists& out) {
  const int64_t end = block * (m + 1);
  int64_t reach = 0, tiles = 0, columns = 0, next_key = 0;
  const auto add_keys_before = [&](int64_t limit) {
    for (; next_key < lines.num_keys && lines.keys[next_key] < limit; ++next_key) {
      if (columns < out.most_columns) out.columns[columns++] = lines.keys[next_key];
    }
  };
  for (int64_t i = 0; reach < end && tiles < out.most_starts;) {
    int64_t start = reach;
    if (!dense) {
      while (i < lines.num_distances && lines.distances[i] >= end - reach) ++i;
      if (i == lines.num_distances) break;
      const int64_t window = end - lines.distances[i] - block;
      start = window > reach ? window : reach;
    }
    add_keys_before(start);
    out.starts[tiles++] = static_cast<int32_t>(start);
    reach = start + block;
    while (next_key < lines.num_keys && lines.keys[next_key] < reach) ++next_key;
  }
  out.num_starts = static_cast<int32_t>(tiles);
  out.num_columns = static_cast<int32_t>(columns);
}

}  // namespace lowcontext
