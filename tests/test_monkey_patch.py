"""patch(), unpatch() and their kin: what is switched on, what is restored, and what is refused."""

import subprocess
import sys
import threading

import pytest
import torch
from transformers import WhisperForConditionalGeneration

import whisper_static_cache
from whisper_static_cache import monkey_patch

from .conftest import tiny_features, tiny_model


ATTRIBUTES = ("generate", "_sample", "_retrieve_avg_logprobs", "_beam_search", "forward", "_need_fallback")


def attributes():
    """What each attribute is, and whether the class has it of its own."""
    own = vars(WhisperForConditionalGeneration)
    return {name: (getattr(WhisperForConditionalGeneration, name), own.get(name)) for name in ATTRIBUTES}


@pytest.fixture(autouse=True)
def unpatched():
    yield
    whisper_static_cache.unpatch()


def test_unpatch_restores_the_identical_objects():
    before = attributes()
    whisper_static_cache.patch()
    assert attributes()["_sample"][0] is not before["_sample"][0]
    whisper_static_cache.unpatch()
    after = attributes()
    assert all(after[name][part] is before[name][part] for name in ATTRIBUTES for part in (0, 1))


def test_patching_twice_is_patching_once():
    before = attributes()
    whisper_static_cache.patch()
    once = attributes()
    whisper_static_cache.patch(engine="eager")
    assert attributes() == once
    whisper_static_cache.unpatch()
    assert attributes() == before
    whisper_static_cache.unpatch()
    assert attributes() == before


def test_patch_from_many_threads():
    before = attributes()
    barrier = threading.Barrier(8)

    def work():
        barrier.wait()
        for _ in range(20):
            whisper_static_cache.patch()
            whisper_static_cache.unpatch()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert attributes() == before
    assert not whisper_static_cache.is_patched()


def test_one_model_only():
    ours, other = tiny_model(0), tiny_model(1)
    whisper_static_cache.patch(ours)
    assert whisper_static_cache.is_patched(ours)
    assert not whisper_static_cache.is_patched(other)
    assert not whisper_static_cache.is_patched()
    ours.generate(tiny_features())
    other.generate(tiny_features())
    assert whisper_static_cache.last_run(ours).engine == "eager"
    with pytest.raises(ValueError, match="has not generated"):
        whisper_static_cache.last_run(other)
    whisper_static_cache.unpatch(ours)
    assert not whisper_static_cache.is_patched(ours)


def test_context_manager_restores_what_was_there():
    before = attributes()
    model = tiny_model()
    with whisper_static_cache.patched():
        assert whisper_static_cache.is_patched()
        with whisper_static_cache.patched(engine="eager"):
            assert monkey_patch.setting_of(model).engine == "eager"
        assert monkey_patch.setting_of(model).engine == "auto"
    assert attributes() == before
    with pytest.raises(ZeroDivisionError), whisper_static_cache.patched(model):
        1 / 0  # noqa: B018
    assert attributes() == before


def test_a_single_models_patch_survives_the_end_of_a_patch_of_all():
    model = tiny_model()
    whisper_static_cache.patch(model, engine="eager")
    with whisper_static_cache.patched():
        pass
    assert whisper_static_cache.is_patched(model)
    assert not whisper_static_cache.is_patched()


@pytest.mark.parametrize("engine", ["cuda", "", None, 3])
def test_an_unknown_engine_is_refused(engine):
    before = attributes()
    with pytest.raises(ValueError, match="use one of 'auto'"):
        whisper_static_cache.patch(engine=engine)
    assert attributes() == before


def test_another_model_is_refused():
    before = attributes()
    with pytest.raises(TypeError, match="pass a WhisperForConditionalGeneration"):
        whisper_static_cache.patch(torch.nn.Linear(2, 2))
    assert attributes() == before


@pytest.mark.parametrize("attribute", ["_sample", "_retrieve_avg_logprobs"])
def test_another_signature_is_refused_and_nothing_patched(monkeypatch, attribute):
    def strange(self, tokens):
        raise AssertionError

    monkeypatch.setattr(WhisperForConditionalGeneration, attribute, strange)
    before = attributes()
    with pytest.raises(RuntimeError, match=f"{attribute} has the parameters"):
        whisper_static_cache.patch()
    assert attributes() == before


def test_a_later_patch_of_somebody_elses_is_left_alone(monkeypatch, caplog):
    whisper_static_cache.patch()

    def theirs(self, *args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(WhisperForConditionalGeneration, "_sample", theirs)
    whisper_static_cache.unpatch()
    assert WhisperForConditionalGeneration._sample is theirs
    assert "replaced by someone else" in caplog.text
    # What they put back on leaving is ours: it must go on working, as stock.
    monkeypatch.undo()
    assert tiny_model().generate(tiny_features()).shape[0] == 1
    del WhisperForConditionalGeneration._sample


def test_import_changes_nothing_and_loads_nothing():
    code = """
import sys, transformers
from transformers.models.whisper import modeling_whisper
before = {n: v for n, v in vars(modeling_whisper.WhisperForConditionalGeneration).items()}
loaded = set(sys.modules)
import whisper_static_cache
ours = [m for m in set(sys.modules) - loaded if not m.startswith("whisper_static_cache")]
assert not ours, ours
after = {n: v for n, v in vars(modeling_whisper.WhisperForConditionalGeneration).items()}
assert before.keys() == after.keys() and all(before[n] is after[n] for n in before)
for optional in ("hqq", "torchao", "soundfile", "triton", "torch._inductor"):
    assert optional in loaded or optional not in sys.modules, optional
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves_and_unknown_ones_do_not():
    for name in whisper_static_cache.__all__:
        assert getattr(whisper_static_cache, name).__doc__, name
    assert set(whisper_static_cache.__all__) <= set(dir(whisper_static_cache))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        whisper_static_cache.nothing  # noqa: B018
