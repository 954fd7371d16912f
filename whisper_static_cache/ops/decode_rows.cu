// All decoder layers of a one-token step for 2 to 16 rows of a batch: what follows `decode_layers.cu` in the source,
// whose ring of weights, exchange of words and packed formats it shares, where BATCH is more than 1.
//
// A row is a column of every product, which needs no more weights and one more instruction for each eight rows. The
// weights stay in the ring until their activations are there: what many rows wait for is memory, of which the ring
// holds a fifth of a layer. Every warp takes some blocks of 32 elements of all rows of a weight, asks the L2 cache for
// their activations, and has them in its registers as the tensor cores take them. Of the stream these are halves, without
// their remainders: twice the words would be twice the wait. Low-bit weights are unpacked into halves,
// `(q - zero) * scale` with two roundings, as PyTorch has them.
//
// Attention is what many rows read the most for. The keys of all rows and heads, one after another, are cut into a
// share for each program, of which one head of one row, an item, may have several. They come through the ring too.

// -- Attention's shares --------------------------------------------------------------------------------------------

static_assert(RUNS <= 4 && LOGS >= 4 && SEGMENTS <= WARPS, "");

__device__ __forceinline__ int share_of_keys(int keys) { return ratio(ITEMS * keys, ATTENDERS); }

// Calls `each` with the item, the first key and the number of keys, for every item that this program has some of.
template <class Each>
__device__ __forceinline__ void for_segments(int keys, Each each) {
  const int share = share_of_keys(keys), first = least(program() * share, ITEMS * keys);
  int left = least(share, ITEMS * keys - first), item = first / keys, in = first - item * keys;
#pragma unroll 1
  while (left > 0) {
    const int count = least(left, keys - in);
    each(item, in, count);
    left -= count, item++, in = 0;
  }
}

// Self-attention's keys with the newest, which is not in the cache yet.
__device__ __forceinline__ int keys_there(bool own, int slot) { return own ? slot + 1 : SOURCE; }
constexpr int key_bytes(bool own) { return own || !CROSS8 ? 128 : 64; }
// Keys of a chunk: a multiple of what all warps take at a time. With 8 bits their scales and those of the values lie
// behind, from the multiple of 16 bytes at or below the first.
constexpr int chunk_keys(bool own) {
  return (own || !CROSS8 ? CHUNK / 256 : (CHUNK - 64) / 132) / (4 * WARPS) * (4 * WARPS);
}
constexpr int scales_behind(int of_values) {
  return 2 * chunk_keys(false) * 64 + of_values * (2 * chunk_keys(false) + 32);
}
static_assert(chunk_keys(true) > 0 && (!CROSS8 || scales_behind(2) <= CHUNK), "");

// -- Fetching ------------------------------------------------------------------------------------------------------

// A chunk's copies: lanes below 16 take a row each, the next four what lies behind the rows. (All by one lane, as for one
// row, are made faster, and stand in front of the words: at 4 to 16 rows 3 to 9 % fewer tokens.)
__device__ __forceinline__ void fetch_chunk(const Pointers& p, Shared& sh, u32 memory, Fetching& f, int product,
                                            int chunk) {
  const int lane = thread() % 32;
  const bool deep = product == FC2;
  const Span span = rows_of_chunk(product, chunk);
  int first = span.first;
  const int count = span.count;
  const int matrix = weight_of(product) + (product == QKV ? chunk : 0);
  u32 at = 0, size = 0;
  int index = 0;
  long long from = 0;
  if (lane < count) {
    const int bytes = deep ? row_bytes(FFN) : row_bytes(WIDTH), part = deep ? part_bytes(FFN) : part_bytes(WIDTH);
    const int begin = deep ? chunk * part : 0;
    at = lane * (deep ? stride(FFN) : stride(WIDTH));
    index = WEIGHTS + matrix;
    from = (long long)(first + lane) * bytes + begin;
    size = least(part, bytes - begin);
  } else if (lane >= 16 && lane < 20 && count > 0 && !(deep && chunk > 0)) {
    int each;
    if (lane < 18) {
      each = 2 * (deep ? groups(FFN) : groups(WIDTH));
      at = metas_behind(product, chunk, lane == 17);
      index = (lane == 16 ? SCALES : ZEROS) + matrix;
    } else {
      const bool norm = from_stream(product);
      each = norm ? 4 : 2;
      at = vectors_behind(product, chunk) + (lane - 18) * vector_bytes;
      index = norm_of(product) + (lane == 18 ? (norm ? CONSTANT : BIAS) : (norm ? FOLDED : GAIN));
      if (product == QKV) first += chunk * WIDTH;
    }
    from = first * each / 16 * 16;
    if (each && !(APART && deep && lane < 18)) size = up((first + count) * each, 16) - (int)from;
  }
  const u8* base = p.at(index);
  u32 all = size;
#pragma unroll
  for (int step = 16; step; step /= 2) all += __shfl_xor_sync(~0u, all, step);
  const bool row_by_row = APART && deep && chunk == 0;
  constexpr int META = groups(FFN) * 2;
  if (row_by_row) all += 2 * count * META;
  u32 barrier;
  const u32 place = memory + make_room(sh, f, {}, all, 0, barrier, [&] {
    if (size) prefetch(base + from, size);
  });
  if (size) copy_async(place + at, base + from, size, barrier);
  if (row_by_row) {
#pragma unroll
    for (int zeros = 0; zeros < 2; zeros++) {
      const u8* metas = p.at((zeros ? ZEROS : SCALES) + matrix) + (long long)(first + lane) * META;
      const int to = scales_at(FFN) + zeros * meta_bytes(FFN) + lane * meta_stride(FFN);
      if (lane < count) copy_async(place + to, metas, META, barrier);
    }
  }
}

// Where an item's keys begin in the cache, in keys: beams of an input have its cross-attention in common.
template <bool OWN>
__device__ __forceinline__ long long first_key(int item) {
  if (OWN || BEAMS == 1) return (long long)item * (OWN ? SLOTS : SOURCE);
  const int row = item / HEADS;
  return (long long)(row / BEAMS * HEADS + item - row * HEADS) * SOURCE;
}

