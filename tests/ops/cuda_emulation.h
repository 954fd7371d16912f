// Runs a CUDA kernel's own source on the CPU, so that its logic can be checked where there is no GPU:
//
//     g++ -std=c++17 -O1 -fPIC -shared -DEMULATED -DBF16=0 -include cuda_emulation.h -x c++ kernel.cu -o kernel.so
//
// The source keeps its inline PTX under #ifndef EMULATED; the primitives of the same names are here. Every CUDA thread
// is a fiber of one OS thread, and all that is random comes from the launch's seed, so that a failure can be repeated.
// What a GPU leaves open is made as bad as it may get, for mistakes to show: shared memory starts as 0xFF; warps run in
// random order, and any may stop at a collective or sleep for long; a bulk copy spoils its destination when it is
// issued and brings the data late; a poke reaches the other blocks late and out of order. A launch that goes wrong
// returns 1 and says why, also on stderr.
//
// With -DEMULATED_RACES and -fsanitize=thread, whose runtime is not linked, it also looks at every access to shared memory
// and reports two by different warps, or by a warp and a bulk copy, that nothing orders: no named barrier, no mbarrier.
// That does not depend on what the order happened to be. (Lanes of one warp are taken to be in order.)
//
// What it cannot show: memory order within a block (shared memory and ordinary stores are seen at once, and a thread
// runs on until it waits), and lanes that meet at the same kind of collective from different places. Memory that is
// poked must be read by peek alone: nothing else, a bulk copy included, sees what its own block poked a moment ago.
#pragma once
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <xmmintrin.h>

#include <mutex>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#ifndef BF16
#define BF16 0
#endif

#pragma GCC diagnostic ignored "-Wunknown-pragmas"  // #pragma unroll; with -Wall, g++ before 13 warns all the same
#define __device__
#define __global__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
// A variable of the source would be one for all blocks.
#define __shared__ _Pragma("GCC error \"emulated kernels have shared memory by dynamic_shared() alone\"")

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint3 { u32 x, y, z; };
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Everything is of this file alone (static): libraries of several kernels loaded into one process must not share it.
static uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

// Lower case, for the macros that a kernel is compiled with not to be among these names.
constexpr u32 stack_bytes = 65536 + 192;  // not a power of two: the tops of all stacks would share few cache lines
constexpr u32 shared_base = 1024;         // the first shared address: a GPU keeps those below, and 0 is a mistake
constexpr u32 fence_bytes = 128;          // around shared memory, which nothing may change
constexpr u32 calendar = 64;              // turns that a copy or a poke can be late
constexpr u64 patience = 20000;  // turns in which nothing happens until the threads that poll are held to wait forever;
constexpr u32 busy = 100;        // as many collectives of a warp without a poll are something
constexpr u64 canary = 0xC0FFEE1234567890;

enum class Kind {
    start, shfl_xor, shfl_down, shfl, any, all, ballot, syncwarp, multiply,
    syncthreads, bar_sync, bar_arrive,  // these wait for other warps
    barrier_try, peek, nanosleep,       // these for the warp's next turn
};
static const char* const names[] = {"its start", "shfl_xor", "shfl_down", "shfl", "any", "all", "ballot", "syncwarp",
                                    "multiply", "syncthreads", "bar_sync", "bar_arrive", "barrier_try", "peek",
                                    "nanosleep"};
static inline const char* name(Kind kind) { return names[int(kind)]; }

// Where a thread waits, or last waited.
struct Place {
    Kind kind;
    int line;
    u64 first, second;
    bool operator==(const Place& other) const {
        return kind == other.kind && line == other.line && first == other.first && second == other.second;
    }
};
struct Lane {
    void* stack;
    u8* bottom;
    Place at;
};
typedef u32 Slots[32][10];  // the words that each lane brings to a collective, and takes from it
struct Warp {
    u32 block, index;
    u32 ready, later;     // lanes to run in this turn of the warp, and in its next
    u32 gathered, ended;  // lanes that wait at the warp's collective, and those that have ended
    bool backward;        // the order in which lanes run
    u64 asleep;           // the turn until which the warp does not run
    u32 since;            // collectives since a lane last polled
    // Two of each, used in turn: lanes still read the last collective's while others bring to the next.
    u32 half, votes[2];
    Slots slots[2];
    Lane lanes[32];
};
struct NamedBarrier { u32 threads, arrived, warps, waiting; };  // the last two are sets of warps
struct Block {
    std::vector<u8> memory;
    u8* shared;
    u32 live;  // warps that have not ended
    NamedBarrier barriers[16];
    std::vector<Warp> warps;
};
// An mbarrier, in its 8 bytes of shared memory, such that 0xFF poison and zeros are not an initialised one.
struct __attribute__((may_alias)) Phases {
    u64 parity : 1, unset : 1, pending : 20, count : 20;
    long long bytes : 22;
};
static_assert(sizeof(Phases) == 8, "");
struct Store { u8* to; u32 size, block; u64 due; u8 bytes[16]; };
struct Copy { u32 block, to, bytes, barrier; const void* from; int line; };
struct Failure {};

static struct State {
    std::vector<Block> blocks;
    u32 threads, shared_bytes;
    void (*body)(const void*);
    const void* call;
    u64 random, turn, calls;
    u64 quiet, events;     // turns since anything happened, and what is still to happen by itself
    u32 lateness, stride;  // the turns that it may take, and the collectives that a warp goes through in one turn
    std::vector<Copy> copies[calendar];
    std::vector<uintptr_t> commits[calendar];                  // the 16 bytes that each store to do lies in,
    std::unordered_map<uintptr_t, std::vector<Store>> stores;  // and by those the stores, in the order of the pokes
    std::unordered_set<uintptr_t> poked;                       // every 4 bytes poked in this launch
    Warp* warp;  // of the thread that runs; null in the scheduler
    u32 lane;
    void* scheduler;
    std::string message;
} now;

static inline u32 chance(u32 below) {
    now.random ^= now.random << 13, now.random ^= now.random >> 7, now.random ^= now.random << 17;
    return (now.random * 0x2545F4914F6CDD1Dull >> 32) % below;
}

