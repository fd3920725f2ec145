// Attention over sealed blocks and the unfinished one: prepare_queries, then attend_decode or
// attend_prefill, then finish_rows. Rows of a tile are (query token, query head of the group).
#include "device.cuh"
#include "step.cuh"
#include "rotate.cuh"
#include "attend.cuh"

// Sixteen rows of the tokens of one segment that lie in one block.
struct Tile {
    int segment, first_row;  // first_row: of the step, of the piece's first token
    int number, position;  // of the block, and of the piece's first token
    int row, rows;  // the tile's first row in the piece; the piece's rows, 0 if there are none
};

// tiles int32 [capacity, 3]: segment, piece of it (its blocks count from 0), first row.
static __device__ __forceinline__ Tile tile_of(
    const int32_t* tiles, int index, const Step& step, int group) {
    Tile tile;
    tile.segment = tiles[3 * index];
    tile.row = tiles[3 * index + 2];
    const int start = (int)step.start[tile.segment];
    const int first = step.row_start[tile.segment];
    const int end = start + (step.row_start[tile.segment + 1] - first);
    tile.number = start / BLOCK_TOKENS + tiles[3 * index + 1];
    const int border = tile.number * BLOCK_TOKENS;
    tile.position = border > start ? border : start;
    const int last = border + BLOCK_TOKENS < end ? border + BLOCK_TOKENS : end;
    tile.rows = last > tile.position ? (last - tile.position) * group : 0;
    tile.first_row = first + (tile.position - start);
    return tile;
}

// Blocks are cut into spans by what a row of block `number` may see, and by nothing else: so the
// cuts, and with them the order of every sum, are the same in any step.
struct Spans {
    int first, blocks;  // the first block that any row sees; blocks of one span
    int count;
};

static __device__ __forceinline__ Spans spans_of(int number, int window, int splits, int least) {
    const int seen = window ? (window + BLOCK_TOKENS - 1) / BLOCK_TOKENS + 1 : number;
    Spans spans;
    spans.first = number > seen ? number - seen : 0;
    const int visible = number - spans.first;
    spans.blocks = (visible + splits - 1) / splits;
    if (spans.blocks < least) spans.blocks = least;
    spans.count = (visible + spans.blocks - 1) / spans.blocks;
    return spans;
}

