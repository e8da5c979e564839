// Included once by each variant_*.cpp, after its target pragma: the whole kernel in that variant's namespace.
#include "backward.h"
#include "forward.h"

#define MLS_DEFINE_TABLE(table, table_name)                  \
  namespace mls::cpu {                                       \
  const KernelTable table = {table_name,                     \
                             MLS_VARIANT::forward_workload,  \
                             MLS_VARIANT::forward_task,      \
                             MLS_VARIANT::backward_workload, \
                             MLS_VARIANT::init_turns,        \
                             MLS_VARIANT::backward_task};    \
  }