#ifdef EMULATED_RACES
// Who knows of what: vector clocks of a block's warps and of its mbarriers' bulk copies, which are let know where warps
// meet. The compiler calls the hooks behind the namespace; nothing here may be instrumented itself, and so it calls nobody.
#define EMULATED_UNSEEN __attribute__((no_sanitize("thread")))
namespace races {
constexpr u32 most_warps = 32, most_barriers = 96, all = most_warps + most_barriers;
struct Clocks { u32 of[all]; };
struct Mbarrier { u32 at; Clocks arriving, done; };
struct Known {
    u32* cells;  // of each 4 bytes: the last write's clock and line, its author, and each warp's last read since
    Clocks who[all], named[16];
    Mbarrier barriers[most_barriers];
    u32 count;
};
static Known* blocks;
static u32 warps, words, block_count;
static Known* here;   // of the thread that runs
static u8* shared;
static u32 warp;
static bool running;

EMULATED_UNSEEN static void join(Clocks& into, const Clocks& from) {
    for (u32 i = 0; i < all; i++)
        if (into.of[i] < from.of[i]) into.of[i] = from.of[i];
}
EMULATED_UNSEEN static void forget() {
    for (u32 b = 0; blocks && b < block_count; b++) free(blocks[b].cells);
    free(blocks);
    blocks = nullptr, running = false;
}
EMULATED_UNSEEN static void begin(u32 count, u32 warps_of_block, u32 bytes) {
    forget();
    block_count = count, warps = warps_of_block, words = (bytes + 3) / 4;
    blocks = static_cast<Known*>(calloc(count, sizeof(Known)));
    for (u32 b = 0; b < count; b++) {
        blocks[b].cells = static_cast<u32*>(calloc(size_t(words) * (2 + warps), 4));
        for (u32 i = 0; i < all; i++) blocks[b].who[i].of[i] = 1;
    }
}
EMULATED_UNSEEN static void run(u32 block, u32 index, u8* memory) {
    here = &blocks[block], warp = index, shared = memory, running = true;
}
EMULATED_UNSEEN static void stop() { running = false; }
// A warp comes to a named barrier, and warps leave it together.
EMULATED_UNSEEN static void arrive(u32 block, u32 index, u32 id) {
    Known& known = blocks[block];
    join(known.named[id], known.who[index]);
    known.who[index].of[index]++;
}
EMULATED_UNSEEN static void leave(u32 block, u32 waiting, u32 id) {
    Known& known = blocks[block];
    for (u32 w = 0; w < warps; w++)
        if (waiting >> w & 1) join(known.who[w], known.named[id]);
    known.named[id] = Clocks();
}
EMULATED_UNSEEN static u32 slot(Known& known, u32 at) {
    for (u32 i = 0; i < known.count; i++)
        if (known.barriers[i].at == at) return i;
    if (known.count == most_barriers) __builtin_trap();
    known.barriers[known.count] = {at, {}, {}};
    // Its own words are nobody's.
    for (u32 i = 0; i < 2; i++) known.cells[size_t((at - shared_base) / 4 + i) * (2 + warps) + 1] = ~0u;
    return known.count++;
}
EMULATED_UNSEEN static void arrive_at(u32 at) {
    join(here->barriers[slot(*here, at)].arriving, here->who[warp]);
    here->who[warp].of[warp]++;
}
EMULATED_UNSEEN static void flip(u32 block, u32 at) {
    Mbarrier& barrier = blocks[block].barriers[slot(blocks[block], at)];
    join(barrier.done, barrier.arriving);
}
EMULATED_UNSEEN static void wait_for(u32 at) { join(here->who[warp], here->barriers[slot(*here, at)].done); }

static void report(u32 word, const char* what, u32 author, const char* did, u32 line);
constexpr u32 line_bits = 13;
EMULATED_UNSEEN static u32 line_now();
// `author`, a warp or an mbarrier's copies, reads or writes words.
EMULATED_UNSEEN static void touch(u32 first, u32 last, u32 author, bool writes) {
    const Clocks& known = here->who[author];
    const u32 now_and_line = known.of[author] << line_bits | line_now();
    for (u32 word = first; word <= last; word++) {
        u32* cell = here->cells + size_t(word) * (2 + warps);
        if (cell[1] == ~0u) continue;
        const u32 by = cell[1] - 1;
        if (cell[1] && by != author && cell[0] >> line_bits > known.of[by])
            report(word, writes ? "written" : "read", by, "wrote", cell[0] & ((1 << line_bits) - 1));
        if (!writes) {
            cell[2 + author] = now_and_line;
            continue;
        }
        for (u32 w = 0; w < warps; w++) {
            if (w != author && cell[2 + w] >> line_bits > known.of[w])
                report(word, "written", w, "read", cell[2 + w] & ((1 << line_bits) - 1));
            cell[2 + w] = 0;
        }
        cell[0] = now_and_line, cell[1] = author + 1;
    }
}
EMULATED_UNSEEN static void access(const void* at, u64 bytes, bool writes) {
    if (!running) return;
    const u64 offset = static_cast<const u8*>(at) - shared;
    if (offset + bytes > u64(words) * 4 || !bytes) return;
    touch(offset / 4, (offset + bytes - 1) / 4, warp, writes);
}
// A bulk copy is on its way, in the name of the mbarrier that will tell of it. It has landed.
EMULATED_UNSEEN static void copy(u32 to, u32 bytes, u32 barrier) {
    const u32 author = most_warps + slot(*here, barrier);
    join(here->who[author], here->who[warp]);
    here->who[author].of[author]++;
    touch((to - shared_base) / 4, (to - shared_base + bytes - 1) / 4, author, true);
}
EMULATED_UNSEEN static void landed(u32 block, u32 at) {
    const u32 i = slot(blocks[block], at);
    join(blocks[block].barriers[i].arriving, blocks[block].who[most_warps + i]);
}
}  // namespace races
#define EMULATED_RACE(what) races::what
#else
#define EMULATED_RACE(what) (void)0
#endif

