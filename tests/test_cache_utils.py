import copy
import inspect

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import EncoderDecoderCache, WhisperConfig, WhisperForConditionalGeneration
from transformers.cache_utils import DynamicCache

from whisper_static_cache._compat import CACHE_NAME
from whisper_static_cache.cache_utils import EncoderDecoderStaticCache, LayerBuffers

from .conftest import tiny_config, tiny_features, tiny_model


PROMPT, STEPS = 4, 6
SOURCE = 30  # tiny_config's max_source_positions
TAKES_CACHE_POSITION = "cache_position" in inspect.signature(WhisperForConditionalGeneration.forward).parameters


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def encode(model, batch_size=1, seed=0):
    with torch.no_grad():
        return model.model.encoder(tiny_features(batch_size, seed=seed).to(model.device, model.dtype))


def tokens(batch_size=1, length=PROMPT + STEPS, seed=0):
    return torch.randint(0, 99, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def forward(model, ids, encoded, cache, position=None, step=None):
    """Logits of one forward pass; `position` is passed on by the releases that take one."""
    arguments = {"cache_position": position} if position is not None and TAKES_CACHE_POSITION else {}
    with torch.no_grad():
        return (step or model)(
            encoder_outputs=(encoded[0],), decoder_input_ids=ids, **{CACHE_NAME: cache}, use_cache=True, **arguments
        ).logits.clone()


def drive(model, ids, encoded, cache, prompt=PROMPT, step=None):
    """Logits `(batch, length, vocab)` of a prefill and then one token at a time, as a caller does it by hand."""
    logits = [forward(model, ids[:, :prompt], encoded, cache)]
    for index in range(prompt, ids.shape[1]):
        position = torch.tensor([index], device=ids.device)
        logits.append(forward(model, ids[:, index : index + 1], encoded, cache, position=position, step=step))
    return torch.cat(logits, dim=1)


def stock(model, ids, encoded):
    return drive(model, ids, encoded, EncoderDecoderCache(DynamicCache(), DynamicCache()))


def addresses(cache):
    return [buffer.data_ptr() for layer in cache.layer_buffers for buffer in layer]


def fill(cache, batch_size=2, length=3):
    """Put recognisable numbers into a cache: row r holds r + 1 everywhere."""
    rows = torch.arange(1.0, batch_size + 1)[:, None, None, None]
    for index in range(3):
        cache.self_attention_cache.update(rows.expand(-1, 4, length, 8), -rows.expand(-1, 4, length, 8), index)
        cache.cross_attention_cache.update(rows.expand(-1, 4, SOURCE, 8), -rows.expand(-1, 4, SOURCE, 8), index)
        cache.is_updated[index] = True
    return cache


def held_rows(cache):
    """The number that `fill` wrote into each row in use, checked to be the same in every buffer."""
    found = set()
    for layers in (cache.self_attention_cache.layers, cache.cross_attention_cache.layers):
        for layer in layers:
            assert torch.equal(layer.keys, -layer.values)
            found.add(tuple(layer.keys[:, 0, 0, 0].tolist()))
    assert len(found) == 1
    return list(found.pop())


class TestBuffers:
    def test_shapes_default_to_the_models_own(self):
        cache = EncoderDecoderStaticCache(tiny_config(), max_batch_size=3)
        assert len(cache.layer_buffers) == len(cache) == 3
        for layer in cache.layer_buffers:
            assert isinstance(layer, LayerBuffers)
            assert layer.self_keys.shape == layer.self_values.shape == (3, 4, 40, 8)
            assert layer.cross_keys.shape == layer.cross_values.shape == (3, 4, 30, 8)

    def test_every_buffer_is_a_zeroed_tensor_of_its_own(self):
        cache = EncoderDecoderStaticCache(tiny_config(), 2, max_cache_len=7, max_source_len=5, dtype=torch.bfloat16)
        buffers = [buffer for layer in cache.layer_buffers for buffer in layer]
        assert len({buffer.untyped_storage().data_ptr() for buffer in buffers}) == len(buffers) == 12
        assert all(buffer.dtype == torch.bfloat16 and not buffer.any() for buffer in buffers)
        assert (cache.max_batch_size, cache.max_cache_len, cache.max_source_len) == (2, 7, 5)
        assert (cache.device, cache.dtype, cache.batch_size) == (torch.device("cpu"), torch.bfloat16, 0)

    def test_memory_footprint_is_the_bytes_of_all_buffers(self):
        cache = EncoderDecoderStaticCache(tiny_config(), 2, dtype=torch.float16)
        assert cache.memory_footprint() == 3 * 2 * 2 * (2 * 4 * 8) * (40 + 30)

    def test_it_is_a_compileable_encoder_decoder_cache(self):
        cache = EncoderDecoderStaticCache(tiny_config())
        assert isinstance(cache, EncoderDecoderCache)
        assert cache.is_compileable and cache.self_attention_cache.is_compileable
        assert cache.get_max_cache_shape() == cache.get_max_length() == 40
        assert cache.cross_attention_cache.get_max_cache_shape() == 30
        assert "max_batch_size=1" in repr(cache)

    def test_made_in_inference_mode_it_still_serves_outside(self, model):
        with torch.inference_mode():
            cache = EncoderDecoderStaticCache(model.config)
        encoded, ids = encode(model), tokens()
        torch.testing.assert_close(drive(model, ids, encoded, cache), stock(model, ids, encoded))

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"config": object()}, TypeError, "WhisperConfig"),
            ({"config": {"d_model": 32}}, TypeError, "WhisperConfig"),
            ({"max_batch_size": 0}, ValueError, "max_batch_size.* at least 1"),
            ({"max_batch_size": -2}, ValueError, "max_batch_size.* at least 1"),
            ({"max_batch_size": 1.5}, TypeError, "max_batch_size.* integer"),
            ({"max_batch_size": True}, TypeError, "max_batch_size.* integer"),
            ({"max_batch_size": None}, TypeError, "max_batch_size.* integer"),
            ({"max_cache_len": 0}, ValueError, "max_cache_len.* at least 1"),
            ({"max_cache_len": 41}, ValueError, "max_target_positions=40, not 41"),
            ({"max_source_len": 0}, ValueError, "max_source_len.* at least 1"),
            ({"max_source_len": 31}, ValueError, "max_source_positions=30, not 31"),
            ({"max_source_len": "30"}, TypeError, "max_source_len.* integer"),
            ({"dtype": torch.int8}, ValueError, "floating-point, not torch.int8"),
            ({"dtype": "float16"}, TypeError, "torch.dtype"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, error, message):
        with pytest.raises(error, match=message):
            EncoderDecoderStaticCache(**{"config": tiny_config(), **arguments})


