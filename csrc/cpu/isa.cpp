#include <atomic>

#include "../ops.h"
#include "launch.h"

namespace lowcontext {
namespace {

std::atomic<const KernelTable*>& chosen() {
  static std::atomic<const KernelTable*> table{nullptr};
  return table;
}

const KernelTable* widest() {
  if (const KernelTable* table = kernels_avx512()) return table;
  if (const KernelTable* table = kernels_avx2()) return table;
  return kernels_portable();
}

std::string cpu_isa() { return active_kernels().name; }

// For tests: "auto", or the name of an instruction set that the machine has.
void set_cpu_isa(std::string isa) {
  const KernelTable* tables[] = {widest(), kernels_avx512(), kernels_avx2(), kernels_portable()};
  for (const KernelTable* table : tables) {
    if (table != nullptr && (isa == "auto" || isa == table->name)) {
      chosen().store(table);
      return;
    }
  }
  LC_CHECK(false, "isa", "auto, or an instruction set of this machine (avx512, avx2, portable)",
           isa);
}

}  // namespace

const KernelTable& active_kernels() {
  const KernelTable* table = chosen().load();
  if (table == nullptr) {
    table = widest();
    chosen().store(table);
  }
  return *table;
}

}  // namespace lowcontext

STABLE_TORCH_LIBRARY_IMPL(lowcontext, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&lowcontext::cpu_isa));
  m.impl("_set_cpu_isa", TORCH_BOX(&lowcontext::set_cpu_isa));
}
