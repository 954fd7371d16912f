"""The decode loop under the conditions that programs put it in: changing batches, threads, failures, moved models."""

import copy
import gc
import logging
import threading

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, EncoderDecoderCache, LogitsProcessor, LogitsProcessorList

import whisper_static_cache
from whisper_static_cache import EncoderDecoderStaticCache, _compat, engines, modeling_whisper, sessions
from whisper_static_cache._compat import CACHE_NAME
from whisper_static_cache.engines import CompileEngine, EagerEngine

from .conftest import tiny_features, tiny_model


ENGINES = ("eager", "compile")


@pytest.fixture(autouse=True)
def unpatched():
    yield
    whisper_static_cache.unpatch()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def features(batch_size=1, seed=0, windows=1.0):
    return tiny_features(batch_size, windows, seed)


def stock(model, *args, **kwargs):
    torch.manual_seed(0)
    return model.generate(*args, **kwargs)


def poison(model):
    """Fill every buffer that is kept for the model with NaN."""
    for session in sessions.state_of(model).sessions:
        for layer in session.buffers:
            for buffer in layer:
                buffer.fill_(float("nan"))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_recording_leaves_no_trace_in_the_next(model, engine):
    first, second = features(2, seed=1), features(2, seed=2)
    expected = stock(model, first), stock(model, second)
    with whisper_static_cache.patched(model, engine=engine):
        for index in (0, 1, 0):
            assert torch.equal(model.generate((first, second)[index]), expected[index])
            poison(model)
            assert torch.equal(model.generate((first, second)[index]), expected[index])


@pytest.mark.parametrize("engine", ENGINES)
def test_the_batch_may_grow_and_shrink(model, engine):
    # huggingface/transformers#42454: a static cache crashed when the batch size changed between calls.
    sizes = (3, 1, 5, 2, 4, 1)
    expected = [stock(model, features(size, seed=size)) for size in sizes]
    with whisper_static_cache.patched(model, engine=engine):
        for size, tokens in zip(sizes, expected):
            assert torch.equal(model.generate(features(size, seed=size)), tokens)
        assert len(sessions.state_of(model).sessions) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cache_of_the_users_serves_every_smaller_batch(model, engine):
    cache = EncoderDecoderStaticCache(model.config, 4)
    buffers = [buffer.data_ptr() for layer in cache.layer_buffers for buffer in layer]
    sizes = (4, 1, 3)
    expected = [stock(model, features(size, seed=size)) for size in sizes]
    with whisper_static_cache.patched(model, engine=engine):
        for size, tokens in zip(sizes, expected):
            assert torch.equal(model.generate(features(size, seed=size), **{CACHE_NAME: cache}), tokens)
            assert whisper_static_cache.last_run(model).engine == engine
            assert cache.get_seq_length() > 0
            if size == 1:
                cache.reset()
        assert not sessions.state_of(model).sessions
    assert buffers == [buffer.data_ptr() for layer in cache.layer_buffers for buffer in layer]


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", _compat._CACHE_NAMES)
def test_a_cache_of_the_users_goes_by_every_name_that_the_release_takes(model, name):
    cache = EncoderDecoderStaticCache(model.config, 1)
    with whisper_static_cache.patched(model):
        tokens = model.generate(features(), **{name: cache})
        assert whisper_static_cache.last_run(model).engine == "eager"
    assert cache.get_seq_length() > 0
    assert torch.equal(tokens, stock(model, features()))


def test_a_cache_of_the_users_for_a_long_recording(model):
    cache = EncoderDecoderStaticCache(model.config, 1)
    recording = features(windows=3.3)
    expected = stock(model, recording, return_timestamps=True)
    with whisper_static_cache.patched(model):
        for _ in range(2):
            tokens = model.generate(recording, return_timestamps=True, **{CACHE_NAME: cache})
            assert torch.equal(tokens, expected)


