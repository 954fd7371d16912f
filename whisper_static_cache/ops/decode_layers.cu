// All decoder layers of a one-token step at batch 1, as one persistent kernel: one program to a multiprocessor.
//
// A layer is six products and two attentions, each of which needs the whole result of the one before. As kernels of
// their own they drain and fill the machine eight times a layer. Here the programs stay, and hand each other their
// results through the L2 cache: every word of a result carries in its lowest bit whether it is this use of its buffer
// or the last one's, so that who reads the word knows from it alone whether the value is there, without a flag, a
// fence or a barrier of the whole machine. Meanwhile a warp of each program streams weights, which depend on nothing,
// into a ring in shared memory, several products ahead; low-bit ones are unpacked while the program would only wait.
//
// Products run on the tensor cores: a tile of the weight, eight columns of activations. One row of a batch needs one
// column; the others hold what single half-precision numbers cannot: the remainders of the layer norms' input, and the
// partial results of attention, which are thereby merged in the product that follows.
//
// Built by NVRTC without headers. Constants that the launcher defines:
//   WIDTH, FFN, HEADS (of 64), LAYERS, SLOTS, SOURCE (keys of cross-attention), CROSS_SPLITS (programs to a head, at
//   most 8), BF16 (0 or 1), BITS (16, 8, 4, 3, 2, or 158 for 1.58), GROUP (of the quantisation), WARPS (that compute),
//   PROGRAMS, MEMORY (bytes of shared memory).
//
// Why every buffer can be used again without being cleared: a program that writes the next result into a buffer holds
// values that depend on every reader's having read the last one. Layer by layer: all of `stream` was read before any
// query, key or value of the layer could be published, all of those before all heads' runs, all of these before the
// next `stream`, and so on around the layer.

#ifndef EMULATED

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef unsigned char u8;

// -- Instructions that the language has no word for ---------------------------------------------------------------