template <bool OWN>
__device__ __forceinline__ void fetch_keys(const Pointers& p, Shared& sh, u32 memory, Fetching& f, int slot) {
  constexpr int MOST = chunk_keys(OWN), BYTES = key_bytes(OWN);
  constexpr bool SCALED = CROSS8 && !OWN;
  const int lane = thread() % 32;
  const u8* base = p.at((OWN ? KEYS : SCALED && lane / 2 % 2 ? CROSS_SCALES : CROSS_KEYS) + lane % 2);
  for_segments(keys_there(OWN, slot), [&](int item, int in, int count) {
    const int cached = OWN ? least(count, slot - in) : count;
#pragma unroll 1
    for (int at = 0; at < cached; at += MOST) {
      const int n = least(MOST, cached - at);
      const long long key = first_key<OWN>(item) + in + at;
      const u8* from = base + key * BYTES;
      u32 to = lane * (MOST * BYTES), size = lane < 2 ? n * BYTES : 0, all = 2 * n * BYTES;
      if (SCALED) {
        const long long first = key * 2 / 16 * 16;
        const u32 scales = up((int)(key * 2 + n * 2 - first), 16);
        all += 2 * scales;
        if (lane / 2 == 1) from = base + first, to = scales_behind(lane % 2), size = scales;
      }
      u32 barrier;
      const u32 place = memory + make_room(sh, f, {}, all, 0, barrier, [&] {
        if (size) prefetch(from, size);
      });
      if (size) copy_async(place + to, from, size, barrier);
    }
  });
}

__device__ __forceinline__ void fetch(const Arguments& a, Shared& sh, u32 memory, int slot) {
  Fetching f;
  Pointers p, ahead;
  ahead.load(a.table, 0);
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    p = ahead;
    ahead.load(a.table, layer + 1);
#pragma unroll 1
    for (int step = 0; step < STEPS; step++)
      if (step == OWN_ATTENTION)
        fetch_keys<true>(p, sh, memory, f, slot);
      else if (step == CROSS_ATTENTION)
        fetch_keys<false>(p, sh, memory, f, slot);
      else
#pragma unroll 1
        for (int chunk = 0; chunk < chunks_of(step); chunk++)
          fetch_chunk(p, sh, memory, f, step, chunk);
  }
}

// -- Words of many rows --------------------------------------------------------------------------------------------

struct State {
  Cursor cursor;
  int slot;
  u32 stream_tag, tag;  // Of the next reading of `stream` and its moments, and of this layer's other buffers.
  float residual[2];    // Of the pair of features that this thread finishes.
};

// All warps that multiply.
__device__ __forceinline__ void together() { bar_sync(TABLES, 32 * WARPS); }

// Units of which a lane has a bit in `missing`, asked for until all are of this use of their buffer.
template <int N>
struct Asked {
  uint4 units[N];
  u32 missing;
  template <class At>
  __device__ __forceinline__ void look(At at) {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (missing >> i & 1) units[i] = peek16(at(i));
  }
  template <class At>
  __device__ __forceinline__ void begin(u32 wanted, At at) {
    missing = wanted;
#pragma unroll
    for (int i = 0; i < N; i++) units[i] = {};
    look(at);
  }
  template <class At, class Fresh>
  __device__ __forceinline__ void wait(At at, Fresh fresh_unit) {
    Patience patience;
    while (true) {
#pragma unroll
      for (int i = 0; i < N; i++)
        if (fresh_unit(i, units[i])) missing &= ~(1u << i);
      if (!__any_sync(~0u, missing)) break;
      patience.spend();
      look(at);
    }
  }
};

// Two features' float32 values of a row as halves and remainders.
__device__ __forceinline__ void publish_pair(u16* halves, int total, float first, float second, u32 tag) {
  const u32 half = tagged(pack(first, second), tag);
  poke4(halves, half);
  poke4(halves + total, tagged(pack(first - low_of(half), second - high_of(half)), tag));
}

// The newest key's product with the query, and its value, of which a lane has two dimensions, `from` on in `heads`.
__device__ __forceinline__ float newest_key(const u16* from, u32 tag, float (&value)[2]) {
  u32 words[3][2] = {}, missing = 63;
  Patience patience;
  do {
#pragma unroll
    for (int i = 0; i < 6; i++)
      if (missing >> i & 1) words[i / 2][i % 2] = peek4(from + i / 2 * WIDTH + i % 2 * (3 * WIDTH));
#pragma unroll
    for (int i = 0; i < 6; i++)
      if (fresh(words[i / 2][i % 2], tag)) missing &= ~(1u << i);
    patience.spend();
  } while (__any_sync(~0u, missing));
  float dot = (low_of(words[0][0]) + low_of(words[0][1])) * (low_of(words[1][0]) + low_of(words[1][1])) +
              (high_of(words[0][0]) + high_of(words[0][1])) * (high_of(words[1][0]) + high_of(words[1][1]));
#pragma unroll
  for (int step = 1; step < 32; step *= 2) dot += __shfl_xor_sync(~0u, dot, step);
  value[0] = low_of(words[2][0]) + low_of(words[2][1]);
  value[1] = high_of(words[2][0]) + high_of(words[2][1]);
  return dot;
}

// -- Products ------------------------------------------------------------------------------------------------------

static_assert(OF_WARP * EIGHTS <= 16, "");

// An integer's bits are those of a subnormal float16, q * 2 ** -24: the tensor cores take it as it is, exactly, and the
// sums make good the factor. Subnormals of bfloat16 are too small for sums in float32: there integers sit in the mantissa
// of `ORIGIN`, 128, from which they are taken by one instruction. A digit stays where it lies in its byte if the mantissa
// has room for it there, and is else moved down.
constexpr u32 ORIGIN = BF16 ? 0x43004300 : 0;
constexpr int MANTISSA = BF16 ? 7 : 10, EXPONENT_OF_ONE = BF16 ? 127 : 15;
constexpr bool stays(int digit) { return BITS != 158 && LOW_BITS * digit + BITS <= MANTISSA; }
constexpr int place_of(int digit) { return stays(digit) ? LOW_BITS * digit : 0; }

