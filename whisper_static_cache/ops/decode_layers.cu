// All decoder layers of a one-token step, as one persistent kernel: one program to a multiprocessor. What is here is for
// one row, for which it can be several whole steps, head and choice of the token included, and what `decode_rows.cu` has
// of it for several.
//
// A layer is six products and two attentions, each of which needs the whole result of the one before. As kernels of
// their own they drain and fill the machine eight times a layer. Here the programs stay, and hand each other their
// results through the L2 cache: every word of a result carries in its lowest bit whether it is this use of its buffer
// or the last one's, so that who reads the word knows from it alone whether the value is there, without a flag, a
// fence or a barrier of the whole machine. Meanwhile a warp of each program streams weights, which depend on nothing,
// into shared memory, several products ahead; low-bit ones are unpacked while the program would only wait.
//
// Products of 16-bit weights run on the tensor cores: a tile of the weight, eight columns of activations. One row of a
// batch needs one column; the others hold what single half-precision numbers cannot, the remainders of the activations.
// Packed weights are multiplied as the integers that they are, by activations made integers of 15 bits, exactly, and
// without the tensor cores: a kernel that does nothing with these has a clock a sixth faster. Scales are applied to the
// sums. (For several rows packed weights are made halves, and columns are rows.)
//
// Built by NVRTC without headers. Constants that the launcher defines:
//   WIDTH, FFN, HEADS (of 64), LAYERS, SLOTS, SOURCE (keys of cross-attention), BATCH (rows), BEAMS (of these that share
//   an input's cross-attention), VOCAB (rows of the head's weight, or 0 where the head is another kernel's, as it is for
//   several rows), HEAD_BITS (of that weight: 16, 8 or 4), HEAD_GROUP (of its quantisation), CHOOSES (1 if, with the head, it
//   also chooses tokens, several steps to a launch), CROSS8 (1 if cross-attention's keys and values are int8), CROSS_SPLITS
//   (programs to a head where there is one row, at most 8), BF16 (0 or 1), BITS (16, 8, 4, 3, 2, or 158 for 1.58), GROUP (of
//   the quantisation), PROGRAMS, MEMORY (bytes of shared memory), PACE (bytes a cycle that a program asks for, at most,
//   where there is one row).
//
// Why every buffer can be used again without being cleared: a program that writes the next result into a buffer holds
// values that depend on every reader's having read the last one; who gives nothing that others wait for reads nothing.
// Layer by layer: all of `stream` was read before any query, key or value of the layer could be published, all of those
// before all heads' runs, all of these before the next `stream`, and so on around the layer and from step to step: all bests
// were read before all of the next step's embedding was published. Of a program's warps one may read late what the others
// have left behind them: none of them skips a use of what it reads.

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
__device__ __forceinline__ u32 peek4(const void* p) {
  u32 a;
  asm volatile("ld.relaxed.gpu.global.u32 %0,[%1];" : "=r"(a) : "l"(p) : "memory");
  return a;
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
// What is read once a step is more than the L2 cache holds, and should leave it to all else; some of it, `kept`, is to stay
// there until the next step.
__device__ __forceinline__ void copy_async(u32 to, const void* from, u32 bytes, u32 barrier, bool kept = false) {
  u64 policy;
  if (kept)
    asm("createpolicy.fractional.L2::evict_last.b64 %0,1.0;" : "=l"(policy));
  else
    asm("createpolicy.fractional.L2::evict_first.b64 %0,1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0],[%1],%2,[%3],%4;"
               ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}
// Whether this is the one lane of a warp that copies: of any other way to choose it the compiler does not know that it
// chooses one, and makes a loop over all lanes of every copy.
__device__ __forceinline__ bool elected() {
  u32 one;
  asm volatile("{.reg .pred p; elect.sync _|p,0xFFFFFFFF; selp.u32 %0,1,0,p;}" : "=r"(one));
  return one;
}
// Which thread and program this is, asked for anew wherever it is used: the compiler would compute all that follows
// from it once for all layers, have no registers for so much, and load it from memory time and again.
__device__ __forceinline__ u32 thread() {
  u32 t;
  asm volatile("mov.u32 %0,%%tid.x;" : "=r"(t));
  return t;
}
__device__ __forceinline__ u32 cycles() {
  u32 c;
  asm volatile("mov.u32 %0,%%clock;" : "=r"(c)::"memory");
  return c;
}
__device__ __forceinline__ int program() {
  int p;
  asm volatile("mov.u32 %0,%%ctaid.x;" : "=r"(p));
  return p;
}
// Into the L2 cache.
__device__ __forceinline__ void prefetch(const void* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0],%1;" ::"l"(from), "r"(bytes) : "memory");
}
// All that this thread has written, and all that it knows others to have, is seen by whoever knows of what comes behind it;
// and by copies that are made behind it.
__device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
// A write to nowhere fails as surely as a trap, at which the compiler would give up on `many_registers`.
__device__ __forceinline__ void trap() { asm volatile("st.global.u32 [%0],%1;" ::"l"(0ull), "r"(0) : "memory"); }
// Warps that fetch and finish need few registers, the others many: an even share would not hold a product's weights.
__device__ __forceinline__ void few_registers() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
#endif
}
__device__ __forceinline__ void many_registers() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  // All warps together have no more than the launch gave them, 3 * 168 to a scheduler.
  asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
