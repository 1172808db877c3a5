// Runs a problem on torch's threads with the kernels of the chosen instruction set.
#pragma once

#include <cstddef>

#include "../common/problem.h"
#include "plan.h"

namespace lowcontext {

void launch(const Problem& problem);

// Memory of the calling thread, aligned to its pages; the next call may move or reuse it.
float* thread_scratch(size_t floats);

// A hint to the kernel: fewer page faults on fresh memory and fewer misses in the TLB.
void prefer_huge_pages(void* data, size_t bytes);

// The kernels in use: of the widest instruction set that the machine has, unless a test has chosen
// another.
const KernelTable& active_kernels();

}  // namespace lowcontext
