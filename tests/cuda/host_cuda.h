// Runs CUDA kernels on a CPU, for tests: g++ -x c++ -DVAR_FAST_ON_HOST -include host_cuda.h <operator>.cu
//
// Every thread of a block is a fiber (host_cuda.cpp); blocks run one after another, those of a cooperative launch side by
// side. A fiber gives way only where CUDA threads wait for each other, so a race shows as a result that depends on
// `host_cuda::order`, the order in which threads and blocks run. Dynamic shared memory starts as NaNs and ends at a page
// that must not be touched; asynchronous copies are made as late as they may be.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time; cooperative kernels have dynamic shared memory only

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host_cuda {

inline int order = 0;  // 0: first to last, 1: last to first, others: at random, by this seed

// Runs `body` in `threads` fibers for each block; throws std::runtime_error where a launch would fail or never end.
void run(const std::string& op, const std::function<void()>& body, dim3 grid, int64_t threads, int64_t shared,
         bool cooperative = false);

// Waits for all threads of the block that have not ended; whether `any` of them said so.
bool barrier(bool any);

// Waits for the lanes in `mask`; an array of 32 of what they brought, `bytes` (at most 32) each, 32 apart.
const unsigned char* meet(unsigned mask, const void* brought, int bytes);

// Waits for all threads of a cooperative launch.
void grid_barrier();

// Asynchronous copies of 16 bytes, zeros where `from` is nullptr: made when their group is waited for.
void copy_later(void* to, const void* from);
void close_group();
void wait_groups(size_t open);  // until at most so many are open

unsigned char* shared_memory();

template <class T>
T from_lane(const unsigned char* all, int lane) {
    T value;
    std::memcpy(&value, all + lane * 32, sizeof(T));
    return value;
}

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

}  // namespace host_cuda

// ------------------------------------------------------------------------------------------------- waiting, exchanging
inline void __syncthreads() { host_cuda::barrier(false); }
inline int __syncthreads_or(int any) { return host_cuda::barrier(any != 0); }
inline void __syncwarp(unsigned mask = ~0u) { host_cuda::meet(mask, nullptr, 0); }
inline void __threadfence() {}

// `from(lane, first lane of its segment)` beyond the segment of `width` lanes: the lane's own value, as on a GPU.
template <class T, class From>
T host_shuffle(unsigned mask, T value, int width, From from) {
    const unsigned char* const all = host_cuda::meet(mask, &value, sizeof(T));
    const int begin = host_cuda::lane() / width * width, source = from(host_cuda::lane(), begin);
    return source < begin || source >= begin + width ? value : host_cuda::from_lane<T>(all, source);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return host_shuffle(mask, value, width, [&](int, int begin) { return begin + source % width; });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    return host_shuffle(mask, value, width, [&](int lane, int) { return lane ^ bits; });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int lanes, int width = 32) {
    return host_shuffle(mask, value, width, [&](int lane, int) { return lane - lanes; });
}
inline unsigned __ballot_sync(unsigned mask, bool holds) {
    const unsigned char* const all = host_cuda::meet(mask, &holds, sizeof(holds));
    unsigned lanes = 0;
    for (int lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1 && host_cuda::from_lane<bool>(all, lane)) lanes |= 1u << lane;
    return lanes;
}

template <class T>
T atomicAdd(T* to, T x) {
    const T before = *to;
    *to += x;
    return before;
}

// ------------------------------------------------------------------------------------------------------------- numbers
using std::max;
using std::min;

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned long long __double2ull_rn(double x) { return static_cast<unsigned long long>(std::nearbyint(x)); }

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <class T>
T __ldcg(const T* from) {
    return *from;
}

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};

namespace host_cuda {
inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
}  // namespace host_cuda