extern __shared__ __align__(128) u8 shared_memory[];
__device__ __forceinline__ u8* dynamic_shared() { return shared_memory; }
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Words between programs: as strong as the L2 cache makes them, and no stronger.
__device__ __forceinline__ uint4 peek16(const void* p) {
  u64 a, b;
  asm volatile("{.reg .b128 t; ld.relaxed.gpu.global.b128 t,[%2]; mov.b128 {%0,%1},t;}"
               : "=l"(a), "=l"(b) : "l"(p) : "memory");
  return {(u32)a, (u32)(a >> 32), (u32)b, (u32)(b >> 32)};
}
__device__ __forceinline__ uint2 peek8(const void* p) {
  u64 a;
  asm volatile("ld.relaxed.gpu.global.u64 %0,[%1];" : "=l"(a) : "l"(p) : "memory");
  return {(u32)a, (u32)(a >> 32)};
}
__device__ __forceinline__ void poke16(void* p, uint4 v) {
  asm volatile("{.reg .b128 t; mov.b128 t,{%1,%2}; st.relaxed.gpu.global.b128 [%0],t;}" ::"l"(p),
               "l"((u64)v.y << 32 | v.x), "l"((u64)v.w << 32 | v.z) : "memory");
}
__device__ __forceinline__ void poke8(void* p, uint2 v) {
  asm volatile("st.relaxed.gpu.global.u64 [%0],%1;" ::"l"(p), "l"((u64)v.y << 32 | v.x) : "memory");
}
__device__ __forceinline__ void poke4(void* p, u32 v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0],%1;" ::"l"(p), "r"(v) : "memory");
}
// What earlier launches wrote, read once.
__device__ __forceinline__ uint4 fetch16(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0,%1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0,%1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_init(u32 at, u32 count) {
  asm volatile("mbarrier.init.shared.b64 [%0],%1;" ::"r"(at), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_fence() {
  asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(u32 at, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%0],%1;" ::"r"(at), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 at) {
  asm volatile("mbarrier.arrive.shared.b64 _,[%0];" ::"r"(at) : "memory");
}
__device__ __forceinline__ bool barrier_try(u32 at, u32 parity) {
  u32 done;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p,[%1],%2; selp.u32 %0,1,0,p;}"
               : "=r"(done) : "r"(at), "r"(parity) : "memory");
  return done;
}
__device__ __forceinline__ void copy_async(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
// Into the L2 cache.
__device__ __forceinline__ void prefetch(const void* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0],%1;" ::"l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ u64 nanoseconds() {
  u64 t;
  asm volatile("mov.u64 %0,%%globaltimer;" : "=l"(t));
  return t;
}
// A write to nowhere fails as surely as a trap, at which the compiler would give up on `many_registers`.
__device__ __forceinline__ void trap() { asm volatile("st.global.u32 [%0],%1;" ::"l"(0ull), "r"(0) : "memory"); }
// Warps that fetch and finish need few registers, the others many: an even share would not hold a product's weights.
__device__ __forceinline__ void few_registers() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 64;");
#endif
}
__device__ __forceinline__ void many_registers() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  // All warps together have no more than the launch gave them: 5 * 96 or 3 * 168 to a scheduler.
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WARPS == 8 ? 216 : 104));
#endif
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rsqrt_fast(float x) { return rsqrtf(x); }
__device__ __forceinline__ u32 byte_permute(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

#if BF16
#define HALF "bf16"
#else
#define HALF "f16"
#endif
// c += a b: a 16 x 16, b 16 x 8, of halves.
__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." HALF "." HALF
               ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Two floats as a pair of halves, the first in the low one; a half as a float; pairs' arithmetic, rounded once.
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 pair;
  asm("cvt.rn." HALF "x2.f32 %0,%1,%2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ float widen(u16 x) {
#if BF16
  return __uint_as_float((u32)x << 16);
#else
  float y;
  asm("cvt.f32.f16 %0,%1;" : "=f"(y) : "h"(x));
  return y;
#endif
}
__device__ __forceinline__ u32 half_add(u32 a, u32 b) {
  u32 c;
  asm("add.rn." HALF "x2 %0,%1,%2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ __forceinline__ u32 half_sub(u32 a, u32 b) {
  u32 c;
  asm("sub.rn." HALF "x2 %0,%1,%2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ __forceinline__ u32 half_mul(u32 a, u32 b) {
  u32 c;
  asm("mul.rn." HALF "x2 %0,%1,%2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}

#endif  // EMULATED

__device__ __forceinline__ void load16(u32 (&r)[4], const u8* at) {
  const uint4 v = *(const uint4*)at;
  r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
}
__device__ __forceinline__ void load8(u32 (&r)[2], const u8* at) {
  const uint2 v = *(const uint2*)at;
  r[0] = v.x, r[1] = v.y;
}
__device__ __forceinline__ float low_of(u32 pair) { return widen((u16)pair); }
__device__ __forceinline__ float high_of(u32 pair) { return widen((u16)(pair >> 16)); }

// -- The shape of the work -----------------------------------------------------------------------------------------

constexpr float NOTHING = -1e30f, LOG2E = 1.4426950408889634f;
constexpr float SHRINK = 1.0f / 16, GROW = 16.0f;  // Keeps activations times gains far from float16's largest number.
// Warps that multiply, one that fetches, and those that finish what is multiplied, sixteen features each.
constexpr int FETCHER = WARPS, FIRST_FINISHER = WARPS + 1, FINISHERS = 3, THREADS = 32 * (WARPS + 4);

constexpr int up(int n, int to) { return (n + to - 1) / to * to; }
constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr int most(int a, int b) { return a > b ? a : b; }
constexpr int ratio(int a, int b) { return (a + b - 1) / b; }

// Output features of a program: pairs of them stay together, of the feed-forward layer eight.
constexpr int ROWS = up(ratio(WIDTH, PROGRAMS), 2), ROWS_FFN = up(ratio(FFN, PROGRAMS), 8);
constexpr int GIVERS = ratio(WIDTH, ROWS);  // Programs that have some of `WIDTH` features.
static_assert(ROWS <= 16 && HEADS * CROSS_SPLITS <= GIVERS && CROSS_SPLITS <= 8, "");
static_assert(ratio(GIVERS, WARPS) <= 32, "");

// A packed row is a plane of bytes, of which a byte holds elements `PLANE` apart; in 3 bits a second plane holds the
// high bits, eight a byte. The unit of work is a run: 32 bytes of the first plane, 8 to each of the four lanes that
// share an output feature, and thus a block of 32 elements for each digit of a byte. In 16 bits a run is one block.
constexpr int DIGITS = BITS == 4 ? 2 : BITS == 3 || BITS == 2 ? 4 : BITS == 158 ? 5 : 1;
constexpr int plane(int depth) { return BITS == 16 ? depth : up(ratio(depth, DIGITS), 16); }
constexpr int high_plane(int depth) { return BITS == 3 ? up(ratio(depth, 8), 16) : 0; }
constexpr int row_bytes(int depth) { return BITS == 16 ? 2 * depth : plane(depth) + high_plane(depth); }
constexpr int runs(int depth) { return ratio(plane(depth), 32); }
constexpr int RUN_BYTES = BITS == 16 ? 64 : 32;
constexpr bool even(int depth) { return plane(depth) % 32 == 0 && depth == plane(depth) * DIGITS; }
// A run's element and the bytes in front of it do not cross from one high plane's digit to the next.
static_assert(BITS != 3 || WIDTH % 128 == 0 && FFN % 128 == 0, "");
// A block of attention's result lies within a head.
static_assert(plane(WIDTH) % 32 == 0, "");

// What is fetched at a time, a chunk: ROWS rows, for FFN elements a part of each that has `PART` turns of the warps.
constexpr bool PARTED = BITS == 16 || BITS == 8 || BITS == 4;
constexpr int turns(int depth) { return ratio(runs(depth), WARPS); }
constexpr int PART = PARTED ? most(row_bytes(WIDTH) / (WARPS * RUN_BYTES), 1) : turns(FFN);
constexpr int parts(int depth) { return depth == WIDTH ? 1 : ratio(turns(depth), PART); }
constexpr int part_bytes(int depth) { return parts(depth) == 1 ? row_bytes(depth) : PART * WARPS * RUN_BYTES; }
// Rows in shared memory lie so that lanes served together meet different banks: two rows of 64 bytes, four of 32.
constexpr int stride(int depth) {
  return BITS == 16 ? up(part_bytes(depth) + 64, 128) - 64 : up(part_bytes(depth) + 96, 128) - 96;
}
static_assert(stride(WIDTH) >= part_bytes(WIDTH) && stride(FFN) >= part_bytes(FFN), "");
constexpr int groups(int depth) { return BITS == 16 ? 0 : depth / GROUP; }
// Behind the rows: scales, zero points, two vectors, each from the multiple of 16 bytes at or below its first element.
constexpr int meta_bytes(int depth) { return BITS == 16 ? 0 : up(ROWS * groups(depth) * 2, 16) + 16; }
constexpr int scales_at(int depth) { return ROWS * stride(depth); }
constexpr int vector_bytes = up(ROWS * 4, 16) + 16;
constexpr int vectors_at(int depth) { return scales_at(depth) + 2 * meta_bytes(depth); }
constexpr int chunk_bytes(int depth) { return vectors_at(depth) + 2 * vector_bytes; }

constexpr int CHUNK = up(most(chunk_bytes(WIDTH), chunk_bytes(FFN)), 128);
constexpr int FFN_CHUNKS = ratio(ROWS_FFN, ROWS);
constexpr int MOST_ROWS = up(most(3 * ROWS, FFN_CHUNKS * ROWS), 16);

enum { QKV, OWN_OUT, QUERY, CROSS_OUT, FC1, FC2, PRODUCTS };
constexpr int depth_of(int product) { return product == FC2 ? FFN : WIDTH; }
constexpr int chunks_of(int product) {
  return product == QKV ? 3 : product == FC1 ? FFN_CHUNKS : product == FC2 ? parts(FFN) : 1;
}
constexpr int row_chunks(int product) { return product == FC2 ? 1 : chunks_of(product); }
constexpr int finishers(int product) { return ratio(row_chunks(product) * ROWS, 16); }
constexpr bool normed(int product) { return product == QKV || product == QUERY || product == FC1; }

// A layer's device pointers, in the order of the launcher's table.
enum {
  WEIGHTS, SCALES = WEIGHTS + 8, ZEROS = SCALES + 8,  // query, key, value, output; cross query, output; fc1, fc2.
  CONSTANT = ZEROS + 8, FOLDED = CONSTANT + 3,        // Of the products behind a layer norm, float32.
  BIAS = FOLDED + 3, GAIN = BIAS + 3,                 // Of the others, and the gain of the layer norm behind.
  KEYS = GAIN + 3, VALUES, CROSS_KEYS, CROSS_VALUES, POINTERS
};
constexpr int weight_of(int product) { return product == QKV ? 0 : product + 2; }
constexpr int norm_of(int product) { return product / 2; }

// Attention: a warp takes tiles of 16 keys. Self-attention is split where one program's tiles end.
constexpr int SELF_RUN = 256, SELF_SPLITS = ratio(SLOTS, SELF_RUN);
constexpr int CROSS_RUN = ratio(SOURCE, CROSS_SPLITS);
static_assert(HEADS * SELF_SPLITS <= GIVERS && SELF_SPLITS <= 8 && (CROSS_SPLITS - 1) * CROSS_RUN < SOURCE, "");

constexpr int RINGS = 16;  // Chunks in flight, at most.
constexpr int SUMS = WARPS == 8 ? 8 : WARPS + 8;  // Floats from one row's sums to the next: lanes meet no bank twice.
static_assert(WARPS == 8 || WARPS == 16, "");
static_assert(finishers(QKV) <= FINISHERS && finishers(FC1) <= FINISHERS, "");
// Named barriers: one for each product and attention, of those that multiply with those that finish.
enum { TABLES = 1, PRODUCT_SUMS = 2, RUNS_THERE = PRODUCT_SUMS + PRODUCTS };
constexpr int HIDDEN_BLOCKS = turns(FFN) * DIGITS;
struct Shared {
  alignas(16) float sums[2][MOST_ROWS][SUMS];
  alignas(16) float moments[2][2][WARPS];
  union {
    alignas(16) float runs[WARPS][64 + 4];
    alignas(16) u16 hidden[WARPS][HIDDEN_BLOCKS * 32];
  };
  alignas(16) float tops[WARPS], totals[WARPS];
  u64 caches[LAYERS][4];
  float eps[LAYERS][3];
  u8 valid[SLOTS];
  alignas(8) u64 full[RINGS], empty[RINGS];
};
constexpr int IN_RING = least((MEMORY - (int)sizeof(Shared)) / CHUNK, RINGS);
static_assert(IN_RING >= most(FFN_CHUNKS, most(parts(FFN), 3)) + 1, "a product exceeds the shared memory");

// What all programs read is there four times: a line that all of them ask for at once keeps its part of the L2 cache
// busy for longer than the way there takes.
constexpr int COPIES = 4;
struct Arguments {
  const u64* table;
  u16 *stream;           // [COPIES][2][WIDTH]: halves, then their remainders.
  u16 *heads, *query;    // [2][3 WIDTH], [2][WIDTH], likewise.
  float2* stats;         // [COPIES][GIVERS]: of the rows of each, sum and sum of squares.
  u16 *own_runs, *cross_runs;     // [COPIES][HEADS][8][64]
  float2 *own_tops, *cross_tops;  // [COPIES][HEADS][8]: the largest score, and the sum of exponentials.
  u16* hidden;           // [COPIES][FFN]
  u32* launches;
  const long long *tokens, *length, *offset;
  const u8* valid;
  const u16 *embedding, *positions, *first_gain;
  float *gained, *last_stats;
  const float* eps;  // [LAYERS][3]
  float scale;
#ifdef MARKS
  long long* marks;
#endif
};

// -- Waiting -------------------------------------------------------------------------------------------------------

// Every program is resident (the launch is cooperative) and every wait ends; should one not, fail rather than hang.
struct Patience {
  u64 since = 0;
  u32 rounds = 0;
  __device__ __forceinline__ void spend() {
    if ((++rounds & 0xFFFF) == 0) {
      u64 now = nanoseconds();
      if (since == 0) since = now;
      if (now - since > 10000000000ull) trap();
    }
  }
};
__device__ __forceinline__ void await(u32 barrier, u32 parity) {
  Patience patience;
  while (!barrier_try(barrier, parity)) patience.spend();
}

__device__ __forceinline__ u32 tagged(u32 word, u32 tag) { return (word & ~1u) | tag; }
// Whether the words of a unit, or its first one, are of this use of the buffer.
__device__ __forceinline__ bool all_fresh(const uint4& u, u32 tag) {
  return (((u.x ^ tag) | (u.y ^ tag) | (u.z ^ tag) | (u.w ^ tag)) & 1) == 0;
}
__device__ __forceinline__ bool fresh(u32 word, u32 tag) { return ((word ^ tag) & 1) == 0; }

// -- The ring ------------------------------------------------------------------------------------------------------

struct Span {
  int first, count;  // Output features or keys of this program.
};
__device__ __forceinline__ Span share(int total, int each) {
  int first = least((int)blockIdx.x * each, total);
  return {first, least(each, total - first)};
}
__device__ __forceinline__ Span keys_of(bool own, int slot) {
  int split = blockIdx.x / HEADS, total = own ? slot + 1 : SOURCE, each = own ? SELF_RUN : CROSS_RUN;
  int first = least(split * each, total);
  return {first, least(each, total - first)};
}

struct Cursor {
  int place = 0;
  u32 phase = 0;
  __device__ __forceinline__ void next() {
    if (++place == IN_RING) place = 0, phase ^= 1;
  }
};

// A layer's pointers, two to a lane: cold memory is on nobody's way when they are asked for a layer ahead.
struct Pointers {
  u64 first, second;
  __device__ __forceinline__ void load(const u64* table, int layer) {
    const int lane = threadIdx.x % 32;
    if (layer >= LAYERS) return;
    first = table[layer * POINTERS + lane];
    if (lane < POINTERS - 32) second = table[layer * POINTERS + 32 + lane];
  }
  __device__ __forceinline__ const u8* at(int index) const {
    const u64 a = __shfl_sync(~0u, first, index & 31), b = __shfl_sync(~0u, second, index & 31);
    return (const u8*)(index < 32 ? a : b);
  }
};

// One lane's copy of a chunk: lanes below 16 take a row each, the next four what lies behind the rows. Returns its
// bytes, and the pointer's index in the table, to which `from` is added.
template <int PRODUCT>
__device__ __forceinline__ u32 copy_of(int chunk, int lane, u32& at, int& index, long long& from) {
  constexpr int DEPTH = depth_of(PRODUCT), BYTES = row_bytes(DEPTH), GROUPS = groups(DEPTH);
  Span span = PRODUCT == FC1 ? share(FFN, ROWS_FFN) : share(WIDTH, ROWS);
  if (PRODUCT == FC1) {
    const int skipped = least(chunk * ROWS, span.count);
    span = {span.first + skipped, least(ROWS, span.count - skipped)};
  }
  if (span.count <= 0) return 0;
  const int matrix = weight_of(PRODUCT) + (PRODUCT == QKV ? chunk : 0);
  if (lane < 16) {
    if (lane >= span.count) return 0;
    const int begin = PRODUCT == FC2 ? chunk * part_bytes(DEPTH) : 0;
    at = lane * stride(DEPTH);
    index = WEIGHTS + matrix;
    from = (long long)(span.first + lane) * BYTES + begin;
    return least(part_bytes(DEPTH), BYTES - begin);
  }
  if (lane >= 20 || PRODUCT == FC2 && chunk > 0) return 0;
  int begin, end;
  if (lane < 18) {
    if (BITS == 16) return 0;
    at = scales_at(DEPTH) + (lane - 16) * meta_bytes(DEPTH);
    index = (lane == 16 ? SCALES : ZEROS) + matrix;
    begin = span.first * GROUPS * 2, end = begin + span.count * GROUPS * 2;
  } else {
    at = vectors_at(DEPTH) + (lane - 18) * vector_bytes;
    if (normed(PRODUCT)) {
      index = (lane == 18 ? CONSTANT : FOLDED) + norm_of(PRODUCT);
      begin = ((PRODUCT == QKV ? chunk * WIDTH : 0) + span.first) * 4, end = begin + span.count * 4;
    } else {
      index = (lane == 18 ? BIAS : GAIN) + norm_of(PRODUCT);
      begin = span.first * 2, end = begin + span.count * 2;
    }
  }
  from = begin / 16 * 16;
  return up(end, 16) - begin / 16 * 16;
}

template <int PRODUCT>
__device__ __forceinline__ void fetch_product(const Pointers& p, Shared& sh, u32 memory, Cursor& cursor) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks_of(PRODUCT); chunk++) {
    u32 at = 0;
    int index = 0;
    long long from = 0;
    const u32 size = copy_of<PRODUCT>(chunk, lane, at, index, from);
    const u8* base = p.at(index);
    u32 all = size;
#pragma unroll
    for (int step = 16; step; step /= 2) all += __shfl_xor_sync(~0u, all, step);
    // The first round finds every place empty.
    await(shared_address(&sh.empty[cursor.place]), cursor.phase ^ 1);
    const u32 barrier = shared_address(&sh.full[cursor.place]);
    if (lane == 0) barrier_expect(barrier, all);
    __syncwarp();
    if (size) copy_async(memory + cursor.place * CHUNK + at, base + from, size, barrier);
    cursor.next();
  }
}

// The fetching warp: every chunk of every layer, as soon as there is room for it.
__device__ __forceinline__ void fetch(const Arguments& a, Shared& sh, u32 memory, int slot) {
  const int lane = threadIdx.x % 32;
  Cursor cursor;
  Pointers p, ahead;
  ahead.load(a.table, 0);
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    p = ahead;
    ahead.load(a.table, layer + 1);
    // Keys and values are loaded into registers, when their turn comes; from the L2 cache by then.
    const u8* cache = p.at(KEYS + lane % 4);
    if (lane < 4 && blockIdx.x < HEADS * (lane < 2 ? SELF_SPLITS : CROSS_SPLITS)) {
      const Span keys = keys_of(lane < 2, slot);
      cache += ((long long)(blockIdx.x % HEADS) * (lane < 2 ? SLOTS : SOURCE) + keys.first) * 128;
      if (keys.count > 0) prefetch(cache, keys.count * 128);
    }
    fetch_product<QKV>(p, sh, memory, cursor);
    fetch_product<OWN_OUT>(p, sh, memory, cursor);
    fetch_product<QUERY>(p, sh, memory, cursor);
    fetch_product<CROSS_OUT>(p, sh, memory, cursor);
    fetch_product<FC1>(p, sh, memory, cursor);
    fetch_product<FC2>(p, sh, memory, cursor);
  }
}

// -- Low-bit integers ----------------------------------------------------------------------------------------------

// The bytes of two words as eight halves that count from `ORIGIN` on: a digit in the trailing mantissa bits.
constexpr u32 MAGIC = BF16 ? 0x43434343 : 0x64646464, ORIGIN = BF16 ? 0x43004300 : 0x64006400;

// Two bytes in 16-bit halves, divided by 3 ** power: by multiplication, exact below 256.
__device__ __forceinline__ u32 third(u32 pair, int power) {
  const u32 factor = power == 0 ? 1 : power == 1 ? 171 : power == 2 ? 57 : power == 3 ? 19 : 203;
  const int shift = power == 0 ? 0 : power == 4 ? 14 : 9;
  return (pair * factor >> shift) & (0xFFFFu >> shift) * 0x10001u;
}

// Digit `digit` of eight packed bytes (and, in 3 bits, of the eight that hold the high bits, shifted in place already).
__device__ __forceinline__ void integers(u32 (&q)[4], const u32 (&raw)[2], const u32 (&high)[2], int digit) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    u32 w = raw[i];
    if (BITS == 158) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        u32 pair = byte_permute(w, 0, j ? 0x4342 : 0x4140);
        u32 low = third(pair, digit);
        if (digit < 4) low -= 3 * third(pair, digit + 1);
        q[2 * i + j] = low | ORIGIN;
      }
      continue;
    }
    if (BITS == 4) w = (w >> 4 * digit) & 0x0F0F0F0F;
    if (BITS == 3 || BITS == 2) w = (w >> 2 * digit) & 0x03030303;
    if (BITS == 3) w |= high[i];
    if (BITS == 8 && BF16) {
      // Beyond bfloat16's mantissa: through float32's, where the same trick takes 23 bits.
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float f0 = __uint_as_float(byte_permute(w, 0x4B000000, j ? 0x7442 : 0x7440)) - 8388608.0f;
        float f1 = __uint_as_float(byte_permute(w, 0x4B000000, j ? 0x7443 : 0x7441)) - 8388608.0f;
        q[2 * i + j] = pack(f0, f1);
      }
      continue;
    }
    q[2 * i] = byte_permute(w, MAGIC, 0x4140);
    q[2 * i + 1] = byte_permute(w, MAGIC, 0x4342);
  }
}

