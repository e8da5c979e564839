// Every header of the kernel that is not its own. A variant includes these before its target pragma, so that
// library functions shared with other objects are never compiled for instructions the machine may lack.
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