#endif
}
// A pointer, a place in shared memory or a value is computed here, and not where it is used.
template <class T>
__device__ __forceinline__ void settle(T*& p) { asm volatile("" : "+l"(p)); }
__device__ __forceinline__ void settle(u32& place) { asm volatile("" : "+r"(place)); }
__device__ __forceinline__ void settle(float& value) { asm volatile("" : "+f"(value)); }
// What stands in front of it has been issued when what stands behind it is: the compiler keeps loads on their sides of a
// loop, which this is for all that it knows, though no tag ever enters it.
__device__ __forceinline__ void keep_order(u32 tag) {
  __syncwarp();
  while (tag > 1) asm volatile("" ::: "memory");
}
// A tag that is known only when `word` has been loaded: the compiler would have answers checked, and waited for, in front
// of loads that could be under way meanwhile.
__device__ __forceinline__ u32 tag_behind(u32 tag, u32 word) {
  u32 bits;
  asm volatile("popc.b32 %0,%1;" : "=r"(bits) : "r"(word));
  return tag + (bits >> 6);
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rsqrt_fast(float x) { return rsqrtf(x); }
__device__ __forceinline__ u32 byte_permute(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
// a & b | c, of which the compiler makes two instructions where both b and c are constants.
__device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0,%1,%2,%3,0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

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
// c plus two signed 16-bit integers of x times the first two bytes of q, or the last two: bytes without a sign, or with one.
#define DOT(name, bytes, type)                                                                      \
  __device__ __forceinline__ int name(u32 x, u32 q, int c) {                                        \
    int d;                                                                                          \
    asm("dp2a." bytes ".s32." type " %0,%1,%2,%3;" : "=r"(d) : "r"(x), "r"(q), "r"(c));             \
    return d;                                                                                       \
  }
DOT(dot_low, "lo", "u32")
DOT(dot_high, "hi", "u32")
DOT(dot_low_signed, "lo", "s32")
DOT(dot_high_signed, "hi", "s32")
#undef DOT
__device__ __forceinline__ u32 largest_of_warp(u32 x) {
  u32 y;
  asm("redux.sync.max.u32 %0,%1,0xFFFFFFFF;" : "=r"(y) : "r"(x));
  return y;
}
__device__ __forceinline__ u32 larger_of_pairs(u32 a, u32 b) {
  u32 c;
  asm("max.u16x2 %0,%1,%2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
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
// The same in float16, whatever halves are.
__device__ __forceinline__ u32 pack_f16(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ float widen_f16(u16 x) {
  float y;
  asm("cvt.f32.f16 %0,%1;" : "=f"(y) : "h"(x));
  return y;
}
__device__ __forceinline__ u32 half_fma(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn." HALF "x2 %0,%1,%2,%3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

#else
#define thread() ((u32)threadIdx.x)
template <class T>
inline void settle(T&) {}
inline u32 tag_behind(u32 tag, u32) { return tag; }
inline void keep_order(u32) {}
inline void fence() {}
inline void fence_copies() {}
#define program() ((int)blockIdx.x)
#define elected() (threadIdx.x % 32 == 0)
inline u32 cycles() { return (u32)nanoseconds(); }
inline u32 largest_of_warp(u32 x) {
  for (int step = 1; step < 32; step *= 2) {
    const u32 other = __shfl_xor_sync(~0u, x, step);
    x = x > other ? x : other;
  }
  return x;
}
inline u32 larger_of_pairs(u32 a, u32 b) {
  const u32 low = (a & 0xFFFF) > (b & 0xFFFF) ? a : b, high = a >> 16 > b >> 16 ? a : b;
  return (low & 0xFFFF) | (high & 0xFFFF0000);
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
__device__ __forceinline__ void load_words(u32 (&r)[2], const u8* at) { load8(r, at); }
__device__ __forceinline__ void load_words(u32 (&r)[4], const u8* at) { load16(r, at); }
// Floats in the order of unsigned integers: of those with a sign all bits differ.
__device__ __forceinline__ float largest_float_of_warp(float x) {
  const u32 bits = __float_as_uint(x), y = largest_of_warp(bits ^ ((int)bits < 0 ? ~0u : 0x80000000u));
  return __uint_as_float(y ^ ((int)y < 0 ? 0x80000000u : ~0u));
}
__device__ __forceinline__ float low_of(u32 pair) { return widen((u16)pair); }
__device__ __forceinline__ float high_of(u32 pair) { return widen((u16)(pair >> 16)); }

__device__ __forceinline__ u32 tagged(u32 word, u32 tag) { return (word & ~1u) | tag; }

// -- The shape of the work -----------------------------------------------------------------------------------------

static_assert(LAYERS % 2 == 0, "tags would differ from launch to launch");
constexpr float NOTHING = -1e30f, LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float SHRINK = 1.0f / 16, GROW = 16.0f;  // Keeps activations times gains far from float16's largest number.
constexpr int WARPS = 8;
// Warps that multiply, one that fetches, and those that finish what is multiplied, sixteen features each. With several
// rows the first finish, too, and the last leave their registers to them.
constexpr int FETCHER = WARPS, FIRST_FINISHER = WARPS + 1, FINISHERS = 3, THREADS = 32 * (WARPS + 4);

constexpr int up(int n, int to) { return (n + to - 1) / to * to; }
constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr int most(int a, int b) { return a > b ? a : b; }
constexpr int ratio(int a, int b) { return (a + b - 1) / b; }

// Output features of a program: pairs of them stay together, of the feed-forward layer eight.
constexpr int ROWS = up(ratio(WIDTH, PROGRAMS), 2), ROWS_FFN = up(ratio(FFN, PROGRAMS), 8);
constexpr int GIVERS = ratio(WIDTH, ROWS);  // Programs that have some of `WIDTH` features.
static_assert(ratio(FFN, ROWS_FFN) <= GIVERS, "");
constexpr int STATS = up(GIVERS, 2);        // Of several rows their moments are read two at a time.
static_assert(ROWS <= 16, "");
#if BATCH == 1
static_assert(HEADS * CROSS_SPLITS <= GIVERS && CROSS_SPLITS <= 8, "");
#endif

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

// What is fetched at a time, a chunk: ROWS rows, for FFN elements a part of each that has `PART` turns of the warps; or
// so many keys of cross-attention with their values. Chunks are few and large, a quarter of a program's keys at least,
// as it is for each of them that the fetching warp takes its time.
constexpr bool PARTED = BITS == 16 || BITS == 8 || BITS == 4;
constexpr int turns(int depth) { return ratio(runs(depth), WARPS); }
constexpr int groups(int depth) { return BITS == 16 ? 0 : depth / GROUP; }
constexpr int CROSS_RUN = ratio(SOURCE, CROSS_SPLITS);
// Of several rows there are many keys, which come by 64 at least. One row's in 8 bits come by halves, of which one is as large
// as a quarter in 16 bits; behind keys and values lie the scales of both, from the multiple of 16 bytes at or below the first on.
constexpr bool BYTE_KEYS = BATCH == 1 && CROSS8;
constexpr int KEYS_PIECE = up(ratio(CROSS_RUN, BYTE_KEYS ? 2 : 4), 8);
constexpr int scales_of(int keys) { return BYTE_KEYS ? 2 * keys + 16 : 0; }
constexpr int bytes_of_keys(int keys) { return BYTE_KEYS ? 2 * (64 * keys + scales_of(keys)) : 256 * keys; }
constexpr int KEYS_AT_LEAST = BATCH > 1 ? 256 * 64 : bytes_of_keys(KEYS_PIECE);
constexpr int ROW_AT_LEAST = most(row_bytes(WIDTH), KEYS_AT_LEAST / ROWS - 5 * groups(FFN));
// Rows in shared memory lie so that lanes served together meet different banks: two rows of 64 bytes, four of 32.
constexpr int stride_of(int bytes) { return BITS == 16 ? up(bytes + 64, 128) - 64 : up(bytes + 96, 128) - 96; }
// Behind the rows: scales, zero points, two vectors, each from the multiple of 16 bytes at or below its first element.
// Those of the second feed-forward product lie a little further apart where a row of them is a multiple of 64 bytes:
// four or eight rows would meet the same bank. (One row's lanes have few rows of these at a time.)
constexpr bool APART = BATCH > 1 && BITS != 16 && groups(FFN) * 2 % 64 == 0;
constexpr int meta_stride(int depth) { return groups(depth) * 2 + (depth == FFN && APART ? 16 : 0); }
constexpr int meta_bytes(int depth) { return BITS == 16 ? 0 : up(ROWS * meta_stride(depth), 16) + 16; }
constexpr int vector_bytes = up(ROWS * 4, 16) + 16;
constexpr int behind_rows(int depth) { return 2 * meta_bytes(depth) + 2 * vector_bytes; }

// Of a product with `WIDTH` elements a warp takes `OWN` runs. Those that are left over, fewer than there are warps, are
// shared: packed ones, and those of several rows, by their blocks, which are dealt to the warps one after another; in 16
// bits and for one row each by `SHARERS` warps, of which one takes the first eight rows, the next the second, and so on
// around.
constexpr int OWN = runs(WIDTH) / WARPS, LEFT = runs(WIDTH) % WARPS, SHARERS = LEFT ? WARPS / LEFT : 1;
// Two runs of packed weights that have a group in common go to one warp, one behind the other.
constexpr bool fuses(int depth) {
  return BITS != 16 && BITS != 158 && GROUP % 64 == 0 && plane(depth) % 64 == 0 && runs(depth) / WARPS % 2 == 0;
}
constexpr int FUSED = BATCH == 1 && fuses(WIDTH) ? 2 : 1;
constexpr int OWN_BLOCKS = OWN * DIGITS, LATE = ratio(LEFT * DIGITS, WARPS), OF_WARP = OWN_BLOCKS + LATE;
constexpr int HIDDEN_BLOCKS = turns(FFN) * DIGITS;

// Where all of a layer's weights and keys fit into shared memory, each step has a home of its own there, which its next
// layer's fill as soon as they have been read. Where only some do, steps half a layer apart have one in common. Else chunks
// follow each other around a ring.
constexpr int FFN_CHUNKS = ratio(ROWS_FFN, ROWS);
// Packed rows come there by twos, or all together, as a copy takes some sixty cycles however short it is: lanes served
// together have rows of four twos, which meet different banks.
constexpr bool BY_TWOS = BATCH == 1 && BITS != 16;
constexpr int TWO_ROWS = up(2 * row_bytes(WIDTH) + 96, 128) - 96;
constexpr int ROWS_AT_HOME = BY_TWOS ? ROWS / 2 * TWO_ROWS : ROWS * stride_of(row_bytes(WIDTH));
constexpr int HOME = up(ROWS_AT_HOME + behind_rows(WIDTH), 128);
constexpr int KEYS_HOME = up(ratio(CROSS_RUN, KEYS_PIECE) * bytes_of_keys(KEYS_PIECE), 128);
constexpr int HIDDEN_STRIDE = BY_TWOS ? row_bytes(FFN) : stride_of(row_bytes(FFN));
constexpr int HIDDEN_HOME = up(ROWS * HIDDEN_STRIDE + behind_rows(FFN), 128);
// Self-attention is split where one program's keys end: as many as all warps take at once.
constexpr int SELF_RUN = 16 * WARPS, SELF_SPLITS = ratio(SLOTS, SELF_RUN), OWN_KEYS = least(SELF_RUN, up(SLOTS, 8));
// What is fetched there at a time: of the second feed-forward product's rows, one piece of memory, so many bytes. Less would
// take the fetching warp longer, more stand in front of others.
constexpr int AT_ONCE = 12800;
constexpr int PARTS_AT_HOME = BY_TWOS ? ratio(ROWS * row_bytes(FFN), AT_ONCE) : 1;
constexpr int PIECES_AT_HOME = 7 + ratio(CROSS_RUN, KEYS_PIECE) + FFN_CHUNKS + PARTS_AT_HOME;
constexpr int ALL_HOMES = (6 + FFN_CHUNKS) * HOME + KEYS_HOME + HIDDEN_HOME + OWN_KEYS * 256;
// Of a packed head: lanes to a row, each of which takes sixteen bytes at a time, and rows that a warp has at once; as many sums of
// lanes as a warp keeps until it adds them up.
constexpr int HEAD_LANES = HEAD_BITS == 16 ? 32 : HEAD_BITS == 8 ? 16 : 8, HEAD_AT_ONCE = 32 / HEAD_LANES, MOST_PARTS = 6;
constexpr int OF_HEAD = VOCAB && HEAD_BITS != 16 ? 2 * WIDTH + WIDTH / 2 + WARPS * MOST_PARTS * 128 : 4 * WIDTH;
// What is for `Shared` at most: activations or attention's runs, sums of them, sums, what there is of each layer, slot and
// chunk, and the rest.
constexpr int BESIDE = most(most(WARPS * 64 * most(HIDDEN_BLOCKS, OF_WARP * (BITS == 16 ? 2 : 1)), OF_HEAD), WARPS * 560) +
                       (BITS == 16 ? 0 : WARPS * 16 * up(most(HIDDEN_BLOCKS, OF_WARP), 4)) +
                       64 * up(most(3, FFN_CHUNKS) * ROWS, 16) + 52 * LAYERS + up(SLOTS, 16) + 48 * PIECES_AT_HOME + 3448 +
                       32 * BYTE_KEYS;
// How many of the pairs `OUT_PAIR`, `DEEP_PAIR` and `QUERY_PAIR` have a home in common: the outputs of the two attentions, the
// second feed-forward product and the keys of cross-attention, the query and the first feed-forward product.
enum { OUT_PAIR = 1, DEEP_PAIR, QUERY_PAIR };
constexpr int saved(int pairs) {
  return pairs * HOME - (pairs >= DEEP_PAIR ? HOME - least(KEYS_HOME, HIDDEN_HOME) : 0);
}
constexpr int pairs_for(int room) {
  int pairs = 0;
  while (pairs < QUERY_PAIR && ALL_HOMES - saved(pairs) > room) pairs++;
  return pairs;
}
constexpr int PAIRS = pairs_for(MEMORY - BESIDE), HOMES = ALL_HOMES - saved(PAIRS);
// All of a product's scales are to follow each other there.
constexpr bool AT_HOME = BATCH == 1 && ROWS * meta_stride(WIDTH) % 16 == 0 && HOMES + BESIDE <= MEMORY;
constexpr int PART = PARTED && !AT_HOME ? most(ROW_AT_LEAST / (WARPS * RUN_BYTES), 1) : turns(FFN);
constexpr int parts(int depth) { return depth == WIDTH ? 1 : ratio(turns(depth), PART); }
constexpr int part_bytes(int depth) { return parts(depth) == 1 ? row_bytes(depth) : PART * WARPS * RUN_BYTES; }
constexpr int stride(int depth) { return AT_HOME && depth == FFN ? HIDDEN_STRIDE : stride_of(part_bytes(depth)); }
static_assert(stride(WIDTH) >= part_bytes(WIDTH) && stride(FFN) >= part_bytes(FFN), "");
constexpr int scales_at(int depth) { return ROWS * stride(depth); }
constexpr int vectors_at(int depth) { return scales_at(depth) + 2 * meta_bytes(depth); }
constexpr int chunk_bytes(int depth) { return vectors_at(depth) + 2 * vector_bytes; }
// At home the rows of a product's chunks follow each other, then their scales, their zero points, and their vectors.
constexpr int ROWS_OF_CHUNK = AT_HOME ? ROWS_AT_HOME : ROWS * stride(WIDTH);

constexpr int CHUNK = AT_HOME ? HOME : up(most(most(chunk_bytes(WIDTH), chunk_bytes(FFN)), KEYS_AT_LEAST), 128);
#if BATCH == 1
// Keys, with their values, of a chunk of self-attention or of cross-attention, and how many chunks there are at most.
constexpr int chunk_keys(bool own) {
  return !own && (AT_HOME || BYTE_KEYS) ? KEYS_PIECE : AT_HOME ? OWN_KEYS : CHUNK / 256 / 8 * 8;
}
constexpr int KEY_CHUNKS = ratio(CROSS_RUN, chunk_keys(false)), OWN_CHUNKS = ratio(OWN_KEYS, chunk_keys(true));
#else
constexpr int KEY_CHUNKS = 1, OWN_CHUNKS = 1;
#endif
constexpr int MOST_ROWS = up(most(3 * ROWS, FFN_CHUNKS * ROWS), 16);

// What is done for a layer, in this order.
enum { QKV, OWN_ATTENTION, OWN_OUT, QUERY, CROSS_ATTENTION, CROSS_OUT, FC1, FC2, STEPS };
constexpr bool is_attention(int step) { return step == OWN_ATTENTION || step == CROSS_ATTENTION; }
constexpr int chunks_of(int product) {
  return product == QKV ? 3 : product == FC1 ? FFN_CHUNKS : product == FC2 ? parts(FFN) : 1;
}
constexpr int row_chunks(int product) { return product == FC2 ? 1 : chunks_of(product); }
constexpr int finishers(int product) { return ratio(row_chunks(product) * ROWS, 16); }
// Of more output features than `WIDTH`.
constexpr bool is_large(int product) { return product == QKV || product == FC1; }
constexpr bool from_stream(int product) { return product == QKV || product == QUERY || product == FC1; }

// A layer's device pointers, in the order of the launcher's table.
enum {
  WEIGHTS, SCALES = WEIGHTS + 8, ZEROS = SCALES + 8,  // query, key, value, output; cross query, output; fc1, fc2.
  CONSTANT = ZEROS + 8, FOLDED = CONSTANT + 3,        // Of the products behind a layer norm, float32.
  BIAS = FOLDED + 3, GAIN = BIAS + 3,                 // Of the others, and the gain of the layer norm behind.
  KEYS = GAIN + 3, VALUES, CROSS_KEYS, CROSS_VALUES, CROSS_SCALES, POINTERS = CROSS_SCALES + 2 * CROSS8
};
constexpr int weight_of(int product) { return product == QKV ? 0 : product < CROSS_ATTENTION ? product + 1 : product; }
constexpr int norm_of(int product) { return product < QUERY ? 0 : product < FC1 ? 1 : 2; }
constexpr int side_of(int product) { return from_stream(product) ? 0 : 1; }  // Sums alternate.
// Whether a step shares its home with the one three steps before or behind it, its pair.
constexpr bool pairs(int step) {
  return AT_HOME && step > OWN_ATTENTION &&
         PAIRS >= (step % 3 == OWN_OUT % 3 ? OUT_PAIR : step % 3 == FC2 % 3 ? DEEP_PAIR : QUERY_PAIR);
}
constexpr int paired(int step) { return step < CROSS_OUT ? step + 3 : step - 3; }
constexpr int home_of(int step) {
  constexpr int KEYS_AT = (pairs(QUERY) ? 4 : 5) * HOME;
  constexpr int BEHIND_KEYS = KEYS_AT + (pairs(FC2) ? most(KEYS_HOME, HIDDEN_HOME) : KEYS_HOME);
  constexpr int FC1_AT = BEHIND_KEYS + (pairs(CROSS_OUT) ? 0 : HOME), BEHIND_FC1 = FC1_AT + FFN_CHUNKS * HOME;
  return step == QKV ? 0 : step == OWN_OUT ? 3 * HOME : step == QUERY ? (pairs(QUERY) ? FC1_AT : 4 * HOME) :
         step == CROSS_ATTENTION ? KEYS_AT : step == CROSS_OUT ? (pairs(CROSS_OUT) ? 3 * HOME : BEHIND_KEYS) :
         step == FC1 ? FC1_AT : step == FC2 ? (pairs(FC2) ? KEYS_AT : BEHIND_FC1) : BEHIND_FC1 + (pairs(FC2) ? 0 : HIDDEN_HOME);
}

// From a chunk's rows to their scales or zero points, and to its vectors. At home those of the first feed-forward product
// are of all its chunks.
constexpr bool together(int product) { return AT_HOME && product == FC1; }
constexpr int apart_of_vectors(int product) { return together(product) ? FFN_CHUNKS * vector_bytes : vector_bytes; }
constexpr int metas_behind(int product, int chunk, bool zeros) {
  if (product == FC2) return scales_at(FFN) + zeros * meta_bytes(FFN);
  if (!AT_HOME) return scales_at(WIDTH) + zeros * meta_bytes(WIDTH);
  const int chunks = chunks_of(product);
  return (chunks - chunk) * ROWS_OF_CHUNK + (chunk + zeros * chunks) * ROWS * meta_stride(WIDTH);
}
constexpr int vectors_behind(int product, int chunk) {
  if (product == FC2) return vectors_at(FFN);
  if (!AT_HOME) return vectors_at(WIDTH);
  return metas_behind(product, 0, true) - chunk * ROWS_OF_CHUNK + chunks_of(product) * ROWS * meta_stride(WIDTH) +
         chunk * 2 * vector_bytes;
}

// Whether this program gives anything of a product with the stream. Who does not must not wait for the stream: nobody
// waits for him, and the next stream may come before he has read this one.
__device__ __forceinline__ bool gives(int step) {
  return ratio(FFN, ROWS_FFN) == GIVERS || step != FC1 || program() < ratio(FFN, ROWS_FFN);
}

#if BATCH == 1
static_assert(HEADS * SELF_SPLITS <= GIVERS && SELF_SPLITS <= 8 && (CROSS_SPLITS - 1) * CROSS_RUN < SOURCE, "");
#endif
// Pieces of the head's weight that shared memory has room for at a time, at most.
constexpr int MOST_PIECES = VOCAB ? 12 : 0;

constexpr int RINGS = AT_HOME ? STEPS : 32;  // Barriers: of steps, or of chunks around a ring, at most.
// On their way at a time, or a chunk at least. For two to four rows less is faster, as long as the weights are large.
constexpr bool SOME_ROWS = BATCH > 1 && BATCH <= 4 && BITS == 16;
// For one in 16 bits two chunks are, if they are large.
constexpr bool ONE_ROW = BATCH == 1 && BITS == 16;
constexpr int FLIGHT_BYTES = (SOME_ROWS ? 28 : ONE_ROW ? 36 : BITS == 8 || BITS == 16 ? 56 : 42) * 1024;
static_assert(BATCH > 1 || finishers(QKV) <= FINISHERS && finishers(FC1) <= FINISHERS, "");
// Named barriers: one for each product and attention, of those that multiply with those that finish; one for the way
// back; and, for one row, one for each layer norm's moments, one for the last layer's result, one for the choice of a
// token, and one for its being known.
enum { WRITTEN, TABLES, STEP_DONE, PUBLISHED = STEP_DONE + STEPS, MOMENTS, RESULT = MOMENTS + 3, READY, CHOICE = TABLES };
// Eights of rows of the larger product, and lines of rows.
constexpr int MOST_EIGHTS = ratio(most(3, FFN_CHUNKS) * ROWS, 8), LINES = AT_HOME ? 0 : 2 * 8 * MOST_EIGHTS + 16;
#if BATCH > 1
// Rows in eights: columns of products. Sums of so many columns lie so that those of four pairs of features do not meet
// the same banks.
constexpr int COLUMNS = up(BATCH, 8), EIGHTS = COLUMNS / 8, SUMS = COLUMNS + 4, SUM_ROWS = most(3, FFN_CHUNKS) * ROWS;
// Attention is over items, one head of one row, whose keys, one after another, these programs have equal shares of: an
// item's in four programs at most, and a program's of so many items.
constexpr int ITEMS = BATCH * HEADS, ATTENDERS = least(most(GIVERS, ratio(FFN, ROWS_FFN)), 3 * ITEMS);
constexpr int RUNS = ratio(ATTENDERS, ITEMS) + 1, SEGMENTS = ratio(ITEMS, ATTENDERS) + 1;
struct Shared {
  alignas(16) float sums[WARPS][SUM_ROWS][SUMS];
  alignas(16) float runs[SEGMENTS][WARPS][64 + 4];
  alignas(16) float tops[SEGMENTS][WARPS], totals[SEGMENTS][WARPS], queries[SEGMENTS][64];
  alignas(16) float2 moments[WARPS][COLUMNS];
  u64 caches[LAYERS][2];
  float eps[LAYERS][3];
  u8 valid[BATCH][SLOTS];
  alignas(8) u64 full[RINGS], empty[RINGS];
};
#else
// The likeliest of some tokens, the first one if several are, and the sum of all their likelihoods beside its own.
struct Best {
  float score = __int_as_float(0xFF800000), total = 0;
  u32 token = 0xFFFF;

  static __device__ __forceinline__ float beside(float score, float top) {
    return exp2_fast((score - fmaxf(top, NOTHING)) * LOG2E);
  }
  __device__ __forceinline__ void add(float other, u32 of) {
    const bool better = other > score;
    const float top = better ? other : score;
    total = total * beside(score, top) + beside(other, top);
    score = top, token = better ? of : token;
  }
};
// The best of all that the lanes of a warp have: every lane gets the same, to the last bit.
template <int EACH>
__device__ __forceinline__ Best best_of_warp(const Best (&some)[EACH]) {
  Best best;
#pragma unroll
  for (int i = 0; i < EACH; i++) best.score = fmaxf(best.score, some[i].score);
  best.score = largest_float_of_warp(best.score);
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    best.total += some[i].total * Best::beside(some[i].score, best.score);
    if (some[i].score == best.score && some[i].token < best.token) best.token = some[i].token;
  }
  best.token = ~largest_of_warp(~best.token);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) best.total += __shfl_xor_sync(~0u, best.total, step);
  return best;
}
// Which tokens may be chosen: text from one on, and timestamps, which begin with another, from a third on; none that a bit of
// `forbidden` marks in the table.
struct Allowed {
  int text, begin, stamps, forbidden, none;
};
// What the first finishing warp knows of the tokens so far: registers are for what each layer needs.
struct History {
  int newest_at, newest;  // The last timestamp, and where it stands, or -1.
  int before;             // Whether there is one at the last token but one.
  int unfinished;
  u32 tag;                // The one that no word of `choices` has before this step.
  long long steps;        // That chose a token, in all launches.
};
// The numbers of `decode_tokens.Rules`.
enum { MIN_LENGTH, END_COUNT, PAD, PROMPT_LENGTH, BEGIN_INDEX, TIMESTAMP_BEGIN, NO_TIMESTAMPS, TEXT_END, DETECT, RULES };
constexpr int MOST_ENDS = 16;
// The copies of a piece of what is fetched, which are the same in every layer but for the layer's pointers. Rows are copied one by
// one, by twos or all together; scales and zero points, and two vectors, or keys and values, from the multiple of 16 bytes at or
// below their first one on. In bytes.
struct alignas(16) Plan {
  u32 rows, metas, vectors, expected;            // Where they begin behind their pointers; what the barrier is told of.
  u16 row_size, meta_size, vector_size, lasts;   // Of each copy; cycles until more may be asked for.
  u16 to_scales, to_zeros, to_first, to_second;  // Where they go, behind the piece's place; in sixteens of bytes.
  u32 place, pointers, about;                    // At home; which pointers, six bits each; below.
  u16 apart, to_apart;                           // From rows to the next ones, there and here.
};
// About a piece: how many copies of rows there are, its step, whose barrier says that there is room, and these. In a pass over a
// layer only some pieces are fetched: the first product's, those of the layer before, others, or of these several.
enum {
  ABOUT_STEP = 8, ABOUT_ROOM = 12,
  OPENS = 1 << 16,     // The first piece of its step waits for the room of all.
  ARRIVES = 1 << 17,   // At its step's barrier.
  TURNED = 1 << 18,    // The room is made in the same layer, not in the one before.
  LAGS = 1 << 19, OF_FIRST = 1 << 20, OF_OTHERS = 1 << 21
};
constexpr int pieces_of(int step) {
  return step == OWN_ATTENTION ? OWN_CHUNKS : step == CROSS_ATTENTION ? KEY_CHUNKS :
         step == FC2 && AT_HOME ? PARTS_AT_HOME : chunks_of(step);
}
constexpr int PIECES_OF_LAYER = 6 + OWN_CHUNKS + KEY_CHUNKS + FFN_CHUNKS + pieces_of(FC2);
// What of a layer is fetched in which order: a letter is one piece of its step, the last one all that are left, small where it is
// of the layer before; there may be fewer pieces than letters. In a ring it is the order of the steps. Where two steps have a home
// in common, either's turn comes when the other has made room, the later one's in the next layer. Else it is free, but for what
// would wait for itself. What comes together stands in the way of the words that are waited for: but for the first two, and 8 and
// 16 bits without pairs, these are the best that a search found for large-v2 on an H100 (benchmarks/NOTES.md).
constexpr char LETTERS[] = "QSOUKCFD";  // Of the steps.
constexpr const char* letters_in_order() {
  if (!AT_HOME) return LETTERS;
  if (PAIRS == 1) return "QScUKOKKFKD";
  if (PAIRS == 2) return "QScUdOFK";
  if (PAIRS == 3) return "QQffdcffdddSQUOK";
  if (BYTE_KEYS)
    return BITS == 158 || BITS == 2 ? "UfSQKQOQFFKCFD" : BITS == 3 ? "QdSUQfKCOQFKD" : BITS == 4 ? "dOSQKCQdQKUF" : "QSOUKCKFD";
  return BITS == 158 ? "kkfdOfQQfSQCKUKF" : BITS == 2 ? "QkfUQKSCOKQKFD" : BITS == 3 ? "fOfQfQSdQKCUKFKD" :
         BITS == 4 ? "OQUSQKCKQKFDFFKFDF" : "QSOUKCKKFKD";
}
// Four bits a piece: its step, and whether that is of the layer before.
constexpr u64 order(const char* letters, int half) {
  u64 found[2] = {};
  int count = 0, taken[STEPS] = {};
  for (int i = 0; letters[i]; i++) {
    const bool lags = letters[i] >= 'a';
    int step = 0;
    while ((LETTERS[step] ^ letters[i]) & 31) step++;
    int pieces = pieces_of(step) - taken[step];
    for (int behind = i + 1; letters[behind]; behind++)
      if (((letters[behind] ^ letters[i]) & 31) == 0) pieces = least(pieces, 1);
    for (int piece = 0; piece < pieces; piece++, count++) found[count / 16] |= (u64)(step | lags << 3) << count % 16 * 4;
    taken[step] += pieces;
  }
  return found[half];
}
// Whether a few layers come to their end: whatever a piece waits for has been fetched in front of it.
constexpr bool ends(const char* letters) {
  const u64 halves[2] = {order(letters, 0), order(letters, 1)};
  int fetched[3][STEPS] = {{chunks_of(QKV)}};
  for (int pass = 0; pass <= 3; pass++)
    for (int piece = 0; piece < PIECES_OF_LAYER; piece++) {
      const int ordered = halves[piece / 16] >> piece % 16 * 4 & 0xF, step = ordered & 7, layer = pass - (ordered >> 3);
      if (layer < 0 || layer == 3 || pass == 0 && step == QKV) continue;
      const int reader = pairs(step) ? paired(step) : step, of_layer = layer - (step <= reader);
      for (int i = 0; fetched[layer][step] == 0 && i <= of_layer * STEPS + reader; i++)
        if (fetched[i / STEPS][i % STEPS] < pieces_of(i % STEPS)) return false;
      fetched[layer][step]++;
    }
  for (int i = 0; i < 3 * STEPS; i++)
    if (fetched[i / STEPS][i % STEPS] != pieces_of(i % STEPS)) return false;
  return true;
}
static_assert(PIECES_OF_LAYER <= 32 && ends(letters_in_order()), "not all is fetched, or something waits for itself");
constexpr u64 ORDER = order(letters_in_order(), 0), ORDER_BEHIND = order(letters_in_order(), 1);
constexpr bool SOME_LAG = ((ORDER | ORDER_BEHIND) & 0x8888888888888888) != 0;
struct Shared {
  // Of a pair of rows the sums of four warps, in this order: the first row's, of the first warps and of the others, the
  // second row's. Lanes that finish pairs of rows read vectors side by side.
  alignas(16) float sums[2][4][MOST_ROWS / 2][4];
  union {
    struct {
      alignas(16) float runs[WARPS][64 + 4], queries[WARPS][64 + 8];  // Of these the second half lies four further.
    };
    // A warp's activations on their way to the lanes that multiply them: blocks of the hidden layer; of the stream and
    // of attention's result each block's halves and their remainders. For packed weights they are integers.
    alignas(16) u16 hidden[WARPS][HIDDEN_BLOCKS][32];
    alignas(16) u16 staged[WARPS][OF_WARP][BITS == 16 ? 2 : 1][32];
    alignas(16) float4 result[VOCAB && HEAD_BITS == 16 ? WIDTH / 4 : 1];  // Of the last layer.
#if HEAD_BITS != 16
    // For packed weights times the last layer norm's gain, as integers: of every sixteen the first eight and the others, what
    // they are worth and what zero points are. And sums of lanes.
    struct {
      alignas(16) u16 integers[2][WIDTH / 16][8];
      float2 sixteens[WIDTH / 16];
      alignas(16) float parts[WARPS][MOST_PARTS][32];
    };
#endif
  };
  alignas(16) float tops[WARPS], totals[WARPS];
  alignas(16) float2 moments[WARPS][32];  // Of what each lane has of the stream.
  alignas(8) uint2 lines[most(LINES, 1)];
#if BITS != 16
  alignas(16) int totals_of[WARPS][4][up(most(HIDDEN_BLOCKS, OF_WARP), 4)];  // Sums of every four lanes' eights of blocks.
#endif
  u64 caches[LAYERS][2], gains[LAYERS][3];
  float eps[LAYERS][3];
  u8 valid[SLOTS];
  Plan plans[PIECES_OF_LAYER];
  u64 pointers[1 + SOME_LAG][POINTERS];  // Of the layer that is fetched, and of the one before.
#if CHOOSES
  int slot;  // Of the newest token, or -1 where nothing is to be done any more.
  Allowed allowed;
  History history;
  int rules[RULES], ends[MOST_ENDS];
  Best best[2][WARPS];
#endif
  alignas(8) u64 full[RINGS + MOST_PIECES], empty[RINGS + MOST_PIECES];
};
#endif
constexpr int IN_RING = least((MEMORY - (int)sizeof(Shared)) / CHUNK, RINGS);
constexpr int IN_FLIGHT = most(least(FLIGHT_BYTES / CHUNK, IN_RING - 1), ONE_ROW ? 2 : 1);
constexpr int MOST_CHUNKS = most(most(FFN_CHUNKS, most(KEY_CHUNKS, OWN_CHUNKS)), most(parts(FFN), 3));
constexpr int SHARED_AT = AT_HOME ? HOMES : IN_RING * CHUNK;
#if VOCAB
// The head is one more product, whose weight streams through all of the shared memory in pieces of some rows for each warp
// that multiplies, behind which a packed weight's scales and zero points lie. Programs have pieces in turn. The first ones
// come while the last layers are computed.
constexpr int HEAD_DIGITS = HEAD_BITS == 4 ? 2 : 1, HEAD_PLANE = HEAD_BITS == 16 ? 2 * WIDTH : up(ratio(WIDTH, HEAD_DIGITS), 16);
constexpr int HEAD_METAS = HEAD_BITS == 16 ? 0 : WIDTH / HEAD_GROUP * 2;  // Bytes of a row's scales, or of its zero points.
constexpr int HEAD_ROW = HEAD_PLANE + 2 * HEAD_METAS;
constexpr int HEAD_EACH = least(up(ratio(SHARED_AT, MOST_PIECES * WARPS * HEAD_ROW), HEAD_AT_ONCE), MOST_PARTS * HEAD_AT_ONCE);
// Of a piece a lane has so many sums. Those of several packed ones are added up together.
constexpr int HEAD_TURNS = HEAD_EACH / HEAD_AT_ONCE, TOGETHER = HEAD_BITS == 16 ? 1 : most(MOST_PARTS / HEAD_TURNS, 1);
constexpr int PIECE_ROWS = WARPS * HEAD_EACH, PIECE = PIECE_ROWS * HEAD_ROW, PIECES = least(SHARED_AT / PIECE, MOST_PIECES);
static_assert(PIECES > 1 && HEAD_EACH <= 32 && (HEAD_BITS == 16 || HEAD_GROUP % 16 == 0 && WIDTH % 32 == 0), "");
// Of those that come when the layers are done, one in so many stays in the L2 cache until the next step, up to 16 MB. Twice
// as much would be in its own way.
constexpr int KEPT_EVERY = most(ratio(VOCAB * HEAD_ROW - (HEAD_BITS == 16 ? 0 : GIVERS * PIECES * PIECE), 16 << 20), 1);
#endif
static_assert(VOCAB < 1 << 16, "a token is exchanged as a half word");
static_assert(AT_HOME || IN_RING > MOST_CHUNKS, "a step exceeds the shared memory");
static_assert(SHARED_AT + (int)sizeof(Shared) <= MEMORY && (!AT_HOME || (int)sizeof(Shared) <= BESIDE), "");

// What all programs read is there four times: a line that all of them ask for at once keeps its part of the L2 cache
// busy for longer than the way there takes.
constexpr int COPIES = BATCH == 1 ? 4 : 1;
// So does a line that every warp asks for: each head's logarithms have one of their own.
constexpr int LOGS = 32;
struct Arguments {
  const u64* table;
  u16 *stream;           // [COPIES][2][WIDTH]: halves, then their remainders.
  u16 *heads, *query;    // [2][3 WIDTH], [2][WIDTH], likewise; of one row float32, [3 WIDTH], [WIDTH].
  float2* stats;         // Of several rows, [COLUMNS][STATS]: of the features of each giver, sum and sum of squares.
  u16 *own_runs, *cross_runs;     // [COPIES][HEADS][8][64]
  float *own_logs, *cross_logs;   // [COPIES][HEADS][LOGS]: the logarithms (of base 2) of 8 sums of exponentials.
  u16* hidden;           // [COPIES][FFN]
  float* result;         // [COPIES][WIDTH], of one row: the last layer's.
  u32* choices;          // [COPIES][GIVERS][4]: of each giver, its best text token and its best timestamp.
  long long *tokens, *length;
  const long long* offset;
  const u8* valid;
  const u16 *embedding, *positions, *first_gain;
  float *gained, *last_stats;
  const float* eps;  // [LAYERS][3]
  u8* finished;          // Where it is not 0, nothing is to be done.
  u16* logits;           // [VOCAB]
  const u16 *head, *last_gain;
  const float *head_constant, *head_folded;
  const u16 *head_scales, *head_zeros;  // Of a packed one.
  // What the choice of tokens goes by and writes, as `decode_tokens.choose_next` has it.
  float* logprobs;
  u8* unfinished;
  long long *steps, *seen;
  const u8* marks;       // [VOCAB]
  const long long *rules, *ends;
  float scale, head_eps;
  int count;             // Of tokens that are to be chosen, each of them but the last fed to the next step, or 0.
#if BATCH > 1
  int token_stride, valid_stride;  // From a row's to the next one's.
#endif
};

// -- Waiting -------------------------------------------------------------------------------------------------------

// Every program is resident (the launch is cooperative) and every wait ends; should one not, fail rather than hang. What
// is counted is looks, some seconds to some minutes of them, and not time: a process that shares the GPU with others
// goes on where it was left, on another multiprocessor whose clock may be behind.
struct Patience {
  u32 rounds = 0;
  __device__ __forceinline__ void spend() {
    if (++rounds >> 28) trap();
  }
};
__device__ __forceinline__ void await(u32 barrier, u32 parity) {
  Patience patience;
  while (!barrier_try(barrier, parity)) patience.spend();
}

// Whether the words of a unit, or its first one, are of this use of the buffer.
__device__ __forceinline__ bool all_fresh(const uint4& u, u32 tag) {
  return (((u.x ^ tag) | (u.y ^ tag) | (u.z ^ tag) | (u.w ^ tag)) & 1) == 0;
}
__device__ __forceinline__ bool fresh(u32 word, u32 tag) { return ((word ^ tag) & 1) == 0; }

// The tag that no word of such a buffer has: what is in there is of the last launch, until all programs have got this far.
__device__ __forceinline__ u32 next_tag(const void* buffer) { return peek4(buffer) & 1 ^ 1; }
// The newest token's slot, or -1 where nothing is to be done.
__device__ __forceinline__ int newest_slot(const Arguments& a) {
  const int length = (int)*a.length;
  return *a.finished ? -1 : length - 1;
}

// -- The ring ------------------------------------------------------------------------------------------------------

struct Span {
  int first, count;  // Output features or keys of this program.
};
__device__ __forceinline__ Span share(int total, int each) {
  int first = least(program() * each, total);
  return {first, least(each, total - first)};
}
#if BATCH == 1
// Which program this is for attention: the last ones, which may have none of cross-attention, have the first of
// self-attention's runs.
__device__ __forceinline__ int attender(bool own) { return own ? GIVERS - 1 - program() : program(); }
__device__ __forceinline__ Span keys_of(bool own, int slot) {
  int split = attender(own) / HEADS, total = own ? slot : SOURCE, each = own ? SELF_RUN : CROSS_RUN;
  int first = least(split * each, total);
  return {first, least(each, total - first)};
}

// Runs of self-attention's keys, up to the newest one's, which the cache does not hold yet.
__device__ __forceinline__ int runs_of_keys(int slot) { return slot / SELF_RUN + 1; }
// Whether this program has a run of self-attention's keys, if only the newest, or of cross-attention's.
__device__ __forceinline__ bool attends(bool own, int slot) {
  return attender(own) < HEADS * (own ? runs_of_keys(slot) : CROSS_SPLITS);
}
// How many chunks its keys come in.
__device__ __forceinline__ int chunks_of_keys(bool own, int slot) {
  return own ? ratio(keys_of(true, slot).count, chunk_keys(true)) : KEY_CHUNKS;
}

#endif

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
    const int lane = thread() % 32;
    if (layer >= LAYERS) return;
    first = table[layer * POINTERS + lane];
    if (lane < POINTERS - 32) second = table[layer * POINTERS + 32 + lane];
  }
  // In shared memory, where one lane finds what it needs without the others.
  __device__ __forceinline__ void keep(u64* to) const {
    const int lane = thread() % 32;
    to[lane] = first;
    if (lane < POINTERS - 32) to[lane + 32] = second;
    __syncwarp();
  }
  __device__ __forceinline__ const u8* at(int index) const {
    const u64 a = __shfl_sync(~0u, first, index & 31), b = __shfl_sync(~0u, second, index & 31);
    return (const u8*)(index < 32 ? a : b);
  }
};

// Some barriers to a warp, by one lane: 32 lanes at once would take their turns, a hundred cycles each.
__device__ __forceinline__ void init_barriers(Shared& sh, int readers) {
  constexpr int USED = AT_HOME ? STEPS : IN_RING;
  if (elected()) {
#pragma unroll 1
    for (int i = thread() / 32; i < USED + MOST_PIECES; i += THREADS / 32) {
      const bool of_head = i >= USED;
      const int at = of_head ? RINGS + i - USED : i;
      const int chunks = !AT_HOME || of_head ? 1 : i == CROSS_ATTENTION ? KEY_CHUNKS : chunks_of(i);
      barrier_init(shared_address(&sh.full[at]), chunks);
      barrier_init(shared_address(&sh.empty[at]), of_head ? WARPS : readers);
    }
    barrier_fence();
  }
  __syncwarp();
}

// Where the fetching warp is.
struct Fetching {
  Cursor cursor, landed;
  int issued = 0;
  u32 due = 0;     // The clock when the next copies may be made.
  u32 pieces = 0;  // `Places.odd`.
};
// All programs find room at the same moments, and what they ask for stands in front of the words: no more than `PACE`
// bytes a cycle. Packed weights that go around a ring have less time until they are needed.
__device__ __forceinline__ u32 time_of(u32 bytes) { return bytes / (AT_HOME || BITS == 16 ? PACE : PACE * 5 / 3); }
// Until what was asked for has had its time. It is looks that end this, too, as a process that shares the GPU may go on with
// another clock.
__device__ __forceinline__ void keep_pace(Fetching& f, u32 lasts) {
  for (u32 looks = 0; looks < lasts / 4 && (int)(cycles() - f.due) < 0; looks++) continue;
  f.due = cycles() + lasts;
}
// At home: where a piece goes; its step's barrier, that of who leaves the room, and of which parity that was; whether it waits for
// the room, and whether its barrier is told of it.
struct Home {
  u32 place;
  int step, room;
  u32 parity;
  bool opens, arrives;
};
// Room for a piece, when few enough are on their way; its barrier expects `bytes`. Where the piece goes.
template <class Prefetch>
__device__ __forceinline__ u32 make_room(Shared& sh, Fetching& f, const Home& home, u32 bytes, u32 lasts, u32& barrier,
                                         Prefetch prefetch_it) {
  // In a ring, few bytes on their way keep the memory busy. More would only stand in front of what the programs exchange.
  u32 at, empty, parity;
  bool opens = true, arrives = true;
  if (AT_HOME) {
    at = home.place, barrier = shared_address(&sh.full[home.step]), empty = shared_address(&sh.empty[home.room]);
    parity = home.parity, opens = home.opens, arrives = home.arrives;
  } else {
    if (f.issued++ >= IN_FLIGHT) {
      await(shared_address(&sh.full[f.landed.place]), f.landed.phase);
      f.landed.next();
    }
    at = f.cursor.place * CHUNK, barrier = shared_address(&sh.full[f.cursor.place]);
    empty = shared_address(&sh.empty[f.cursor.place]), parity = f.cursor.phase ^ 1;
    f.cursor.next();
  }
  // The first round finds every place empty. In 16 bits the ring holds less than half a layer: what has to wait for
  // room goes as far as the L2 cache meanwhile.
  if (BITS == 16 && opens && !barrier_try(empty, parity)) prefetch_it();
  if (opens) await(empty, parity);
  if (BATCH == 1) keep_pace(f, lasts);
  if (arrives && elected()) barrier_expect(barrier, bytes);
  __syncwarp();
  return at;
}

#if !CHOOSES
// What was asked for before it was known that there is nothing to do has landed: copies end before their program does.
__device__ __forceinline__ void await_first(Shared& sh) {
  for (int chunk = 0; chunk < (AT_HOME ? 1 : chunks_of(QKV)); chunk++)
    await(shared_address(&sh.full[AT_HOME ? QKV : chunk]), 0);
}
#endif

// The output features of a chunk.
__device__ __forceinline__ Span rows_of_chunk(int product, int chunk) {
  int first = program() * (product == FC1 ? ROWS_FFN : ROWS), count = (product == FC1 ? FFN : WIDTH) - first;
  if (product == FC1) {
    count = least(count, ROWS_FFN) - chunk * ROWS;
    first += chunk * ROWS;
  }
  return {first, most(least(count, ROWS), 0)};
}

#if BATCH == 1
// Each piece's plan, by a lane of the warp that fetches.
__device__ __forceinline__ void make_plans(Shared& sh) {
  static_assert(ROWS < 256 && POINTERS <= 64 && row_bytes(FFN) < 1 << 16, "");
  const int lane = thread() % 32;
  const u32 ordered = (lane < 16 ? ORDER : ORDER_BEHIND) >> lane % 16 * 4 & 0xF;
  const int step = ordered & 7;
  const bool lags = ordered >> 3;
  // Which of its step's pieces this is: those that lag come last.
  const u32 all_lag = __ballot_sync(~0u, lags), in_front = (1u << lane) - 1;
  u32 same = 0;
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    const u32 of_step = __ballot_sync(~0u, step == i && lane < PIECES_OF_LAYER);
    if (step == i) same = of_step;
  }
  const int piece = __popc(same & ~all_lag & (lags ? ~0u : in_front)) + (lags ? __popc(same & all_lag & in_front) : 0);
  if (lane < PIECES_OF_LAYER) {
    Plan plan = {};
    // Of two steps with one home, the other one is what has been there. Who does not attend has no keys to leave.
    const bool alone = !pairs(step) || step == FC2 && !attends(false, 0);
    plan.about = step << ABOUT_STEP | (alone ? step : paired(step)) << ABOUT_ROOM |
                 (lags ? LAGS : step == QKV ? OF_FIRST : OF_OTHERS) | (piece == 0 ? OPENS : 0) | ARRIVES |
                 (step >= CROSS_OUT && !alone ? TURNED : 0);
    if (is_attention(step)) {
      // The rest is known only when the slot is.
      plan.rows = piece | lags << 8;
    } else {
      const bool deep = step == FC2, norm = from_stream(step), by_parts = deep && AT_HOME;
      const int chunk = by_parts ? 0 : piece;
      const Span span = rows_of_chunk(step, chunk);
      const int first = span.first, count = span.count;
      const int row = deep ? row_bytes(FFN) : row_bytes(WIDTH), part = deep ? part_bytes(FFN) : part_bytes(WIDTH);
      const int begin = deep ? chunk * part : 0, size = least(part, row - begin);
      const int together_rows = !AT_HOME || !BY_TWOS ? 1 : deep ? most(count, 1) : 2;
      const bool more = count > 0 && !((deep || together(step)) && piece > 0);
      const int meta = 2 * (deep ? groups(FFN) : groups(WIDTH)), of_vector = norm ? 4 : 2;
      const int in_vector = first + (step == QKV ? chunk * WIDTH : 0);
      const int all = together(step) ? most(least(FFN - first, ROWS_FFN), 0) : count;
      auto bytes_of = [&](int first, int each) { return more ? up((first + all) * each, 16) - first * each / 16 * 16 : 0; };
      u32 copies = count / together_rows;
      plan.rows = first * row + begin, plan.metas = first * meta / 16 * 16, plan.vectors = in_vector * of_vector / 16 * 16;
      plan.row_size = together_rows * size, plan.meta_size = bytes_of(first, meta);
      plan.vector_size = bytes_of(in_vector, of_vector);
      plan.expected = count * size + 2 * (plan.meta_size + plan.vector_size);
      plan.to_scales = metas_behind(step, chunk, false) / 16, plan.to_zeros = metas_behind(step, chunk, true) / 16;
      plan.to_first = vectors_behind(step, chunk) / 16, plan.to_second = plan.to_first + apart_of_vectors(step) / 16;
      plan.apart = row, plan.to_apart = deep ? stride(FFN) : stride(WIDTH);
      plan.place = home_of(step) + chunk * ROWS_OF_CHUNK;
      u32 asked = plan.expected;
      if (by_parts && BY_TWOS) {
        // The barrier is told of all of them at the first.
        const int from = least(piece * AT_ONCE, count * size);
        plan.row_size = asked = least(count * size - from, AT_ONCE), plan.rows += from, plan.place += from;
        if (piece) plan.about &= ~ARRIVES;
        if (!plan.row_size) copies = 0;
      }
      plan.lasts = time_of(asked), plan.about |= copies;
      const int matrix = weight_of(step) + (step == QKV ? chunk : 0), vectors = norm_of(step) + (norm ? CONSTANT : BIAS);
      plan.pointers = WEIGHTS + matrix | SCALES + matrix << 6 | ZEROS + matrix << 12 | vectors << 18 | vectors + 3 << 24;
      static_assert(FOLDED - CONSTANT == 3 && GAIN - BIAS == 3, "");
    }
    sh.plans[lane] = plan;
  }
  __syncwarp();
}

// And of keys and values, and in 8 bits of their scales, when it is known which ones this program attends to.
__device__ __forceinline__ void plan_keys(Shared& sh, int slot) {
  const int lane = thread() % 32;
  if (lane < PIECES_OF_LAYER) {
    Plan plan = sh.plans[lane];
    const int step = plan.about >> ABOUT_STEP & 0xF, piece = plan.rows & 0xFF;
    if (is_attention(step)) {
      const bool own = step == OWN_ATTENTION, bytes = BYTE_KEYS && !own;
      const Span keys = keys_of(own, slot);
      const int most_keys = own ? chunk_keys(true) : chunk_keys(false), begin = piece * most_keys;
      // Of a key. A scale takes a 32nd of that in 8 bits.
      const u32 each = bytes ? 64 : 128, size = most(least(keys.count - begin, most_keys), 0) * each;
      const u32 from = (attender(own) % HEADS * (own ? SLOTS : SOURCE) + keys.first + begin) * each;
      plan.vectors = from, plan.vector_size = size, plan.to_first = 0, plan.to_second = most_keys * each / 16;
      if (bytes) {
        plan.metas = from / 32 / 16 * 16, plan.meta_size = size ? up((from + size) / 32 - plan.metas, 16) : 0;
        plan.to_scales = 2 * most_keys * each / 16, plan.to_zeros = plan.to_scales + scales_of(most_keys) / 16;
      }
      plan.expected = 2 * (size + plan.meta_size), plan.lasts = time_of(plan.expected);
      plan.place = own ? home_of(OWN_ATTENTION) : home_of(CROSS_ATTENTION) + piece * bytes_of_keys(KEYS_PIECE);
      const int at = own ? KEYS : CROSS_KEYS;
      plan.pointers = at | (bytes ? CROSS_SCALES : at) << 6 | (bytes ? CROSS_SCALES + 1 : at) << 12 | at << 18 | at + 1 << 24;
      plan.about &= ~(LAGS | OF_OTHERS);
      if (attends(own, slot) && piece < chunks_of_keys(own, slot)) plan.about |= plan.rows >> 8 ? LAGS : OF_OTHERS;
      sh.plans[lane] = plan;
    }
  }
  __syncwarp();
}

// A piece's copies, all by one lane.
__device__ __forceinline__ void fetch_piece(Shared& sh, u32 memory, Fetching& f, const Plan& kept, int layer) {
  const Plan plan = kept;
  const u64* pointers = sh.pointers[SOME_LAG ? layer & 1 : 0];
  const u8* rows = (const u8*)pointers[plan.pointers & 63] + plan.rows;
  const u8* scales = (const u8*)pointers[plan.pointers >> 6 & 63] + plan.metas;
  const u8* zeros = (const u8*)pointers[plan.pointers >> 12 & 63] + plan.metas;
  const u8* one = (const u8*)pointers[plan.pointers >> 18 & 63] + plan.vectors;
  const u8* other = (const u8*)pointers[plan.pointers >> 24] + plan.vectors;
  constexpr bool TWOS = AT_HOME && BY_TWOS;
  const u32 copies = plan.about & 0xFF, apart = TWOS ? 2 * row_bytes(WIDTH) : plan.apart;
  const u32 to_apart = TWOS ? TWO_ROWS : plan.to_apart;  // By twos distances are known.
  const Home home = {plan.place, (int)(plan.about >> ABOUT_STEP & 0xF), (int)(plan.about >> ABOUT_ROOM & 0xF),
                     (u32)layer & 1 ^ 1 ^ (plan.about & TURNED ? 1 : 0), (plan.about & OPENS) != 0, (plan.about & ARRIVES) != 0};
  u32 barrier;
  const u32 place = memory + make_room(sh, f, home, plan.expected, plan.lasts, barrier, [&] {
    if (!elected()) return;
    // Rows that follow each other are prefetched together.
    const bool joined = plan.row_size == apart;
#pragma unroll 1
    for (u32 i = 0; i < (joined ? 1 : copies); i++)
      if (copies) prefetch(rows + i * apart, joined ? copies * plan.row_size : plan.row_size);
    if (plan.vector_size) prefetch(one, plan.vector_size), prefetch(other, plan.vector_size);
  });
  if (elected()) {
#pragma unroll
    for (int i = 0; i < (TWOS ? ROWS / 2 : ROWS); i++)
      if (i < (int)copies) copy_async(place + i * to_apart, rows + i * apart, plan.row_size, barrier);
    if (plan.vector_size) {
      copy_async(place + plan.to_first * 16, one, plan.vector_size, barrier);
      copy_async(place + plan.to_second * 16, other, plan.vector_size, barrier);
    }
    if ((BITS != 16 || BYTE_KEYS) && plan.meta_size) {
      copy_async(place + plan.to_scales * 16, scales, plan.meta_size, barrier);
      copy_async(place + plan.to_zeros * 16, zeros, plan.meta_size, barrier);
    }
  }
  __syncwarp();
}

#if VOCAB
__device__ __forceinline__ int pieces_of_program() { return ratio(ratio(VOCAB, PIECE_ROWS) - program(), GIVERS); }
// Where pieces go first: in a ring, to what was filled first. And one place further.
__device__ __forceinline__ int first_piece(const Cursor& cursor) {
  return AT_HOME ? 0 : ratio(cursor.place * CHUNK, PIECE) % PIECES;
}
__device__ __forceinline__ int next_piece(int piece) { return piece + 1 < PIECES ? piece + 1 : 0; }
// Where the next piece goes, and whether its place was used an odd number of times before: in a single step, all places as
// often as the first, else each by its bit, kept from step to step, as a step need not use all of them equally.
struct Places {
  int place;
#if CHOOSES
  u32& odd;
#else
  u32 odd;
#endif

  __device__ __forceinline__ u32 parity() const { return CHOOSES ? odd >> place & 1 : odd & 1; }
  __device__ __forceinline__ void use() {
    if (CHOOSES) odd ^= 1u << place;
  }
  __device__ __forceinline__ void next(int i) {
    place = next_piece(place);
    if (!CHOOSES && (i + 1) % PIECES == 0) odd++;
  }
};

#if CHOOSES
// Nobody reads any longer what the head of the step before had from `begin` to `end`.
__device__ __forceinline__ void await_head(Shared& sh, const Fetching& f, int begin, int end) {
  for (int piece = begin / PIECE; piece < PIECES && piece * PIECE < end; piece++)
    await(shared_address(&sh.empty[RINGS + piece]), f.pieces >> piece & 1 ^ 1);
}
#endif
constexpr int end_of(int step) {
  return home_of(step) + (step == CROSS_ATTENTION ? KEYS_HOME : step == FC2 ? HIDDEN_HOME :
                          step == OWN_ATTENTION ? OWN_KEYS * 256 : chunks_of(step) * HOME);
}
// Nobody reads any longer what the layers had where a piece is to go.
__device__ __forceinline__ void await_layers(Shared& sh, const Cursor& cursor, int piece, int slot) {
  const int begin = piece * PIECE, end = begin + PIECE;
  if (AT_HOME) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const bool own = step == OWN_ATTENTION;
      if (is_attention(step) && !(attends(own, slot) && chunks_of_keys(own, slot))) continue;
      if (begin < end_of(step) && home_of(step) < end) await(shared_address(&sh.empty[step]), (LAYERS - 1) & 1);
    }
  } else {
    for (int place = begin / CHUNK; place < IN_RING && place * CHUNK < end; place++)
      await(shared_address(&sh.empty[place]), place < cursor.place ? cursor.phase : cursor.phase ^ 1);
  }
}

