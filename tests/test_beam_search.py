"""Beam search on a cache that holds cross-attention once per input; tests/parity compares its results with stock's."""

import inspect

import pytest
import torch
from torch.nn import functional as F
from transformers import WhisperForConditionalGeneration

import whisper_static_cache
from whisper_static_cache._compat import CACHE_NAME
from whisper_static_cache.cache_utils import EncoderDecoderStaticCache
from whisper_static_cache.modeling_whisper import _cross_attention
from whisper_static_cache.sessions import state_of

from .conftest import tiny_config, tiny_features, tiny_model


pytestmark = pytest.mark.skipif(
    "beam_scorer" in inspect.signature(WhisperForConditionalGeneration._beam_search).parameters,
    reason="up to transformers 4.48 a scorer object keeps the beams, and beam search is left to stock",
)


@pytest.fixture(scope="module")
def model():
    return tiny_model(3)


def stock(model, features, **arguments):
    whisper_static_cache.unpatch()
    tokens = model.generate(features, **arguments)
    whisper_static_cache.patch()
    return tokens


@pytest.mark.parametrize("shape", [(2, 3, 1), (1, 5, 1), (3, 2, 4)])
def test_beams_as_queries_of_their_input(shape):
    inputs, beams, length = shape
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(inputs * beams, 4, length, 8, generator=generator)
    keys, values = torch.randn(2, inputs, 4, 30, 8, generator=generator)
    expected = F.scaled_dot_product_attention(
        query, keys.repeat_interleave(beams, 0), values.repeat_interleave(beams, 0), scale=1.0
    )
    torch.testing.assert_close(_cross_attention(query, keys, values), expected)


def test_cross_attention_is_held_once_per_input_and_never_moved(model, monkeypatch):
    """Written by the projection of each window alone: a row reordered or repeated would be another write."""
    whisper_static_cache.patch()
    features = tiny_features(2, config=model.config)
    model.generate(features, num_beams=5, language="en")
    report = whisper_static_cache.last_run(model)
    assert (report.engine, report.reason, report.batch_size) == ("eager", None, 10)
    (session,) = state_of(model).sessions
    assert session.buffers[0][0].shape[0] == 10
    assert session.buffers[0][2].shape[0] == 2
    versions = [(keys._version, values._version) for _, _, keys, values in session.buffers]
    model.generate(features, num_beams=5, language="en")
    assert [(keys._version, values._version) for _, _, keys, values in session.buffers] == [
        (a + 1, b + 1) for a, b in versions
    ]


def test_beams_and_batches_take_turns_in_one_session(model):
    features = tiny_features(4, config=model.config)
    turns = [(1, 5), (4, 1), (2, 5), (4, 2), (3, 1)]
    expected = [stock(model, features[:rows], num_beams=beams) for rows, beams in turns]
    for (rows, beams), tokens in zip(turns, expected):
        assert torch.equal(tokens, model.generate(features[:rows], num_beams=beams))
        sizes = [(session.max_batch_size, session.max_inputs) for session in state_of(model).sessions]
        assert sizes == [(5, 1) if (rows, beams) == turns[0] else (5, 4) if (rows, beams) == turns[1] else (10, 4)]


@pytest.mark.parametrize("max_inputs", [None, 2])
def test_a_cache_of_the_users(model, max_inputs):
    features = tiny_features(2, config=model.config)
    expected = stock(model, features, num_beams=3, language="en")
    cache = EncoderDecoderStaticCache(model.config, max_batch_size=6, max_inputs=max_inputs)
    for _ in range(2):
        tokens = model.generate(features, num_beams=3, language="en", **{CACHE_NAME: cache})
        assert torch.equal(expected, tokens)
        assert whisper_static_cache.last_run(model).engine == "eager"
    # Where it has a row for each beam it is left filled, as after any other call.
    assert cache.batch_size == (6 if max_inputs is None else 0)
    with pytest.raises(ValueError, match="max_batch_size=6 and the call has 10 rows"):
        model.generate(features, num_beams=5, language="en", **{CACHE_NAME: cache})


def test_a_cache_with_too_few_inputs_is_refused(model):
    whisper_static_cache.patch()
    cache = EncoderDecoderStaticCache(model.config, max_batch_size=6, max_inputs=1)
    with pytest.raises(ValueError, match="max_inputs=1 and the call has 2 inputs"):
        model.generate(tiny_features(2), num_beams=3, language="en", **{CACHE_NAME: cache})


def test_the_cache_is_smaller_by_what_beams_share():
    whole, shared = (EncoderDecoderStaticCache(tiny_config(), 10, max_inputs=inputs) for inputs in (10, 2))
    assert whole.memory_footprint() - shared.memory_footprint() == 3 * 2 * 8 * 30 * 32 * 4
    for wrong, error in ((11, ValueError), (0, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="max_inputs"):
            EncoderDecoderStaticCache(tiny_config(), 10, max_inputs=wrong)


def test_another_engine_that_was_asked_for_is_named(model):
    with whisper_static_cache.patched(engine="compile"):
        model.generate(tiny_features(), num_beams=2, language="en")
        report = whisper_static_cache.last_run(model)
    assert report.engine == "eager"
    assert report.reason == "beam search runs on the eager engine, not on compile"