// Digit `digit` of eight packed bytes as halves, in float16 times 2 ** (place_of(digit) - 24): pairs of the first and
// third byte of a word, of the second and fourth.
__device__ __forceinline__ void integers(u32 (&q)[4], const Packed& packed, int digit) {
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int odd = 0; odd < 2; odd++) {
      u32& to = q[2 * i + odd];
      const u32 word = packed.raw[i];
      if (BITS == 8 && BF16) {
        // Beyond bfloat16's mantissa: through float32's, where the same trick takes 23 bits.
        const float low = __uint_as_float(byte_permute(word, 0x4B000000, odd ? 0x7441 : 0x7440));
        const float high = __uint_as_float(byte_permute(word, 0x4B000000, odd ? 0x7443 : 0x7442));
        to = pack(low - 8388608.0f, high - 8388608.0f);
        continue;
      }
      const int place = place_of(digit);
      if (BITS == 158) {
        const u32 pair = word >> 8 * odd & 0x00FF00FF;
        to = third(pair, digit);
        if (digit < 4) to -= 3 * third(pair, digit + 1);
        to |= ORIGIN;
      } else {
        to = and_or(word >> (8 * odd + LOW_BITS * digit - place), twice(((1 << LOW_BITS) - 1) << place), ORIGIN);
        if (BITS == 3) to = and_or(packed.high[i][odd] >> (2 * digit - place), twice(4 << place), to);
      }
      // Times 2 ** -place, less the origin: exact.
      if (BF16)
        to = half_fma(to, twice(EXPONENT_OF_ONE - place << MANTISSA),
                      twice(0x8000 | EXPONENT_OF_ONE + MANTISSA - place << MANTISSA));
    }
}

// A unit of activations in the order of `integers`.
__device__ __forceinline__ void operands(u32 (&x)[4], const uint4& unit) {
  if (BITS == 16)
    x[0] = unit.x, x[1] = unit.y, x[2] = unit.z, x[3] = unit.w;
  else
    x[0] = byte_permute(unit.x, unit.y, 0x5410), x[1] = byte_permute(unit.x, unit.y, 0x7632),
    x[2] = byte_permute(unit.z, unit.w, 0x5410), x[3] = byte_permute(unit.z, unit.w, 0x7632);
}

// Halves' bits: 2 ** power.
constexpr u32 power(int exponent) { return twice(EXPONENT_OF_ONE + exponent << MANTISSA); }
constexpr u32 MINUS = 0x80008000;

// Eight integers made (q - zero) * scale, with the scale in the low half of `steps` and the zero point in the other.
// In float16 a subnormal integer is brought to q * 2 ** -9, as far as one factor does.
__device__ __forceinline__ void dequantise(u32 (&w)[4], const Packed& packed, int digit, u32 steps) {
  integers(w, packed, digit);
  u32 scale = byte_permute(steps, 0, 0x1010), zero = byte_permute(steps, 0, 0x3232), factor = power(0);
  if (BF16) {
    zero ^= MINUS;
  } else {
    zero = half_fma(zero, power(-9) | MINUS, MINUS);
    scale = half_fma(scale, power(9), MINUS);
    factor = power(15 - place_of(digit));
  }
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = half_fma(half_fma(w[i], factor, zero), scale, MINUS);
}
template <int DEPTH>
__device__ __forceinline__ u32 steps_of(u32 meta, int element) {
  const u16* from = (const u16*)(dynamic_shared() + meta) + least(element, DEPTH - 1) / most(GROUP, 1);
  return from[0] | (u32)from[meta_bytes(DEPTH) / 2] << 16;
}

// Sixteen rows of a weight, of which a lane has two, times a block of activations.
template <int S>
__device__ __forceinline__ void multiply_block(float (&c)[EIGHTS][4], const u32 (&lower)[4], const u32 (&upper)[4],
                                               const u32 (&x)[EIGHTS][S][4]) {
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int e = 0; e < EIGHTS; e++)
#pragma unroll
      for (int side = 0; side < S; side++)
        multiply(c[e], lower[2 * half], upper[2 * half], lower[2 * half + 1], upper[2 * half + 1],
                 x[e][side][2 * half], x[e][side][2 * half + 1]);
}

// Where a lane's two rows of a tile lie in shared memory, and their scales.
struct Lines {
  u32 row[2], meta[2];
};
// Rows behind the last one give sums that nobody reads.
__device__ __forceinline__ Lines lines_of(int place, int step, int tile) {
  const int rows_there = row_chunks(step) * ROWS, g = thread() / 4 % 8;
  Lines lines;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 of = least(16 * tile + 8 * i + g, rows_there - 1), chunk = of / ROWS, in_chunk = of - chunk * ROWS;
    const u32 base = base_of(place, chunk);
    if (step == FC2) {
      const int first = program() * ROWS * (groups(FFN) * 2);
      lines.row[i] = base + in_chunk * stride(FFN);
      lines.meta[i] = base + scales_at(FFN) + first % 16 + in_chunk * meta_stride(FFN);
    } else {
      const int first = (program() * (step == FC1 ? ROWS_FFN : ROWS) + (step == FC1 ? chunk * ROWS : 0)) * (groups(WIDTH) * 2);
      lines.row[i] = base + in_chunk * stride(WIDTH);
      lines.meta[i] = base + scales_at(WIDTH) + first % 16 + in_chunk * meta_stride(WIDTH);
    }
  }
  return lines;
}

// Whether weights are loaded before their activations are waited for. To unpack integers takes longer than the wait, and
// registers.
constexpr bool EARLY = BITS == 16;
// A warp's blocks of a tile of sixteen rows of `WIDTH` elements, as the tensor cores take them.
struct Tile {
  u32 of[OF_WARP][2][4];

  __device__ __forceinline__ void load(int place, int step, int tile) {
    const int warp = thread() / 32, t = thread() % 4;
    const Lines lines = lines_of(place, step, tile);
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int turn = 0; turn < OWN; turn++) {
        const int in = (turn * WARPS + warp) * 32 + t * 8;
        if (BITS == 16) {
          load16(of[turn][i], dynamic_shared() + lines.row[i] + 2 * in);
          continue;
        }
        Packed packed;
        load_packed<WIDTH>(packed, lines.row[i] + in, in);
#pragma unroll
        for (int digit = 0; digit < DIGITS; digit++)
          dequantise(of[turn * DIGITS + digit][i], packed, digit,
                     steps_of<WIDTH>(lines.meta[i], digit * plane(WIDTH) + in));
      }
#pragma unroll
      for (int late = 0; late < LATE; late++) {
        const Block block = block_of(OWN_BLOCKS + late);
        u32(&w)[4] = of[OWN_BLOCKS + late][i];
        w[0] = w[1] = w[2] = w[3] = 0;
        if (!block.there) continue;
        const int in = block.run * 32 + t * 8;
        if (BITS == 16) {
          load16(w, dynamic_shared() + lines.row[i] + 2 * in);
          continue;
        }
        Packed packed;
        load_packed<WIDTH>(packed, lines.row[i] + in, in);
        const u32 steps = steps_of<WIDTH>(lines.meta[i], element_of<WIDTH>(block.run, block.digit));
        if (BITS == 158) {
#pragma unroll
          for (int digit = 0; digit < DIGITS; digit++)
            if (digit == block.digit) dequantise(w, packed, digit, steps);
        } else {
          // The digit is brought to where the first one lies.
#pragma unroll
          for (int k = 0; k < 2; k++) {
            packed.raw[k] >>= LOW_BITS * block.digit;
            if (BITS == 3) packed.high[k][0] >>= 2 * block.digit, packed.high[k][1] >>= 2 * block.digit;
          }
          dequantise(w, packed, 0, steps);
        }
      }
    }
  }
  template <int S>
  __device__ __forceinline__ void multiply(float (&c)[EIGHTS][4], const u32 (&x)[OF_WARP][EIGHTS][S][4]) const {
#pragma unroll
    for (int b = 0; b < OF_WARP; b++) multiply_block(c, of[b][0], of[b][1], x[b]);
  }
};

