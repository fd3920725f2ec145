// The rotation of rotation.py on one vector in shared memory, by the lanes of one warp or by a
// whole block: butterflies of span 1, 2, 4, ..., then the rows of Paley's base.
#pragma once
#include "device.cuh"

// How a group of threads shares the elements of one vector.
struct WarpLanes {
    static __device__ __forceinline__ int rank() { return threadIdx.x % 32; }
    static __device__ __forceinline__ int count() { return 32; }
    static __device__ __forceinline__ void sync() { sync_warp(); }
};

struct BlockLanes {
    static __device__ __forceinline__ int rank() { return threadIdx.x; }
    static __device__ __forceinline__ int count() { return blockDim.x; }
    static __device__ __forceinline__ void sync() { sync_block(); }
};

// Unnormalised Hadamard transform of fp32 x[DIM]; other: as x, destroyed. Returns which of the two
// holds the result. Begins and ends in step.
template <typename Lanes>
static __device__ __forceinline__ float* hadamard(float* x, float* other) {
    constexpr int columns = DIM / BASE_ORDER;
#pragma unroll
    for (int span = 1; span < columns; span *= 2) {
        for (int i = Lanes::rank(); i < DIM / 2; i += Lanes::count()) {
            const int low = i / span * 2 * span + i % span;
            const float a = x[low], b = x[low + span];
            x[low] = add(a, b);
            x[low + span] = subtract(a, b);
        }
        Lanes::sync();
    }
    if (BASE_ORDER == 1) return x;
    for (int j = Lanes::rank(); j < DIM; j += Lanes::count()) {
        const uint32_t* row = BASE_SIGNS + j / columns * BASE_WORDS;
        float total = 0.0f;
        for (int i = 0; i < BASE_ORDER; i++) {
            const uint32_t sign = (row[i / 32] >> (i % 32)) << 31;
            const float term = float_of(bits_of(x[i * columns + j % columns]) ^ sign);
            total = i ? add(total, term) : term;
        }
        other[j] = total;
    }
    Lanes::sync();
    return other;
}

// The sum by halves (reference.py) of fp32 x[DIM], destroyed; the same for every lane.
static __device__ __forceinline__ float sum_by_halves(float* x) {
    int count = DIM;
    while (count % 2 == 0) {
        count /= 2;
        for (int j = WarpLanes::rank(); j < count; j += 32) x[j] = add(x[j], x[j + count]);
        sync_warp();
    }
    float total = x[0];
    for (int j = 1; j < count; j++) total = add(total, x[j]);
    sync_warp();
    return total;
}

static __device__ __forceinline__ float rotation_sign(int j) {
    return (ROTATION_SIGNS[j / 32] >> (j % 32)) & 1 ? -1.0f : 1.0f;
}
