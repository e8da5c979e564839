// As ../variant_headers.h, for the sources of linear attention.
#pragma once
#include <numeric>

#include "../variant_headers.h"
#include "kernel.h"