// Leaves the running stack's pointer in *from, its registers on it, and goes on where the stack `to` was left.
__attribute__((naked, noipa, no_sanitize("thread"))) static void switch_stack(void** /*from*/, void* /*to*/) {
    asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp, (%rdi); mov %rsi, %rsp;"
        "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

// Where all warps wait, warps and lanes with the same place together.
static std::string whereabouts() {
    std::string all, last;
    u32 first = 0;
    for (Block& block : now.blocks) {
        for (u32 i = 0; i <= block.warps.size(); i++) {
            std::string text;
            for (u32 lane = 0, end; i < block.warps.size() && lane < 32; lane = end) {
                Warp& warp = block.warps[i];
                const Place& at = warp.lanes[lane].at;
                auto ended = [&](u32 l) { return warp.ended >> l & 1; };
                for (end = lane + 1; end < 32 && ended(end) == ended(lane) && warp.lanes[end].at == at;) end++;
                char part[200];
                if (ended(lane)) snprintf(part, sizeof part, " lanes %u-%u ended;", lane, end - 1);
                else snprintf(part, sizeof part, " lanes %u-%u at %s(0x%llx, %llu), line %d;", lane, end - 1,
                              name(at.kind), at.first, at.second, at.line);
                text += part;
            }
            if (i && text != last) {
                all += "\n  block " + std::to_string(&block - now.blocks.data()) + " warps " + std::to_string(first) +
                       "-" + std::to_string(i - 1) + ":" + last;
                first = i;
            }
            last = text;
        }
        first = 0;
    }
    return all;
}

// Ends the launch: an exception in the scheduler, which a thread goes back to, not to run again.
[[noreturn]] __attribute__((format(printf, 2, 3))) static void fail(bool everywhere, const char* form, ...) {
    char text[600];
    int used = !now.warp ? 0 : snprintf(text, sizeof text, "block %u warp %u lane %u: ", now.warp->block,
                                        now.warp->index, now.lane);
    va_list list;
    va_start(list, form);
    vsnprintf(text + used, sizeof text - used, form, list);
    va_end(list);
    now.message = text + (everywhere ? whereabouts() : std::string());
    void* left;
    if (now.warp) switch_stack(&left, now.scheduler);
    throw Failure();
}

static inline void run_next(Warp& warp, u32 after, void** from) {
    u32 above = warp.ready & ~1u << after, below = warp.ready & ((1u << after) - 1);
    now.lane = warp.backward ? 31 - __builtin_clz(below ? below : warp.ready)
                             : __builtin_ctz(above ? above : warp.ready);
    warp.ready &= ~(1u << now.lane);
    threadIdx.x = warp.index * 32 + now.lane;
    EMULATED_RACE(run(warp.block, warp.index, now.blocks[warp.block].shared));
    switch_stack(from, warp.lanes[now.lane].stack);
}

// Leaves the thread that runs for the next of its warp or, where none is ready, for the scheduler.
static void leave() {
    Warp& warp = *now.warp;
    void** from = &warp.lanes[now.lane].stack;
    if (warp.ready) run_next(warp, now.lane, from);
    else switch_stack(from, now.scheduler);
}

// Leaves the thread until the next turn of its warp.
static void poll(Place place) {
    now.warp->lanes[now.lane].at = place;
    now.warp->since = 0;
    now.warp->later |= 1u << now.lane;
    leave();
}

static void settle(Block& block, NamedBarrier& barrier) {
    u32 needed = barrier.threads ? barrier.threads : block.live * 32;
    if (!barrier.arrived || barrier.arrived < needed) return;
    for (Warp& warp : block.warps)
        if (barrier.waiting >> warp.index & 1) warp.ready |= std::exchange(warp.gathered, 0);
    EMULATED_RACE(leave(&block - now.blocks.data(), barrier.waiting, &barrier - block.barriers));
    barrier = NamedBarrier();
}

// What lanes that have ended bring to the next collective.
static inline void poison(Warp& warp, u32 lanes) {
    for (; lanes; lanes &= lanes - 1) memset(warp.slots[warp.half][__builtin_ctz(lanes)], 0xFF, sizeof(Slots) / 32);
}

static void multiply_fragments(Slots& slots);

// Does what the lanes gathered at a collective are gathered for. One that ends while the others wait completes it too.
static void complete(Warp& warp, const Place& at) {
    if (++warp.since > busy) now.quiet = 0;
    Slots& slots = warp.slots[warp.half];
    warp.half ^= 1;
    warp.votes[warp.half] = 0;
    poison(warp, warp.ended);
    if (at.kind == Kind::multiply) {
        if (warp.ended) fail(true, "%s, line %d, in a warp of which lanes have ended", name(at.kind), at.line);
        multiply_fragments(slots);
    }
    if (at.kind < Kind::syncthreads) {
        warp.ready |= std::exchange(warp.gathered, 0);
        return;
    }
    now.quiet = 0;
    Block& block = now.blocks[warp.block];
    const u32 id = at.first;
    u32 threads = at.second;  // none for those that have not ended, as __syncthreads waits
    if (!id && threads == block.warps.size() * 32) threads = 0;
    if (id > 15 || threads % 32 || (id && !threads))
        fail(false, "%s(%u, %u), line %d", name(at.kind), id, threads, at.line);
    NamedBarrier& barrier = block.barriers[id];
    if (barrier.arrived && barrier.threads != threads)
        fail(true, "barrier %u, line %d, for %u threads while it waits for %u", id, at.line, threads, barrier.threads);
    if (barrier.warps >> warp.index & 1)
        fail(true, "barrier %u, line %d: the warp arrives twice in one use", id, at.line);
    barrier.threads = threads;
    barrier.arrived += 32;
    barrier.warps |= 1u << warp.index;
    EMULATED_RACE(arrive(warp.block, warp.index, id));
    if (at.kind == Kind::bar_arrive) warp.ready |= std::exchange(warp.gathered, 0);
    else barrier.waiting |= 1u << warp.index;
    if (threads && barrier.arrived > threads) fail(true, "barrier %u, line %d: too many arrive", id, at.line);
    settle(block, barrier);
}

// Waits for all lanes of the warp; the slots have what each brought.
template <class... Words> static Slots& meet(Place place, Words... words) {
    Warp& warp = *now.warp;
    const u32 lane = now.lane, bit = 1u << lane;
    Slots& slots = warp.slots[warp.half];
    u32 at = 0;
    ((slots[lane][at++] = words), ...);
    Lane& self = warp.lanes[lane];
    self.at = place;
    if (warp.gathered) {
        const Place& other = warp.lanes[__builtin_ctz(warp.gathered)].at;
        if (other.kind != place.kind || other.first != place.first || other.second != place.second)
            fail(true, "comes to %s, line %d, where other lanes of the warp wait at %s, line %d", name(place.kind),
                 place.line, name(other.kind), other.line);
    }
    warp.gathered |= bit;
    if ((warp.gathered | warp.ended) != ~0u) {
        leave();
        return slots;
    }
    complete(warp, place);
    if (!(warp.ready & bit)) {  // a barrier of the block's still waits
        leave();
    } else if (chance(now.stride) == 0) {  // lets the other warps go first
        warp.later |= std::exchange(warp.ready, 0);
        leave();
    } else {
        warp.ready &= ~bit;
    }
    return slots;
}

[[noreturn]] static void thread_main() {
    now.body(now.call);
    Warp& warp = *now.warp;
    Lane& lane = warp.lanes[now.lane];
    u64 bottom;
    memcpy(&bottom, lane.bottom, 8);
    if (bottom != canary) fail(false, "the thread's stack of %u bytes overflowed", stack_bytes);
    warp.ended |= 1u << now.lane;
    poison(warp, 1u << now.lane);
    now.quiet = 0;
    if (warp.ended == ~0u) {
        Block& block = now.blocks[warp.block];
        block.live--;
        if (!block.barriers[0].threads) settle(block, block.barriers[0]);
    } else if (warp.gathered && (warp.gathered | warp.ended) == ~0u) {
        complete(warp, warp.lanes[__builtin_ctz(warp.gathered)].at);
    }
    leave();
    __builtin_unreachable();
}

static u8* shared_at(Block& block, u32 at, u32 bytes, u32 alignment, const char* what, int line) {
    if (at % alignment || at < shared_base || u64(at) + bytes > shared_base + now.shared_bytes)
        fail(false, "%s, line %d: shared address 0x%x of %u bytes is %s", what, line, at, bytes,
             at % alignment ? "misaligned" : "out of bounds");
    return block.shared + (at - shared_base);
}
static inline Block& own_block() { return now.blocks[now.warp->block]; }

static Phases& phases(Block& block, u32 at, const char* what, int line) {
    auto& barrier = *reinterpret_cast<Phases*>(shared_at(block, at, 8, 8, what, line));
    if (barrier.unset || !barrier.count) fail(false, "%s, line %d: no barrier initialised at 0x%x", what, line, at);
    return barrier;
}

// Takes arrivals and bytes off what the barrier's phase waits for.
static void advance(Block& block, u32 at, u32 arrivals, long long bytes, const char* what, int line) {
    Phases& barrier = phases(block, at, what, line);
    if (arrivals > barrier.pending) fail(true, "%s, line %d: more arrivals than the barrier counts", what, line);
    bytes = barrier.bytes - bytes;
    if (bytes >= 1 << 20 || bytes <= -(1 << 20)) fail(false, "%s, line %d: a barrier waits for 2^20 bytes", what, line);
    barrier.pending -= arrivals;
    barrier.bytes = bytes;
    now.quiet = 0;
    if (barrier.pending || bytes) return;
    barrier.parity ^= 1;
    barrier.pending = barrier.count;
    EMULATED_RACE(flip(&block - now.blocks.data(), at));
}

static void aligned(const void* at, u32 bytes, const char* what, int line) {
    if (uintptr_t(at) % bytes) fail(false, "%s, line %d: %p is misaligned", what, line, at);
}

template <class T> static T peek(const void* from, int line) {
    aligned(from, sizeof(T), "peek", line);
    poll({Kind::peek, line, uintptr_t(from), sizeof(T)});
    T value;
    memcpy(&value, from, sizeof value);
    if (now.stores.empty()) return value;
    auto found = now.stores.find(uintptr_t(from) & -16);
    if (found == now.stores.end()) return value;
    for (const Store& store : found->second) {  // a block sees what it poked itself, in order
        const uintptr_t start = uintptr_t(from), other = uintptr_t(store.to);
        const uintptr_t low = start > other ? start : other;
        const uintptr_t high = start + sizeof(T) < other + store.size ? start + sizeof(T) : other + store.size;
        if (store.block == now.warp->block && low < high)
            memcpy(reinterpret_cast<u8*>(&value) + (low - start), store.bytes + (low - other), high - low);
    }
    return value;
}

static void poke(void* to, const void* from, u32 size, int line) {
    aligned(to, size, "poke", line);
    Store store{static_cast<u8*>(to), size, now.warp->block, now.turn + 1 + chance(now.lateness), {}};
    memcpy(store.bytes, from, size);
    auto& pending = now.stores[uintptr_t(to) & -16];
    for (const Store& other : pending)  // stores to one place are seen in one order
        if (other.to < store.to + size && store.to < other.to + other.size && other.due > store.due)
            store.due = other.due;
    pending.push_back(store);
    now.commits[store.due % calendar].push_back(uintptr_t(to) & -16);
    now.events++;
    for (u32 i = 0; i < size; i += 4) now.poked.insert(uintptr_t(to) + i);
    now.quiet = 0;
}

template <class T> static T fetch(const void* from, int line) {
    aligned(from, sizeof(T), "fetch", line);
    for (u32 i = 0; i < sizeof(T) && !now.poked.empty(); i += 4)
        if (now.poked.count(uintptr_t(from) + i))
            fail(false, "fetch, line %d, of what this launch pokes: it may read what was there before", line);
    T value;
    memcpy(&value, from, sizeof value);
    return value;
}

// Does what is due in this turn.
static void commit(const u64 turn) {
    for (uintptr_t place : std::exchange(now.commits[turn % calendar], {})) {
        auto& pending = now.stores[place];
        for (auto store = pending.begin();; ++store) {
            if (store->due != turn) continue;
            memcpy(store->to, store->bytes, store->size);
            pending.erase(store);
            break;
        }
        if (pending.empty()) now.stores.erase(place);
        now.events--, now.quiet = 0;
    }
    for (const Copy& copy : std::exchange(now.copies[turn % calendar], {})) {
        Block& block = now.blocks[copy.block];
        if (!block.live) fail(false, "copy_async, line %d: block %u ended before the copy did", copy.line, copy.block);
        memcpy(shared_at(block, copy.to, copy.bytes, 16, "copy_async", copy.line), copy.from, copy.bytes);
        EMULATED_RACE(landed(copy.block, copy.barrier));
        advance(block, copy.barrier, 0, copy.bytes, "copy_async", copy.line);
        now.events--;
    }
}

static void schedule() {
    std::vector<Warp*> order;
    for (Block& block : now.blocks)
        for (Warp& warp : block.warps) order.push_back(&warp);
    while (!order.empty() || now.events) {
        commit(++now.turn);
        bool runnable = false;
        for (u32 i = order.size(); i > 1; i--) std::swap(order[i - 1], order[chance(i)]);
        if (chance(256) == 0 && !order.empty())  // holds a whole block back
            for (Warp& warp : now.blocks[order[0]->block].warps) warp.asleep = now.turn + chance(64);
        for (u32 i = 0; i < order.size();) {
            Warp& warp = *order[i];
            if (warp.ended != ~0u && (warp.ready | warp.later)) {
                runnable = true;
                if (chance(64) == 0) warp.asleep = now.turn + chance(32);
                if (warp.asleep < now.turn) {
                    warp.ready |= std::exchange(warp.later, 0);
                    warp.backward = chance(2);
                    blockIdx.x = warp.block;
                    now.warp = &warp;
                    run_next(warp, chance(32), &now.scheduler);
                    EMULATED_RACE(stop());
                    now.warp = nullptr;
                    if (!now.message.empty()) throw Failure();
                }
            }
            if (warp.ended == ~0u) order[i] = order.back(), order.pop_back();
            else i++;
        }
        if (!order.empty() && ((!runnable && !now.events) || now.quiet++ > patience))
            fail(true, "deadlock: nothing has happened for %llu turns", now.quiet);
    }
}

static int launch(void (*body)(const void*), const void* call, u32 blocks, u32 threads, u32 shared_bytes, u32 seed) {
    static std::mutex one;
    const std::lock_guard<std::mutex> guard(one);
    now = State();
    now.body = body, now.call = call, now.threads = threads, now.shared_bytes = shared_bytes;
    now.random = (u64(seed) + 1) * 0x9E3779B97F4A7C15ull;
    now.lateness = 1 + chance(24), now.stride = 16 << chance(5);
    blockDim = {threads, 1, 1}, gridDim = {blocks, 1, 1}, blockIdx = threadIdx = {0, 0, 0};
    const u32 warps = (threads + 31) / 32;
    const size_t stacks = size_t(blocks) * warps * 32 * stack_bytes;
    const u32 control = _mm_getcsr();
    u8* stack = nullptr;
    _mm_setcsr(0x1F80);  // round to nearest and keep subnormals, whatever the caller has set
    try {
        if (!blocks || !threads || threads > 1024 || shared_bytes > 227 * 1024)
            fail(false, "no launch of %u blocks of %u threads with %u bytes", blocks, threads, shared_bytes);
        void* mapped =
            mmap(nullptr, stacks, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped == MAP_FAILED) fail(false, "no memory for the threads' stacks");
        u8* bottom = stack = static_cast<u8*>(mapped);
        now.blocks.resize(blocks);
        for (u32 b = 0; b < blocks; b++) {
            Block& block = now.blocks[b];
            block.memory.assign(shared_bytes + 2 * fence_bytes + 128, 0xA5);
            block.shared = block.memory.data() + fence_bytes;
            block.shared += -uintptr_t(block.shared) % 128;
            memset(block.shared, 0xFF, shared_bytes);
            block.live = warps;
            block.warps.resize(warps);
            const u64 late = chance(64);
            for (u32 thread = 0; thread < warps * 32; thread++, bottom += stack_bytes) {
                Warp& warp = block.warps[thread / 32];
                warp.block = b, warp.index = thread / 32, warp.asleep = late;
                u32& set = thread < threads ? warp.ready : warp.ended;
                set |= 1u << thread % 32;
                memcpy(bottom, &canary, 8);
                // What switch_stack pops: six registers and where to go, with the stack as after a call.
                void** top = reinterpret_cast<void**>(bottom + stack_bytes - 64);
                top[-2] = reinterpret_cast<void*>(&thread_main);
                warp.lanes[thread % 32] = {top - 8, bottom, {Kind::start, 0, 0, 0}};
            }
            poison(block.warps.back(), block.warps.back().ended);
        }
        EMULATED_RACE(begin(blocks, warps, shared_bytes));
        schedule();
        for (Block& block : now.blocks)
            for (u8* at = block.memory.data(); at < block.memory.data() + block.memory.size(); at++)
                if ((at < block.shared || at >= block.shared + shared_bytes) && *at != 0xA5)
                    fail(false, "block %d wrote at byte %d of its %u of shared memory",
                         int(&block - now.blocks.data()), int(at - block.shared), shared_bytes);
    } catch (const Failure&) {
        fprintf(stderr, "emulated kernel: %s\n", now.message.c_str());
    }
    now.warp = nullptr;
    EMULATED_RACE(forget());
    if (stack) munmap(stack, stacks);
    _mm_setcsr(control);
    return !now.message.empty();
}

#ifdef EMULATED_RACES
static void races::report(u32 word, const char* what, u32 author, const char* did, u32 line) {
    running = false;
    char by[40];
    snprintf(by, sizeof by, author < most_warps ? "warp %u" : "a copy for the barrier at 0x%x",
             author < most_warps ? author : here->barriers[author - most_warps].at);
    fail(false, "a race: byte %u of shared memory is %s behind line %u, and %s %s it behind line %u", word * 4, what,
         line_now(), by, did, line);
}
// The line of the collective that the thread passed last.
EMULATED_UNSEEN static u32 races::line_now() { return now.warp->lanes[now.lane].at.line & ((1 << line_bits) - 1); }
#endif

template <class To, class From> static inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static inline float exact_f16(u16 half) {
    const u32 sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 0) return bits<float>(sign | bits<u32>(float(fraction) * 0x1p-24f));
    return bits<float>(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}
static const struct Table {
    float of[65536];
    Table() {
        for (u32 i = 0; i < 65536; i++) of[i] = exact_f16(i);
    }
} f16;
static inline u16 narrow_f16(float value) {
    const u32 word = bits<u32>(value), sign = word >> 16 & 0x8000, size = word & 0x7FFFFFFF;
    if (size > 0x7F800000) return 0x7FFF;          // NaN, as the GPU has it
    if (size >= 0x477FF000) return sign | 0x7C00;  // what would round to 65536 or more
    if (size < 0x38800000) return sign | (bits<u32>(bits<float>(size) + 0.5f) - bits<u32>(0.5f));  // steps of 2^-24
    return sign | (size - (112u << 23) + 0xFFF + (size >> 13 & 1)) >> 13;
}
static inline u16 narrow_bf16(float value) {
    const u32 word = bits<u32>(value);
    return value != value ? 0x7FFF : (word + 0x7FFF + (word >> 16 & 1)) >> 16;
}
static inline float widen_bf16(u16 half) { return bits<float>(u32(half) << 16); }

// A double made float such that rounding it again to a half is as rounding the double once: what is lost sets the last
// bit. (A float product of two bf16 can be rounded where it is subnormal.)
static inline float round_to_odd(double value) {
    const float near = float(value);
    if (double(near) == value || value != value) return near;
    return bits<float>((bits<u32>(near) - (fabs(double(near)) > fabs(value))) | 1);
}
static inline u32 half_fma(u32 a, u32 b, u32 c) {
    u32 result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const u16 x = a >> shift, y = b >> shift, z = c >> shift;
        const double exact = BF16 ? double(widen_bf16(x)) * widen_bf16(y) + widen_bf16(z)
                                  : double(f16.of[x]) * f16.of[y] + f16.of[z];
        result |= u32(BF16 ? narrow_bf16(round_to_odd(exact)) : narrow_f16(round_to_odd(exact))) << shift;
    }
    return result;
}

