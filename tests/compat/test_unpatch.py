"""unpatch() leaves transformers byte for byte as it was: each class, each attribute, each function's code."""

import inspect
import marshal
import sys

import pytest
import torch
from transformers import WhisperForConditionalGeneration
from transformers.generation import GenerationMixin

import whisper_static_cache
from whisper_static_cache.compat_symbols import NEWEST

from ..conftest import tiny_features, tiny_model


def classes():
    """Every class that a loaded module of transformers' Whisper, generation or caches defines."""
    for name, module in sorted(sys.modules.items()):
        if name.startswith(("transformers.models.whisper", "transformers.generation", "transformers.cache_utils")):
            for value in list(vars(module).values()):
                if inspect.isclass(value) and value.__module__ == name:
                    yield value


def code_of(value):
    """What a function (or method, or property) is made of: bytecode, with file and lines, defaults and attributes."""
    function = inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    # Version 0 writes nothing that depends on how often an object is referred to.
    return marshal.dumps(code, 0), repr(function.__defaults__), sorted(vars(function))


def snapshot():
    return {cls: [(name, value, code_of(value)) for name, value in vars(cls).items()] for cls in classes()}


def assert_unchanged(before):
    for cls, attributes in before.items():
        now = snapshot_of(cls)
        assert [name for name, _, _ in now] == [name for name, _, _ in attributes], cls
        for (name, was, code), (_, value, code_now) in zip(attributes, now):
            assert value is was, f"{cls.__qualname__}.{name} is another object"
            assert code_now == code, f"{cls.__qualname__}.{name} has other code"


def snapshot_of(cls):
    return [(name, value, code_of(value)) for name, value in vars(cls).items()]


@pytest.fixture(autouse=True)
def unpatched():
    yield
    whisper_static_cache.unpatch()


def test_unpatching_after_use_leaves_everything_as_it_was():
    model = tiny_model()
    features = tiny_features(2, windows=2.3)
    mask = torch.ones(2, features.shape[-1], dtype=torch.long)
    arguments = {
        "attention_mask": mask,
        "return_timestamps": True,
        "temperature": (0.0, 0.5),
        "logprob_threshold": 0.0,
    }
    model.generate(features, **arguments)  # what transformers loads and keeps by itself is there before
    before = snapshot()
    assert WhisperForConditionalGeneration in before and GenerationMixin in before and len(before) > 60
    own = dict(vars(model))
    whisper_static_cache.patch()
    with pytest.raises(AssertionError, match="WhisperForConditionalGeneration"):
        assert_unchanged(before)
    model.generate(features, **arguments)
    model.generate(features[..., :60], num_beams=2)
    whisper_static_cache.unpatch()
    assert_unchanged(before)
    assert vars(model).keys() == own.keys()


def rename(monkeypatch, owner, name):
    monkeypatch.setattr(owner, f"{name}_tokens", vars(owner)[name], raising=False)
    monkeypatch.delattr(owner, name)


def test_a_renamed_sample_is_refused_and_nothing_patched(monkeypatch):
    rename(monkeypatch, GenerationMixin, "_sample")
    before = snapshot()
    with pytest.raises(RuntimeError) as error:
        whisper_static_cache.patch()
    assert_unchanged(before)
    assert not whisper_static_cache.is_patched()
    message = str(error.value)
    assert "WhisperForConditionalGeneration._sample is missing" in message
    assert "(self, input_ids, logits_processor, stopping_criteria, generation_config" in message
    assert f"the newest known to work is {NEWEST}" in message


def test_another_signature_is_refused_with_both_of_them(monkeypatch):
    def _sample(self, tokens, *, config):
        raise AssertionError

    monkeypatch.setattr(GenerationMixin, "_sample", _sample)
    before = snapshot()
    with pytest.raises(RuntimeError) as error:
        whisper_static_cache.patch(tiny_model())
    assert_unchanged(before)
    message = str(error.value)
    assert "has the parameters (self, tokens, config) where (self, input_ids, logits_processor" in message
    assert f"the newest known to work is {NEWEST}" in message


def test_an_unknown_release_with_the_same_signatures_is_patched(monkeypatch):
    import transformers

    stock = GenerationMixin._sample

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False,
                streamer=None, novelty=None, **model_kwargs):  # fmt: skip
        return stock(
            self,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus,
            streamer,
            **model_kwargs,
        )

    monkeypatch.setattr(transformers, "__version__", "9.0.0")
    monkeypatch.setattr(GenerationMixin, "_sample", _sample)
    model, features = tiny_model(), tiny_features(2)
    expected = model.generate(features)
    whisper_static_cache.patch()
    assert torch.equal(model.generate(features), expected)
    assert whisper_static_cache.last_run(model).engine == "eager"
