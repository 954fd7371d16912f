"""Cross-attention's keys and values in 8 bits: the rounding, the cache, and whole models with and without."""

import copy

import pytest
import torch

import whisper_static_cache
from whisper_static_cache._compat import CACHE_NAME
from whisper_static_cache.cache_utils import EncoderDecoderStaticCache, Int8LayerBuffers, LayerBuffers
from whisper_static_cache.int8_states import dequantize, quantize
from whisper_static_cache.sessions import state_of

from .conftest import tiny_config, tiny_features, tiny_model
from .test_cache_utils import drive, encode, stock, tokens


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def int8_cache(batch_size=2, **arguments):
    return EncoderDecoderStaticCache(tiny_config(), batch_size, cross_dtype=torch.int8, **arguments)


def generate(model, features, **arguments):
    return model.generate(features, language="en", max_new_tokens=8, **arguments)


class TestRounding:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("size", [1e-6, 1.0, 300.0])
    def test_no_element_is_off_by_more_than_half_a_step(self, dtype, size):
        states = (torch.randn(2, 3, 50, 64, generator=torch.Generator().manual_seed(0)) * size).to(dtype)
        integers = torch.empty_like(states, dtype=torch.int8)
        scales = torch.full(states.shape[:-1], float("nan"), dtype=dtype)
        quantize(states, integers, scales)
        error = (integers.double() * scales.double()[..., None] - states.double()).abs()
        # The quotient is rounded to float32 before it is rounded to an integer.
        assert (error <= scales.double()[..., None] * (0.5 + 128 * 2.0**-24)).all()
        largest = states.double().abs().amax(-1) / 127
        smallest = torch.finfo(dtype).tiny
        assert (scales.double() <= largest.clamp(min=smallest) * (1 + torch.finfo(dtype).eps)).all()
        assert dequantize(integers, scales).dtype == dtype

    def test_zeros_stay_zero_and_what_is_not_finite_is_not_lost(self):
        states = torch.zeros(1, 1, 3, 64)
        states[0, 0, 1, 5], states[0, 0, 2, 5] = float("nan"), float("inf")
        integers, scales = torch.empty_like(states, dtype=torch.int8), torch.empty(1, 1, 3)
        quantize(states, integers, scales)
        full = dequantize(integers, scales)
        assert not full[0, 0, 0].any()
        assert not full[0, 0, 1].isfinite().any() and not full[0, 0, 2, 5].isfinite()


class TestCache:
    def test_buffers(self):
        cache = int8_cache(3, dtype=torch.bfloat16)
        for layer in cache.layer_buffers:
            assert isinstance(layer, Int8LayerBuffers)
            assert layer.self_keys.dtype == layer.cross_key_scales.dtype == torch.bfloat16
            assert layer.cross_keys.dtype == layer.cross_values.dtype == torch.int8
            assert layer.cross_keys.shape == (3, 4, 30, 8)
            assert layer.cross_key_scales.shape == layer.cross_value_scales.shape == (3, 4, 30)
        assert (cache.dtype, cache.cross_dtype) == (torch.bfloat16, torch.int8)
        assert "cross_dtype=torch.int8" in repr(cache)
        # Self-attention in 2 bytes; cross-attention in 1, and 2 for each vector of 8.
        assert cache.memory_footprint() == 3 * 2 * 3 * 4 * (40 * 8 * 2 + 30 * (8 + 2))

    def test_off_is_the_default_and_nothing_new(self):
        cache = EncoderDecoderStaticCache(tiny_config())
        assert cache.cross_dtype is None and "cross_dtype" not in repr(cache)
        assert all(type(layer) is LayerBuffers and len(layer) == 4 for layer in cache.layer_buffers)

    @pytest.mark.parametrize(
        ("cross_dtype", "error", "message"),
        [
            ("int8", TypeError, "`cross_dtype` must be a torch.dtype or None, not 'int8'; pass torch.int8"),
            (8, TypeError, "pass torch.int8"),
            (torch.float8_e4m3fn, ValueError, "`cross_dtype` is torch.float8_e4m3fn: pass torch.int8"),
            (torch.float16, ValueError, "or None"),
            (torch.uint8, ValueError, "pass torch.int8"),
        ],
    )
    def test_anything_else_is_refused(self, cross_dtype, error, message):
        with pytest.raises(error, match=message):
            EncoderDecoderStaticCache(tiny_config(), cross_dtype=cross_dtype)
        with pytest.raises(error, match=message):
            whisper_static_cache.patch(cross_dtype=cross_dtype)
        assert not whisper_static_cache.is_patched()

    def test_the_models_own_forward(self):
        model = tiny_model()
        encoded, ids = encode(model, 2), tokens(2)
        cache = int8_cache()
        expected = stock(model, ids, encoded)
        first = drive(model, ids, encoded, cache)
        error = ((first - expected).norm() / expected.norm()).item()
        # Three layers, each of which adds what a rounding of 1/254 of the largest of 8 makes of its attention.
        assert 0 < error < 3 / 127
        cache.reset()
        assert not any(buffer.any() for layer in cache.layer_buffers for buffer in layer)
        assert torch.equal(drive(model, ids, encoded, cache), first)
        assert torch.equal(drive(model, ids, encoded, copy.deepcopy(_reset(cache))), first)

    def test_rows_move_with_their_scales(self):
        cache = int8_cache(3)
        states = torch.randn(2, 4, 30, 8, generator=torch.Generator().manual_seed(1))
        for index in range(3):
            cache.self_attention_cache.update(states[:, :, :5], -states[:, :, :5], index)
            cache.cross_attention_cache.update(states, -100 * states, index)
        layer = cache.cross_attention_cache.layers[1]
        keys, values = layer.keys, layer.values
        torch.testing.assert_close(keys, states, rtol=0, atol=states.abs().max().item() / 253)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(layer.keys, keys[[1, 0]]) and torch.equal(layer.values, values[[1, 0]])
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(3)
        assert torch.equal(layer.keys, keys[[0, 0, 0]]) and torch.equal(layer.values, values[[0, 0, 0]])
        cache.to("meta")
        assert all(buffer.device.type == "meta" for held in cache.layer_buffers for buffer in held)