// Eight weights, (q - zero) * scale with both steps rounded, as `QuantizedLinear.dequantize` has them.
__device__ __forceinline__ void dequantize(u32 (&w)[4], const u32 (&raw)[2], const u32 (&high)[2], u32 scale,
                                           u32 zero, int digit) {
  integers(w, raw, high, digit);
  scale *= 0x10001u, zero *= 0x10001u;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    u32 q = BITS == 8 && BF16 ? w[i] : half_sub(w[i], ORIGIN);
    w[i] = half_mul(half_sub(q, zero), scale);
  }
}

// -- A product -----------------------------------------------------------------------------------------------------

struct State {
  Cursor cursor;
  int slot;
  u32 stream_tag, tag;  // Of the next reading of `stream`, and of this layer's other buffers.
  float residual;       // Of the feature that this thread finishes.
#ifdef MARKS
  int mark;
#endif
};

#ifdef MARKS
__device__ __forceinline__ void note(const Arguments& a, State& s) {
  const int warp = threadIdx.x / 32, track = warp == 5 ? 0 : warp == FIRST_FINISHER ? 1 : 2;
  if (threadIdx.x % 32 == 0 && track < 2 && s.mark < MARKS)
    a.marks[(blockIdx.x * 2 + track) * MARKS + s.mark++] = clock64();
}
#else
#define note(a, s)
#endif