// mma.m16n8k16 from the slots' a0-a3, b0-b1 and c0-c3, into the last.
static void multiply_fragments(Slots& slots) {
    typedef float Four __attribute__((vector_size(16)));
    float a[16][16];
    Four b[16][2], c[16][2];
    float* const b_flat = reinterpret_cast<float*>(b);
    float* const c_flat = reinterpret_cast<float*>(c);
    for (u32 lane = 0; lane < 32; lane++) {
        const u32 group = lane / 4, pair = lane % 4 * 2;
        for (u32 i = 0; i < 6; i++) {
            for (u32 high = 0; high < 2; high++) {
                const u16 half = slots[lane][i] >> 16 * high;
                const float value = BF16 ? widen_bf16(half) : f16.of[half];
                if (i < 4) a[group + i % 2 * 8][pair + i / 2 * 8 + high] = value;
                else b_flat[(pair + (i - 4) * 8 + high) * 8 + group] = value;
            }
        }
        for (u32 i = 0; i < 4; i++) memcpy(&c_flat[(group + i / 2 * 8) * 8 + pair + i % 2], &slots[lane][6 + i], 4);
    }
    for (u32 row = 0; row < 16; row++) {
        Four left = c[row][0], right = c[row][1];
        for (u32 k = 0; k < 16; k++) left += a[row][k] * b[k][0], right += a[row][k] * b[k][1];
        c[row][0] = left, c[row][1] = right;
    }
    for (u32 lane = 0; lane < 32; lane++)
        for (u32 i = 0; i < 4; i++)
            memcpy(&slots[lane][6 + i], &c_flat[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2], 4);
}

