// Searches for the tiles of high scores among the keys between sink and window: HiP's tree and
// InfiniteHiP's stages. A task searches for some consecutive blocks of queries of one batch row and
// list. What a block lists depends on nothing but the inputs, so the result does not depend on the
// number of threads.
#pragma once

#include <cstdint>

#include "../common/problem.h"

namespace lowcontext {

enum class Representative : int { kCenter = 0, kFirst = 1, kLast = 2, kSpread = 3 };

// What both searches share; lengths in keys. Candidates of a block of queries whose first has
// position p, in this call or not, are the tiles from ceil(sink / block_k) to before
// floor((p - behind - window + 1) / block_k).
struct Search {
  Problem problem;  // q and k; v is not used
  int64_t block_q, block_k;
  int64_t sink, window;
  int64_t picks;  // tiles found, at most
  int64_t lists;  // heads of the index: 1, kv_heads or q_heads
  int64_t row_stride;
  bool mean_rows;  // else the last row of each stride
  Representative representative;
  int64_t behind, ahead;
  int64_t width;    // entries of a list
  int32_t* counts;  // [B, lists, Nq]
  int32_t* starts;  // [B, lists, Nq, width]

  int64_t first_block() const { return (problem.kv_len - problem.q_len) / block_q; }
  int64_t blocks() const { return (problem.kv_len + block_q - 1) / block_q - first_block(); }
};

struct Tree {
  int64_t leaf, key_stride, beam;
};

struct Stage {
  int64_t chunk;
  bool final;            // list tiles; else keep at most `width` chunks
  bool last_score;       // of the last representative; else the best on the way
  IndexView counts;      // the chunks to cut up; data null: every chunk of the grid
  IndexView starts;      // their first keys
  int64_t chunk_before;  // their size
};

void run_tree(const Search& search, const Tree& tree);
void run_stage(const Search& search, const Stage& stage);

}  // namespace lowcontext
