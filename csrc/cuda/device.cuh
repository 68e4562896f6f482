// What the kernels share: element types, vector loads and stores, reductions, the launch.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "ops_cuda.h"

#ifndef VAR_FAST_ON_HOST  // tests/cuda/host_cuda.h runs these files on a machine without CUDA
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace var_fast::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half(x);
}

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
    T at[N];
};

// How many elements one load or store moves: 16 bytes of them, the widest there is on sm_80 and sm_90.
template <class T>
constexpr int per_load = 16 / sizeof(T);

// N elements from an address that is a multiple of their bytes (of 16 at most), as float.
template <int N, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
    constexpr int width = N < per_load<T> ? N : per_load<T>;
#pragma unroll
    for (int i = 0; i < N; i += width) {
        const Pack<T, width> pack = *reinterpret_cast<const Pack<T, width>*>(from + i);
#pragma unroll
        for (int j = 0; j < width; ++j) to[i + j] = to_float(pack.at[j]);
    }
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
    constexpr int width = N < per_load<T> ? N : per_load<T>;
#pragma unroll
    for (int i = 0; i < N; i += width) {
        Pack<T, width> pack;
#pragma unroll
        for (int j = 0; j < width; ++j) pack.at[j] = from_float<T>(from[i + j]);
        *reinterpret_cast<Pack<T, width>*>(to + i) = pack;
    }
}

template <int LANES = WARP, class T>
__device__ __forceinline__ T lanes_sum(T x) {
#pragma unroll
    for (int lane = LANES / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(ALL_LANES, x, lane, LANES);
    return x;
}

// The sum over the block, in every thread; `slots` holds one element per warp. One barrier: the same slots may be used
// again only after another barrier, so callers alternate between two sets.
template <class T>
__device__ __forceinline__ T block_sum(T x, T* slots) {
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    x = lanes_sum(x);
    if (lane == 0) slots[threadIdx.x / WARP] = x;
    __syncthreads();
    return lanes_sum(lane < warps ? slots[lane] : T{0});
}

// tanh-GELU: 0.5 x (1 + tanh(u)) is x / (1 + exp(-2 u)).
__device__ __forceinline__ float gelu_of(float x) {
    const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return __fdividef(x, 1.0f + __expf(-2.0f * u));
}

#ifndef VAR_FAST_ON_HOST
// Shared memory whose size the launch gives.
__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char bytes[];
    return bytes;
}

inline void check(cudaError_t error, const char* op) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

template <class Kernel>
void allow_shared(const char* op, Kernel kernel, int64_t shared) {
    if (shared > 48 * 1024)  // more has to be asked for
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), op);
}

// kernel<<<...>>>(arguments...), each argument converted to its parameter's type.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, int64_t threads, int64_t shared, void* stream,
            Arguments... arguments) {
    allow_shared(op, kernel, shared);
    kernel<<<grid, static_cast<unsigned>(threads), shared, static_cast<cudaStream_t>(stream)>>>(
        static_cast<Parameters>(arguments)...);
    check(cudaGetLastError(), op);
}

// In a kernel of `launch_dependent`: the next such kernel may be started now, to get as far as its own wait ...
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ... and here all that earlier kernels write is there. Before it only what no kernel writes may be read, and nothing
// written; what may have been written is read through pointers that are no __restrict__, or the compiler may move the
// reads up.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// As `launch`, with an attribute.
template <class... Parameters, class... Arguments>
void launch_with(const cudaLaunchAttribute& attribute, const char* op, void (*kernel)(Parameters...), dim3 grid,
                 int64_t threads, int64_t shared, void* stream, Arguments... arguments) {
    allow_shared(op, kernel, shared);
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute attributes[] = {attribute};
    config.attrs = attributes;
    config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), op);
}

// As `launch`, for kernels whose threads all call `wait_for_previous`: on GPUs that can (from 9.0 on), the kernel is
// started while the one before it ends.
template <class... Parameters, class... Arguments>
void launch_dependent(const char* op, void (*kernel)(Parameters...), dim3 grid, int64_t threads, int64_t shared,
                      void* stream, Arguments... arguments) {
    int device = 0, major = 0;
    check(cudaGetDevice(&device), op);
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), op);
    if (major < 9) return launch(op, kernel, grid, threads, shared, stream, arguments...);
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    launch_with(early, op, kernel, grid, threads, shared, stream, arguments...);
}
#endif

// f(T{}) with the element type that `type` names.
template <class F>
void for_type(Type type, const F& f) {
    if (type == Type::f32) return f(float{});
    if (type == Type::bf16) return f(__nv_bfloat16{});
    f(__half{});
}

// f(elements of a load) for rows of `C` channels: as many as a load takes where they divide C, else one.
template <class T, class F>
void for_width(int64_t C, const F& f) {
    C % per_load<T> == 0 ? f(std::integral_constant<int, per_load<T>>{}) : f(std::integral_constant<int, 1>{});
}

inline void expect(bool holds, const char* op, const std::string& what) {
    if (!holds) throw std::runtime_error(std::string(op) + ": expected " + what);
}

inline dim3 grid_of(int64_t x, int64_t y = 1, int64_t z = 1) {
    return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace var_fast::cuda
