"""The kernels of the one-token step against float64, on a GPU, or in Triton's interpreter where there is none."""

import threading

import pytest
import torch


pytest.importorskip("triton", reason="needs the triton package")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

from whisper_static_cache.ops import decode_attention, decode_linear, decode_tokens, launch  # noqa: E402
from whisper_static_cache.ops.packing import LEVELS, pack  # noqa: E402


pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not launch.interpreted(), reason="needs TRITON_INTERPRET=1 where there is no GPU"
)

FORMATS = [(16, 0), (8, 64), (4, 64), (3, 32), (2, 16), (1.58, 16)]
# (in_features, out_features, rows): one chunk, several, features that do not fill the last program, planes with
# padding.
SHAPES = [(128, 64, 1), (320, 130, 2), (192, 66, 3), (128, 66, 4)]
SHAPES += [(320, 130, 9), (640, 72, 11), (192, 66, 16), (128, 64, 17), (64, 64, 32)]
if DEVICE == "cuda":
    SHAPES += [(320, 130, 3), (1280, 1283, 8), (1280, 1283, 12), (1280, 5120, 16), (5120, 1280, 16), (384, 384, 32)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def fold(weights, biases, norm):
    pair = decode_linear.folded_pair(weights).fill_(float("nan"))
    decode_linear.fold_norms([(pair, weights, biases, norm)])
    return pair[:, : sum(weight.out_features for weight in weights)]


def random_weight(bits, group_size, in_features, out_features, dtype):
    """A random `Weight`, and the matrix that it means, float64."""
    if bits == 16:
        values = (torch.randn(out_features, in_features, device=DEVICE) * 0.05).to(dtype)
        weight = decode_linear.Weight(values, None, None, 8 * values.element_size(), 0, in_features)
        return weight, values.double()
    q = torch.randint(0, LEVELS[bits], (out_features, in_features), dtype=torch.uint8, device=DEVICE)
    groups = out_features, in_features // group_size
    scales = (torch.rand(groups, device=DEVICE) * 0.02 + 0.01).to(dtype)
    zeros = (torch.rand(groups, device=DEVICE) * LEVELS[bits]).to(dtype)
    weight = decode_linear.Weight(pack(q, bits), scales, zeros, bits, group_size, in_features)
    return weight, weight._replace(scales=scales.double(), zeros=zeros.double()).dense()


def random_norm(width, dtype):
    norm = torch.nn.LayerNorm(width, device=DEVICE)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm.to(dtype).requires_grad_(False)


def assert_close(actual, expected, bound):
    """Relative error in the 2-norm; NaN never passes."""
    error = ((actual.double() - expected).norm() / expected.norm()).item()
    assert error <= bound, f"relative error {error:.2e} above {bound:.0e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize(("in_features", "out_features", "rows"), SHAPES)
def test_linear_with_layer_norm_and_residual(in_features, out_features, rows, bits, group_size, dtype):
    torch.manual_seed(rows + int(10 * bits))
    weight, dense = random_weight(bits, group_size, in_features, out_features, dtype)
    norm, bias = random_norm(in_features, dtype), torch.randn(out_features, device=DEVICE).to(dtype)
    x = torch.randn(rows, in_features, device=DEVICE) * 3 + 0.3
    constant, folded = fold([weight], [bias], norm)
    stats = torch.stack((x.sum(1, keepdim=True), (x * x).sum(1, keepdim=True)))
    out = poisoned(rows, out_features)
    gained = x * norm.weight.float()
    arguments = decode_linear.arguments([weight])
    decode_linear.decode_linear(out, gained, *arguments, constant, decode_linear.STORE, 0.125, folded, stats, norm.eps)
    exact = decode_linear.Weight(dense, None, None, 64, 0, in_features)
    # float32 arithmetic throughout, whatever the dtype of the weights; with low-bit ones the mantissa has lost the
    # bits that hold the integer.
    bound = 2e-5
    assert_close(out, decode_linear.reference_decode_linear(x.double(), exact, bias, norm, 0.125), bound)

    residual, next_gain = torch.randn(rows, out_features, device=DEVICE), torch.randn(out_features, device=DEVICE)
    expected = residual.double() + decode_linear.reference_decode_linear(x.to(dtype).double(), exact, bias)
    programs = decode_linear.plan_for(weight, rows=rows).programs(weight)
    gained, sums = poisoned(rows, out_features), poisoned(2, rows, programs)
    decode_linear.decode_linear(
        residual,
        x.to(dtype),
        *arguments,
        bias,
        decode_linear.RESIDUAL,
        gained=gained,
        next_gain=next_gain.to(dtype),
        next_stats=sums,
    )
    assert_close(residual, expected, bound)
    assert_close(gained, expected * next_gain.to(dtype), bound)
    assert_close(sums.sum(2), torch.stack((expected.sum(1), (expected * expected).sum(1))), 1e-4)


@pytest.mark.parametrize("rows", [2, 9, 32])
@pytest.mark.parametrize(("bits", "group_size", "tiles"), [(16, 0, None), (16, 0, 4), (16, 0, 16), (4, 64, None)])
def test_query_key_and_value_go_where_they_belong(bits, group_size, tiles, rows, monkeypatch):
    if tiles:
        from whisper_static_cache.ops import decode_dot

        # Of a GPU of so few multiprocessors that 9 rows go through tiles, of one weight a program.
        monkeypatch.setattr(decode_dot, "room", lambda device: (48 // (tiles - 1), 100 * 1024))
    width, slots = 128, 5
    trio = [random_weight(bits, group_size, width, width, torch.float16) for _ in range(3)]
    weights, dense = [weight for weight, _ in trio], torch.cat([matrix for _, matrix in trio])
    norm = random_norm(width, torch.float16)
    x = torch.randn(rows, width, device=DEVICE)
    bias = torch.randn(width, device=DEVICE).half()
    constant, folded = fold(weights, [bias, None, bias], norm)
    stats = torch.stack((x.sum(1, keepdim=True), (x * x).sum(1, keepdim=True)))
    keys, values = poisoned(rows, 2, slots, 64, dtype=torch.float16), poisoned(rows, 2, slots, 64, dtype=torch.float16)
    query, length = poisoned(rows, width, dtype=torch.float16), torch.tensor([4], device=DEVICE)
    decode_linear.decode_linear(
        query,
        x * norm.weight.float(),
        *decode_linear.arguments(weights),
        constant,
        decode_linear.HEADS,
        0.5,
        folded,
        stats,
        norm.eps,
        keys=keys,
        values=values,
        length=length,
    )
    exact = decode_linear.Weight(dense, None, None, 64, 0, width)
    biases = torch.cat((bias, torch.zeros_like(bias), bias))
    expected = decode_linear.reference_decode_linear(x.double(), exact, biases, norm).view(rows, 3, width)
    assert_close(query, 0.5 * expected[:, 0], 1e-3)
    assert_close(keys[:, :, 3].reshape(rows, -1), expected[:, 1], 1e-3)
    assert_close(values[:, :, 3].reshape(rows, -1), expected[:, 2], 1e-3)
    # Nothing else is written.
    untouched = [0, 1, 2, 4]
    assert keys[:, :, untouched].isnan().all() and values[:, :, untouched].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 32, 33, 64, 65, 100])
@pytest.mark.parametrize(("rows", "split"), [(2, 64), (9, 64), (9, 128), (17, 128)])
def test_self_attention_reads_up_to_its_slot(length, dtype, rows, split):
    heads, slots = 2, 100
    torch.manual_seed(length)
    keys, values = (poisoned(rows, heads, slots, 64, dtype=dtype) for _ in range(2))
    keys[:, :, :length] = torch.randn(rows, heads, length, 64, device=DEVICE).to(dtype)
    values[:, :, :length] = torch.randn(rows, heads, length, 64, device=DEVICE).to(dtype)
    query = (torch.randn(rows, heads * 64, device=DEVICE) * 0.3).to(dtype)
    valid = torch.ones(rows, slots, dtype=torch.bool, device=DEVICE)
    if length > 2:
        valid[1, :2] = False
    at = torch.tensor([length], device=DEVICE)
    splits = -(-slots // split)
    runs, lse = poisoned(rows, splits, heads * 64), poisoned(rows, splits, heads)
    decode_attention.decode_attention(runs, lse, query, keys, values, split, at, valid)
    expected = decode_attention.reference_decode_attention(
        query.double(), keys[:, :, :length], values[:, :, :length], at, valid[:, :length]
    )
    # The product that follows merges the runs.
    width = heads * 64
    weight, dense = random_weight(16, 0, width, width, dtype)
    programs = decode_linear.plan_for(weight, splits=splits, rows=rows).programs(weight)
    product, none = torch.zeros(rows, width, device=DEVICE), torch.zeros(width, device=DEVICE)
    decode_linear.decode_linear(
        product,
        runs,
        *decode_linear.arguments([weight]),
        none,
        decode_linear.RESIDUAL,
        lse=lse,
        split_size=split,
        length=at,
        gained=torch.empty_like(product),
        next_gain=none,
        next_stats=torch.empty(2, rows, programs, device=DEVICE),
    )
    # On the tensor cores activations are two numbers of the weight's dtype: 16 bits of mantissa in bfloat16.
    assert_close(product, expected @ dense.T, 2**-16 if dtype == torch.bfloat16 and rows > 8 else 1e-5)


@pytest.mark.parametrize(("rows", "split"), [(2, 64), (9, 64), (9, 256), (16, 256)])
def test_cross_attention_reads_every_position(rows, split):
    heads, positions = 2, 150
    keys, values = (torch.randn(rows, heads, positions, 64, device=DEVICE) for _ in range(2))
    query = torch.randn(rows, heads * 64, device=DEVICE) * 0.3
    splits = -(-positions // split)
    runs, lse = poisoned(rows, splits, heads * 64), poisoned(rows, splits, heads)
    decode_attention.decode_attention(runs, lse, query, keys, values, split, None, None)
    weights = lse.softmax(1).repeat_interleave(64, dim=-1)
    assert_close(
        (runs * weights).sum(1), decode_attention.reference_decode_attention(query.double(), keys, values), 1e-5
    )


# Of many rows the softmax meets half-precision values in two numbers of their dtype.
HALVES_BOUND = {torch.float16: 1e-5, torch.bfloat16: 2**-15, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [9, 11, 16, 17, 32])
@pytest.mark.parametrize("positions", [1, 64, 130])
def test_cross_attention_of_many_rows(positions, rows, dtype):
    torch.manual_seed(rows)
    heads = 2
    keys, values = (torch.randn(rows, heads, positions, 64, device=DEVICE).to(dtype) for _ in range(2))
    query = (torch.randn(rows, heads * 64, device=DEVICE) * 0.3).to(dtype)
    out, lse = poisoned(rows, 1, heads * 64), poisoned(rows, 1, heads)
    decode_attention.decode_attention(out, lse, query, keys, values, 512, None, None)
    expected = decode_attention.reference_decode_attention(query.double(), keys, values)
    assert_close(out[:, 0], expected, HALVES_BOUND[dtype])
    scores = torch.einsum("rhd,rhsd->rhs", query.double().view(rows, heads, 64), keys.double())
    assert_close(lse[:, 0], scores.logsumexp(-1), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "length"), [(9, 1), (11, 2), (16, 64), (17, 65), (16, 129), (32, 150)])
def test_self_attention_of_many_rows_with_padding(rows, length, dtype):
    """One run, as the engine has it: the slots behind the newest one are never read, those on the left are masked."""
    heads, slots = 2, 150
    torch.manual_seed(length)
    keys, values = (poisoned(rows, heads, slots, 64, dtype=dtype) for _ in range(2))
    keys[:, :, :length] = torch.randn(rows, heads, length, 64, device=DEVICE).to(dtype)
    values[:, :, :length] = torch.randn(rows, heads, length, 64, device=DEVICE).to(dtype)
    query = (torch.randn(rows, heads * 64, device=DEVICE) * 0.3).to(dtype)
    valid = torch.ones(rows, slots, dtype=torch.bool, device=DEVICE)
    # From none to all but the newest.
    for row in range(rows):
        valid[row, : min(row * 5, length - 1)] = False
    valid[rows - 1, : length - 1] = False
    at = torch.tensor([length], device=DEVICE)
    out, lse = poisoned(rows, 1, heads * 64), poisoned(rows, 1, heads)
    decode_attention.decode_attention(out, lse, query, keys, values, 256, at, valid)
    expected = decode_attention.reference_decode_attention(
        query.double(), keys[:, :, :length], values[:, :, :length], at, valid[:, :length]
    )
    assert_close(out[:, 0], expected, HALVES_BOUND[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_rows_of_nothing_but_padding_stay_finite(dtype):
    keys, values = (torch.randn(9, 1, 40, 64, device=DEVICE).to(dtype) for _ in range(2))
    query, at = torch.randn(9, 64, device=DEVICE).to(dtype), torch.tensor([40], device=DEVICE)
    valid = torch.ones(9, 40, dtype=torch.bool, device=DEVICE)
    valid[3] = False
    out, lse = poisoned(9, 1, 64), poisoned(9, 1, 1)
    decode_attention.decode_attention(out, lse, query, keys, values, 256, at, valid)
    assert out.isfinite().all() and lse.isfinite().all() and not out[3].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("in_features", "out_features", "rows", "count", "plan"),
    [
        # Two tiles a program, of which the last has one; a tile that is not full; several steps; tiles of 16, the last
        # program with fewer of them; more tiles than buffers.
        (128, 88, 16, 5, (8, 24)),
        (320, 130, 9, 8, (8, 24)),
        (320, 130, 11, 1, (16, 144)),
        (384, 530, 12, 4, (16, 144)),
        (640, 260, 16, 2, (16, 144)),
    ],
)
def test_many_features_behind_a_layer_norm(in_features, out_features, rows, count, plan, dtype, monkeypatch):
    """In tiles, on a GPU of as few multiprocessors as makes a program take several; the layer norm's sums in parts."""
    from whisper_static_cache.ops import decode_dot

    monkeypatch.setattr(decode_dot, "room", lambda device: (count, 100 * 1024))
    torch.manual_seed(out_features)
    weight, dense = random_weight(16, 0, in_features, out_features, dtype)
    warps = max(count for count in (1, 2, 4, 8) if in_features % (32 * count) == 0)
    given = decode_dot.TilesPlan(*plan, 2, warps, 0)
    if out_features >= 128 * count:
        assert decode_linear.plan_for(weight, rows=rows, normed=True)[:2] == plan
    if rows == 12:
        # Tiles that do not fill a program's share.
        given = given._replace(span=40)
    if out_features < 128 * count or rows == 12:
        # One weight of middling size is left to another kernel.
        monkeypatch.setattr(decode_linear, "tiles_plan_for", lambda *arguments: given)
    norm, bias = random_norm(in_features, dtype), torch.randn(out_features, device=DEVICE).to(dtype)
    x = torch.randn(rows, in_features, device=DEVICE) * 3 + 0.3
    constant, folded = fold([weight], [bias], norm)
    blocks = x.view(rows, -1, 64)
    stats = torch.stack((blocks.sum(2), (blocks * blocks).sum(2)))
    exact = decode_linear.Weight(dense, None, None, 64, 0, in_features)
    expected = decode_linear.reference_decode_linear(x.double(), exact, bias, norm)
    for epilogue, scale in ((decode_linear.STORE, 0.125), (decode_linear.GELU, 1.0)):
        out = poisoned(rows, out_features + 3)
        arguments = (*decode_linear.arguments([weight]), constant, epilogue, scale, folded, stats, norm.eps)
        decode_linear.decode_linear(out, x * norm.weight.float(), *arguments)
        wanted = torch.nn.functional.gelu(expected) if epilogue == decode_linear.GELU else scale * expected
        assert_close(out[:, :out_features], wanted, 2e-5)
        # Nothing else is written.
        assert out[:, out_features:].isnan().all()


@pytest.mark.parametrize("rows", [9, 32])
def test_norms_that_leave_the_range_of_half_precision_are_served(rows):
    """A residual stream beyond 65504, which only the normed activations come back from; and GELU of many rows."""
    weight, dense = random_weight(16, 0, 128, 64, torch.float16)
    norm, x = random_norm(128, torch.float16), torch.randn(rows, 128, device=DEVICE) * 1e6
    constant, folded = fold([weight], [None], norm)
    stats, out = torch.stack((x.sum(1, keepdim=True), (x * x).sum(1, keepdim=True))), poisoned(rows, 64)
    arguments = (*decode_linear.arguments([weight]), constant, decode_linear.GELU, 1.0, folded, stats, norm.eps)
    decode_linear.decode_linear(out, x * norm.weight.float(), *arguments)
    exact = decode_linear.Weight(dense, None, None, 64, 0, 128)
    expected = torch.nn.functional.gelu(decode_linear.reference_decode_linear(x.double(), exact, None, norm))
    assert_close(out, expected, 2e-5)


def test_layer_norms_are_folded_side_by_side():
    folds, expected = [], []
    for features, count in ((64, 3), (64, 1), (200, 1)):
        pairs = [random_weight(16, 0, 64, features, torch.float16) for _ in range(count)]
        weights, norm = [weight for weight, _ in pairs], random_norm(64, torch.float16)
        biases = [torch.randn(features, device=DEVICE).half() for _ in range(count)]
        biases[0] = None if count == 1 else biases[0]
        pair = decode_linear.folded_pair(weights).fill_(float("nan"))
        folds.append((pair, weights, biases, norm))
        dense = torch.cat([dense for _, dense in pairs])
        bias = torch.cat([torch.zeros(features, device=DEVICE) if one is None else one for one in biases]).double()
        expected.append((dense @ norm.bias.double() + bias, dense @ norm.weight.double()))
    decode_linear.fold_norms(folds)
    for (pair, *_), (constant, folded) in zip(folds, expected):
        assert_close(pair[0, : len(constant)], constant, 2e-5)
        assert_close(pair[1, : len(folded)], folded, 2e-5)


def test_more_rows_than_the_kernels_take_are_refused():
    weight, _ = random_weight(16, 0, 64, 64, torch.float32)
    x, none = torch.randn(33, 64, device=DEVICE), torch.zeros(64, device=DEVICE)
    with pytest.raises(ValueError, match="33 rows"):
        decode_linear.decode_linear(
            torch.empty_like(x), x, *decode_linear.arguments([weight]), none, decode_linear.STORE
        )


def test_embedding_and_what_the_first_layer_norm_needs():
    rows, width, vocab = 3, 192, 50
    tokens = torch.randint(0, vocab, (4, 9), device=DEVICE)[:rows]
    embedding, positions = torch.randn(vocab, width, device=DEVICE), torch.randn(9, width, device=DEVICE)
    gain, offset = torch.randn(width, device=DEVICE), torch.tensor([[0], [2], [7]], device=DEVICE)
    out, gained, stats = poisoned(rows, width), poisoned(rows, width), poisoned(2, rows, 1)
    length = torch.tensor([5], device=DEVICE)
    decode_tokens.embed_newest(out, gained, stats, tokens, length, offset, embedding, positions, gain)
    # An offset behind the slot belongs to a row that only pads the batch, and is cut off.
    expected = embedding[tokens[:, 4]] + positions[torch.tensor([4, 2, 0], device=DEVICE)]
    assert torch.equal(out, expected)
    assert torch.equal(gained, expected * gain)
    assert_close(stats[..., 0], torch.stack((expected.sum(1), expected.square().sum(1))).double(), 1e-5)


def choose(tokens, logits, length, *, ends=(), unfinished=None, table=None, **rules):
    """Run `choose_next` on copies; returns its state."""
    rows, vocab = logits.shape
    given = {"eos_count": len(ends), "pad": 0, "prompt_length": 1, "timestamp_begin": vocab, "no_timestamps": -1}
    values = [{**given, **rules}.get(field, 0) for field in decode_tokens.Rules._fields]
    padded = torch.zeros(16, dtype=torch.int64)
    padded[: len(ends)] = torch.tensor(ends, dtype=torch.int64)
    state = {
        "tokens": tokens.clone(),
        "logprobs": torch.zeros(tokens.shape, device=DEVICE),
        "unfinished": torch.ones(rows, dtype=torch.uint8, device=DEVICE) if unfinished is None else unfinished,
        "length": torch.tensor([length], device=DEVICE),
        "steps": torch.zeros(1, dtype=torch.int64, device=DEVICE),
        "finished": torch.zeros(1, dtype=torch.uint8, device=DEVICE),
        "seen": torch.zeros(1, dtype=torch.int64, device=DEVICE),
    }
    blocks = decode_tokens.blocks_of(vocab)
    decode_tokens.choose_next(
        *state.values(),
        poisoned(4, rows, blocks),
        torch.full((2, rows, blocks), -1, dtype=torch.int32, device=DEVICE),
        logits,
        torch.zeros(vocab, dtype=torch.uint8, device=DEVICE) if table is None else table,
        torch.tensor(values, device=DEVICE),
        padded.to(DEVICE),
    )
    return state


def test_choice_takes_the_first_of_the_best():
    vocab = 4100  # two blocks
    logits = torch.zeros(3, vocab, device=DEVICE)
    logits[0, [7, 4099]] = 2.0
    logits[1, 4098] = 1.0
    tokens = torch.zeros(3, 6, dtype=torch.int64, device=DEVICE)
    state = choose(tokens, logits, 3, ends=(4098,))
    assert state["tokens"][:, 3].tolist() == [7, 4098, 0]
    assert state["unfinished"].tolist() == [1, 0, 1]
    assert (int(state["length"]), int(state["steps"]), int(state["finished"])) == (4, 1, 0)
    assert_close(state["logprobs"][:, 2], logits.double().log_softmax(-1).amax(-1), 1e-5)
    done = choose(tokens, logits, 3, ends=(4098,), unfinished=torch.zeros(3, dtype=torch.uint8, device=DEVICE))
    assert done["tokens"][:, 3].tolist() == [0, 0, 0] and int(done["finished"]) == 1
    # Three tokens behind the prompt of one; the sign says that all rows have finished.
    assert (int(state["seen"]), int(done["seen"])) == (3, -3)


def test_suppressed_tokens_are_never_chosen():
    table = torch.tensor([0, 1, 2, 0], dtype=torch.uint8, device=DEVICE)
    logits = torch.tensor([[0.0, 9.0, 5.0, 1.0]], device=DEVICE)
    tokens = torch.zeros(1, 9, dtype=torch.int64, device=DEVICE)
    assert choose(tokens, logits, 4, table=table, min_length=5)["tokens"][0, 4] == 3
    assert choose(tokens, logits, 5, table=table, min_length=5)["tokens"][0, 5] == 2


@pytest.mark.parametrize("seed", range(4))
def test_timestamp_rules_are_those_of_the_tensor_code(seed):
    """Random histories, against the reproduction of transformers' own processor."""
    from transformers import GenerationConfig
    from transformers.generation.logits_process import LogitsProcessorList, WhisperTimeStampLogitsProcessor

    from whisper_static_cache.logits_process import build_plan

    vocab, begin, prompt, rows = 60, 40, 2, 4
    config = GenerationConfig(no_timestamps_token_id=begin - 1, eos_token_id=30, bos_token_id=30)
    config.max_initial_timestamp_index = 5
    processor = WhisperTimeStampLogitsProcessor(config, begin_index=prompt)
    plan = build_plan(LogitsProcessorList([processor]), prompt, vocab, DEVICE)
    forbidden, early, min_length, stamps = plan.greedy_rules()
    assert (forbidden, early, min_length) == ((), (), 0)
    torch.manual_seed(seed)
    for length in (3, 4, 9):
        tokens = torch.randint(0, vocab, (rows, 12), device=DEVICE)
        tokens[0, prompt:length] = torch.arange(length - prompt, device=DEVICE) + begin
        tokens[1, length - 1], tokens[1, length - 2] = begin + 3, 5
        logits = torch.randn(rows, vocab, device=DEVICE) * 3
        scores = plan.rest(tokens, torch.tensor(length, device=DEVICE), logits.clone())
        state = choose(
            tokens,
            logits,
            length,
            timestamp_begin=stamps.timestamp_begin,
            begin_index=prompt,
            no_timestamps=stamps.no_timestamps,
            text_end=stamps.eos,
            detect=int(stamps.detect),
        )
        assert torch.equal(state["tokens"][:, length], scores.argmax(-1))
        assert_close(state["logprobs"][:, length - 1], scores.double().log_softmax(-1).amax(-1), 1e-4)


@pytest.mark.parametrize("op", ["decode_linear", "decode_attention", "embed_newest", "choose_next"])
def test_opcheck(op):
    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=DEVICE)

    def integers(*shape):
        return zeros(*shape, dtype=torch.int64)

    def bytes_(*shape):
        return zeros(*shape, dtype=torch.uint8)

    length = torch.ones(1, dtype=torch.int64, device=DEVICE)
    if op == "decode_linear":
        weight, _ = random_weight(16, 0, 64, 64, torch.float32)
        product = (zeros(1, 64), torch.randn(1, 64, device=DEVICE), *decode_linear.arguments([weight]))
        arguments = (*product, zeros(64), decode_linear.STORE, 1.0, None, None, 0.0, None, 0, *[None] * 6)
    elif op == "decode_attention":
        states = torch.randn(2, 1, 2, 70, 64, device=DEVICE)
        valid = torch.ones(1, 70, dtype=torch.bool, device=DEVICE)
        arguments = (zeros(1, 2, 128), zeros(1, 2, 2), zeros(1, 128), *states, 64, length, valid)
    elif op == "embed_newest":
        outputs = (zeros(1, 64), zeros(1, 64), zeros(2, 1, 1))
        arguments = (*outputs, integers(1, 9), length, integers(1, 1), zeros(5, 64), zeros(9, 64), zeros(64))
    else:
        loop = (integers(1, 9), zeros(1, 9), bytes_(1), length, integers(1), bytes_(1), integers(1))
        work = (zeros(4, 1, 1), zeros(2, 1, 1, dtype=torch.int32))
        rules = torch.tensor(decode_tokens.Rules(0, 0, 0, 1, 1, 50, -1, 50, 0), device=DEVICE)
        arguments = (*loop, *work, torch.randn(1, 64, device=DEVICE), bytes_(50), rules, integers(16))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.whisper_static_cache, op).default, arguments, test_utils=checks)


