// Attention of 16 query rows of one KV head to one sealed block, by one warp. Decode and prefill
// share every line of it, so that a row's result has the same bits however its step was made up.
#pragma once
#include "codes.cuh"
#include "device.cuh"

#define ROWS 16
#define HEADROOM 14  // weights are at most 2^14 in fp16: 28 octaves below that stay normal numbers
#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f
#define NEVER float_of(0xff800000u)

using Keys = Chunks<KEY_BITS, 0>;
using Values = Chunks<VALUE_BITS, 1>;
constexpr int KEY_PAIRS = Word<KEY_BITS>::pairs;
constexpr int VALUE_PAIRS = Word<VALUE_BITS>::pairs;
constexpr int KEY_STEPS = Keys::outer * KEY_PAIRS / 2;  // of 16 dims
constexpr int QUERY_WORDS = KEY_BITS == 32 ? ROWS * DIM : KEY_STEPS * 128;  // of one tile and head
// Above 128 dims a warp mixes half of them, so that its sums fit in registers, and another the rest.
constexpr int PARTS = DIM > 128 ? 2 : 1;
constexpr int OUT_OUTER = (Values::outer + PARTS - 1) / PARTS;
constexpr int OUT_TILES = 4 * OUT_OUTER;

// The scores' rule beside the product. window 0: none; cap 0: none.
struct Rule {
    float scale, cap;
    int window;
};

// What a lane knows of its two rows, lane / 4 and lane / 4 + 8.
struct Row {
    float factor, correction, bias;
    int position;
};

struct State {
    float peak[2], total[2], mass[2];  // base-2 max, rounded up; this lane's sums of weights, plain and scaled
    float out[OUT_TILES][4];
    int exponent;  // of the largest value scale so far: out is in units of 2^(exponent - HEADROOM)
};

static __device__ __forceinline__ void clear(State& state) {
#pragma unroll
    for (int r = 0; r < 2; r++)
        state.peak[r] = NEVER, state.total[r] = 0.0f, state.mass[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < OUT_TILES; i++)
#pragma unroll
        for (int r = 0; r < 4; r++) state.out[i][r] = 0.0f;
    state.exponent = -60;
}

static __device__ __forceinline__ float power_of_two(int exponent) {
    return exponent < -126 ? 0.0f : float_of((uint32_t)(exponent + 127) << 23);
}

// exp2(x - peak), where a peak of minus infinity means that there was nothing.
static __device__ __forceinline__ float weight_of(float x, float peak) {
    return exp2_fast(subtract(x, peak == NEVER ? 0.0f : peak));
}

// scores[h][j]: accumulators of tokens 16 t + 8 h + 4 c + j, c the column, at [c + 2 r].
template <typename Source>
static __device__ __forceinline__ void score(
    const uint32_t* queries, const Source& source, float (&scores)[2][4][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int r = 0; r < 4; r++) scores[h][j][r] = 0.0f;
#if KEY_BITS == 32
    const float* rows = reinterpret_cast<const float*>(queries) + lane / 4 * DIM;
    const float* keys = reinterpret_cast<const float*>(source.keys) + lane % 4 * 16;
#pragma unroll 1
    for (int d = 0; d < DIM; d++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int r = 0; r < 4; r++)
                    scores[h][j][r] = add(scores[h][j][r],
                        multiply(rows[r / 2 * 8 * DIM + d],
                                 keys[d * BLOCK_TOKENS + 8 * h + 4 * (r % 2) + j]));
#else
#pragma unroll 1
    for (int o = 0; o < Keys::outer; o++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t pairs[4][KEY_PAIRS];
            source.key_pairs(o, h, pairs);
#pragma unroll
            for (int s = 0; s < KEY_PAIRS / 2; s++) {
                const Chunk a = reinterpret_cast<const Chunk*>(
                    queries)[(o * KEY_PAIRS / 2 + s) * 32 + lane];
#pragma unroll
                for (int j = 0; j < 4; j++)
                    multiply_tile(scores[h][j], a.words, pairs[j][2 * s], pairs[j][2 * s + 1]);
            }
        }
#endif
}

