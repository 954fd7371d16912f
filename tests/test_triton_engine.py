"""The Triton engine as a whole: stock's tokens, what it leaves to others, and that it keeps nothing of the model's.

On a GPU the parity table runs on it too (`parity/test_cuda.py`). Here it runs in Triton's interpreter, where there is
no GPU, on a model of one layer.
"""

import shutil

import pytest
import torch


pytest.importorskip("triton", reason="needs the triton package")

import whisper_static_cache
from whisper_static_cache import triton_engine
from whisper_static_cache.cache_utils import EncoderDecoderStaticCache
from whisper_static_cache.modeling_whisper import decode_step, project_cross_attention
from whisper_static_cache.ops import launch
from whisper_static_cache.sessions import Session
from whisper_static_cache.triton_engine import CHAINED_STEPS, TritonEngine

from .conftest import tiny_features, tiny_model


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not launch.interpreted(), reason="needs TRITON_INTERPRET=1 where there is no GPU"
)


def served_model(seed=0, **overrides):
    shape = {"d_model": 64, "encoder_attention_heads": 1, "decoder_attention_heads": 1, "decoder_ffn_dim": 64}
    return tiny_model(seed, **{**shape, "decoder_layers": 1, **overrides}).to(DEVICE)


def both(model, features, **arguments):
    """Stock's tokens, ours, and the report."""
    expected = model.generate(features, **arguments)
    with whisper_static_cache.patched(model, engine="triton"):
        return expected, model.generate(features, **arguments), whisper_static_cache.last_run(model)


@pytest.mark.parametrize(
    ("batch", "arguments"),
    [
        (1, {}),
        (2, {"return_timestamps": True}),
        (3, {"prompt_ids": torch.tensor([108, 5, 9, 17, 33, 4, 8, 3], device=DEVICE)}),
        (1, {"do_sample": True, "temperature": 0.7}),
        (1, {"repetition_penalty": 1.5}),
        (1, {"return_dict_in_generate": True, "output_scores": True}),
        (12, {}),
        (20, {"return_timestamps": True}),
    ],
    ids=["greedy", "timestamps", "long-prompt", "sampling", "penalty", "scores", "tensor-cores", "two-operands"],
)
def test_stocks_tokens(batch, arguments):
    model = served_model()
    features = tiny_features(batch, config=model.config).to(DEVICE)
    torch.manual_seed(0)
    expected = model.generate(features, language="en", max_new_tokens=4, **arguments)
    torch.manual_seed(0)
    with whisper_static_cache.patched(model, engine="triton"):
        actual = model.generate(features, language="en", max_new_tokens=4, **arguments)
        report = whisper_static_cache.last_run(model)
    assert (report.engine, report.reason) == ("triton", None)
    if not isinstance(expected, torch.Tensor):
        for ours, stock in zip(actual["scores"], expected["scores"], strict=True):
            torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
        expected, actual = expected["sequences"], actual["sequences"]
    assert torch.equal(actual, expected)


class Steps:
    """The engine with the kernels of the choice and, in place of the others, PyTorch: the interpreter takes seconds.

    Keeps how many steps each launch had.
    """

    def __init__(self, monkeypatch):
        self.launches = []
        steps = TritonEngine.choosing_steps

        def enter(engine, rows, buffers):
            project_cross_attention(engine.decoder, buffers.states[: rows.count], rows.buffers)

        def logits(engine, rows, buffers, finished):
            session = rows.session
            found = decode_step(
                engine.decoder,
                engine.proj_out,
                rows.tokens,
                session.length,
                rows.position_offset,
                rows.valid,
                rows.buffers,
            )
            buffers.logits[: rows.count, : found.shape[1]] = found
            return buffers.logits[: rows.count]

        def counted(engine, rows):
            def one(function, count):
                return lambda: self.launches.append(count) or function()

            return tuple(one(*pair) for pair in zip(steps(engine, rows), (1, engine.chained(rows))))

        monkeypatch.setattr(TritonEngine, "_enter", enter)
        monkeypatch.setattr(TritonEngine, "_logits", logits)
        monkeypatch.setattr(TritonEngine, "choosing_steps", counted)


