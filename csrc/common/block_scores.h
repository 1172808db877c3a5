// Scores of key blocks from antidiagonals of the logits, and means of blocks, as plain data. Free
// of torch.
//
// Positions form cells of `stride` and blocks of `block`, both anchored at position 0. For query
// cell a and key cell b <= a
//
//   logit[a, b] = scale / stride * sum_t q[stride * a + stride - 1 - t, :] . k[stride * b + t, :]
//   score[n, m] = sum over the cells a of block n and b of block m of softmax_b(logit[a, :])
//
// Positions that do not exist add nothing, and a query cell without any has no weights.
#pragma once

#include <cstdint>

#include "problem.h"

namespace lowcontext {

// Of the problem q, k and scale.
struct CellScores : Problem {
  static constexpr int64_t kItemLanes = 64;  // query cells of a work item, at least
  static constexpr int64_t kStepCells = 48;  // key cells of a softmax step, at least

  int64_t stride = 1;
  int64_t block = 1;        // a multiple of stride
  float* scores = nullptr;  // [B, Hq, query blocks, key blocks], contiguous

  int64_t offset() const { return kv_len - q_len; }  // position of the first query
  int64_t cells() const { return block / stride; }   // of a block
  int64_t first_block() const { return offset() / block; }
  int64_t key_blocks() const { return ceil_div(kv_len, block); }
  int64_t query_blocks() const { return key_blocks() - first_block(); }

  // A work item is `span` blocks of queries of one KV head. Its lanes are query cells, ordered by
  // block, head of the group, cell.
  int64_t span() const { return ceil_div(kItemLanes, group() * cells()); }
  int64_t spans() const { return ceil_div(query_blocks(), span()); }
  int64_t lanes() const { return span() * group() * cells(); }
  // A step is so many key blocks.
  int64_t step_blocks() const { return ceil_div(kStepCells, cells()); }
  int64_t steps() const { return ceil_div(key_blocks(), step_blocks()); }
};

// out[b, h, n, :] = mean of the rows of q that lie in block first + n, q beginning at `offset`.
struct BlockMeans : Problem {
  int64_t offset = 0;
  int64_t block = 1;
};

}  // namespace lowcontext