__device__ __forceinline__ void fetch_head(const Arguments& a, Shared& sh, u32 memory, Fetching& f, int slot) {
  const int count = pieces_of_program();
  Places places = {first_piece(f.cursor), f.pieces};
#pragma unroll 1
  for (int i = 0; i < count; i++) {
    const int first = (program() + i * GIVERS) * PIECE_ROWS, rows = least(PIECE_ROWS, VOCAB - first);
    const int of_rows = rows * HEAD_PLANE, of_metas = up(rows * HEAD_METAS, 16), bytes = of_rows + 2 * of_metas;
    const int place = places.place;
    const u32 full = shared_address(&sh.full[RINGS + place]);
#if CHOOSES
    await_head(sh, f, place * PIECE, (place + 1) * PIECE);
#endif
    if (i < PIECES) {
      await_layers(sh, f.cursor, place, slot);
      if (AT_HOME) keep_pace(f, time_of(bytes));
    } else if (!CHOOSES) {
      await(shared_address(&sh.empty[RINGS + place]), places.parity() ^ 1);
    }
    places.use();
    if (elected()) {
      barrier_expect(full, bytes);
      const u32 to = memory + place * PIECE;
      const bool kept = i >= PIECES && i % KEPT_EVERY == 0;
      copy_async(to, (const u8*)a.head + (long long)first * HEAD_PLANE, of_rows, full, kept);
      if (HEAD_BITS != 16) {
        copy_async(to + PIECE_ROWS * HEAD_PLANE, (const u8*)a.head_scales + first * HEAD_METAS, of_metas, full, kept);
        copy_async(to + PIECE_ROWS * (HEAD_PLANE + HEAD_METAS), (const u8*)a.head_zeros + first * HEAD_METAS, of_metas, full, kept);
      }
    }
    __syncwarp();
    places.next(i);
  }
}
#endif

