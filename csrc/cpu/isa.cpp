#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef VAR_FAST_X86
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace var_fast::cpu {
namespace {

constexpr const char* NAMES[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

#ifdef VAR_FAST_X86
// Linux gives the tile registers only to processes that ask.
bool may_use_amx() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

bool has_amx_bf16() {
    unsigned a = 7, b = 0, c = 0, d = 0;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
    return (d & AMX_BF16) && (d & AMX_TILE);
}

Isa best() {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return Isa::portable;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return Isa::avx2;
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
    return has_amx_bf16() && may_use_amx() ? Isa::amx : Isa::avx512_bf16;
}
#else
Isa best() { return Isa::portable; }
#endif

Isa choose() {
    const Isa here = best();
    const char* wanted = std::getenv("VAR_FAST_ISA");
    if (wanted == nullptr || *wanted == 0) return here;
    for (int i = 0; i <= static_cast<int>(Isa::amx); ++i) {
        if (std::string(wanted) != NAMES[i]) continue;
        if (i > static_cast<int>(here))
            throw std::invalid_argument(std::string("VAR_FAST_ISA is ") + wanted + ", this machine has " +
                                        isa_name(here) + " at best");
        return static_cast<Isa>(i);
    }
    throw std::invalid_argument(std::string("VAR_FAST_ISA is ") + wanted +
                                ", expected portable, avx2, avx512, avx512_bf16 or amx");
}

}  // namespace

Isa isa() {
    static const Isa chosen = choose();
    return chosen;
}

const char* isa_name(Isa isa) { return NAMES[static_cast<int>(isa)]; }

}  // namespace var_fast::cpu