// The warps' sums to shared memory, once all have finished what was there before.
template <int TILES>
__device__ __forceinline__ void leave_sums(Shared& sh, const float (&c)[TILES][EIGHTS][4], int rows_there) {
  const u32 id = thread();
  const int warp = id / 32, g = id / 4 % 8, t = id % 4;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = 16 * tile + 8 * half + g;
      if (row < rows_there)
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
          *(float2*)&sh.sums[warp][row][8 * e + 2 * t] = {c[tile][e][2 * half], c[tile][e][2 * half + 1]};
    }
}
__device__ __forceinline__ float sum_of(const Shared& sh, int row, int column) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i++) sum += sh.sums[i][row][column];
  return sum;
}

// The residual stream times the gain of the layer norm that reads it, and what that norm's moments need. Lanes have
// four rows of the batch, and a pair of features each.
__device__ __forceinline__ void publish_stream(const Arguments& a, const State& s, int column, int n, float gain,
                                               float next_gain, bool there, bool last) {
  const float x = s.residual[0], y = s.residual[1];
  float sum = there ? x + y : 0, squares = there ? x * x + y * y : 0;
  if (there && !last)
#pragma unroll
    for (int copy = 0; copy < COPIES; copy++)
      poke4(a.stream + (copy * BATCH + column) * WIDTH + n,
            tagged(pack(x * gain * SHRINK, y * next_gain * SHRINK), s.stream_tag));
#pragma unroll
  for (int step = 4; step < 32; step *= 2) {
    sum += __shfl_xor_sync(~0u, sum, step);
    squares += __shfl_xor_sync(~0u, squares, step);
  }
  if (last) {
    if (there) *(float2*)&a.gained[column * WIDTH + n] = {x * gain, y * next_gain};
    if (there && thread() % 32 < 4) {
      a.last_stats[column * GIVERS + program()] = sum;
      a.last_stats[(BATCH + column) * GIVERS + program()] = squares;
    }
  } else if (there && thread() % 32 < 4) {
    poke8(a.stats + column * STATS + program(), {tagged(__float_as_uint(sum), s.stream_tag),
                                                 tagged(__float_as_uint(squares), s.stream_tag)});
  }
}
__device__ __forceinline__ int stream_column() { return thread() / 32 * 4 + thread() % 4; }
__device__ __forceinline__ int stream_pair() { return thread() % 32 / 4; }

// What becomes of the sums of a product that is added to the stream.
__device__ __forceinline__ void finish_stream(const Arguments& a, State& s, Shared& sh, int place, int layer, int step) {
  s.stream_tag ^= 1;
  if (thread() / 32 >= COLUMNS / 4) return;
  const Span span = share(WIDTH, ROWS);
  const int column = stream_column(), row = 2 * stream_pair(), n = span.first + row;
  const bool there = row < span.count && column < BATCH;
  float gains[2] = {};
  if (there) {
    const u8* at = dynamic_shared() + base_of(place, 0) + (step == FC2 ? vectors_at(FFN) : vectors_at(WIDTH)) +
                   (span.first * 2) % 16 + row * 2;
    const u32 biases = *(const u32*)at, pair = *(const u32*)(at + vector_bytes);
    s.residual[0] += sum_of(sh, row, column) + low_of(biases);
    s.residual[1] += sum_of(sh, row + 1, column) + high_of(biases);
    gains[0] = low_of(pair), gains[1] = high_of(pair);
  }
  publish_stream(a, s, column, n, gains[0], gains[1], there, step == FC2 && layer == LAYERS - 1);
}

// Moments of the stream: a warp's share of the programs, for all rows.
constexpr int LANES_OF_ROW = 32 / COLUMNS, TWOS = ratio(STATS / 2, WARPS * LANES_OF_ROW);
struct Moments {
  uint4 twos[TWOS];
  u32 missing;
  __device__ __forceinline__ int at(int i) const {
    return 2 * ((i * WARPS + thread() / 32) * LANES_OF_ROW + thread() % 32 / COLUMNS);
  }
  __device__ __forceinline__ void expect(bool any) {
    missing = 0;
#pragma unroll
    for (int i = 0; i < TWOS; i++) {
      twos[i] = {};
      if (any && thread() % COLUMNS < BATCH && at(i) < GIVERS) missing |= 1u << i;
    }
  }
  __device__ __forceinline__ void look(const Arguments& a) {
#pragma unroll
    for (int i = 0; i < TWOS; i++)
      if (missing >> i & 1) twos[i] = peek16(a.stats + thread() % COLUMNS * STATS + at(i));
  }
  __device__ __forceinline__ void check(u32 tag) {
#pragma unroll
    for (int i = 0; i < TWOS; i++) {
      // Behind an odd number of programs nobody writes.
      if (GIVERS % 2 && at(i) + 1 == GIVERS) twos[i].z = twos[i].w = tag;
      if (all_fresh(twos[i], tag)) missing &= ~(1u << i);
    }
  }
  __device__ __forceinline__ float2 sums() const {
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < TWOS; i++) {
      sum += __uint_as_float(twos[i].x) + __uint_as_float(twos[i].z);
      squares += __uint_as_float(twos[i].y) + __uint_as_float(twos[i].w);
    }
#pragma unroll
    for (int step = COLUMNS; step < 32; step *= 2) {
      sum += __shfl_xor_sync(~0u, sum, step);
      squares += __shfl_xor_sync(~0u, squares, step);
    }
    return {sum, squares};
  }
};