// Float32 values as halves and remainders, of which both carry the tag, for features `n` and `n + 1`: two lanes finish
// a feature, and of the four lanes of a pair each publishes a copy. The tag costs the half a bit that the remainder
// makes good.
template <int COPIES_OF>
__device__ __forceinline__ void publish_split(u16* halves, int total, int n, float value, bool there, u32 tag) {
  const float other = __shfl_xor_sync(~0u, value, 2);
  const bool odd = threadIdx.x & 2;
  const float first = odd ? other : value, second = odd ? value : other;
  const int copy = threadIdx.x % 4;
  if (there && copy < COPIES_OF) {
    u32 half = tagged(pack(first, second), tag);
    u32 rest = tagged(pack(first - low_of(half), second - high_of(half)), tag);
    halves += copy * 2 * total + (n & ~1);
    poke4(halves, half);
    poke4(halves + total, rest);
  }
}

// The residual stream times the gain of the layer norm that reads it, and what that norm's moments need.
__device__ __forceinline__ void publish_stream(const Arguments& a, int n, float x, float gain, bool there, u32 tag) {
  publish_split<COPIES>(a.stream, WIDTH, n, x * gain * SHRINK, there, tag);
  float sum = there && threadIdx.x % 2 == 0 ? x : 0, squares = sum * sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    sum += __shfl_xor_sync(~0u, sum, step);
    squares += __shfl_xor_sync(~0u, squares, step);
  }
  const int lane = threadIdx.x % 32;
  if (there && lane < COPIES)
    poke8(a.stats + lane * GIVERS + blockIdx.x, {tagged(__float_as_uint(sum), tag), __float_as_uint(squares)});
}

// The warp has read what it needs of the next `CHUNKS` chunks behind `taken`.
template <int CHUNKS>
__device__ __forceinline__ void release(Shared& sh, Cursor taken) {
  __syncwarp();
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    if (threadIdx.x % 32 == 0) barrier_arrive(shared_address(&sh.empty[taken.place]));
    taken.next();
  }
}

// Registers for a product's weights and activations while it waits for the latter.
constexpr int KEPT_WORDS = WARPS == 8 ? 190 : 84;

// Eight weights of each of a lane's rows: `block` counts those of this warp, a turn's digits one after the other.
template <int PRODUCT, int HALVES, int CHUNKS>
__device__ __forceinline__ void load_block(u32 (&w)[HALVES][4], const u32 (&rows)[HALVES], const u32 (&metas)[HALVES],
                                           const u32 (&bases)[CHUNKS], int block) {
  const u8* memory = dynamic_shared();
  constexpr int DEPTH = depth_of(PRODUCT), PLANE = plane(DEPTH), HIGH = most(high_plane(DEPTH), 1);
  const int warp = threadIdx.x / 32, t = threadIdx.x % 4;
  const int turn = block / DIGITS, digit = block % DIGITS, part = PRODUCT == FC2 ? turn / PART : 0;
  const int run = turn * WARPS + warp, element = digit * PLANE + run * 32 + t * 8;
  const int at = ((turn - part * PART) * WARPS + warp) * RUN_BYTES + t * (RUN_BYTES / 4);
#pragma unroll
  for (int h = 0; h < HALVES; h++) {
    if (runs(DEPTH) % WARPS && run >= runs(DEPTH)) {
      // A warp without a run in this turn: zeros, since even what is multiplied by zero must be a number.
      w[h][0] = w[h][1] = w[h][2] = w[h][3] = 0;
      continue;
    }
    const u32 row = rows[h] + (PRODUCT == FC2 ? bases[least(part, CHUNKS - 1)] - bases[0] : 0);
    if (BITS == 16) {
      load16(w[h], memory + row + at);
    } else {
      u32 raw[2], high[2] = {};
      load8(raw, memory + row + at);
      if (BITS == 3) {
        load8(high, memory + row + PLANE + element % HIGH);
        const int bit = element / HIGH;
#pragma unroll
        for (int i = 0; i < 2; i++)
          high[i] = (bit >= 2 ? high[i] >> (bit - 2) : high[i] << (2 - bit)) & 0x04040404;
      }
      const int group = (even(DEPTH) ? element : least(element, DEPTH - 1)) / most(GROUP, 1);
      const u16* meta = (const u16*)(memory + metas[h]) + group;
      const u32 scale = meta[0], zero = meta[meta_bytes(DEPTH) / 2];
      dequantize(w[h], raw, high, scale, zero, digit);
    }
  }
}

