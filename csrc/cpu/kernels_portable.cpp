// The kernels for any machine: four lanes, by the compiler's vector extension.
#include "kernels.h"

namespace lowcontext {

const KernelTable* kernels_portable() { return &kTable; }

}  // namespace lowcontext