// queries: uint32 [tiles, heads, QUERY_WORDS], A's fragments. meta: fp32 [tiles, heads, 16, 4]:
// factor, correction, bias of each row. Grid (tiles, heads), 128 threads.
KERNEL prepare_queries(
    const int32_t* row_start, const int64_t* start, const int32_t* tiles, const int32_t* num_tiles,
    int group, int heads, const float* q, const float* centers, float scale, uint32_t* queries,
    float* meta) {
    SHARED_MEMORY(memory);
    if (blockIdx.x >= *num_tiles) return;
    const Step step = {row_start, start, nullptr, nullptr, 0};
    const Tile tile = tile_of(tiles, blockIdx.x, step, group);
    const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* x = reinterpret_cast<float*>(memory) + warp * 2 * DIM;
    const int64_t at = (int64_t)blockIdx.x * heads + head;
    queries += at * QUERY_WORDS;
    meta += at * ROWS * 4;
    for (int r = warp; r < ROWS; r += 4) {
        const int row = tile.row + r;
        const bool real = row < tile.rows;
        const int64_t token = tile.first_row + row / group;
        const float* from = q + (token * heads * group + head * group + row % group) * DIM;
        float bias = 0.0f, largest = 0.0f, sum = 0.0f;
        for (int j = lane; j < DIM; j += 32) {
            x[j] = real ? from[j] : 0.0f;
            if (KEY_BITS <= 8) {
                bias = add(bias, multiply(x[j], centers[head * DIM + j]));
                x[j] = multiply(x[j], rotation_sign(j));
            }
        }
        sync_warp();
        const float* rotated = KEY_BITS <= 8 ? hadamard<WarpLanes>(x, x + DIM) : x;
        for (int j = lane; j < DIM; j += 32) largest = fmaxf(largest, fabsf(rotated[j]));
#pragma unroll
        for (int mask = 16; mask; mask /= 2) {
            largest = fmaxf(largest, shuffle_xor(largest, mask));
            bias = add(bias, shuffle_xor(bias, mask));
        }
        int exponent = (int)(bits_of(largest) >> 23) - 127;  // 2^exponent <= largest
        exponent = exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
        float factor = multiply(multiply(scale, LOG2_E), power_of_two(exponent));
#if KEY_BITS == 32
        factor = multiply(scale, LOG2_E);
        for (int j = lane; j < DIM; j += 32)
            reinterpret_cast<float*>(queries)[r * DIM + j] = rotated[j];
#else
        constexpr int C = Word<KEY_BITS>::elements;
        const float shrink = power_of_two(-exponent);
        for (int j = lane; j < 4 * C * Keys::outer; j += 32) {
            const uint16_t half = j < DIM ? to_half(multiply(rotated[j], shrink)) : 0;
            sum = add(sum, from_half(half));
            const int o = j / (4 * C), t = j / C % 4, e = j % C, pair = e % (C / 2);
            const int step16 = o * C / 4 + pair / 2, word = pair % 2 * 2 + r / 8;
            const int at16 = ((step16 * 32 + r % 8 * 4 + t) * 4 + word) * 2 + e / (C / 2);
            reinterpret_cast<uint16_t*>(queries)[at16] = half;
        }
#pragma unroll
        for (int mask = 16; mask; mask /= 2) sum = add(sum, shuffle_xor(sum, mask));
        if (KEY_BITS <= 8) factor = multiply(factor, step_of<KEY_BITS>() * INVERSE_ROOT_DIM);
#endif
        if (lane == 0) {
            meta[4 * r] = factor;
            meta[4 * r + 1] = KEY_BITS <= 8 ? multiply(sum, 1151.5f) : 0.0f;
            meta[4 * r + 2] = multiply(multiply(bias, scale), LOG2_E);
            meta[4 * r + 3] = 0.0f;
        }
        sync_warp();
    }
}

static __device__ __forceinline__ void read_rows(
    const float* meta, const Tile& tile, int group, Row (&rows)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = threadIdx.x % 32 / 4 + 8 * r;
        rows[r] = {meta[4 * row], meta[4 * row + 1], meta[4 * row + 2],
                   tile.position + (tile.row + row) / group};
    }
}

// Partial results: peaks fp32 [parts, query heads, PARTS, 2] (base-2 maximum rounded up, sum), outs fp32 [parts, query
// heads, DIM]. token_part int32 [T]: a token's first part, its spans follow; or, folded, ~part.
struct Parts {
    float *peaks, *outs;
    const int32_t* token_part;
    int query_heads;
};

// One more partial behind those before it: the one rule by which spans are joined.
static __device__ __forceinline__ void joined(
    float peak, float next, float& fade, float& grow, float& top) {
    top = fmaxf(peak, next);
    fade = weight_of(peak, top);
    grow = weight_of(next, top);
}