def _reset(cache):
    cache.reset()
    return cache


class TestGenerate:
    @pytest.fixture(scope="class")
    def model(self):
        return tiny_model()

    def logits(self, model, features, **arguments):
        result = generate(model, features, return_dict_in_generate=True, output_logits=True, **arguments)
        return torch.stack(result.logits), result

    @pytest.mark.parametrize("engine", ["eager", "compile"])
    def test_first_logits_are_near_and_off_is_stocks(self, model, engine):
        features = tiny_features(2)
        with whisper_static_cache.patched(model, engine=engine):
            expected, plain = self.logits(model, features)
            assert whisper_static_cache.last_run(model).cross_dtype is None
        stocks, stock_result = self.logits(model, features)
        assert torch.equal(plain.sequences, stock_result.sequences)
        torch.testing.assert_close(expected, stocks, rtol=1e-4, atol=1e-4)
        with whisper_static_cache.patched(model, engine=engine, cross_dtype=torch.int8):
            actual, result = self.logits(model, features)
            report = whisper_static_cache.last_run(model)
            again, _ = self.logits(model, features)
        assert (report.engine, report.cross_dtype) == (engine, torch.int8)
        # Until a token differs the two are fed the same.
        error = ((actual[0] - expected[0]).norm() / expected[0].norm()).item()
        assert 0 < error < 3 / 127
        assert torch.equal(again, actual)
        # What the caller is handed is what stock's loop would hand out: in full.
        cross = result[CACHE_NAME].cross_attention_cache
        assert cross.layers[0].keys.dtype == torch.float32 and cross.layers[0].keys.shape == (2, 4, 30, 8)

    def test_sessions_with_and_without_do_not_mix(self, model):
        features = tiny_features(1)
        expected = generate(model, features)
        whisper_static_cache.patch(model, engine="eager", cross_dtype=torch.int8)
        generate(model, features)
        assert [session.cross_dtype for session in state_of(model).sessions] == [torch.int8]
        whisper_static_cache.patch(model, engine="eager")
        assert torch.equal(generate(model, features), expected)
        assert [session.cross_dtype for session in state_of(model).sessions] == [None]
        with whisper_static_cache.patched(model, engine="eager", cross_dtype=torch.int8):
            whisper_static_cache.warmup(model)
            assert [session.cross_dtype for session in state_of(model).sessions] == [torch.int8]
        assert torch.equal(generate(model, features), expected)
        whisper_static_cache.unpatch(model)
        assert not whisper_static_cache.is_patched(model)

    def test_a_cache_of_the_callers_goes_before_the_patch(self, model):
        features = tiny_features(2)
        with whisper_static_cache.patched(model, engine="eager"):
            cache = int8_cache()
            first = generate(model, features, **{CACHE_NAME: cache})
            assert whisper_static_cache.last_run(model).cross_dtype == torch.int8
            assert torch.equal(generate(model, features, **{CACHE_NAME: cache}), first)
        with whisper_static_cache.patched(model, engine="eager", cross_dtype=torch.int8):
            assert torch.equal(generate(model, features), first)
            plain = EncoderDecoderStaticCache(model.config, 2)
            generate(model, features, **{CACHE_NAME: plain})
            assert whisper_static_cache.last_run(model).cross_dtype is None

    def test_beams_share_rows_and_scales(self, model):
        features = tiny_features(2)
        with whisper_static_cache.patched(model, engine="eager"):
            plain = generate(model, features, num_beams=3, return_dict_in_generate=True)
        with whisper_static_cache.patched(model, engine="eager", cross_dtype=torch.int8):
            shared = generate(model, features, num_beams=3, return_dict_in_generate=True)
            report = whisper_static_cache.last_run(model)
            cache = int8_cache(6)
            # With a result object the prompt is part of the sequences.
            assert torch.equal(generate(model, features, num_beams=3, **{CACHE_NAME: cache}), shared.sequences[:, -8:])
        if report.engine == "eager":  # stock serves beams before 4.50
            assert report.cross_dtype == torch.int8
            handed, full = (r[CACHE_NAME].cross_attention_cache.layers[0].keys for r in (shared, plain))
            # The first layer's are those of the encoder alone, and the same whichever tokens were chosen.
            torch.testing.assert_close(handed, full, rtol=0, atol=full.abs().max().item() / 253)
            assert cache.cross_attention_cache.layers[0].keys.shape == (6, 4, 30, 8)