static inline void full(u32 mask, const char* what, int line) {
    if (mask != ~0u) fail(false, "%s, line %d, with mask 0x%x: only full masks are emulated", what, line, mask);
}

}  // namespace emulation

// The primitives. The line that each is called from is told where something goes wrong.
#define EMULATED_LINE int line = __builtin_LINE()

template <class T> static inline T __shfl_xor_sync(u32 mask, T value, int lanes, EMULATED_LINE) {
    emulation::full(mask, "shfl_xor", line);
    const u32 lane = emulation::now.lane;
    auto& slots = emulation::meet({emulation::Kind::shfl_xor, line, 0, 0}, emulation::bits<u32>(value));
    return emulation::bits<T>(slots[(lane ^ lanes) & 31][0]);
}
template <class T> static inline T __shfl_down_sync(u32 mask, T value, u32 lanes, EMULATED_LINE) {
    emulation::full(mask, "shfl_down", line);
    const u32 lane = emulation::now.lane;
    auto& slots = emulation::meet({emulation::Kind::shfl_down, line, 0, 0}, emulation::bits<u32>(value));
    return emulation::bits<T>(slots[lane + lanes < 32 ? lane + lanes : lane][0]);
}
template <class T> static inline T __shfl_sync(u32 mask, T value, int from, EMULATED_LINE) {
    emulation::full(mask, "shfl", line);
    auto& slots = emulation::meet({emulation::Kind::shfl, line, 0, 0}, emulation::bits<u32>(value));
    return emulation::bits<T>(slots[from & 31][0]);
}
static inline u64 __shfl_sync(u32 mask, u64 value, int lane, EMULATED_LINE) {
    const u32 low = __shfl_sync(mask, u32(value), lane, line), high = __shfl_sync(mask, u32(value >> 32), lane, line);
    return u64(high) << 32 | low;
}
static inline u32 emulated_votes(emulation::Kind kind, u32 mask, bool vote, int line) {
    emulation::full(mask, name(kind), line);
    u32& votes = emulation::now.warp->votes[emulation::now.warp->half];
    votes |= u32(vote) << emulation::now.lane;
    emulation::meet({kind, line, 0, 0});
    return votes;
}
static inline u32 __ballot_sync(u32 mask, int vote, EMULATED_LINE) {
    return emulated_votes(emulation::Kind::ballot, mask, vote, line);
}
static inline int __any_sync(u32 mask, int vote, EMULATED_LINE) {
    return emulated_votes(emulation::Kind::any, mask, vote, line) != 0;
}
static inline int __all_sync(u32 mask, int vote, EMULATED_LINE) {
    return emulated_votes(emulation::Kind::all, mask, !vote, line) == 0;
}
static inline void __syncwarp(u32 mask = ~0u, EMULATED_LINE) {
    emulation::full(mask, "syncwarp", line);
    emulation::meet({emulation::Kind::syncwarp, line, 0, 0});
}
static inline void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, EMULATED_LINE) {
    using emulation::bits;
    const u32 lane = emulation::now.lane;
    auto& slots = emulation::meet({emulation::Kind::multiply, line, 0, 0}, a0, a1, a2, a3, b0, b1, bits<u32>(c[0]),
                                  bits<u32>(c[1]), bits<u32>(c[2]), bits<u32>(c[3]));
    memcpy(c, &slots[lane][6], sizeof c);
}