// Where in the first plane a lane's part of a run begins. A warp that has no run in its first turn waits for the first
// run's activations all the same, and multiplies them by zeros: it would run ahead of the barriers otherwise.
template <int PRODUCT>
__device__ __forceinline__ int place_of(int block, int warp, int t) {
  constexpr int RUNS = runs(depth_of(PRODUCT));
  const int run = block / DIGITS * WARPS + warp;
  return (RUNS < WARPS && run >= RUNS ? 0 : run) * 32 + t * 8;
}

// The chunks of a product, once they are there: where they begin.
template <int CHUNKS>
__device__ __forceinline__ void take(Shared& sh, Cursor& cursor, u32 (&bases)[CHUNKS]) {
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    await(shared_address(&sh.full[cursor.place]), cursor.phase);
    bases[chunk] = cursor.place * CHUNK;
    cursor.next();
  }
}

// One product: `PRODUCT` says which, and with it what it reads. This warp's share of every sum goes to shared memory.
template <int PRODUCT>
__device__ __forceinline__ void product(const Arguments& a, State& s, Shared& sh) {
  constexpr int DEPTH = depth_of(PRODUCT), PLANE = plane(DEPTH), TURNS = turns(DEPTH), BLOCKS = TURNS * DIGITS;
  constexpr int CHUNKS = chunks_of(PRODUCT), ROW_CHUNKS = row_chunks(PRODUCT);
  constexpr int LOGICAL = ROW_CHUNKS * ROWS, HALVES = ratio(LOGICAL, 8), TILES = ratio(HALVES, 2);
  constexpr int GROUPS = groups(DEPTH), SIDE = PRODUCT % 2;
  constexpr bool FROM_STREAM = normed(PRODUCT), FROM_RUNS = PRODUCT == OWN_OUT || PRODUCT == CROSS_OUT;
  constexpr int KEEP = least(BLOCKS, (KEPT_WORDS - (FROM_RUNS ? 8 : FROM_STREAM ? 4 : 0) * BLOCKS) / (HALVES * 4));
  const Span span = PRODUCT == FC1 ? share(FFN, ROWS_FFN) : share(WIDTH, ROWS);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

  // The weights, from the ring into registers, in the shape that the tensor cores take. Rows behind the last one give
  // sums that nobody reads.
  u32 bases[CHUNKS];
  const Cursor taken = s.cursor;
  take(sh, s.cursor, bases);
  note(a, s);  // chunks there
  u32 rows[HALVES], metas[HALVES];  // Where a lane's row of each eight begins, and the row's scales.
#pragma unroll
  for (int h = 0; h < HALVES; h++) {
    int row = least(8 * h + g, LOGICAL - 1), chunk = row / ROWS, in_chunk = row - chunk * ROWS;
    u32 base = bases[0];
#pragma unroll
    for (int c = 1; c < ROW_CHUNKS; c++)
      if (chunk == c) base = bases[c];
    rows[h] = base + in_chunk * stride(DEPTH);
    if (BITS != 16) {
      int first = span.first + (PRODUCT == FC1 ? chunk * ROWS : 0);
      metas[h] = base + scales_at(DEPTH) + (first * GROUPS * 2) % 16 + in_chunk * GROUPS * 2;
    }
  }
  u32 kept[KEEP + 1][HALVES][4];
#pragma unroll
  for (int b = 0; b < KEEP; b++) load_block<PRODUCT>(kept[b], rows, metas, bases, b);
  if (KEEP == BLOCKS) release<CHUNKS>(sh, taken);
  note(a, s);  // weights in registers

  // The activations. A lane holds those of column g: of the stream the halves in the first and the remainders in the
  // second column, of attention a run in each. The hidden layer's are many, and fill one column: they pass through
  // shared memory, so that the lanes of the other columns need not hold them.
  uint4 x[PRODUCT == FC2 ? 1 : BLOCKS], tops[FROM_RUNS ? BLOCKS : 1];
  uint2 moments = {};
  const int splits = PRODUCT == OWN_OUT ? SELF_SPLITS : CROSS_SPLITS;
  constexpr int EACH = ratio(GIVERS, WARPS);
  const int copy = blockIdx.x % COPIES;
  if (PRODUCT == FC2) {
    constexpr int UNITS = ratio(BLOCKS * 4, 32);
    uint4 units[UNITS];
    u32 missing = 0;
    const u16* from[UNITS];
#pragma unroll
    for (int i = 0; i < UNITS; i++) {
      const int b = (i * 32 + lane) / 4, in_plane = place_of<PRODUCT>(b, warp, t);
      const int element = b % DIGITS * PLANE + in_plane;
      units[i] = {};
      from[i] = a.hidden + copy * FFN + element;
      if (b < BLOCKS && in_plane < PLANE && element < DEPTH) missing |= 1u << i;
    }
    Patience patience;
    do {
#pragma unroll
      for (int i = 0; i < UNITS; i++)
        if (missing >> i & 1) units[i] = peek16(from[i]);
#pragma unroll
      for (int i = 0; i < UNITS; i++)
        if (fresh(units[i].x, s.tag)) missing &= ~(1u << i);
      patience.spend();
    } while (__any_sync(~0u, missing));
#pragma unroll
    for (int i = 0; i < UNITS; i++)
      if (i * 32 + lane < BLOCKS * 4) *(uint4*)&sh.hidden[warp][(i * 32 + lane) * 8] = units[i];
    __syncwarp();
  } else {
    const u32 tag = FROM_STREAM ? s.stream_tag : s.tag;
    const int giver = warp * EACH + lane;
    const u16* from[BLOCKS];
    u32 missing = 0, tops_missing = 0;
    bool moments_missing = FROM_STREAM && lane < EACH && giver < GIVERS;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const int in_plane = place_of<PRODUCT>(b, warp, t), element = b % DIGITS * PLANE + in_plane;
      const bool inside = in_plane < PLANE && element < DEPTH;
      x[b] = {};
      if (FROM_STREAM) {
        if (inside && g < 2) missing |= 1u << b;
        from[b] = a.stream + (2 * copy + g) * WIDTH + element;
      } else {
        tops[b] = {};
        if (inside && g < splits) missing |= 1u << b;
        if (inside) tops_missing |= 1u << b;
        from[b] = (PRODUCT == OWN_OUT ? a.own_runs : a.cross_runs) + ((copy * HEADS + element / 64) * 8 + g) * 64 +
                  element % 64;
      }
    }
    Patience patience;
    do {
#pragma unroll
      for (int b = 0; b < BLOCKS; b++)
        if (missing >> b & 1) x[b] = peek16(from[b]);
      if (FROM_RUNS) {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
          const int element = b % DIGITS * PLANE + place_of<PRODUCT>(b, warp, t);
          const float2* from_tops =
              (PRODUCT == OWN_OUT ? a.own_tops : a.cross_tops) + (copy * HEADS + element / 64) * 8 + 2 * t;
          if (tops_missing >> b & 1) tops[b] = peek16(from_tops);
        }
      }
      if (moments_missing) moments = peek8(a.stats + copy * GIVERS + giver);
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        if (FROM_STREAM ? all_fresh(x[b], tag) : fresh(x[b].x, tag)) missing &= ~(1u << b);
        if (FROM_RUNS && (2 * t >= splits || fresh(tops[b].x, tag)) && (2 * t + 1 >= splits || fresh(tops[b].z, tag)))
          tops_missing &= ~(1u << b);
      }
      if (FROM_STREAM && fresh(moments.x, tag)) moments_missing = false;
      patience.spend();
    } while (__any_sync(~0u, missing | tops_missing | (u32)moments_missing));
  }
  note(a, s);

  float c[FROM_RUNS ? BLOCKS : TILES][4] = {};
