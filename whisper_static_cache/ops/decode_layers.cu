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

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int PIECES = BF16 ? 3 : 2;  // Parts that a float32 activation is split into for the tensor cores.
constexpr float SHRINK = 1.0f / 16, GROW = 16.0f;  // Keeps activations times gains far from float16's largest number.
constexpr float NOTHING = -1e30f, LOG2E = 1.4426950408889634f;
constexpr int BARRIERS = 8;

constexpr int up(int n, int to) { return (n + to - 1) / to * to; }
constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr int most(int a, int b) { return a > b ? a : b; }
// Output features of a program, even so that pairs stay together.
constexpr int rows_of(int features) { return up((features + PROGRAMS - 1) / PROGRAMS, 2); }

constexpr int ROWS_QKV = rows_of(3 * WIDTH), ROWS = rows_of(WIDTH), ROWS_FFN = rows_of(FFN);
// 64 bytes more than a row: the eight lanes that one access serves at a time then meet different banks.
constexpr int PITCH = 2 * WIDTH + 64, PITCH_FFN = 2 * FFN + 64;
constexpr int SHARE = up((64 + SPLITS - 1) / SPLITS, 2);  // Dimensions of a head that a program merges.

// What a program's pointers of a layer are, in the order of the launcher's table.
enum Pointer {
  Q_WEIGHT, K_WEIGHT, V_WEIGHT, SELF_OUT_WEIGHT, CROSS_Q_WEIGHT, CROSS_OUT_WEIGHT, FC1_WEIGHT, FC2_WEIGHT,
  QKV_CONSTANT, QKV_FOLDED, CROSS_Q_CONSTANT, CROSS_Q_FOLDED, FC1_CONSTANT, FC1_FOLDED,
  SELF_OUT_BIAS, CROSS_OUT_BIAS, FC2_BIAS, SELF_GAIN, CROSS_GAIN, FC_GAIN,
  KEYS, VALUES, CROSS_KEYS, CROSS_VALUES, POINTERS
};
enum Chunk { QKV, SELF, SELF_OUT, CROSS_Q, CROSS, CROSS_OUT, FC1, FC2, CHUNKS };

constexpr int STAGE = most(PIECES * up(WIDTH / 32, WARPS) / WARPS, up(FFN / 32, WARPS) / WARPS) * 16;  // words a warp
struct Shared {
  alignas(16) u32 stage[WARPS][STAGE];
  alignas(16) float sums[2][up(most(ROWS_QKV, most(ROWS, ROWS_FFN)), 16)][WARPS + 4];
  alignas(16) float moments[2][2][WARPS];
  alignas(16) float query[64], key[64], value[64];
  alignas(16) float runs[WARPS][64], tops[WARPS], totals[WARPS];
  float merge[SPLITS * (SHARE + 2)];
  u64 barriers[BARRIERS];
};
constexpr int RING = (MEMORY - (int)sizeof(Shared)) / 128 * 128;
static_assert(RING >= most(most(ROWS_QKV, ROWS_FFN) * PITCH, ROWS * PITCH_FFN), "a chunk exceeds the shared memory");
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

// -- The ring ------------------------------------------------------------------------------------------------------

struct Span {
  int first, count;  // Output features or keys of this program.
};
__device__ __forceinline__ Span share(int total, int each, int index) {
  int first = least(index * each, total);
  return {first, least(each, total - first)};
}

// A chunk's place: behind the one before it, or at the start where it would cross the end.
__device__ __forceinline__ int placed(int position, int size) { return position + size > RING ? 0 : position; }

struct Ring {
  const u64* table;
  u32 memory, barriers;
  Span qkv, width, ffn, self, cross;
  int head;
  // Counts of chunks issued and released, and the ring's ends; the consuming side has its own.
  int issued = 0, released = 0, layer = 0, chunk = 0, write = 0;
  int taken = 0, read = 0, oldest = 0;