static inline void __syncthreads(EMULATED_LINE) { emulation::meet({emulation::Kind::syncthreads, line, 0, 0}); }
static inline void bar_sync(int id, int threads, EMULATED_LINE) {
    emulation::meet({emulation::Kind::bar_sync, line, u32(id), u32(threads)});
}
static inline void bar_arrive(int id, int threads, EMULATED_LINE) {
    emulation::meet({emulation::Kind::bar_arrive, line, u32(id), u32(threads)});
}

static inline u8* dynamic_shared() { return emulation::own_block().shared; }
static inline u32 shared_address(const void* pointer, EMULATED_LINE) {
    const u64 at = uintptr_t(pointer) - uintptr_t(dynamic_shared());
    if (at > emulation::now.shared_bytes) emulation::fail(false, "shared_address, line %d, of other memory", line);
    return at + emulation::shared_base;
}

static inline void barrier_init(u32 at, u32 count, EMULATED_LINE) {
    using namespace emulation;
    u8* barrier = shared_at(own_block(), at, 8, 8, "barrier_init", line);
    EMULATED_RACE(slot(*races::here, at));
    if (!count || count >> 20) fail(false, "barrier_init, line %d, with count %u", line, count);
    *reinterpret_cast<Phases*>(barrier) = {0, 0, count, count, 0};
}
static inline void barrier_expect(u32 at, u32 bytes, EMULATED_LINE) {
    using namespace emulation;
    EMULATED_RACE(arrive_at(at));
    advance(own_block(), at, 1, -static_cast<long long>(bytes), "barrier_expect", line);
}
static inline void barrier_arrive(u32 at, EMULATED_LINE) {
    using namespace emulation;
    EMULATED_RACE(arrive_at(at));
    advance(own_block(), at, 1, 0, "barrier_arrive", line);
}
static inline bool barrier_try(u32 at, u32 parity, EMULATED_LINE) {
    using namespace emulation;
    auto& barrier = phases(own_block(), at, "barrier_try", line);
    if (barrier.parity == (parity & 1)) poll({Kind::barrier_try, line, at, parity});
    if (barrier.parity == (parity & 1)) return false;
    EMULATED_RACE(wait_for(at));
    return true;
}
static inline void barrier_fence() {}
static inline void copy_async(u32 to, const void* from, u32 bytes, u32 barrier, bool /*kept*/ = false, EMULATED_LINE) {
    using namespace emulation;
    if (to % 16 || uintptr_t(from) % 16 || bytes % 16 || !bytes)
        fail(false, "copy_async, line %d: %u bytes from %p to 0x%x are not whole 16s", line, bytes, from, to);
    phases(own_block(), barrier, "copy_async", line);
    EMULATED_RACE(copy(to, bytes, barrier));
    memset(shared_at(own_block(), to, bytes, 16, "copy_async", line), 0xFF, bytes);
    const u64 due = now.turn + 1 + chance(now.lateness);
    now.copies[due % calendar].push_back({now.warp->block, to, bytes, barrier, from, line});
    now.events++;
    now.quiet = 0;
}