#pragma unroll
  for (int b = 0; b < BLOCKS; b++) {
    if (b >= KEEP) load_block<PRODUCT>(kept[KEEP], rows, metas, bases, b);
    const u32(&w)[HALVES][4] = kept[least(b, KEEP)];
    u32 y[4] = {};
    if (PRODUCT == FC2) {
      if (g == 0) load16(y, (const u8*)&sh.hidden[warp][b * 32 + t * 8]);
    } else {
      const uint4& unit = x[PRODUCT == FC2 ? 0 : b];
      y[0] = unit.x, y[1] = unit.y, y[2] = unit.z, y[3] = unit.w;
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      // Of attention, a block's sums stay apart: they get the shares of their head's runs.
      float(&into)[4] = c[FROM_RUNS ? b : tile];
      const bool both = 2 * tile + 1 < HALVES;
      const u32(&low)[4] = w[both ? 2 * tile + 1 : 2 * tile];
      multiply(into, w[2 * tile][0], both ? low[0] : 0, w[2 * tile][1], both ? low[1] : 0, y[0], y[1]);
      multiply(into, w[2 * tile][2], both ? low[2] : 0, w[2 * tile][3], both ? low[3] : 0, y[2], y[3]);
    }
  }
  if (KEEP < BLOCKS) release<CHUNKS>(sh, taken);
  if (FROM_RUNS) {
    // Columns 2 t and 2 t + 1 are in this lane: two runs of the head that the block belongs to, each with its share.
    float best[BLOCKS], part[BLOCKS][2], all[BLOCKS];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
      best[b] = fmaxf(2 * t < splits ? __uint_as_float(tops[b].x) : NOTHING,
                      2 * t + 1 < splits ? __uint_as_float(tops[b].z) : NOTHING);
#pragma unroll
    for (int step = 1; step < 4; step *= 2)
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) best[b] = fmaxf(best[b], __shfl_xor_sync(~0u, best[b], step));
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      part[b][0] = 2 * t < splits ? exp2_fast(__uint_as_float(tops[b].x) - best[b]) * __uint_as_float(tops[b].y) : 0;
      part[b][1] =
          2 * t + 1 < splits ? exp2_fast(__uint_as_float(tops[b].z) - best[b]) * __uint_as_float(tops[b].w) : 0;
      all[b] = part[b][0] + part[b][1];
    }
#pragma unroll
    for (int step = 1; step < 4; step *= 2)
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) all[b] += __shfl_xor_sync(~0u, all[b], step);
    float sums[2] = {};
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const float inverse = __fdividef(1.0f, fmaxf(all[b], 1e-30f));
      sums[0] += (c[b][0] * part[b][0] + c[b][1] * part[b][1]) * inverse;
      sums[1] += (c[b][2] * part[b][0] + c[b][3] * part[b][1]) * inverse;
    }
#pragma unroll
    for (int step = 1; step < 4; step *= 2)
#pragma unroll
      for (int half = 0; half < 2; half++) sums[half] += __shfl_xor_sync(~0u, sums[half], step);
    if (t == 0) sh.sums[SIDE][g][warp] = sums[0], sh.sums[SIDE][8 + g][warp] = sums[1];
  } else {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
      if (t == 0) {
        sh.sums[SIDE][16 * tile + g][warp] = c[tile][0] + c[tile][1];
        if (2 * tile + 1 < HALVES) sh.sums[SIDE][16 * tile + 8 + g][warp] = c[tile][2] + c[tile][3];
      }
  }
  if (FROM_STREAM) {
    float sum = __uint_as_float(moments.x), squares = __uint_as_float(moments.y);
#pragma unroll
    for (int step = EACH > 16 ? 16 : EACH > 8 ? 8 : 4; step; step /= 2) {
      sum += __shfl_xor_sync(~0u, sum, step);
      squares += __shfl_xor_sync(~0u, squares, step);
    }
    if (lane == 0) sh.moments[SIDE][0][warp] = sum, sh.moments[SIDE][1][warp] = squares;
  }
  __syncwarp();
  bar_arrive(PRODUCT_SUMS + PRODUCT, 32 * (WARPS + finishers(PRODUCT)));
  if (!FROM_STREAM) s.stream_tag ^= 1;
  note(a, s);  // sums stored
}

// What becomes of a product's sums: two lanes of a finishing warp to a feature.
template <int PRODUCT>
__device__ __forceinline__ void finish(const Arguments& a, State& s, Shared& sh, int layer) {
  constexpr int DEPTH = depth_of(PRODUCT), CHUNKS = chunks_of(PRODUCT), ROW_CHUNKS = row_chunks(PRODUCT);
  constexpr int LOGICAL = ROW_CHUNKS * ROWS, SIDE = PRODUCT % 2;
  constexpr bool FROM_STREAM = normed(PRODUCT);
  const Span span = PRODUCT == FC1 ? share(FFN, ROWS_FFN) : share(WIDTH, ROWS);
  const int warp = threadIdx.x / 32 - FIRST_FINISHER, lane = threadIdx.x % 32;
  const int row = warp * 16 + lane / 2, chunk = row / ROWS, in_chunk = row - chunk * ROWS, half = lane % 2;
  const bool finishes = row < LOGICAL && (PRODUCT == FC1 ? row < span.count : in_chunk < span.count);
  const int n = span.first + (PRODUCT == FC1 ? row : in_chunk);
  u32 bases[CHUNKS];
  const Cursor taken = s.cursor;
  take(sh, s.cursor, bases);
  float first = 0, second = 0;
  if (finishes) {
    u32 base = bases[0];
#pragma unroll
    for (int c = 1; c < ROW_CHUNKS; c++)
      if (chunk == c) base = bases[c];
    const int begin = span.first + (PRODUCT == FC1 ? chunk * ROWS : 0);
    const u8* at = dynamic_shared() + base + vectors_at(DEPTH);
    if (normed(PRODUCT)) {
      at += (begin * 4) % 16 + in_chunk * 4;
      first = *(const float*)at, second = *(const float*)(at + vector_bytes);
    } else {
      at += (begin * 2) % 16 + in_chunk * 2;
      first = widen(*(const u16*)at), second = widen(*(const u16*)(at + vector_bytes));
    }
  }
  release<CHUNKS>(sh, taken);
  if (warp >= finishers(PRODUCT)) return;
  bar_sync(PRODUCT_SUMS + PRODUCT, 32 * (WARPS + finishers(PRODUCT)));
  note(a, s);  // all sums there
  float total = 0, sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < WARPS / 8; i++) {
    const int at = 4 * (half + 2 * i);
    const float4 four = *(const float4*)&sh.sums[SIDE][row][at];
    total += four.x + four.y + (four.z + four.w);
    if (FROM_STREAM) {
      const float4 m = *(const float4*)&sh.moments[SIDE][0][at], q = *(const float4*)&sh.moments[SIDE][1][at];
      sum += m.x + m.y + (m.z + m.w);
      squares += q.x + q.y + (q.z + q.w);
    }
  }
  total += __shfl_xor_sync(~0u, total, 1);
  if (FROM_STREAM) {
    sum += __shfl_xor_sync(~0u, sum, 1);
    squares += __shfl_xor_sync(~0u, squares, 1);
    const float mean = sum / DEPTH, variance = fmaxf(squares / DEPTH - mean * mean, 0.0f);
    total = (total * GROW - mean * second) * rsqrt_fast(variance + sh.eps[layer][norm_of(PRODUCT)]) + first;
    if (PRODUCT == FC1) {
      const float y = 0.5f * total * (1.0f + erff(total * 0.7071067811865476f));
      // Eight features, sixteen lanes, one unit.
      u32 pair = pack(y, __shfl_down_sync(~0u, y, 2)), unit[4];
#pragma unroll
      for (int i = 0; i < 4; i++) unit[i] = __shfl_sync(~0u, pair, (lane & 16) + 4 * i);
      if (finishes && lane % 16 < COPIES)
        poke16(a.hidden + lane % 16 * FFN + n / 8 * 8, {tagged(unit[0], s.tag), unit[1], unit[2], unit[3]});
    } else if (PRODUCT == QUERY) {
      publish_split<1>(a.query, WIDTH, n, total * a.scale * LOG2E, finishes, s.tag);
    } else {
      // Keys and values are attended to as the cache holds them.
      total = chunk == 0 ? total * a.scale * LOG2E : low_of(pack(total, 0));
      publish_split<1>(a.heads, 3 * WIDTH, chunk * WIDTH + n, total, finishes, s.tag);
      if (finishes && chunk > 0 && half == 0) {
        u16* cache = (u16*)sh.caches[layer][chunk - 1];
        cache[((long long)(n / 64) * SLOTS + s.slot) * 64 + n % 64] = (u16)pack(total, 0);
      }
    }
  } else {
    s.residual += total + first;
    if (PRODUCT != FC2 || layer < LAYERS - 1) {
      s.stream_tag ^= 1;
      publish_stream(a, n, s.residual, second, finishes, s.stream_tag);
    } else {
      // For the head, a kernel of its own: the stream times the gain of its layer norm, and the norm's sums.
      float x = finishes && half == 0 ? s.residual : 0, squares = x * x;
      if (finishes && half == 0) a.gained[n] = x * second;
#pragma unroll
      for (int step = 2; step < 32; step *= 2) {
        x += __shfl_xor_sync(~0u, x, step);
        squares += __shfl_xor_sync(~0u, squares, step);
      }
      if (lane == 0 && span.count > 0) a.last_stats[blockIdx.x] = x, a.last_stats[GIVERS + blockIdx.x] = squares;
    }
  }
  note(a, s);  // published
}