// What becomes of the sums of a product behind a layer norm: a warp takes eight features of eight rows at a time.
__device__ __forceinline__ void finish_normed(const Arguments& a, State& s, Shared& sh, int place, int layer,
                                              int step) {
  const int warp = thread() / 32, lane = thread() % 32;
  const Span span = step == FC1 ? share(FFN, ROWS_FFN) : share(WIDTH, ROWS);
  const int rows_there = chunks_of(step) * ROWS, tasks = ratio(rows_there, 8) * EIGHTS;
#pragma unroll 1
  for (int task = warp; task < tasks; task += WARPS) {
    const int column = task % EIGHTS * 8 + lane % 8, row = task / EIGHTS * 8 + lane / 8 * 2;
    const int chunk = row / ROWS, in_chunk = row - chunk * ROWS;
    const bool there = column < BATCH && row < rows_there && (step == FC1 ? row : in_chunk) < span.count;
    float first = 0, second = 0;
    if (there) {
      const int begin = span.first + (step == FC1 ? chunk * ROWS : 0);
      const u8* at = dynamic_shared() + base_of(place, chunk) + vectors_at(WIDTH) + (begin * 4) % 16 + in_chunk * 4;
      const float2 constants = *(const float2*)at, folded = *(const float2*)(at + vector_bytes);
      float sum = 0, squares = 0;
#pragma unroll
      for (int i = 0; i < WARPS; i++) {
        const float2 two = sh.moments[i][column];
        sum += two.x, squares += two.y;
      }
      const float mean = sum * (1.0f / WIDTH), variance = fmaxf(squares * (1.0f / WIDTH) - mean * mean, 0.0f);
      const float deviation = rsqrt_fast(variance + sh.eps[layer][norm_of(step)]);
      first = sum_of(sh, row, column) * (deviation * GROW) + (constants.x - mean * deviation * folded.x);
      second = sum_of(sh, row + 1, column) * (deviation * GROW) + (constants.y - mean * deviation * folded.y);
    }
    if (step == FC1) {
      first = 0.5f * first * (1.0f + erff(first * 0.7071067811865476f));
      second = 0.5f * second * (1.0f + erff(second * 0.7071067811865476f));
      const u32 pair = pack(first, second);
      u32 unit[4];
#pragma unroll
      for (int i = 0; i < 4; i++) unit[i] = __shfl_sync(~0u, pair, lane % 8 + 8 * i);
      if (there && lane / 8 < COPIES)
        poke16(a.hidden + (lane / 8 * BATCH + column) * FFN + span.first + task / EIGHTS * 8,
               {tagged(unit[0], s.tag), unit[1], unit[2], unit[3]});
    } else if (there) {
      const bool query = step == QUERY || chunk == 0;
      const int n = span.first + in_chunk;
      // Keys and values are attended to as the cache holds them.
      const u32 pair = pack(first, second);
      first = query ? first * (a.scale * LOG2E) : low_of(pair), second = query ? second * (a.scale * LOG2E) : high_of(pair);
      if (step == QUERY)
        publish_pair(a.query + column * 2 * WIDTH + n, WIDTH, first, second, s.tag);
      else
        publish_pair(a.heads + column * 2 * (3 * WIDTH) + chunk * WIDTH + n, 3 * WIDTH, first, second, s.tag);
      if (!query) {
        u16* cache = (u16*)sh.caches[layer][chunk - 1];
        *(u32*)&cache[((long long)(column * HEADS + n / 64) * SLOTS + s.slot) * 64 + n % 64] = pair;
      }
    }
  }
}

template <bool LARGE>
__device__ __forceinline__ void product_of_stream(const Arguments& a, State& s, Shared& sh, int layer, int step) {
  constexpr int TILES = LARGE ? ratio(SUM_ROWS, 16) : 1, UNITS = OF_WARP * EIGHTS;
  const u32 id = thread();
  const int warp = id / 32, lane = id % 32, g = id / 4 % 8;
  const int place = take(sh, s.cursor, chunks_of(step));
  auto has = [&](int tile) { return tile == 0 || 16 * tile < chunks_of(step) * ROWS; };
  Moments moments;
  moments.expect(gives(step));
  auto at = [&](int i) {
    const Block block = block_of(i / EIGHTS);
    return a.stream + (program() % COPIES * BATCH + i % EIGHTS * 8 + g) * WIDTH + element_of<WIDTH>(block.run, block.digit);
  };
  u32 missing = 0;
#pragma unroll
  for (int i = 0; i < UNITS; i++) {
    const Block block = block_of(i / EIGHTS);
    if (gives(step) && block.there && i % EIGHTS * 8 + g < BATCH && element_of<WIDTH>(block.run, block.digit) < WIDTH)
      missing |= 1u << i;
  }
  Asked<UNITS> asked;
  asked.begin(missing, at);
  Tile first;
  if (EARLY) first.load(place, step, 0);
  asked.wait(at, [&](int, const uint4& unit) { return all_fresh(unit, s.stream_tag); });
  moments.look(a);
  u32 x[OF_WARP][EIGHTS][1][4];
#pragma unroll
  for (int i = 0; i < UNITS; i++) operands(x[i / EIGHTS][i % EIGHTS][0], asked.units[i]);
  float c[TILES][EIGHTS][4] = {};
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    if (!has(tile)) continue;
    if (EARLY && tile == 0) {
      first.multiply(c[0], x);
    } else {
      Tile late;
      late.load(place, step, tile);
      late.multiply(c[tile], x);
    }
  }
  Patience patience;
  while (true) {
    moments.check(s.stream_tag);
    if (!__any_sync(~0u, moments.missing)) break;
    patience.spend();
    moments.look(a);
  }
  const float2 sums = moments.sums();
  together();
  leave_sums(sh, c, chunks_of(step) * ROWS);
  if (lane < COLUMNS) sh.moments[warp][lane] = sums;
  together();
  finish_normed(a, s, sh, place, layer, step);
  release(sh, place, chunks_of(step));
}

