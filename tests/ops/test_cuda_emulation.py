"""The CPU emulation of CUDA's primitives: each against what it stands for, and that it shows what is wrong."""

import ctypes
import platform
import re
import shutil

import numpy as np
import pytest
import torch

from tests.ops import compile_emulated


pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86-64, whose stacks the emulation switches"),
]

SEEDS = range(8)
SOURCE = r"""
struct Arguments {
    const u32 *a, *b;
    u32* out;
    int n, mode;
};
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(1024, 1) name(const __grid_constant__ Arguments x)

KERNEL(collectives) {
    const u32 thread = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32, value = x.a[thread];
    u32* out = x.out + thread * 8;
    if (lane >= x.n) return;
    float sum = int(value);
#pragma unroll
    for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    out[0] = int(sum);
    out[1] = __shfl_down_sync(~0u, value, 5);
    out[2] = __shfl_sync(~0u, int(value), lane * 7 + 3);
    if (lane >= x.mode) return;
    out[3] = __ballot_sync(~0u, value & 1);
    out[4] = __any_sync(~0u, value == 7) << 1 | __all_sync(~0u, value < 15);
    u32* words = reinterpret_cast<u32*>(dynamic_shared()) + threadIdx.x / 32 * 32;
    words[lane] = value;
    __syncwarp();
    out[5] = words[31 - lane];
    out[6] = threadIdx.x << 16 | blockIdx.x << 8 | gridDim.x;
}

// Warps 0 and 1 fill what warps 2 and 3 read, in turn; 4 to 6 add up by a barrier of their own.
KERNEL(named_barriers) {
    const u32 warp = threadIdx.x / 32, base = shared_address(dynamic_shared());
    if (warp == 7) return;
    if (threadIdx.x < 3) store4(base + 1024 + 4 * threadIdx.x, 0);
    __syncthreads();
    u32 sum = 0;
    for (int i = 0; i < x.n; i++) {
        if (warp < 2) {
            if (i && x.mode != 1) bar_sync(2, 128);
            store4(base + 4 * threadIdx.x, i * 64 + threadIdx.x);
            bar_arrive(1, 128);
        } else if (warp < 4) {
            bar_sync(1, 128);
            sum = sum * 3 + load4(base + 4 * (127 - threadIdx.x));
            if (i + 1 < x.n && x.mode != 1) bar_arrive(2, 128);
        } else {
            if (threadIdx.x % 32 == 0) store4(base + 1024 + 4 * (warp - 4), i);
            if (x.mode != 2) bar_sync(15, 96);
            sum = sum * 3 + load4(base + 1024) + load4(base + 1028) + load4(base + 1032);
            if (x.mode != 2) bar_sync(15, 96);
        }
    }
    x.out[blockIdx.x * 256 + threadIdx.x] = sum;
}

// Warp 4 brings pieces of 2048 bytes into a ring of 3, for warps 0 to 3.
KERNEL(ring) {
    const u32 base = shared_address(dynamic_shared()), lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 3; i++) barrier_init(base + 8 * i, 1), barrier_init(base + 64 + 8 * i, 4);
        barrier_fence();
    }
    __syncthreads();
    if (threadIdx.x / 32 == 4) {
        for (int i = 0; i < x.n && lane == 0; i++) {
            const u32 stage = i % 3, full = base + 8 * stage;
            while (x.mode != 1 && !barrier_try(base + 64 + 8 * stage, (i / 3 & 1) ^ 1)) {}
            barrier_expect(full, 2048);
            copy_async(base + 128 + 2048 * stage, x.a + i * 512, 1024, full);
            copy_async(base + 128 + 2048 * stage + 1024, x.a + i * 512 + 256, 1024, full);
        }
        return;
    }
    u32 sum = 0;
    for (int i = 0; i < x.n; i++) {
        const u32 stage = i % 3;
        while ((x.mode != 2 || i == x.n - 1) && !barrier_try(base + 8 * stage, i / 3 & 1)) {}
        u32 four[4];
        load16(four, base + 128 + 2048 * stage + 16 * threadIdx.x);
        sum = sum * 3 + (four[0] ^ four[1]) + (four[2] ^ four[3]);
        __syncwarp();
        if (lane == 0) barrier_arrive(base + 64 + 8 * stage);
    }
    x.out[blockIdx.x * 128 + threadIdx.x] = sum;
}

// a: the halves of a matrix of 16 rows of 16, then of one of 16 rows of 8; b: 16 rows of 8 floats to add.
KERNEL(product) {
    const u16* left = reinterpret_cast<const u16*>(x.a) + threadIdx.x / 32 * 384;
    const u16* right = left + 256;
    const u32 group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
    auto row_pair = [&](u32 row, u32 k) { return left[row * 16 + k] | u32(left[row * 16 + k + 1]) << 16; };
    auto column_pair = [&](u32 k) { return right[k * 8 + group] | u32(right[(k + 1) * 8 + group]) << 16; };
    const u32 at[4] = {group * 8 + 2 * member, group * 8 + 2 * member + 1, (group + 8) * 8 + 2 * member,
                       (group + 8) * 8 + 2 * member + 1};
    const u32 from = threadIdx.x / 32 * 128;
    float c[4];
    for (int i = 0; i < 4; i++) c[i] = __uint_as_float(x.b[from + at[i]]);
    multiply(c, row_pair(group, 2 * member), row_pair(group + 8, 2 * member), row_pair(group, 2 * member + 8),
             row_pair(group + 8, 2 * member + 8), column_pair(2 * member), column_pair(2 * member + 8));
    for (int i = 0; i < 4; i++) x.out[from + at[i]] = __float_as_uint(c[i]);
}

KERNEL(elementwise) {
    for (int i = threadIdx.x; i < x.n; i += blockDim.x) {
        const u32 a = x.a[i], b = x.b ? x.b[i] : 0;
        const float f = __uint_as_float(a);
        x.out[i] = x.mode == 0   ? __float_as_uint(widen(a))
                   : x.mode == 1 ? pack(f, -f)
                   : x.mode == 2 ? half_fma(a, (BF16 ? 0x3F80u : 0x3C00u) * 0x10001u, b)
                   : x.mode == 3 ? half_fma(b, (BF16 ? 0xBF80u : 0xBC00u) * 0x10001u, a)
                   : x.mode == 4 ? half_fma(a, b, 0x80008000)
                   : x.mode == 5 ? pack_f16(f, -f)
                   : x.mode == 6 ? __float_as_uint(widen_f16(a))
                   : x.mode == 8 ? dot_low(a, b, -7)
                   : x.mode == 9 ? dot_high(a, b, -7)
                                 : byte_permute(a, ~a * 2654435761u, b);
    }
}

// Every block passes on what the one before has, x.n times; the words say themselves which time they are of.
// Mode 1 has two words, and a third to say that they are there.
KERNEL(exchange) {
    const u32 before = (blockIdx.x + gridDim.x - 1) % gridDim.x;
    auto place = [&](u32 block, int i) { return x.out + ((i * gridDim.x + block) * blockDim.x + threadIdx.x) * 4; };
    u32 value = blockIdx.x;
    for (int i = 0; i < x.n; i++) {
        u32 *to = place(blockIdx.x, i), *from = place(before, i);
        if (x.mode == 0) {
            poke16(to, uint4{value, ~value, value + 5, u32(i) + 1});
            uint4 got;
            do got = peek16(from);
            while (got.w != i + 1);
            if (got.y != ~got.x || got.z != got.x + 5) trap();
            value = got.x + 1;
        } else {
            poke8(to, uint2{value, value});
            poke4(to + 2, i + 1);
            if (peek8(to).x != value || peek4(to + 1) != value) trap();
            while (peek4(from + 2) != i + 1) {}
            const uint2 got = peek8(from);
            if (got.x != got.y) trap();
            value = got.x + 1;
        }
    }
    __syncthreads();
    x.out[(x.n * gridDim.x * blockDim.x + blockIdx.x * blockDim.x + threadIdx.x) * 4] = value;
}

KERNEL(ticks) {
    for (int i = 0; i < 20; i++) __syncwarp();
    x.out[threadIdx.x] = nanoseconds();
}

// Every thread of every warp all the time: what the largest launch costs.
KERNEL(many) {
    float c[4] = {};
    u32 value = threadIdx.x;
    for (int i = 0; i < x.n; i++) {
        value += __shfl_xor_sync(~0u, value, 1 << i % 5);
        multiply(c, value, i, i, i, i, value);
        if (i % 8 == 0) bar_sync(3, 544);
    }
    x.out[blockIdx.x * blockDim.x + threadIdx.x] = value + (c[0] > 1);
}

KERNEL(mistakes) {
    u8* memory = dynamic_shared();
    const u32 base = shared_address(memory), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) barrier_init(base, 1);
    __syncthreads();
    if (x.mode == 0 && warp == 0) bar_sync(4, 96);
    if (x.mode == 1) while (peek4(x.out) != 1) {}
    if (x.mode == 2) while (!barrier_try(base, 0)) {}
    if (x.mode == 3) while (!__all_sync(~0u, peek4(x.out) == 1)) {}
    if (x.mode == 4) lane < 7 ? (void)__ballot_sync(~0u, 1) : __syncwarp();
    if (x.mode == 5) lane < 7 ? bar_sync(1, 64) : bar_sync(2, 64);
    if (threadIdx.x == 0) {
        if (x.mode == 6) copy_async(base + 24, x.a, 32, base);
        if (x.mode == 7) copy_async(base + 16, x.a + 1, 32, base);
        if (x.mode == 8) copy_async(base + 16, x.a, 24, base);
        if (x.mode == 9) copy_async(base + 16, x.a, 512, base);
        if (x.mode == 10) copy_async(base + 16, x.a, 16, base);
        if (x.mode == 11) barrier_arrive(base + 8);
        if (x.mode == 12) barrier_expect(base, 16), barrier_arrive(base);
        if (x.mode == 13) store4(base + 253 * 4 + 2, 1);
        if (x.mode == 14) store4(base + 1024, 1);
        if (x.mode == 15) load4(0);
        if (x.mode == 16) memory[512 + 16] = 1;
        if (x.mode == 17) poke4(x.out, 1), fetch8(x.out);
        if (x.mode == 18) trap();
        if (x.mode == 19) peek16(x.out + 1);
        if (x.mode == 20) return;
    }
    if (x.mode == 20 && warp == 0) { float c[4] = {}; multiply(c, 0, 0, 0, 0, 0, 0); }
    if (x.mode == 21) bar_sync(1, warp ? 64 : 96);
    if (x.mode == 22 && warp == 0) bar_arrive(1, 96), bar_arrive(1, 96);
    if (x.mode == 23) __shfl_sync(0xFFFFu, 1, 0);
}
"""
KERNELS = [line[7:-3] for line in SOURCE.splitlines() if line.startswith("KERNEL(")]


