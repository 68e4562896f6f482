// Intel's intrinsics, without the false alarms that GCC 12 raises inside their own header where they are inlined.
#pragma once

#include "isa.h"

#ifdef VAR_FAST_X86
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif
