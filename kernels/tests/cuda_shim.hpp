// Runs the text of the CUDA kernels on the CPU: one fiber for each CUDA thread of a block, switched
// only where threads of a warp or a block meet. A meeting that some thread misses (it waits
// elsewhere, or has returned) ends the launch with an error. Shared memory starts as NaNs.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <tuple>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __device__
#define __global__
#define __forceinline__ inline
#define __constant__
#define __launch_bounds__(...)
#define KERNEL static void
#define SHARED_MEMORY(name) unsigned char* name = shim::shared
#define threadIdx (shim::current->index)
#define blockIdx (shim::block_index)
#define blockDim (shim::block_size)
#define gridDim (shim::grid_size)

namespace shim {

struct Index { unsigned x, y, z; };

enum Meeting { NONE, SYNC, XOR, ANY, MATRIX, BLOCK, RETURNED };

struct Group {  // of threads that meet: a warp, or the block
    int members = 0, arrived = 0, done = 0;
    unsigned generation = 0;
    Meeting meeting = NONE;
    int detail = 0;
    uint32_t in[32][10];
    uint32_t out[32][4];
};

struct Fiber {
    Index index;
    int thread;
    Group* warp;
    Group* waits = nullptr;
    unsigned generation = 0;
    bool returned = false;
#if defined(__x86_64__)
    void* stack_top;
#else
    ucontext_t context;
#endif
};

constexpr size_t STACK_BYTES = 96 << 10;
constexpr size_t SHARED_BYTES = 256 << 10;

static Fiber* current;
static Index block_index, block_size, grid_size;
alignas(64) static unsigned char shared[SHARED_BYTES];
static std::vector<Fiber> fibers;
static std::vector<Group> warps;
static Group whole;
static std::vector<unsigned char> stacks;
static std::function<void()> body;
static char message[256];
static bool failed;

#if defined(__x86_64__)
static void* main_stack;
extern "C" void kvmesh_shim_switch(void** from, void* to);
asm(".text\n.align 16\nkvmesh_shim_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
static void to_main() { kvmesh_shim_switch(&current->stack_top, main_stack); }
static void to_fiber(Fiber& fiber) { kvmesh_shim_switch(&main_stack, fiber.stack_top); }
#else
static ucontext_t main_context;
static void to_main() { swapcontext(&current->context, &main_context); }
static void to_fiber(Fiber& fiber) { swapcontext(&main_context, &fiber.context); }
#endif

static const char* name_of(Meeting meeting) {
    const char* names[] = {"nothing", "sync_warp", "shuffle_xor", "any_in_warp", "multiply_tile",
                           "sync_block", "its end"};
    return names[meeting];
}

static void fail(Meeting wanted, Group& group) {
    if (!failed)
        snprintf(message, sizeof message,
                 "divergent: thread %d of block (%u, %u, %u) came to %s while others wait at %s",
                 current->thread, block_index.x, block_index.y, block_index.z, name_of(wanted),
                 name_of(group.meeting));
    failed = true;
    to_main();
}

// Waits for all others of the group at the same meeting; `last` is called by the last to come.
template <typename Last>
static void meet(Group& group, Meeting meeting, int detail, Last last) {
    if (group.arrived == 0) group.meeting = meeting, group.detail = detail;
    if (group.meeting != meeting || group.detail != detail || group.done) fail(meeting, group);
    if (++group.arrived == group.members) {
        last();
        group.arrived = 0;
        group.meeting = NONE;
        group.generation++;
        return;
    }
    current->waits = &group;
    current->generation = group.generation;
    to_main();
    current->waits = nullptr;
}

static void fiber_main() {
    body();
    current->returned = true;
    for (Group* group : {current->warp, &whole}) {
        if (group->arrived) fail(RETURNED, *group);
        group->done++;
    }
    to_main();
}

static void prepare(Fiber& fiber, unsigned char* stack) {
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(
        (reinterpret_cast<uintptr_t>(stack) + STACK_BYTES) & ~uintptr_t(15));
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.stack_top = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = &main_context;
    makecontext(&fiber.context, &fiber_main, 0);
#endif
}

// reversed: the last thread first, which shows where a barrier is missing.
static void run_block(bool reversed) {
    const int count = block_size.x;
    memset(shared, 0xff, sizeof shared);
    warps.assign((count + 31) / 32, Group());
    whole = Group();
    whole.members = count;
    stacks.resize(count * STACK_BYTES);
    fibers.assign(count, Fiber());
    for (int i = 0; i < count; i++) {
        fibers[i].index = {unsigned(i), 0, 0};
        fibers[i].thread = i;
        fibers[i].warp = &warps[i / 32];
        fibers[i].warp->members++;
        prepare(fibers[i], stacks.data() + i * STACK_BYTES);
    }
    for (int left = count, moved = 1; left && !failed; ) {
        moved = 0;
        for (int i = 0; i < count && !failed; i++) {
            Fiber& fiber = fibers[reversed ? count - 1 - i : i];
            if (fiber.returned || (fiber.waits && fiber.waits->generation == fiber.generation))
                continue;
            current = &fiber;
            to_fiber(fiber);
            moved++;
            left -= fiber.returned;
        }
        if (!moved && left) {
            if (!failed) snprintf(message, sizeof message, "divergent: %d threads wait for ever", left);
            failed = true;
        }
    }
}

template <typename... Args, size_t... I>
static int launch(void (*kernel)(Args...), const unsigned* grid, unsigned block, int reversed,
                  void** args, std::index_sequence<I...>) {
    failed = false, message[0] = 0;
    grid_size = {grid[0], grid[1], grid[2]};
    block_size = {block, 1, 1};
    body = [=] { kernel(*static_cast<std::decay_t<Args>*>(args[I])...); };
    for (unsigned z = 0; z < grid[2] && !failed; z++)
        for (unsigned y = 0; y < grid[1] && !failed; y++)
            for (unsigned x = 0; x < grid[0] && !failed; x++) {
                block_index = {x, y, z};
                run_block(reversed);
            }
    return failed;
}

template <typename... Args>
static int launch(void (*kernel)(Args...), const unsigned* grid, unsigned block, int reversed,
                  void** args) {
    return launch(kernel, grid, block, reversed, args, std::index_sequence_for<Args...>());
}

static float widen(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float magnitude = exponent == 0    ? std::ldexp(float(mantissa), -24)
                            : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                             : std::ldexp(float(1024 + mantissa), exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}

static std::vector<float> widen_all() {
    std::vector<float> all(1 << 16);
    for (int bits = 0; bits < 1 << 16; bits++) all[bits] = widen(uint16_t(bits));
    return all;
}

static const std::vector<float> widened = widen_all();
static float half_to_float(uint16_t bits) { return widened[bits]; }

static uint16_t float_to_half(float x) {  // to the nearest, ties to even
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const double size = std::fabs(double(x));
    if (std::isnan(x)) return sign | 0x7fff;
    if (size >= 65520.0) return sign | 0x7c00;
    if (size < std::ldexp(1.0, -14)) return sign | uint16_t(std::nearbyint(std::ldexp(size, 24)));
    int exponent;
    std::frexp(size, &exponent);
    const int mantissa = int(std::nearbyint(std::ldexp(size, 11 - exponent)));  // 1024..2048
    return sign | uint16_t(((exponent + 14) << 10) + mantissa - 1024);
}

// The fragments of mma.sync.m16n8k16 as the PTX manual lays them over the lanes.
static void multiply_warp(Group& warp) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; r++)
            for (int half = 0; half < 2; half++)
                a[g + 8 * (r % 2)][2 * t + 8 * (r / 2) + half] =
                    half_to_float(uint16_t(warp.in[lane][r] >> (16 * half)));
        for (int r = 0; r < 2; r++)
            for (int half = 0; half < 2; half++)
                b[2 * t + 8 * r + half][g] =
                    half_to_float(uint16_t(warp.in[lane][4 + r] >> (16 * half)));
    }
    for (int lane = 0; lane < 32; lane++)
        for (int r = 0; r < 4; r++) {
            const int row = lane / 4 + 8 * (r / 2), column = 2 * (lane % 4) + r % 2;
            float sum;
            memcpy(&sum, &warp.in[lane][6 + r], 4);
            for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
            memcpy(&warp.out[lane][r], &sum, 4);
        }
}

}  // namespace shim