// The fetching warp: every piece of every layer of a step, as soon as there is room for it, in `ORDER`. The first product's are
// fetched before it is known whether there is a step.
__device__ __forceinline__ void fetch(const Arguments& a, Shared& sh, u32 memory, Fetching& f, Pointers& ahead, int& slot,
                                      bool first) {
#if !CHOOSES
  slot = 0;
#else
  // When the first weights have been used, so has all of the head.
  await_head(sh, f, 0, AT_HOME ? end_of(QKV) : SHARED_AT);
#endif
#pragma unroll 1
  for (int pass = -1; pass < LAYERS + SOME_LAG; pass++) {
    const u32 wanted = pass < 0 ? OF_FIRST : pass == 0 ? OF_OTHERS : pass == LAYERS ? LAGS : OF_FIRST | OF_OTHERS | LAGS;
    const int layer = most(pass, 0);
    if (pass != 0 && pass != LAYERS) {
      ahead.keep(sh.pointers[SOME_LAG ? layer & 1 : 0]);
      ahead.load(a.table, CHOOSES && layer + 1 == LAYERS ? 0 : layer + 1);
    }
#pragma unroll 1
    for (int i = 0; i < PIECES_OF_LAYER; i++) {
      const u32 about = sh.plans[i].about;
      if (about & wanted) fetch_piece(sh, memory, f, sh.plans[i], layer - (SOME_LAG && about & LAGS ? 1 : 0));
    }
    if (pass < 0) {
#if CHOOSES
      bar_sync(READY, THREADS);
      slot = sh.slot;
      if (slot >= 0 && !first) {
        // The keys and values of the step before are from other programs.
        bar_sync(WRITTEN, 64);
        fence_copies();
      }
      // The others wait for what was asked for in vain: copies end before their program does.
      if (slot < 0) return;
#else
      slot = newest_slot(a);
      if (slot < 0) return await_first(sh);
#endif
      plan_keys(sh, slot);
    }
  }
#if VOCAB && !CHOOSES
  fetch_head(a, sh, memory, f, slot);
#endif
}

#endif

// -- Low-bit integers ----------------------------------------------------------------------------------------------

constexpr int LOW_BITS = BITS == 3 ? 2 : BITS == 158 ? 8 : BITS;  // That a byte of the first plane holds of a digit.
constexpr u32 twice(u32 half) { return half * 0x10001u; }

// Two bytes in 16-bit halves, divided by 3 ** power: by multiplication, exact below 256.
__device__ __forceinline__ u32 third(u32 pair, int power) {
  const u32 factor = power == 0 ? 1 : power == 1 ? 171 : power == 2 ? 57 : power == 3 ? 19 : 203;
  const int shift = power == 0 ? 0 : power == 4 ? 14 : 9;
  return (pair * factor >> shift) & (0xFFFFu >> shift) * 0x10001u;
}

// What a lane holds of a run: eight packed bytes and, in 3 bits, the eight that hold the high bits, moved to where they
// belong. For one row: of the first three digits and of the last; for several: of the even bytes and of the odd ones.
struct Packed {
  u32 raw[2], high[2][2];
};

// The next `chunks` chunks are there; the place of the first.
__device__ __forceinline__ int take(Shared& sh, Cursor& cursor, int chunks) {
  const int place = cursor.place;
  Patience patience;
  while (true) {
    // All are looked at, one behind the other, before any answer is waited for.
    bool there = true;
    Cursor at = cursor;
#pragma unroll
    for (int chunk = 0; chunk < MOST_CHUNKS; chunk++) {
      if (chunk < chunks) there &= barrier_try(shared_address(&sh.full[at.place]), at.phase);
      if (chunk < chunks) at.next();
    }
    if (there) {
      cursor = at;
      return place;
    }
    patience.spend();
  }
}

// The warp has read what it needs of the chunks from `place` on.
__device__ __forceinline__ void release(Shared& sh, int place, int chunks) {
  __syncwarp();
  const int lane = thread() % 32;
  const int at = place + lane;
  if (lane < chunks) barrier_arrive(shared_address(&sh.empty[at < IN_RING ? at : at - IN_RING]));
}

__device__ __forceinline__ u32 base_of(u32 place, u32 chunk) {
  if (AT_HOME) return place + chunk * ROWS_OF_CHUNK;
  const u32 at = place + chunk;
  return (at < IN_RING ? at : at - IN_RING) * CHUNK;
}

// A lane's part of a run, or of two runs side by side, from `at` on: the lane has the elements from `in_plane` on.
template <int DEPTH, int EIGHTS>
__device__ __forceinline__ void load_packed(Packed (&packed)[EIGHTS], u32 at, int in_plane) {
  const u8* memory = dynamic_shared() + at;
  u32 words[2 * EIGHTS];
  load_words(words, memory);
#pragma unroll
  for (int i = 0; i < 2 * EIGHTS; i++) packed[i / 2].raw[i % 2] = words[i];
  if (BITS == 3) {
    // A high plane's byte holds the bits of two elements of each byte of the first plane, those of its second half
    // in the upper place.
    constexpr int PLANE = plane(DEPTH), HIGH = most(high_plane(DEPTH), 1);
    const int upper = in_plane >= HIGH;
    load_words(words, memory + PLANE - upper * HIGH);
#pragma unroll
    for (int i = 0; i < 2 * EIGHTS; i++) {
      u32(&high)[2] = packed[i / 2].high[i % 2];
      high[0] = words[i] << (2 - upper), high[1] = words[i] >> (BATCH == 1 ? upper : 6 + upper);
    }
  }
}
template <int DEPTH>
__device__ __forceinline__ void load_packed(Packed& packed, u32 at, int in_plane) {
  Packed one[1];
  load_packed<DEPTH>(one, at, in_plane);
  packed = one[0];
}

// Where a warp's block of `WIDTH` elements is: the run, the digit, and whether there is such a block.
struct Block {
  int run, digit;
  bool there;
};
__device__ __forceinline__ Block block_of(int b) {
  const int warp = thread() / 32;
  if (b < OWN_BLOCKS) return {(b / (DIGITS * FUSED) * WARPS + warp) * FUSED + b % FUSED, b / FUSED % DIGITS, true};
  const int late = (b - OWN_BLOCKS) * WARPS + warp;
  return {OWN * WARPS + late / DIGITS, late % DIGITS, late < LEFT * DIGITS};
}
// The first of a lane's eight elements of it.
template <int DEPTH>
__device__ __forceinline__ int element_of(int run, int digit) {
  return digit * plane(DEPTH) + run * 32 + thread() % 4 * 8;
}

// Four lanes hold sums for the same eight dimensions: each ends up with two.
__device__ __forceinline__ void gather(float (&sums)[8]) {
  const bool upper = thread() & 16, odd = thread() & 8;
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

#if BATCH == 1
// -- A product -----------------------------------------------------------------------------------------------------

struct State {
  Cursor cursor;
  int slot;
  u32 stream_tag, tag;  // Of the next reading of `stream`, and of this layer's other buffers.
  u32 result_tag;       // The one that no word of `result` has before this step.
  u32 pieces;           // `Places.odd`.
  float residual[2];    // Of the features that this thread finishes.
  uint4 gains;          // Of the layer norm behind the last product, for the elements that this thread multiplies.
};

// The rows of a step's product with `WIDTH` elements, and eights of them.
template <int STEP>
struct RowsOf {
  static constexpr int CHUNKS = chunks_of(STEP), ALL = CHUNKS * ROWS, EIGHTS = ratio(ALL, 8);
};

// What a step's fetching has brought is there: the place of its first chunk. And it has been read.
__device__ __forceinline__ int take(Shared& sh, State& s, int step, int chunks) {
  if (!AT_HOME) return take(sh, s.cursor, chunks);
  // A layer's tag and its barriers' parity alternate alike.
  await(shared_address(&sh.full[step]), s.tag ^ 1);
  return home_of(step);
}
__device__ __forceinline__ void release(Shared& sh, int place, int step, int chunks) {
  if (!AT_HOME) return release(sh, place, chunks);
  __syncwarp();
  if (thread() % 32 == 0) barrier_arrive(shared_address(&sh.empty[step]));
}

// Float32 values of two features as halves and their remainders, of which both carry the tag. The tag costs the half a bit
// that the remainder makes good.
struct Split {
  u32 half, rest;
};
__device__ __forceinline__ Split split(float first, float second, u32 tag) {
  const u32 half = tagged(pack(first, second), tag);
  return {half, tagged(pack(first - low_of(half), second - high_of(half)), tag)};
}

// The residual stream, published: four lanes have the same two features, and each publishes a copy. Who multiplies applies
// the gain of the layer norm and adds up its moments. Packed weights take the stream as float16, of which their integers
// leave little more. The last layer's result goes to the head: in float32, or to a kernel of its own.
static_assert(BATCH > 1 || COPIES == 4, "");
__device__ __forceinline__ u16* stream_place(const Arguments& a, int n, int lane) {
  return a.stream + lane % 4 * (2 * WIDTH) + n;
}
__device__ __forceinline__ void publish_stream(const State& s, u16* to, bool there) {
  const float first = s.residual[0] * SHRINK, second = s.residual[1] * SHRINK;
  if (!there) return;
  if (BITS == 16) {
    const Split two = split(first, second, s.stream_tag);
    poke4(to, two.half);
    poke4(to + WIDTH, two.rest);
  } else {
    poke4(to, tagged(pack_f16(first, second), s.stream_tag));
  }
}
__device__ __forceinline__ void leave_result(const Arguments& a, const State& s, int n, int lane, const float (&gain)[2],
                                             bool there) {
  const float x = s.residual[0], y = s.residual[1];
#if VOCAB
  if (there)
    poke8(a.result + lane % 4 * WIDTH + n, {tagged(__float_as_uint(x), s.result_tag), tagged(__float_as_uint(y), s.result_tag)});
  return;
#endif
  // Of the lanes of a pair, one adds up the values and one their squares.
  float sum = !there ? 0 : lane % 2 ? x * x + y * y : x + y;
#pragma unroll
  for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (there && lane % 4 == 0) a.gained[n] = x * gain[0], a.gained[n + 1] = y * gain[1];
  if (there && lane < 2) a.last_stats[lane * GIVERS + program()] = sum;
}

// A lane's eight elements of a row are all four registers of a tensor-core operand: the instruction takes the first and
// third pair for elements of row g, the second and fourth for elements of row g + 8. With the first and third pair of
// activations in an even column and the others in the odd one behind it, the sum of c[0] and c[3] is the row's.
__device__ __forceinline__ void multiply_row(float (&c)[4], const u32 (&w)[4], u32 x0, u32 x1) {
  multiply(c, w[0], w[1], w[2], w[3], x0, x1);
}
// Where a warp's sum of a row goes, which is `behind` a multiple of eight.
__device__ __forceinline__ float& sum_at(Shared& sh, int side, int eighth, u32 behind) {
  const u32 warp = thread() / 32;
  return sh.sums[side][behind % 2 * 2 + warp / 4][eighth / 2 + behind / 2][warp % 4];
}
// Where a row of a product with `WIDTH` elements lies behind the place of the product's first chunk in a ring, and its scales:
// from a table, which takes fewer instructions than to compute it. Rows behind the last one of a product are the last one
// again, and give sums that nobody reads.
enum { LINES_OF_QKV = 0, LINES_OF_FC1 = 8 * MOST_EIGHTS, LINES_OF_OTHERS = 2 * LINES_OF_FC1 };
__device__ __forceinline__ void fill_lines(Shared& sh) {
  for (u32 i = thread(); i < LINES; i += 32 * WARPS) {
    const int product = i < LINES_OF_FC1 ? QKV : i < LINES_OF_OTHERS ? FC1 : QUERY;
    const int row = least(i % LINES_OF_FC1, chunks_of(product) * ROWS - 1), chunk = row / ROWS, in_chunk = row % ROWS;
    const int first = (program() * (product == FC1 ? ROWS_FFN : ROWS) + (product == FC1 ? chunk * ROWS : 0)) *
                      (groups(WIDTH) * 2);
    sh.lines[i] = {chunk * CHUNK + in_chunk * stride(WIDTH),
                   chunk * CHUNK + metas_behind(product, chunk, false) + first % 16 + in_chunk * meta_stride(WIDTH)};
  }
}
struct Line {
  u32 row, meta;
};
// The line of a lane's row of an eight. At home a row is as far from the next one as any other, and most of it is known.
template <int STEP>
__device__ __forceinline__ Line line_of(const Shared& sh, int place, int eight) {
  const int g = thread() / 4 % 8;
  if (AT_HOME) {
    constexpr int ALL = RowsOf<STEP>::ALL;
    const u32 metas = place + metas_behind(STEP, 0, false);
    if (BY_TWOS) {
      const int two = 4 * eight + (8 * eight + 8 <= ALL ? g % 4 : least(g % 4, ALL / 2 - 1 - 4 * eight)), second = g / 4;
      return {place + two * TWO_ROWS + second * row_bytes(WIDTH), metas + (2 * two + second) * meta_stride(WIDTH)};
    }
    const int row = 8 * eight + (8 * eight + 8 <= ALL ? g : least(g, ALL - 1 - 8 * eight));
    return {place + row * stride(WIDTH), metas + row * meta_stride(WIDTH)};
  }
  constexpr int lines = STEP == QKV ? LINES_OF_QKV : STEP == FC1 ? LINES_OF_FC1 : LINES_OF_OTHERS;
  const uint2 line = sh.lines[lines + 8 * eight + g];
  const u32 row = place * CHUNK + line.x, meta = place * CHUNK + line.y;
  constexpr u32 END = IN_RING * CHUNK;
  return {row < END ? row : row - END, row < END ? meta : meta - END};
}
// Which row of an eight a lane has.
__device__ __forceinline__ u32 row_of_lane() {
  const u32 g = thread() / 4 % 8;
  return AT_HOME && BY_TWOS ? g % 4 * 2 + g / 4 : g;
}
// From a row's scales to its zero points.
template <int STEP>
constexpr int ZEROS_BEHIND = metas_behind(STEP, 0, true) - metas_behind(STEP, 0, false);

// Activations are made integers of 14 bits and a sign, multiples of a power of two that the largest one of their warp's
// sets. Multiplied by packed integers as they are, their sums are exact.
struct Grain {
  float up, down;  // The power's inverse and the power.
};
__device__ __forceinline__ u32 magnitude(float x) { return __float_as_uint(x) & 0x7FFFFFFF; }
// From the largest magnitude of a lane, for all that a warp multiplies.
__device__ __forceinline__ Grain grain_of(u32 largest) {
  const u32 exponent = most(largest_of_warp(largest) >> 23, 32);
  // What is no number is to stay none.
  return {__uint_as_float(267 - exponent << 23), __uint_as_float(exponent == 255 ? 0x7FC00000 : exponent - 13 << 23)};
}

// An integer, in the mantissa of what lies behind 1.5 * 2 ** 23; and two of them, as half words.
__device__ __forceinline__ u32 integer_of(float x, const Grain& grain) { return __float_as_uint(x * grain.up + 12582912.0f); }
__device__ __forceinline__ u32 integers_of(float x, float y, const Grain& grain) {
  return byte_permute(integer_of(x, grain), integer_of(y, grain), 0x5410);
}

#if BITS == 16
// -- A product's weights and activations in 16 bits

struct Staged {};  // What is known of staged activations besides.
// Eight activations in the order of the weights': of an even column and of the odd one behind it.
__device__ __forceinline__ void stage(u16* to, const uint4& unit) { *(uint4*)to = {unit.x, unit.z, unit.y, unit.w}; }
__device__ __forceinline__ uint2 staged(const u16* from) { return *(const uint2*)from; }

constexpr int shared_eights(int eights) { return LEFT ? ratio(eights, SHARERS) : 0; }
constexpr int UNITS_OF_STREAM = 2;  // That a lane asks for: halves and remainders of its eight elements of a block.

// The first of a lane's eight elements of a warp's block.
__device__ __forceinline__ int element_of(int b) {
  const int warp = thread() / 32;
  return b < OF_WARP ? (b * WARPS + (b < OWN ? warp : warp % most(LEFT, 1))) * 32 + thread() % 4 * 8 : WIDTH;
}
// Which elements a lane asks for, of one block in eight: computed time and again, as in 16 bits the registers hold weights.
struct Lane {
  __device__ __forceinline__ void fill(const Arguments&, const Shared&) {}
  __device__ __forceinline__ int element() const { return element_of(thread() % 32 / 4); }
  __device__ __forceinline__ const u16* stream_at(const Arguments& a) const {
    return element() < WIDTH ? a.stream + program() % COPIES * (2 * WIDTH) + element() : nullptr;
  }
  // Whether no other warp in front of this one has the same.
  __device__ __forceinline__ bool counts() const { return (int)(thread() % 32 / 4) < OWN || (int)(thread() / 32) < LEFT; }
};

// The weights of a product with `WIDTH` elements, from shared memory into registers.
template <int STEP>
struct Weights {
  static constexpr int EIGHTS = RowsOf<STEP>::EIGHTS, CHUNKS = RowsOf<STEP>::CHUNKS;
  static constexpr int SHARED = shared_eights(EIGHTS);
  u32 kept[EIGHTS][most(OWN, 1)][4], shared[most(SHARED, 1)][4];
  u32 last;  // What was loaded last, or nearly so.

  // `look` asks for activations for the first time: they may be there when the weights are.
  template <class Look>
  __device__ __forceinline__ void load(const Lane&, State& s, Shared& sh, Look look) {
    const int warp = thread() / 32, t = thread() % 4;
    const int place = take(sh, s, STEP, CHUNKS);
#pragma unroll
    for (int h = 0; h < EIGHTS; h++) {
      if (h == EIGHTS / 2) {
        keep_order(s.tag);
        look();
        __syncwarp();
      }
      const Line line = line_of<STEP>(sh, place, h);
#pragma unroll
      for (int b = 0; b < OWN; b++) load16(kept[h][b], dynamic_shared() + line.row + 2 * ((b * WARPS + warp) * 32 + t * 8));
    }
#pragma unroll
    for (int i = 0; i < SHARED; i++) {
      const Line line = line_of<STEP>(sh, place, least(warp / most(LEFT, 1) + i * SHARERS, EIGHTS - 1));
      load16(shared[i], dynamic_shared() + line.row + 2 * ((OWN * WARPS + warp % most(LEFT, 1)) * 32 + t * 8));
    }
    last = OWN ? kept[EIGHTS - 1][0][0] : shared[0][0];
    release(sh, place, STEP, CHUNKS);
  }
};

// The product of weights with a warp's staged activations: a lane's part of the sums of its rows.
template <int EIGHTS>
struct Sums {
  float of[EIGHTS];

  // Chains of products stand side by side: one after another, each would be waited for.
  template <int STEP>
  __device__ __forceinline__ void multiply(const Weights<STEP>& weights, const Shared& sh, const Lane&, const Staged&) {
    const u32 id = thread();
    const int warp = id / 32, g = id / 4 % 8, t = id % 4;
    // A lane has the activations of column g: the halves are in the first two and the remainders in the next two columns.
    uint2 y[OF_WARP];
#pragma unroll
    for (int b = 0; b < OF_WARP; b++) {
      y[b] = {};
      if (g < 4) y[b] = staged(&sh.staged[warp][b][g >> 1][t * 8 + g % 2 * 4]);
    }
    constexpr int SHARED = shared_eights(EIGHTS);
    float c[EIGHTS][4] = {}, of_shared[most(SHARED, 1)][4] = {};
#pragma unroll
    for (int b = 0; b < OWN; b++)
#pragma unroll
      for (int h = 0; h < EIGHTS; h++) multiply_row(c[h], weights.kept[h][b], y[b].x, y[b].y);
#pragma unroll
    for (int i = 0; i < SHARED; i++) multiply_row(of_shared[i], weights.shared[i], y[OF_WARP - 1].x, y[OF_WARP - 1].y);
#pragma unroll
    for (int h = 0; h < EIGHTS; h++) {
      of[h] = c[h][0] + c[h][3];
      const float(&other)[4] = of_shared[least(h / SHARERS, most(SHARED, 1) - 1)];
      if (LEFT && warp / most(LEFT, 1) == h % SHARERS) of[h] += other[0] + other[3];
    }
  }
  // Of four lanes, the first two have the sums of their pairs of columns.
  __device__ __forceinline__ void store(Shared& sh, const Lane&, int side) {
#pragma unroll
    for (int h = 0; h < EIGHTS; h++) of[h] += __shfl_xor_sync(~0u, of[h], 1);
    const u32 id = thread();
    if (id % 4) return;
#pragma unroll
    for (int h = 0; h < EIGHTS; h++) sum_at(sh, side, 8 * h, id / 4 % 8) = of[h];
  }
};

// Eight elements of the stream, of which a lane has halves and remainders.
__device__ __forceinline__ void values_of(float (&x)[8], const uint4 (&units)[UNITS_OF_STREAM]) {
  const u32 halves[4] = {units[0].x, units[0].y, units[0].z, units[0].w};
  const u32 rests[4] = {units[1].x, units[1].y, units[1].z, units[1].w};
#pragma unroll
  for (int j = 0; j < 4; j++) {
    x[2 * j] = low_of(halves[j]) + low_of(rests[j]);
    x[2 * j + 1] = high_of(halves[j]) + high_of(rests[j]);
  }
}
// A lane's eight activations of a block, staged.
__device__ __forceinline__ Staged stage_eight(Shared& sh, const Lane&, const float (&x)[8]) {
  const int warp = thread() / 32, b = thread() % 32 / 4, t = thread() % 4;
  if (b >= OF_WARP) return {};
  u32 halves[4], rests[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    halves[j] = pack(x[2 * j], x[2 * j + 1]);
    rests[j] = pack(x[2 * j] - low_of(halves[j]), x[2 * j + 1] - high_of(halves[j]));
  }
  stage(&sh.staged[warp][b][0][t * 8], {halves[0], halves[1], halves[2], halves[3]});
  stage(&sh.staged[warp][b][1][t * 8], {rests[0], rests[1], rests[2], rests[3]});
  return {};
}
#else
// -- A product's weights, in low-bit integers, and activations

// Bytes that hold digit `digit` of eight packed ones times 2 ** byte_place(digit).
constexpr int byte_place(int digit) { return BITS == 158 ? 0 : BITS == 3 ? least(2 * digit, 4) : LOW_BITS * digit; }
__device__ __forceinline__ void bytes_of(u32 (&q)[2], const Packed& packed, int digit) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 word = packed.raw[i];
    if (BITS == 158) {
      const u32 even = word & 0x00FF00FF, odd = word >> 8 & 0x00FF00FF;
      q[i] = third(even, digit) + (third(odd, digit) << 8);
      if (digit < 4) q[i] -= 3 * (third(even, digit + 1) + (third(odd, digit + 1) << 8));
    } else if (BITS == 8) {
      q[i] = word;
    } else {
      const int place = byte_place(digit);
      q[i] = (word >> (LOW_BITS * digit - place)) & ((1 << LOW_BITS) - 1) * 0x01010101u << place;
      if (BITS == 3) q[i] = and_or(packed.high[i][digit == 3], 0x04040404u << place, q[i]);
    }
  }
}

