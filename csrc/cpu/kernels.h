// Builds the kernel table of the instruction set this file is compiled for.
#pragma once

#include <cstdint>

#include "best_scores.h"
#include "block_scores.h"
#include "decode.h"
#include "key_panels.h"
#include "panel.h"
#include "plan.h"
#include "rotary.h"
#include "rows.h"
#include "vec.h"
#include "votes.h"
#include "window_scores.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace lowcontext {
namespace {

// Weights of forgotten keys reach the subnormal range, where each operation costs over a hundred
// cycles: flush them to zero, for the time of an item.
class FlushSubnormals {
 public:
#if defined(__SSE__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

size_t scratch_floats(const Problem& p, const Plan& plan) {
  const size_t floats = plan.decode ? DecodeScratch::floats(p) : PanelScratch::floats(p, plan);
  const size_t weights = static_cast<size_t>(plan.splits);
  return floats > weights ? floats : weights;
}

template <typename T>
void run_as(const Problem& p, const Plan& plan, const Item& item, ItemQueue& queue, float* scratch,
            float* partial) {
  if (plan.decode) return run_decode<T>(p, plan, item, queue, scratch, partial);
  run_panels<T>(p, plan, item, queue, scratch, partial);
}

void run_item(const Problem& p, const Plan& plan, const Item& item, ItemQueue& queue,
              float* scratch, float* partial) {
  if (item.rows == 0) return;
  const FlushSubnormals guard;
  switch (p.dtype) {
    case DType::kFloat32:
      return run_as<float>(p, plan, item, queue, scratch, partial);
    case DType::kBFloat16:
      return run_as<BFloat16>(p, plan, item, queue, scratch, partial);
    case DType::kFloat16:
      return run_as<Float16>(p, plan, item, queue, scratch, partial);
  }
}

void combine_item(const Problem& p, const Plan& plan, const Item& item, float* scratch,
                  const float* partials) {
  if (item.rows == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return combine_splits<float>(p, plan, item, scratch, partials);
    case DType::kBFloat16:
      return combine_splits<BFloat16>(p, plan, item, scratch, partials);
    case DType::kFloat16:
      return combine_splits<Float16>(p, plan, item, scratch, partials);
  }
}

constexpr KernelTable kTable = {kIsaName,       {kDecodeLanes, kLanes, kWidth},
                                scratch_floats, run_item,
                                combine_item,   window_pack,
                                window_scan,    window_add,
                                kVotes,         best_scores,
                                pack_keys,      best_of_panels,
                                kBlockScores,   kRotary};

}  // namespace
}  // namespace lowcontext