static __device__ __forceinline__ void finish_scores(
    float (&scores)[2][4][4], const uint16_t* scales, const Row (&rows)[2], const Rule& rule,
    int first) {
    const int own = threadIdx.x % 4 * 16;
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int token = own + 8 * h + 4 * (r % 2) + j;
                const Row& row = rows[r / 2];
                float x = multiply(subtract(scores[h][j][r], row.correction), row.factor);
                if (KEY_BITS <= 8) x = multiply(x, from_half(scales[token]));
                x = add(x, row.bias);
                if (rule.cap > 0.0f)
                    x = LOG2_E * rule.cap * tanhf(divide(multiply(x, LN_2), rule.cap));
                if (rule.window && first + token <= row.position - rule.window) x = NEVER;
                scores[h][j][r] = x;
            }
}

// Replaces scores by weights in units of 2^HEADROOM, value scales folded in; fades what came before.
static __device__ __forceinline__ void to_weights(
    float (&scores)[2][4][4], const uint16_t* scales, State& state) {
    const int own = threadIdx.x % 4 * 16;
    float fade[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float peak = NEVER;
#pragma unroll
        for (int i = 0; i < 16; i++)
            peak = fmaxf(peak, scores[i / 8][i % 4][i / 4 % 2 + 2 * r]);
        peak = fmaxf(peak, shuffle_xor(peak, 1));
        peak = fmaxf(peak, shuffle_xor(peak, 2));
        // A whole number: other cuts of the blocks scale weights by powers of two, and round alike.
        peak = fmaxf(ceilf(peak), state.peak[r]);
        fade[r] = weight_of(state.peak[r], peak);
        state.peak[r] = peak;
    }
    float largest = VALUE_BITS <= 8 ? 0.0f : 1.0f;
    if (VALUE_BITS <= 8) {
#pragma unroll
        for (int i = 0; i < 16; i++) largest = fmaxf(largest, from_half(scales[own + i]));
        largest = fmaxf(largest, shuffle_xor(largest, 1));
        largest = fmaxf(largest, shuffle_xor(largest, 2));
    }
    int exponent = (int)(bits_of(largest) >> 23) - 126;  // largest < 2^exponent
    exponent = exponent > state.exponent ? exponent : state.exponent;
    const float shrink = power_of_two(state.exponent - exponent);
    const float unit = power_of_two(HEADROOM - exponent);
    state.exponent = exponent;
    if (any_in_warp(fade[0] != 1.0f || fade[1] != 1.0f || shrink != 1.0f)) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            state.total[r] = multiply(state.total[r], fade[r]);
            state.mass[r] = multiply(multiply(state.mass[r], fade[r]), shrink);
        }
#pragma unroll
        for (int i = 0; i < OUT_TILES; i++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                state.out[i][r] = multiply(multiply(state.out[i][r], fade[r / 2]), shrink);
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const float scale = VALUE_BITS <= 8 ? multiply(from_half(scales[own + i]), unit) : unit;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float& x = scores[i / 8][i % 4][i / 4 % 2 + 2 * r];
            const float weight = weight_of(x, state.peak[r]);
            state.total[r] = add(state.total[r], weight);
            x = multiply(weight, scale);
            state.mass[r] = add(state.mass[r], x);
        }
    }
}

template <typename Source>
static __device__ __forceinline__ void mix(
    const float (&weights)[2][4][4], const Source& source, State& state) {
#if VALUE_BITS == 32
    const int lane = threadIdx.x % 32, t = lane % 4;
    const float* values = reinterpret_cast<const float*>(source.values);
#pragma unroll 1
    for (int x = 0; x < 4; x++)
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float first = shuffle_xor(weights[i / 8][i % 4][i / 4 % 2], x);
            const float second = shuffle_xor(weights[i / 8][i % 4][i / 4 % 2 + 2], x);
            const float* row = values + (16 * (t ^ x) + i) * DIM;
#pragma unroll
            for (int n = 0; n < OUT_TILES; n++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int dim = source.first_outer * 32 + n / 4 * 32 + 4 * (2 * t + c) + n % 4;
                    if (dim >= DIM) continue;
                    state.out[n][c] = add(state.out[n][c], multiply(first, row[dim]));
                    state.out[n][c + 2] = add(state.out[n][c + 2], multiply(second, row[dim]));
                }
        }