static __device__ __forceinline__ void store_part(
    const State& state, const Tile& tile, int head, int group, int span, int half,
    const Parts& parts) {
    int64_t at[2], peak_at[2];
    float fade[2], grow[2], top[2], total[2];
    bool real[2], first[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = tile.row + threadIdx.x % 32 / 4 + 8 * r;
        real[r] = row < tile.rows;
        const int base = real[r] ? parts.token_part[tile.first_row + row / group] : 0;
        const int64_t part = base < 0 ? ~base : base + span;
        at[r] = part * parts.query_heads + head * group + row % group;
        peak_at[r] = 2 * (at[r] * PARTS + half);
        first[r] = base >= 0 || span == 0;
        fade[r] = 0.0f, grow[r] = 1.0f, top[r] = state.peak[r], total[r] = state.total[r];
        if (real[r] && !first[r]) {
            joined(parts.peaks[peak_at[r]], state.peak[r], fade[r], grow[r], top[r]);
            total[r] = add(multiply(parts.peaks[peak_at[r] + 1], fade[r]),
                           multiply(total[r], grow[r]));
        }
    }
    sync_warp();  // the four lanes of a row have read before one writes
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (!real[r]) continue;
#pragma unroll
        for (int i = 0; i < OUT_TILES; i++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int dim = dim_of(half * OUT_OUTER, i, c);
                if (dim >= DIM) continue;
                float* out = parts.outs + at[r] * DIM + dim;
                const float x = state.out[i][c + 2 * r];
                *out = first[r] ? x : add(multiply(*out, fade[r]), multiply(x, grow[r]));
            }
        if (threadIdx.x % 4 == 0) {
            parts.peaks[peak_at[r]] = top[r];
            parts.peaks[peak_at[r] + 1] = total[r];
        }
    }
}

// Blocks on their way into shared memory, two deep: each lane copies what it will itself read.
struct Ring {
    static constexpr int keys = KEY_BITS <= 8 ? Keys::total : 0;
    static constexpr int value_count = OUT_OUTER * Values::inner;
    static constexpr int values =
        VALUE_BITS <= 8 ? value_count * (VALUE_BITS == 3 ? 2 : 1) : 0;
    static constexpr int bytes = (keys + values) * 512 + 256;

    uint8_t* memory;

    __device__ __forceinline__ Chunk* slot(int index) const {
        return reinterpret_cast<Chunk*>(memory) + index * 32 + threadIdx.x % 32;
    }
    __device__ __forceinline__ const uint16_t* scales(int kind) const {
        return reinterpret_cast<const uint16_t*>(memory + (keys + values) * 512 + 128 * kind);
    }

    // Chunks first_outer .. first_outer + outer of a plane, into the slots from `first` on.
    template <int bits, int kind, int outer>
    __device__ __forceinline__ void fill_plane(
        const uint8_t* plane, int first, int first_outer) const {
        using At = Chunks<bits, kind>;
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int o = 0; o < outer; o++)
#pragma unroll
            for (int i = 0; i < At::inner; i++) {
                const int from = first_outer + o;
                if (!At::exists(lane, from, i)) continue;
                const int index = first + o * At::inner + i;
                copy_async_16(slot(index), plane + At::offset(lane, from, i));
                if (bits == 3)
                    copy_async_16(slot(index + outer * At::inner),
                                  plane + At::sign_offset(lane, from, i));
            }
    }

    __device__ __forceinline__ void fill(const Planes& planes, int first_outer) const {
        const int lane = threadIdx.x % 32;
        if constexpr (KEY_BITS <= 8) {
            fill_plane<KEY_BITS, 0, Keys::outer>(planes.keys, 0, 0);
            if (lane < 8)
                copy_async_16(memory + (keys + values) * 512 + lane * 16,
                              planes.key_scales + lane * 8);
        }
        if constexpr (VALUE_BITS <= 8) {
            fill_plane<VALUE_BITS, 1, OUT_OUTER>(planes.values, keys, first_outer);
            if (lane >= 8 && lane < 16)
                copy_async_16(memory + (keys + values) * 512 + lane * 16,
                              planes.value_scales + (lane - 8) * 8);
        }
    }
};

// Where the operands of one block come from, in attend_decode.
struct RingSource {
    const Ring& ring;
    const uint8_t *keys, *values;  // of floats, which are read from where they are
    int first_outer;

    __device__ __forceinline__ void key_pairs(int o, int h, uint32_t (&pairs)[4][KEY_PAIRS]) const {
        const int lane = threadIdx.x % 32, index = o * Keys::inner + h;
        if constexpr (KEY_BITS <= 8)
            expand_chunk<KEY_BITS, 0>(*ring.slot(index),
                                      *ring.slot(KEY_BITS == 3 ? index + Keys::count : index), lane,
                                      o, h, pairs);
        else if (Keys::exists(lane, o, h))
            load_halves<0>(keys, lane, o, h, pairs);
        else
            zero(pairs);
    }
    __device__ __forceinline__ void value_pairs(
        int o, int i, uint32_t (&pairs)[4][VALUE_PAIRS]) const {
        const int lane = threadIdx.x % 32, index = Ring::keys + o * Values::inner + i;
        if constexpr (VALUE_BITS <= 8)
            expand_chunk<VALUE_BITS, 1>(
                *ring.slot(index), *ring.slot(VALUE_BITS == 3 ? index + Ring::value_count : index),
                lane, first_outer + o, i, pairs);
        else if (Values::exists(lane, first_outer + o, i))
            load_halves<1>(values, lane, first_outer + o, i, pairs);
        else
            zero(pairs);
        center_values(pairs);
    }

    template <int n>
    static __device__ __forceinline__ void zero(uint32_t (&pairs)[4][n]) {
#pragma unroll
        for (int i = 0; i < 4 * n; i++) pairs[i / n][i % n] = 0;
    }
};

template <typename Source>
static __device__ __forceinline__ void absorb(
    const uint32_t* queries, const Source& source, const Row (&rows)[2], const Rule& rule,
    int first, const uint16_t* key_scales, const uint16_t* value_scales, State& state) {
    float scores[2][4][4];
    score(queries, source, scores);
    finish_scores(scores, key_scales, rows, rule, first);
    to_weights(scores, value_scales, state);
    mix(scores, source, state);
}

// Each warp attends one tile to one span. Grid (tiles, heads * PARTS, splits / DECODE_WARPS
// rounded up).
KERNEL __launch_bounds__(DECODE_WARPS * 32, 1) attend_decode(
    const uint8_t* pool, int64_t block_bytes, int64_t key_codes, int64_t value_codes,
    int64_t key_scales, int64_t value_scales, const int32_t* row_start, const int64_t* start,
    const int32_t* tables, int table_width, const int32_t* tiles, const int32_t* num_tiles,
    int group, int heads, const uint32_t* queries, const float* meta, float cap, int window,
    int splits, int least, const int32_t* token_part, float* peaks, float* outs) {
    SHARED_MEMORY(memory);
    static_assert(Ring::bytes == RING_BYTES, "attend.py reserves what the kernel uses");
    if (blockIdx.x >= *num_tiles) return;
    const Step step = {row_start, start, nullptr, tables, table_width};
    const Tile tile = tile_of(tiles, blockIdx.x, step, group);
    const Spans spans = spans_of(tile.number, window, splits, least);
    const int warp = threadIdx.x / 32, span = blockIdx.z * DECODE_WARPS + warp;
    if (span >= spans.count || tile.row >= tile.rows) return;
    const int head = blockIdx.y / PARTS, half = blockIdx.y % PARTS;
    const PlaneOffsets at = {block_bytes, key_codes, value_codes, key_scales, value_scales};
    const Rule rule = {0.0f, cap, window};
    queries += ((int64_t)blockIdx.x * heads + head) * QUERY_WORDS;
    Row rows[2];
    read_rows(meta + ((int64_t)blockIdx.x * heads + head) * ROWS * 4, tile, group, rows);
    const int32_t* table = tables + (int64_t)tile.segment * table_width;
    const int begin = spans.first + span * spans.blocks;
    const int end = begin + spans.blocks < tile.number ? begin + spans.blocks : tile.number;
    Ring ring = {memory + 2 * warp * Ring::bytes};
    Ring next = {ring.memory + Ring::bytes};
    ring.fill(planes_of(pool, table[begin], head, at), half * OUT_OUTER);
    commit_copies();
    State state;
    clear(state);
    for (int b = begin; b < end; b++) {
        if (b + 1 < end) next.fill(planes_of(pool, table[b + 1], head, at), half * OUT_OUTER);
        commit_copies();
        await_copies<1>();
        sync_warp();
        const Planes planes = planes_of(pool, table[b], head, at);
        const RingSource source = {ring, planes.keys, planes.values, half * OUT_OUTER};
        absorb(queries, source, rows, rule, b * BLOCK_TOKENS, ring.scales(0), ring.scales(1), state);
        sync_warp();  // all lanes have read this block's scales
        const Ring read = ring;
        ring = next, next = read;
    }
    close(state);
    store_part(state, tile, head, group, span, half, {peaks, outs, token_part, heads * group});
}

// Operands that the block's warps have widened together; each warp reads them all.
struct SharedSource {
    Chunk* memory;
    const uint8_t *keys, *values;
    int first_outer;

    template <int n>
    __device__ __forceinline__ Chunk* slot(int index) const {
        return memory + index * n * 32 + threadIdx.x % 32;
    }
    template <int pairs_of>
    __device__ __forceinline__ void read(int index, uint32_t (&pairs)[4][pairs_of]) const {
#pragma unroll
        for (int i = 0; i < pairs_of; i++) {
            const Chunk chunk = slot<pairs_of>(index)[32 * i];
#pragma unroll
            for (int j = 0; j < 4; j++)
                pairs[(4 * i + j) / pairs_of][(4 * i + j) % pairs_of] = chunk.words[j];
        }
    }
    template <int pairs_of>
    __device__ __forceinline__ void write(int index, const uint32_t (&pairs)[4][pairs_of]) const {
#pragma unroll
        for (int i = 0; i < pairs_of; i++) {
            Chunk chunk;
#pragma unroll
            for (int j = 0; j < 4; j++)
                chunk.words[j] = pairs[(4 * i + j) / pairs_of][(4 * i + j) % pairs_of];
            slot<pairs_of>(index)[32 * i] = chunk;
        }
    }
    __device__ __forceinline__ void key_pairs(int o, int h, uint32_t (&pairs)[4][KEY_PAIRS]) const {
        read(o * Keys::inner + h, pairs);
    }
    __device__ __forceinline__ void value_pairs(
        int o, int i, uint32_t (&pairs)[4][VALUE_PAIRS]) const {
        read(o * Values::inner + i, pairs);
    }

    template <int bits, int kind, int outer>
    __device__ __forceinline__ void widen(const uint8_t* plane) const {
        using At = Chunks<bits, kind>;
        const int lane = threadIdx.x % 32;
        for (int index = threadIdx.x / 32; index < outer * At::inner; index += PREFILL_WARPS) {
            const int o = index / At::inner + (kind == 1 ? first_outer : 0), i = index % At::inner;
            uint32_t pairs[4][Word<bits>::pairs];
            RingSource::zero(pairs);
            if (At::exists(lane, o, i)) {
                if constexpr (bits <= 8) {
                    const Chunk codes =
                        *reinterpret_cast<const Chunk*>(plane + At::offset(lane, o, i));
                    const Chunk signs =
                        bits == 3 ? *reinterpret_cast<const Chunk*>(
                                        plane + At::sign_offset(lane, o, i)) : codes;
                    expand_chunk<bits, kind>(codes, signs, lane, o, i, pairs);
                } else {
                    load_halves<kind>(plane, lane, o, i, pairs);
                }
            }
            if constexpr (kind == 1) center_values(pairs);
            write(index, pairs);
        }
    }
};