class Arguments(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("a", "b", "out")] + [("n", ctypes.c_int), ("mode", ctypes.c_int)]


def aligned(size, dtype=np.uint32):
    """Zeros, at a multiple of 16 bytes."""
    memory = np.zeros(size * np.dtype(dtype).itemsize + 16, dtype=np.uint8)
    return memory[-memory.ctypes.data % 16 :][: size * np.dtype(dtype).itemsize].view(dtype)


def copied(array):
    result = aligned(array.size, array.dtype)
    result[:] = array.ravel()
    return result


class Library:
    """The kernels of `SOURCE`, compiled for one element type."""

    def __init__(self, folder, bf16, races=False):
        source, library = folder / "kernels.cu", folder / f"kernels{bf16}{races}.so"
        source.write_text(SOURCE + "".join(f"EMULATED_ENTRY({name}, Arguments)\n" for name in KERNELS))
        flags = ["-Wall", "-Wextra", "-Wno-sign-compare", "-Werror", "-Wno-unknown-pragmas", f"-DBF16={bf16}"]
        compile_emulated(source, library, *flags, races=races)
        self.kernels = ctypes.CDLL(str(library))

    def failure(self, name, blocks, threads, seed=0, a=None, b=None, out=None, n=0, mode=0, shared=0):
        """Why the launch went wrong, or an empty string."""
        pointers = [None if array is None else array.ctypes.data for array in (a, b, out)]
        failed = getattr(self.kernels, f"{name}_emulated")(
            ctypes.byref(Arguments(*pointers, n, mode)), blocks, threads, shared, seed
        )
        message = getattr(self.kernels, f"{name}_message")
        message.restype = ctypes.c_char_p
        assert failed == (message() != b"")
        return message().decode()

    def run(self, *arguments, **options):
        assert self.failure(*arguments, **options) == ""
        return options["out"]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulation")
    return [Library(folder, bf16) for bf16 in (0, 1)]