@pytest.fixture
def steps(monkeypatch):
    if DEVICE != "cpu":
        pytest.skip("stands in for kernels that a GPU runs and captures itself")
    return Steps(monkeypatch)


@pytest.mark.parametrize(
    "tokens", [1, 2, CHAINED_STEPS, CHAINED_STEPS + 1, CHAINED_STEPS + 2, 2 * CHAINED_STEPS + 2, None]
)
def test_launches_of_several_steps_stop_at_the_length(steps, tokens):
    model = served_model(0, max_target_positions=26)
    model.generation_config.max_length = 26
    # Never an end, so that the length is one.
    model.generation_config.suppress_tokens.append(model.generation_config.eos_token_id)
    features = tiny_features(2, config=model.config)
    expected, actual, report = both(model, features, language="en", max_new_tokens=tokens)
    assert torch.equal(actual, expected)
    # The first token is chosen before there is any launch.
    assert report.steps == 1 + sum(steps.launches) == (tokens or report.steps)
    chained, single = divmod(report.steps - 1, CHAINED_STEPS)
    assert steps.launches == [CHAINED_STEPS] * chained + [1] * single


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("arguments", [{}, {"return_timestamps": True}], ids=["text", "timestamps"])
def test_several_steps_a_launch_give_the_tokens_of_one(steps, monkeypatch, seed, arguments):
    model = served_model(seed)
    features = tiny_features(2, config=model.config)
    arguments = {"language": "en", "return_segments": True, **arguments}
    expected, several, report = both(model, features, **arguments)
    assert CHAINED_STEPS in steps.launches
    monkeypatch.setattr(TritonEngine, "chained", lambda engine, rows: 1000)
    _, single, alone = both(model, features, **arguments)
    assert torch.equal(several["sequences"], expected["sequences"])
    assert torch.equal(single["sequences"], expected["sequences"])
    assert (report.steps, report.windows) == (alone.steps, alone.windows)


def test_rules_that_changed_are_followed(steps):
    model = served_model(2)
    features = tiny_features(1, config=model.config)
    for banned in ([], [46, 172], [46, 172], [], [150]):
        arguments = {"language": "en", "suppress_tokens": [1, 2, 7, *banned], "min_new_tokens": 3 + len(banned)}
        expected = model.generate(features, **arguments)
        with whisper_static_cache.patched(engine="triton"):
            for _ in range(2):
                assert torch.equal(model.generate(features, **arguments), expected)


def test_the_logits_for_no_speech_are_those_of_their_position(steps, monkeypatch):
    """In float32 too, where the logits of a step are a buffer that the next step writes."""
    from whisper_static_cache import logits_processors

    model, seen = served_model(0), []
    first = logits_processors.WhisperNoSpeechDetection.first

    def spy(self, tokens, length, scores, sot_logits):
        seen.append(sot_logits.clone())
        return first(self, tokens, length, scores, sot_logits)

    monkeypatch.setattr(logits_processors.WhisperNoSpeechDetection, "first", spy)
    features = tiny_features(1, config=model.config)
    arguments = {
        "return_timestamps": True,
        "no_speech_threshold": 0.6,
        "logprob_threshold": -1.0,
        "temperature": (0.0,),
    }
    for engine in ("eager", "triton"):
        with whisper_static_cache.patched(model, engine=engine):
            model.generate(features, language="en", max_new_tokens=3, **arguments)
    count = len(seen) // 2
    assert count
    for reference, ours in zip(seen[:count], seen[count:], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_an_interrupted_run_does_not_end_the_next(steps, monkeypatch):
    model = served_model(0)
    features = tiny_features(1, config=model.config)
    expected = model.generate(features, language="en")
    with whisper_static_cache.patched(model, engine="triton"):
        with monkeypatch.context() as patch:

            def interrupted(counter, queued, ahead):
                counter.tensor.fill_(-7)
                raise KeyboardInterrupt

            patch.setattr(triton_engine.StepCounter, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                model.generate(features, language="en")
        assert torch.equal(model.generate(features, language="en"), expected)


@pytest.mark.parametrize(("bits", "group_size", "batch"), [(4, 64, 1), (2, 16, 1), (3, 32, 12)])
def test_low_bit_weights(bits, group_size, batch):
    model = served_model(1)
    whisper_static_cache.quantize_decoder(
        model, bits, group_size, method="rtn", backend="torch", head_bits=8, progress=False
    )
    features = tiny_features(batch, config=model.config).to(DEVICE)
    expected, actual, report = both(model, features, language="en", max_new_tokens=5)
    assert report.engine == "triton"
    assert torch.equal(actual, expected)


def test_weights_changed_in_place_are_followed():
    model = served_model(2)
    features = tiny_features(1, config=model.config).to(DEVICE)
    with whisper_static_cache.patched(model, engine="triton"):
        model.generate(features, language="en", max_new_tokens=4)
        with torch.no_grad():
            for name, parameter in model.model.decoder.named_parameters():
                if "layer_norm" in name or "fc1" in name:
                    parameter.mul_(-1.5)
        actual = model.generate(features, language="en", max_new_tokens=4)
    assert torch.equal(actual, model.generate(features, language="en", max_new_tokens=4))


def test_parameters_stay_the_models_own():
    model = served_model(3)
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.state_dict().items()}
    both(model, tiny_features(1, config=model.config).to(DEVICE), language="en", max_new_tokens=3)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, (address, value) in before.items():
        assert after[name].data_ptr() == address and torch.equal(after[name], value)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"decoder_attention_heads": 2}, "heads of 32 dimensions"),
        ({"activation_function": "relu"}, "activation relu"),
        ({"decoder_ffn_dim": 80}, "decoder_ffn_dim 80"),
    ],
)
def test_shapes_that_are_not_served_have_a_reason(overrides, part):
    assert TritonEngine.why_not(served_model(), torch.device(DEVICE)) is None
    assert part in TritonEngine.why_not(served_model(**overrides), torch.device(DEVICE))


