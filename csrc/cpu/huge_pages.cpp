#include "../ops.h"
#include "launch.h"

namespace lowcontext {
namespace {

void prefer_huge_pages_of(const Tensor& fresh) {
  prefer_huge_pages(fresh.data_ptr(), static_cast<size_t>(fresh.numel() * fresh.element_size()));
}

}  // namespace
}  // namespace lowcontext

STABLE_TORCH_LIBRARY_IMPL(lowcontext, CPU, m) {
  m.impl("_prefer_huge_pages", TORCH_BOX(&lowcontext::prefer_huge_pages_of));
}