// -- Attention -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint4 whole(const uint4& half, const uint4& rest) {
  return {half_add(half.x, rest.x), half_add(half.y, rest.y), half_add(half.z, rest.z), half_add(half.w, rest.w)};
}

// Four lanes hold sums for the same eight dimensions: each ends up with two.
__device__ __forceinline__ void gather(float (&sums)[8]) {
  const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float other = __shfl_xor_sync(~0u, upper ? sums[i] : sums[4 + i], 16);
    sums[i] = (upper ? sums[4 + i] : sums[i]) + other;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float other = __shfl_xor_sync(~0u, odd ? sums[i] : sums[2 + i], 8);
    sums[i] = (odd ? sums[2 + i] : sums[i]) + other;
  }
}

// This program's run of the keys of its head; the product that follows merges a head's runs.
template <bool OWN>
__device__ __forceinline__ void attention(const Arguments& a, State& s, Shared& sh, int layer) {
  constexpr int TILES = ratio(OWN ? least(SELF_RUN, SLOTS) : CROSS_RUN, 16 * WARPS);
  if (blockIdx.x >= HEADS * (OWN ? SELF_SPLITS : CROSS_SPLITS)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int head = blockIdx.x % HEADS;
  const Span span = keys_of(OWN, s.slot);
  if (OWN && span.count <= 0) return;
  const u16* keys = (const u16*)sh.caches[layer][OWN ? 0 : 2] + (long long)head * (OWN ? SLOTS : SOURCE) * 64;
  const u16* values = (const u16*)sh.caches[layer][OWN ? 1 : 3] + (long long)head * (OWN ? SLOTS : SOURCE) * 64;
  // Keys as the tensor cores take them, a lane two rows of a tile; values as vectors of eight, a lane four rows.
  uint4 k[TILES][2][2], v[TILES][4];
  bool seen[TILES][2];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    const int begin = (tile * WARPS + warp) * 16;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int key = begin + 8 * half + g, at = span.first + least(key, span.count - 1);
      seen[tile][half] = key < span.count && (!OWN || sh.valid[at]);
#pragma unroll
      for (int i = 0; i < 2; i++) k[tile][half][i] = fetch16(keys + at * 64 + 32 * i + 8 * t);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int key = begin + 4 * i + lane / 8, at = span.first + least(key, span.count - 1);
      v[tile][i] = fetch16(values + at * 64 + lane % 8 * 8);
      // A weight of zero does not hide what was never written.
      if (OWN && key >= span.count) v[tile][i] = {};
    }
  }

  note(a, s);  // keys asked for
  // The query: halves in the first column, remainders in the second. In self-attention, the newest key and value.
  uint4 q[2] = {}, new_k[2][2] = {}, new_v[2] = {};
  const int newest = s.slot - span.first;
  const bool has_newest = OWN && newest < span.count && newest / 16 % WARPS == warp;
  {
    const u16* from = OWN ? a.heads : a.query;
    constexpr int TOTAL = OWN ? 3 * WIDTH : WIDTH;
    u32 missing = g < 2 ? 3 : 0;
    if (has_newest) missing |= 0xFC;
    Patience patience;
    do {
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (missing >> i & 1) q[i] = peek16(from + g * TOTAL + head * 64 + 32 * i + 8 * t);
      if (OWN) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
          for (int rest = 0; rest < 2; rest++)
            if (missing >> (2 + 2 * i + rest) & 1)
              new_k[i][rest] = peek16(from + rest * TOTAL + WIDTH + head * 64 + 32 * i + 8 * t);
          if (missing >> (6 + i) & 1) new_v[i] = peek16(from + i * TOTAL + 2 * WIDTH + head * 64 + lane % 8 * 8);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (all_fresh(q[i], s.tag)) missing &= ~(1u << i);
        if (OWN) {
#pragma unroll
          for (int rest = 0; rest < 2; rest++)
            if (all_fresh(new_k[i][rest], s.tag)) missing &= ~(1u << (2 + 2 * i + rest));
          if (all_fresh(new_v[i], s.tag)) missing &= ~(1u << (6 + i));
        }
      }
      patience.spend();
    } while (__any_sync(~0u, missing));
  }
  note(a, s);
  if (has_newest) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const int begin = (tile * WARPS + warp) * 16;
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (begin + 8 * half + g == newest) {
#pragma unroll
          for (int i = 0; i < 2; i++) k[tile][half][i] = whole(new_k[i][0], new_k[i][1]);
        }
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (begin + 4 * i + lane / 8 == newest) v[tile][i] = whole(new_v[0], new_v[1]);
    }
  }

  float score[TILES][2], best = NOTHING;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    float c[4] = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint4 &upper = k[tile][0][i], &lower = k[tile][1][i];
      multiply(c, upper.x, lower.x, upper.y, lower.y, q[i].x, q[i].y);
      multiply(c, upper.z, lower.z, upper.w, lower.w, q[i].z, q[i].w);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      // The first lane of four has both columns.
      float dot = __shfl_sync(~0u, c[2 * half] + c[2 * half + 1], lane & ~3);
      score[tile][half] = seen[tile][half] ? dot : __int_as_float(0xFF800000);
      best = fmaxf(best, score[tile][half]);
    }
  }
#pragma unroll
  for (int step = 4; step < 32; step *= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, step));
  float total = 0, out[8] = {};
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      score[tile][half] = exp2_fast(score[tile][half] - best);
      total += score[tile][half];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float weight = __shfl_sync(~0u, score[tile][i / 2], (4 * (i % 2) + lane / 8) * 4);
      const u32 pairs[4] = {v[tile][i].x, v[tile][i].y, v[tile][i].z, v[tile][i].w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        out[2 * j] += weight * low_of(pairs[j]);
        out[2 * j + 1] += weight * high_of(pairs[j]);
      }
    }
  }