  __device__ __forceinline__ int size(int c) const {
    switch (c) {
      case QKV: return qkv.count * PITCH;
      case SELF: return self.count * 256;
      case CROSS: return cross.count * 256;
      case FC1: return ffn.count * PITCH;
      case FC2: return width.count * PITCH_FFN;
      default: return width.count * PITCH;
    }
  }
  // One warp: start the copies of every chunk that there is room for.
  __device__ __forceinline__ void fill(int lane) {
    while (layer < LAYERS && issued - released < BARRIERS) {
      int bytes = size(chunk);
      if (bytes) {
        int start = placed(write, bytes);
        bool fits = issued == released || (write > oldest ? start == write || bytes <= oldest : write + bytes <= oldest);
        if (!fits) return;
        const u64* pointers = table + layer * POINTERS;
        u32 to = memory + start, barrier = barriers + issued % BARRIERS * 8;
        bool keys = chunk == SELF || chunk == CROSS;
        int row_bytes = chunk == FC2 ? 2 * FFN : 2 * WIDTH;
        int count = chunk == QKV ? qkv.count : chunk == FC1 ? ffn.count : width.count;
        int copied = keys ? bytes : count * row_bytes;
        if (lane == 0)
          asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%0],%1;" ::"r"(barrier), "r"(copied) : "memory");
        __syncwarp();
        if (keys) {
          // The head's keys lie in a row, then its values.
          bool own = chunk == SELF;
          u32 half = bytes / 2;
          long at = ((long)head * (own ? SLOTS : SOURCE) + (own ? self.first : cross.first)) * 128;
          if (lane < 2)
            copy_async(to + lane * half, (const u8*)pointers[(own ? KEYS : CROSS_KEYS) + lane] + at, half, barrier);
        } else {
          int first = chunk == QKV ? qkv.first : chunk == FC1 ? ffn.first : width.first;
          int pitch = row_bytes + 64;
          for (int row = lane; row < count; row += 32) {
            int n = first + row, which;
            switch (chunk) {
              case QKV: which = Q_WEIGHT + n / WIDTH; n %= WIDTH; break;
              case SELF_OUT: which = SELF_OUT_WEIGHT; break;
              case CROSS_Q: which = CROSS_Q_WEIGHT; break;
              case CROSS_OUT: which = CROSS_OUT_WEIGHT; break;
              case FC1: which = FC1_WEIGHT; break;
              default: which = FC2_WEIGHT;
            }
            copy_async(to + row * pitch, (const u8*)pointers[which] + (long)n * row_bytes, row_bytes, barrier);
          }
        }
        write = start + bytes;
        issued++;
      }
      if (++chunk == CHUNKS) chunk = 0, layer++;
    }
  }
  // Every thread: wait for the next chunk and get its address, or do nothing where this program has none.
  __device__ __forceinline__ u32 take(int c) {
    int bytes = size(c);
    if (!bytes) return memory;
    int start = placed(read, bytes);
    await(barriers + taken % BARRIERS * 8, taken / BARRIERS & 1);
    read = start + bytes;
    taken++;
    return memory + start;
  }
  // The warp that fills: the chunk last taken has been read by all.
  __device__ __forceinline__ void release(int c) {
    if (!size(c)) return;
    released++;
    // The oldest chunk is now the one behind; where it starts depends on its size, which `fill` placed before.
    oldest = read;
  }
};

// -- A product -----------------------------------------------------------------------------------------------------

enum Input { STREAM, PAIRS };
enum Epilogue { HEADS_OUT, RESIDUAL, QUERY, GELU };

struct Arguments {
  const u64* table;
  u64 *stream, *qkv, *query, *partial, *mixed, *hidden;
  u32* exchange;
  const long* tokens;
  const long* length;
  const long* offset;
  const u8* valid;
  const u16 *embedding, *positions;
  const u16* last_gain;
  float *gained, *stats, *eps;
  float scale;
};

struct State {
  Ring ring;
  float residual;     // Of the feature that this thread finishes.
  u32 exchange;       // Number of the newest exchange.
  int parity, slot;
  long token, position;
};