@pytest.mark.parametrize(
    ("cache_arguments", "call", "message"),
    [
        ({"max_batch_size": 2}, {"batch_size": 3}, "=2 .* 3 rows"),
        ({"max_batch_size": 2}, {"batch_size": 2, "num_return_sequences": 2, "do_sample": True}, "=2 .* 4 rows"),
        ({"max_cache_len": 10}, {"max_new_tokens": 20}, "10"),
        ({"dtype": torch.float64}, {}, "float64"),
    ],
)
def test_what_a_users_cache_cannot_hold_fails_before_anything_is_computed(
    model, monkeypatch, cache_arguments, call, message
):
    cache = EncoderDecoderStaticCache(model.config, **{"max_batch_size": 1, **cache_arguments})

    def never(*args, **kwargs):
        raise AssertionError("the encoder ran")

    monkeypatch.setattr(model.model.encoder, "forward", never)
    call = dict(call)
    with whisper_static_cache.patched(model), pytest.raises(ValueError, match=message):
        model.generate(features(call.pop("batch_size", 1)), **{CACHE_NAME: cache}, **call)


def test_a_cache_of_another_model_is_refused(model):
    cache = EncoderDecoderStaticCache(tiny_model(decoder_layers=1).config, 1)
    with whisper_static_cache.patched(model), pytest.raises(ValueError, match=r"layers"):
        model.generate(features(), **{CACHE_NAME: cache})


