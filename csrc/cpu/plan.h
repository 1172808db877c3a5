// How a problem is cut into work items, and the table of kernels that one instruction set offers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/block_scores.h"
#include "../common/problem.h"
#include "../common/rotary.h"
#include "../common/votes.h"
#include "../common/window_scores.h"

namespace lowcontext {

// A work item is a chunk of the rows of one query block for one group of query heads that read the
// same keys, and one split of its keys. Nothing here depends on the number of threads, so neither
// does the result.
struct Plan {
  bool decode = false;  // few rows: lanes over head_dim; otherwise lanes over rows
  int64_t heads =
      0;  // groups of query heads: kv_heads where the group shares its keys, else q_heads
  int64_t group = 1;    // query heads in one group
  int64_t block_q = 1;  // rows [n * block_q - shift, (n + 1) * block_q - shift) form block n
  int64_t shift = 0;
  int64_t blocks = 0;
  int64_t chunk_rows = 1;  // rows of an item
  int64_t chunks = 1;      // items per block
  int64_t splits = 1;
  int64_t split_keys = 0;  // listed keys per split
  int64_t items = 0;

  int64_t max_lanes() const { return chunk_rows * group; }
  // Partial results of one split of an item: output [lanes, D], then maximum [lanes] and sum
  // [lanes].
  int64_t partial_floats(int64_t head_dim) const { return max_lanes() * (head_dim + 2); }
};

// An item, unfolded. Lane i is row row + i / group of query head head * group + i % group.
struct Item {
  int64_t batch, head, block, row, rows, split, first_item;
};

// Where a thread takes its items from. A kernel may look at the item after its own, to bring its
// memory into the cache: the thread then has taken that item, and runs it next.
class ItemQueue {
 public:
  // counter: the next item that no thread has taken.
  ItemQueue(const Problem& problem, const Plan& plan, int64_t* counter)
      : problem_(problem), plan_(plan), counter_(counter) {}

  // The next item, or null; the same until pop().
  const Item* peek();
  void pop() { taken_ = false; }
  int64_t index() const { return index_; }

 private:
  const Problem& problem_;
  const Plan& plan_;
  int64_t* counter_;
  bool taken_ = false;
  int64_t index_ = 0;
  Item item_;
};

// Limits that depend on the kernel's vector width.
struct KernelShape {
  int64_t decode_lanes;  // at most this many lanes go to the decode kernel
  int64_t panel_lanes;   // lanes of a panel
  int64_t key_lanes;     // keys of a panel of keys
};

// Best scores of rows: out[i] = max over r, and of out[i] where accumulate.
struct BestScores {
  const float* rows;  // [num_rows, row_stride], with zeros from head_dim to a multiple of 16
  int64_t num_rows;   // 1, 2 or a multiple of 4
  int64_t row_stride;
  int64_t head_dim;
  int64_t count;
  bool accumulate;
  float* out;  // [count]
};

// Of rows[r, :] . keys[positions[i], :].
struct ScoreCall : BestScores {
  DType dtype;       // of the keys
  const void* keys;  // of one batch row and head
  int64_t stride;    // elements between keys
  const int32_t* positions;
};

// out[i, d, j] = keys[positions[i] + j * step, d] for j < key_lanes, as fp32.
struct KeyPanelCall {
  DType dtype;       // of the keys
  const void* keys;  // of one batch row and head
  int64_t stride;    // elements between keys
  const int32_t* positions;
  int64_t count;
  int64_t step;
  int64_t head_dim;
  float* out;  // [count, head_dim, key_lanes]
};

// Of rows[r, :] . key over the keys of panel panels[i].
struct PanelScoreCall : BestScores {
  const float* keys;  // panels of keys
  const int32_t* panels;
};

struct BlockScoreKernels {
  size_t (*cell_floats)(const CellScores&);  // scratch of cell_scores
  // Scores of one span of query blocks of batch row b and KV head h.
  void (*cell_scores)(const CellScores&, int64_t b, int64_t h, int64_t span, float* scratch);
  // Mean of block n of batch row b and head h, to out [D].
  void (*block_mean)(const BlockMeans&, int64_t b, int64_t h, int64_t n, float* out);
};

struct KernelTable {
  const char* name;
  KernelShape shape;
  size_t (*scratch_floats)(const Problem&, const Plan&);
  // Computes an item: into the output when the plan has one split, else into partial.
  void (*run)(const Problem&, const Plan&, const Item&, ItemQueue& queue, float* scratch,
              float* partial);
  // Merges the partial results of all splits of an item into the output.
  void (*combine)(const Problem&, const Plan&, const Item&, float* scratch, const float* partials);
  // The passes of WindowScores, for batch row b, KV head h and a chunk of its keys.
  void (*window_pack)(const WindowScores&, int64_t b, int64_t h);
  void (*window_scan)(const WindowScores&, int64_t b, int64_t h, int64_t chunk);
  void (*window_add)(const WindowScores&, int64_t b, int64_t h, int64_t chunk);
  VoteKernels votes;
  void (*best_scores)(const ScoreCall&);
  void (*pack_keys)(const KeyPanelCall&);
  void (*best_of_panels)(const PanelScoreCall&);
  BlockScoreKernels block_scores;
  RotaryKernels rotary;
};

Plan make_plan(const Problem& problem, const KernelShape& shape);
Item get_item(const Problem& problem, const Plan& plan, int64_t i);

// Null where this build or this machine lacks the instruction set.
const KernelTable* kernels_avx512();
const KernelTable* kernels_avx2();
const KernelTable* kernels_portable();

}  // namespace lowcontext