// Each warp attends one tile of a piece to all its spans, in order; a block of threads takes
// PREFILL_WARPS tiles of one piece. Grid (tiles / PREFILL_WARPS, heads * PARTS).
KERNEL __launch_bounds__(PREFILL_WARPS * 32, 1) attend_prefill(
    const uint8_t* pool, int64_t block_bytes, int64_t key_codes, int64_t value_codes,
    int64_t key_scales, int64_t value_scales, const int32_t* row_start, const int64_t* start,
    const int32_t* tables, int table_width, const int32_t* tiles, const int32_t* num_tiles,
    int group, int heads, const uint32_t* queries, const float* meta, float cap, int window,
    int splits, int least, const int32_t* token_part, float* peaks, float* outs) {
    SHARED_MEMORY(memory);
    const int index = blockIdx.x * PREFILL_WARPS + threadIdx.x / 32;
    if (blockIdx.x * PREFILL_WARPS >= *num_tiles) return;
    const Step step = {row_start, start, nullptr, tables, table_width};
    const Tile tile = tile_of(tiles, index, step, group);
    const Spans spans = spans_of(tile.number, window, splits, least);
    const int head = blockIdx.y / PARTS, half = blockIdx.y % PARTS;
    const PlaneOffsets at = {block_bytes, key_codes, value_codes, key_scales, value_scales};
    const Rule rule = {0.0f, cap, window};
    queries += ((int64_t)index * heads + head) * QUERY_WORDS;
    Row rows[2];
    read_rows(meta + ((int64_t)index * heads + head) * ROWS * 4, tile, group, rows);
    const int32_t* table = tables + (int64_t)tile.segment * table_width;
    State state;
    for (int span = 0; span < spans.count; span++) {
        const int begin = spans.first + span * spans.blocks;
        const int end = begin + spans.blocks < tile.number ? begin + spans.blocks : tile.number;
        clear(state);
        for (int b = begin; b < end; b++) {
            const Planes planes = planes_of(pool, table[b], head, at);
            const SharedSource source = {
                reinterpret_cast<Chunk*>(memory), planes.keys, planes.values, half * OUT_OUTER};
            float scores[2][4][4];
            if constexpr (KEY_BITS <= 16) source.widen<KEY_BITS, 0, Keys::outer>(planes.keys);
            sync_block();
            score(queries, source, scores);
            sync_block();
            if constexpr (VALUE_BITS <= 16) source.widen<VALUE_BITS, 1, OUT_OUTER>(planes.values);
            finish_scores(scores, planes.key_scales, rows, rule, b * BLOCK_TOKENS);
            to_weights(scores, planes.value_scales, state);
            sync_block();
            mix(scores, source, state);
            sync_block();
        }
        close(state);
        sync_warp();
        store_part(state, tile, head, group, span, half, {peaks, outs, token_part, heads * group});
        sync_warp();
    }
}

