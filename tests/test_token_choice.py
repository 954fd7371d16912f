"""Choosing tokens: what transformers reads of it. The loop itself is tested in `test_generation_whisper.py`."""

import pytest
import torch

from whisper_static_cache import _compat


@pytest.mark.parametrize("length", [1, 2, 127, 448])
def test_the_average_of_log_probabilities_is_transformers_own_to_the_last_bit(length):
    torch.manual_seed(length)
    for spread in (0.1, 1.0, 30.0):
        logprobs = -spread * torch.rand(length)
        running = sum(logprobs[index] for index in range(length)) / length
        actual = _compat.average_logprob(logprobs, torch.zeros(length), (), {})
        assert actual.shape == () and torch.equal(actual, running)
    logprobs[length // 2] = -torch.inf
    assert _compat.average_logprob(logprobs, torch.zeros(length), (), {}) == -torch.inf


def test_a_mask_is_kept_for_the_lists_that_come_again():
    from transformers.generation.logits_process import LogitsProcessorList, SuppressTokensLogitsProcessor

    from whisper_static_cache.logits_process import build_plan

    def masked(ids):
        plan = build_plan(LogitsProcessorList([SuppressTokensLogitsProcessor(ids, device="cpu")]), 1, 9, "cpu")
        with torch.inference_mode():
            scores = plan.rest(torch.zeros(1, 9, dtype=torch.int64), torch.tensor(2), torch.zeros(1, 9))
        return plan._processors[0].mask, scores.isinf().nonzero()[:, 1].tolist()

    (first, found), (again, _), (other, differs) = masked([3, 5]), masked([5, 3]), masked([3])
    assert first is again and first is not other
    assert (found, differs) == ([3, 5], [3])
    assert not first.is_inference()