// A digit that only the lane knows, one of `first` to `last`, of eight packed elements. It is brought to where the first
// one lies.
__device__ __forceinline__ void bytes_of_digit(u32 (&q)[2], Packed& packed, int digit, int first, int last) {
  if (BITS == 158) {
#pragma unroll
    for (int i = 0; i < DIGITS; i++)
      if (i >= first && i <= last && (i == digit || i == first)) bytes_of(q, packed, i);
  } else {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      packed.raw[i] >>= LOW_BITS * digit;
      if (BITS == 3) packed.high[i][0] = packed.high[i][1] >> 2 * digit << 2;
    }
    bytes_of(q, packed, 0);
  }
}

// A lane's part of a row's sums over a block: eight elements.
__device__ __forceinline__ void multiply_eight(int& sum, const u32 (&q)[2], const uint4& x) {
  sum = dot_low(x.x, q[0], sum), sum = dot_high(x.y, q[0], sum);
  sum = dot_low(x.z, q[1], sum), sum = dot_high(x.w, q[1], sum);
}

// Blocks that have a scale in common, a unit: `EACH` of the `OWN_OF` first ones, of the others one. The first ones' digits come
// one after another, turn by turn, or if there are `TURNS` of them each with all turns.
template <int BLOCKS, int OWN_OF, int EACH, int TURNS>
struct Units {
  static constexpr int OWN_UNITS = OWN_OF / EACH, COUNT = OWN_UNITS + BLOCKS - OWN_OF;
  static constexpr int unit_of(int b) { return b < OWN_OF ? b / EACH : b - OWN_OF + OWN_UNITS; }
  // The first block of a unit.
  static constexpr int first_of(int unit) { return unit < OWN_UNITS ? unit * EACH : unit - OWN_UNITS + OWN_OF; }
  // Of the first blocks' units.
  static constexpr int digit_of(int unit) { return TURNS ? unit / most(TURNS, 1) : unit % DIGITS; }
  static constexpr int turn_of(int unit) { return TURNS ? unit % most(TURNS, 1) : unit / DIGITS; }
  struct Place {
    int digit, turn;
  };
  // Of unit `from` + `in`, at most `most_in`, or of the last one. Where one of `from` and `in` can tell, the other is not asked.
  static constexpr Place place_of(int from, int in, int most_in) {
    constexpr int INNER = TURNS ? TURNS : DIGITS;
    int inner = from % INNER, outer = from / INNER;
    if (from + most_in < COUNT && inner + most_in < INNER) {
      inner += in;
    } else if (from + most_in < COUNT && inner == 0) {
      inner = in % INNER, outer += in / INNER;
    } else {
      const int unit = least(from + in, COUNT - 1);
      inner = unit % INNER, outer = unit / INNER;
    }
    Place place = {inner, outer};
    if (TURNS) place = {outer, inner};
    return place;
  }
  // What brings a unit's sums to scale, as digits of the first blocks stay where they lie in their bytes.
  static constexpr float shrink_of(int unit) {
    return 1.0f / (1 << (unit < OWN_UNITS ? byte_place(digit_of(unit)) : 0));
  }
  // Sums of the eights that a lane has of each unit, times minus one.
  static __device__ __forceinline__ void load_totals(float (&totals)[COUNT], const int* from) {
    u32 of[up(BLOCKS, 4)];
#pragma unroll
    for (int i = 0; i < BLOCKS; i += 4) {
      const uint4 four = *(const uint4*)(from + i);
      of[i] = four.x, of[i + 1] = four.y, of[i + 2] = four.z, of[i + 3] = four.w;
    }
#pragma unroll
    for (int unit = 0; unit < COUNT; unit++) {
      const int b = first_of(unit);
      totals[unit] = -__int2float_rn((int)of[b] + (int)(unit < OWN_UNITS && EACH > 1 ? of[b + EACH - 1] : 0));
    }
  }
};
using OfWidth = Units<OF_WARP, OWN_BLOCKS, FUSED, 0>;
constexpr int UNITS_OF_STREAM = 1;  // That a lane asks for: its eight elements of a block.

// Where scales are, in bytes behind the first one of a row, of a lane's elements of the block that begins with `element`.
template <int DEPTH>
__device__ __forceinline__ int scale_of(int element) {
  return least(element + thread() % 4 / 2 * 16, DEPTH - 1) / most(GROUP, 1) * 2;
}
// A scale, in the low half, and its zero point.
template <int ZEROS>
__device__ __forceinline__ u32 load_steps(u32 at) {
  const u8* from = dynamic_shared() + at;
  return *(const u16*)from | (u32)*(const u16*)(from + ZEROS) << 16;
}
struct Steps {
  float scale, offset;  // An offset is scale times zero point.
  __device__ __forceinline__ void fill(u32 raw, float shrink) {
    scale = low_of(raw), offset = scale * high_of(raw);
    scale *= shrink;
  }
};

// What is known of staged activations besides.
struct Staged {
  float worth;  // What sums of them are to be multiplied by.
};
// A lane's eight activations of a block, as integers, and their sum.
__device__ __forceinline__ void stage_integers(u16* to, int* total, bool there, const float (&x)[8], const Grain& grain) {
  u32 in[8];
#pragma unroll
  for (int i = 0; i < 8; i++) in[i] = integer_of(x[i], grain);
  const uint4 halves = {byte_permute(in[0], in[1], 0x5410), byte_permute(in[2], in[3], 0x5410),
                        byte_permute(in[4], in[5], 0x5410), byte_permute(in[6], in[7], 0x5410)};
  const int sum = (int)(in[0] + in[1] + (in[2] + in[3]) + (in[4] + in[5] + (in[6] + in[7])) - 8 * 0x4B400000u);
  if (there) *(uint4*)to = halves;
  if (there) *total = sum;
}

// What a thread needs time and again: where its bytes of a row begin, and of the row's late blocks, of which digit, where the
// scales of its units lie behind those of the row, where its activations are. Between the activations' arrival and the sums
// every instruction is waited for, so that the places in shared memory are known, too: of the eight activations that it stages
// and of their sum, of those that it multiplies and of their sums, and of its sums of rows.
struct Lane {
  u32 own_at, late_at[most(LATE, 1)], late_digit[most(LATE, 1)], scale_at[OfWidth::COUNT];
  int asked;
  const u16* stream;
  u16* staged;
  int* total;
  const u16* activations;
  const int* totals;
  float* sums;

  __device__ __forceinline__ void fill(const Arguments& a, Shared& sh) {
    const int lane = thread() % 32, t = lane % 4, warp = thread() / 32;
    const int staged_block = least(lane / 4, OF_WARP - 1);
    staged = &sh.staged[warp][staged_block][0][t * 8], total = &sh.totals_of[warp][t][staged_block];
    activations = &sh.staged[warp][0][0][t * 8], totals = sh.totals_of[warp][t];
    sums = &sum_at(sh, 0, 0, 8 * t + row_of_lane());
    settle(staged), settle(total), settle(activations), settle(totals), settle(sums);
    own_at = warp * (FUSED * 32) + t * 8;
#pragma unroll
    for (int i = 0; i < LATE; i++) {
      // Behind the last block the activations are zero.
      const Block block = block_of(OWN_BLOCKS + i);
      late_at[i] = least(block.run, runs(WIDTH) - 1) * 32 + t * 8, late_digit[i] = block.digit;
    }
#pragma unroll
    for (int i = 0; i < OfWidth::COUNT; i++) {
      const Block block = block_of(OfWidth::first_of(i));
      scale_at[i] = scale_of<WIDTH>(block.digit * plane(WIDTH) + block.run * 32);
    }
    const int b = lane / 4;
    const Block block = block_of(b);
    asked = b < OF_WARP && block.there ? least(element_of<WIDTH>(block.run, block.digit), WIDTH) : WIDTH;
    stream = asked < WIDTH ? a.stream + program() % COPIES * (2 * WIDTH) + asked : nullptr;
  }
  // The first of those that it asks for, of one block in eight.
  __device__ __forceinline__ int element() const { return asked; }
  __device__ __forceinline__ const u16* stream_at(const Arguments&) const { return stream; }
  // Whether no other warp in front of this one has the same.
  __device__ __forceinline__ bool counts() const { return true; }
};

// The weights of a product with `WIDTH` elements, from shared memory into registers, as bytes, with scales and zero points
// for all units.
template <int STEP>
struct Weights {
  static constexpr int EIGHTS = RowsOf<STEP>::EIGHTS, CHUNKS = RowsOf<STEP>::CHUNKS;
  u32 kept[EIGHTS][OF_WARP][2];
  Steps steps[EIGHTS][OfWidth::COUNT];
  u32 last;  // What was loaded last.
  // A first look too early is in the way of who writes, and one too late waits for nothing: it comes behind all loads, or in 2 and
  // 1.58 bits, where the large products' take longest, behind three eights'.
  static constexpr int LOOK_BEHIND = is_large(STEP) && (BITS == 2 || BITS == 158) ? least(3, EIGHTS) : EIGHTS;

  // `look` asks for activations for the first time.
  template <class Look>
  __device__ __forceinline__ void load(const Lane& lane, State& s, Shared& sh, Look look) {
    const int place = take(sh, s, STEP, CHUNKS);
    u32 raw[EIGHTS][OfWidth::COUNT];
#pragma unroll
    for (int h = 0; h < EIGHTS; h++) {
      const Line line = line_of<STEP>(sh, place, h);
#pragma unroll
      for (int turn = 0; turn < OWN; turn++) {
        Packed packed;
        const int in = lane.own_at + (turn / FUSED * WARPS * FUSED + turn % FUSED) * 32;
        load_packed<WIDTH>(packed, line.row + in, in);
#pragma unroll
        for (int digit = 0; digit < DIGITS; digit++)
          bytes_of(kept[h][(turn / FUSED * DIGITS + digit) * FUSED + turn % FUSED], packed, digit);
      }
#pragma unroll
      for (int late = 0; late < LATE; late++) {
        Packed packed;
        load_packed<WIDTH>(packed, line.row + lane.late_at[late], lane.late_at[late]);
        bytes_of_digit(kept[h][OWN_BLOCKS + late], packed, lane.late_digit[late], 0, DIGITS - 1);
      }
#pragma unroll
      for (int i = 0; i < OfWidth::COUNT; i++) raw[h][i] = load_steps<ZEROS_BEHIND<STEP>>(line.meta + lane.scale_at[i]);
      if (h + 1 < EIGHTS && h + 1 == LOOK_BEHIND) {
        keep_order(s.tag);
        look();
        __syncwarp();
      }
    }
    release(sh, place, STEP, CHUNKS);
    if (LOOK_BEHIND == EIGHTS) {
      keep_order(s.tag);
      look();
    }
#pragma unroll
    for (int h = 0; h < EIGHTS; h++)
#pragma unroll
      for (int i = 0; i < OfWidth::COUNT; i++) steps[h][i].fill(raw[h][i], OfWidth::shrink_of(i));
    last = raw[EIGHTS - 1][OfWidth::COUNT - 1];
  }
};

// The product of weights with a warp's staged activations: a lane's part of the sums of its rows.
template <int EIGHTS>
struct Sums {
  float of[EIGHTS];

  template <int STEP>
  __device__ __forceinline__ void multiply(const Weights<STEP>& weights, const Shared&, const Lane& lane, const Staged& staged) {
    constexpr int COUNT = OfWidth::COUNT;
    float totals[COUNT];
    OfWidth::load_totals(totals, lane.totals);
    int sums[EIGHTS][COUNT] = {};
#pragma unroll
    for (int b = 0; b < OF_WARP; b++) {
      const uint4 x = *(const uint4*)(lane.activations + b * 32);
#pragma unroll
      for (int h = 0; h < EIGHTS; h++) multiply_eight(sums[h][OfWidth::unit_of(b)], weights.kept[h][b], x);
    }
#pragma unroll
    for (int h = 0; h < EIGHTS; h++) {
      of[h] = 0;
#pragma unroll
      for (int i = 0; i < COUNT; i++) of[h] += weights.steps[h][i].offset * totals[i];
#pragma unroll
      for (int i = 0; i < COUNT; i++) of[h] += weights.steps[h][i].scale * __int2float_rn(sums[h][i]);
      of[h] *= staged.worth;
    }
  }
  // Four lanes have parts of a row's sums in each eight: of four eights, each ends up with the sum of one.
  __device__ __forceinline__ void store(Shared&, const Lane& lane, int side) {
    const u32 t = thread() % 4;
    const bool odd = t & 1, upper = t & 2;
#pragma unroll
    for (int first = 0; first < EIGHTS; first += 4) {
      const int there = least(EIGHTS - first, 4);
      float half[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (2 * i >= there) continue;
        const int h = first + 2 * i;
        const float one = of[h], other = 2 * i + 1 < there ? of[least(h + 1, EIGHTS - 1)] : one;
        half[i] = (odd ? other : one) + __shfl_xor_sync(~0u, odd ? one : other, 1);
      }
      const float one = half[0], other = there > 2 ? half[1] : one;
      const float sum = (upper ? other : one) + __shfl_xor_sync(~0u, upper ? one : other, 2);
      if (there == 4 || (int)t < there) lane.sums[side * (4 * MOST_ROWS / 2 * 4) + first / 2 * 4 * 8] = sum;
    }
  }
};

// Of all that a warp multiplies, a lane's eight activations of a block.
__device__ __forceinline__ Staged stage_eight(Shared&, const Lane& own, const float (&x)[8]) {
  u32 largest = 0;
#pragma unroll
  for (int j = 0; j < 8; j++) largest = most(largest, magnitude(x[j]));
  const Grain grain = grain_of(largest);
  stage_integers(own.staged, own.total, thread() % 32 / 4 < OF_WARP, x, grain);
  return {grain.down};
}
// Eight elements of the stream.
__device__ __forceinline__ void values_of(float (&x)[8], const uint4 (&units)[UNITS_OF_STREAM]) {
  const u32 words[4] = {units[0].x, units[0].y, units[0].z, units[0].w};
#pragma unroll
  for (int j = 0; j < 4; j++) x[2 * j] = widen_f16((u16)words[j]), x[2 * j + 1] = widen_f16((u16)(words[j] >> 16));
}
#endif

// The gains of a layer norm, for the elements that a lane asks for. They are asked for while there is nothing else to do:
// all programs want the same.
__device__ __forceinline__ void ask_for_gains(const Lane& own, State& s, const Shared& sh, int layer, int norm) {
  s.gains = {};
  if (own.element() < WIDTH && layer < LAYERS) s.gains = fetch16((const u16*)sh.gains[layer][norm] + own.element());
}

// This warp's share of every sum is in shared memory: the finishing warps go on. Until they have published what comes
// of it, loading the next weights would only take shared memory's time from them.
template <class Meanwhile>
__device__ __forceinline__ void hand_over(int step, Meanwhile meanwhile) {
  __syncwarp();
  bar_arrive(STEP_DONE + step, 32 * (WARPS + finishers(step)));
  meanwhile();
  bar_sync(PUBLISHED, 32 * (WARPS + finishers(step)));
}

// A warp's tiles of 16 keys of this program's head that the cache holds, with their values. Of keys a lane has sixteen
// dimensions of two rows of a tile, of values eight of four. Keys that lie next to each other take their halves in turn, so
// that lanes served together meet different banks.
template <bool OWN>
struct Cached {
  static constexpr int TILES = ratio(OWN ? OWN_KEYS : CROSS_RUN, 16 * WARPS);
  float k[TILES][2][16], v[TILES][4][8];
  bool seen[TILES][2];

  static __device__ __forceinline__ void widen_eight(float* to, const uint4& halves, bool there) {
    const u32 pairs[4] = {halves.x, halves.y, halves.z, halves.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      to[2 * i] = there ? low_of(pairs[i]) : 0, to[2 * i + 1] = there ? high_of(pairs[i]) : 0;
      settle(to[2 * i]), settle(to[2 * i + 1]);
    }
  }
  __device__ __forceinline__ void load(State& s, Shared& sh) {
    const u32 id = thread();
    const int warp = id / 32, lane = id % 32, g = id / 4 % 8, t = id % 4, piece = g & 1;
    const Span span = keys_of(OWN, s.slot);
    constexpr int STEP = OWN ? OWN_ATTENTION : CROSS_ATTENTION, EACH = chunk_keys(OWN), MOST = OWN ? OWN_CHUNKS : KEY_CHUNKS;
    const int chunks = chunks_of_keys(OWN, s.slot);
    // Before the first token there is nothing.
    const int place = chunks ? take(sh, s, STEP, chunks) : 0;
    // Rows of keys and of values lie in chunks, of which a tile's eights are in one each.
    auto rows_of = [&](int tile, int half) {
      const int begin = (tile * WARPS + warp) * 16 + 8 * half, chunk = least(begin / EACH, MOST - 1);
      const u32 base = AT_HOME ? place + chunk * (EACH * 256) : base_of(place, chunk);
      return dynamic_shared() + base + begin % EACH * 128;
    };
    uint4 keys[TILES][2][2], values[TILES][4];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const u8* rows = rows_of(tile, half);
        const bool some = !OWN || (tile * WARPS + warp) * 16 + 8 * half < span.count;
#pragma unroll
        for (int i = 0; i < 2; i++) {
          keys[tile][half][i] = values[tile][2 * half + i] = {};
          if (some) keys[tile][half][i] = *(const uint4*)(rows + g * 128 + 64 * (i ^ piece) + 16 * t);
          if (some) values[tile][2 * half + i] = *(const uint4*)(rows + EACH * 128 + (4 * i + lane / 8) * 128 + lane % 8 * 16);
        }
      }
    if (chunks) release(sh, place, STEP, chunks);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int begin = (tile * WARPS + warp) * 16 + 8 * half, key = begin + g;
        seen[tile][half] = key < span.count && (!OWN || sh.valid[span.first + key]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          widen_eight(k[tile][half] + 8 * i, keys[tile][half][i], true);
          // What lies behind the last value may be no number, which a weight of zero does not hide.
          widen_eight(v[tile][2 * half + i], values[tile][2 * half + i], begin + 4 * i + lane / 8 < span.count);
        }
      }
  }
};

// Each lane asks for two of the query's dimensions, as all of a warp's would be in each other's way, and hands them on.
template <bool OWN>
__device__ __forceinline__ uint2 await_query(const Arguments& a, const State& s, int lane) {
  const u32* query = (const u32*)(OWN ? a.heads : a.query) + attender(OWN) % HEADS * 64 + 2 * lane;
  uint2 two = peek8(query);
  Patience patience;
  while (__any_sync(~0u, !fresh(two.x, s.tag) || !fresh(two.y, s.tag))) {
    patience.spend();
    if (!fresh(two.x, s.tag) || !fresh(two.y, s.tag)) two = peek8(query);
  }
  return two;
}
// A warp's share of a run is in shared memory, but for its largest score and its sum of exponentials.
__device__ __forceinline__ void leave_run(Shared& sh, int warp, int lane, int step, float best, float total) {
  if (lane == 0) sh.tops[warp] = best, sh.totals[warp] = total;
  __syncwarp();
  bar_arrive(STEP_DONE + step, 32 * (WARPS + 1));
  bar_sync(PUBLISHED, 32 * (WARPS + 1));
}
// Attention over them, when the query is there.
template <bool OWN>
__device__ __forceinline__ void attend(const Arguments& a, State& s, Shared& sh, const Cached<OWN>& cached) {
  constexpr int TILES = Cached<OWN>::TILES;
  const u32 id = thread();
  const int warp = id / 32, lane = id % 32, g = id / 4 % 8, t = id % 4, piece = g & 1;
  const uint2 two = await_query<OWN>(a, s, lane);
  *(uint2*)&sh.queries[warp][2 * lane + lane / 16 * 4] = two;
  __syncwarp();
  float4 q[4];
#pragma unroll
  for (int i = 0; i < 4; i++) q[i] = *(const float4*)&sh.queries[warp][(i / 2 ^ piece) * 36 + 8 * t + i % 2 * 4];

  float score[TILES][2], best = NOTHING;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float(&k)[16] = cached.k[tile][half];
      float dot[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        dot[i] = k[4 * i] * q[i].x + k[4 * i + 1] * q[i].y + k[4 * i + 2] * q[i].z + k[4 * i + 3] * q[i].w;
      }
      score[tile][half] = dot[0] + dot[1] + (dot[2] + dot[3]);
    }
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float& dot = score[tile][half];
      dot += __shfl_xor_sync(~0u, dot, 1);
      dot += __shfl_xor_sync(~0u, dot, 2);
      if (!cached.seen[tile][half]) dot = __int_as_float(0xFF800000);
      best = fmaxf(best, dot);
    }
  best = largest_float_of_warp(best);
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
#pragma unroll
      for (int j = 0; j < 8; j++) out[j] += weight * cached.v[tile][i][j];
    }
  }
#pragma unroll
  for (int step = 4; step < 32; step *= 2) total += __shfl_xor_sync(~0u, total, step);
  gather(out);
  *(float2*)&sh.runs[warp][lane % 8 * 8 + lane / 8 * 2] = {out[0], out[1]};
  leave_run(sh, warp, lane, OWN ? OWN_ATTENTION : CROSS_ATTENTION, best, total);
}

#if CROSS8
// Keys and values in 8 bits: of each a lane has sixteen dimensions of a tile's two rows. They are multiplied as the integers
// that they are, by the query and by attention's weights as integers of 15 bits, as packed weights are by activations.
template <>
struct Cached<false> {
  static constexpr int TILES = ratio(CROSS_RUN, 16 * WARPS);
  u32 k[TILES][2][4], v[TILES][4][2];  // Of values pairs of rows, side by side.
  float key_scale[TILES][2], value_scale[TILES][2];
  int count;  // Of keys that this program has.

  // Which of them is the first of an eight.
  static __device__ __forceinline__ int eight(int tile, int half) { return (tile * WARPS + thread() / 32) * 16 + 8 * half; }
  __device__ __forceinline__ bool seen(int tile, int half) const { return eight(tile, half) + (int)(thread() / 4 % 8) < count; }
  __device__ __forceinline__ void load(State& s, Shared& sh) {
    constexpr int EACH = chunk_keys(false);
    const u32 id = thread();
    const int g = id / 4 % 8, t = id % 4;
    const Span span = keys_of(false, s.slot);
    count = span.count;
    // Where the first one's scale is; an eight's scales and rows are in one chunk.
    const int scales_from = (attender(false) % HEADS * SOURCE + span.first) % 8 * 2 + 2 * EACH * 64;
    const int place = take(sh, s, CROSS_ATTENTION, KEY_CHUNKS);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      u32 rows[2][4];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int begin = eight(tile, half), chunk = least(begin / EACH, KEY_CHUNKS - 1), key = begin % EACH + g;
        const u8* base = dynamic_shared() + (AT_HOME ? place + chunk * bytes_of_keys(EACH) : base_of(place, chunk));
        load16(k[tile][half], base + key * 64 + t * 16);
        load16(rows[half], base + (EACH + key) * 64 + t * 16);
        // What lies behind the last scale may be no number, which a weight of zero does not hide.
        key_scale[tile][half] = value_scale[tile][half] = 0;
        if (begin + g < count) {
          key_scale[tile][half] = widen(*(const u16*)(base + scales_from + key * 2));
          value_scale[tile][half] = widen(*(const u16*)(base + scales_from + scales_of(EACH) + key * 2));
        }
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        v[tile][j][0] = byte_permute(rows[0][j], rows[1][j], 0x5140);
        v[tile][j][1] = byte_permute(rows[0][j], rows[1][j], 0x7362);
      }
    }
    release(sh, place, CROSS_ATTENTION, KEY_CHUNKS);
  }
};
// Of the first `2 * LEFT` sums, of which a lane and another have parts, each of the two ends up with half.
template <int LEFT>
__device__ __forceinline__ void halve(int (&sums)[16]) {
  const bool upper = thread() & 2 * LEFT;
#pragma unroll
  for (int j = 0; j < LEFT; j++) {
    const int from = __shfl_xor_sync(~0u, upper ? sums[j] : sums[LEFT + j], 2 * LEFT);
    sums[j] = (upper ? sums[LEFT + j] : sums[j]) + from;
  }
}
template <>
__device__ __forceinline__ void attend<false>(const Arguments& a, State& s, Shared& sh, const Cached<false>& cached) {
  constexpr int TILES = Cached<false>::TILES;
  const u32 id = thread();
  const int warp = id / 32, lane = id % 32, t = id % 4;
  const uint2 two = await_query<false>(a, s, lane);
  const float one = __uint_as_float(two.x), other = __uint_as_float(two.y);
  const Grain of_query = grain_of(most(magnitude(one), magnitude(other)));
  u32* integers = (u32*)sh.queries[warp];
  integers[lane] = integers_of(one, other, of_query);
  __syncwarp();
  u32 q[2][4];
#pragma unroll
  for (int i = 0; i < 2; i++) load16(q[i], (const u8*)(integers + 8 * t + 4 * i));

  float score[TILES][2], best = NOTHING;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u32(&k)[4] = cached.k[tile][half];
      int dots[2] = {};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int& dot = dots[j / 2];
        dot = dot_low_signed(q[j / 2][j % 2 * 2], k[j], dot), dot = dot_high_signed(q[j / 2][j % 2 * 2 + 1], k[j], dot);
      }
      int dot = dots[0] + dots[1];
      dot += __shfl_xor_sync(~0u, dot, 1);
      dot += __shfl_xor_sync(~0u, dot, 2);
      score[tile][half] = cached.seen(tile, half) ? __int2float_rn(dot) * (cached.key_scale[tile][half] * of_query.down)
                                                  : __int_as_float(0xFF800000);
      best = fmaxf(best, score[tile][half]);
    }
  best = largest_float_of_warp(best);
  float total = 0;
  u32 largest = 0;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float& weight = score[tile][half];
      weight = exp2_fast(weight - best);
      total += weight;
      weight *= cached.value_scale[tile][half];
      largest = most(largest, magnitude(weight));
    }
  const Grain of_weights = grain_of(largest);
  // Sixteen dimensions, of whose sums eight lanes have parts: each ends up with two.
  int sums[16] = {};
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    const u32 weights = integers_of(score[tile][0], score[tile][1], of_weights);
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const u32 pairs = cached.v[tile][j / 4][j / 2 % 2];
      sums[j] = j % 2 ? dot_high_signed(weights, pairs, sums[j]) : dot_low_signed(weights, pairs, sums[j]);
    }
  }
#pragma unroll
  for (int step = 4; step < 32; step *= 2) total += __shfl_xor_sync(~0u, total, step);
  halve<8>(sums), halve<4>(sums), halve<2>(sums);
  const int first = 16 * t + (lane & 16) / 2 + (lane & 8) / 2 + (lane & 4) / 2;
  *(float2*)&sh.runs[warp][first] = {__int2float_rn(sums[0]) * of_weights.down, __int2float_rn(sums[1]) * of_weights.down};
  leave_run(sh, warp, lane, CROSS_ATTENTION, best, total);
}
#endif

// A product with the stream, and the attention behind it.
template <int STEP>
__device__ __forceinline__ void product_of_stream(const Arguments& a, const Lane& own, State& s, Shared& sh, int layer) {
  static_assert(OF_WARP <= 8, "");
  constexpr int UNITS = UNITS_OF_STREAM;
  const u32 id = thread();
  const int lane = id % 32;
  const u16* from = own.stream_at(a);
  uint4 units[UNITS] = {};
  u32 missing = gives(STEP) && from ? (1u << UNITS) - 1 : 0;
  auto look = [&] {
#pragma unroll
    for (int i = 0; i < UNITS; i++)
      if (missing >> i & 1) units[i] = peek16(from + i * WIDTH);
  };
  Weights<STEP> weights;
  weights.load(own, s, sh, look);
  const u32 tag = tag_behind(s.stream_tag, weights.last);
  Patience patience;
  while (true) {
#pragma unroll
    for (int i = 0; i < UNITS; i++)
      if (all_fresh(units[i], tag)) missing &= ~(1u << i);
    if (!__any_sync(~0u, missing)) break;
    patience.spend();
    look();
  }
  float x[8], sum = 0, squares = 0;
  const u32 gain[4] = {s.gains.x, s.gains.y, s.gains.z, s.gains.w};
  values_of(x, units);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    sum += x[j], squares += x[j] * x[j];
    x[j] *= j % 2 ? high_of(gain[j / 2]) : low_of(gain[j / 2]);
  }
  // The layer norm's moments, of what no warp in front of this one asks for, too: the finishing warps add them up while
  // this one multiplies.
  sh.moments[id / 32][lane] = own.counts() ? float2{sum, squares} : float2{0, 0};
  const Staged staged = stage_eight(sh, own, x);
  __syncwarp();
  bar_arrive(MOMENTS + norm_of(STEP), 32 * (WARPS + finishers(STEP)));
  Sums<RowsOf<STEP>::EIGHTS> sums;
  sums.multiply(weights, sh, own, staged);
  sums.store(sh, own, side_of(STEP));
  constexpr bool OWN = STEP == QKV;
  hand_over(STEP, [] {});
  if (STEP == FC1 || !attends(OWN, s.slot)) return;
  Cached<OWN> cached;
  cached.load(s, sh);
  attend(a, s, sh, cached);
}

// Eight elements of attention's result, of which each head is in several runs of keys, merged. The logarithms of the
// runs' sums say what share each has.
template <int RUNS>
__device__ __forceinline__ void merge(float (&x)[8], const u16* units_from, const float* logs_from, bool inside, int runs,
                                      u32 tag) {
  constexpr int UNITS_OF_LOGS = ratio(RUNS, 4);
  uint4 units[RUNS], logs[UNITS_OF_LOGS];
  u32 missing = inside ? (1u << runs) - 1 | (1u << ratio(runs, 4)) - 1 << RUNS : 0;
#pragma unroll
  for (int i = 0; i < RUNS; i++) units[i] = {};
#pragma unroll
  for (int i = 0; i < UNITS_OF_LOGS; i++) logs[i] = {};
  Patience patience;
  while (true) {
#pragma unroll
    for (int i = 0; i < RUNS; i++)
      if (missing >> i & 1) units[i] = peek16(units_from + i * 64);
#pragma unroll
    for (int i = 0; i < UNITS_OF_LOGS; i++)
      if (missing >> (RUNS + i) & 1) logs[i] = peek16(logs_from + i * 4);
#pragma unroll
    for (int i = 0; i < RUNS; i++)
      if (fresh(units[i].x, tag)) missing &= ~(1u << i);
#pragma unroll
    for (int i = 0; i < UNITS_OF_LOGS; i++) {
      // Behind the last run nobody writes.
      const int there = runs - 4 * i;
      const uint4& u = logs[i];
      u32 words = u.x ^ tag;
      if (there > 1) words |= u.y ^ tag;
      if (there > 2) words |= u.z ^ tag;
      if (there > 3) words |= u.w ^ tag;
      if ((words & 1) == 0) missing &= ~(1u << (RUNS + i));
    }
    if (!__any_sync(~0u, missing)) break;
    patience.spend();
  }
  float share[RUNS], best = NOTHING, all = 0;
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const uint4& u = logs[i / 4];
    share[i] = i < runs ? __uint_as_float(i % 4 == 0 ? u.x : i % 4 == 1 ? u.y : i % 4 == 2 ? u.z : u.w) : NOTHING;
    best = fmaxf(best, share[i]);
  }
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    share[i] = exp2_fast(share[i] - best);
    all += share[i];
  }
#pragma unroll
  for (int j = 0; j < 8; j++) x[j] = 0;
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const u32 pairs[4] = {units[i].x, units[i].y, units[i].z, units[i].w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      x[2 * j] += share[i] * low_of(pairs[j]);
      x[2 * j + 1] += share[i] * high_of(pairs[j]);
    }
  }
  const float inverse = __fdividef(1.0f, fmaxf(all, 1e-30f));
#pragma unroll
  for (int j = 0; j < 8; j++) x[j] *= inverse;
}

// A product with attention's result.
template <int STEP>
__device__ __forceinline__ void product_of_runs(const Arguments& a, const Lane& own, State& s, Shared& sh, int layer) {
  Weights<STEP> weights;
  weights.load(own, s, sh, [] {});

  // A lane takes eight elements of a block. Heads lie 8 runs apart.
  const int element = own.element();
  const bool inside = element < WIDTH;
  const int head = program() % COPIES * HEADS + element / 64;
  const int unit = head * (8 * 64) + element % 64;
  float x[8];
  if (STEP == OWN_OUT)
    merge<SELF_SPLITS>(x, a.own_runs + unit, a.own_logs + head * LOGS, inside, runs_of_keys(s.slot), s.tag);
  else
    merge<CROSS_SPLITS>(x, a.cross_runs + unit, a.cross_logs + head * LOGS, inside, CROSS_SPLITS, s.tag);
  const Staged staged = stage_eight(sh, own, x);
  __syncwarp();
  Sums<RowsOf<STEP>::EIGHTS> sums;
  sums.multiply(weights, sh, own, staged);
  sums.store(sh, own, side_of(STEP));
  s.stream_tag ^= 1;
  hand_over(STEP, [&] { ask_for_gains(own, s, sh, layer, norm_of(STEP) + 1); });
}

#if BITS == 16
// The product with the hidden layer: many elements, few rows. Eight of them fill a tile's rows. The others take its
// rows several times over, each time with another turn, whose activations are in columns of their own.
__device__ __forceinline__ void product_of_hidden(const Arguments& a, const Lane& own, State& s, Shared& sh, int layer) {
  constexpr int BLOCKS = turns(FFN), UNITS = ratio(BLOCKS * 4, 32);
  constexpr int REST = most(ROWS - 8, 0), EACH = REST > 4 ? 8 : REST > 2 ? 4 : 2;
  constexpr int SUBS = least(8 / EACH, 4), REST_BLOCKS = REST ? ratio(BLOCKS, SUBS) : 0;
  const u32 id = thread();
  const int warp = id / 32, lane = id % 32, g = id / 4 % 8, t = id % 4;
  const int place = take(sh, s, FC2, chunks_of(FC2));
  auto has_hidden = [&](int turn) { return turn * WARPS + warp < runs(FFN); };
  auto load = [&](u32(&w)[4], int turn, int row) {
    const int part = turn / PART, in_part = ((turn - part * PART) * WARPS + warp) * RUN_BYTES + t * (RUN_BYTES / 4);
    load16(w, dynamic_shared() + base_of(place, part) + row * stride(FFN) + in_part);
  };
  u32 kept[BLOCKS][4], rest[most(REST_BLOCKS, 1)][4];
  // The activations pass through shared memory, so that the lanes of other columns need not hold them.
  const bool idle = runs(FFN) < WARPS && warp >= runs(FFN);
  uint4 units[UNITS];
  u32 missing = 0;
  bool there;
  auto unit_at = [&](int i) {
    const int b = (i * 32 + lane) / 4, element = (b * WARPS + (idle ? 0 : warp)) * 32 + t * 8;
    there = b < BLOCKS && element < FFN;
    return a.hidden + program() % COPIES * FFN + element;
  };
#pragma unroll
  for (int i = 0; i < UNITS; i++) {
    units[i] = {};
    unit_at(i);
    if (there) missing |= 1u << i;
  }
  auto look = [&] {
#pragma unroll
    for (int i = 0; i < UNITS; i++)
      if (missing >> i & 1) units[i] = peek16(unit_at(i));
  };
  constexpr bool FULL = runs(FFN) % WARPS == 0;
#pragma unroll
  for (int b = 0; b < BLOCKS; b++) {
    u32 w[4] = {};
    if (b == BLOCKS / 2) look();
    if (FULL || has_hidden(b)) load(w, b, least(g, ROWS - 1));
#pragma unroll
    for (int i = 0; i < 4; i++) kept[b][i] = w[i];
  }
#pragma unroll
  for (int b = 0; b < REST_BLOCKS; b++) {
    const int turn = b * SUBS + g / EACH % SUBS;
    u32 w[4] = {};
    if (has_hidden(turn)) load(w, turn, least(8 + g % EACH, ROWS - 1));
#pragma unroll
    for (int i = 0; i < 4; i++) rest[b][i] = w[i];
  }
  release(sh, place, FC2, chunks_of(FC2));
  Patience patience;
  while (true) {
#pragma unroll
    for (int i = 0; i < UNITS; i++)
      if (fresh(units[i].x, s.tag)) missing &= ~(1u << i);
    if (!__any_sync(~0u, missing)) break;
    patience.spend();
    look();
  }
#pragma unroll
  for (int i = 0; i < UNITS; i++)
    if (i * 32 + lane < BLOCKS * 4) stage(&sh.hidden[warp][(i * 32 + lane) / 4][t * 8], units[i]);
  __syncwarp();

  // Two chains of products, or one would be waited for.
  float c[2][4] = {};
#pragma unroll
  for (int b = 0; b < BLOCKS; b++) {
    uint2 x = {};
    if (g < 2) x = staged(&sh.hidden[warp][b][t * 8 + g % 2 * 4]);
    multiply_row(c[b % 2], kept[b], x.x, x.y);
  }
  const float sum = c[0][0] + c[0][3] + (c[1][0] + c[1][3]);
  if (t == 0) sum_at(sh, 1, 0, g) = sum;
  if (REST) {
    const int of = g >> 1;
    float d[4] = {};
#pragma unroll
    for (int b = 0; b < REST_BLOCKS; b++) {
      const int turn = b * SUBS + of;
      uint2 x = {};
      if (of < SUBS && turn < BLOCKS) x = staged(&sh.hidden[warp][turn][t * 8 + g % 2 * 4]);
      multiply_row(d, rest[b], x.x, x.y);
    }
    // A lane has the sums of its row with the turn of its columns: where that is the row's turn, they count.
    float all = d[0] + d[3];
    if (t != g / EACH) all = 0;
#pragma unroll
    for (int step = 1; step < 32; step *= 2)
      if (step < 4 || step >= 4 * EACH) all += __shfl_xor_sync(~0u, all, step);
    if (t == 0 && g < EACH) sum_at(sh, 1, 8, g) = all;
  }
  s.stream_tag ^= 1;
  hand_over(FC2, [&] { ask_for_gains(own, s, sh, layer + 1, 0); });
}
#else
// The product with the hidden layer: many elements, few rows. A lane takes the rows of one half, and every fourth unit.
__device__ __forceinline__ void product_of_hidden(const Arguments& a, const Lane& own, State& s, Shared& sh, int layer) {
  // Two runs of a group follow each other.
  constexpr int FUSE = fuses(FFN) && runs(FFN) % WARPS == 0 ? 2 : 1, TURNS = turns(FFN) / FUSE;
  constexpr int BLOCKS = HIDDEN_BLOCKS, ASKED = ratio(BLOCKS * 4, 32);
  using Of = Units<BLOCKS, BLOCKS, FUSE, BITS == 158 ? TURNS : 0>;
  constexpr int SUBS = 4, EACH = ratio(ROWS, 2);
  // Where all warps have as many runs, what a lane loads lies at the same distances for all. In one part, and if not for
  // groups, a warp's runs follow each other; and where its lanes have as many digits, a lane has sixteen elements of two runs,
  // its digit's, and eight of a last run: half as many scales.
  constexpr bool FULL = runs(FFN) % (WARPS * FUSE) == 0 && even(FFN), CLOSE = FULL && FUSE == 1 && parts(FFN) == 1;
  constexpr bool SIXTEENS = CLOSE && DIGITS == SUBS;
  constexpr int PAIRS = SIXTEENS ? TURNS / 2 : 0, OF_LANE = SIXTEENS ? ratio(TURNS, 2) : ratio(Of::COUNT, SUBS);
  // Of a lane's unit, of eight elements each.
  constexpr auto eights_of = [](int i) { return SIXTEENS ? 1 + (i < PAIRS) : FUSE; };
  const u32 id = thread();
  const int warp = id / 32, lane = id % 32, t = id % 4, sub = lane / 4 % SUBS, first = lane / 16 * EACH;
  const int place = take(sh, s, FC2, chunks_of(FC2));
  // Where the activations are that this lane asks for.
  uint4 units[ASKED];
  const u16* from[ASKED];
  u32 missing = 0;
#pragma unroll
  for (int i = 0; i < ASKED; i++) {
    const int b = (i * 32 + lane) / 4, unit = b / FUSE, turn = Of::turn_of(unit);
    const int run = CLOSE ? warp * TURNS + turn : (turn * WARPS + warp) * FUSE + b % FUSE;
    const int element = Of::digit_of(unit) * plane(FFN) + run * 32 + t * 8;
    units[i] = {}, from[i] = a.hidden + program() % COPIES * FFN + element;
    if (b < BLOCKS && run < runs(FFN) && run * 32 + t * 8 < plane(FFN) && element < FFN) missing |= 1u << i;
  }
  auto look = [&] {
#pragma unroll
    for (int i = 0; i < ASKED; i++)
      if (missing >> i & 1) units[i] = peek16(from[i]);
  };
  constexpr int FROM_WARP = CLOSE ? TURNS : FUSE, FROM_TURN = CLOSE ? 1 : WARPS * FUSE;  // Runs, to the next one.
  const int in_lane = warp * (FROM_WARP * 32) + t * 8;
  auto load = [&](Packed& packed, int row, int turn, int i) {
    int run = turn * FROM_TURN + i;
    if (FULL && parts(FFN) == 1) {
      load_packed<FFN>(packed, base_of(place, 0) + row * stride(FFN) + in_lane + run * 32, run * 32 + in_lane);
      return;
    }
    // Behind the last run the activations are zero.
    run = least(run + warp * FUSE, runs(FFN) - 1);
    const int chunk = parts(FFN) == 1 ? 0 : run / (PART * WARPS), in_run = t * 8;
    const int in_chunk = (run - chunk * (PART * WARPS)) * 32 + in_run;
    load_packed<FFN>(packed, base_of(place, chunk) + row * stride(FFN) + in_chunk, run * 32 + in_run);
  };
  const u32 metas = base_of(place, 0) + scales_at(FFN) + program() * ROWS * (groups(FFN) * 2) % 16;
  // Units' first blocks are staged, and then their second ones.
  auto stage_of = [](int b) { return b % FUSE * Of::COUNT + b / FUSE; };
  auto load_steps_of = [&](int row, typename Of::Place unit) {
    constexpr int TURN = FROM_TURN * 32;  // Elements from a turn to the next.
    const int element = unit.digit * plane(FFN) + warp * (FROM_WARP * 32);
    int at = scale_of<FFN>(element + unit.turn * TURN);
    if (FULL && TURN % most(GROUP, 1) == 0)
      at = (element + t / 2 * 16) / most(GROUP, 1) * 2 + unit.turn * (TURN / most(GROUP, 1) * 2);
    return load_steps<meta_bytes(FFN)>(metas + row * meta_stride(FFN) + at);
  };
  // Eights of every other turn are staged in another order, or lanes with sixteens would meet the same banks.
  auto eight_at = [](int eight, int turn) { return SIXTEENS ? eight ^ (turn & 1) : eight; };
  // Lanes with other turns take the runs of a unit in another order: they would meet the same banks.
  auto in_unit = [&](int i) { return FUSE > 1 ? i ^ sub / most(SUBS / 2, 1) : i; };
  u32 kept[EACH][OF_LANE][SIXTEENS ? 2 : FUSE][2], raw[EACH][OF_LANE];
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    if (j == EACH / 2) {
      keep_order(s.tag);
      look();
      __syncwarp();
    }
    const int row = least(first + j, ROWS - 1);
#pragma unroll
    for (int i = 0; i < OF_LANE; i++) {
      if (SIXTEENS) {
        const bool pair = i < PAIRS;
        const int begin = warp * (TURNS * 32) + t * (pair ? 16 : 8), in = begin + i * 64;
        const u32 at = base_of(place, 0) + row * stride(FFN) + in;
        Packed packed[2];
        if (pair)
          load_packed<FFN>(packed, at, in);
        else
          load_packed<FFN>(packed[0], at, in);
#pragma unroll
        for (int k = 0; k < eights_of(i); k++) bytes_of_digit(kept[j][i][k], packed[k], sub, 0, DIGITS - 1);
        const int element = sub * plane(FFN) + begin / 16 * 16;
        constexpr int G = most(GROUP, 1);
        const int scale = 64 % G ? (element + i * 64) / G : element / G + i * (64 / G);
        raw[j][i] = load_steps<meta_bytes(FFN)>(metas + row * meta_stride(FFN) + scale * 2);
        continue;
      }
      const typename Of::Place unit = Of::place_of(i * SUBS, sub, SUBS - 1);
      // Few digits are possible.
      const int one = Of::place_of(i * SUBS, 0, SUBS - 1).digit, other = Of::place_of(i * SUBS, SUBS - 1, SUBS - 1).digit;
#pragma unroll
      for (int k = 0; k < FUSE; k++) {
        Packed packed;
        load(packed, row, unit.turn, in_unit(k));
        bytes_of_digit(kept[j][i][k], packed, unit.digit, least(one, other), most(one, other));
      }
      raw[j][i] = load_steps_of(row, unit);
    }
  }
  release(sh, place, FC2, chunks_of(FC2));
  Steps steps[EACH][OF_LANE];
#pragma unroll
  for (int j = 0; j < EACH; j++)
#pragma unroll
    for (int i = 0; i < OF_LANE; i++) steps[j][i].fill(raw[j][i], 1);
  const u32 tag = tag_behind(s.tag, raw[EACH - 1][OF_LANE - 1]);
  Patience patience;
  while (true) {
#pragma unroll
    for (int i = 0; i < ASKED; i++)
      if (fresh(units[i].x, tag)) missing &= ~(1u << i);
    if (!__any_sync(~0u, missing)) break;
    patience.spend();
    look();
  }
  u32 largest = 0;
#pragma unroll
  for (int i = 0; i < ASKED; i++) {
    const u32 words[4] = {units[i].x, units[i].y, units[i].z, units[i].w};
#pragma unroll
    for (int j = 0; j < 4; j++) largest = larger_of_pairs(largest, words[j] & 0x7FFF7FFF);
  }
  const Grain grain = grain_of(most(magnitude(low_of(largest)), magnitude(high_of(largest))));
#pragma unroll
  for (int i = 0; i < ASKED; i++) {
    const int b = (i * 32 + lane) / 4;
    const uint4& u = units[i];
    if (b < BLOCKS)
      stage_integers(&sh.hidden[warp][stage_of(b)][eight_at(t, Of::turn_of(b / FUSE)) * 8], &sh.totals_of[warp][t][b], true,
                     {low_of(u.x), high_of(u.x), low_of(u.y), high_of(u.y), low_of(u.z), high_of(u.z), low_of(u.w), high_of(u.w)},
                     grain);
  }
  __syncwarp();
  int sums[EACH][OF_LANE] = {};
  float totals[OF_LANE], of[EACH] = {};
#pragma unroll
  for (int i = 0; i < OF_LANE; i++) {
    int total = 0;
#pragma unroll
    for (int k = 0; k < eights_of(i); k++) {
      const int unit = i * SUBS + sub;
      uint4 x = {};
      if (SIXTEENS) {
        const int turn = 2 * i + (i < PAIRS ? t / 2 : 0), eight = i < PAIRS ? t % 2 * 2 + k : t, b = turn * DIGITS + sub;
        x = *(const uint4*)&sh.hidden[warp][b][eight_at(eight, turn) * 8];
        total += sh.totals_of[warp][eight][b];
      } else if ((i + 1) * SUBS <= Of::COUNT || unit < Of::COUNT) {
        x = *(const uint4*)&sh.hidden[warp][in_unit(k) * Of::COUNT + unit][t * 8];
        total += sh.totals_of[warp][t][unit * FUSE + k];
      }
#pragma unroll
      for (int j = 0; j < EACH; j++) multiply_eight(sums[j][i], kept[j][i][k], x);
    }
    totals[i] = __int2float_rn(total);
  }
#pragma unroll
  for (int j = 0; j < EACH; j++) {
#pragma unroll
    for (int i = 0; i < OF_LANE; i++) of[j] -= steps[j][i].offset * totals[i];
#pragma unroll
    for (int i = 0; i < OF_LANE; i++) of[j] += steps[j][i].scale * __int2float_rn(sums[j][i]);
  }
  // Sixteen lanes have parts of the same rows' sums: each ends up with one of eight.
  constexpr int EIGHT = 8;
  static_assert(EACH <= EIGHT, "");
#pragma unroll
  for (int step = 1; step < EIGHT; step *= 2)
#pragma unroll
    for (int j = 0; j < EACH; j += 2 * step) {
      const bool other = lane & step;
      const float two = j + step < EACH ? of[j + step < EACH ? j + step : j] : 0;
      of[j] = (other ? two : of[j]) + __shfl_xor_sync(~0u, other ? of[j] : two, step);
    }
  of[0] += __shfl_xor_sync(~0u, of[0], EIGHT);
  if (lane % 16 < EACH) {
    const int row = first + lane % 16;
    sh.sums[side_of(FC2)][row % 2 * 2 + warp / 4][row / 2][warp % 4] = of[0] * grain.down;
  }
  s.stream_tag ^= 1;
  hand_over(FC2, [&] { ask_for_gains(own, s, sh, layer + 1, 0); });
}
#endif

// The sums of what all lanes that multiply have of values and of their squares.
__device__ __forceinline__ float2 all_moments(const Shared& sh) {
  static_assert(WARPS == 8, "");
  const int lane = thread() % 32;
  float sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i += 2) {
    const float4 two = *(const float4*)&sh.moments[i + lane / 16][lane % 16 * 2];
    sum += two.x + two.z, squares += two.y + two.w;
  }
  // Even lanes go on with the values, odd ones with the squares.
  float moment = (lane % 2 ? squares : sum) + __shfl_xor_sync(~0u, lane % 2 ? sum : squares, 1);
#pragma unroll
  for (int step = 2; step < 32; step *= 2) moment += __shfl_xor_sync(~0u, moment, step);
  const float other = __shfl_xor_sync(~0u, moment, 1);
  return {lane % 2 ? other : moment, lane % 2 ? moment : other};
}

// What becomes of a product's sums: four lanes of a finishing warp to a pair of features, of which one does not know of
// the other's.
__device__ __forceinline__ void finish(const Arguments& a, State& s, Shared& sh, int layer, int step) {
  const u32 id = thread();
  const int warp = (int)(id / 32) - FIRST_FINISHER, lane = id % 32, copy = lane % 4;
  const int chunks = chunks_of(step), row = warp * 16 + lane / 4 * 2, chunk = row / ROWS, in_chunk = row - chunk * ROWS;
  const Span span = step == FC1 ? share(FFN, ROWS_FFN) : share(WIDTH, ROWS);
  const bool finishes = chunk < row_chunks(step) && (step == FC1 ? row < span.count : in_chunk < span.count);
  const int n = span.first + (step == FC1 ? row : in_chunk), norm = norm_of(step);
  const int place = take(sh, s, step, chunks);
  float first[2] = {}, second[2] = {};
  if (finishes) {
    const int part = together(step) ? 0 : chunk, begin = span.first + (step == FC1 ? part * ROWS : 0);
    const u8* at = dynamic_shared() + base_of(place, part) + vectors_behind(step, part);
    if (from_stream(step)) {
      at += (begin * 4) % 16 + (together(step) ? row : in_chunk) * 4;
      const float2 one = *(const float2*)at, other = *(const float2*)(at + apart_of_vectors(step));
      first[0] = one.x, first[1] = one.y, second[0] = other.x, second[1] = other.y;
    } else {
      at += (begin * 2) % 16 + in_chunk * 2;
      const u32 one = *(const u32*)at, other = *(const u32*)(at + vector_bytes);
      first[0] = low_of(one), first[1] = high_of(one), second[0] = low_of(other), second[1] = high_of(other);
    }
  }
  release(sh, place, step, chunks);
  if (!from_stream(step)) s.stream_tag ^= 1;
  if (warp >= finishers(step)) return;
  // All that can be known before the sums are there.
  const float eps = sh.eps[layer][norm];
  const bool last = step == FC2 && layer == LAYERS - 1;
  u16* to = !from_stream(step) ? stream_place(a, n, lane) :
            step == FC1 ? a.hidden + lane % 16 * FFN + n / 8 * 8 :
            step == QUERY ? a.query + 2 * n : a.heads + 2 * (chunk * WIDTH + n);
  u16* cache = (u16*)sh.caches[layer][chunk == 2] + ((long long)(n / 64) * SLOTS + s.slot) * 64 + n % 64;
  u32 sums = (u32)((u8*)&sh.sums[side_of(step)][0][row / 2] - (u8*)&sh);
  settle(to), settle(cache), settle(sums);
  // Of the layer norm, what sums are multiplied by and what is added.
  float factor = 1;
  if (from_stream(step)) {
    bar_sync(MOMENTS + norm_of(step), 32 * (WARPS + finishers(step)));
    const float2 moments = all_moments(sh);
    // Of values times `SHRINK`.
    const float mean = moments.x * (GROW / WIDTH);
    const float variance = fmaxf(moments.y * (GROW * GROW / WIDTH) - mean * mean, 0.0f);
    const float deviation = rsqrt_fast(variance + eps), shift = mean * deviation;
    factor = deviation * GROW;
#pragma unroll
    for (int i = 0; i < 2; i++) first[i] -= shift * second[i];
    settle(factor), settle(first[0]), settle(first[1]);
  }
  bar_sync(STEP_DONE + step, 32 * (WARPS + finishers(step)));
  float4 of_warps[4];
#pragma unroll
  for (int i = 0; i < 4; i++) of_warps[i] = *(const float4*)((const u8*)&sh + sums + i * sizeof(sh.sums[0][0]));
  float total[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float4 &one = of_warps[2 * i], &other = of_warps[2 * i + 1];
    total[i] = (one.x + one.y + (one.z + one.w)) + (other.x + other.y + (other.z + other.w));
  }
  if (from_stream(step)) {
#pragma unroll
    for (int i = 0; i < 2; i++) total[i] = total[i] * factor + first[i];
    if (step == FC1) {
      // Eight features, sixteen lanes, one unit.
      float y[2];
#pragma unroll
      for (int i = 0; i < 2; i++) y[i] = 0.5f * total[i] * (1.0f + erff(total[i] * 0.7071067811865476f));
      u32 pair = pack(y[0], y[1]), unit[4];
#pragma unroll
      for (int i = 0; i < 4; i++) unit[i] = __shfl_sync(~0u, pair, (lane & 16) + 4 * i);
      if (finishes && lane % 16 < COPIES) poke16(to, {tagged(unit[0], s.tag), unit[1], unit[2], unit[3]});
    } else {
      // Keys and values are attended to as the cache holds them.
      const bool query = step == QUERY || chunk == 0;
      const u32 cached = pack(total[0], total[1]);
      const float scale = a.scale * LOG2E;
      const float one = query ? total[0] * scale : low_of(cached), other = query ? total[1] * scale : high_of(cached);
      if (finishes && copy == 0) poke8(to, {tagged(__float_as_uint(one), s.tag), tagged(__float_as_uint(other), s.tag)});
      if (finishes && !query && copy == 0) *(u32*)cache = cached;
    }
  } else {
    s.residual[0] += total[0] + first[0], s.residual[1] += total[1] + first[1];
    if (!last) publish_stream(s, to, finishes);
    if (last) leave_result(a, s, n, lane, second, finishes);
  }
  __syncwarp();
  bar_arrive(PUBLISHED, 32 * (WARPS + finishers(step)));
}

// -- Attention -----------------------------------------------------------------------------------------------------

// The run of all warps' keys, by the first finishing warp.
__device__ __forceinline__ void finish_attention(const Arguments& a, State& s, Shared& sh, bool own) {
  const int lane = thread() % 32;
  if (!attends(own, s.slot)) return;
  const int step = own ? OWN_ATTENTION : CROSS_ATTENTION, chunks = chunks_of_keys(own, s.slot);
  if (chunks) release(sh, take(sh, s, step, chunks), step, chunks);
  if (thread() / 32 != FIRST_FINISHER) return;
  const int head = attender(own) % HEADS, split = attender(own) / HEADS;
  u16* to = (own ? a.own_runs : a.cross_runs) + ((lane / 8 * HEADS + head) * 8 + split) * 64 + lane % 8 * 8;
  float* log_to = (own ? a.own_logs : a.cross_logs) + (lane * HEADS + head) * LOGS + split;
  // The newest key and value are not in the cache yet. A lane has the dimensions that it has of the sums below.
  float newest = NOTHING, new_value[2] = {};
  if (own && split == s.slot / SELF_RUN) {
    const u32* from = (const u32*)a.heads + head * 64 + lane % 8 * 8 + lane / 8 * 2;
    uint2 words[3] = {};
    u32 missing = 7;
    Patience patience;
    do {
#pragma unroll
      for (int i = 0; i < 3; i++)
        if (missing >> i & 1) words[i] = peek8(from + i * WIDTH);
#pragma unroll
      for (int i = 0; i < 3; i++)
        if (fresh(words[i].x, s.tag) && fresh(words[i].y, s.tag)) missing &= ~(1u << i);
      patience.spend();
    } while (__any_sync(~0u, missing));
    float dot = __uint_as_float(words[0].x) * __uint_as_float(words[1].x) +
                __uint_as_float(words[0].y) * __uint_as_float(words[1].y);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) dot += __shfl_xor_sync(~0u, dot, step);
    new_value[0] = __uint_as_float(words[2].x), new_value[1] = __uint_as_float(words[2].y);
    if (sh.valid[s.slot]) newest = dot;
  }
  bar_sync(STEP_DONE + (own ? OWN_ATTENTION : CROSS_ATTENTION), 32 * (WARPS + 1));
  float best = newest;
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
  if (newest > NOTHING) {
    const float weight = exp2_fast(newest - best);
    total += weight, all[0] += weight * new_value[0], all[1] += weight * new_value[1];
  }
  const float inverse = __fdividef(1.0f, fmaxf(total, 1e-30f));
  u32 pair = pack(all[0] * inverse, all[1] * inverse), unit[4];
#pragma unroll
  for (int i = 0; i < 4; i++) unit[i] = __shfl_sync(~0u, pair, lane % 8 + 8 * i);
  poke16(to, {tagged(unit[0], s.tag), unit[1], unit[2], unit[3]});
  const float log = total > 0 ? best + log2_fast(total) : NOTHING;
  if (lane < COPIES) poke4(log_to, tagged(__float_as_uint(log), s.tag));
  __syncwarp();
  bar_arrive(PUBLISHED, 32 * (WARPS + 1));
}

#if VOCAB
// -- The head ------------------------------------------------------------------------------------------------------

// The last layer's result comes in units of four elements, which the program's threads ask for in turn.
constexpr int RESULT_UNITS = ratio(WIDTH / 4, 32 * WARPS);
__device__ __forceinline__ bool has_unit(int i) { return i * 32 * WARPS + (int)thread() < WIDTH / 4; }
// Without their tags, which are others in every other launch.
__device__ __forceinline__ float4 values_of_unit(const uint4& unit) {
  return {__uint_as_float(unit.x & ~1u), __uint_as_float(unit.y & ~1u), __uint_as_float(unit.z & ~1u), __uint_as_float(unit.w & ~1u)};
}

#if HEAD_BITS == 16
// What a lane multiplies the head's rows by: of every 256 elements it has eight.
struct OfHead {
  static constexpr int TILES = ratio(WIDTH, 256);
  uint4 gains[TILES];
  float x[TILES][8];

  static __device__ __forceinline__ bool there(int tile) { return tile * 256 + (int)thread() % 32 * 8 < WIDTH; }
  __device__ __forceinline__ void ask_for_gains(const Arguments& a) {
#pragma unroll
    for (int i = 0; i < TILES; i++) {
      gains[i] = {};
      if (there(i)) gains[i] = fetch16(a.last_gain + i * 256 + thread() % 32 * 8);
    }
  }
  // The result, by those that asked for it, for all.
  __device__ __forceinline__ void stage(Shared& sh, const uint4 (&units)[RESULT_UNITS]) const {
#pragma unroll
    for (int i = 0; i < RESULT_UNITS; i++)
      if (has_unit(i)) sh.result[i * 32 * WARPS + thread()] = values_of_unit(units[i]);
  }
  // From there; the sums of the values and of their squares.
  __device__ __forceinline__ float2 load(const Shared& sh) {
    const int lane = thread() % 32;
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
      float4 two[2] = {};
      if (there(i)) two[0] = sh.result[i * 64 + lane * 2], two[1] = sh.result[i * 64 + lane * 2 + 1];
      const u32 gain[4] = {gains[i].x, gains[i].y, gains[i].z, gains[i].w};
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float4& four = two[j / 4];
        const float value = j % 4 == 0 ? four.x : j % 4 == 1 ? four.y : j % 4 == 2 ? four.z : four.w;
        sum += value, squares += value * value;
        x[i][j] = value * (j % 2 ? high_of(gain[j / 2]) : low_of(gain[j / 2]));
      }
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2)
      sum += __shfl_xor_sync(~0u, sum, step), squares += __shfl_xor_sync(~0u, squares, step);
    return {sum, squares};
  }
  // A lane's part of the product with a row of a piece.
  __device__ __forceinline__ float multiply(const u8* piece, int row) const {
    const u8* at = piece + row * HEAD_PLANE + thread() % 32 * 16;
    float parts[4] = {};
#pragma unroll
    for (int k = 0; k < TILES; k++) {
      u32 w[4] = {};
      if (there(k)) load16(w, at + k * 512);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        parts[j] += low_of(w[j]) * x[k][2 * j];
        parts[j] += high_of(w[j]) * x[k][2 * j + 1];
      }
    }
    return parts[0] + parts[1] + (parts[2] + parts[3]);
  }
};
#else
// What a lane multiplies packed rows by, integers: sixteen elements for each digit of sixteen bytes.
struct OfHead {
  static constexpr int SIXTEENS = HEAD_PLANE / 16, TURNS = ratio(SIXTEENS, HEAD_LANES);
  uint2 gains[RESULT_UNITS];  // Of what a thread asks for.
  u32 x[TURNS][HEAD_DIGITS][8];
  // What sums of them are to be multiplied by, where a digit lies in its bytes; and what zero points are.
  float worth[TURNS][HEAD_DIGITS], total[TURNS][HEAD_DIGITS];

  static __device__ __forceinline__ bool there(int turn) {
    return (turn + 1) * HEAD_LANES <= SIXTEENS || turn * HEAD_LANES + (int)thread() % HEAD_LANES < SIXTEENS;
  }
  __device__ __forceinline__ void ask_for_gains(const Arguments& a) {
#pragma unroll
    for (int i = 0; i < RESULT_UNITS; i++) {
      gains[i] = {};
      if (has_unit(i)) gains[i] = *(const uint2*)(a.last_gain + (i * 32 * WARPS + thread()) * 4);
    }
  }
  // The result times the gains, by those that asked for it, for all: a warp's units have a grain of their own.
  __device__ __forceinline__ void stage(Shared& sh, const uint4 (&units)[RESULT_UNITS]) const {
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < RESULT_UNITS; i++) {
      const float4 four = values_of_unit(units[i]);
      sum += four.x + four.y + (four.z + four.w);
      squares += four.x * four.x + four.y * four.y + (four.z * four.z + four.w * four.w);
      const float y[4] = {four.x * low_of(gains[i].x), four.y * high_of(gains[i].x), four.z * low_of(gains[i].y),
                          four.w * high_of(gains[i].y)};
      u32 largest = 0;
#pragma unroll
      for (int j = 0; j < 4; j++) largest = most(largest, magnitude(y[j]));
      const Grain grain = grain_of(largest);
      const uint2 four_integers = {integers_of(y[0], y[1], grain), integers_of(y[2], y[3], grain)};
      int total = dot_low(four_integers.x, 0x0101, dot_low(four_integers.y, 0x0101, 0));
#pragma unroll
      for (int step = 1; step < 4; step *= 2) total += __shfl_xor_sync(~0u, total, step);
      if (!has_unit(i)) continue;
      const int unit = i * 32 * WARPS + thread(), sixteen = unit / 4;
      *(uint2*)&sh.integers[unit % 4 / 2][sixteen][unit % 2 * 4] = four_integers;
      if (unit % 4 == 0) sh.sixteens[sixteen] = {grain.down, -grain.down * __int2float_rn(total)};
    }
    sh.moments[thread() / 32][thread() % 32] = {sum, squares};
  }
  // From there; the sums of the values and of their squares.
  __device__ __forceinline__ float2 load(const Shared& sh) {
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++)
#pragma unroll
      for (int digit = 0; digit < HEAD_DIGITS; digit++) {
        const int sixteen = digit * SIXTEENS + turn * HEAD_LANES + thread() % HEAD_LANES;
        u32 eights[2][4] = {};
        float2 of = {};
        if (there(turn)) {
          load16(eights[0], (const u8*)sh.integers[0][sixteen]), load16(eights[1], (const u8*)sh.integers[1][sixteen]);
          of = sh.sixteens[sixteen];
        }
#pragma unroll
        for (int j = 0; j < 8; j++) x[turn][digit][j] = eights[j / 4][j % 4];
        worth[turn][digit] = of.x / (digit ? 16 : 1), total[turn][digit] = of.y;
      }
    return all_moments(sh);
  }
  // A lane's part of the product with a row of a piece.
  __device__ __forceinline__ float multiply(const u8* piece, int row) const {
    const int in = thread() % HEAD_LANES * 16;
    const u8 *at = piece + row * HEAD_PLANE + in, *metas = piece + PIECE_ROWS * HEAD_PLANE + row * HEAD_METAS;
    float dots[2] = {};
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
      if (!there(turn)) continue;
      u32 raw[4];
      load16(raw, at + turn * (HEAD_LANES * 16));
#pragma unroll
      for (int digit = 0; digit < HEAD_DIGITS; digit++) {
        const u32(&of)[8] = x[turn][digit];
        int sum = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const u32 q = HEAD_BITS == 8 ? raw[j] : raw[j] & (digit ? 0xF0F0F0F0 : 0x0F0F0F0F);
          sum = dot_high(of[2 * j + 1], q, dot_low(of[2 * j], q, sum));
        }
        constexpr int G = most(HEAD_GROUP, 1);
        const int begin = digit * HEAD_PLANE + turn * (HEAD_LANES * 16);
        const u8* meta = metas + (begin % G ? (begin + in) / G : begin / G + in / G) * 2;
        const float scale = widen(*(const u16*)meta), zero = widen(*(const u16*)(meta + PIECE_ROWS * HEAD_METAS));
        dots[turn % 2] += scale * (__int2float_rn(sum) * worth[turn][digit] + zero * total[turn][digit]);
      }
    }
    return dots[0] + dots[1];
  }
};
#endif

