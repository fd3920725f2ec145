// Memory as fast as it goes: what other kernels' bytes per second are compared with.
#include "device.cuh"

struct alignas(16) Line { uint32_t words[4]; };

// Reads `count` lines and keeps nothing; out is written where their words cancel, which is seldom.
KERNEL stream_read(const uint8_t* from, int64_t count, uint32_t* out) {
    const Line* lines = reinterpret_cast<const Line*>(from);
    const int64_t stride = (int64_t)gridDim.x * blockDim.x;
    uint32_t sum = 1;
#pragma unroll 4
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        const Line line = lines[i];
        sum += line.words[0] ^ line.words[1] ^ line.words[2] ^ line.words[3];
    }
    if (sum == 0) *out = blockIdx.x + 1;
}

KERNEL stream_copy(uint8_t* to, const uint8_t* from, int64_t count) {
    Line* target = reinterpret_cast<Line*>(to);
    const Line* source = reinterpret_cast<const Line*>(from);
    const int64_t stride = (int64_t)gridDim.x * blockDim.x;
#pragma unroll 4
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride)
        target[i] = source[i];
}