#else
    uint32_t a[4][4];
#pragma unroll
    for (int p = 0; p < 8; p++) {
        const int low = p / VALUE_PAIRS * 2 * VALUE_PAIRS + p % VALUE_PAIRS;
        const int high = low + VALUE_PAIRS;
#pragma unroll
        for (int r = 0; r < 2; r++)
            a[p / 2][p % 2 * 2 + r] =
                pack_halves(weights[low / 8][low % 4][low / 4 % 2 + 2 * r],
                            weights[high / 8][high % 4][high / 4 % 2 + 2 * r]);
    }
#pragma unroll
    for (int o = 0; o < OUT_OUTER; o++)
#pragma unroll
        for (int i = 0; i < Values::inner; i++) {
            uint32_t pairs[4][VALUE_PAIRS];
            source.value_pairs(o, i, pairs);
#pragma unroll
            for (int s = 0; s < VALUE_PAIRS / 2; s++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    multiply_tile(state.out[4 * o + j], a[i * VALUE_PAIRS / 2 + s],
                                  pairs[j][2 * s], pairs[j][2 * s + 1]);
        }
#endif
}

// Takes 1151 = 1024 + 127 off each half, exactly; what is left of 127.5 comes off the sum.
static __device__ __forceinline__ void center_values(uint32_t (&pairs)[4][VALUE_PAIRS]) {
    if (VALUE_BITS > 8) return;
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int p = 0; p < VALUE_PAIRS; p++)
            pairs[j][p] = subtract_halves(pairs[j][p], 0x647f647fu);
}

// The sum over the four lanes of a row, and out in its own units, at the end of a span of blocks.
static __device__ __forceinline__ void close(State& state) {
    const float unit = multiply(power_of_two(state.exponent - HEADROOM),
                                VALUE_BITS <= 8 ? step_of<VALUE_BITS>() : 1.0f);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = state.total[r], mass = state.mass[r];
        total = add(total, shuffle_xor(total, 1)), mass = add(mass, shuffle_xor(mass, 1));
        total = add(total, shuffle_xor(total, 2)), mass = add(mass, shuffle_xor(mass, 2));
        state.total[r] = total;
        const float offset = VALUE_BITS <= 8 ? multiply(0.5f, mass) : 0.0f;
#pragma unroll
        for (int i = 0; i < OUT_TILES; i++)
#pragma unroll
            for (int c = 0; c < 2; c++)
                state.out[i][c + 2 * r] =
                    multiply(subtract(state.out[i][c + 2 * r], offset), unit);
    }
}

// The dim of a lane's accumulator; a warp's first tile begins at value chunk first_outer.
static __device__ __forceinline__ int dim_of(int first_outer, int tile, int column) {
    return first_outer * 32 + tile / 4 * 32 + 4 * (2 * (threadIdx.x % 4) + column) + tile % 4;
}

// One head's planes of one block in the pool.
struct Planes {
    const uint8_t *keys, *values;
    const uint16_t *key_scales, *value_scales;
};

struct PlaneOffsets {
    int64_t block_bytes, key_codes, value_codes, key_scales, value_scales;
};

static __device__ __forceinline__ Planes planes_of(
    const uint8_t* pool, int id, int head, const PlaneOffsets& at) {
    const uint8_t* block = pool + id * at.block_bytes;
    return {block + at.key_codes + head * Keys::head_bytes,
            block + at.value_codes + head * Values::head_bytes,
            reinterpret_cast<const uint16_t*>(block + at.key_scales) + head * BLOCK_TOKENS,
            reinterpret_cast<const uint16_t*>(block + at.value_scales) + head * BLOCK_TOKENS};
}