// The row of the head's weight of which a lane has the sum, of the pieces from `i` on that are added up together.
__device__ __forceinline__ int row_of_head(int i) {
  const int lane = thread() % 32, turn = lane / HEAD_AT_ONCE, piece = i + (TOGETHER > 1 ? turn / HEAD_TURNS : 0);
  const int each = (TOGETHER > 1 ? turn % HEAD_TURNS : turn) * HEAD_AT_ONCE + lane % HEAD_AT_ONCE;
  return turn < HEAD_TURNS * TOGETHER ? (program() + piece * GIVERS) * PIECE_ROWS + thread() / 32 * HEAD_EACH + each : VOCAB;
}

__device__ __forceinline__ void multiply_head(const Arguments& a, State& s, Shared& sh) {
  const u32 id = thread();
  const int warp = id / 32, lane = id % 32;
  OfHead input;
  input.ask_for_gains(a);
  // Layer norm's vectors of the rows of some pieces: a lane has those of one row.
  auto ask_for_vectors = [&](int i) {
    const int row = row_of_head(i);
    float2 vectors = {};
    if (row < VOCAB) vectors = {a.head_folded[row], a.head_constant[row]};
    return vectors;
  };
  auto ask_for_mark = [&](int i) {
    const int row = row_of_head(i);
    return CHOOSES && a.count && row < VOCAB ? a.marks[row] : (u8)0xFF;
  };
  float2 next = ask_for_vectors(0);
  u8 next_mark = ask_for_mark(0);

  // All warps want all of the result: each thread asks for some of it.
  const float* from = a.result + program() % COPIES * WIDTH;
  uint4 units[RESULT_UNITS] = {};
  u32 missing = 0;
#pragma unroll
  for (int i = 0; i < RESULT_UNITS; i++)
    if (has_unit(i)) missing |= 1u << i;
  Patience patience;
  while (__any_sync(~0u, missing)) {
#pragma unroll
    for (int i = 0; i < RESULT_UNITS; i++)
      if (missing >> i & 1) units[i] = peek16(from + (i * 32 * WARPS + id) * 4);
#pragma unroll
    for (int i = 0; i < RESULT_UNITS; i++)
      if ((missing >> i & 1) && all_fresh(units[i], s.result_tag)) missing &= ~(1u << i);
    patience.spend();
  }
  input.stage(sh, units);
  bar_sync(RESULT, 32 * WARPS);
  const float2 moments = input.load(sh);
  const float mean = moments.x / WIDTH, inverse = rsqrt_fast(fmaxf(moments.y / WIDTH - mean * mean, 0.0f) + a.head_eps);

  const int count = pieces_of_program();
#if CHOOSES
  const Allowed allowed = sh.allowed;
  Best of[2][1];  // Of text and of timestamps.
#endif
  Places places = {first_piece(s.cursor), s.pieces};
#pragma unroll 1
  for (int i = 0; i < count; i += TOGETHER) {
    const float2 vectors = next;
    const int mark = next_mark;
    next = ask_for_vectors(i + TOGETHER), next_mark = ask_for_mark(i + TOGETHER);
    float dots[HEAD_TURNS], dot = 0;
#pragma unroll 1
    for (int j = i; j < least(i + TOGETHER, count); j++) {
      const int place = places.place;
      await(shared_address(&sh.full[RINGS + place]), places.parity());
      places.use();
      const u8* piece = dynamic_shared() + place * PIECE;
#pragma unroll
      for (int e = 0; e < HEAD_TURNS; e++)
        dots[e] = input.multiply(piece, warp * HEAD_EACH + e * HEAD_AT_ONCE + lane / HEAD_LANES);
      __syncwarp();
      if (lane == 0) barrier_arrive(shared_address(&sh.empty[RINGS + place]));
      places.next(j);
#if HEAD_BITS != 16
#pragma unroll
      for (int e = 0; e < HEAD_TURNS; e++) sh.parts[warp][(j - i) * HEAD_TURNS + e][lane] = dots[e];
#endif
    }
#if HEAD_BITS == 16
#pragma unroll
    for (int e = 0; e < HEAD_TURNS; e++) {
#pragma unroll
      for (int step = 1; step < 32; step *= 2) dots[e] += __shfl_xor_sync(~0u, dots[e], step);
      if (lane == e) dot = dots[e];
    }
#else
    __syncwarp();
    const float* parts = &sh.parts[warp][least(lane / HEAD_AT_ONCE, MOST_PARTS - 1)][lane % HEAD_AT_ONCE * HEAD_LANES];
#pragma unroll
    for (int k = 0; k < HEAD_LANES; k += 4) {
      const float4 four = *(const float4*)(parts + k);
      dot += four.x + four.y + (four.z + four.w);
    }
    __syncwarp();
#endif
    const int row = row_of_head(i);
    const float y = (dot - mean * vectors.x) * inverse + vectors.y;
    if (row < VOCAB) {
      const u16 logit = (u16)pack(y, 0);
      a.logits[row] = logit;
#if CHOOSES
      // Tokens in ascending order: of equals the first stays.
      const bool may = (mark & allowed.forbidden) == 0 && row != allowed.none;
      if (may && row < allowed.begin && row >= allowed.text) of[0][0].add(widen(logit), row);
      if (may && row >= allowed.begin && row >= allowed.stamps) of[1][0].add(widen(logit), row);
#endif
    }
  }
#if CHOOSES
  s.result_tag ^= 1;
  if (!a.count) return;
#pragma unroll
  for (int kind = 0; kind < 2; kind++) {
    if (HEAD_EACH * TOGETHER > 1) of[kind][0] = best_of_warp(of[kind]);
    if (lane == 0) sh.best[kind][warp] = of[kind][0];
  }
  __syncwarp();
  bar_arrive(CHOICE, 32 * (WARPS + FINISHERS));
#endif
}
#endif

#if CHOOSES
// -- The choice of the token ---------------------------------------------------------------------------------------

// Before the token at `length` is chosen. Timestamps come in pairs, and never decrease.
__device__ __forceinline__ void allow(Shared& sh, const History& h, int length) {
  const int begin = sh.rules[TIMESTAMP_BEGIN];
  const bool before = h.before || length - sh.rules[BEGIN_INDEX] < 2, last = h.newest_at >= 0 && h.newest_at == length - 1;
  const bool open = last && !before, closed = last && before;
  if (thread() % 32) return;
  sh.history = h;
  sh.allowed = {open ? sh.rules[TEXT_END] : 0, begin,
                closed ? VOCAB : h.newest_at >= 0 ? h.newest + (open ? 0 : 1) : begin,
                length < sh.rules[MIN_LENGTH] ? 3 : 1, sh.rules[NO_TIMESTAMPS]};
}
// From the tokens up to the one in slot `slot`.
__device__ __forceinline__ void read_history(const Arguments& a, Shared& sh, int slot) {
  const int lane = thread() % 32;
  if (lane < RULES) sh.rules[lane] = (int)a.rules[lane];
  if (lane < MOST_ENDS) sh.ends[lane] = (int)a.ends[lane];
  __syncwarp();
  const int from = most(sh.rules[BEGIN_INDEX], 0), begin = sh.rules[TIMESTAMP_BEGIN];
  int at = -1;
#pragma unroll 1
  for (int i = from + lane; i <= slot; i += 32)
    if (a.tokens[i] >= begin) at = i;
  History h;
  h.newest_at = (int)largest_of_warp(at + 1) - 1;
  h.newest = h.newest_at < 0 ? 0 : (int)a.tokens[h.newest_at];
  h.before = slot > from && a.tokens[slot - 1] >= begin;
  h.unfinished = *a.unfinished, h.steps = *a.steps;
  // The first word of four has no tag.
  h.tag = next_tag(a.choices + 1);
  allow(sh, h, slot + 1);
}

// The token behind slot `slot`, when all programs know their best; and whether it is the last one. All programs find the
// same, one of them writes it. In a launch's last step the others do not need to know.
__device__ __forceinline__ int choose(const Arguments& a, Shared& sh, int slot, bool last, bool& finished) {
  constexpr int EACH = ratio(GIVERS, 32);
  const int lane = thread() % 32, length = slot + 1;
  History h = sh.history;
  Best text, stamp;
  {
    Best of[2][1];
    if (lane < WARPS) of[0][0] = sh.best[0][lane], of[1][0] = sh.best[1][lane];
    text = best_of_warp(of[0]), stamp = best_of_warp(of[1]);
  }
  if (lane < COPIES) {
    // As halves, which scores are, tokens and totals.
    const u32 scores = pack(text.score, stamp.score);
    poke16(a.choices + (lane * GIVERS + program()) * 4,
           {scores << 16 | text.token, tagged(__float_as_uint(text.total), h.tag), (scores & 0xFFFF0000) | stamp.token,
            tagged(__float_as_uint(stamp.total), h.tag)});
  }
  finished = false;
  if (last && program()) return 0;
  const u32* from = a.choices + program() % COPIES * (GIVERS * 4) + lane * 4;
  uint4 units[EACH];
  u32 missing = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++)
    if (i * 32 + lane < GIVERS) missing |= 1u << i;
  Patience patience;
  while (true) {
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if (missing >> i & 1) units[i] = peek16(from + i * (32 * 4));
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if ((missing >> i & 1) && fresh(units[i].y, h.tag)) missing &= ~(1u << i);
    if (!__any_sync(~0u, missing)) break;
    patience.spend();
  }
  Best of[2][EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    if (i * 32 + lane >= GIVERS) continue;
    of[0][i] = {high_of(units[i].x), __uint_as_float(units[i].y & ~1u), units[i].x & 0xFFFF};
    of[1][i] = {high_of(units[i].z), __uint_as_float(units[i].w & ~1u), units[i].z & 0xFFFF};
  }
  text = best_of_warp(of[0]), stamp = best_of_warp(of[1]);
  // A timestamp is forced when all of them together are likelier than the likeliest text token.
  const float nothing = __int_as_float(0xFF800000), all_stamps = stamp.score + log2_fast(fmaxf(stamp.total, 1e-37f)) * LN2;
  const bool forced = sh.rules[DETECT] && stamp.score > nothing && all_stamps > text.score;
  const bool stamped = forced || stamp.score > text.score;
  const float score = stamped ? stamp.score : text.score, top = fmaxf(score, NOTHING);
  const float total = (forced ? 0.0f : text.total * Best::beside(text.score, top)) +
                      stamp.total * Best::beside(stamp.score, top);
  // Where nothing may be chosen, the first token is.
  int token = stamped ? stamp.token : text.score > nothing ? text.token : 0u;
  const int ends = sh.rules[END_COUNT];
  if (!h.unfinished && ends) token = sh.rules[PAD];
  if (__any_sync(~0u, lane < ends && sh.ends[least(lane, MOST_ENDS - 1)] == token)) h.unfinished = false;
  finished = !h.unfinished;
  h.steps++;
  if (program() == 0 && lane == 0) {
    const int generated = length + 1 - sh.rules[PROMPT_LENGTH];
    a.tokens[length] = token, a.logprobs[generated - 1] = score - top - log2_fast(total) * LN2;
    *a.unfinished = h.unfinished, *a.finished = finished;
    *a.length = length + 1, *a.steps = h.steps;
    *(volatile long long*)a.seen = finished ? -generated : generated;
  }
  // One at `length - 1` is at the last token but one of the next step.
  h.before = h.newest_at >= 0 && h.newest_at == length - 1;
  if (token >= sh.rules[TIMESTAMP_BEGIN] && length >= sh.rules[BEGIN_INDEX]) h.newest_at = length, h.newest = token;
  h.tag ^= 1;
  __syncwarp();
  allow(sh, h, length + 1);
  return token;
}
#endif

// -- The kernel ----------------------------------------------------------------------------------------------------

// One place in the code for each kind of step: what all layers need must stay in the instruction cache.
__device__ __forceinline__ void multiply_layers(const Arguments& a, State& s, Shared& sh) {
  Lane own;
  own.fill(a, sh);
  ask_for_gains(own, s, sh, 0, 0);
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++, s.tag ^= 1)
#pragma unroll 1
    for (int step = 0; step < STEPS; step++)
      switch (step) {
        case QKV: product_of_stream<QKV>(a, own, s, sh, layer); break;
        case OWN_OUT: product_of_runs<OWN_OUT>(a, own, s, sh, layer); break;
        case QUERY: product_of_stream<QUERY>(a, own, s, sh, layer); break;
        case CROSS_OUT: product_of_runs<CROSS_OUT>(a, own, s, sh, layer); break;
        case FC1: product_of_stream<FC1>(a, own, s, sh, layer); break;
        case FC2: product_of_hidden(a, own, s, sh, layer);
      }
}

// What is needed of cold memory on the way, copied while the first weights come.
__device__ __forceinline__ void fill_tables(const Arguments& a, Shared& sh) {
  for (int i = thread(); i < LAYERS * 2; i += 32 * WARPS) sh.caches[i / 2][i % 2] = a.table[i / 2 * POINTERS + KEYS + i % 2];
  for (int i = thread(); i < LAYERS * 3; i += 32 * WARPS) {
    // The table has a layer norm's gain with the product in front of it.
    sh.gains[i / 3][i % 3] = i ? a.table[(i - 1) / 3 * POINTERS + GAIN + (i - 1) % 3] : (u64)a.first_gain;
    sh.eps[i / 3][i % 3] = a.eps[i];
  }
  for (int i = thread(); i < SLOTS; i += 32 * WARPS) sh.valid[i] = a.valid[i];
}
// The newest token's embedding, by the first finishing warp.
__device__ __forceinline__ void embed(const Arguments& a, State& s, long long token) {
  const Span width = share(WIDTH, ROWS);
  const int lane = thread() % 32, row = lane / 4 * 2, n = width.first + row;
  const bool finishes = row < width.count;
  if (finishes) {
    // A row that only pads the batch may hold anything.
    const int position = most(s.slot - (int)*a.offset, 0);
#pragma unroll
    for (int i = 0; i < 2; i++)
      s.residual[i] = widen(a.embedding[token * WIDTH + n + i]) + widen(a.positions[position * WIDTH + n + i]);
  }
  publish_stream(s, stream_place(a, n, lane), finishes);
}

__device__ __forceinline__ void finish_layers(const Arguments& a, State& s, Shared& sh) {
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++, s.tag ^= 1)
#pragma unroll 1
    for (int step = 0; step < STEPS; step++)
      if (is_attention(step))
        finish_attention(a, s, sh, step == OWN_ATTENTION);
      else
        finish(a, s, sh, layer, step);
}

#if CHOOSES
// What comes behind the layers for the warps that finish: the choice of the token, if one is to be chosen.
__device__ __forceinline__ void finish_step(const Arguments& a, State& s, Shared& sh, bool last, long long& token) {
  s.result_tag ^= 1;
  if (!a.count) return;
  // The new keys and values are there before anybody knows the token.
  fence();
  if (thread() / 32 == FIRST_FINISHER) {
    bar_sync(CHOICE, 32 * (WARPS + FINISHERS));
    bool finished;
    token = choose(a, sh, s.slot, last, finished);
    s.slot = finished ? -1 : s.slot + 1;
  } else {
    bar_arrive(CHOICE, 32 * (WARPS + FINISHERS));
  }
}
// And in front of them: it is known whether there is a step, and if so, the newest token's embedding is on its way.
__device__ __forceinline__ void start_step(const Arguments& a, State& s, Shared& sh, int step, long long token) {
  const bool first = thread() / 32 == FIRST_FINISHER;
  if (first) {
    if (s.slot >= 0) embed(a, s, token);
    if (thread() % 32 == 0) sh.slot = s.slot;
    __syncwarp();
  }
  if (step == 0) bar_sync(TABLES, THREADS - 32);
  bar_sync(READY, THREADS);
  s.slot = sh.slot;
  if (!first || s.slot < 0) return;
  if (step) {
    fence();
    bar_arrive(WRITTEN, 64);
  } else if (a.count) {
    read_history(a, sh, s.slot);
  }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_layers(Arguments a) {
  u8* memory = dynamic_shared();
  Shared& sh = *(Shared*)(memory + SHARED_AT);
  // Who has nothing to give to others leaves.
  if (share(WIDTH, ROWS).count <= 0 && share(FFN, ROWS_FFN).count <= 0) return;
  init_barriers(sh, WARPS + FINISHERS);
  Pointers ahead;
  if (thread() / 32 == FETCHER) ahead.load(a.table, 0);
  __syncthreads();
  State s;
  // Tags alternate, an even number of times a step: the first finds the buffers zeroed, or as the last one left them.
  s.stream_tag = s.tag = 1;
  s.residual[0] = s.residual[1] = 0;
  s.pieces = 0;
  // Each warp goes its own way from here.
#if CHOOSES
  // What is done once a step stands in front of what is done for each layer: the code of all warps' layers should not lie far
  // apart, or the instruction cache would not hold it.
  const int steps = most(a.count, 1);
  s.slot = 0;
  s.result_tag = next_tag(a.result);
  if (__shfl_sync(~0u, thread() / 128, 0) == WARPS / 4) {
    few_registers();
    if (thread() / 32 == FETCHER) {
      Fetching f;
      make_plans(sh);
      f.due = cycles();
#pragma unroll 1
      for (int step = 0;; step++) {
        if (step) fetch_head(a, sh, shared_address(memory), f, s.slot);
        if (step == steps) return;
        fetch(a, sh, shared_address(memory), f, ahead, s.slot, step == 0);
        if (s.slot < 0) return;
      }
    }
    long long token = 0;
    if (thread() / 32 == FIRST_FINISHER) {
      s.slot = newest_slot(a);
      token = s.slot < 0 ? 0 : a.tokens[s.slot];
      // Whoever waits for the count of steps is to know, too, that there are no more.
      if (a.count && s.slot < 0 && program() == 0 && thread() % 32 == 0)
        *(volatile long long*)a.seen = a.rules[PROMPT_LENGTH] - *a.length;
    }
#pragma unroll 1
    for (int step = 0;; step++) {
      if (step) finish_step(a, s, sh, step == steps, token);
      if (step == steps) return;
      start_step(a, s, sh, step, token);
      if (s.slot < 0) return;
      finish_layers(a, s, sh);
    }
  } else {
    many_registers();
    if (LINES) fill_lines(sh);
    fill_tables(a, sh);
    bar_sync(TABLES, THREADS - 32);
#pragma unroll 1
    for (int step = 0;; step++) {
      if (step) multiply_head(a, s, sh);
      if (step == steps) return;
      bar_sync(READY, THREADS);
      s.slot = sh.slot;
      if (s.slot < 0) {
        take(sh, s, QKV, chunks_of(QKV));
        return;
      }
      multiply_layers(a, s, sh);
    }
  }
#else
  // For a single step each looks by itself whether there is anything to do.
  if (__shfl_sync(~0u, thread() / 128, 0) == WARPS / 4) {
    few_registers();
    if (thread() / 32 == FETCHER) {
      Fetching f;
      make_plans(sh);
      f.due = cycles();
      fetch(a, sh, shared_address(memory), f, ahead, s.slot, true);
    } else {
      s.slot = newest_slot(a);
      if (s.slot < 0) return;
      if (VOCAB) s.result_tag = next_tag(a.result);
      if (thread() / 32 == FIRST_FINISHER) embed(a, s, a.tokens[s.slot]);
      bar_sync(TABLES, THREADS - 32);
      finish_layers(a, s, sh);
    }
  } else {
    many_registers();
    if (LINES) fill_lines(sh);
    fill_tables(a, sh);
    s.slot = newest_slot(a);
    if (s.slot < 0) return;
    if (VOCAB) s.result_tag = next_tag(a.result);
    bar_sync(TABLES, THREADS - 32);
    multiply_layers(a, s, sh);
#if VOCAB
    multiply_head(a, s, sh);
#endif
  }
#endif
}
#endif  // BATCH == 1