@pytest.fixture(scope="module")
def library(libraries):
    return libraries[0]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The kernels with every access to shared memory looked at."""
    return Library(tmp_path_factory.mktemp("races"), 0, races=True)


@pytest.mark.parametrize("before, after", [(32, 32), (20, 20), (32, 11)])
@pytest.mark.parametrize("seed", SEEDS)
def test_collectives_see_all_lanes_that_have_not_ended(library, seed, before, after):
    """Of `before` lanes `after` go on after the shuffles."""
    values = np.random.default_rng(seed).integers(0, 16, (2, 3, 32), dtype=np.uint32)
    options = {"a": copied(values), "out": aligned(2 * 96 * 8), "n": before, "mode": after, "shared": 3 * 128}
    out = library.run("collectives", 2, 96, seed, **options).reshape(2, 3, 32, 8)

    def assert_equal(column, lanes, expected):
        np.testing.assert_array_equal(out[:, :, :lanes, column], np.broadcast_to(expected, (2, 3, lanes)))

    index = np.arange(before)
    present = np.where(np.arange(32) < before, values, np.uint32(2**32 - 1))
    if before == 32:
        assert_equal(0, before, values.sum(-1)[..., None])
    assert_equal(1, before, present[..., np.where(index + 5 < 32, index + 5, index)])
    assert_equal(2, before, present[..., (index * 7 + 3) % 32])
    here = values[..., :after]
    assert_equal(3, after, ((here & 1) << np.arange(after, dtype=np.uint32)).sum(-1, dtype=np.uint32)[..., None])
    assert_equal(4, after, ((here == 7).any(-1) * 2 + (here < 15).all(-1))[..., None])
    if after == 32:
        assert_equal(5, after, values[..., ::-1])
    block, warp, lane = np.indices((2, 3, after))
    assert_equal(6, after, (warp * 32 + lane) << 16 | block << 8 | 2)


def thirds(pieces):
    """What a kernel adds up from pieces [n, threads]."""
    total = np.zeros_like(pieces[0])
    for piece in pieces:
        total = total * np.uint32(3) + piece
    return total


def named_barriers(library, seed, mode):
    n, out = 40, aligned(3 * 256)
    failure = library.failure("named_barriers", 3, 256, seed, out=out, n=n, mode=mode, shared=1040)
    thread, i = np.arange(64, dtype=np.uint32), np.arange(n, dtype=np.uint32)[:, None]
    reference = np.zeros(256, dtype=np.uint32)
    reference[64:128] = thirds(i * np.uint32(64) + thread[::-1])
    reference[128:224] = thirds(np.broadcast_to(i * np.uint32(3), (n, 96)))
    return failure, bool((out.reshape(3, 256) == reference).all())


@pytest.mark.parametrize("seed", SEEDS)
def test_named_barriers_hold_their_own_warps(library, seed):
    assert named_barriers(library, seed, 0) == ("", True)


@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_named_barrier_left_out_shows(library, seed, mode):
    assert named_barriers(library, seed, mode) != ("", True)


def ring(library, seed, mode):
    data = np.random.default_rng(seed).integers(0, 2**32, (50, 128, 4), dtype=np.uint32)
    out = aligned(2 * 128)
    failure = library.failure("ring", 2, 160, seed, a=copied(data), out=out, n=50, mode=mode, shared=128 + 3 * 2048)
    reference = thirds((data[..., 0] ^ data[..., 1]) + (data[..., 2] ^ data[..., 3]))
    return failure, bool((out.reshape(2, 128) == reference).all())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_ring_of_bulk_copies(library, seed):
    assert ring(library, seed, 0) == ("", True)


@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_ring_without_waiting_shows(library, seed, mode):
    assert ring(library, seed, mode) != ("", True)


@pytest.mark.parametrize("seed", SEEDS)
def test_races_are_seen_in_every_order(watched, seed):
    assert named_barriers(watched, seed, 0) == ring(watched, seed, 0) == ("", True)
    assert "a race: byte" in named_barriers(watched, seed, 2)[0]
    assert "a race: byte" in ring(watched, seed, 2)[0]
    # In some orders the barrier is found in use first.
    assert re.search("a race: byte|more arrivals", ring(watched, seed, 1)[0])


def test_a_race_is_told_with_both_lines(watched):
    message = named_barriers(watched, 0, 2)[0]
    lines = SOURCE.splitlines()
    first, second = (int(line) for line in re.findall(r"behind line (\d+)", message))
    # Behind the only collective that both warps passed.
    assert "__syncthreads" in lines[first - 1] and first == second, message


@pytest.mark.parametrize("bf16", [0, 1])
def test_multiply(libraries, bf16):
    dtype = torch.bfloat16 if bf16 else torch.float16
    generator = torch.Generator().manual_seed(0)
    halves = torch.randn(7, 384, generator=generator).to(dtype)
    added = torch.randn(7, 16, 8, generator=generator)
    out = libraries[bf16].run(
        "product", 1, 7 * 32, a=copied(halves.view(torch.int16).numpy()), b=copied(added.numpy()), out=aligned(7 * 128)
    )
    halves = halves.double().numpy()
    left, right = halves[:, :256].reshape(7, 16, 16), halves[:, 256:].reshape(7, 16, 8)
    reference = left @ right + added.double().numpy()
    np.testing.assert_allclose(out.view(np.float32).reshape(7, 16, 8), reference, rtol=0, atol=1e-5)


def rounded(values, bf16):
    """Doubles rounded to a half, ties to even."""
    bits, least, greatest = (8, -133, float(2**128 - 2**120)) if bf16 else (11, -24, 65504.0)
    step = np.ldexp(1.0, np.maximum(np.frexp(values)[1] - bits, least))
    with np.errstate(invalid="ignore"):
        result = np.where(np.isfinite(values), np.rint(values / step) * step, values)
    return np.where(np.abs(result) > greatest, np.copysign(np.inf, result), result)


def meaning(halves, bf16):
    """The doubles that 16-bit patterns stand for."""
    halves = halves.astype(np.uint16)
    if bf16:
        return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return halves.view(np.float16).astype(np.float64)


def assert_same(got, expected):
    """The same numbers, zeros of the same sign, NaN wherever NaN."""
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got[~nan], expected[~nan])
    np.testing.assert_array_equal(np.signbit(got[~nan]), np.signbit(expected[~nan]))


def elementwise(library, mode, a, b=None):
    b = None if b is None else copied(b)
    return library.run("elementwise", 1, 32, a=copied(a), b=b, out=aligned(a.size), n=a.size, mode=mode)


@pytest.mark.parametrize("bf16, widen, pack", [(0, 0, 1), (1, 0, 1), (0, 6, 5)])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_conversions(libraries, bf16, widen, pack):
    library = libraries[1 if pack == 5 else bf16]  # pack_f16 does not depend on BF16
    patterns = np.arange(65536, dtype=np.uint32)
    exact = meaning(patterns, bf16)
    assert_same(elementwise(library, widen, patterns).view(np.float32).astype(np.float64), exact)

    ordered = exact[np.isfinite(exact) & ~np.signbit(exact)]
    ties = np.append((ordered[:-1] + ordered[1:]) / 2, ordered[-1] + (ordered[-1] - ordered[-2]) / 2)
    ties = np.concatenate([ties, -ties]).astype(np.float32)
    random = np.random.default_rng(0).integers(0, 2**32, 100000, dtype=np.uint32).view(np.float32)
    floats = [ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf)), random]
    floats = np.concatenate([*floats, exact.astype(np.float32)])
    got = elementwise(library, pack, floats.view(np.uint32))
    assert_same(meaning(got & 0xFFFF, bf16), rounded(floats.astype(np.float64), bf16))
    assert_same(meaning(got >> 16, bf16), rounded(-floats.astype(np.float64), bf16))
    if not bf16:
        assert_same(meaning(got & 0xFFFF, bf16), floats.astype(np.float16).astype(np.float64))
    dtype = torch.bfloat16 if bf16 else torch.float16
    assert_same(meaning(got & 0xFFFF, bf16), torch.from_numpy(floats).to(dtype).double().numpy())


@pytest.mark.parametrize("bf16", [0, 1])
@pytest.mark.parametrize("mode, operation", [(2, np.add), (3, np.subtract), (4, np.multiply)])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_arithmetic_on_halves_rounds_once(libraries, bf16, mode, operation):
    generator = np.random.default_rng(mode)
    a, b = generator.integers(0, 2**32, (2, 200000), dtype=np.uint32)
    if mode == 4:  # products that are subnormal, more than chance has
        one = 0x3F80 if bf16 else 0x3C00
        a[::2] = a[::2] & 0x0FFF0FFF
        b[::2] = (b[::2] & 0x007F007F) + one * 0x10001
    else:  # sums of the like
        b[::2] = a[::2] ^ (b[::2] & 0x81FF81FF)
    got = elementwise(libraries[bf16], mode, a, b)
    for shift in (0, 16):
        exact = operation(meaning(a >> shift & 0xFFFF, bf16), meaning(b >> shift & 0xFFFF, bf16))
        assert_same(meaning(got >> shift & 0xFFFF, bf16), rounded(exact, bf16))


def test_byte_permute(library):
    generator = np.random.default_rng(0)
    a, selectors = generator.integers(0, 2**32, (2, 5000), dtype=np.uint32)
    b = ~a * np.uint32(2654435761)
    selected = np.zeros((5000, 4), dtype=np.uint8)
    source = np.stack([a, b], 1).view(np.uint8)
    for i in range(4):
        choice = selectors >> (4 * i) & 15
        byte = source[np.arange(5000), choice & 7]
        selected[:, i] = np.where(choice & 8, np.where(byte & 128, 255, 0), byte)
    np.testing.assert_array_equal(elementwise(library, 7, a, selectors), selected.view(np.uint32)[:, 0])


@pytest.mark.parametrize("mode, first", [(8, 0), (9, 2)])
def test_dot(library, mode, first):
    """Two signed 16-bit integers times two unsigned bytes."""
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 2**32, (2, 5000), dtype=np.uint32)
    pairs, four = a[:, None].view(np.int16).astype(np.int64), b[:, None].view(np.uint8).astype(np.int64)
    expected = (pairs * four[:, first : first + 2]).sum(1) - 7
    np.testing.assert_array_equal(elementwise(library, mode, a, b).view(np.int32), expected)


def exchange(library, seed, mode):
    out = aligned(13 * 4 * 64 * 4)
    failure = library.failure("exchange", 4, 64, seed, out=out, n=12, mode=mode)
    return failure, out.reshape(13, 4, 64, 4)[12, :, :, 0]


@pytest.mark.parametrize("seed", SEEDS)
def test_words_that_carry_their_own_mark_pass_between_blocks(library, seed):
    failure, out = exchange(library, seed, 0)
    assert failure == ""
    np.testing.assert_array_equal(out, np.broadcast_to((np.arange(4)[:, None] - 12) % 4 + 12, (4, 64)))


@pytest.mark.parametrize("seed", SEEDS)
def test_words_marked_by_another_word_are_seen_before_they_are_there(library, seed):
    failure, out = exchange(library, seed, 1)
    right = (np.arange(4)[:, None] - 12) % 4 + 12
    assert failure != "" or (out != right).any()


def test_a_seed_is_one_order(library):
    clocks = [library.run("ticks", 1, 256, seed, out=aligned(256)).tolist() for seed in (1, 2, 1)]
    assert clocks[0] == clocks[2] != clocks[1]


def test_the_largest_launch(library):
    out = library.run("many", 8, 544, out=aligned(8 * 544), n=100).reshape(8, 544)
    assert (out == out[0]).all()


@pytest.mark.parametrize(
    "mode, message",
    [
        (0, r"deadlock.*block 0 warps 0-0: lanes 0-31 at bar_sync\(0x4, 96\), line \d+;"),
        (1, r"deadlock.*lanes 0-31 at peek"),
        (2, r"deadlock.*lanes 0-31 at barrier_try\(0x400, 0\)"),
        (3, "deadlock"),
        (4, "comes to (ballot|syncwarp), line .*, where other lanes of the warp wait at (ballot|syncwarp)"),
        (5, "comes to bar_sync, line .*, where other lanes of the warp wait at bar_sync"),
        (6, "block 0 warp 0 lane 0: copy_async, line .*: 32 bytes .* are not whole 16s"),
        (7, "copy_async.*are not whole 16s"),
        (8, "copy_async.*24 bytes .* are not whole 16s"),
        (9, "copy_async, line .*: shared address 0x410 of 512 bytes is out of bounds"),
        (10, "copy_async, line .*: block 0 ended before the copy did"),
        (11, "barrier_arrive, line .*: no barrier initialised at 0x408"),
        (12, "barrier_arrive, line .*: more arrivals than the barrier counts"),
        (13, "store4, line .*: shared address .* is misaligned"),
        (14, "store4, line .*: shared address 0x800 of 4 bytes is out of bounds"),
        (15, "load4, line .*: shared address 0x0 of 4 bytes is out of bounds"),
        (16, "block 0 wrote at byte 528 of its 512 of shared memory"),
        (17, "fetch, line .*, of what this launch pokes"),
        (18, r"block 0 warp 0 lane 0: trap, line .*\n  block 0 warps 0-0: "),
        (19, "peek, line .* is misaligned"),
        (20, "multiply, line .*, in a warp of which lanes have ended"),
        (21, "barrier 1, line .*, for (64|96) threads while it waits for (64|96)"),
        (22, "barrier 1, line .*: the warp arrives twice in one use"),
        (23, "shfl, line .*, with mask 0xffff: only full masks"),
    ],
)
def test_mistakes_are_reported(library, mode, message):
    failure = library.failure("mistakes", 1, 64, a=aligned(512), out=aligned(512), mode=mode, shared=512)
    assert re.search(message, failure, re.DOTALL), failure


def test_a_launch_that_cannot_be_is_reported(library):
    assert "no launch of 1 blocks of 2048 threads" in library.failure("ticks", 1, 2048, out=aligned(2048))