#define EMULATED_SHARED(bytes, name) emulation::shared_at(emulation::own_block(), at, bytes, bytes, name, line)
static inline void load16(u32 (&into)[4], u32 at, EMULATED_LINE) { memcpy(into, EMULATED_SHARED(16, "load16"), 16); }
static inline void load8(u32 (&into)[2], u32 at, EMULATED_LINE) { memcpy(into, EMULATED_SHARED(8, "load8"), 8); }
static inline u32 load4(u32 at, EMULATED_LINE) {
    u32 value;
    memcpy(&value, EMULATED_SHARED(4, "load4"), 4);
    return value;
}
static inline u16 load2(u32 at, EMULATED_LINE) {
    u16 value;
    memcpy(&value, EMULATED_SHARED(2, "load2"), 2);
    return value;
}
static inline void store16(u32 at, uint4 value, EMULATED_LINE) { memcpy(EMULATED_SHARED(16, "store16"), &value, 16); }
static inline void store8(u32 at, uint2 value, EMULATED_LINE) { memcpy(EMULATED_SHARED(8, "store8"), &value, 8); }
static inline void store4(u32 at, u32 value, EMULATED_LINE) { memcpy(EMULATED_SHARED(4, "store4"), &value, 4); }
static inline void store2(u32 at, u16 value, EMULATED_LINE) { memcpy(EMULATED_SHARED(2, "store2"), &value, 2); }

