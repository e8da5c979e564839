// The kernel for whatever the compiler targets by default: SSE2 on x86-64, NEON on ARM.
#include "variant_headers.h"

#define MLS_VARIANT baseline
#define MLS_VEC_BYTES 16
#include "variant.h"

namespace mls::cpu {
const KernelTable kBaselineTable = baseline::vector_table("baseline");
}
