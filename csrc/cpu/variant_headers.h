// All standard and shared headers of the kernel. A variant includes them before its target pragma, so that
// inline functions shared with other objects are never compiled for instructions that the machine may lack.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "attention_params.h"
#include "kernel_table.h"
#include "visible_keys.h"
