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
__device__ __forceinline__ void load16(u32 (&r)[4], u32 at) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at)
               : "memory");
}
__device__ __forceinline__ void load8(u32 (&r)[2], u32 at) {
  asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
}
__device__ __forceinline__ u32 load4(u32 at) {
  u32 a;
  asm volatile("ld.shared.u32 %0,[%1];" : "=r"(a) : "r"(at) : "memory");
  return a;
}
__device__ __forceinline__ u16 load2(u32 at) {
  u16 a;
  asm volatile("ld.shared.u16 %0,[%1];" : "=h"(a) : "r"(at) : "memory");
  return a;
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
__device__ __forceinline__ void store16(u32 at, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0],{%1,%2,%3,%4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// The fetching warps need few registers, the others many: an even share would not hold the weights of a product.
__device__ __forceinline__ void few_registers() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
#endif
}
__device__ __forceinline__ void many_registers() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WARPS == 8 ? 240 : 112));
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
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." HALF "." HALF
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

__device__ __forceinline__ float low_of(u32 pair) { return widen((u16)pair); }
__device__ __forceinline__ float high_of(u32 pair) { return widen((u16)(pair >> 16)); }

// -- The shape of the work -----------------------------------------------------------------------------------------

constexpr float NOTHING = -1e30f, LOG2E = 1.4426950408889634f;
constexpr float SHRINK = 1.0f / 16, GROW = 16.0f;  // Keeps activations times gains far from float16's largest number.
constexpr int THREADS = 32 * WARPS;                // Those that compute; four more warps are there to fetch.

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
constexpr int HIDDEN_BLOCKS = turns(FFN) * DIGITS;
struct Shared {
  alignas(16) float sums[2][MOST_ROWS][SUMS];
  alignas(16) float moments[2][2][WARPS];
  union {
    alignas(16) float runs[WARPS][64 + 4];
    alignas(16) u16 hidden[WARPS][HIDDEN_BLOCKS * 32];
  };
  alignas(16) float tops[WARPS], totals[WARPS];
  u64 full[RINGS], empty[RINGS];
};
constexpr int IN_RING = least((MEMORY - (int)sizeof(Shared)) / CHUNK, RINGS);
static_assert(IN_RING >= most(FFN_CHUNKS, most(parts(FFN), 3)) + 1, "a product exceeds the shared memory");

