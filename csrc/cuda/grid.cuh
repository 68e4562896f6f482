// Kernels whose blocks are all resident and wait for each other.
#pragma once

#include "device.cuh"

namespace var_fast::cuda {

#ifndef VAR_FAST_ON_HOST
// Waits until every thread of the grid is here, and sees what they have written. `counter` is zero before its first
// use; each barrier turns its highest bit, which the rest of its bits, back at zero, leave alone.
__device__ __forceinline__ void grid_barrier(unsigned* counter) {
    __syncthreads();
    if (threadIdx.x == 0) {
        const unsigned share = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u;
        __threadfence();
        const unsigned before = atomicAdd(counter, share);
        unsigned now;
        do
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
        while (((before ^ now) & 0x80000000u) == 0);
        __threadfence();
    }
    __syncthreads();
}

// The line of 128 bytes at `from` is brought into the second-level cache.
__device__ __forceinline__ void prefetch(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

inline int64_t multiprocessors(const char* op) {
    int device = 0, count = 0;
    check(cudaGetDevice(&device), op);
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), op);
    return count;
}

// As `launch`; fails where the grid's blocks cannot all be resident.
template <class... Parameters, class... Arguments>
void launch_cooperative(const char* op, void (*kernel)(Parameters...), dim3 grid, int64_t threads, int64_t shared,
                        void* stream, Arguments... arguments) {
    cudaLaunchAttribute together{};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    launch_with(together, op, kernel, grid, threads, shared, stream, arguments...);
}
#endif

}  // namespace var_fast::cuda