static inline float __uint_as_float(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }
static inline uint32_t __float_as_uint(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }

static inline void sync_block() { shim::meet(shim::whole, shim::BLOCK, 0, [] {}); }
static inline void sync_warp() { shim::meet(*shim::current->warp, shim::SYNC, 0, [] {}); }

template <typename T>
static inline T shuffle_xor(T value, int mask) {
    static_assert(sizeof(T) == 4, "32 bits");
    shim::Group& warp = *shim::current->warp;
    const int lane = shim::current->thread % 32;
    memcpy(&warp.in[lane][0], &value, 4);
    shim::meet(warp, shim::XOR, mask, [&] {
        for (int i = 0; i < 32; i++) warp.out[i][0] = warp.in[i ^ mask][0];
    });
    memcpy(&value, &warp.out[lane][0], 4);
    return value;
}

static inline bool any_in_warp(bool value) {
    shim::Group& warp = *shim::current->warp;
    const int lane = shim::current->thread % 32;
    warp.in[lane][0] = value;
    shim::meet(warp, shim::ANY, 0, [&] {
        uint32_t any = 0;
        for (int i = 0; i < warp.members; i++) any |= warp.in[i][0];
        for (int i = 0; i < 32; i++) warp.out[i][0] = any;
    });
    return warp.out[lane][0] != 0;
}