#pragma unroll
  for (int step = 4; step < 32; step *= 2) total += __shfl_xor_sync(~0u, total, step);
  gather(out);
  const int pair_at = lane % 8 * 8 + lane / 8 * 2;
  *(float2*)&sh.runs[warp][pair_at] = {out[0], out[1]};
  if (lane == 0) sh.tops[warp] = best, sh.totals[warp] = total;
  __syncwarp();
  bar_arrive(RUNS_THERE + OWN, 32 * (WARPS + 1));
  note(a, s);  // run stored
}

// The run of all warps' keys, by the first finishing warp.
template <bool OWN>
__device__ __forceinline__ void finish_attention(const Arguments& a, State& s, Shared& sh) {
  const int lane = threadIdx.x % 32;
  if (blockIdx.x >= HEADS * (OWN ? SELF_SPLITS : CROSS_SPLITS) || threadIdx.x / 32 != FIRST_FINISHER) return;
  const int head = blockIdx.x % HEADS, split = blockIdx.x / HEADS;
  u16* to = (OWN ? a.own_runs : a.cross_runs) + ((lane / 8 * HEADS + head) * 8 + split) * 64 + lane % 8 * 8;
  float2* top_to = (OWN ? a.own_tops : a.cross_tops) + (lane * HEADS + head) * 8 + split;
  if (OWN && keys_of(OWN, s.slot).count <= 0) {
    // Nothing written yet behind the first run: say so, so that tags go on alternating.
    poke16(to, {s.tag, 0, 0, 0});
    if (lane < COPIES) poke8(top_to, {tagged(__float_as_uint(NOTHING), s.tag), 0});
    return;
  }
  bar_sync(RUNS_THERE + OWN, 32 * (WARPS + 1));
  note(a, s);  // all runs there
  float best = NOTHING;
#pragma unroll
  for (int i = 0; i < WARPS / 4; i++) {
    const float4 four = *(const float4*)&sh.tops[4 * i];
    best = fmaxf(fmaxf(best, fmaxf(four.x, four.y)), fmaxf(four.z, four.w));
  }
  float all[8] = {}, total = 0;
#pragma unroll
  for (int i = 0; i < WARPS / 4; i++) {
    const int of = lane / 8 * (WARPS / 4) + i;
    const float weight = exp2_fast(sh.tops[of] - best);
    total += weight * sh.totals[of];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const float4 four = *(const float4*)&sh.runs[of][lane % 8 * 8 + 4 * j];
      all[4 * j] += weight * four.x, all[4 * j + 1] += weight * four.y;
      all[4 * j + 2] += weight * four.z, all[4 * j + 3] += weight * four.w;
    }
  }
  gather(all);
  total += __shfl_xor_sync(~0u, total, 8);
  total += __shfl_xor_sync(~0u, total, 16);
  const float inverse = __fdividef(1.0f, fmaxf(total, 1e-30f));
  u32 pair = pack(all[0] * inverse, all[1] * inverse), unit[4];
#pragma unroll
  for (int i = 0; i < 4; i++) unit[i] = __shfl_sync(~0u, pair, lane % 8 + 8 * i);
  poke16(to, {tagged(unit[0], s.tag), unit[1], unit[2], unit[3]});
  if (lane < COPIES) poke8(top_to, {tagged(__float_as_uint(best), s.tag), __float_as_uint(total)});
  note(a, s);  // published
}

// -- The kernel ----------------------------------------------------------------------------------------------------

// Uses of `stream` and of the other buffers are counted through the launches: the first finds the buffers zeroed.
__device__ __forceinline__ State state_of(u32 launches, int slot) {
  State s;
  s.slot = slot;
  s.stream_tag = (launches * (3 * LAYERS) + 1) & 1;
  s.tag = (launches * LAYERS + 1) & 1;
  s.residual = 0;
#ifdef MARKS
  s.mark = 0;
#endif
  return s;
}

__device__ __forceinline__ void multiply_layers(const Arguments& a, State& s, Shared& sh) {
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    product<QKV>(a, s, sh);
    attention<true>(a, s, sh, layer);
    product<OWN_OUT>(a, s, sh);
    product<QUERY>(a, s, sh);
    attention<false>(a, s, sh, layer);
    product<CROSS_OUT>(a, s, sh);
    product<FC1>(a, s, sh);
    product<FC2>(a, s, sh);
    s.tag ^= 1;
  }
}

__device__ __forceinline__ void finish_layers(const Arguments& a, State& s, Shared& sh) {
  if (threadIdx.x / 32 == FIRST_FINISHER) {
    const Span width = share(WIDTH, ROWS);
    const int row = threadIdx.x % 32 / 2, n = width.first + row;
    const bool finishes = row < width.count;
    float gain = 0;
    if (finishes) {
      const long long token = a.tokens[s.slot];
      // A row that only pads the batch may hold anything.
      const int position = most(s.slot - (int)*a.offset, 0);
      s.residual = widen(a.embedding[token * WIDTH + n]) + widen(a.positions[position * WIDTH + n]);
      gain = widen(a.first_gain[n]);
    }
    publish_stream(a, n, s.residual, gain, finishes, s.stream_tag);
  }
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    finish<QKV>(a, s, sh, layer);
    finish_attention<true>(a, s, sh);
    finish<OWN_OUT>(a, s, sh, layer);
    finish<QUERY>(a, s, sh, layer);
    finish_attention<false>(a, s, sh);
    finish<CROSS_OUT>(a, s, sh, layer);
    finish<FC1>(a, s, sh, layer);
    finish<FC2>(a, s, sh, layer);
    s.tag ^= 1;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_layers(Arguments a) {
  u8* memory = dynamic_shared();
  Shared& sh = *(Shared*)(memory + IN_RING * CHUNK);
  // Who has nothing to give to others leaves.
  if (share(WIDTH, ROWS).count <= 0 && share(FFN, ROWS_FFN).count <= 0) return;
  if (threadIdx.x < RINGS) {
    barrier_init(shared_address(&sh.full[threadIdx.x]), 1);
    barrier_init(shared_address(&sh.empty[threadIdx.x]), WARPS + FINISHERS);
    barrier_fence();
  }
  __syncthreads();
  const int slot = (int)*a.length - 1;
  const u32 launches = *a.launches;
  // What is needed of cold memory on the way, copied while the first weights come.
  const int other = threadIdx.x < 32 * FETCHER ? threadIdx.x : threadIdx.x - 32;
  if (threadIdx.x / 32 != FETCHER) {
    constexpr int OTHERS = THREADS - 32;
    for (int i = other; i < LAYERS * 4; i += OTHERS) sh.caches[i / 4][i % 4] = a.table[i / 4 * POINTERS + KEYS + i % 4];
    for (int i = other; i < LAYERS * 3; i += OTHERS) sh.eps[i / 3][i % 3] = a.eps[i];
    for (int i = other; i < SLOTS; i += OTHERS) sh.valid[i] = a.valid[i];
  }
  State s = state_of(launches, slot);
  if (__shfl_sync(~0u, (int)threadIdx.x / 128, 0) == WARPS / 4) {
    few_registers();
    if (threadIdx.x / 32 == FETCHER) {
      fetch(a, sh, shared_address(memory), slot);
    } else {
      bar_sync(TABLES, THREADS - 32);
      finish_layers(a, s, sh);
      if (blockIdx.x == 0 && threadIdx.x == 32 * FIRST_FINISHER) *a.launches = launches + 1;
    }
  } else {
    many_registers();
    bar_sync(TABLES, THREADS - 32);
    multiply_layers(a, s, sh);
  }
}