def test_nothing_compiles_after_warmup():
    model = tiny_model(5)
    whisper_static_cache.patch(model, engine="compile")
    warm = whisper_static_cache.warmup(model, batch_sizes=(1, 5))
    assert warm.compiles == 2
    counters.clear()
    workload = [
        {"inputs": features(1)},
        {"inputs": features(5, seed=1)},
        {"inputs": features(2, seed=2)},
        {"inputs": features(3), "max_new_tokens": 7},
        {"inputs": features(1), "prompt_ids": torch.tensor([108, 5, 6, 7, 8])},
        {"inputs": features(4), "prompt_ids": torch.tensor([108, 5])},
        {"inputs": features(1), "return_timestamps": True},
        {"inputs": features(2), "do_sample": True, "temperature": 0.3},
        {"inputs": features(2), "do_sample": True, "temperature": 1.4, "top_k": 3},
        {"inputs": features(1), "do_sample": True, "top_p": 0.7},
        {"inputs": features(2), "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"inputs": features(2, windows=3.4), "return_timestamps": True, "condition_on_prev_tokens": True},
        {
            "inputs": features(1, windows=2.2),
            "return_timestamps": True,
            "temperature": (0.0, 0.4, 0.8),
            "logprob_threshold": -0.1,
            "compression_ratio_threshold": 1.2,
            "no_speech_threshold": 0.2,
        },
    ]
    with torch.compiler.set_stance("fail_on_recompile"):
        for arguments in workload:
            arguments = dict(arguments)
            inputs = arguments.pop("inputs")
            if inputs.shape[0] > 1 and inputs.shape[-1] > 60:
                arguments["attention_mask"] = torch.ones(inputs.shape[0], inputs.shape[-1], dtype=torch.long)
            model.generate(inputs, **arguments)
            report = whisper_static_cache.last_run(model)
            assert (report.engine, report.reason, report.compiles) == ("compile", None, 0), arguments
    assert counters["stats"]["unique_graphs"] == 0


def test_a_warm_batch_serves_a_single_row_without_compiling():
    model = tiny_model(6)
    whisper_static_cache.patch(model, engine="compile")
    assert whisper_static_cache.warmup(model, batch_sizes=(3,)).compiles == 1
    expected = whisper_static_cache.last_run
    with whisper_static_cache.patched(model, engine="eager"):
        expected = model.generate(features(1, seed=4))
    assert torch.equal(model.generate(features(1, seed=4)), expected)
    assert whisper_static_cache.last_run(model).compiles == 0


def test_models_do_not_push_each_others_steps_out():
    # Dynamo gives a function up after eight recompiles; every model must count for itself.
    models = [tiny_model(seed, decoder_layers=1, encoder_layers=1) for seed in range(10)]
    whisper_static_cache.patch(engine="compile")
    for one in models:
        assert whisper_static_cache.warmup(one).compiles == 1
    for one in models:
        one.generate(features())
        assert whisper_static_cache.last_run(one).compiles == 0
        assert whisper_static_cache.last_run(one).engine == "compile"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("count", [1, 2])
def test_two_threads_get_what_they_get_alone(model, engine, count):
    models = [model, model] if count == 1 else [model, tiny_model(8)]
    inputs = [[features(2, seed=10 * which + step) for step in range(6)] for which in range(2)]
    expected = [[models[which].generate(one) for one in inputs[which]] for which in range(2)]
    found = [[], []]
    barrier = threading.Barrier(2)

    def work(which):
        barrier.wait()
        for one in inputs[which]:
            found[which].append(models[which].generate(one))

    with whisper_static_cache.patched(engine=engine):
        threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for which in range(2):
        assert len(found[which]) == len(expected[which])
        assert all(torch.equal(one, other) for one, other in zip(found[which], expected[which]))


def test_a_cache_in_use_is_not_shared(model):
    cache = EncoderDecoderStaticCache(model.config, 1)

    class Nested(LogitsProcessor):
        def __call__(self, input_ids, scores):
            with pytest.raises(ValueError, match="in use by another generate call"):
                model.generate(features(), **{CACHE_NAME: cache})
            return scores

    with whisper_static_cache.patched(model):
        model.generate(features(), **{CACHE_NAME: cache}, logits_processor=LogitsProcessorList([Nested()]))


def test_a_call_within_a_call(model):
    expected = stock(model, features(2, seed=3))

    class Nested(LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert torch.equal(model.generate(features(2, seed=3)), expected)
            return scores

    with whisper_static_cache.patched(model):
        tokens = model.generate(features(seed=1), logits_processor=LogitsProcessorList([Nested()]), max_new_tokens=4)
    assert torch.equal(tokens, stock(model, features(seed=1), max_new_tokens=4))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_cast_after_its_first_call(engine):
    model = tiny_model(2)
    whisper_static_cache.patch(model, engine=engine)
    model.generate(features(2))
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        model.to(dtype)
        tokens = model.generate(features(2).to(dtype))
        assert whisper_static_cache.last_run(model).engine == engine
        whisper_static_cache.unpatch(model)
        expected = model.generate(features(2).to(dtype))
        if dtype not in (torch.bfloat16, torch.float16):
            assert torch.equal(tokens, expected)
        assert tokens.dtype == expected.dtype
        whisper_static_cache.patch(model, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_new_weights_are_used(engine):
    model, other = tiny_model(2), tiny_model(3)
    expected = other.generate(features(2))
    whisper_static_cache.patch(model, engine=engine)
    model.generate(features(2))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.generate(features(2)), expected)


class Adapter(torch.nn.Module):
    """A linear layer and a correction, as much of it as an attribute says."""

    def __init__(self, base):
        super().__init__()
        self.base, self.more, self.scale = base, torch.nn.Linear(base.in_features, base.out_features), 0.0

    def forward(self, states):
        return self.base(states) + self.scale * self.more(states)


def adapted_model():
    model = tiny_model(2)
    torch.manual_seed(5)
    layer = model.model.decoder.layers[0]
    layer.fc1 = Adapter(layer.fc1).eval()
    return model, layer.fc1


def tokens_at_scales(model, adapter):
    found = []
    for scale in (0.0, 3.0, -3.0, 0.0, 3.0):
        adapter.scale = scale
        found.append(model.generate(features(2)).tolist())
    assert found[0] != found[1] != found[2] != found[0]
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_a_replaced_layer_is_used(engine):
    model = tiny_model(2)
    whisper_static_cache.patch(model, engine=engine)
    model.generate(features(2))
    model.model.decoder.layers[0].fc1 = copy.deepcopy(model.model.decoder.layers[1].fc1)
    tokens = model.generate(features(2))
    whisper_static_cache.unpatch(model)
    assert torch.equal(tokens, model.generate(features(2)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("part", ["proj_out", "model.decoder", "model"])
def test_a_replaced_head_or_decoder_is_used(engine, part):
    model, other = tiny_model(2), tiny_model(3)
    whisper_static_cache.patch(model, engine=engine)
    before = model.generate(features(2))
    model.set_submodule(part, other.get_submodule(part))
    tokens = model.generate(features(2))
    whisper_static_cache.unpatch(model)
    assert torch.equal(tokens, model.generate(features(2)))
    assert not torch.equal(tokens, before)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapters_switch_is_followed(engine):
    model, adapter = adapted_model()
    expected = tokens_at_scales(model, adapter)
    with whisper_static_cache.patched(model, engine=engine):
        assert tokens_at_scales(model, adapter) == expected


def test_a_graph_is_replayed_for_the_adapters_switch_it_was_captured_at(monkeypatch):
    """Without a GPU: a graph goes on with what it saw, here with the adapter's scale."""
    model, adapter = adapted_model()
    expected = tokens_at_scales(model, adapter)

    class Captured:
        def __init__(self, function, pool):
            self.function, self.scale = function, adapter.scale

        def __call__(self):
            now, adapter.scale = adapter.scale, self.scale
            try:
                return self.function()
            finally:
                adapter.scale = now

    whisper_static_cache.patch(model, engine="compile")
    engine = sessions.state_of(model).engine(model, CompileEngine)
    monkeypatch.setattr(engine, "_on_gpu", True)
    monkeypatch.setattr(engine, "_compile", lambda: modeling_whisper.decode_step)
    monkeypatch.setattr(engines, "CapturedCall", Captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    sessions.state_of(model).refresh(model)
    sessions.state_of(model).engines["compile"] = engine
    assert tokens_at_scales(model, adapter) == expected
    captures = engine.captures
    assert captures >= 3
    assert tokens_at_scales(model, adapter) == expected
    assert engine.captures == captures
    for step in range(20):
        adapter.scale = 0.1 * step
        model.generate(features(2))
    (session,) = sessions.state_of(model).sessions
    assert len({setting for _, setting in session.graphs}) <= 8


@pytest.mark.parametrize("engine", ENGINES)
def test_a_deep_copy_is_a_model_of_its_own(engine):
    model = tiny_model(2)
    whisper_static_cache.patch(engine=engine)
    expected = model.generate(features(2))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.decoder.embed_tokens.weight.neg_()
    assert torch.equal(model.generate(features(2)), expected)
    changed = twin.generate(features(2))
    whisper_static_cache.unpatch()
    assert torch.equal(changed, twin.generate(features(2)))


class Fail(LogitsProcessor):
    def __init__(self, error):
        self.error = error

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 6:
            raise self.error
        return scores


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.cuda.OutOfMemoryError("out of memory")])
def test_a_failed_call_leaves_the_next_right(model, engine, error):
    expected = stock(model, features(2))
    whisper_static_cache.patch(model, engine=engine)
    with pytest.raises(type(error)):
        model.generate(features(2, seed=9), logits_processor=LogitsProcessorList([Fail(error)]))
    assert torch.equal(model.generate(features(2)), expected)
    assert len(sessions.state_of(model).sessions) == 1


def test_a_step_that_fails_midway_leaves_the_next_call_right(model, monkeypatch):
    expected = stock(model, features(2))
    whisper_static_cache.patch(model, engine="eager")
    step = EagerEngine.step

    def interrupted(self, rows, slot):
        if slot > 4:
            raise KeyboardInterrupt
        return step(self, rows, slot)

    monkeypatch.setattr(EagerEngine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate(features(2, seed=9))
    monkeypatch.undo()
    assert torch.equal(model.generate(features(2)), expected)


def test_a_step_that_cannot_be_compiled_is_served_eagerly(monkeypatch, caplog):
    model = tiny_model(7)
    expected = stock(model, features(2))

    def broken(self, graph, example_inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(CompileEngine, "_backend", broken)
    whisper_static_cache.patch(model, engine="compile")
    for _ in range(2):
        assert torch.equal(model.generate(features(2)), expected)
        report = whisper_static_cache.last_run(model)
        assert report.engine == "eager"
        assert "no compiler here" in report.reason
    assert caplog.text.count("could not be built") == 1


@pytest.fixture
def without_logging():
    # pytest keeps every log record, and transformers warns in every call.
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("without_logging")
def test_a_thousand_calls_do_not_grow_memory(model):
    whisper_static_cache.patch(model, engine="eager")
    inputs = [features(1, seed=1), features(3, seed=2)]

    def work(calls):
        for index in range(calls):
            temperature = 0.5 + 0.001 * index
            model.generate(inputs[index % 2], max_new_tokens=2, do_sample=True, temperature=temperature)
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects()), len(gc.get_objects())

    work(20)
    tensors, objects = work(20)
    tensors_later, objects_later = work(1000)
    assert tensors_later <= tensors
    assert objects_later <= objects + 50


def test_a_collected_model_takes_its_buffers_along():
    model = tiny_model(4)
    whisper_static_cache.patch(engine="eager")
    model.generate(features())
    before = len(sessions._STATES)
    del model
    gc.collect()
    assert len(sessions._STATES) == before - 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (lambda model: {"cache_implementation": "dynamic"}, "dynamic"),
        (
            # With a language given: detecting it would fill the caller's cache, and stock fail.
            lambda model: {
                CACHE_NAME: EncoderDecoderCache(DynamicCache(), DynamicCache()),
                "language": "en",
            },
            "of the caller's",
        ),
        (lambda model: {"use_cache": False}, "use_cache"),
        (lambda model: {"output_hidden_states": True, "return_dict_in_generate": True}, "hidden states"),
    ],
    ids=["dynamic", "own-cache", "no-cache", "hidden-states"],
)
def test_what_is_not_served_goes_to_stock_and_says_so_once(arguments, reason, caplog):
    model = tiny_model(9)
    try:
        expected = stock(model, features(), **_compat.without_dynamic(arguments(model)))
    except UnboundLocalError as error:
        pytest.skip(f"in 4.55 stock makes a bare DynamicCache of the name, and its own attention fails on it: {error}")
    with whisper_static_cache.patched(model), caplog.at_level(logging.INFO, logger="whisper_static_cache"):
        for _ in range(2):
            tokens = stock(model, features(), **arguments(model))
            report = whisper_static_cache.last_run(model)
            assert report.engine == "stock"
            assert reason in report.reason
    lines = [r for r in caplog.records if r.name.startswith("whisper_static_cache") and reason in r.getMessage()]
    assert len(lines) == 1
    if isinstance(expected, torch.Tensor):
        assert torch.equal(tokens, expected)


def test_stock_when_the_model_is_not_plain():
    model = tiny_model(9)
    whisper_static_cache.patch(model)
    handle = model.model.decoder.layers[0].register_forward_hook(lambda module, inputs, output: None)
    model.generate(features())
    assert "forward hook" in whisper_static_cache.last_run(model).reason
    handle.remove()
    model.generate(features())
    assert whisper_static_cache.last_run(model).engine == "eager"
    decoder = model.model.decoder
    decoder.forward = decoder.forward.__get__(decoder)
    decoder.forward = lambda *args, **kwargs: type(decoder).forward(decoder, *args, **kwargs)
    model.generate(features())
    assert "replaced on the instance" in whisper_static_cache.last_run(model).reason
    del decoder.forward
    model.train()
    model.model.decoder.dropout = 0.1
    model.generate(features())
    assert "training mode" in whisper_static_cache.last_run(model).reason


@pytest.mark.parametrize("engine", ["eager", "compile"])
def test_served_after_a_call_that_left_transformers_own_hooks_behind(engine):
    model = tiny_model(9)
    model.generate(features(), return_dict_in_generate=True, output_hidden_states=True)
    expected = model.generate(features())
    whisper_static_cache.patch(model, engine=engine)
    assert torch.equal(expected, model.generate(features()))
    assert whisper_static_cache.last_run(model).engine == engine


def test_a_hook_on_a_linear_is_called_by_every_engine():
    model = tiny_model(9)
    calls = []
    model.model.decoder.layers[1].fc2.register_forward_hook(lambda module, inputs, output: calls.append(1))
    whisper_static_cache.patch(model, engine="compile")
    # With a language given there is no pass to detect it.
    model.generate(features(), max_new_tokens=5, language="en")
    report = whisper_static_cache.last_run(model)
    assert report.engine == "eager"
    assert "forward hook" in report.reason
    assert len(calls) == report.steps


def test_the_recipe_of_compiling_forward_is_served(model):
    model.forward = torch.compile(model.forward)
    try:
        whisper_static_cache.patch(model)
        model.generate(features())
        assert whisper_static_cache.last_run(model).engine == "eager"
    finally:
        del model.forward


def test_inference_mode_and_none_may_alternate():
    model = tiny_model(2)
    expected = stock(model, features(2))
    for engine in ENGINES:
        whisper_static_cache.patch(model, engine=engine)
        with torch.inference_mode():
            assert torch.equal(model.generate(features(2)), expected)
        assert torch.equal(model.generate(features(2)), expected)
        with torch.inference_mode():
            assert torch.equal(model.generate(features(2)), expected)


def test_scores_are_not_kept_for_the_average_logprob_alone(model, monkeypatch):
    kept = []
    need_fallback = type(model)._need_fallback

    def spy(self, seek_sequence, seek_outputs, index, *args, **kwargs):
        kept.append(seek_outputs[index]["scores"][0].dim())
        return need_fallback(self, seek_sequence, seek_outputs, index, *args, **kwargs)

    monkeypatch.setattr(type(model), "_need_fallback", spy)
    whisper_static_cache.patch(model)
    arguments = {"return_timestamps": True, "temperature": (0.0, 0.4), "logprob_threshold": -0.2}
    model.generate(features(windows=2.2), **arguments)
    assert set(kept) == {0}
    kept.clear()
    model.generate(features(windows=2.2), return_segments=True, **arguments)
    assert set(kept) == {1}


def test_last_run_tells_what_happened(model):
    whisper_static_cache.patch(model)
    model.generate(features(2), max_new_tokens=6)
    report = whisper_static_cache.last_run(model)
    assert report.engine == "eager"
    assert report.reason is None
    assert (report.batch_size, report.windows) == (2, 1)
    assert report.tokens == 2 * report.steps
    assert 1 <= report.steps <= 6
    assert report.prefill_seconds > 0
    assert report.decode_seconds > 0
    assert report.tokens_per_second == report.tokens / report.decode_seconds
    with pytest.raises(AttributeError):
        report.engine = "other"
    model.generate(features(windows=3.3), return_timestamps=True)
    assert whisper_static_cache.last_run(model).windows > 1


@pytest.mark.parametrize("sizes", [(0,), (-1, 2), (1.5,), ("2",)])
def test_warmup_refuses_what_is_no_batch_size(model, sizes):
    with pytest.raises(ValueError, match="batch_sizes"):
        whisper_static_cache.warmup(model, batch_sizes=sizes)


def test_warmup_refuses_what_cannot_be_served(model):
    with pytest.raises(ValueError, match="use one of"):
        whisper_static_cache.warmup(model, engine="fast")
    handle = model.model.register_forward_hook(lambda *args: None)
    try:
        with pytest.raises(ValueError, match="forward hook"):
            whisper_static_cache.warmup(model)
    finally:
        handle.remove()


def test_warmup_changes_no_result(model):
    expected = stock(model, features(2))
    whisper_static_cache.patch(model, engine="eager")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    whisper_static_cache.warmup(model, batch_sizes=(1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.generate(features(2)), expected)