// A product with attention's result: runs of keys, merged by the logarithms of their sums.
__device__ __forceinline__ void product_of_runs(const Arguments& a, State& s, Shared& sh, int layer, int step) {
  constexpr int PLACES = OF_WARP * EIGHTS, UNITS = PLACES * (RUNS + 1);
  static_assert(UNITS <= 32, "");
  const int g = thread() / 4 % 8, keys = keys_there(step == OWN_OUT, s.slot), share = share_of_keys(keys);
  const int place = take(sh, s.cursor, 1);
  const u16* const runs_from = step == OWN_OUT ? a.own_runs : a.cross_runs;
  const float* const logs_from = step == OWN_OUT ? a.own_logs : a.cross_logs;
  auto item_of = [&](int i, int& element) {
    const Block block = block_of(i / EIGHTS);
    element = element_of<WIDTH>(block.run, block.digit);
    const int column = i % EIGHTS * 8 + g;
    return block.there && column < BATCH && element < WIDTH ? column * HEADS + element / 64 : -1;
  };
  // The logarithms first.
  auto at = [&](int i) {
    int element;
    const int item = item_of(i % PLACES, element);
    if (i < PLACES) return (const u16*)(logs_from + item * LOGS);
    return runs_from + (item * RUNS + i / PLACES - 1) * 64 + element % 64;
  };
  u32 missing = 0, counts = 0;
#pragma unroll
  for (int i = 0; i < PLACES; i++) {
    int element;
    const int item = item_of(i, element);
    if (item < 0) continue;
    const int count = ((item + 1) * keys - 1) / share - item * keys / share;  // Of runs, less one.
    counts |= count << 2 * i;
    missing |= 1u << i;
#pragma unroll
    for (int run = 0; run < RUNS; run++)
      if (run <= count) missing |= 1u << (run + 1) * PLACES + i;
  }
  static_assert(2 * PLACES <= 32, "");
  Asked<UNITS> asked;
  asked.begin(missing, at);
  Tile tile;
  if (EARLY) tile.load(place, step, 0);
  asked.wait(at, [&](int i, const uint4& unit) {
    if (i >= PLACES) return fresh(unit.x, s.tag);
    const int count = counts >> 2 * i & 3;
    return fresh(unit.x, s.tag) && (count < 1 || fresh(unit.y, s.tag)) && (count < 2 || fresh(unit.z, s.tag)) &&
           (count < 3 || fresh(unit.w, s.tag));
  });
  u32 x[OF_WARP][EIGHTS][2][4];  // Halves and remainders.
#pragma unroll
  for (int i = 0; i < PLACES; i++) {
    const int count = counts >> 2 * i & 3;
    const uint4 logs = asked.units[i];
    const float log[4] = {__uint_as_float(logs.x), __uint_as_float(logs.y), __uint_as_float(logs.z),
                          __uint_as_float(logs.w)};
    float share[RUNS], best = log[0], all = 0, sums[8] = {};
#pragma unroll
    for (int run = 1; run < RUNS; run++)
      if (run <= count) best = fmaxf(best, log[run]);
#pragma unroll
    for (int run = 0; run < RUNS; run++) {
      share[run] = run <= count ? exp2_fast(log[run] - best) : 0;
      all += share[run];
    }
    const float inverse = __fdividef(1.0f, fmaxf(all, 1e-30f));
#pragma unroll
    for (int run = 0; run < RUNS; run++) {
      const uint4& unit = asked.units[(run + 1) * PLACES + i];
      const u32 pairs[4] = {unit.x, unit.y, unit.z, unit.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        sums[2 * j] += share[run] * low_of(pairs[j]);
        sums[2 * j + 1] += share[run] * high_of(pairs[j]);
      }
    }
    u32 halves[4], rests[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float low = sums[2 * j] * inverse, high = sums[2 * j + 1] * inverse;
      halves[j] = pack(low, high);
      rests[j] = pack(low - low_of(halves[j]), high - high_of(halves[j]));
    }
    operands(x[i / EIGHTS][i % EIGHTS][0], {halves[0], halves[1], halves[2], halves[3]});
    operands(x[i / EIGHTS][i % EIGHTS][1], {rests[0], rests[1], rests[2], rests[3]});
  }
  float c[1][EIGHTS][4] = {};
  if (!EARLY) tile.load(place, step, 0);
  tile.multiply(c[0], x);
  together();
  leave_sums(sh, c, ROWS);
  together();
  finish_stream(a, s, sh, place, layer, step);
  release(sh, place, 1);
}

// The product with the hidden layer, whose activations come some blocks at a time.
__device__ __forceinline__ void product_of_hidden(const Arguments& a, State& s, Shared& sh, int layer) {
  constexpr int ALL = HIDDEN_BLOCKS, AT_ONCE = least(ALL, 5), TIMES = ratio(ALL, AT_ONCE), UNITS = AT_ONCE * EIGHTS;
  const u32 id = thread();
  const int warp = id / 32, g = id / 4 % 8, t = id % 4;
  const int place = take(sh, s.cursor, chunks_of(FC2));
  const Lines lines = lines_of(place, FC2, 0);
  float c[1][EIGHTS][4] = {};
  auto element_at = [&](int b) { return element_of<FFN>(b / DIGITS * WARPS + warp, b % DIGITS); };
  // Of the activations, the next are asked for before these are multiplied.
  Asked<UNITS> asked[2];
  auto at = [&](int time, int i) {
    return a.hidden + (program() % COPIES * BATCH + i % EIGHTS * 8 + g) * FFN + element_at(time * AT_ONCE + i / EIGHTS);
  };
  auto begin = [&](int time) {
    u32 missing = 0;
#pragma unroll
    for (int i = 0; i < UNITS; i++) {
      const int b = time * AT_ONCE + i / EIGHTS, run = b / DIGITS * WARPS + warp;
      if (b < ALL && run * 32 + t * 8 < plane(FFN) && element_at(b) < FFN && i % EIGHTS * 8 + g < BATCH)
        missing |= 1u << i;
    }
    asked[time % 2].begin(missing, [&](int i) { return at(time, i); });
  };
  begin(0);
#pragma unroll
  for (int time = 0; time < TIMES; time++) {
    if (time + 1 < TIMES) begin(time + 1);
    u32 w[AT_ONCE][2][4];
    auto wait = [&] {
      asked[time % 2].wait([&](int i) { return at(time, i); },
                           [&](int, const uint4& unit) { return fresh(unit.x, s.tag); });
    };
    if (!EARLY) wait();
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
      const int b = time * AT_ONCE + k, turn = b / DIGITS, run = turn * WARPS + warp;
      const int part = turn / PART, in_part = ((turn - part * PART) * WARPS + warp) * RUN_BYTES + t * (RUN_BYTES / 4);
      const int away = (int)base_of(place, part) - (int)base_of(place, 0);  // Less than none where the ring begins anew.
#pragma unroll
      for (int i = 0; i < 2; i++) {
        w[k][i][0] = w[k][i][1] = w[k][i][2] = w[k][i][3] = 0;
        if (b >= ALL || run >= runs(FFN)) continue;
        if (BITS == 16) {
          load16(w[k][i], dynamic_shared() + lines.row[i] + away + in_part);
          continue;
        }
        Packed packed;
        load_packed<FFN>(packed, lines.row[i] + away + in_part, run * 32 + t * 8);
        dequantise(w[k][i], packed, b % DIGITS, steps_of<FFN>(lines.meta[i], element_of<FFN>(run, b % DIGITS)));
      }
    }
    if (EARLY) wait();
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
      u32 x[EIGHTS][1][4];
#pragma unroll
      for (int e = 0; e < EIGHTS; e++) operands(x[e][0], asked[time % 2].units[k * EIGHTS + e]);
      multiply_block(c[0], w[k][0], w[k][1], x);
    }
  }
  together();
  leave_sums(sh, c, ROWS);
  together();
  finish_stream(a, s, sh, place, layer, FC2);
  release(sh, place, chunks_of(FC2));
}

