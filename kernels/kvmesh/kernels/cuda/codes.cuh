// Codes as operands of matrix instructions: what a thread of a warp reads of one KV head's planes.
//
// A warp works on one block of 64 tokens. Its lane is 4 g + t. A word holds C elements of the summed
// axis (block.py); byte permutes turn it into C / 2 pairs of fp16, pair e being elements (e, e + C/2),
// and each two pairs are B's two registers of one m16n8k16: any order of the summed axis will do,
// as long as A has the same.
//
//   keys    sum over dims: word 4 o + t, four tokens at 16 (g / 2) + 8 h + 4 (g % 2), h = 0, 1
//   values  sum over tokens: the words of tokens 16 t .. 16 t + 15, four dims at 32 D + 4 g
//
// Column n of a score tile j is then token 16 (n / 2) + 8 h + 4 (n % 2) + j, so the accumulators of
// thread t are just the tokens 16 t .. 16 t + 15, which it needs as A's rows for the values.
#pragma once
#include "device.cuh"

template <int bits>
struct Word {
    static constexpr int elements = bits == 3 ? 16 : bits >= 16 ? 8 : 32 / bits;  // C
    static constexpr int pairs = elements / 2;
};

// Bytes u of codebook.py to fp16 1024 + u, exactly: 0x6400 is 1024, and its last bit one.
static __device__ __forceinline__ uint32_t widen_low(uint32_t u) {
    return permute(u, 0x64646464u, 0x4140u);
}

static __device__ __forceinline__ uint32_t widen_high(uint32_t u) {
    return permute(u, 0x64646464u, 0x4342u);
}

// The pairs of one word. signs: for 3 bits, the word of signs that covers it, moved so that the
// bits of its own elements are the low four of each byte.
template <int bits>
static __device__ __forceinline__ void expand(
    uint32_t word, uint32_t signs, uint32_t (&pairs)[Word<bits>::pairs]) {
    if constexpr (bits == 8) {
        pairs[0] = permute(word, 0x64646464u, 0x4240u);
        pairs[1] = permute(word, 0x64646464u, 0x4341u);
    } else if constexpr (bits == 4) {
        // Magnitudes from a table of eight bytes; a negative level's byte is the complement.
        const uint32_t magnitude = word & 0x77777777u, shifted = word << 4;
        const uint32_t low = permute(TABLE_4_LOW, TABLE_4_HIGH, magnitude) ^
                             permute(shifted, word, 0xD9C8u);
        const uint32_t high = permute(TABLE_4_LOW, TABLE_4_HIGH, magnitude >> 16) ^
                              permute(shifted, word, 0xFBEAu);
        pairs[0] = widen_low(low), pairs[1] = widen_high(low);
        pairs[2] = widen_low(high), pairs[3] = widen_high(high);
    } else if constexpr (bits < 4) {
        uint32_t even = word & 0x33333333u;         // fields 0 (low nibbles) and 2 (high)
        uint32_t odd = (word >> 2) & 0x33333333u;   // fields 1 and 3
        uint32_t negative = TABLE_2;
        if constexpr (bits == 3) {
            even |= (signs << 2 & 0x04040404u) | (signs << 4 & 0x40404040u);
            odd |= (signs << 1 & 0x04040404u) | (signs << 3 & 0x40404040u);
            negative = TABLE_3_HIGH;
        }
        const uint32_t positive = bits == 3 ? TABLE_3_LOW : TABLE_2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t first = permute(positive, negative, even >> (16 * half));
            const uint32_t second = permute(positive, negative, odd >> (16 * half));
            pairs[2 * half] = widen_low(first), pairs[2 * half + 1] = widen_high(first);
            pairs[4 + 2 * half] = widen_low(second), pairs[5 + 2 * half] = widen_high(second);
        }
    }
}

// Where the chunks of four words lie that one thread reads of a plane.
template <int bits, int kind>
struct Chunks {
    static constexpr int elements = Word<bits>::elements;
    // Of keys, o counts words 4 o + t, and h is inside; of values, i counts a thread's own words.
    static constexpr int outer = kind == 0 ? (DIM / elements + 3) / 4 : (DIM + 31) / 32;
    static constexpr int inner = kind == 0 ? 2 : 16 / elements;
    static constexpr int count = outer * inner;        // 16-byte chunks of codes
    static constexpr int total = count * (bits == 3 ? 2 : 1);
    static constexpr int lanes = kind == 0 ? BLOCK_TOKENS : DIM;
    static constexpr int length = kind == 0 ? DIM : BLOCK_TOKENS;
    static constexpr int64_t low_bytes = (int64_t)length * lanes / 4;
    static constexpr int64_t head_bytes =
        bits == 3 ? low_bytes + (length + 31) / 32 * lanes * 4 : (int64_t)length * lanes * bits / 8;

    static __device__ __forceinline__ int word(int lane, int o, int i) {
        return kind == 0 ? 4 * o + lane % 4 : lane % 4 * inner + i;
    }
    static __device__ __forceinline__ int first_lane(int lane, int o, int i) {
        const int g = lane / 4;
        return kind == 0 ? 16 * (g / 2) + 8 * i + 4 * (g % 2) : 32 * o + 4 * g;
    }
    static __device__ __forceinline__ bool exists(int lane, int o, int i) {
        return kind == 0 ? word(lane, o, i) < DIM / elements : first_lane(lane, o, i) < DIM;
    }
    static __device__ __forceinline__ int64_t offset(int lane, int o, int i) {
        return ((int64_t)word(lane, o, i) * lanes + first_lane(lane, o, i)) * 4;
    }
    static __device__ __forceinline__ int64_t sign_offset(int lane, int o, int i) {
        return low_bytes + ((int64_t)(word(lane, o, i) / 2) * lanes + first_lane(lane, o, i)) * 4;
    }
};

struct alignas(16) Chunk {
    uint32_t words[4];
};

// The pairs of each of a chunk's four lanes.
template <int bits, int kind>
static __device__ __forceinline__ void expand_chunk(
    const Chunk& codes, const Chunk& signs, int lane, int o, int i,
    uint32_t (&pairs)[4][Word<bits>::pairs]) {
    const int shift = Chunks<bits, kind>::word(lane, o, i) % 2 * 4;
#pragma unroll
    for (int j = 0; j < 4; j++)
        expand<bits>(codes.words[j], bits == 3 ? signs.words[j] >> shift : 0, pairs[j]);
}

// The same from fp16, which lie [summed axis][lane]: pair e joins rows e and e + 4 of a word of 8.
template <int kind, int n>
static __device__ __forceinline__ void load_halves(
    const uint8_t* plane, int lane, int o, int i, uint32_t (&pairs)[4][n]) {
    using At = Chunks<16, kind>;
    const uint32_t* rows = reinterpret_cast<const uint32_t*>(
        plane + ((int64_t)At::word(lane, o, i) * 8 * At::lanes + At::first_lane(lane, o, i)) * 2);
#pragma unroll
    for (int e = 0; e < 4; e++) {
#pragma unroll
        for (int both = 0; both < 2; both++) {
            const uint32_t first = rows[e * At::lanes / 2 + both];
            const uint32_t second = rows[(e + 4) * At::lanes / 2 + both];
            pairs[2 * both][e] = permute(first, second, 0x5410u);
            pairs[2 * both + 1][e] = permute(first, second, 0x7632u);
        }
    }
}
