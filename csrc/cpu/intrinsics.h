// x86 intrinsics, where there are any.
#pragma once

#include "isa.h"

#ifdef VAR_FAST_X86
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 takes the unset registers that its own header starts from for a mistake of ours
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif
