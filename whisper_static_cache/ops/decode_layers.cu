// All decoder layers of a one-token step at batch 1, as one persistent kernel: one program to a multiprocessor.
//
// A layer is six products and two attentions, each of which needs the whole result of the one before. Kernels of their
// own would drain and fill the machine ten times a layer. Here the programs stay and pass their results through the L2
// cache: a value travels in one 64-bit word with the number of the exchange it belongs to, so that who reads the word
// knows from it alone whether the value is there, without a barrier, a fence or a counter. Meanwhile the weights,
// which depend on nothing, stream into a ring in shared memory by bulk copies, several products ahead.
//
// Built by NVRTC without headers. Constants that the launcher defines:
//   WIDTH, FFN, HEADS (of 64), PROGRAMS, SPLITS (programs to a head), SLOTS, SOURCE (keys of cross-attention),
//   BF16 (0 or 1), MEMORY (bytes of shared memory), LAYERS.
//
// Why every buffer can be used again without being cleared: a program that writes exchange e + 1 into a buffer holds
// values that depend on every program having read exchange e out of it (see the chain in `layer`).

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef unsigned char u8;

constexpr int WARPS = 15, THREADS = 32 * WARPS;  // Those that compute; one more warp fetches.
constexpr int COLUMNS = 16;  // Warps' sums, in fours; what is behind the last warp's stays zero.
constexpr int PIECES = BF16 ? 3 : 2;  // Parts that a float32 activation is split into for the tensor cores.
constexpr float SHRINK = 1.0f / 16, GROW = 16.0f;  // Keeps activations times gains far from float16's largest number.
constexpr float NOTHING = -1e30f, LOG2E = 1.4426950408889634f;

constexpr int up(int n, int to) { return (n + to - 1) / to * to; }
constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr int most(int a, int b) { return a > b ? a : b; }
// Output features of a program, even so that pairs stay together.
constexpr int rows_of(int features) { return up((features + PROGRAMS - 1) / PROGRAMS, 2); }

constexpr int ROWS_QKV = rows_of(3 * WIDTH), ROWS = rows_of(WIDTH), ROWS_FFN = rows_of(FFN);
constexpr int MOST_ROWS = up(most(ROWS_QKV, most(ROWS, ROWS_FFN)), 16);
constexpr int SHARE = up((64 + SPLITS - 1) / SPLITS, 2);  // Dimensions of a head that a program merges.

// A layer in thirds: self-attention, cross-attention, feed-forward. Each begins with a product of the normalised
// stream and ends with one that is added to it.
enum { SELF, CROSS, FORWARD, THIRDS };
// What is fetched, in this order: for each third the first weights, keys and values if any, the second weights.
enum { FIRST, RUN, SECOND };
constexpr int CHUNKS = 3 * THIRDS;
// A layer's device pointers, in the order of the launcher's table; those that go by thirds three in a row.
enum {
  QUERY_WEIGHT, KEY_WEIGHT, VALUE_WEIGHT, CROSS_QUERY_WEIGHT, FC1_WEIGHT, SECOND_WEIGHT,
  CONSTANT = SECOND_WEIGHT + 3, FOLDED = CONSTANT + 3, BIAS = FOLDED + 3, GAIN = BIAS + 3,
  KEYS = GAIN + 3, VALUES, CROSS_KEYS, CROSS_VALUES, POINTERS
};

// A product's chunk: the first half of the rows, 64 bytes behind a multiple of 128 the second half, and the vectors
// that go with them. The eight lanes that shared memory serves at a time read two rows, one of each half, and thus
// meet different banks. Vectors are copied from the multiple of 16 bytes at or below their first element.
constexpr int VECTOR = 256;
__device__ constexpr int second_half(int rows, int row_bytes) { return (rows + 1) / 2 * row_bytes + 64; }
__device__ constexpr int vectors(int rows, int row_bytes) {
  return up(second_half(rows, row_bytes) + rows / 2 * row_bytes, 128);
}
__device__ constexpr int chunk_bytes(int rows, int row_bytes, bool normed) {
  return rows ? up(vectors(rows, row_bytes) + VECTOR + (normed ? VECTOR + 2 * WIDTH : 0), 128) : 0;
}
static_assert(MOST_ROWS * 4 + 16 <= VECTOR, "a vector is longer than its place");

constexpr int SLOTS_IN_RING = 8;
constexpr int STAGE = most(PIECES * (up(WIDTH / 32, WARPS) / WARPS), up(FFN / 32, WARPS) / WARPS) * 16;  // words a warp
struct Shared {
  alignas(16) u32 stage[WARPS][STAGE];
  alignas(16) float sums[2][MOST_ROWS][COLUMNS + 4];
  alignas(16) float moments[2][2][COLUMNS];
  alignas(16) float query[64], key[64], value[64];
  alignas(16) float runs[WARPS][64], tops[WARPS], totals[WARPS];
  float merge[SPLITS * (SHARE + 2)];
  float eps[LAYERS * THIRDS];
  int bytes[CHUNKS];
  u64 full[SLOTS_IN_RING], empty[SLOTS_IN_RING];
  u8 valid[SLOTS];
};
constexpr int RING = (MEMORY - (int)sizeof(Shared)) / 128 * 128;
static_assert(RING >= most(chunk_bytes(most(ROWS_QKV, ROWS_FFN), 2 * WIDTH, true), chunk_bytes(ROWS, 2 * FFN, false)),
              "a product exceeds the shared memory");
static_assert(RING >= (most(SOURCE, SLOTS) + SPLITS - 1) / SPLITS * 256, "a run of keys exceeds the shared memory");

// -- Instructions that the language has no word for ---------------------------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void read2(u64& a, u64& b, const u64* p) {
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0,%1},[%2];" : "=l"(a), "=l"(b) : "l"(p) : "memory");
}
__device__ __forceinline__ u64 read1(const u64* p) {
  u64 a;
  asm volatile("ld.relaxed.gpu.global.u64 %0,[%1];" : "=l"(a) : "l"(p) : "memory");
  return a;
}
__device__ __forceinline__ void publish(u64* p, u32 value, u32 exchange) {
  asm volatile("st.relaxed.gpu.global.u64 [%0],%1;" ::"l"(p), "l"((u64)exchange << 32 | value) : "memory");
}
__device__ __forceinline__ void load16(u32 (&r)[4], u32 p) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p)
               : "memory");
}
__device__ __forceinline__ u32 load4(u32 p) {
  u32 a;
  asm volatile("ld.shared.u32 %0,[%1];" : "=r"(a) : "r"(p) : "memory");
  return a;
}
__device__ __forceinline__ u16 load2(u32 p) {
  u16 a;
  asm volatile("ld.shared.u16 %0,[%1];" : "=h"(a) : "r"(p) : "memory");
  return a;
}
__device__ __forceinline__ void copy_async(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ u64 nanoseconds() {
  u64 t;
  asm volatile("mov.u64 %0,%%globaltimer;" : "=l"(t));
  return t;
}
// Every program is resident (the launch is cooperative) and every wait ends; should one not, fail rather than hang.
struct Patience {
  u64 since = 0;
  u32 rounds = 0;
  __device__ __forceinline__ void spend() {
    if ((++rounds & 0xFFFF) == 0) {
      u64 now = nanoseconds();
      if (since == 0) since = now;
      if (now - since > 10000000000ull) __trap();
    }
  }
};
__device__ __forceinline__ void await(u32 barrier, u32 parity) {
  Patience patience;
  for (u32 done = 0; !done; patience.spend())
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p,[%1],%2; selp.u32 %0,1,0,p;}"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BF16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}
// Two floats as a pair in the model's dtype, the first in the low half, and back.
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 pair;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
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
__device__ __forceinline__ float low_of(u32 pair) { return widen((u16)pair); }
__device__ __forceinline__ float high_of(u32 pair) { return widen((u16)(pair >> 16)); }
__device__ __forceinline__ float rounded(float x) { return low_of(pack(x, 0)); }

__device__ __forceinline__ void everybody() { asm volatile("bar.sync 1,%0;" ::"n"(THREADS) : "memory"); }

// -- The ring ------------------------------------------------------------------------------------------------------

struct Arguments {
  const u64* table;
  u64 *stream, *heads, *partial, *mixed, *hidden;
  u32* exchange;
  const long* tokens;
  const long* length;
  const long* offset;
  const u8* valid;
  const u16 *embedding, *positions;
  const u16* last_gain;
  float *gained, *stats;
  const float* eps;
  float scale;
};

struct Span {
  int first, count;  // Output features or keys of this program.
};
__device__ __forceinline__ Span share(int total, int each) {
  int first = least((int)blockIdx.x * each, total);
  return {first, least(each, total - first)};
}
__device__ __forceinline__ Span keys_of(int total) {
  if (blockIdx.x >= HEADS * SPLITS) return {0, 0};
  int each = (total + SPLITS - 1) / SPLITS, first = least((int)blockIdx.x % SPLITS * each, total);
  return {first, least(each, total - first)};
}
// Features of the first product of a third.
__device__ __forceinline__ Span features_of(int third) {
  return third == SELF ? share(3 * WIDTH, ROWS_QKV) : third == CROSS ? share(WIDTH, ROWS) : share(FFN, ROWS_FFN);
}

// A chunk's place: behind the one before it, or at the start where it would cross the end.
__device__ __forceinline__ int placed(int position, int bytes) { return position + bytes > RING ? 0 : position; }

// One copy of a chunk's: lane by lane halves of the rows, before and behind a matrix's end, then the vectors.
__device__ __forceinline__ u32 copy_of(const u64* p, int chunk, int lane, u32& at, const u8*& from, int slot) {
  const int third = chunk / 3, kind = chunk % 3;
  if (kind == RUN) {
    // The head's keys lie in a row, and so do its values.
    Span keys = keys_of(third == SELF ? slot : SOURCE);
    long first = (long)(blockIdx.x / SPLITS) * (third == SELF ? SLOTS : SOURCE) + keys.first;
    at = lane * keys.count * 128;
    if (lane >= 2) return 0;
    from = (const u8*)p[KEYS + 2 * third + lane] + first * 128;
    return keys.count * 128;
  }
  Span span = kind == FIRST ? features_of(third) : share(WIDTH, ROWS);
  const int row_bytes = kind == SECOND && third == FORWARD ? 2 * FFN : 2 * WIDTH;
  const int behind = vectors(span.count, row_bytes);
  if (lane < 4) {
    int middle = span.first + (span.count + 1) / 2;
    int low = lane < 2 ? span.first : middle, high = lane < 2 ? middle : span.first + span.count;
    int start = low;
    int matrix = kind == SECOND ? SECOND_WEIGHT + third : third == SELF ? QUERY_WEIGHT : CROSS_QUERY_WEIGHT + third - 1;
    if (kind == FIRST && third == SELF) {
      // Queries', keys' and values' weights are matrices of their own: a run of rows may cross from one to the next.
      int end = (low / WIDTH + 1) * WIDTH;
      if (lane % 2) low = least(end, high);
      else high = least(end, high);
      matrix += low / WIDTH;
    } else if (lane % 2) {
      return 0;
    }
    at = (lane < 2 ? 0 : second_half(span.count, row_bytes)) + (low - start) * row_bytes;
    if (low >= high) return 0;
    from = (const u8*)p[matrix] + (long)(kind == FIRST && third == SELF ? low % WIDTH : low) * row_bytes;
    return (high - low) * row_bytes;
  }
  if (lane == 6 && kind == FIRST) {
    at = behind + 2 * VECTOR;
    from = (const u8*)p[GAIN + third];
    return 2 * WIDTH;
  }
  if (lane > (kind == FIRST ? 5 : 4)) return 0;
  const int each = kind == FIRST ? 4 : 2, begin = span.first * each / 16 * 16;
  at = behind + (lane - 4) * VECTOR;
  from = (const u8*)p[kind == SECOND ? BIAS + third : lane == 4 ? CONSTANT + third : FOLDED + third] + begin;
  return up((span.first + span.count) * each, 16) - begin;
}

// The fetching warp: every chunk of every layer, as soon as there is room for it.
__device__ __forceinline__ void fetch(const Arguments& a, Shared& sh, u32 memory, int slot) {
  const int lane = threadIdx.x % 32;
  int issued = 0, released = 0, write = 0, oldest = 0, oldest_chunk = 0;
  for (int layer = 0; layer < LAYERS; layer++)
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      const int bytes = sh.bytes[chunk];
      if (!bytes) continue;
      const int start = placed(write, bytes);
      u32 at = 0;
      const u8* from = nullptr;
      const u32 size = lane < 7 ? copy_of(a.table + layer * POINTERS, chunk, lane, at, from, slot) : 0;
      u32 all = size;
#pragma unroll
      for (int step = 1; step < 8; step *= 2) all += __shfl_xor_sync(~0u, all, step);
      while (issued - released == SLOTS_IN_RING ||
             (issued != released &&
              !(write > oldest ? start == write || bytes <= oldest : start == write && write + bytes <= oldest))) {
        await(shared_address(&sh.empty[released % SLOTS_IN_RING]), released / SLOTS_IN_RING & 1);
        released++;
        while (!sh.bytes[oldest_chunk]) oldest_chunk = (oldest_chunk + 1) % CHUNKS;
        oldest = placed(oldest, sh.bytes[oldest_chunk]) + sh.bytes[oldest_chunk];
        oldest_chunk = (oldest_chunk + 1) % CHUNKS;
      }
      const u32 barrier = shared_address(&sh.full[issued % SLOTS_IN_RING]);
      if (lane == 0)
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%0],%1;" ::"r"(barrier), "r"(all) : "memory");
      __syncwarp();
      if (size) copy_async(memory + start + at, from, size, barrier);
      write = start + bytes;
      issued++;
    }
}

// -- A product -----------------------------------------------------------------------------------------------------

enum Input { STREAM, PAIRS };

struct State {
  u32 memory;
  int taken, read;   // Chunks taken from the ring, and where the last one ends.
  float residual;    // Of the feature that this thread finishes.
  int parity, slot;
};

// Wait for the next chunk and get its address; a program that has none gets any.
__device__ __forceinline__ u32 take(State& s, Shared& sh, int chunk) {
  const int bytes = sh.bytes[chunk];
  if (!bytes) return s.memory;
  const int start = placed(s.read, bytes);
  await(shared_address(&sh.full[s.taken % SLOTS_IN_RING]), s.taken / SLOTS_IN_RING & 1);
  s.read = start + bytes;
  s.taken++;
  return s.memory + start;
}
// The chunk last taken has been read by everybody.
__device__ __forceinline__ void release(const State& s, Shared& sh, int chunk) {
  if (threadIdx.x == THREADS - 1 && sh.bytes[chunk])
    asm volatile("mbarrier.arrive.shared.b64 _,[%0];" ::"r"(shared_address(&sh.empty[(s.taken - 1) % SLOTS_IN_RING]))
                 : "memory");
}

template <Input INPUT, int DEPTH, int TILES, int KEPT>
__device__ __forceinline__ void product(const Arguments& a, State& s, Shared& sh, int layer, int third, const Span span,
                                        const u64* from, u64* to, u32 expected) {
  constexpr int BLOCKS = DEPTH / 32, SOME = (BLOCKS + WARPS - 1) / WARPS;  // Blocks of 32 inputs that a warp takes.
  constexpr int PER_LOAD = INPUT == STREAM ? 2 : 4, LOADS = (SOME + PER_LOAD - 1) / PER_LOAD;
  constexpr int ROW_BYTES = 2 * DEPTH;
  constexpr int KEEP = least(KEPT, SOME);
  if (!span.count) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int block0 = warp * SOME, mine = least(SOME, BLOCKS - block0);
  const int chunk = 3 * third + (INPUT == STREAM ? FIRST : SECOND);

  // This warp's part of the weights as the tensor cores take them: lanes with even g read the first half of the rows.
  const u32 weights = take(s, sh, chunk);
  const int upper_rows = (span.count + 1) / 2, rows = g % 2 ? span.count / 2 : upper_rows;
  const u32 corner = weights + (g % 2 ? second_half(span.count, ROW_BYTES) : 0) + block0 * 64 + t * 16;
  u32 w[KEEP][TILES][2][4];
  auto load = [&](u32 (&r)[4], int b, int tile, int h) {
    int row = tile * 8 + h * 4 + g / 2;
    if (b < mine && row < rows) load16(r, corner + row * ROW_BYTES + b * 64);
    else r[0] = r[1] = r[2] = r[3] = 0;
  };
#pragma unroll
  for (int b = 0; b < KEEP; b++)
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int h = 0; h < 2; h++) load(w[b][tile][h], b, tile, h);
  const u32 behind = weights + vectors(span.count, ROW_BYTES);
  u32 gains[LOADS];
  if (INPUT == STREAM) {
#pragma unroll
    for (int l = 0; l < LOADS; l++)
      gains[l] = 2 * l + lane / 16 < mine ? load4(behind + 2 * VECTOR + ((block0 + 2 * l) * 32 + 2 * lane) * 2) : 0;
  }
  // Four threads finish a feature.
  const int row = threadIdx.x / 4, n = span.first + row;
  const bool finishes = row < span.count;
  float constant = 0, fold = 0;
  u16* cache = nullptr;
  if (finishes) {
    if (INPUT == STREAM) {
      const u32 at = behind + n * 4 - span.first * 4 / 16 * 16;
      constant = __uint_as_float(load4(at));
      fold = __uint_as_float(load4(at + VECTOR));
      if (third == SELF && n >= WIDTH) cache = (u16*)a.table[layer * POINTERS + (n < 2 * WIDTH ? KEYS : VALUES)];
    } else {
      constant = widen(load2(behind + n * 2 - span.first * 2 / 16 * 16));
    }
  }

  // The activations, as soon as they are there, in this warp's own corner of shared memory.
  u32* stage = sh.stage[warp];
  u64 y[LOADS][2];
  {
    Patience patience;
    bool again;
    do {
      again = false;
#pragma unroll
      for (int l = 0; l < LOADS; l++)
        if (PER_LOAD * l + lane / (32 / PER_LOAD) < mine) {
          int at = (block0 + PER_LOAD * l) * (32 / (INPUT == STREAM ? 1 : 2)) + 2 * lane;
          read2(y[l][0], y[l][1], from + at);
        } else {
          y[l][0] = y[l][1] = (u64)expected << 32;
        }
#pragma unroll
      for (int l = 0; l < LOADS; l++) again |= (u32)(y[l][0] >> 32) != expected || (u32)(y[l][1] >> 32) != expected;
      patience.spend();
    } while (__any_sync(~0u, again));
  }
  float sum = 0, squares = 0;
#pragma unroll
  for (int l = 0; l < LOADS; l++) {
    bool inside = PER_LOAD * l + lane / (32 / PER_LOAD) < mine;
    if (INPUT == STREAM) {
      float x0 = __uint_as_float((u32)y[l][0]), x1 = __uint_as_float((u32)y[l][1]);
      if (inside) {
        sum += x0 + x1;
        squares += x0 * x0 + x1 * x1;
        x0 *= low_of(gains[l]) * SHRINK;
        x1 *= high_of(gains[l]) * SHRINK;
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) {
          u32 pair = pack(x0, x1);
          stage[piece * SOME * 16 + l * 32 + lane] = pair;
          x0 -= low_of(pair);
          x1 -= high_of(pair);
        }
      }
    } else if (inside) {
      *(uint2*)(stage + l * 64 + 2 * lane) = {(u32)y[l][0], (u32)y[l][1]};
    }
  }
  __syncwarp();
  float c[TILES][2][4] = {};
  const u32 stage_address = shared_address(stage) + (INPUT == STREAM ? least(g, PIECES - 1) * SOME * 64 : 0) + t * 16;
#pragma unroll
  for (int b = 0; b < SOME; b++)
    if (b < mine) {
      u32 x[4];
      load16(x, stage_address + b * 64);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
        if (tile * 16 < span.count) {
          u32 late[2][4];
          if (b >= KEEP) load(late[0], b, tile, 0), load(late[1], b, tile, 1);
          u32(&v)[2][4] = b < KEEP ? w[b < KEEP ? b : 0][tile] : late;
          multiply(c[tile][0], v[0][0], v[1][0], v[0][1], v[1][1], x[0], x[1]);
          multiply(c[tile][1], v[0][2], v[1][2], v[0][3], v[1][3], x[2], x[3]);
        }
    }
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    // A lane with t = 0 holds the first two columns, that is, pieces, of its rows.
    float upper = c[tile][0][0] + c[tile][1][0], lower = c[tile][0][2] + c[tile][1][2];
    if (INPUT == STREAM) {
      if (PIECES == 3) {
        upper += __shfl_down_sync(~0u, upper, 1);
        lower += __shfl_down_sync(~0u, lower, 1);
      }
      upper += c[tile][0][1] + c[tile][1][1];
      lower += c[tile][0][3] + c[tile][1][3];
    }
    const int at = tile * 8 + g / 2;
    if (t == 0) {
      const int base = g % 2 ? upper_rows : 0;
      if (at < rows) sh.sums[s.parity][base + at][warp] = upper;
      if (at + 4 < rows) sh.sums[s.parity][base + at + 4][warp] = lower;
    }
  }
  if (INPUT == STREAM) {
#pragma unroll
    for (int step = 16; step; step /= 2) {
      sum += __shfl_xor_sync(~0u, sum, step);
      squares += __shfl_xor_sync(~0u, squares, step);
    }
    if (lane == 0) sh.moments[s.parity][0][warp] = sum, sh.moments[s.parity][1][warp] = squares;
  }
  everybody();
  release(s, sh, chunk);
  if (warp * 8 < span.count) {
    const int quarter = threadIdx.x % 4 * 4;
    float4 four = {};
    if (finishes) four = *(const float4*)&sh.sums[s.parity][row][quarter];
    float total = four.x + four.y + four.z + four.w;
    if (INPUT == STREAM) {
      four = *(const float4*)&sh.moments[s.parity][0][quarter];
      sum = four.x + four.y + four.z + four.w;
      four = *(const float4*)&sh.moments[s.parity][1][quarter];
      squares = four.x + four.y + four.z + four.w;
    }
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      total += __shfl_xor_sync(~0u, total, step);
      if (INPUT == STREAM) {
        sum += __shfl_xor_sync(~0u, sum, step);
        squares += __shfl_xor_sync(~0u, squares, step);
      }
    }
    const bool leads = finishes && threadIdx.x % 4 == 0;
    if (INPUT == STREAM) {
      float mean = sum / DEPTH, variance = fmaxf(squares / DEPTH - mean * mean, 0.0f);
      total = (total * GROW - mean * fold) * rsqrtf(variance + sh.eps[3 * layer + third]) + constant;
      if (third == FORWARD) {
        float x = 0.5f * total * (1.0f + erff(total * 0.7071067811865476f));
        float next = __shfl_down_sync(~0u, x, 4);
        if (leads && row % 2 == 0) publish(to + n / 2, pack(x, next), expected + 1);
      } else {
        // Keys and values are attended to as the cache holds them.
        total = n < WIDTH ? total * a.scale : rounded(total);
        if (leads) publish(to + n, __float_as_uint(total), expected + 1);
        if (leads && cache) {
          int column = n % WIDTH;
          cache[((long)(column / 64) * SLOTS + s.slot) * 64 + column % 64] = (u16)pack(total, 0);
        }
      }
    } else {
      s.residual += total + constant;
      if (leads) publish(to + n, __float_as_uint(s.residual), expected + 1);
    }
  }
  s.parity ^= 1;
}

// -- Attention -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void take_runs(float& top, float& total, float (&x)[8], float other_top, float other_total,
                                          const float (&other)[8]) {
  float best = fmaxf(top, other_top), mine = exp2f(top - best), theirs = exp2f(other_top - best);
  total = total * mine + other_total * theirs;
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = x[i] * mine + other[i] * theirs;
  top = best;
}

__device__ __forceinline__ void unpack8(float (&x)[8], const u32 (&r)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) x[2 * i] = low_of(r[i]), x[2 * i + 1] = high_of(r[i]);
}

// This program's run of the keys of its head, then, together with the head's other programs, the merge of the runs.
__device__ __forceinline__ void attention(const Arguments& a, State& s, Shared& sh, int third, u32 query_at) {
  if (blockIdx.x >= HEADS * SPLITS) return;
  const bool own = third == SELF;
  const u32 runs_at = query_at + 1, mixed_at = query_at + 2;
  const int head = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = threadIdx.x / 8, part = threadIdx.x % 8;
  const Span span = keys_of(own ? s.slot : SOURCE);
  const u32 keys = take(s, sh, 3 * third + RUN), values = keys + span.count * 128;

  // The query, and in self-attention the newest key and value.
  if (threadIdx.x < (own ? 192 : 64)) {
    int which = threadIdx.x / 64, dim = threadIdx.x % 64;
    const u64* at = a.heads + which * WIDTH + head * 64 + dim;
    u64 word;
    Patience patience;
    do {
      word = read1(at);
      patience.spend();
    } while ((u32)(word >> 32) != query_at);
    float x = __uint_as_float((u32)word);
    if (which == 0) sh.query[dim] = x * LOG2E;
    if (which == 1) sh.key[dim] = x;
    if (which == 2) sh.value[dim] = x;
  }
  everybody();
  float q[8], x[8] = {}, top = NOTHING, total = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) q[i] = sh.query[part * 8 + i];
  constexpr int AT_ONCE = 4, GROUPS = THREADS / 8;
  const int newest = own && split == SPLITS - 1 ? 1 : 0;
  for (int start = 0; start < span.count + newest; start += GROUPS * AT_ONCE) {
    float score[AT_ONCE];
    u32 raw[4];
    float other[8];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      int j = start + i * GROUPS + group;
      bool there = j < span.count + newest;
      if (j < span.count) {
        load16(raw, keys + j * 128 + part * 16);
        unpack8(other, raw);
      } else if (there) {
#pragma unroll
        for (int e = 0; e < 8; e++) other[e] = sh.key[part * 8 + e];
      }
      float dot = 0;
      if (there) {
#pragma unroll
        for (int e = 0; e < 8; e++) dot += q[e] * other[e];
      }
#pragma unroll
      for (int step = 1; step < 8; step *= 2) dot += __shfl_xor_sync(~0u, dot, step);
      if (own) there = there && sh.valid[span.first + j];
      score[i] = there ? dot : -__int_as_float(0x7f800000);
    }
    float best = top;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) best = fmaxf(best, score[i]);
    float shrink = exp2f(top - best);
    top = best;
    total *= shrink;