// -- Attention -----------------------------------------------------------------------------------------------------

// A segment's run, of all warps' keys and the newest one, by one warp. `to` and `log_to` are where it is published.
__device__ __forceinline__ void finish_run(const Arguments& a, const State& s, const Shared& sh, int segment, u16* to,
                                           float* log_to, bool with_newest, int item) {
  const int lane = thread() % 32, row = item / HEADS, head = item - row * HEADS;
  float newest = NOTHING, new_value[2] = {};
  if (with_newest) {
    const u16* from = a.heads + row * 2 * (3 * WIDTH) + head * 64 + lane % 8 * 8 + lane / 8 * 2;
    const float dot = newest_key(from, s.tag, new_value);
    if (sh.valid[row][s.slot]) newest = dot;
  }
  float best = newest, all[8] = {}, total = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i++) best = fmaxf(best, sh.tops[segment][i]);
#pragma unroll
  for (int i = 0; i < WARPS / 4; i++) {
    const int of = lane / 8 * (WARPS / 4) + i;
    const float weight = exp2_fast(sh.tops[segment][of] - best);
    total += weight * sh.totals[segment][of];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const float4 four = *(const float4*)&sh.runs[segment][of][lane % 8 * 8 + 4 * j];
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
  const u32 pair = pack(all[0] * inverse, all[1] * inverse);
  u32 unit[4];
#pragma unroll
  for (int i = 0; i < 4; i++) unit[i] = __shfl_sync(~0u, pair, lane % 8 + 8 * i);
  if (lane < 8) poke16(to + lane * 8, {tagged(unit[0], s.tag), unit[1], unit[2], unit[3]});
  const float log = total > 0 ? best + log2_fast(total) : NOTHING;
  if (lane == 0) poke4(log_to, tagged(__float_as_uint(log), s.tag));
}

// Eight bytes or halves as floats.
__device__ __forceinline__ void widen_eight(float (&x)[8], const uint4& halves) {
  const u32 pairs[4] = {halves.x, halves.y, halves.z, halves.w};
#pragma unroll
  for (int i = 0; i < 4; i++) x[2 * i] = low_of(pairs[i]), x[2 * i + 1] = high_of(pairs[i]);
}
__device__ __forceinline__ void widen_eight(float (&x)[8], const uint2& bytes) {
  const u32 words[2] = {bytes.x ^ 0x80808080, bytes.y ^ 0x80808080};
#pragma unroll
  for (int i = 0; i < 8; i++)
    x[i] = __uint_as_float(byte_permute(words[i / 4], 0x4B000000, 0x7440 + i % 4)) - 8388736.0f;
}

template <bool HALVES>
struct Vector {
  uint4 of;
};
template <>
struct Vector<false> {
  uint2 of;
};

