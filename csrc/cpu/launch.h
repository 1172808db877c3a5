// Runs a problem on torch's threads with the kernels of the chosen instruction set.
#pragma once

#include "../common/problem.h"
#include "plan.h"

namespace lowcontext {

void launch(const Problem& problem);

// The kernels in use: of the widest instruction set that the machine has, unless a test has chosen
// another.
const KernelTable& active_kernels();

}  // namespace lowcontext