#pragma unroll
    for (int e = 0; e < 8; e++) x[e] *= shrink;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      int j = start + i * GROUPS + group;
      float weight = exp2f(score[i] - best);
      total += weight;
      if (j < span.count) {
        load16(raw, values + j * 128 + part * 16);
        unpack8(other, raw);
#pragma unroll
        for (int e = 0; e < 8; e++) x[e] += weight * other[e];
      } else if (j < span.count + newest) {
#pragma unroll
        for (int e = 0; e < 8; e++) x[e] += weight * sh.value[part * 8 + e];
      }
    }
  }
#pragma unroll
  for (int step = 8; step < 32; step *= 2) {
    float other[8];
    float other_top = __shfl_xor_sync(~0u, top, step), other_total = __shfl_xor_sync(~0u, total, step);
#pragma unroll
    for (int e = 0; e < 8; e++) other[e] = __shfl_xor_sync(~0u, x[e], step);
    take_runs(top, total, x, other_top, other_total, other);
  }
  if (lane < 8) {
#pragma unroll
    for (int e = 0; e < 8; e++) sh.runs[warp][part * 8 + e] = x[e];
    if (lane == 0) sh.tops[warp] = top, sh.totals[warp] = total;
  }
  everybody();
  release(s, sh, 3 * third + RUN);
  u64* run = a.partial + (long)head * SPLITS * 66;
  if (threadIdx.x < 64) {
    float best = NOTHING, sum = 0, all = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) best = fmaxf(best, sh.tops[i]);
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
      float weight = exp2f(sh.tops[i] - best);
      sum += weight * sh.runs[i][threadIdx.x];
      all += weight * sh.totals[i];
    }
    publish(run + split * 66 + threadIdx.x, __float_as_uint(sum), runs_at);
    if (threadIdx.x == 0) publish(run + split * 66 + 64, __float_as_uint(best), runs_at);
    if (threadIdx.x == 1) publish(run + split * 66 + 65, __float_as_uint(all), runs_at);
  }
  // Each of the head's programs merges some of the dimensions.
  const int first = split * SHARE, count = least(SHARE, 64 - first);
  if (count > 0) {
    if (threadIdx.x < SPLITS * (SHARE + 2)) {
      int of = threadIdx.x / (SHARE + 2), e = threadIdx.x % (SHARE + 2);
      int element = e < SHARE ? first + e : 64 + e - SHARE;
      if (e >= SHARE || e < count) {
        u64 word;
        Patience patience;
        do {
          word = read1(run + of * 66 + element);
          patience.spend();
        } while ((u32)(word >> 32) != runs_at);
        sh.merge[threadIdx.x] = __uint_as_float((u32)word);
      }
    }
    everybody();
    if (threadIdx.x < count / 2) {
      float best = NOTHING, all = 0, low = 0, high = 0;
#pragma unroll
      for (int i = 0; i < SPLITS; i++) best = fmaxf(best, sh.merge[i * (SHARE + 2) + SHARE]);
#pragma unroll
      for (int i = 0; i < SPLITS; i++) {
        const float* m = sh.merge + i * (SHARE + 2);
        float weight = exp2f(m[SHARE] - best);
        all += weight * m[SHARE + 1];
        low += weight * m[2 * threadIdx.x];
        high += weight * m[2 * threadIdx.x + 1];
      }
      float inverse = 1.0f / fmaxf(all, 1e-30f);
      publish(a.mixed + head * 32 + first / 2 + threadIdx.x, pack(low * inverse, high * inverse), mixed_at);
    }
  }
}

