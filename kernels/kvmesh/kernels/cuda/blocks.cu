// Whole blocks: finishing (header and checksum), checking, and moving between memories.
#include "device.cuh"

#define CRC_LANES 256  // threads of one checksum; lane i takes words i, i + 256, ... of the message

// The product of two polynomials modulo the checksum's, bits reflected as zlib has them.
static __device__ __forceinline__ uint32_t multiply_mod(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (int i = 31; i >= 0; i--) {
        product ^= (a >> i & 1) ? b : 0;
        b = (b >> 1) ^ (b & 1 ? CRC_POLYNOMIAL : 0);
    }
    return product;
}

// CRC-32 of words uint32 [count], by a whole thread block; right in thread 0 alone.
// advance uint32 [4][256]: byte i's part of a remainder times x^(32 * 256). joins uint32 [9]:
// x^(32 * 2^k).
static __device__ uint32_t checksum(
    const uint32_t* words, int64_t count, const uint32_t* advance, const uint32_t* joins) {
    SHARED_MEMORY(memory);
    uint32_t* table = reinterpret_cast<uint32_t*>(memory);
    uint32_t* parts = table + 1024;
    const int lane = threadIdx.x;
    for (int i = lane; i < 1024; i += CRC_LANES) table[i] = advance[i];
    sync_block();
    const int64_t rounds = (count + CRC_LANES - 1) / CRC_LANES;
    int64_t at = count - rounds * CRC_LANES + lane;  // as if zeros stood before the message
    uint32_t rest = 0;
    for (int64_t i = 0; i < rounds; i++, at += CRC_LANES) {
        rest = table[rest & 255] ^ table[256 + (rest >> 8 & 255)] ^
               table[512 + (rest >> 16 & 255)] ^ table[768 + (rest >> 24)];
        if (at >= 0) rest ^= at == 0 ? ~words[at] : words[at];
    }
    parts[lane] = rest;
    sync_block();
    for (int k = 0; k < 8; k++) {
        const int span = 1 << k;
        if (lane % (2 * span) == 0)
            parts[lane] = multiply_mod(parts[lane], joins[k]) ^ parts[lane + span];
        sync_block();
    }
    return ~multiply_mod(parts[0], joins[0]);
}

// Writes header, trailer and checksum around planes that are all sealed. Grid (blocks), CRC_LANES
// threads. header: what every block of this layout starts with. A block whose K or V were not
// finite gets no header, so that nothing takes it for one.
KERNEL finish_blocks(
    uint8_t* pool, int64_t block_bytes, const uint8_t* header, int header_bytes,
    const int32_t* tables, int table_width, const int32_t* filled, const int32_t* num_filled,
    const int32_t* bad, const uint32_t* advance, const uint32_t* joins) {
    const int index = blockIdx.x;
    if (index >= *num_filled) return;
    const int id = tables[filled[2 * index] * table_width + filled[2 * index + 1]];
    uint8_t* block = pool + id * block_bytes;
    for (int i = threadIdx.x; i < header_bytes; i += blockDim.x)
        block[i] = bad[index] ? 0 : header[i];
    for (int i = threadIdx.x; i < 64; i += blockDim.x) block[block_bytes - 64 + i] = 0;
    sync_block();
    uint32_t* words = reinterpret_cast<uint32_t*>(block);
    const int64_t last = block_bytes / 4 - 1;
    const uint32_t sum = checksum(words, last, advance, joins);
    if (threadIdx.x == 0) words[last] = sum;
}

// found uint32 [n, 2]: the checksum of blocks ids[n], and the one that they carry.
KERNEL check_blocks(
    const uint8_t* pool, int64_t block_bytes, const int32_t* ids, int count, uint32_t* found,
    const uint32_t* advance, const uint32_t* joins) {
    if (blockIdx.x >= count) return;
    const uint32_t* words =
        reinterpret_cast<const uint32_t*>(pool + ids[blockIdx.x] * block_bytes);
    const int64_t last = block_bytes / 4 - 1;
    const uint32_t sum = checksum(words, last, advance, joins);
    if (threadIdx.x == 0) {
        found[2 * blockIdx.x] = sum;
        found[2 * blockIdx.x + 1] = words[last];
    }
}

// to[to_ids[i]] = from[from_ids[i]] for whole blocks, of a multiple of 64 bytes. Grid (count, any).
// Gathers, scatters or copies: either side may be staging memory whose ids count up from zero.
KERNEL move_blocks(
    uint8_t* to, const int32_t* to_ids, const uint8_t* from, const int32_t* from_ids, int count,
    int64_t block_bytes) {
    if (blockIdx.x >= count) return;
    struct alignas(16) Chunk { uint32_t words[4]; };
    Chunk* target = reinterpret_cast<Chunk*>(to + to_ids[blockIdx.x] * block_bytes);
    const Chunk* source =
        reinterpret_cast<const Chunk*>(from + from_ids[blockIdx.x] * block_bytes);
    const int64_t stride = (int64_t)gridDim.y * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.y * blockDim.x + threadIdx.x; i < block_bytes / 16;
         i += stride)
        target[i] = source[i];
}
