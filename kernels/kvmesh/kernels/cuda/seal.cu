// Seals blocks: centre, rotate, encode and pack, byte for byte as reference.py does.
#include "device.cuh"
#include "rotate.cuh"
#include "step.cuh"

#define SEAL_WARPS 8

template <int bits>
static __device__ __forceinline__ int quantize(float z) {
    if (bits == 8) {
        const float passed = add(ceilf(multiply(z, 32.0f)), 127.0f);
        return (int)fminf(fmaxf(passed, 0.0f), 255.0f);
    }
    int passed = 0;
#pragma unroll
    for (int i = 0; i < (1 << bits) - 1; i++) passed += z > thresholds<bits>(i);
    const int half = 1 << (bits - 1);
    return passed < half ? 2 * half - 1 - passed : passed - half;
}

template <int bits>
static __device__ __forceinline__ float level(int code) {
    if (bits == 8) return multiply((float)code - 127.5f, 1.0f / 32);
    return levels<bits>(code);
}

// Encodes one vector. x, work: fp32 [DIM] of this warp. Writes codes [DIM] and returns the scale.
template <int bits, int kind>
static __device__ __forceinline__ uint16_t encode(
    const float* vector, const float* center, float* x, float* work, uint8_t* codes, int32_t* bad) {
    const int lane = threadIdx.x % 32;
    bool finite = true;
    for (int j = lane; j < DIM; j += 32) {
        finite = finite && fabsf(vector[j]) < INFINITE;
        const float centered = subtract(vector[j], center[j]);
        const float clamped = fminf(fmaxf(centered, -1048576.0f), 1048576.0f);
        work[j] = multiply(clamped, clamped);
        x[j] = multiply(clamped, rotation_sign(j));
    }
    if (!finite) set_flag(bad);
    sync_warp();
    const float norm2 = sum_by_halves(work);
    const bool zero = norm2 < SMALLEST_NORM2;
    const float norm = zero ? 0.0f : root(norm2);
    const float inverse = zero ? 0.0f : divide(1.0f, norm);
    float* rotated = hadamard<WarpLanes>(x, work);
    float* products = rotated == x ? work : x;
    for (int j = lane; j < DIM; j += 32) {
        const float z = multiply(rotated[j], inverse);
        const int code = quantize<bits>(z);
        const float c = level<bits>(code);
        codes[j] = zero ? 0 : code;
        products[j] = multiply(c, kind == 0 ? z : c);
    }
    sync_warp();
    const float mean = multiply(sum_by_halves(products), INVERSE_DIM);
    const float strength = kind == 0 ? fmaxf(mean, 0.25f) : root(mean);
    const float scale = divide(multiply(norm, INVERSE_ROOT_DIM), zero ? 1.0f : strength);
    return to_half(fminf(scale, 65504.0f));
}

// One word of `width`-bit fields: element 4 k + b of its elements is field k of byte b (block.py).
// codes: the word's first element, `stride` bytes from the next; count: elements that exist.
static __device__ __forceinline__ uint32_t pack_word(
    const uint8_t* codes, int stride, int count, int width, int shift) {
    uint32_t word = 0;
    const int elements = 32 / width;
    for (int e = 0; e < elements && e < count; e++) {
        const uint32_t field = (codes[e * stride] >> shift) & ((1u << width) - 1);
        word |= field << (8 * (e % 4) + width * (e / 4));
    }
    return word;
}

// Words along `length` elements for each of `lanes`: plane [length / c][lane].
static __device__ __forceinline__ void pack_plane(
    uint32_t* plane, const uint8_t* codes, int length, int lanes, int along, int across, int width,
    int shift) {
    const int elements = 32 / width;
    const int words = (length + elements - 1) / elements;
    for (int i = threadIdx.x; i < words * lanes; i += blockDim.x) {
        const int first = i / lanes * elements;
        const uint8_t* from = codes + first * along + i % lanes * across;
        plane[i] = pack_word(from, along, length - first, width, shift);
    }
}

template <int bits, int kind>
static __device__ __forceinline__ void seal_codes(
    uint8_t* block, int64_t codes_at, int64_t scales_at, const Step& step, const Exact& kv,
    int segment, int64_t first, int head, const float* center, int32_t* bad) {
    SHARED_MEMORY(memory);
    const int warp = threadIdx.x / 32;
    float* x = reinterpret_cast<float*>(memory) + warp * 2 * DIM;
    uint8_t* codes = memory + SEAL_WARPS * 2 * DIM * sizeof(float);  // [64][DIM]
    uint16_t* scales = reinterpret_cast<uint16_t*>(block + scales_at) + head * BLOCK_TOKENS;
    for (int token = warp; token < BLOCK_TOKENS; token += SEAL_WARPS) {
        const float* vector = exact_vector(step, kv, segment, first + token, kind, head);
        const uint16_t scale =
            encode<bits, kind>(vector, center + head * DIM, x, x + DIM, codes + token * DIM, bad);
        if (threadIdx.x % 32 == 0) scales[token] = scale;
        sync_warp();
    }
    sync_block();
    const int length = kind == 0 ? DIM : BLOCK_TOKENS, lanes = kind == 0 ? BLOCK_TOKENS : DIM;
    const int along = kind == 0 ? 1 : DIM, across = kind == 0 ? DIM : 1;
    const int low = length * lanes / 4;  // bytes of the 2-bit plane
    const int64_t size = bits == 3 ? low + (length + 31) / 32 * lanes * 4 : length * lanes * bits / 8;
    uint8_t* plane = block + codes_at + head * size;
    uint32_t* words = reinterpret_cast<uint32_t*>(plane);
    pack_plane(words, codes, length, lanes, along, across, bits == 3 ? 2 : bits, 0);
    if (bits == 3)
        pack_plane(words + low / 4, codes, length, lanes, along, across, 1, 2);
}

