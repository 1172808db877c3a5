#include "hierarchy_arguments.h"

namespace lowcontext {
namespace {

Outputs hip_stage(const Tensor& q, const Tensor& k, int64_t block_q, int64_t block_k, int64_t sink,
                  int64_t window, int64_t picks, int64_t lists, int64_t width, int64_t row_stride,
                  bool mean_rows, int64_t representative, int64_t behind, int64_t ahead,
                  int64_t chunk, bool final, bool last_score, std::optional<Tensor> counts,
                  std::optional<Tensor> starts, int64_t chunk_before) {
  Search search = make_search(q, k, block_q, block_k, sink, window, picks, lists);
  set_rows(search, row_stride, mean_rows, representative);
  search.behind = token_count(behind, "behind");
  search.ahead = token_count(ahead, "ahead");
  LC_CHECK(chunk > 0 && chunk <= kLargest, "chunk", "a positive int32", chunk);
  LC_CHECK(!final || block_k % chunk == 0, "chunk", concat("a divisor of ", block_k), chunk);
  LC_CHECK(counts.has_value() == starts.has_value(), "starts", "given together with counts",
           "one without the other");
  Stage stage = {};
  stage.chunk = chunk;
  stage.final = final;
  stage.last_score = last_score;
  if (starts.has_value()) {
    LC_CHECK(chunk_before > 0 && chunk_before % chunk == 0, "chunk_before",
             concat("a multiple of ", chunk), chunk_before);
    const int64_t batch = search.problem.batch;
    stage.counts = index_view(*counts, "counts", 3, batch, lists, search.blocks());
    stage.starts = index_view(*starts, "starts", 4, batch, lists, search.blocks());
    stage.chunk_before = chunk_before;
  }
  Outputs out = allocate(search, q, width);
  run_stage(search, stage);
  return out;
}

}  // namespace
}  // namespace lowcontext

STABLE_TORCH_LIBRARY_IMPL(lowcontext, CPU, m) {
  m.impl("hip_stage", TORCH_BOX(&lowcontext::hip_stage));
}
