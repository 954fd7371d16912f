"""Deep comparison of what two runs of one program returned."""

import numpy as np
import torch


def assert_same(expected, actual, where="result", *, rtol=1e-4, atol=1e-4):
    """Assert that two results of `generate` (or of a pipeline) are the same.

    Integers, strings and structure must be equal, floats close, -inf in the same places. Key-value caches are compared
    layer by layer. The error names the path to the first difference.
    """
    if isinstance(expected, torch.Tensor):
        assert isinstance(actual, torch.Tensor), f"{where}: {type(actual).__name__} instead of a tensor"
        assert expected.shape == actual.shape, (
            f"{where}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
        )
        assert expected.dtype == actual.dtype, f"{where}: {actual.dtype} instead of {expected.dtype}"
        if expected.is_floating_point():
            torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda m: f"{where}: {m}")
        else:
            assert torch.equal(expected, actual), f"{where}: {actual.tolist()} instead of {expected.tolist()}"
    elif isinstance(expected, np.ndarray):
        np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=where)
    elif isinstance(expected, dict):
        assert list(expected) == list(actual), f"{where}: keys {list(actual)} instead of {list(expected)}"
        for key in expected:
            assert_same(expected[key], actual[key], f"{where}[{key!r}]", rtol=rtol, atol=atol)
    elif isinstance(expected, (list, tuple)):
        assert type(expected) is type(actual), f"{where}: {type(actual).__name__} instead of {type(expected).__name__}"
        assert len(expected) == len(actual), f"{where}: {len(actual)} entries instead of {len(expected)}"
        for index, (one, other) in enumerate(zip(expected, actual)):
            assert_same(one, other, f"{where}[{index}]", rtol=rtol, atol=atol)
    elif hasattr(expected, "self_attention_cache"):
        for part in ("self_attention_cache", "cross_attention_cache"):
            one, other = _layers(getattr(expected, part)), _layers(getattr(actual, part))
            assert_same(one, other, f"{where}.{part}", rtol=rtol, atol=atol)
    elif isinstance(expected, float):
        assert abs(expected - actual) <= atol + rtol * abs(expected), f"{where}: {actual} instead of {expected}"
    else:
        assert expected == actual, f"{where}: {actual!r} instead of {expected!r}"


def _layers(cache):
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache))