struct Arguments {
  const u64* table;
  u16 *stream, *heads, *query;  // Halves, then their remainders: [2][WIDTH], [2][3 WIDTH], [2][WIDTH].
  float2* stats;                // [GIVERS]: of the rows of each, sum and sum of squares.
  u16 *own_runs, *cross_runs;   // [HEADS][8][64]
  float2 *own_tops, *cross_tops;  // [HEADS][8]: the largest score, and the sum of exponentials.
  u16* hidden;                  // [FFN]
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

// One lane's copy of a chunk: lanes below 16 take a row each, the next four what lies behind the rows.
template <int PRODUCT>
__device__ __forceinline__ u32 copy_of(const u64* p, int chunk, int lane, u32& at, const u8*& from) {
  constexpr int DEPTH = depth_of(PRODUCT), BYTES = row_bytes(DEPTH), GROUPS = groups(DEPTH);
  Span span = PRODUCT == FC1 ? share(FFN, ROWS_FFN) : share(WIDTH, ROWS);
  if (PRODUCT == FC1) {
    int skipped = least(chunk * ROWS, span.count);
    span = {span.first + skipped, least(ROWS, span.count - skipped)};
  }
  if (span.count <= 0) return 0;
  const int matrix = weight_of(PRODUCT) + (PRODUCT == QKV ? chunk : 0);
  if (lane < 16) {
    if (lane >= span.count) return 0;
    const int begin = PRODUCT == FC2 ? chunk * part_bytes(DEPTH) : 0;
    at = lane * stride(DEPTH);
    from = (const u8*)p[WEIGHTS + matrix] + (long long)(span.first + lane) * BYTES + begin;
    return least(part_bytes(DEPTH), BYTES - begin);
  }
  if (lane >= 20 || PRODUCT == FC2 && chunk > 0) return 0;
  int begin, end;
  if (lane < 18) {
    if (BITS == 16) return 0;
    at = scales_at(DEPTH) + (lane - 16) * meta_bytes(DEPTH);
    from = (const u8*)p[(lane == 16 ? SCALES : ZEROS) + matrix];
    begin = span.first * GROUPS * 2, end = begin + span.count * GROUPS * 2;
  } else {
    at = vectors_at(DEPTH) + (lane - 18) * vector_bytes;
    if (normed(PRODUCT)) {
      begin = ((PRODUCT == QKV ? chunk * WIDTH : 0) + span.first) * 4, end = begin + span.count * 4;
      from = (const u8*)p[(lane == 18 ? CONSTANT : FOLDED) + norm_of(PRODUCT)];
    } else {
      begin = span.first * 2, end = begin + span.count * 2;
      from = (const u8*)p[(lane == 18 ? BIAS : GAIN) + norm_of(PRODUCT)];
      if (from == nullptr) return 0;
    }
  }
  from += begin / 16 * 16;
  return up(end, 16) - begin / 16 * 16;
}

template <int PRODUCT>
__device__ __forceinline__ void fetch_product(const u64* p, Shared& sh, u32 memory, Cursor& cursor) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks_of(PRODUCT); chunk++) {
    u32 at = 0;
    const u8* from = nullptr;
    const u32 size = copy_of<PRODUCT>(p, chunk, lane, at, from);
    u32 all = size;
#pragma unroll
    for (int step = 16; step; step /= 2) all += __shfl_xor_sync(~0u, all, step);
    // The first round finds every place empty.
    await(shared_address(&sh.empty[cursor.place]), cursor.phase ^ 1);
    const u32 barrier = shared_address(&sh.full[cursor.place]);
    if (lane == 0) barrier_expect(barrier, all);
    __syncwarp();
    if (size) copy_async(memory + cursor.place * CHUNK + at, from, size, barrier);
    cursor.next();
  }
}