// This program's share of the keys: eight lanes to a key, and sums of their own for each of a warp's four keys.
template <bool OWN>
__device__ __forceinline__ void attention(const Arguments& a, State& s, Shared& sh) {
  constexpr int MOST = chunk_keys(OWN), BYTES = key_bytes(OWN), TURNS = MOST / (4 * WARPS), NEXT = OWN ? 3 * WIDTH : WIDTH;
  typedef Vector<BYTES == 128> Eight;
  const int keys = keys_there(OWN, s.slot), share = share_of_keys(keys);
  const int warp = thread() / 32, lane = thread() % 32, part = lane % 8, of = lane / 8;
  const int first_item = program() * share / keys;
  // The queries, a warp for each item.
  if (program() * share < ITEMS * keys && first_item + warp < ITEMS &&
      (first_item + warp) * keys < (program() + 1) * share) {
    const int item = first_item + warp, row = item / HEADS, head = item - row * HEADS;
    const u16* from = (OWN ? a.heads : a.query) + row * 2 * NEXT + head * 64 + part * 8;
    auto at = [&](int i) { return from + i * NEXT; };
    Asked<2> asked;
    asked.begin(of == 0 ? 3 : 0, at);
    asked.wait(at, [&](int, const uint4& unit) { return all_fresh(unit, s.tag); });
    float whole[8], rest[8];
    widen_eight(whole, asked.units[0]);
    widen_eight(rest, asked.units[1]);
    if (of == 0)
#pragma unroll
      for (int i = 0; i < 8; i++) sh.queries[warp][part * 8 + i] = whole[i] + rest[i];
  }
  together();
  int segment = 0;
  for_segments(keys, [&](int item, int in, int count) {
    const int row = item / HEADS, cached = OWN ? least(count, s.slot - in) : count;
    float q[8];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float4 four = *(const float4*)&sh.queries[segment][part * 8 + 4 * i];
      q[4 * i] = four.x, q[4 * i + 1] = four.y, q[4 * i + 2] = four.z, q[4 * i + 3] = four.w;
    }
    float best = NOTHING, total = 0, out[8] = {};
#pragma unroll 1
    for (int begin = 0; begin < cached; begin += MOST) {
      const int there = least(MOST, cached - begin), place = take(sh, s.cursor, 1);
      const u8* base = dynamic_shared() + place * CHUNK;
      const int scales_from = CROSS8 && !OWN ? (int)((first_key<OWN>(item) + in + begin) % 8) * 2 : 0;
      Eight k[TURNS], v[TURNS];
      float score[TURNS], scale[TURNS];
#pragma unroll
      for (int i = 0; i < TURNS; i++) {
        const int key = (i * WARPS + warp) * 4 + of;
        // What lies behind the last value may be no number, which a weight of zero does not hide.
        k[i].of = v[i].of = {};
        score[i] = scale[i] = 1;
        if (key < there) {
          k[i] = *(const Eight*)(base + key * BYTES + part * (BYTES / 8));
          v[i] = *(const Eight*)(base + (MOST + key) * BYTES + part * (BYTES / 8));
          if (CROSS8 && !OWN) {
            score[i] = widen(*(const u16*)(base + scales_behind(0) + scales_from + key * 2));
            scale[i] = widen(*(const u16*)(base + scales_behind(1) + scales_from + key * 2));
          }
        }
      }
      release(sh, place, 1);
      float top = best;
#pragma unroll
      for (int i = 0; i < TURNS; i++) {
        const int key = (i * WARPS + warp) * 4 + of;
        float x[8], dot = 0;
        widen_eight(x, k[i].of);
#pragma unroll
        for (int j = 0; j < 8; j++) dot += q[j] * x[j];
#pragma unroll
        for (int step = 1; step < 8; step *= 2) dot += __shfl_xor_sync(~0u, dot, step);
        const bool seen = key < there && (!OWN || sh.valid[row][in + begin + key]);
        score[i] = seen ? dot * score[i] : __int_as_float(0xFF800000);
        top = fmaxf(top, score[i]);
      }
      const float shrink = exp2_fast(best - top);
      best = top, total *= shrink;
#pragma unroll
      for (int j = 0; j < 8; j++) out[j] *= shrink;
#pragma unroll
      for (int i = 0; i < TURNS; i++) {
        float weight = exp2_fast(score[i] - best), x[8];
        total += weight;
        if (CROSS8 && !OWN) weight *= scale[i];
        widen_eight(x, v[i].of);
#pragma unroll
        for (int j = 0; j < 8; j++) out[j] += weight * x[j];
      }
    }
    float top = fmaxf(best, __shfl_xor_sync(~0u, best, 8));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 16));
    const float shrink = exp2_fast(best - top);
    total *= shrink;
    total += __shfl_xor_sync(~0u, total, 8);
    total += __shfl_xor_sync(~0u, total, 16);
#pragma unroll
    for (int j = 0; j < 8; j++) out[j] *= shrink;
    gather(out);
    *(float2*)&sh.runs[segment][warp][part * 8 + of * 2] = {out[0], out[1]};
    if (lane == 0) sh.tops[segment][warp] = top, sh.totals[segment][warp] = total;
    segment++;
  });
  together();
  // A warp for each item again.
  int finished = 0;
  for_segments(keys, [&](int item, int in, int count) {
    if (finished++ != warp) return;
    const int run = program() - item * keys / share;
    finish_run(a, s, sh, warp, (OWN ? a.own_runs : a.cross_runs) + (item * RUNS + run) * 64,
               (OWN ? a.own_logs : a.cross_logs) + item * LOGS + run, OWN && in + count == keys, item);
  });
}

// -- The kernel ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void layers(const Arguments& a, State& s, Shared& sh) {
  if (thread() / 32 < COLUMNS / 4) {
    const Span width = share(WIDTH, ROWS);
    const int column = stream_column(), row = 2 * stream_pair(), n = width.first + row;
    const bool there = row < width.count && column < BATCH;
    float gains[2] = {};
    if (there) {
      const long long token = a.tokens[(long long)column * a.token_stride + s.slot];
      // A row that only pads the batch may hold anything.
      const int position = most(s.slot - (int)a.offset[column], 0);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        s.residual[i] = widen(a.embedding[token * WIDTH + n + i]) + widen(a.positions[position * WIDTH + n + i]);
        gains[i] = widen(a.first_gain[n + i]);
      }
    }
    publish_stream(a, s, column, n, gains[0], gains[1], there, false);
  }
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++, s.tag ^= 1)
#pragma unroll 1
    for (int step = 0; step < STEPS; step++)
      if (step == OWN_ATTENTION)
        attention<true>(a, s, sh);
      else if (step == CROSS_ATTENTION)
        attention<false>(a, s, sh);
      else if (step == FC2)
        product_of_hidden(a, s, sh, layer);
      else if (is_large(step))
        product_of_stream<true>(a, s, sh, layer, step);
      else if (from_stream(step))
        product_of_stream<false>(a, s, sh, layer, step);
      else
        product_of_runs(a, s, sh, layer, step);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_layers(Arguments a) {
  u8* memory = dynamic_shared();
  Shared& sh = *(Shared*)(memory + IN_RING * CHUNK);
  // Who has nothing to give to others leaves.
  if (share(WIDTH, ROWS).count <= 0 && share(FFN, ROWS_FFN).count <= 0) return;
  init_barriers(sh, WARPS);
  __syncthreads();
  State s;
  s.slot = (int)*a.length - 1;
  if (*a.finished) return;
  // Tags alternate, an even number of times a launch: the first finds the buffers zeroed, or as the last one left them.
  s.stream_tag = s.tag = 1;
  s.residual[0] = s.residual[1] = 0;
  if (__shfl_sync(~0u, thread() / 128, 0) == WARPS / 4) {
    few_registers();
    if (thread() / 32 == FETCHER) fetch(a, sh, shared_address(memory), s.slot);
  } else {
    many_registers();
    constexpr int OTHERS = 32 * WARPS;
    for (int i = thread(); i < LAYERS * 2; i += OTHERS) sh.caches[i / 2][i % 2] = a.table[i / 2 * POINTERS + KEYS + i % 2];
    for (int i = thread(); i < LAYERS * 3; i += OTHERS) sh.eps[i / 3][i % 3] = a.eps[i];
    for (int i = thread(); i < BATCH * SLOTS; i += OTHERS)
      sh.valid[i / SLOTS][i % SLOTS] = a.valid[(long long)(i / SLOTS) * a.valid_stride + i % SLOTS];
    together();
    layers(a, s, sh);
  }
}