class TestByHand:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("prompt", [1, PROMPT])
    def test_logits_are_those_of_a_dynamic_cache(self, attention, prompt):
        model = tiny_model(attn_implementation=attention)
        cache = EncoderDecoderStaticCache(model.config, max_batch_size=2)
        encoded, ids = encode(model, 2), tokens(2)
        expected = stock(model, ids, encoded)
        torch.testing.assert_close(drive(model, ids, encoded, cache, prompt=prompt), expected)
        assert int(cache.get_seq_length()) == PROMPT + STEPS

    def test_several_tokens_at_a_time_after_the_prompt(self, model):
        cache = EncoderDecoderStaticCache(model.config)
        encoded, ids = encode(model), tokens()
        chunks, start = [], 0
        for size in (3, 4, 1, 2):
            chunks.append(forward(model, ids[:, start : start + size], encoded, cache))
            start += size
        torch.testing.assert_close(torch.cat(chunks, dim=1), stock(model, ids, encoded))

    def test_batches_grow_and_shrink_in_the_same_buffers(self, model):
        cache = EncoderDecoderStaticCache(model.config, max_batch_size=4)
        before = addresses(cache)
        for seed, batch_size in enumerate((2, 4, 1, 3, 4)):
            cache.reset()
            encoded, ids = encode(model, batch_size, seed), tokens(batch_size, seed=seed)
            torch.testing.assert_close(drive(model, ids, encoded, cache), stock(model, ids, encoded))
            assert cache.batch_size == batch_size
        assert addresses(cache) == before

    def test_a_shorter_source_is_served(self):
        model = tiny_model()
        cache = EncoderDecoderStaticCache(model.config, max_batch_size=2)
        ids = tokens(2)
        encoded = (encode(model, 2)[0][:, :17],)
        torch.testing.assert_close(drive(model, ids, encoded, cache), stock(model, ids, encoded))
        assert cache.cross_attention_cache.get_seq_length() == 17

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype):
        model = tiny_model(dtype=dtype)
        cache = EncoderDecoderStaticCache(model.config, dtype=dtype)
        encoded, ids = encode(model), tokens()
        torch.testing.assert_close(drive(model, ids, encoded, cache), stock(model, ids, encoded), atol=0.1, rtol=0.05)

    def test_without_no_grad_the_buffers_stay_out_of_the_graph(self, model):
        cache = EncoderDecoderStaticCache(model.config)
        outputs = model(encoder_outputs=(encode(model)[0],), decoder_input_ids=tokens(length=3), **{CACHE_NAME: cache})
        assert outputs.logits.requires_grad
        assert not any(buffer.requires_grad for layer in cache.layer_buffers for buffer in layer)

    def test_a_b_a_gives_a_again_bit_for_bit(self, model):
        cache = EncoderDecoderStaticCache(model.config, max_batch_size=3)
        a, b = (encode(model, 2, seed=1), tokens(2, seed=1)), (encode(model, 3, seed=2), tokens(3, seed=2))
        results = []
        for encoded, ids in (a, b, a):
            cache.reset()
            results.append(drive(model, ids, encoded, cache))
        assert torch.equal(results[0], results[2])
        assert results[0].shape != results[1].shape

    def test_reset_leaves_no_trace_of_nan(self, model):
        cache = EncoderDecoderStaticCache(model.config, max_batch_size=2)
        encoded, ids = encode(model), tokens()
        expected = drive(model, ids, encoded, cache)
        before = addresses(cache)
        for layer in cache.layer_buffers:
            for buffer in layer:
                buffer.fill_(torch.nan)
        cache.reset()
        assert not any(buffer.any() for layer in cache.layer_buffers for buffer in layer)
        assert cache.get_seq_length() == 0 and cache.batch_size == 0 and not any(cache.is_updated.values())
        assert torch.equal(drive(model, ids, encoded, cache), expected)
        assert addresses(cache) == before

    def test_a_copy_goes_on_by_itself(self, model):
        cache = EncoderDecoderStaticCache(model.config, max_batch_size=2)
        encoded, ids, other = encode(model), tokens(), tokens(seed=5)
        drive(model, ids[:, :PROMPT], encoded, cache)
        twin = copy.deepcopy(cache)
        assert not set(addresses(twin)) & set(addresses(cache))
        rest = [forward(model, ids[:, PROMPT + step, None], encoded, cache) for step in range(STEPS)]
        for step in range(2):
            forward(model, other[:, step, None], encoded, twin)
        assert (int(cache.get_seq_length()), int(twin.get_seq_length())) == (PROMPT + STEPS, PROMPT + 2)
        torch.testing.assert_close(torch.cat(rest, dim=1), stock(model, ids, encoded)[:, PROMPT:])
        mixed = torch.cat([ids[:, :PROMPT], other[:, :2]], dim=1)
        twin.crop(-1)
        last = forward(model, other[:, 1:2], encoded, twin)
        torch.testing.assert_close(last, stock(model, mixed, encoded)[:, -1:])

    def test_a_length_read_before_a_step_does_not_move_with_it(self, model):
        cache = EncoderDecoderStaticCache(model.config)
        encoded = encode(model)
        forward(model, tokens(length=3), encoded, cache)
        before = cache.get_seq_length()
        forward(model, tokens(length=1), encoded, cache)
        assert int(before) == 3 and int(cache.get_seq_length()) == 4


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh_dynamo(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_one_graph_serves_every_step_and_every_recording(self, model, batch_size):
        counter = CompileCounter()
        step = torch.compile(model.forward, fullgraph=True, backend=counter)
        cache = EncoderDecoderStaticCache(model.config, max_batch_size=2)
        for seed, prompt in enumerate((PROMPT, 2, 5)):
            cache.reset()
            encoded, ids = encode(model, batch_size, seed), tokens(batch_size, seed=seed)
            logits = drive(model, ids, encoded, cache, prompt=prompt, step=step)
            torch.testing.assert_close(logits, stock(model, ids, encoded))
            assert int(cache.get_seq_length()) == PROMPT + STEPS
        assert counter.frame_count == 1

    def test_a_compiled_prefill(self, model):
        step = torch.compile(model.forward, fullgraph=True, backend="eager")
        cache = EncoderDecoderStaticCache(model.config, max_batch_size=2)
        encoded, ids = encode(model), tokens()
        logits = forward(model, ids, encoded, cache, position=torch.arange(PROMPT + STEPS), step=step)
        torch.testing.assert_close(logits, stock(model, ids, encoded))
        assert int(cache.get_seq_length()) == PROMPT + STEPS and cache.batch_size == 1

    def test_inductor(self, model):
        step = torch.compile(model.forward, fullgraph=True)
        cache = EncoderDecoderStaticCache(model.config, max_batch_size=3)
        before = addresses(cache)
        encoded, ids = encode(model, 2), tokens(2)
        logits = drive(model, ids, encoded, cache, step=step)
        torch.testing.assert_close(logits, stock(model, ids, encoded), atol=1e-4, rtol=1e-4)
        assert addresses(cache) == before

    @pytest.mark.gpu
    def test_cuda_graphs_and_no_wait_for_the_host(self, model):
        model = copy.deepcopy(model).cuda()
        step = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead")
        cache = EncoderDecoderStaticCache(model.config, max_batch_size=3, device="cuda")
        before = addresses(cache)
        encoded, ids = (encode(model, 2)[0],), tokens(2).cuda()
        for _ in range(2):
            cache.reset()
            logits = drive(model, ids, encoded, cache, step=step)
            torch.testing.assert_close(logits, stock(model, ids, encoded), atol=1e-3, rtol=1e-3)
        position = torch.tensor([PROMPT + STEPS], device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward(model, ids[:, :1], encoded, cache, position=position, step=step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert addresses(cache) == before


class TestRowsAndLengths:
    @pytest.fixture
    def cache(self):
        return EncoderDecoderStaticCache(tiny_config(), max_batch_size=4)

    @pytest.mark.parametrize(
        ("change", "rows"),
        [
            (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [2, 1]),
            (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [2, 2]),
            (lambda cache: cache.batch_repeat_interleave(1), [1, 2]),
            (lambda cache: cache.batch_repeat_interleave(2), [1, 1, 2, 2]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1])), [2]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1, 0, 1])), [2, 1, 2]),
            (lambda cache: cache.batch_select_indices([-1]), [2]),
            (lambda cache: cache.batch_select_indices(torch.tensor([False, True])), [2]),
        ],
    )
    def test_rows_move_in_place(self, cache, change, rows):
        before = addresses(fill(cache))
        change(cache)
        assert held_rows(cache) == rows
        assert cache.batch_size == len(rows)
        assert int(cache.get_seq_length()) == 3
        assert addresses(cache) == before

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda cache: cache.batch_repeat_interleave(3), ValueError, "max_batch_size=4 and 6 rows"),
            (lambda cache: cache.batch_repeat_interleave(0), ValueError, "at least 1"),
            (lambda cache: cache.batch_repeat_interleave(1.5), TypeError, "integer"),
            (lambda cache: cache.batch_select_indices(torch.arange(5) % 2), ValueError, "max_batch_size=4 and 5 rows"),
            (lambda cache: cache.batch_select_indices(torch.tensor([False, False])), ValueError, "0 rows"),
            (lambda cache: cache.batch_select_indices(torch.tensor([2])), IndexError, "out of bounds"),
        ],
    )
    def test_rows_that_do_not_fit_change_nothing(self, cache, change, error, message):
        fill(cache)
        with pytest.raises(error, match=message):
            change(cache)
        assert held_rows(cache) == [1, 2]

    def test_an_empty_cache_has_no_rows_to_move(self, cache):
        cache.reorder_cache(torch.tensor([0]))
        cache.batch_select_indices(torch.tensor([0]))
        assert cache.batch_size == 0

    def test_reordered_beams_give_stocks_logits(self, model):
        cache = EncoderDecoderStaticCache(model.config, max_batch_size=3)
        reference = EncoderDecoderCache(DynamicCache(), DynamicCache())
        encoded, ids, beams = encode(model, 3), tokens(3), torch.tensor([2, 0, 0])
        results = []
        for each in (cache, reference):
            forward(model, ids[:, :PROMPT], encoded, each)
            each.reorder_cache(beams)
            results.append(forward(model, ids[:, PROMPT, None], encoded, each))
        torch.testing.assert_close(*results)

    @pytest.mark.parametrize(("tokens_given", "length"), [(5, 5), (99, 10), (-1, 9), (-4, 6), (-10, 0), (-99, 0)])
    def test_crop_understands_both_conventions(self, cache, tokens_given, length):
        fill(cache, length=10)
        cache.crop(tokens_given)
        assert int(cache.get_seq_length()) == length
        assert cache.cross_attention_cache.get_seq_length() == SOURCE

    def test_crop_of_zero_is_the_releases_own(self, cache):
        keeps_none = "maximum_length" in inspect.signature(EncoderDecoderCache.crop).parameters
        fill(cache, length=10)
        cache.crop(0)
        assert int(cache.get_seq_length()) == (0 if keeps_none else 10)

    def test_tokens_after_a_crop_overwrite_what_was_there(self, model):
        cache = EncoderDecoderStaticCache(model.config)
        encoded, ids = encode(model), tokens()
        drive(model, torch.cat([ids[:, :PROMPT], tokens(seed=7)], dim=1), encoded, cache)
        cache.crop(PROMPT)
        logits = [forward(model, ids[:, index, None], encoded, cache) for index in range(PROMPT, PROMPT + STEPS)]
        torch.testing.assert_close(torch.cat(logits, dim=1), stock(model, ids, encoded)[:, PROMPT:])

    def test_the_halves_refuse_to_change_alone(self, cache):
        for half in (cache.self_attention_cache, cache.cross_attention_cache):
            for change in (half.reset, lambda half=half: half.crop(1), lambda half=half: half.reorder_cache([0])):
                with pytest.raises(TypeError, match="on the EncoderDecoderStaticCache"):
                    change()

    def test_mark_filled_lets_a_caller_go_on_after_an_engine(self, model):
        encoded, ids = encode(model, 2), tokens(2)
        source = EncoderDecoderStaticCache(model.config, max_batch_size=2)
        drive(model, ids[:, :PROMPT], encoded, source)
        cache = EncoderDecoderStaticCache(model.config, max_batch_size=3)
        for mine, theirs in zip(cache.layer_buffers, source.layer_buffers):
            for target, buffer in zip(mine, theirs):
                target[:2] = buffer
        cache.mark_filled(2, PROMPT)
        assert (cache.batch_size, int(cache.get_seq_length())) == (2, PROMPT)
        logits = [forward(model, ids[:, index, None], encoded, cache) for index in range(PROMPT, PROMPT + STEPS)]
        torch.testing.assert_close(torch.cat(logits, dim=1), stock(model, ids, encoded)[:, PROMPT:])
        with pytest.raises(ValueError, match=r"\(3, 40, 30\).*\(4, 1, 30\)"):
            cache.mark_filled(4, 1)

    def test_to_the_same_device_moves_nothing(self, cache):
        before = addresses(fill(cache))
        assert cache.to("cpu") is cache
        assert addresses(cache) == before

    def test_to_another_device(self, cache):
        assert cache.to("meta") is cache
        assert cache.device.type == "meta" and cache.dtype == torch.float32
        assert all(buffer.device.type == "meta" for layer in cache.layer_buffers for buffer in layer)

    @pytest.mark.gpu
    def test_to_a_gpu_and_on(self, model):
        cache = EncoderDecoderStaticCache(model.config)
        encoded, ids = encode(model), tokens()
        forward(model, ids[:, :PROMPT], encoded, cache)
        assert cache.to("cuda").device == torch.device("cuda", torch.cuda.current_device())
        on_gpu = copy.deepcopy(model).cuda()
        logits = forward(on_gpu, ids[:, PROMPT, None].cuda(), (encoded[0].cuda(),), cache)
        assert cache.get_seq_length().is_cuda
        expected = stock(model, ids[:, : PROMPT + 1], encoded)[:, -1:]
        torch.testing.assert_close(logits.cpu(), expected, atol=1e-3, rtol=1e-3)