// The fetching warp: every chunk of every layer, as soon as there is room for it.
__device__ __forceinline__ void fetch(const Arguments& a, Shared& sh, u32 memory, int slot) {
  const int lane = threadIdx.x % 32;
  Cursor cursor;
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    const u64* p = a.table + layer * POINTERS;
    // Keys and values are loaded into registers, when their turn comes; from the L2 cache by then.
    if (lane < 4 && blockIdx.x < HEADS * (lane < 2 ? SELF_SPLITS : CROSS_SPLITS)) {
      Span keys = keys_of(lane < 2, slot);
      const u8* from = (const u8*)p[KEYS + lane];
      from += ((long long)(blockIdx.x % HEADS) * (lane < 2 ? SLOTS : SOURCE) + keys.first) * 128;
      if (keys.count > 0) prefetch(from, keys.count * 128);
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
  u32 memory;
  Cursor cursor;
  float residual;  // Of the feature that this thread finishes.
  int parity, slot;
  u32 stream_tag, tag;  // Of the next reading of `stream`, and of this layer's other buffers.
#ifdef MARKS
  int mark;
#endif
};

#ifdef MARKS
__device__ __forceinline__ void note(const Arguments& a, State& s) {
  if (threadIdx.x == 0 && s.mark < MARKS)
    a.marks[blockIdx.x * MARKS + s.mark++] = clock64();
}
#else
#define note(a, s)
#endif

// Float32 values as halves and remainders, of which both carry the tag, for features `n` and `n + 1`: two lanes finish
// a feature, and the first of four lanes publishes. The tag costs the half a bit that the remainder makes good.
__device__ __forceinline__ void publish_split(u16* halves, int total, int n, float value, bool there, u32 tag) {
  float next = __shfl_down_sync(~0u, value, 2);
  if (there && threadIdx.x % 4 == 0) {
    u32 half = tagged(pack(value, next), tag);
    u32 rest = tagged(pack(value - low_of(half), next - high_of(half)), tag);
    poke4(halves + n, half);
    poke4(halves + total + n, rest);
  }
}

// The residual stream times the gain of the layer norm that reads it, and what that norm's moments need.
__device__ __forceinline__ void publish_stream(const Arguments& a, int n, float x, float gain, bool there, u32 tag) {
  publish_split(a.stream, WIDTH, n, x * gain * SHRINK, there, tag);
  float sum = there && threadIdx.x % 2 == 0 ? x : 0, squares = sum * sum;
#pragma unroll
  for (int step = 2; step < 32; step *= 2) {
    sum += __shfl_xor_sync(~0u, sum, step);
    squares += __shfl_xor_sync(~0u, squares, step);
  }
  if (there && threadIdx.x == 0)
    poke8(a.stats + blockIdx.x, {tagged(__float_as_uint(sum), tag), __float_as_uint(squares)});
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
      load16(w[h], row + at);
    } else {
      u32 raw[2], high[2] = {};
      load8(raw, row + at);
      if (BITS == 3) {
        load8(high, row + PLANE + element % HIGH);
        const int bit = element / HIGH;
#pragma unroll
        for (int i = 0; i < 2; i++)
          high[i] = (bit >= 2 ? high[i] >> (bit - 2) : high[i] << (2 - bit)) & 0x04040404;
      }
      const int group = (even(DEPTH) ? element : least(element, DEPTH - 1)) / most(GROUP, 1);
      const u32 scale = load2(metas[h] + group * 2), zero = load2(metas[h] + meta_bytes(DEPTH) + group * 2);
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

// One product: `PRODUCT` says which, and with it what it reads and what becomes of it.
template <int PRODUCT>
__device__ __forceinline__ void product(const Arguments& a, State& s, Shared& sh, int layer) {
  constexpr int DEPTH = depth_of(PRODUCT), PLANE = plane(DEPTH), TURNS = turns(DEPTH), BLOCKS = TURNS * DIGITS;
  constexpr int CHUNKS = chunks_of(PRODUCT), ROW_CHUNKS = PRODUCT == FC2 ? 1 : CHUNKS;
  constexpr int LOGICAL = ROW_CHUNKS * ROWS, HALVES = ratio(LOGICAL, 8), TILES = ratio(HALVES, 2);
  constexpr int FINISHERS = ratio(LOGICAL, 16), GROUPS = groups(DEPTH);
  constexpr bool FROM_STREAM = normed(PRODUCT), FROM_RUNS = PRODUCT == OWN_OUT || PRODUCT == CROSS_OUT;
  constexpr int KEEP = least(BLOCKS, (KEPT_WORDS - (FROM_RUNS ? 8 : FROM_STREAM ? 4 : 0) * BLOCKS) / (HALVES * 4));
  static_assert(FINISHERS <= WARPS, "");
  const Span span = PRODUCT == FC1 ? share(FFN, ROWS_FFN) : share(WIDTH, ROWS);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

  // The weights, from the ring into registers, in the shape that the tensor cores take. Rows behind the last one give
  // sums that nobody reads.
  u32 bases[CHUNKS];
  Cursor taken = s.cursor;
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    await(shared_address(&sh.full[s.cursor.place]), s.cursor.phase);
    bases[chunk] = s.memory + s.cursor.place * CHUNK;
    s.cursor.next();
  }
  u32 rows[HALVES], metas[HALVES];  // Where a lane's row of each eight begins in its chunk, and the row's scales.
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
  // What the finishing lanes will need: two to a feature.
  const int row = warp * 16 + lane / 2, chunk = row / ROWS, in_chunk = row - chunk * ROWS;
  const bool finishes = warp < FINISHERS && row < LOGICAL &&
                        (PRODUCT == FC1 ? row < span.count : in_chunk < span.count);
  const int n = span.first + (PRODUCT == FC1 ? row : in_chunk);
  float first = 0, second = 0;
  if (finishes) {
    u32 base = bases[0];
#pragma unroll
    for (int c = 1; c < ROW_CHUNKS; c++)
      if (chunk == c) base = bases[c];
    const int begin = span.first + (PRODUCT == FC1 ? chunk * ROWS : 0);
    base += vectors_at(DEPTH);
    if (normed(PRODUCT)) {
      base += (begin * 4) % 16 + in_chunk * 4;
      first = __uint_as_float(load4(base)), second = __uint_as_float(load4(base + vector_bytes));
    } else {
      base += (begin * 2) % 16 + in_chunk * 2;
      const bool biased = a.table[layer * POINTERS + BIAS + norm_of(PRODUCT)] != 0;
      first = biased ? widen(load2(base)) : 0, second = widen(load2(base + vector_bytes));
    }
  }
  const float eps = normed(PRODUCT) ? a.eps[3 * layer + norm_of(PRODUCT)] : 0;
  if (KEEP == BLOCKS) release<CHUNKS>(sh, taken);

  // The activations. A lane holds those of column g: of the stream the halves in the first and the remainders in the
  // second column, of attention a run in each. The hidden layer's are many, and fill one column: they pass through
  // shared memory, so that the lanes of the other columns need not hold them.
  uint4 x[PRODUCT == FC2 ? 1 : BLOCKS], tops[FROM_RUNS ? BLOCKS : 1];
  uint2 moments = {};
  const int splits = PRODUCT == OWN_OUT ? SELF_SPLITS : CROSS_SPLITS;
  constexpr int EACH = ratio(GIVERS, WARPS);
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
      from[i] = a.hidden + element;
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
      if (i * 32 + lane < BLOCKS * 4) store16(shared_address(sh.hidden[warp]) + (i * 32 + lane) * 16, units[i]);
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
        from[b] = a.stream + g * WIDTH + element;
      } else {
        tops[b] = {};
        if (inside && g < splits) missing |= 1u << b;
        if (inside) tops_missing |= 1u << b;
        from[b] = (PRODUCT == OWN_OUT ? a.own_runs : a.cross_runs) + (element / 64 * 8 + g) * 64 + element % 64;
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
          const float2* from_tops = (PRODUCT == OWN_OUT ? a.own_tops : a.cross_tops) + element / 64 * 8 + 2 * t;
          if (tops_missing >> b & 1) tops[b] = peek16(from_tops);
        }
      }
      if (moments_missing) moments = peek8(a.stats + giver);
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

  float sums[TILES][2] = {};
  float c[TILES][4] = {};