// Joins a row's spans, takes them back to V's own space, attends to the row's own block in full
// precision, and divides. Grid (T, query heads), FINISH_THREADS. sinks fp32 [query heads] or null: a
// logit that takes part in the sum alone. lse fp32 [T, query heads] or null: ln of the whole sum.
KERNEL finish_rows(
    const int32_t* row_start, const int64_t* start, const int32_t* slot, const int32_t* tables,
    int table_width, const int32_t* token_segment, const int32_t* num_tokens, const float* q,
    const float* k, const float* v, const float* tails, int layer, int num_layers, int group,
    int heads, const float* centers, float scale, float cap, int window, int splits, int least,
    const float* sinks, const int32_t* token_part, const float* peaks, const float* outs,
    float* out, float* lse) {
    SHARED_MEMORY(memory);
    const int row = blockIdx.x;
    if (row >= *num_tokens) return;
    float* x = reinterpret_cast<float*>(memory);  // [DIM], and [DIM] of work
    float* scores = x + 2 * DIM;                  // [64], and [64] weights
    float* weights = scores + BLOCK_TOKENS;
    const Step step = {row_start, start, slot, tables, table_width};
    const Exact kv = {{k, v}, tails, layer, num_layers, heads};
    const int segment = token_segment[row], query_head = blockIdx.y, head = query_head / group;
    const int position = (int)start[segment] + (row - row_start[segment]);
    const int number = position / BLOCK_TOKENS, first = number * BLOCK_TOKENS;
    const Spans spans = spans_of(number, window, splits, least);
    const int base = token_part[row];
    const int count = base < 0 ? (spans.count ? 1 : 0) : spans.count;
    const int64_t at = (int64_t)(base < 0 ? ~base : base) * heads * group + query_head;
    float peak = NEVER, total = 0.0f;
    for (int j = threadIdx.x; j < DIM; j += blockDim.x) x[j] = 0.0f;
    for (int i = 0; i < count; i++) {
        const int64_t part = at + (int64_t)i * heads * group;
        float fade = 0.0f, grow = 1.0f, top = peaks[2 * PARTS * part];
        if (i) joined(peak, peaks[2 * PARTS * part], fade, grow, top);
        total = i ? add(multiply(total, fade), multiply(peaks[2 * PARTS * part + 1], grow))
                  : peaks[2 * PARTS * part + 1];
        peak = top;
        for (int j = threadIdx.x; j < DIM; j += blockDim.x) {
            const float next = outs[part * DIM + j];
            x[j] = i ? add(multiply(x[j], fade), multiply(next, grow)) : next;
        }
    }
    sync_block();
    float* sealed = x;
    if (VALUE_BITS <= 8 && count) {
        sealed = hadamard<BlockLanes>(x, x + DIM);
        for (int j = threadIdx.x; j < DIM; j += blockDim.x)
            sealed[j] = add(multiply(sealed[j], multiply(rotation_sign(j), INVERSE_ROOT_DIM)),
                            multiply(total, centers[(heads + head) * DIM + j]));
    }
    const int own = position - first + 1, lane = threadIdx.x % 32;
    const float* query = q + ((int64_t)row * heads * group + query_head) * DIM;
    // Eight lanes to a key, four keys to a warp: three shuffles for four keys. The lanes of keys past
    // the end come along, as all of a warp meet at a shuffle.
    const int part = lane % 8;
    for (int u0 = threadIdx.x / 32 * 4; u0 < own; u0 += blockDim.x / 32 * 4) {
        const int u = u0 + lane / 8;
        const float* key = exact_vector(step, kv, segment, first + (u < own ? u : own - 1), 0, head);
        float dot = 0.0f;
        for (int j = part; j < DIM; j += 8) dot = add(dot, multiply(query[j], key[j]));
#pragma unroll
        for (int mask = 4; mask; mask /= 2) dot = add(dot, shuffle_xor(dot, mask));
        dot = multiply(multiply(dot, scale), LOG2_E);
        if (cap > 0.0f) dot = LOG2_E * cap * tanhf(divide(multiply(dot, LN_2), cap));
        if (window && first + u <= position - window) dot = NEVER;
        if (part == 0 && u < own) scores[u] = dot;
    }
    sync_block();
    float own_peak = NEVER;
    for (int u = 0; u < own; u++) own_peak = fmaxf(own_peak, scores[u]);
    for (int u = threadIdx.x; u < own; u += blockDim.x) weights[u] = weight_of(scores[u], own_peak);
    sync_block();
    float own_total = 0.0f, fade, grow, top;
    for (int u = 0; u < own; u++) own_total = add(own_total, weights[u]);
    joined(peak, own_peak, fade, grow, top);
    float sum = add(multiply(total, fade), multiply(own_total, grow));
    if (sinks) sum = add(sum, exp2_fast(subtract(multiply(sinks[query_head], LOG2_E), top)));
    for (int j = threadIdx.x; j < DIM; j += blockDim.x) {
        float mixed = 0.0f;
        for (int u = 0; u < own; u++)
            mixed = add(mixed, multiply(weights[u],
                                        exact_vector(step, kv, segment, first + u, 1, head)[j]));
        const float both = add(multiply(sealed[j], fade), multiply(mixed, grow));
        out[((int64_t)row * heads * group + query_head) * DIM + j] = divide(both, sum);
    }
    if (lse && threadIdx.x == 0)
        lse[(int64_t)row * heads * group + query_head] = multiply(add(top, log2f(sum)), LN_2);
}