def test_what_was_put_in_place_of_the_activation_is_not_passed_over():
    model, device = served_model(), torch.device(DEVICE)
    model.model.decoder.layers[0].activation_fn = torch.nn.GELU()
    assert TritonEngine.why_not(model, device) is None
    model.model.decoder.layers[0].activation_fn.register_forward_hook(lambda *_: None)
    assert "hook" in TritonEngine.why_not(model, device)
    model.model.decoder.layers[0].activation_fn = torch.nn.GELU(approximate="tanh")
    assert "the activation GELU" in TritonEngine.why_not(model, device)


def test_layers_scaled_apart_are_not_served():
    model = served_model()
    model.model.decoder.layers[-1].self_attn.scaling *= 2
    assert "scaled" in TritonEngine.why_not(model, torch.device(DEVICE))


@pytest.fixture
def eager_is_next(monkeypatch):
    """In place of "compile", whose compilation would be most of a test's time."""
    assert TritonEngine.fallback == "compile"
    monkeypatch.setattr(TritonEngine, "fallback", "eager")


@pytest.mark.parametrize(
    ("batch", "rows"), [(1, 1), (3, 4), (8, 8), (9, 12), (12, 12), (13, 16), (17, 24), (25, 32), (32, 32)]
)
def test_few_rows_pad_a_batch(batch, rows):
    assert TritonEngine(served_model()).rows_for(batch) == rows


@pytest.mark.usefixtures("eager_is_next")
def test_large_batches_go_to_the_next_engine(monkeypatch):
    assert TritonEngine.max_batch_size == 32
    # So large that the interpreter need not run a window of as many rows.
    monkeypatch.setattr(TritonEngine, "max_batch_size", 2)
    model = served_model()
    features = tiny_features(3, config=model.config).to(DEVICE)
    expected, actual, report = both(model, features, language="en", max_new_tokens=3)
    assert torch.equal(actual, expected)
    # A window of one row, if there is one, is this engine's again.
    assert "a batch of 3; the triton engine takes up to 2" in report.reason


@pytest.mark.usefixtures("eager_is_next")
def test_a_kernel_that_does_not_build_costs_no_call(monkeypatch):
    def broken(self, rows):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(TritonEngine, "prepare", broken)
    model = served_model()
    features = tiny_features(1, config=model.config).to(DEVICE)
    for _ in range(2):
        expected, actual, report = both(model, features, language="en", max_new_tokens=3)
        assert torch.equal(actual, expected)
        assert report.engine == "eager" and "no such instruction" in report.reason


