// Which instruction set the CPU operators use: chosen at run time, so that one build runs on every x86-64 machine.
#pragma once

#if defined(__x86_64__)
#define VAR_FAST_X86 1
#define VAR_FAST_AVX2 __attribute__((target("avx2,fma,f16c")))
#define VAR_FAST_AVX512 \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#define VAR_FAST_AVX512_BF16 \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")))
#define VAR_FAST_AMX                                                                                                  \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,prefer-" \
                          "vector-width=512")))
#endif

namespace var_fast::cpu {

// Each one holds all that come before it.
enum class Isa { portable, avx2, avx512, avx512_bf16, amx };

// The best one of this machine, or the one that the environment variable VAR_FAST_ISA names (read once, for tests).
// Throws std::invalid_argument where that is unknown or not to be had here.
Isa isa();
const char* isa_name(Isa isa);

#ifdef VAR_FAST_X86
template <class Body, class... Args>
VAR_FAST_AVX512 void run_avx512(Args... args) {
    Body::run(args...);
}
template <class Body, class... Args>
VAR_FAST_AVX2 void run_avx2(Args... args) {
    Body::run(args...);
}
#endif

// Body::run(args...) as the compiler vectorises it for the instruction set at hand. It has to be always_inline (and what
// it calls too), else it would be compiled for the oldest machine.
template <class Body, class... Args>
void dispatch(Args... args) {
#ifdef VAR_FAST_X86
    if (isa() >= Isa::avx512) return run_avx512<Body>(args...);
    if (isa() >= Isa::avx2) return run_avx2<Body>(args...);
#endif
    Body::run(args...);
}

}  // namespace var_fast::cpu
