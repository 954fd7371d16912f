# Copyright 2026 The HuggingFace Inc. team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Whisper on a static cache that outlives a call: smaller batches, other lengths, long recordings."""

import unittest

from transformers import WhisperConfig, is_torch_available, set_seed
from transformers.testing_utils import require_torch


if is_torch_available():
    import torch

    from transformers import EncoderDecoderStaticCache, GenerationConfig, WhisperForConditionalGeneration


def tiny_whisper():
    """A random model whose logits differ clearly from token to token, with a complete generation config."""
    config = WhisperConfig(
        vocab_size=200,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=64,
        max_source_positions=30,
        max_target_positions=40,
        pad_token_id=100,
        bos_token_id=100,
        eos_token_id=100,
        decoder_start_token_id=101,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    set_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)
    model.generation_config = GenerationConfig(
        pad_token_id=100,
        bos_token_id=100,
        eos_token_id=100,
        decoder_start_token_id=101,
        is_multilingual=True,
        lang_to_id={"<|en|>": 102, "<|de|>": 103, "<|fr|>": 104},
        task_to_id={"translate": 105, "transcribe": 106},
        no_timestamps_token_id=110,
        prev_sot_token_id=108,
        max_initial_timestamp_index=10,
        suppress_tokens=[1, 2, 7, 108, 109, *range(111, 116)],
        begin_suppress_tokens=[20, 100],
        max_length=40,
    )
    return model


def features(batch_size=1, windows=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, 8, int(60 * windows), generator=generator)


@require_torch
class WhisperStaticCacheTest(unittest.TestCase):
    def setUp(self):
        self.model = tiny_whisper()

    def assert_static_is_dynamic(self, inputs, **kwargs):
        expected = self.model.generate(inputs, **kwargs)
        actual = self.model.generate(inputs, cache_implementation="static", **kwargs)
        self.assertEqual(expected.tolist(), actual.tolist())

    def test_batch_size_may_change_between_calls(self):
        # 42454
        for batch_size in (3, 1, 2, 3, 4, 1):
            self.assert_static_is_dynamic(features(batch_size, seed=batch_size), language="en")

    def test_smaller_batches_are_served_by_the_same_buffers(self):
        # 35444
        self.model.generate(features(4), cache_implementation="static", language="en")
        cache = self.model._cache
        address = cache.layer_buffers[0].self_keys.data_ptr()
        for batch_size in (1, 3, 2):
            self.model.generate(features(batch_size), cache_implementation="static", language="en")
            self.assertIs(self.model._cache, cache)
            self.assertEqual(cache.layer_buffers[0].self_keys.data_ptr(), address)

    def test_a_later_call_may_be_longer(self):
        # 30351
        for max_new_tokens in (4, 20, 2, 30):
            self.assert_static_is_dynamic(features(2), max_new_tokens=max_new_tokens)

    def test_long_form_with_a_shrinking_batch(self):
        mask = torch.ones(3, 180, dtype=torch.long)
        mask[1, 100:] = 0
        mask[2, 40:] = 0
        for condition_on_prev_tokens in (False, True):
            self.assert_static_is_dynamic(
                features(3, windows=3.0),
                return_timestamps=True,
                attention_mask=mask,
                condition_on_prev_tokens=condition_on_prev_tokens,
            )

    def test_beam_search(self):
        self.assert_static_is_dynamic(features(2), num_beams=3, language="en")

    def test_a_cache_of_the_callers(self):
        cache = EncoderDecoderStaticCache(self.model.config, max_batch_size=3)
        for batch_size in (2, 3, 1):
            inputs = features(batch_size, seed=batch_size)
            expected = self.model.generate(inputs, language="en")
            actual = self.model.generate(inputs, language="en", past_key_values=cache)
            self.assertEqual(expected.tolist(), actual.tolist())

    def test_what_does_not_fit_is_named(self):
        cache = EncoderDecoderStaticCache(self.model.config, max_batch_size=1)
        with self.assertRaisesRegex(ValueError, "max_batch_size=1 and the call has"):
            self.model.generate(features(2), language="en", past_key_values=cache)

    def test_reset_frees_nothing_and_forgets_all(self):
        cache = EncoderDecoderStaticCache(self.model.config)
        addresses = [buffer.data_ptr() for layer in cache.layer_buffers for buffer in layer]
        ids = torch.tensor([[101, 102, 106]])
        with torch.no_grad():
            first = self.model(features(), decoder_input_ids=ids, past_key_values=cache).logits
            cache.reset()
            self.assertEqual(cache.get_seq_length(), 0)
            again = self.model(features(), decoder_input_ids=ids, past_key_values=cache).logits
        self.assertTrue(torch.equal(first, again))
        self.assertEqual(addresses, [buffer.data_ptr() for layer in cache.layer_buffers for buffer in layer])

    def test_step_by_step_and_reordered(self):
        cache = EncoderDecoderStaticCache(self.model.config, max_batch_size=2)
        ids = torch.tensor([[101, 102, 106, 5], [101, 103, 106, 9]])
        inputs = features(2)
        with torch.no_grad():
            expected = self.model(inputs.flip(0), decoder_input_ids=ids.flip(0)).logits[:, -1]
            encoded = self.model.model.encoder(inputs)
            self.model(encoder_outputs=encoded, decoder_input_ids=ids[:, :3], past_key_values=cache)
            cache.reorder_cache(torch.tensor([1, 0]))
            actual = self.model(encoder_outputs=encoded, decoder_input_ids=ids.flip(0)[:, 3:], past_key_values=cache)
        torch.testing.assert_close(actual.logits[:, -1], expected)
