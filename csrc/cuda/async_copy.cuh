// Copies to shared memory that go on while a thread computes, and operands of tensor-core products from there.
#pragma once

#include "device.cuh"

namespace var_fast::cuda {

#ifndef VAR_FAST_ON_HOST
__device__ __forceinline__ unsigned shared_address(const void* at) {
    return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

// 16 bytes to shared memory, zeros where not `inside`; `from` has to be an address of global memory all the same.
__device__ __forceinline__ void copy_16_async(void* to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(inside ? 16 : 0)
                 : "memory");
}

// The copies since the last group become one.
__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most OPEN of the thread's groups are under way.
template <int OPEN>
__device__ __forceinline__ void wait_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory");
}

// Four matrices of 8 rows of 16 bytes in shared memory: lanes 8 i ... 8 i + 7 bring the rows of matrix i, and word i of a
// lane is the word lane % 4 of row lane / 4 of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}
#endif

}  // namespace var_fast::cuda
