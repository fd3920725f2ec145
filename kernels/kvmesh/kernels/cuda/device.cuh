// The instructions that C++ has no word for, and all that the CPU build of these kernels replaces.
// Integer types as NVRTC has them without any header.
#pragma once

#ifdef KVMESH_SHIM
#include "cuda_shim.hpp"
#else

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef int int32_t;
typedef long long int64_t;

#define KERNEL extern "C" __global__ void
#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]

static __device__ __forceinline__ void sync_block() { __syncthreads(); }
static __device__ __forceinline__ void sync_warp() { __syncwarp(); }

template <typename T>
static __device__ __forceinline__ T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

static __device__ __forceinline__ bool any_in_warp(bool value) {
    return __any_sync(0xffffffffu, value) != 0;
}

// PTX prmt: byte i of the result is byte (selector nibble i & 7) of y:x; nibble bit 3 spreads its
// sign over the whole byte instead.
static __device__ __forceinline__ uint32_t permute(uint32_t x, uint32_t y, uint32_t selector) {
    uint32_t out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(x), "r"(y), "r"(selector));
    return out;
}

// c += a * b of m16n8k16: a fp16 row-major, b fp16 column-major, c fp32 (PTX's fragments).
static __device__ __forceinline__ void multiply_tile(
    float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(global) : "memory");
}

static __device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `pending` of the groups committed last are still under way.
template <int pending>
static __device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

static __device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float from_half(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

static __device__ __forceinline__ uint16_t to_half(float x) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Two fp16 in one register, the first in the low half.
static __device__ __forceinline__ uint32_t pack_halves(float first, float second) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

static __device__ __forceinline__ uint32_t subtract_halves(uint32_t x, uint32_t y) {
    uint32_t out;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(x), "r"(y));
    return out;
}

static __device__ __forceinline__ float add(float x, float y) { return __fadd_rn(x, y); }
static __device__ __forceinline__ float subtract(float x, float y) { return __fsub_rn(x, y); }
static __device__ __forceinline__ float multiply(float x, float y) { return __fmul_rn(x, y); }
static __device__ __forceinline__ float divide(float x, float y) { return __fdiv_rn(x, y); }
static __device__ __forceinline__ float root(float x) { return __fsqrt_rn(x); }

static __device__ __forceinline__ void set_flag(int32_t* flag) { atomicOr(flag, 1); }

#endif

static __device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
static __device__ __forceinline__ float float_of(uint32_t x) { return __uint_as_float(x); }

#define INFINITE float_of(0x7f800000u)
