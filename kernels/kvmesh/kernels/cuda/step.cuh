// A step: tokens of several sequences, laid out flat (backends' FlatStep). All sizes are read from
// device memory, so that one captured graph serves steps of any lengths up to its grid.
#pragma once
#include "device.cuh"

#define BLOCK_TOKENS 64

// row_start int32 [S + 1]; start int64 [S]; slot int32 [S]; tables int32 [S, table_width].
struct Step {
    const int32_t* row_start;
    const int64_t* start;
    const int32_t* slot;
    const int32_t* tables;
    int table_width;
};

// K and V of one layer in full precision: this step's rows fp32 [T, heads, DIM], and the tails
// fp32 [slots, layers, 2, 64, heads, DIM] with what came before.
struct Exact {
    const float* rows[2];
    const float* tails;
    int layer, num_layers, heads;
};

// The vector [DIM] of one token; its position lies in the block that holds the segment's start, or
// at or after the start.
static __device__ __forceinline__ const float* exact_vector(
    const Step& step, const Exact& kv, int segment, int64_t position, int kind, int head) {
    const int64_t start = step.start[segment];
    if (position >= start) {
        const int64_t row = step.row_start[segment] + (position - start);
        return kv.rows[kind] + (row * kv.heads + head) * DIM;
    }
    const int64_t plane = ((int64_t)step.slot[segment] * kv.num_layers + kv.layer) * 2 + kind;
    const int64_t token = plane * BLOCK_TOKENS + position % BLOCK_TOKENS;
    return kv.tails + (token * kv.heads + head) * DIM;
}
