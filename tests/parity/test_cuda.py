"""Parity and the promises of the loop on a GPU: stock's tokens, no wait for the host, nothing captured once warm."""

import pytest
import torch

import whisper_static_cache
from whisper_static_cache import engines, token_choice, triton_engine

from ..conftest import tiny_features, tiny_model
from ..test_generation_whisper import adapted_model
from .compare import assert_same
from .rows import LONG, TEMPERATURES, Favour, Recorder, Row, StopAt


pytestmark = pytest.mark.gpu

ROWS = {
    "short": Row({}),
    "short-batch3": Row({}, batch=3),
    "timestamps": Row({"return_timestamps": True}, batch=2),
    "scores": Row({"return_dict_in_generate": True, "output_scores": True, "output_logits": True}, batch=2),
    "sampling": Row({"do_sample": True, "temperature": 0.7}, batch=3),
    "sampling-filters": Row({"do_sample": True, "temperature": 0.7, "top_k": 7, "top_p": 0.9}, batch=2),
    "repetition": Row({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, batch=2),
    "processor": Row(lambda model: {"logits_processor": [Favour()]}, batch=2),
    "criterion": Row(lambda model: {"stopping_criteria": [StopAt()]}, batch=3),
    "streamer": Row(lambda model: {"streamer": Recorder()}),
    "long": Row(LONG, batch=3, windows=2.3, attention_mask=True),
    "long-condition": Row({**LONG, "condition_on_prev_tokens": True}, batch=2, windows=2.3, attention_mask=True),
    "long-fallback": Row(
        {**LONG, "temperature": TEMPERATURES, "logprob_threshold": -0.5, "no_speech_threshold": 0.1},
        batch=2,
        windows=2.3,
        attention_mask=True,
    ),
}


def run(model, row):
    from transformers import LogitsProcessorList, StoppingCriteriaList

    arguments = row.arguments(model) if callable(row.arguments) else dict(row.arguments)
    for name, kind in (("logits_processor", LogitsProcessorList), ("stopping_criteria", StoppingCriteriaList)):
        if name in arguments:
            arguments[name] = kind(arguments[name])
    features = tiny_features(row.batch, row.windows, 0, model.config).cuda()
    if row.attention_mask:
        mask = torch.ones(row.batch, features.shape[-1], dtype=torch.long)
        for index in range(1, row.batch):
            mask[index, features.shape[-1] - 11 * index :] = 0
        arguments["attention_mask"] = mask.cuda()
    torch.manual_seed(1234)
    result = model.generate(features, **arguments)
    after = torch.rand(4, device="cuda")
    streamer = arguments.get("streamer")
    return {"result": result, "random state afterwards": after, "streamed": streamer and streamer.seen}


def served_by_all(seed=0):
    """A tiny model with heads of 64, which is what the Triton kernels take."""
    shape = {"d_model": 128, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 192}
    return tiny_model(seed, **shape).cuda()


@pytest.fixture(scope="module")
def model():
    return served_by_all()


@pytest.mark.parametrize("engine", engines.ENGINES)
@pytest.mark.parametrize("name", ROWS)
def test_stocks_result(model, name, engine):
    expected = run(model, ROWS[name])
    whisper_static_cache.patch(model, engine=engine)
    try:
        assert_same(expected, run(model, ROWS[name]), rtol=1e-3, atol=1e-3)
        assert whisper_static_cache.last_run(model).engine == engine
        # Once more on warm buffers and graphs.
        assert_same(expected, run(model, ROWS[name]), rtol=1e-3, atol=1e-3)
        assert whisper_static_cache.last_run(model).captures == 0
    finally:
        whisper_static_cache.monkey_patch._MODELS.pop(model)


@pytest.mark.parametrize("engine", engines.ENGINES)
@pytest.mark.parametrize("arguments", [{}, {"return_timestamps": True}, {"do_sample": True, "top_p": 0.9}])
def test_no_step_waits_for_the_device(model, monkeypatch, engine, arguments):
    steps = []

    def without_sync(function):
        def call(*args):
            steps.append(function)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    with whisper_static_cache.patched(model, engine=engine):
        features = tiny_features(2, config=model.config).cuda()
        model.generate(features, language="en", **arguments)
        for choice in (token_choice.DeviceChoice, token_choice.RuledChoice):
            monkeypatch.setattr(choice, "advance", without_sync(choice.advance))
        model.generate(features, language="en", **arguments)
    # One call may be several steps.
    assert len(steps) > 1


@pytest.mark.parametrize("arguments", [{}, {"return_timestamps": True}])
def test_several_steps_a_launch_give_the_tokens_of_one(model, monkeypatch, arguments):
    features = tiny_features(2, config=model.config).cuda()
    with whisper_static_cache.patched(model, engine="triton"):
        for tokens in (1, 2, 5, 6, 12, None):
            several = model.generate(features, language="en", max_new_tokens=tokens, **arguments)
            steps = whisper_static_cache.last_run(model).steps
            with monkeypatch.context() as patch:
                patch.setattr(triton_engine.TritonEngine, "chained", lambda engine, rows: 1000)
                single = model.generate(features, language="en", max_new_tokens=tokens, **arguments)
            assert torch.equal(several, single)
            assert whisper_static_cache.last_run(model).steps == steps


def test_few_graphs_serve_every_batch(model):
    with whisper_static_cache.patched(model, engine="compile"):
        warm = whisper_static_cache.warmup(model, batch_sizes=(1, 2, 4))
        assert warm.captures <= 3
        for size in (3, 1, 4, 2):
            expected = None
            with whisper_static_cache.patched(model, engine="eager"):
                expected = model.generate(tiny_features(size, config=model.config).cuda())
            assert torch.equal(model.generate(tiny_features(size, config=model.config).cuda()), expected)
            report = whisper_static_cache.last_run(model)
            assert (report.compiles, report.captures) == (0, 0)


def test_an_adapters_switch_is_followed():
    model, adapter = adapted_model()
    model.cuda()
    features = tiny_features(2, config=model.config).cuda()
    for engine in ("compile", "triton"):
        for scale in (0.0, 3.0, 0.0, 3.0):
            adapter.scale = scale
            expected = model.generate(features)
            with whisper_static_cache.patched(model, engine=engine):
                assert torch.equal(model.generate(features), expected)
                assert whisper_static_cache.last_run(model).engine == "compile"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_on_every_engine(dtype):
    model = served_by_all(3).to(dtype)
    features = tiny_features(2, config=model.config).cuda().to(dtype)
    for engine in engines.ENGINES:
        with whisper_static_cache.patched(model, engine=engine):
            tokens = model.generate(features, language="en")
            assert whisper_static_cache.last_run(model).engine == engine
            assert torch.equal(model.generate(features, language="en"), tokens)


def test_a_model_moved_to_the_gpu_and_back():
    model = tiny_model(4)
    features = tiny_features(2, config=model.config)
    expected = model.generate(features)
    whisper_static_cache.patch(model, engine="compile")
    try:
        for device in ("cpu", "cuda", "cpu", "cuda"):
            model.to(device)
            assert torch.equal(model.generate(features.to(device)).cpu(), expected)
            assert whisper_static_cache.last_run(model).engine == "compile"
    finally:
        whisper_static_cache.unpatch(model)
