// The schema of every native op, and nothing else. Implementations register themselves per device.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(lowcontext, m) {
  m.def(
      "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor kv_num_blocks, Tensor kv_starts, "
      "Tensor? kv_num_columns, Tensor? kv_columns, int block_q, int block_k, float scale, float "
      "softcap, "
      "Tensor? kv_start) -> (Tensor, Tensor)");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, float scale, float softcap, int window, Tensor? "
      "kv_start) "
      "-> (Tensor, Tensor)");
  m.def("last_window_scores(Tensor q, Tensor k, float scale, float softcap) -> (Tensor, Tensor)");
  m.def(
      "line_index(Tensor vertical, Tensor slash, int Lq, int block, int tiles, int columns, "
      "Tensor? dense_from) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("antidiagonal_scores(Tensor q, Tensor k, int stride, int block, float scale) -> Tensor");
  m.def("block_means(Tensor x, int block, int offset) -> Tensor");
  m.def(
      "token_scores(Tensor q, Tensor k, Tensor? scales, Tensor? starts, int width, float scale, "
      "bool causal) -> (Tensor, Tensor)");
  m.def("page_scores(Tensor q, Tensor bounds) -> Tensor");
  m.def("quantize_keys(Tensor k, int bits) -> (Tensor, Tensor)");
  m.def("soft_vote(Tensor scores, Tensor lse, int heads) -> Tensor");
  m.def("topk(Tensor scores, int k, Tensor? limits) -> (Tensor, Tensor)");
  m.def("mass_mask(Tensor weights, int share, Tensor? forced) -> Tensor");
  m.def(
      "hip_tree(Tensor q, Tensor k, int block_q, int block_k, int sink, int window, int picks, int "
      "lists, int width, int row_stride, bool mean_rows, int representative, int ahead, int leaf, "
      "int key_stride, int beam) -> (Tensor, Tensor)");
  m.def(
      "hip_stage(Tensor q, Tensor k, int block_q, int block_k, int sink, int window, int picks, "
      "int "
      "lists, int width, int row_stride, bool mean_rows, int representative, int behind, int "
      "ahead, "
      "int chunk, bool final, bool last_score, Tensor? counts, Tensor? starts, int chunk_before) "
      "-> "
      "(Tensor, Tensor)");
  m.def(
      "rotate_to(Tensor x, Tensor? old, Tensor? new, int old_first, int old_step, int new_first, "
      "int new_step, Tensor inv_freq, bool interleaved) -> Tensor");
  m.def(
      "gather_moved(Tensor k, Tensor v, Tensor keys, Tensor first, Tensor inv_freq, bool "
      "interleaved) -> (Tensor, Tensor)");
  m.def("_prefer_huge_pages(Tensor fresh) -> ()");
  m.def("cpu_isa() -> str");
  m.def("_set_cpu_isa(str isa) -> ()");
}