// -- The kernel ----------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) decode_layers(Arguments a) {
  extern __shared__ __align__(128) u8 memory[];
  Shared& sh = *(Shared*)(memory + RING);
  const Span width = share(WIDTH, ROWS);
  // Who has nothing to give to others leaves; the rest of this function counts on everybody having started.
  if (!width.count && !features_of(SELF).count && !features_of(FORWARD).count && blockIdx.x >= HEADS * SPLITS) return;
  State s;
  s.memory = shared_address(memory);
  s.slot = (int)*a.length - 1;
  s.taken = s.read = s.parity = 0;
  if (threadIdx.x < CHUNKS) {
    const int third = threadIdx.x / 3, kind = threadIdx.x % 3;
    int bytes = kind == FIRST ? chunk_bytes(features_of(third).count, 2 * WIDTH, true)
                : kind == SECOND ? chunk_bytes(width.count, third == FORWARD ? 2 * FFN : 2 * WIDTH, false)
                : third == FORWARD ? 0 : up(keys_of(third == SELF ? s.slot : SOURCE).count * 256, 128);
    sh.bytes[threadIdx.x] = bytes;
  }
  if (threadIdx.x < SLOTS_IN_RING) {
    asm volatile("mbarrier.init.shared.b64 [%0],1;" ::"r"(shared_address(&sh.full[threadIdx.x])) : "memory");
    asm volatile("mbarrier.init.shared.b64 [%0],1;" ::"r"(shared_address(&sh.empty[threadIdx.x])) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  for (int i = threadIdx.x; i < 2 * MOST_ROWS; i += THREADS + 32) sh.sums[i / MOST_ROWS][i % MOST_ROWS][WARPS] = 0;
  if (threadIdx.x < 4) sh.moments[threadIdx.x / 2][threadIdx.x % 2][WARPS] = 0;
  for (int i = threadIdx.x; i < LAYERS * THIRDS; i += THREADS + 32) sh.eps[i] = a.eps[i];
  for (int i = threadIdx.x; i < SLOTS; i += THREADS + 32) sh.valid[i] = a.valid[i];
  __syncthreads();
  if (threadIdx.x >= THREADS) {
    fetch(a, sh, s.memory, s.slot);
    return;
  }
  // Exchanges are numbered through the launches; a product writes the one after that which it reads.
  u32 e = *a.exchange;
  const int row = threadIdx.x / 4, n = width.first + row;
  const bool finishes = row < width.count, leads = finishes && threadIdx.x % 4 == 0;
  s.residual = 0;
  if (finishes) {
    const long token = a.tokens[s.slot];
    long position = s.slot - *a.offset;
    if (position < 0) position = 0;
    s.residual = widen(a.embedding[token * WIDTH + n]) + widen(a.positions[position * WIDTH + n]);
    if (leads) publish(a.stream + n, __float_as_uint(s.residual), e);
  }
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++)
#pragma unroll 1
    for (int third = 0; third < THIRDS; third++) {
      // The chain: whoever writes `stream` here has read all of `mixed`, to which every head's programs gave, who had
      // read what every program gave to `heads` of theirs; and so on around the layer.
      product<STREAM, WIDTH, MOST_ROWS / 16, 4>(a, s, sh, layer, third, features_of(third), a.stream,
                                               third == FORWARD ? a.hidden : a.heads, e);
      if (third < FORWARD) {
        attention(a, s, sh, third, e + 1);
        product<PAIRS, WIDTH, (ROWS + 15) / 16, 4>(a, s, sh, layer, third, width, a.mixed, a.stream, e + 3);
        e += 4;
      } else {
        product<PAIRS, FFN, (ROWS + 15) / 16, 6>(a, s, sh, layer, third, width, a.hidden, a.stream, e + 1);
        e += 2;
      }
    }
  if (leads) a.gained[n] = s.residual * widen(a.last_gain[n]);
  if (threadIdx.x % 4 == 0 && row < MOST_ROWS) sh.sums[s.parity][row][0] = finishes ? s.residual : 0;
  everybody();
  if (threadIdx.x == 0 && width.count) {
    // The sums that the head's layer norm goes by, one pair from each program.
    float sum = 0, squares = 0;
    for (int i = 0; i < width.count; i++) {
      float x = sh.sums[s.parity][i][0];
      sum += x;
      squares += x * x;
    }
    constexpr int COUNT = (WIDTH + ROWS - 1) / ROWS;
    a.stats[blockIdx.x] = sum, a.stats[COUNT + blockIdx.x] = squares;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.exchange = e + 1;
}
