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
"""Whisper's beam search on a static cache: the beams of an input share its cross-attention keys and values."""

import unittest

from transformers import is_torch_available, set_seed
from transformers.testing_utils import require_torch

from .test_cache_whisper import features, tiny_whisper


if is_torch_available():
    import torch

    from transformers import EncoderDecoderStaticCache
    from transformers.models.whisper.static_generation_whisper import last_run


@require_torch
class WhisperSharedBeamsTest(unittest.TestCase):
    def setUp(self):
        self.model = tiny_whisper()

    def assert_static_is_dynamic(self, inputs, **kwargs):
        set_seed(0)
        expected = self.model.generate(inputs, **kwargs)
        set_seed(0)
        actual = self.model.generate(inputs, cache_implementation="static", **kwargs)
        self.assertEqual(last_run(self.model).engine, "eager", last_run(self.model).reason)
        self.assertEqual(expected.tolist(), actual.tolist())

    def test_beams(self):
        for num_beams in (2, 3, 5):
            for batch_size in (1, 2, 3):
                self.assert_static_is_dynamic(features(batch_size), num_beams=num_beams)

    def test_lengths_and_sequences(self):
        self.assert_static_is_dynamic(features(2), num_beams=3, num_return_sequences=2)
        self.assert_static_is_dynamic(features(2), num_beams=3, length_penalty=-1.0, early_stopping=True)
        self.assert_static_is_dynamic(features(2), num_beams=3, length_penalty=2.0, early_stopping="never")

    def test_sampling_beams(self):
        self.assert_static_is_dynamic(features(2), num_beams=3, do_sample=True, top_k=20)

    def test_long_form_with_fallback(self):
        self.assert_static_is_dynamic(
            features(2, windows=2.0),
            num_beams=3,
            return_timestamps=True,
            attention_mask=torch.ones(2, 120, dtype=torch.long),
            temperature=(0.0, 0.4, 0.8),
            compression_ratio_threshold=1.35,
            logprob_threshold=-0.5,
        )

    def test_a_cache_with_a_cross_attention_row_per_input(self):
        expected = self.model.generate(features(2), language="en", num_beams=5)
        cache = EncoderDecoderStaticCache(self.model.config, max_batch_size=10, max_inputs=2)
        self.assertEqual(cache.layer_buffers[0].self_keys.shape[0], 10)
        self.assertEqual(cache.layer_buffers[0].cross_keys.shape[0], 2)
        for _ in range(2):
            actual = self.model.generate(features(2), language="en", num_beams=5, past_key_values=cache)
            self.assertEqual(expected.tolist(), actual.tolist())

    def test_cross_attention_is_written_once(self):
        cache = EncoderDecoderStaticCache(self.model.config, max_batch_size=6, max_inputs=2)
        keys = cache.layer_buffers[0].cross_keys
        self.model.generate(features(2), language="en", num_beams=3, past_key_values=cache)
        # By the resets before and after, and by the projection: beams move nothing.
        self.assertLessEqual(keys._version, 5)