#pragma unroll
  for (int b = 0; b < BLOCKS; b++) {
    if (b >= KEEP) load_block<PRODUCT>(kept[KEEP], rows, metas, bases, b);
    const u32(&w)[HALVES][4] = kept[least(b, KEEP)];
    u32 y[4] = {};
    if (PRODUCT == FC2) {
      if (g == 0) load16(y, shared_address(sh.hidden[warp]) + b * 64 + t * 16);
    } else {
      const uint4& unit = x[PRODUCT == FC2 ? 0 : b];
      y[0] = unit.x, y[1] = unit.y, y[2] = unit.z, y[3] = unit.w;
    }
    float fresh_c[4] = {};
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      float(&into)[4] = FROM_RUNS ? fresh_c : c[tile];
      const bool both = 2 * tile + 1 < HALVES;
      const u32(&low)[4] = w[both ? 2 * tile + 1 : 2 * tile];
      multiply(into, w[2 * tile][0], both ? low[0] : 0, w[2 * tile][1], both ? low[1] : 0, y[0], y[1]);
      multiply(into, w[2 * tile][2], both ? low[2] : 0, w[2 * tile][3], both ? low[3] : 0, y[2], y[3]);
    }
    if (FROM_RUNS) {
      // Columns 2 t and 2 t + 1 are in this lane: two runs of the head that the block belongs to, each with its share.
      float top0 = 2 * t < splits ? __uint_as_float(tops[b].x) : NOTHING;
      float top1 = 2 * t + 1 < splits ? __uint_as_float(tops[b].z) : NOTHING;
      float best = fmaxf(top0, top1);
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
      float part0 = 2 * t < splits ? exp2_fast(top0 - best) * __uint_as_float(tops[b].y) : 0;
      float part1 = 2 * t + 1 < splits ? exp2_fast(top1 - best) * __uint_as_float(tops[b].w) : 0;
      float all = part0 + part1;
      all += __shfl_xor_sync(~0u, all, 1);
      all += __shfl_xor_sync(~0u, all, 2);
      const float inverse = 1.0f / fmaxf(all, 1e-30f);
      sums[0][0] += (fresh_c[0] * part0 + fresh_c[1] * part1) * inverse;
      sums[0][1] += (fresh_c[2] * part0 + fresh_c[3] * part1) * inverse;
    }
  }
  if (KEEP < BLOCKS) release<CHUNKS>(sh, taken);
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    if (FROM_RUNS) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        sums[tile][half] += __shfl_xor_sync(~0u, sums[tile][half], 1);
        sums[tile][half] += __shfl_xor_sync(~0u, sums[tile][half], 2);
      }
    } else {
      sums[tile][0] = c[tile][0] + c[tile][1], sums[tile][1] = c[tile][2] + c[tile][3];
    }
    if (t == 0) {
      sh.sums[s.parity][16 * tile + g][warp] = sums[tile][0];
      if (2 * tile + 1 < HALVES) sh.sums[s.parity][16 * tile + 8 + g][warp] = sums[tile][1];
    }
  }
  if (FROM_STREAM) {
    float sum = __uint_as_float(moments.x), squares = __uint_as_float(moments.y);
#pragma unroll
    for (int step = EACH > 16 ? 16 : EACH > 8 ? 8 : 4; step; step /= 2) {
      sum += __shfl_xor_sync(~0u, sum, step);
      squares += __shfl_xor_sync(~0u, squares, step);
    }
    if (lane == 0) sh.moments[s.parity][0][warp] = sum, sh.moments[s.parity][1][warp] = squares;
  }
  if (warp >= FINISHERS) {
    bar_arrive(1 + s.parity, THREADS);
  } else {
    bar_sync(1 + s.parity, THREADS);
    const int half = lane % 2;
    float total = 0, sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < WARPS / 8; i++) {
      const int at = 4 * (half + 2 * i);
      u32 four[4];
      load16(four, shared_address(&sh.sums[s.parity][least(row, MOST_ROWS - 1)][at]));
#pragma unroll
      for (int j = 0; j < 4; j++) total += __uint_as_float(four[j]);
      if (FROM_STREAM) {
        load16(four, shared_address(&sh.moments[s.parity][0][at]));
#pragma unroll
        for (int j = 0; j < 4; j++) sum += __uint_as_float(four[j]);
        load16(four, shared_address(&sh.moments[s.parity][1][at]));
#pragma unroll
        for (int j = 0; j < 4; j++) squares += __uint_as_float(four[j]);
      }
    }
    total += __shfl_xor_sync(~0u, total, 1);
    if (FROM_STREAM) {
      sum += __shfl_xor_sync(~0u, sum, 1);
      squares += __shfl_xor_sync(~0u, squares, 1);
      const float mean = sum / DEPTH, variance = fmaxf(squares / DEPTH - mean * mean, 0.0f);
      total = (total * GROW - mean * second) * rsqrt_fast(variance + eps) + first;
      if (PRODUCT == FC1) {
        float y = 0.5f * total * (1.0f + erff(total * 0.7071067811865476f));
        // Eight features, sixteen lanes, one unit.
        u32 pair = pack(y, __shfl_down_sync(~0u, y, 2)), tail[3];
#pragma unroll
        for (int i = 0; i < 3; i++) tail[i] = __shfl_down_sync(~0u, pair, 4 * i + 4);
        if (finishes && lane % 16 == 0) poke16(a.hidden + n, {tagged(pair, s.tag), tail[0], tail[1], tail[2]});
      } else if (PRODUCT == QUERY) {
        publish_split(a.query, WIDTH, n, total * a.scale * LOG2E, finishes, s.tag);
      } else {
        // Keys and values are attended to as the cache holds them.
        total = chunk == 0 ? total * a.scale * LOG2E : low_of(pack(total, 0));
        publish_split(a.heads, 3 * WIDTH, chunk * WIDTH + n, total, finishes, s.tag);
        if (finishes && chunk > 0 && half == 0) {
          u16* cache = (u16*)a.table[layer * POINTERS + KEYS + chunk - 1];
          cache[((long long)(n / 64) * SLOTS + s.slot) * 64 + n % 64] = (u16)pack(total, 0);
        }
      }
    } else {
      s.residual += total + first;
      if (PRODUCT != FC2 || layer < LAYERS - 1) {
        publish_stream(a, n, s.residual, second, finishes, s.stream_tag ^ 1);
      } else {
        // For the head, a kernel of its own: the stream times the gain of its layer norm, and the norm's sums.
        float x = finishes && half == 0 ? s.residual : 0, squares = x * x;
        if (finishes && half == 0) a.gained[n] = x * second;
#pragma unroll
        for (int step = 2; step < 32; step *= 2) {
          x += __shfl_xor_sync(~0u, x, step);
          squares += __shfl_xor_sync(~0u, squares, step);
        }
        if (threadIdx.x == 0 && span.count) a.last_stats[blockIdx.x] = x, a.last_stats[GIVERS + blockIdx.x] = squares;
      }
    }
  }
  s.parity ^= 1;
  if (!FROM_STREAM) s.stream_tag ^= 1;
  note(a, s);
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
  const int head = blockIdx.x % HEADS, split = blockIdx.x / HEADS;
  const Span span = keys_of(OWN, s.slot);
  const u64* p = a.table + layer * POINTERS;
  const u16* keys = (const u16*)p[OWN ? KEYS : CROSS_KEYS] + (long long)head * (OWN ? SLOTS : SOURCE) * 64;
  const u16* values = (const u16*)p[OWN ? VALUES : CROSS_VALUES] + (long long)head * (OWN ? SLOTS : SOURCE) * 64;
  u16* to = (OWN ? a.own_runs : a.cross_runs) + (head * 8 + split) * 64;
  float2* top_to = (OWN ? a.own_tops : a.cross_tops) + head * 8 + split;
  if (OWN && span.count <= 0) {
    // Nothing written yet behind the first run: say so, so that tags go on alternating.
    if (threadIdx.x < 8) poke16(to + 8 * threadIdx.x, {s.tag, 0, 0, 0});
    if (threadIdx.x == 0) poke8(top_to, {tagged(__float_as_uint(NOTHING), s.tag), 0});
    return;
  }

  // Keys as the tensor cores take them, a lane two rows of a tile; values as vectors of eight, a lane four rows.
  uint4 k[TILES][2][2], v[TILES][4];
  bool seen[TILES][2];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    const int begin = (tile * WARPS + warp) * 16;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int key = begin + 8 * half + g, at = span.first + least(key, span.count - 1);
      seen[tile][half] = key < span.count && (!OWN || a.valid[at]);
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
  if (warp > 0) {
    bar_arrive(3, THREADS);
    return;
  }
  bar_sync(3, THREADS);
  best = NOTHING;