@pytest.mark.parametrize(
    "prompt_ids", [None, torch.tensor([108, 5, 9, 17, 33, 4, 8, 3], device=DEVICE)], ids=["short", "long"]
)
def test_cross_attention_in_8_bits_is_the_eager_engines(prompt_ids):
    model = served_model(4)
    features = tiny_features(2, config=model.config).to(DEVICE)
    arguments = {"language": "en", "max_new_tokens": 4, "prompt_ids": prompt_ids}
    found = {}
    for engine in ("eager", "triton"):
        with whisper_static_cache.patched(model, engine=engine, cross_dtype=torch.int8):
            found[engine] = model.generate(features, return_dict_in_generate=True, output_scores=True, **arguments)
            report = whisper_static_cache.last_run(model)
        assert (report.engine, report.cross_dtype) == (engine, torch.int8)
    assert torch.equal(found["triton"]["sequences"], found["eager"]["sequences"])
    for ours, reference in zip(found["triton"]["scores"], found["eager"]["scores"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE != "cpu", reason="stands in for the GPU's compiler")
@pytest.mark.parametrize("count", [1, 2])
def test_a_kernel_that_does_not_compile_goes_without_the_head_and_then_kernel_by_kernel(monkeypatch, caplog, count):
    from whisper_static_cache.ops import decode_layers as ops

    heads = {"d_model": 128, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 512}
    model = served_model(decoder_layers=2, **heads).half()
    whisper_static_cache.quantize_decoder(model, 4, 64, method="rtn", backend="torch", progress=False)
    engine = TritonEngine(model)
    session = Session(EncoderDecoderStaticCache(model.config, 2, dtype=torch.float16, device="cpu"))
    rows, buffers = session.rows(count), engine._buffers(session)
    built = []

    def shape_for(config, layer, weight, device, head, may_choose):
        size = 128, 512, 2, session.slots, session.source_length, False, 4, 64, 12, 120_000
        joined = {} if head is None else {"vocab": head.out_features, "chooses": may_choose}
        return ops.Shape(*size, len(layer[0]), **joined)

    def kernel_for(shape, device):
        built.append((shape.batch, shape.vocab))
        if shape.vocab in broken:
            raise RuntimeError("no room")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: ops.CAPABILITY)
    monkeypatch.setattr(ops, "shape_for", shape_for)
    monkeypatch.setattr(ops, "kernel_for", kernel_for)
    vocab = model.config.vocab_size
    broken = []
    parts = engine._made_whole(rows, buffers)
    # Of two rows, tokens are chosen together.
    assert [(part.has_head, part.chooses) for part in parts] == [(True, count == 1)] * count
    broken = [vocab]
    (part,) = engine._made_whole(rows, buffers)
    # Without its head a row is not by itself.
    assert not part.has_head and "cannot have the head (no room)" in caplog.text
    broken = [vocab, 0]
    assert engine._made_whole(rows, buffers) is None and "kernel by kernel" in caplog.text
    assert built == [(1, vocab), (1, vocab), (count, 0), (count, 0)]
    assert engine._whole_failed


