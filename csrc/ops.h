// What the torch-facing sources share: the stable ABI's names and the form of an error.
#pragma once

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace lowcontext {

using torch::stable::Tensor;
using Outputs = std::tuple<Tensor, Tensor>;

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i > 0 ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

}  // namespace lowcontext

// Throws "name: expected X, got Y". STD_TORCH_CHECK would put the source line before the name.
#define LC_CHECK(condition, name, expected, got)                                                \
  if (!(condition)) {                                                                           \
    throw std::runtime_error(lowcontext::concat(name, ": expected ", expected, ", got ", got)); \
  }