#pragma unroll
  for (int i = 0; i < WARPS; i++) best = fmaxf(best, sh.tops[i]);
  float all[8] = {};
  total = 0;
#pragma unroll
  for (int i = 0; i < WARPS / 4; i++) {
    const int of = lane / 8 * (WARPS / 4) + i;
    const float weight = exp2_fast(sh.tops[of] - best);
    total += weight * sh.totals[of];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      u32 four[4];
      load16(four, shared_address(&sh.runs[of][lane % 8 * 8 + 4 * j]));
#pragma unroll
      for (int e = 0; e < 4; e++) all[4 * j + e] += weight * __uint_as_float(four[e]);
    }
  }
  gather(all);
  total += __shfl_xor_sync(~0u, total, 8);
  total += __shfl_xor_sync(~0u, total, 16);
  const float inverse = 1.0f / fmaxf(total, 1e-30f);
  u32 pair = pack(all[0] * inverse, all[1] * inverse), tail[3];
#pragma unroll
  for (int i = 0; i < 3; i++) tail[i] = __shfl_down_sync(~0u, pair, 8 * i + 8);
  if (lane < 8) poke16(to + 8 * lane, {tagged(pair, s.tag), tail[0], tail[1], tail[2]});
  if (lane == 0) poke8(top_to, {tagged(__float_as_uint(best), s.tag), __float_as_uint(total)});
}

