"""Parity on the real checkpoints, tiny.en and base, with real speech: tokens, segments, and the pipeline's text."""

import os
from pathlib import Path

import pytest
import torch

import whisper_static_cache
from whisper_static_cache.audio import load_audio
from whisper_static_cache.checkpoints import load_checkpoint

from ..conftest import SPEECH
from .compare import assert_same


pytestmark = pytest.mark.checkpoint

CLIP = Path(__file__).resolve().parents[2] / "benchmarks" / "demo" / "gettysburg_address.flac"
RATE = 16000
FALLBACK = {
    "temperature": (0.0, 0.3, 0.6),
    "compression_ratio_threshold": 1.35,
    "logprob_threshold": -0.3,
    "no_speech_threshold": 0.6,
}


@pytest.fixture(scope="module", params=["tiny.en", "base"])
def checkpoint(request):
    # Two threads to a test worker: real models are worth it.
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("WSC_TEST_THREADS", "1")))
    yield (*load_checkpoint(request.param), request.param)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def clip():
    return load_audio(CLIP)


def both(model, run, engine="eager"):
    """What `run` gives with stock and with the patched model, from the same random state."""
    torch.manual_seed(7)
    expected = run()
    with whisper_static_cache.patched(model, engine=engine):
        torch.manual_seed(7)
        found = run()
        return expected, found, whisper_static_cache.last_run(model)


def long_inputs(processor, recordings):
    return processor(
        recordings,
        sampling_rate=RATE,
        return_tensors="pt",
        truncation=False,
        padding="longest",
        return_attention_mask=True,
    )


SHORT_ROWS = {
    "timestamps": {"return_timestamps": True},
    "prompt": {"prompt": "Four score and seven years ago"},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 20},
    "sampling": {"do_sample": True, "temperature": 0.6, "max_new_tokens": 40},
    "max-length": {"max_length": 20},
    "return-sequences": {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 12},
    "language": {"language": "en", "task": "transcribe"},
    "language-list": {"language": ["en", "de"], "max_new_tokens": 20},
}


@pytest.mark.parametrize("name", SHORT_ROWS)
def test_short_form(checkpoint, clip, name):
    model, processor, which = checkpoint
    if "language" in SHORT_ROWS[name] and which == "tiny.en":
        pytest.skip("an English-only model takes no language")
    arguments = dict(SHORT_ROWS[name])
    if "prompt" in arguments:
        arguments["prompt_ids"] = processor.get_prompt_ids(arguments.pop("prompt"), return_tensors="pt")
    windows = [clip[: 6 * RATE], clip[20 * RATE : 32 * RATE]]
    features = processor(windows, sampling_rate=RATE, return_tensors="pt").input_features
    expected, found, report = both(model, lambda: model.generate(features, **arguments))
    assert_same(expected, found, rtol=1e-3, atol=1e-3)
    assert report.engine == "eager"


LONG_ROWS = {
    "segments": {"return_segments": True},
    "condition": {"condition_on_prev_tokens": True},
    "fallback": FALLBACK,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG_ROWS)
def test_long_form(checkpoint, clip, name):
    model, processor, _ = checkpoint
    inputs = long_inputs(processor, [clip[: 33 * RATE], clip[60 * RATE : 90 * RATE]])
    expected, found, report = both(model, lambda: model.generate(**inputs, return_timestamps=True, **LONG_ROWS[name]))
    assert_same(expected, found, rtol=1e-3, atol=1e-3)
    assert report.engine == "eager"
    assert report.windows >= 2


@pytest.mark.slow
def test_compiled_long_form(checkpoint, clip):
    model, processor, _ = checkpoint
    inputs = long_inputs(processor, clip[: 33 * RATE])
    expected, found, report = both(model, lambda: model.generate(**inputs, return_timestamps=True), "compile")
    assert_same(expected, found)
    assert (report.engine, report.reason) == ("compile", None)


@pytest.mark.slow
@pytest.mark.speech
def test_speech(checkpoint):
    model, processor, _ = checkpoint
    files = sorted(SPEECH.glob("*/*/*.flac"))[::17]
    features = processor([load_audio(f) for f in files], sampling_rate=RATE, return_tensors="pt").input_features
    expected, found, _ = both(model, lambda: model.generate(features, return_timestamps=True))
    assert_same(expected, found)


# The pipeline's own default in transformers 5 is a beam search of five.
PIPELINE_ROWS = {
    "default": ({}, {}),
    "greedy": ({}, {"generate_kwargs": {"num_beams": 1}}),
    "timestamps": ({}, {"return_timestamps": True, "generate_kwargs": {"num_beams": 1}}),
    "chunks": (
        {"chunk_length_s": 30, "batch_size": 2},
        {"return_timestamps": True, "generate_kwargs": {"num_beams": 1}},
    ),
    "chunks-no-timestamps": ({"chunk_length_s": 20, "batch_size": 3}, {"generate_kwargs": {"num_beams": 1}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINE_ROWS)
def test_pipeline(checkpoint, clip, name):
    from transformers import pipeline

    model, processor, which = checkpoint
    if which == "base" and name != "timestamps":
        pytest.skip("one row of the pipeline is enough for a second checkpoint")
    made, called = PIPELINE_ROWS[name]
    recognise = pipeline(
        "automatic-speech-recognition",
        model=model,
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
        **made,
    )
    seconds = 33 if made or "return_timestamps" in called else 6

    def run():
        return recognise({"raw": clip[: seconds * RATE].copy(), "sampling_rate": RATE}, **called)

    expected, found, report = both(model, run)
    assert_same(expected, found)
    if called:
        assert report.engine == "eager"