@pytest.mark.skipif(DEVICE != "cpu" or shutil.which("g++") is None, reason="emulates CUDA threads, with g++")
@pytest.mark.parametrize(
    ("bits", "head", "head_bits"),
    [(16, "apart", 16), (4, "apart", 16), (16, "joined", 16), (4, "joined", 16), (4, "joined", 4), (16, "joined", 8)],
)
def test_all_layers_in_one_kernel_are_those_kernel_by_kernel(bits, head, head_bits):
    # What the persistent kernel is told of a model's modules; a GPU runs it, emulated threads do here.
    from whisper_static_cache.ops import decode_layers as ops

    from .ops.test_decode_layers import launch_as_emulated

    heads = {"d_model": 128, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 512}
    model = served_model(decoder_layers=2, **heads).half()
    plan = {"method": "rtn", "backend": "torch", "progress": False}
    if bits < 16:
        plan["head_bits"] = head_bits if head_bits < 16 else None
        whisper_static_cache.quantize_decoder(model, bits, 64, **plan)
    elif head_bits < 16:
        # The head alone.
        whisper_static_cache.quantize_decoder(model, None, 64, modules={"*": None}, head_bits=head_bits, **plan)
    engine = TritonEngine(model)
    with torch.no_grad():
        session = Session(EncoderDecoderStaticCache(model.config, 2, dtype=torch.float16, device="cpu"))
        # Two rows, one by one.
        rows, buffers = session.rows(2), engine._buffers(session)
        buffers.states.normal_(generator=torch.Generator().manual_seed(0))
        engine._enter(rows, buffers)
        group_size = 64 if bits < 16 else 0
        shape = ops.Shape(128, 512, 2, session.slots, session.source_length, False, bits, group_size, 12, 120_000)
        if head == "joined":
            assert engine._head_joins(rows.one_by_one()[1], torch.float16)
            packed = {"head_bits": head_bits, "head_group_size": 64} if head_bits < 16 else {}
            shape = shape._replace(vocab=model.config.vocab_size, **packed)
        assert ops.why_not(shape) is None
        all_stats = buffers.stats_for(shape.givers, 2)
        parts = [engine._whole_arguments(row, buffers, shape, all_stats[:, row.span]) for row in rows.one_by_one()]
        rows.tokens[:, :2] = torch.tensor([[5, 17], [9, 3]])
        for fed in (1, 2):
            session.length.fill_(fed)
            for part in parts:
                launch_as_emulated(shape, *part.layers, buffers.going_on, *part.head, *part.choice, 0)
            gained, logits = buffers.gained[:2].clone(), buffers.logits[:2].clone()
            stats = torch.cat([part.layers[1] for part in parts], 1).sum(-1)
            expected = engine._logits(rows, buffers, buffers.going_on)
            if head == "joined":
                torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
                continue
            torch.testing.assert_close(gained, buffers.gained[:2], rtol=1e-2, atol=1e-2 * gained.abs().max().item())
            stream = buffers.stream[:2]
            torch.testing.assert_close(stats[0], stream.sum(-1), rtol=1e-2, atol=1e-2 * stream.norm().item())
            torch.testing.assert_close(stats[1], stream.square().sum(-1), rtol=1e-2, atol=0)


@pytest.mark.skipif(DEVICE != "cpu" or shutil.which("g++") is None, reason="emulates CUDA threads, with g++")
@pytest.mark.parametrize("stamped", [False, True])
def test_several_steps_in_one_launch_are_those_kernel_by_kernel(monkeypatch, stamped):
    from whisper_static_cache.ops import decode_layers as ops

    from .ops.test_decode_layers import launch_as_emulated

    heads = {"d_model": 128, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 512}
    model = served_model(decoder_layers=2, **heads).half()
    whisper_static_cache.quantize_decoder(model, 4, 64, method="rtn", backend="torch", progress=False)
    engine, vocab = TritonEngine(model), model.config.vocab_size
    session = Session(EncoderDecoderStaticCache(model.config, 1, dtype=torch.float16, device="cpu"))
    rows, buffers = session.rows(1), engine._buffers(session)
    size = 128, 512, 2, session.slots, session.source_length, False, 4, 64, 12, 120_000
    shape = ops.Shape(*size, vocab=vocab, chooses=True)
    launches = []

    def emulated(*arguments):
        launches.append(arguments[-1])
        launch_as_emulated(shape, *arguments)

    rules = {"min_length": 0, "eos_count": 1, "prompt_length": 2, "timestamp_begin": vocab, "begin_index": 0}
    rules |= {"no_timestamps": -1, "text_end": 0, "detect": 0}
    if stamped:
        rules |= {"timestamp_begin": vocab // 2, "begin_index": 1, "text_end": 9, "detect": 1}
    monkeypatch.setattr(ops, "decode_layers", emulated)
    found = []
    with torch.no_grad():
        buffers.states.normal_(generator=torch.Generator().manual_seed(0))
        engine._enter(rows, buffers)
        parts = [engine._whole_arguments(rows, buffers, shape, buffers.stats_for(shape.givers, 1))]
        for whole in (parts, None):
            monkeypatch.setattr(engine, "_whole", lambda rows, buffers, whole=whole: whole)
            engine.set_rules(rows, rules, (3, 4), (5,), torch.tensor([vocab - 1]), torch.tensor(0))
            buffers.unfinished.fill_(1)
            rows.tokens.zero_()
            rows.tokens[:, :2] = torch.tensor([[5, 17]])
            for fed in (1, 2):
                session.length.fill_(fed)
                engine._logits(rows, buffers, buffers.going_on)
            engine._choose(rows, buffers, 5)
            counts = int(session.length), int(buffers.steps), int(buffers.counter.tensor), int(buffers.finished)
            found.append((rows.tokens.clone(), rows.token_logprobs[:, 1:5].clone(), counts))
    assert launches == [0, 0, 5]
    (tokens, logprobs, counts), (wanted, wanted_logprobs, wanted_counts) = found
    assert counts == wanted_counts == (7, 5, 5, 0)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logprobs, wanted_logprobs, rtol=0, atol=3e-2)