// -- The kernel ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void decode(const Arguments& a, Shared& sh, u32 memory, int slot) {
  State s;
  s.memory = memory;
  s.slot = slot;
  s.parity = 0;
#ifdef MARKS
  s.mark = 0;
#endif
  // Uses of `stream` and of the other buffers, counted through the launches: the first finds the buffers zeroed.
  const u32 launches = *a.launches;
  s.stream_tag = (launches * (3 * LAYERS) + 1) & 1;
  s.tag = (launches * LAYERS + 1) & 1;
  s.residual = 0;
  if (threadIdx.x < 32) {
    const Span width = share(WIDTH, ROWS);
    const int row = threadIdx.x / 2, n = width.first + row;
    const bool finishes = row < width.count;
    float gain = 0;
    if (finishes) {
      const long long token = a.tokens[slot];
      // A row that only pads the batch may hold anything.
      const int position = most(slot - (int)*a.offset, 0);
      s.residual = widen(a.embedding[token * WIDTH + n]) + widen(a.positions[position * WIDTH + n]);
      gain = widen(a.first_gain[n]);
    }
    publish_stream(a, n, s.residual, gain, finishes, s.stream_tag);
  }
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    product<QKV>(a, s, sh, layer);
    attention<true>(a, s, sh, layer);
    product<OWN_OUT>(a, s, sh, layer);
    product<QUERY>(a, s, sh, layer);
    attention<false>(a, s, sh, layer);
    product<CROSS_OUT>(a, s, sh, layer);
    product<FC1>(a, s, sh, layer);
    product<FC2>(a, s, sh, layer);
    s.tag ^= 1;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.launches = launches + 1;
}

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1) decode_layers(Arguments a) {
  u8* memory = dynamic_shared();
  Shared& sh = *(Shared*)(memory + IN_RING * CHUNK);
  // Who has nothing to give to others leaves.
  if (share(WIDTH, ROWS).count <= 0 && share(FFN, ROWS_FFN).count <= 0) return;
  if (threadIdx.x < RINGS) {
    barrier_init(shared_address(&sh.full[threadIdx.x]), 1);
    barrier_init(shared_address(&sh.empty[threadIdx.x]), WARPS);
    barrier_fence();
  }
  __syncthreads();
  const int slot = (int)*a.length - 1;
  if (threadIdx.x >= THREADS) {
    few_registers();
    if (threadIdx.x < THREADS + 32) fetch(a, sh, shared_address(memory), slot);
  } else {
    many_registers();
    decode(a, sh, shared_address(memory), slot);
  }
}