template <int bits, int kind>
static __device__ __forceinline__ void seal_floats(
    uint8_t* block, int64_t codes_at, const Step& step, const Exact& kv, int segment, int64_t first,
    int head, int32_t* bad) {
    const int64_t plane = codes_at + (int64_t)head * BLOCK_TOKENS * DIM * (bits / 8);
    for (int i = threadIdx.x; i < BLOCK_TOKENS * DIM; i += blockDim.x) {
        const int token = kind == 0 ? i % BLOCK_TOKENS : i / DIM;
        const int dim = kind == 0 ? i / BLOCK_TOKENS : i % DIM;
        const float x = exact_vector(step, kv, segment, first + token, kind, head)[dim];
        if (!(fabsf(x) < INFINITE)) set_flag(bad);
        if (bits == 16)
            reinterpret_cast<uint16_t*>(block + plane)[i] =
                to_half(fminf(fmaxf(x, -65504.0f), 65504.0f));
        else
            reinterpret_cast<float*>(block + plane)[i] = x;
    }
}

// Seals one layer of the blocks that a step fills. Grid (blocks, heads, 2), SEAL_WARPS * 32 threads.
// filled int32 [capacity, 2]: (segment, number of its block), num_filled of them. bad int32
// [capacity]: set where K or V hold a NaN or an infinity. centers fp32 [2, heads, DIM].
KERNEL seal_layer(
    uint8_t* pool, int64_t block_bytes, int64_t key_codes, int64_t value_codes, int64_t key_scales,
    int64_t value_scales, const int32_t* row_start, const int64_t* start, const int32_t* slot,
    const int32_t* tables, int table_width, const float* k, const float* v, const float* tails,
    int layer, int num_layers, int heads, const float* centers, const int32_t* filled,
    const int32_t* num_filled, int32_t* bad) {
    const int index = blockIdx.x, head = blockIdx.y;
    if (index >= *num_filled) return;
    const Step step = {row_start, start, slot, tables, table_width};
    const Exact kv = {{k, v}, tails, layer, num_layers, heads};
    const int segment = filled[2 * index], number = filled[2 * index + 1];
    uint8_t* block = pool + tables[segment * table_width + number] * block_bytes;
    const int64_t first = (int64_t)number * BLOCK_TOKENS;
    if (blockIdx.z == 0) {
#if KEY_BITS > 8
        seal_floats<KEY_BITS, 0>(block, key_codes, step, kv, segment, first, head, bad + index);
#else
        seal_codes<KEY_BITS, 0>(block, key_codes, key_scales, step, kv, segment, first, head,
                                centers, bad + index);
#endif
    } else {
#if VALUE_BITS > 8
        seal_floats<VALUE_BITS, 1>(block, value_codes, step, kv, segment, first, head, bad + index);
#else
        seal_codes<VALUE_BITS, 1>(block, value_codes, value_scales, step, kv, segment, first, head,
                                  centers + heads * DIM, bad + index);
#endif
    }
}

// Keeps the rows that lie in a segment's unfinished block, in full precision. Grid (T), after the
// attention of the layer. token_segment int32 [T].
KERNEL append_tails(
    float* tails, const int32_t* row_start, const int64_t* start, const int32_t* slot,
    const int32_t* token_segment, const int32_t* num_tokens, const float* k, const float* v,
    int layer, int num_layers, int heads) {
    const int row = blockIdx.x;
    if (row >= *num_tokens) return;
    const int segment = token_segment[row];
    const int64_t position = start[segment] + (row - row_start[segment]);
    const int64_t end = start[segment] + (row_start[segment + 1] - row_start[segment]);
    if (position / BLOCK_TOKENS != end / BLOCK_TOKENS) return;
    const int width = heads * DIM;
    const int64_t plane = ((int64_t)slot[segment] * num_layers + layer) * 2;
    float* to = tails + (plane * BLOCK_TOKENS + position % BLOCK_TOKENS) * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        to[i] = k[(int64_t)row * width + i];
        to[(int64_t)BLOCK_TOKENS * width + i] = v[(int64_t)row * width + i];
    }
}