static inline void multiply_tile(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    shim::Group& warp = *shim::current->warp;
    const int lane = shim::current->thread % 32;
    uint32_t* in = warp.in[lane];
    memcpy(in, a, 16);
    in[4] = b0, in[5] = b1;
    memcpy(in + 6, c, 16);
    shim::meet(warp, shim::MATRIX, 0, [&] { shim::multiply_warp(warp); });
    memcpy(c, warp.out[lane], 16);
}

static inline uint32_t permute(uint32_t x, uint32_t y, uint32_t selector) {
    const uint64_t both = uint64_t(y) << 32 | x;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t nibble = selector >> (4 * i) & 15;
        uint32_t byte = uint32_t(both >> (8 * (nibble & 7))) & 255;
        if (nibble & 8) byte = byte & 128 ? 255 : 0;
        out |= byte << (8 * i);
    }
    return out;
}

static inline void copy_async_16(void* shared, const void* global) { memcpy(shared, global, 16); }
static inline void commit_copies() {}
template <int pending>
static inline void await_copies() {}

static inline float exp2_fast(float x) { return std::exp2(x); }
static inline float from_half(uint16_t bits) { return shim::half_to_float(bits); }
static inline uint16_t to_half(float x) { return shim::float_to_half(x); }
static inline uint32_t pack_halves(float first, float second) {
    return to_half(first) | uint32_t(to_half(second)) << 16;
}
static inline uint32_t subtract_halves(uint32_t x, uint32_t y) {
    return pack_halves(from_half(uint16_t(x)) - from_half(uint16_t(y)),
                       from_half(uint16_t(x >> 16)) - from_half(uint16_t(y >> 16)));
}
static inline float add(float x, float y) { return x + y; }
static inline float subtract(float x, float y) { return x - y; }
static inline float multiply(float x, float y) { return x * y; }
static inline float divide(float x, float y) { return x / y; }
static inline float root(float x) { return std::sqrt(x); }
static inline void set_flag(int32_t* flag) { *flag = 1; }