inline float __bfloat162float(__nv_bfloat16 x) { return host_cuda::float_of(uint32_t{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {
    const uint32_t bits = host_cuda::bits_of(x);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}
inline float __half2float(__half x) {
    const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 1023, sign = uint32_t{x.bits} >> 15 << 31;
    if (exponent == 31) return host_cuda::float_of(sign | 0x7f800000 | fraction << 13);
    const float size =
        std::ldexp(static_cast<float>(exponent ? fraction + 1024 : fraction), (exponent ? int(exponent) : 1) - 25);
    return sign ? -size : size;
}
inline __half __float2half(float x) {
    const uint16_t sign = static_cast<uint16_t>(host_cuda::bits_of(x) >> 31 << 15);
    const float size = std::fabs(x);
    if (x != x) return {0x7fff};
    if (size >= 65520) return {static_cast<uint16_t>(sign | 0x7c00)};
    // whole multiples of the spacing of float16 around x; an overflow into the next exponent comes out right
    const int exponent = size < 6.103515625e-05f ? -14 : std::ilogb(size);
    const int multiple = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return {static_cast<uint16_t>(sign |
                                  (exponent == -14 && multiple < 1024 ? multiple : (exponent + 14) * 1024 + multiple))};
}

// ------------------------------------------------------------- what csrc/cuda has for CUDA alone (device.cuh, mma.cuh)
namespace var_fast::cuda {

inline unsigned char* dynamic_shared() { return host_cuda::shared_memory(); }

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, int64_t threads, int64_t shared, void*,
            Arguments... arguments) {
    host_cuda::run(op, [&] { kernel(static_cast<Parameters>(arguments)...); }, grid, threads, shared);
}

inline void let_next_start() {}
inline void wait_for_previous() {}

template <class... Parameters, class... Arguments>
void launch_dependent(const char* op, void (*kernel)(Parameters...), dim3 grid, int64_t threads, int64_t shared,
                      void* stream, Arguments... arguments) {
    launch(op, kernel, grid, threads, shared, stream, arguments...);
}

template <class... Parameters, class... Arguments>
void launch_cooperative(const char* op, void (*kernel)(Parameters...), dim3 grid, int64_t threads, int64_t shared, void*,
                        Arguments... arguments) {
    host_cuda::run(op, [&] { kernel(static_cast<Parameters>(arguments)...); }, grid, threads, shared, true);
}

inline void grid_barrier(unsigned*) { host_cuda::grid_barrier(); }
inline void prefetch(const void*) {}
inline int64_t multiprocessors(const char*) { return 4; }

inline void copy_16_async(void* to, const void* from, bool inside) {
    host_cuda::copy_later(to, inside ? from : nullptr);
}
inline void close_group() { host_cuda::close_group(); }
template <int OPEN>
void wait_groups() {
    host_cuda::wait_groups(OPEN);
}

inline void load_matrices(uint32_t (&words)[4], const void* row) {
    const unsigned char* const all = host_cuda::meet(~0u, &row, sizeof(row));
    const int lane = host_cuda::lane();
    for (int i = 0; i < 4; ++i) {
        const auto* const from = host_cuda::from_lane<const unsigned char*>(all, i * 8 + lane / 4);
        std::memcpy(&words[i], from + lane % 4 * 4, 4);
    }
}

template <class T>
float value_of(uint32_t word, int half) {
    T x;
    x.bits = static_cast<uint16_t>(word >> 16 * half);
    if constexpr (std::is_same_v<T, __half>)
        return __half2float(x);
    else
        return __bfloat162float(x);
}

template <class T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const unsigned char* const all = host_cuda::meet(~0u, mine, sizeof(mine));
    const int g = host_cuda::lane() / 4, j = host_cuda::lane() % 4;
    for (int k = 0; k < 16; ++k) {
        const auto word = [&](int lane, int number) {
            uint32_t value;
            std::memcpy(&value, all + lane * 32 + number * 4, 4);
            return value;
        };
        const int k_lane = k % 8 / 2;
        for (int i = 0; i < 4; ++i) {
            const int column = 2 * j + i % 2;
            c[i] += value_of<T>(word(g * 4 + k_lane, i / 2 + k / 8 * 2), k % 2) *
                    value_of<T>(word(column * 4 + k_lane, 4 + k / 8), k % 2);
        }
    }
}

template <class T>
uint32_t pack_two(float low, float high) {
    if constexpr (std::is_same_v<T, __half>)
        return __float2half(low).bits | uint32_t{__float2half(high).bits} << 16;
    else
        return __float2bfloat16(low).bits | uint32_t{__float2bfloat16(high).bits} << 16;
}

}  // namespace var_fast::cuda