@pytest.mark.parametrize("rows", [2, 9, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("positions", "split"), [(1, 64), (64, 64), (150, 64), (130, 128)])
def test_cross_attention_in_8_bits(positions, split, dtype, rows):
    from whisper_static_cache.int8_states import quantize

    torch.manual_seed(positions)
    heads = 2
    # More than 8 rows stream it as one run.
    splits = 1 if rows > 8 else -(-positions // split)
    keys, values = (torch.empty(rows, heads, positions, 64, dtype=torch.int8, device=DEVICE) for _ in range(2))
    scales = [poisoned(rows, heads, positions, dtype=dtype) for _ in range(2)]
    for integers, scale in zip((keys, values), scales):
        quantize(torch.randn(rows, heads, positions, 64, device=DEVICE).to(dtype), integers, scale)
    # Every integer there is, the one that quantising never leaves included.
    keys.flatten()[: 2 * 64] = torch.arange(128, device=DEVICE).to(torch.int8)
    values.flatten()[:64] = torch.arange(-128, -64, device=DEVICE).to(torch.int8)
    query = (torch.randn(rows, heads * 64, device=DEVICE) * 0.3).to(dtype)
    runs, lse = poisoned(rows, splits, heads * 64), poisoned(rows, splits, heads)
    decode_attention.decode_attention(runs, lse, query, keys, values, split, None, None, *scales)
    actual = (runs * lse.softmax(1).repeat_interleave(64, dim=-1)).sum(1)
    exact = [tensor.double() for tensor in (query, keys, values, *scales)]
    expected = decode_attention.reference_decode_attention(*exact[:3], key_scales=exact[3], value_scales=exact[4])
    # Integers and scales are exact in float32, u its rounding. A score is 64 products, their sum and a scale: off by
    # 66 u of the sum of magnitudes. A weight is off by twice the worst score's, relatively, and by the exponential,
    # and the mean by the weights and as many additions as there are positions, of its magnitudes.
    unit = 2.0**-24
    magnitudes = torch.einsum(
        "rhd,rhsd->rhs", exact[0].abs().view(rows, heads, 64), exact[1].abs() * exact[3][..., None]
    )
    bound = 2 * 66 * unit * magnitudes.max() + (positions + 64) * unit
    at_most = decode_attention.reference_decode_attention(
        *exact[:2], exact[2].abs(), key_scales=exact[3], value_scales=exact[4]
    )
    assert ((actual.double() - expected).abs() <= bound * at_most).all()
    assert bound < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(launch.interpreted(), reason="the interpreter compiles nothing")
def test_kernels_compiled_together_do_not_run_there_but_in_another_thread():
    weight, dense = random_weight(16, 0, 64, 64, torch.float32)
    x, here, elsewhere = torch.randn(1, 64, device=DEVICE), poisoned(1, 64), poisoned(1, 64)

    def multiply(out):
        arguments = decode_linear.arguments([weight])
        decode_linear.decode_linear(out, x, *arguments, torch.zeros(64, device=DEVICE), decode_linear.STORE)

    with launch.compiled_together():
        multiply(here)
        thread = threading.Thread(target=multiply, args=(elsewhere,))
        thread.start()
        thread.join()
    assert here.isnan().all()
    assert_close(elsewhere, x.double() @ dense.T, 1e-5)
    multiply(here)
    assert torch.equal(here, elsewhere)