static inline uint4 peek16(const void* from, EMULATED_LINE) { return emulation::peek<uint4>(from, line); }
static inline uint2 peek8(const void* from, EMULATED_LINE) { return emulation::peek<uint2>(from, line); }
static inline u32 peek4(const void* from, EMULATED_LINE) { return emulation::peek<u32>(from, line); }
static inline void poke16(void* to, uint4 value, EMULATED_LINE) { emulation::poke(to, &value, 16, line); }
static inline void poke8(void* to, uint2 value, EMULATED_LINE) { emulation::poke(to, &value, 8, line); }
static inline void poke4(void* to, u32 value, EMULATED_LINE) { emulation::poke(to, &value, 4, line); }
static inline uint4 fetch16(const void* from, EMULATED_LINE) { return emulation::fetch<uint4>(from, line); }
static inline uint2 fetch8(const void* from, EMULATED_LINE) { return emulation::fetch<uint2>(from, line); }
static inline void prefetch(const void*, u32) {}
static inline void few_registers() {}
static inline void many_registers() {}
static inline float log2_fast(float x) { return log2f(x); }
static inline float __fdividef(float a, float b) { return a / b; }

static inline u32 pack_f16(float low, float high) {
    return emulation::narrow_f16(low) | u32(emulation::narrow_f16(high)) << 16;
}
static inline float widen_f16(u16 half) { return emulation::f16.of[half]; }
static inline u32 pack(float low, float high) {
    return BF16 ? emulation::narrow_bf16(low) | u32(emulation::narrow_bf16(high)) << 16 : pack_f16(low, high);
}
static inline float widen(u16 half) { return BF16 ? emulation::widen_bf16(half) : widen_f16(half); }
static inline u32 and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }
static inline u32 half_fma(u32 a, u32 b, u32 c) { return emulation::half_fma(a, b, c); }

static inline int dot_low(u32 x, u32 q, int c) { return c + int16_t(x) * int(q & 0xFF) + int16_t(x >> 16) * int(q >> 8 & 0xFF); }
static inline int dot_high(u32 x, u32 q, int c) { return dot_low(x, q >> 16, c); }
static inline int dot_low_signed(u32 x, u32 q, int c) { return c + int16_t(x) * int8_t(q) + int16_t(x >> 16) * int8_t(q >> 8); }
static inline int dot_high_signed(u32 x, u32 q, int c) { return dot_low_signed(x, q >> 16, c); }
static inline u32 byte_permute(u32 a, u32 b, u32 selector) {
    const u64 from = u64(b) << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        const u32 choice = selector >> 4 * i, byte = from >> 8 * (choice & 7) & 0xFF;
        result |= (choice & 8 ? (byte & 0x80 ? 0xFF : 0) : byte) << 8 * i;
    }
    return result;
}
static inline u64 nanoseconds() { return emulation::now.turn * 100 + ++emulation::now.calls; }
static inline void __nanosleep(u32, EMULATED_LINE) { emulation::poll({emulation::Kind::nanosleep, line, 0, 0}); }
[[noreturn]] static inline void trap(EMULATED_LINE) { emulation::fail(true, "trap, line %d", line); }

static inline float __int2float_rn(int x) { return float(x); }
static inline float exp2_fast(float x) { return exp2f(x); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float rsqrt_fast(float x) { return rsqrtf(x); }
static inline u32 __float_as_uint(float x) { return emulation::bits<u32>(x); }
static inline int __float_as_int(float x) { return emulation::bits<int>(x); }
static inline float __uint_as_float(u32 x) { return emulation::bits<float>(x); }
static inline float __int_as_float(int x) { return emulation::bits<float>(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __popc(u32 x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
template <class A, class B> static inline std::common_type_t<A, B> min(A a, B b) {
    if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) return fmin(a, b);
    else { std::common_type_t<A, B> x = a, y = b; return x < y ? x : y; }
}
template <class A, class B> static inline std::common_type_t<A, B> max(A a, B b) {
    if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) return fmax(a, b);
    else { std::common_type_t<A, B> x = a, y = b; return x > y ? x : y; }
}

#ifdef EMULATED_RACES
#define EMULATED_HOOK(bytes)                                                                                           \
    EMULATED_UNSEEN void __tsan_read##bytes(void* at) { emulation::races::access(at, bytes, false); }                  \
    EMULATED_UNSEEN void __tsan_write##bytes(void* at) { emulation::races::access(at, bytes, true); }                  \
    EMULATED_UNSEEN void __tsan_unaligned_read##bytes(void* at) { emulation::races::access(at, bytes, false); }        \
    EMULATED_UNSEEN void __tsan_unaligned_write##bytes(void* at) { emulation::races::access(at, bytes, true); }
extern "C" {
EMULATED_HOOK(1)
EMULATED_HOOK(2)
EMULATED_HOOK(4)
EMULATED_HOOK(8)
EMULATED_HOOK(16)
EMULATED_UNSEEN void __tsan_read_range(void* at, u64 bytes) { emulation::races::access(at, bytes, false); }
EMULATED_UNSEEN void __tsan_write_range(void* at, u64 bytes) { emulation::races::access(at, bytes, true); }
EMULATED_UNSEEN void __tsan_func_entry(void*) {}
EMULATED_UNSEEN void __tsan_func_exit() {}
EMULATED_UNSEEN void __tsan_vptr_update(void*, void*) {}
EMULATED_UNSEEN void __tsan_vptr_read(void*) {}
EMULATED_UNSEEN void __tsan_init() {}
}
#endif

// Runs all blocks together. 0, or 1 where the launch went wrong: emulation::now.message says how.
template <class Arguments>
static int emulate(void (*kernel)(Arguments), int blocks, int threads, int shared_bytes, const Arguments& arguments,
                   unsigned seed) {
    typedef std::pair<void (*)(Arguments), const Arguments*> Call;
    const Call call(kernel, &arguments);
    auto body = [](const void* call) {
        (*static_cast<const Call*>(call)->first)(*static_cast<const Call*>(call)->second);
    };
    return emulation::launch(body, &call, blocks, threads, shared_bytes, seed);
}

#define EMULATED_ENTRY(name, Arguments)                                                                                \
    extern "C" int name##_emulated(const Arguments* arguments, int blocks, int threads, int shared_bytes,              \
                                   unsigned seed) {                                                                    \
        return emulate(name, blocks, threads, shared_bytes, *arguments, seed);                                         \
    }                                                                                                                  \
    extern "C" const char* name##_message() { return emulation::now.message.c_str(); }
