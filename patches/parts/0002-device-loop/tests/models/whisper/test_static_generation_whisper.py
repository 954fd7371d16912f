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
"""Whisper's loop on a static cache: which decodes it serves, and that they give what the loop before it gave."""

import unittest

from transformers import LogitsProcessor, LogitsProcessorList, is_torch_available, set_seed
from transformers.testing_utils import require_torch

from .test_cache_whisper import features, tiny_whisper


if is_torch_available():
    import torch

    from transformers import EncoderDecoderStaticCache
    from transformers.models.whisper.static_generation_whisper import last_run


class FavourThree(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 3] += 5.0
        return scores


@require_torch
class WhisperStaticGenerationTest(unittest.TestCase):
    def setUp(self):
        self.model = tiny_whisper()

    def assert_static_is_dynamic(self, inputs, engine="eager", **kwargs):
        set_seed(0)
        expected = self.model.generate(inputs, **kwargs)
        self.assertEqual(last_run(self.model).engine, "stock")
        set_seed(0)
        actual = self.model.generate(inputs, cache_implementation="static", **kwargs)
        self.assertEqual(last_run(self.model).engine, engine, last_run(self.model).reason)
        self.assertEqual(expected.tolist(), actual.tolist())

    def test_greedy(self):
        for batch_size in (1, 3):
            self.assert_static_is_dynamic(features(batch_size))

    def test_timestamps_and_long_form(self):
        self.assert_static_is_dynamic(features(2), return_timestamps=True)
        mask = torch.ones(2, 180, dtype=torch.long)
        mask[1, 100:] = 0
        for condition_on_prev_tokens in (False, True):
            self.assert_static_is_dynamic(
                features(2, windows=3.0),
                return_timestamps=True,
                attention_mask=mask,
                condition_on_prev_tokens=condition_on_prev_tokens,
            )

    def test_sampling_and_fallback(self):
        self.assert_static_is_dynamic(features(2), do_sample=True, top_k=5, temperature=0.7)
        self.assert_static_is_dynamic(
            features(2, windows=2.0),
            return_timestamps=True,
            attention_mask=torch.ones(2, 120, dtype=torch.long),
            temperature=(0.0, 0.4, 0.8),
            compression_ratio_threshold=1.35,
            logprob_threshold=-0.5,
            no_speech_threshold=0.1,
        )

    def test_processors_in_tensor_code(self):
        self.assert_static_is_dynamic(features(2), repetition_penalty=1.7, no_repeat_ngram_size=2, min_new_tokens=8)

    def test_a_processor_of_the_callers(self):
        processors = LogitsProcessorList([FavourThree()])
        self.assert_static_is_dynamic(features(2), logits_processor=processors)

    def test_scores(self):
        kwargs = {"return_dict_in_generate": True, "output_scores": True, "language": "en"}
        expected = self.model.generate(features(2), **kwargs)
        actual = self.model.generate(features(2), cache_implementation="static", **kwargs)
        self.assertEqual(len(expected.scores), len(actual.scores))
        for one, other in zip(expected.scores, actual.scores):
            torch.testing.assert_close(one, other)

    def test_what_is_not_served_falls_back_and_says_why(self):
        self.assert_static_is_dynamic(
            features(), engine="stock", return_dict_in_generate=False, output_hidden_states=False, use_cache=False
        )
        self.assertIn("use_cache", last_run(self.model).reason)

    def test_a_cache_of_the_callers(self):
        cache = EncoderDecoderStaticCache(self.model.config, max_batch_size=2)
        for batch_size in (2, 1):
            expected = self.model.generate(features(batch_size), language="en")
            actual = self.model.generate(features(batch_size), language="en", past_key_values=cache)
            self.assertEqual(last_run(self.model).engine, "eager")
            self.assertEqual(expected.tolist(), actual.tolist())

    def test_weights_may_change_between_calls(self):
        self.assert_static_is_dynamic(features())
        with torch.no_grad():
            self.model.model.decoder.layers[0].fc1.weight.normal_(0.0, 0.25)
        self.assert_static_is_dynamic(features())