@pytest.mark.parametrize(
    ("count", "inputs", "firsts", "half"),
    [(24, 24, (0, 12), 12), (17, 17, (0, 8), 9), (20, 4, (0, 10), 10), (15, 3, (0, 5), 10)],
)
def test_halves_have_all_rows(count, inputs, firsts, half):
    config = served_model().config
    cache = EncoderDecoderStaticCache(config, count, max_inputs=inputs, dtype=torch.float16, device="cpu")
    rows = Session(cache).rows(count, count // inputs)
    halves = rows.halves()
    assert [(part.span.start, part.count) for part in halves] == [(first, half) for first in firsts]
    for part in halves:
        for whole, buffers in zip(rows.buffers, part.buffers):
            inputs_of_part = slice(part.span.start * inputs // count, part.span.stop * inputs // count)
            assert (
                torch.equal(buffers[0], whole[0][part.span])
                and buffers[0].data_ptr() == whole[0][part.span].data_ptr()
            )
            assert buffers[2].data_ptr() == whole[2][inputs_of_part].data_ptr()
            assert len(buffers[2]) * (count // inputs) == half


@pytest.mark.skipif(DEVICE != "cpu" or shutil.which("g++") is None, reason="emulates CUDA threads, with g++")
@pytest.mark.parametrize("count", [17, 18])
def test_more_rows_than_a_launch_takes_go_in_two(monkeypatch, count):
    from whisper_static_cache.ops import decode_layers as ops

    from .ops.test_decode_layers import launch_as_emulated

    heads = {"d_model": 128, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 512}
    model = served_model(decoder_layers=2, **heads).half()
    engine = TritonEngine(model)
    session = Session(EncoderDecoderStaticCache(model.config, count, dtype=torch.float16, device="cpu"))
    rows, buffers = session.rows(count), engine._buffers(session)
    size = 128, 512, 2, session.slots, session.source_length, False, 16, 0, 12, 200_000
    shapes = []

    def shape_for(config, layer, weight, device, head, may_choose):
        assert head is None
        return ops.Shape(*size, len(layer[0]))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: ops.CAPABILITY)
    monkeypatch.setattr(ops, "shape_for", shape_for)
    monkeypatch.setattr(ops, "kernel_for", lambda shape, device: shapes.append(shape))
    monkeypatch.setattr(ops, "decode_layers", lambda *arguments: launch_as_emulated(shapes[0], *arguments))
    found = []
    with torch.no_grad():
        buffers.states.normal_(generator=torch.Generator().manual_seed(0))
        engine._enter(rows, buffers)
        parts = engine._made_whole(rows, buffers)
        assert len(parts) == 2 and [shape.batch for shape in shapes] == [9]
        for whole in (parts, None):
            monkeypatch.setattr(engine, "_whole", lambda rows, buffers, whole=whole: whole)
            rows.tokens[:, :2] = torch.randint(100, (count, 2), generator=torch.Generator().manual_seed(1))
            for fed in (1, 2):
                session.length.fill_(fed)
                logits = engine._logits(rows, buffers, buffers.going_on).clone()
            found.append((logits, [layer[0][:, :, :2].clone() for layer in rows.buffers]))
    (logits, caches), (expected, expected_caches) = found
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
    for mine, theirs in zip(caches, expected_caches):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2 * theirs.abs().max().item())