template <int FEATURES, int DEPTH, Input INPUT, Epilogue END>
__device__ __forceinline__ void product(const Arguments& a, State& s, Shared& sh, int chunk, Span span, const u64* from,
                                        u64* to, u32 expected, const u16* gain, const void* constants,
                                        const float* folded, float eps, const u64* pointers, bool first, bool last) {
  constexpr int EACH = rows_of(FEATURES), TILES = (EACH + 15) / 16, BLOCKS = DEPTH / 32;
  constexpr int SOME = (BLOCKS + WARPS - 1) / WARPS;  // Blocks of 32 inputs that a warp takes.
  constexpr int PER_LOAD = INPUT == STREAM ? 2 : 4, LOADS = (SOME + PER_LOAD - 1) / PER_LOAD;
  constexpr int ROW = 2 * DEPTH + 64;
  if (!span.count) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int block0 = warp * SOME, mine = least(SOME, BLOCKS - block0);

  // What waits for nobody: constants, gains, and this warp's part of the weights as the tensor cores take them.
  const int row = threadIdx.x / 4, n = span.first + row;
  const bool finishes = row < span.count;
  float constant = 0, fold = 0;
  if (finishes) {
    if (INPUT == STREAM) {
      constant = ((const float*)constants)[n];
      fold = folded[n];
    } else if (constants) {
      constant = widen(((const u16*)constants)[n]);
    }
  }
  u32 gains[LOADS];
  if (INPUT == STREAM) {
#pragma unroll
    for (int l = 0; l < LOADS; l++) {
      int k = (block0 + 2 * l) * 32 + 2 * lane;
      gains[l] = 2 * l + lane / 16 < mine ? *(const u32*)(gain + k) : 0;
    }
  }
  u32 weights = s.ring.take(chunk);
  u32 w[SOME][TILES][2][4];
#pragma unroll
  for (int b = 0; b < SOME; b++)
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        int r = tile * 16 + h * 8 + g;
        if (b < mine && r < span.count)
          load16(w[b][tile][h], weights + r * ROW + ((block0 + b) * 32 + t * 8) * 2);
        else
          w[b][tile][h][0] = w[b][tile][h][1] = w[b][tile][h][2] = w[b][tile][h][3] = 0;
      }

  // The activations, as soon as they are there, in this warp's own corner of shared memory.
  float sum = 0, squares = 0;
  u32* stage = sh.stage[warp];
  u64 y[LOADS][2];
  if (!(INPUT == STREAM && first)) {
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
#pragma unroll
  for (int l = 0; l < LOADS; l++) {
    bool inside = PER_LOAD * l + lane / (32 / PER_LOAD) < mine;
    if (INPUT == STREAM) {
      float x0, x1;
      if (first) {
        int k = (block0 + 2 * l) * 32 + 2 * lane;
        u32 e = inside ? *(const u32*)(a.embedding + s.token * WIDTH + k) : 0;
        u32 p = inside ? *(const u32*)(a.positions + s.position * WIDTH + k) : 0;
        x0 = low_of(e) + low_of(p);
        x1 = high_of(e) + high_of(p);
      } else {
        x0 = __uint_as_float((u32)y[l][0]);
        x1 = __uint_as_float((u32)y[l][1]);
      }
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
  u32 stage_address = shared_address(stage) + (INPUT == STREAM ? least(g, PIECES - 1) * SOME * 64 : 0);
#pragma unroll
  for (int b = 0; b < SOME; b++)
    if (b < mine) {
      u32 x[4];
      load16(x, stage_address + b * 64 + t * 16);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        multiply(c[tile][0], w[b][tile][0][0], w[b][tile][1][0], w[b][tile][0][1], w[b][tile][1][1], x[0], x[1]);
        multiply(c[tile][1], w[b][tile][0][2], w[b][tile][1][2], w[b][tile][0][3], w[b][tile][1][3], x[2], x[3]);
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
    if (t == 0) {
      sh.sums[s.parity][tile * 16 + g][warp] = upper;
      sh.sums[s.parity][tile * 16 + 8 + g][warp] = lower;
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
  __syncthreads();
  if (warp == WARPS - 1) {
    s.ring.release(chunk);
    s.ring.fill(lane);
  }
  // Four threads to a feature add up what the warps have.
  if (warp * 8 < up(EACH, 8)) {
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
    if (INPUT == STREAM) {
      float mean = sum / DEPTH, variance = fmaxf(squares / DEPTH - mean * mean, 0.0f);
      total = (total * GROW - mean * fold) * rsqrtf(variance + eps);
    }
    total += constant;
    const bool leads = finishes && threadIdx.x % 4 == 0;
    if (END == HEADS_OUT) {
      int part = n / WIDTH, column = n % WIDTH;
      total = part == 0 ? total * a.scale : rounded(total);
      if (leads) {
        publish(to + n, __float_as_uint(total), expected + 1);
        if (part) {
          u16* cache = (u16*)pointers[part == 1 ? KEYS : VALUES];
          cache[((long)(column / 64) * SLOTS + s.slot) * 64 + column % 64] = (u16)pack(total, 0);
        }
      }
    } else if (END == QUERY) {
      if (leads) publish(to + n, __float_as_uint(total * a.scale), expected + 1);
    } else if (END == GELU) {
      float x = 0.5f * total * (1.0f + erff(total * 0.7071067811865476f));
      float next = __shfl_down_sync(~0u, x, 4);
      if (leads && row % 2 == 0) publish(to + n / 2, pack(x, next), expected + 1);
    } else {
      s.residual += total;
      if (!last) {
        if (leads) publish(to + n, __float_as_uint(s.residual), expected + 1);
      } else {
        if (leads) a.gained[n] = s.residual * widen(a.last_gain[n]);
        if (threadIdx.x % 4 == 0) sh.sums[1 - s.parity][row][0] = finishes ? s.residual : 0;
      }
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
template <bool OWN>
__device__ __forceinline__ void attention(const Arguments& a, State& s, Shared& sh, u32 query_at, u32 runs_at,
                                          u32 mixed_at) {
  if (blockIdx.x >= HEADS * SPLITS) return;
  const int head = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = threadIdx.x / 8, part = threadIdx.x % 8;
  Span span = OWN ? s.ring.self : s.ring.cross;
  const u32 keys = s.ring.take(OWN ? SELF : CROSS), values = keys + span.count * 128;

  // The query, and in self-attention the newest key and value.
  const u64* from = OWN ? a.qkv : a.query;
  if (threadIdx.x < (OWN ? 192 : 64)) {
    int which = threadIdx.x / 64, dim = threadIdx.x % 64;
    const u64* at = from + which * WIDTH + head * 64 + dim;
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
  __syncthreads();
  float q[8], x[8] = {}, top = NOTHING, total = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) q[i] = sh.query[part * 8 + i];
  constexpr int AT_ONCE = 4;
  const int newest = OWN && split == SPLITS - 1 ? 1 : 0;
  for (int start = 0; start < span.count + newest; start += 64 * AT_ONCE) {
    float score[AT_ONCE];
    u32 raw[4];
    float other[8];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      int j = start + i * 64 + group;
      bool there = j < span.count + newest;
      if (j < span.count) {
        load16(raw, keys + j * 128 + part * 16);
        unpack8(other, raw);
      } else if (OWN && there) {
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
      if (OWN) there = there && a.valid[span.first + j];
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
      int j = start + i * 64 + group;
      float weight = exp2f(score[i] - best);
      total += weight;
      if (j < span.count) {
        load16(raw, values + j * 128 + part * 16);
        unpack8(other, raw);
#pragma unroll
        for (int e = 0; e < 8; e++) x[e] += weight * other[e];
      } else if (OWN && j < span.count + newest) {
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
  __syncthreads();
  if (warp == WARPS - 1) {
    s.ring.release(OWN ? SELF : CROSS);
    s.ring.fill(lane);
  }
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
    __syncthreads();
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

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_layers(Arguments a) {
  extern __shared__ __align__(128) u8 memory[];
  Shared& sh = *(Shared*)(memory + RING);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  State s;
  s.ring.table = a.table;
  s.ring.memory = shared_address(memory);
  s.ring.barriers = shared_address(sh.barriers);
  s.ring.qkv = share(3 * WIDTH, ROWS_QKV, blockIdx.x);
  s.ring.width = share(WIDTH, ROWS, blockIdx.x);
  s.ring.ffn = share(FFN, ROWS_FFN, blockIdx.x);
  s.slot = (int)*a.length - 1;
  const bool attends = blockIdx.x < HEADS * SPLITS;
  // Who has nothing to give to others leaves; the rest of this function counts on everybody having started.
  if (!s.ring.qkv.count && !s.ring.width.count && !s.ring.ffn.count && !attends) return;
  const int split = blockIdx.x % SPLITS;
  s.ring.head = blockIdx.x / SPLITS;
  s.ring.self = attends ? share(s.slot, (s.slot + SPLITS - 1) / SPLITS, split) : Span{0, 0};
  s.ring.cross = attends ? share(SOURCE, (SOURCE + SPLITS - 1) / SPLITS, split) : Span{0, 0};
  if (threadIdx.x == 0) {
    for (int i = 0; i < BARRIERS; i++)
      asm volatile("mbarrier.init.shared.b64 [%0],1;" ::"r"(s.ring.barriers + i * 8) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (warp == WARPS - 1) s.ring.fill(lane);
  s.parity = 0;
  s.token = a.tokens[s.slot];
  s.position = s.slot - *a.offset;
  if (s.position < 0) s.position = 0;
  s.exchange = *a.exchange;
  s.residual = 0;
  {
    int n = s.ring.width.first + threadIdx.x / 4;
    if ((int)threadIdx.x / 4 < s.ring.width.count)
      s.residual = widen(a.embedding[s.token * WIDTH + n]) + widen(a.positions[s.position * WIDTH + n]);
  }
  const Ring& r = s.ring;
  // Exchanges are numbered through the launches; a product writes the one after that which it reads.
  u32 e = s.exchange;
  for (int layer = 0; layer < LAYERS; layer++) {
    const u64* p = a.table + layer * POINTERS;
    // The chain: whoever writes `stream` here has read all of `mixed`, to which every head's programs gave, who had
    // read what every program gave to `qkv` of their head; and so on around the layer.
    product<3 * WIDTH, WIDTH, STREAM, HEADS_OUT>(a, s, sh, QKV, r.qkv, a.stream, a.qkv, e, (const u16*)p[SELF_GAIN],
        (const void*)p[QKV_CONSTANT], (const float*)p[QKV_FOLDED], a.eps[3 * layer], p, layer == 0, false);
    attention<true>(a, s, sh, e + 1, e + 2, e + 3);
    product<WIDTH, WIDTH, PAIRS, RESIDUAL>(a, s, sh, SELF_OUT, r.width, a.mixed, a.stream, e + 3, nullptr,
        (const void*)p[SELF_OUT_BIAS], nullptr, 0, p, false, false);
    product<WIDTH, WIDTH, STREAM, QUERY>(a, s, sh, CROSS_Q, r.width, a.stream, a.query, e + 4, (const u16*)p[CROSS_GAIN],
        (const void*)p[CROSS_Q_CONSTANT], (const float*)p[CROSS_Q_FOLDED], a.eps[3 * layer + 1], p, false, false);
    attention<false>(a, s, sh, e + 5, e + 6, e + 7);
    product<WIDTH, WIDTH, PAIRS, RESIDUAL>(a, s, sh, CROSS_OUT, r.width, a.mixed, a.stream, e + 7, nullptr,
        (const void*)p[CROSS_OUT_BIAS], nullptr, 0, p, false, false);
    product<FFN, WIDTH, STREAM, GELU>(a, s, sh, FC1, r.ffn, a.stream, a.hidden, e + 8, (const u16*)p[FC_GAIN],
        (const void*)p[FC1_CONSTANT], (const float*)p[FC1_FOLDED], a.eps[3 * layer + 2], p, false, false);
    product<WIDTH, FFN, PAIRS, RESIDUAL>(a, s, sh, FC2, r.width, a.hidden, a.stream, e + 9, nullptr,
        (const void*)p[FC2_BIAS], nullptr, 0, p, false, layer == LAYERS - 1);
    e += 10;
  }
  __syncthreads();
  if (r.width.count && warp == 0) {
    // The sums that the head's layer norm goes by, one pair from each program.
    float sum = 0, squares = 0;
    for (int row = lane; row < r.width.count; row += 32) {
      float x = sh.sums[s.parity][row][0];
      sum += x;
      squares += x * x;
    }
#pragma unroll
    for (int step = 16; step; step /= 2) {
      sum += __shfl_xor_sync(~0u, sum, step);
      squares += __shfl_xor_sync(~0u, squares, step);
    }
    constexpr int COUNT = (WIDTH + ROWS - 1) / ROWS;
    if (lane == 0) a.stats[blockIdx.x] = sum, a.stats[COUNT + blockIdx.x] = squares;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.exchange = e;
}