class TestWhatDoesNotFit:
    @pytest.fixture
    def cache(self):
        return EncoderDecoderStaticCache(tiny_config(), max_batch_size=2, max_cache_len=20)

    def test_check_fits_accepts_what_fits(self, cache):
        for batch_size in (1, 2):
            assert cache.check_fits(tiny_config(), batch_size, 20, torch.float32, "cpu") is None

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"batch_size": 3}, "max_batch_size=2 .* 3 rows"),
            ({"length": 21}, "max_cache_len=20 .* 21"),
            ({"dtype": torch.float16}, "torch.float32 .* torch.float16"),
            ({"device": "meta"}, "cpu .* meta"),
            ({"config": tiny_config(decoder_layers=2)}, "3 layers .* 2 layers"),
            ({"config": tiny_config(decoder_attention_heads=8)}, "4 heads of 8 .* 8 heads of 4"),
            ({"config": tiny_config(d_model=64)}, "4 heads of 8 .* 4 heads of 16"),
        ],
    )
    def test_check_fits_names_both_numbers(self, cache, change, message):
        call = {"config": tiny_config(), "batch_size": 1, "length": 1, "dtype": torch.float32, "device": "cpu"}
        with pytest.raises(ValueError, match=message):
            cache.check_fits(**{**call, **change})

    def test_a_batch_above_the_maximum(self, model, cache):
        with pytest.raises(ValueError, match=r"max_batch_size=2 .* batch of 3"):
            forward(model, tokens(3, 2), encode(model, 3), cache)
        assert cache.batch_size == 0 and cache.get_seq_length() == 0

    def test_another_batch_without_reset(self, model, cache):
        forward(model, tokens(2, 2), encode(model, 2), cache)
        with pytest.raises(ValueError, match=r"holds 2 rows .* batch of 1"):
            forward(model, tokens(1, 1), encode(model, 1), cache)

    def test_a_prompt_above_the_length(self, model, cache):
        with pytest.raises(ValueError, match=r"20 positions and the call has 21"):
            forward(model, tokens(1, 21), encode(model), cache)

    def test_one_token_above_the_length(self, model, cache):
        encoded = encode(model)
        forward(model, tokens(1, 19), encoded, cache)
        forward(model, tokens(1, 1), encoded, cache)
        with pytest.raises(ValueError, match=r"20 positions and this call needs 21"):
            forward(model, tokens(1, 1), encoded, cache)
        assert int(cache.get_seq_length()) == 20

    def test_a_source_above_the_length(self, model):
        cache = EncoderDecoderStaticCache(model.config, max_source_len=20)
        with pytest.raises(ValueError, match=r"20 source positions and the call has 30"):
            forward(model, tokens(1, 1), encode(model), cache)

    def test_another_dtype(self):
        model = tiny_model(dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"torch.float32 .* torch.bfloat16"):
            forward(model, tokens(1, 2), encode(model), EncoderDecoderStaticCache(model.config))

    def test_another_device(self, model, cache):
        with pytest.raises(ValueError, match=r"meta .* cpu"):
            forward(model, tokens(1, 2), encode(model), cache.to("meta"))

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"decoder_attention_heads": 2}, "4 heads of 8 .* 2 of 16"),
            ({"decoder_layers": 4}, "3 layers .* more than 3"),
        ],
    )
    def test_a_model_of_another_shape(self, cache, overrides, message):
        model = tiny_model(**overrides)
        with pytest.raises(ValueError, match=message):
            forward(model, tokens(1, 2), encode(model), cache)

    def test_a_model_of_fewer_layers_is_found_at_its_second_pass(self, cache):
        model = tiny_model(decoder_layers=2)
        encoded = encode(model)
        forward(model, tokens(1, 2), encoded, cache)
        with pytest.raises(ValueError, match=r"3 layers .* did not reach the last"):
            forward(model, tokens(1, 1), encoded, cache)

    def test_reset_after_a_failed_pass(self, model, cache, monkeypatch):
        encoded, ids = encode(model), tokens()
        layer = model.model.decoder.layers[1]
        with monkeypatch.context() as patch:
            patch.setattr(layer.fc1, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                forward(model, ids, encoded, cache)
        cache.reset()
        torch.testing.assert_close(drive(model, ids, encoded, cache), stock(model, ids, encoded))


def test_transformers_own_classes_are_untouched():
    import transformers.cache_utils as theirs

    assert theirs.EncoderDecoderCache is EncoderDecoderCache
    registered = [getattr(theirs, name, {}) for name in ("STATIC_LAYER_TYPE_MAPPING", "LAYER_TYPE_CACHE_MAPPING")]
    assert not any(cls.__module__.startswith("whisper_static_cache") for table in registered for cls in table.values())
    assert isinstance(tiny_config(), WhisperConfig)
