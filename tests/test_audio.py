"""Audio files: any rate and number of channels in, 16 kHz mono out, and a sentence for what is no audio."""

import sys

import numpy as np
import pytest

from whisper_static_cache.audio import AudioError, load_audio


soundfile = pytest.importorskip("soundfile", reason="needs the soundfile package, of the extra audio")
pytest.importorskip("soxr", reason="needs the soxr package, of the extra audio")


def tone(rate, seconds, hertz=440.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_rate_and_number_of_channels(tmp_path, rate, channels):
    path = tmp_path / "tone.wav"
    soundfile.write(path, np.stack([tone(rate, 1.0)] * channels, axis=1), rate, subtype="FLOAT")
    samples = load_audio(path)
    assert samples.dtype == np.float32 and samples.shape == (16000,)
    inner = slice(200, -200)  # a resampling filter rings at the ends
    np.testing.assert_allclose(samples[inner], tone(16000, 1.0)[inner], atol=2e-3)


def test_channels_are_averaged(tmp_path):
    path = tmp_path / "stereo.flac"
    soundfile.write(path, np.stack([tone(16000, 0.5), np.zeros(8000, np.float32)], axis=1), 16000, subtype="PCM_24")
    np.testing.assert_allclose(load_audio(path), tone(16000, 0.5) / 2, atol=1e-5)


@pytest.mark.parametrize(("extension", "tolerance"), [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.2), ("mp3", 0.2)])
def test_formats(tmp_path, extension, tolerance):
    path = tmp_path / f"tone.{extension}"
    soundfile.write(path, tone(16000, 1.0), 16000)
    samples = load_audio(str(path))
    np.testing.assert_allclose(samples[4000:12000].std(), tone(16000, 1.0).std(), atol=tolerance)


def test_another_rate_on_request(tmp_path):
    soundfile.write(tmp_path / "tone.wav", tone(16000, 0.5), 16000)
    assert load_audio(tmp_path / "tone.wav", sampling_rate=8000).shape == (4000,)


@pytest.mark.parametrize("seconds", [1 / 16000, 0.1])
def test_short_and_silent(tmp_path, seconds):
    soundfile.write(tmp_path / "silence.wav", np.zeros(round(16000 * seconds)), 16000)
    samples = load_audio(tmp_path / "silence.wav")
    assert samples.shape == (round(16000 * seconds),) and not samples.any()


def test_what_is_no_audio(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text.wav").write_text("this is not audio, whatever its name says" * 20)
    soundfile.write(tmp_path / "no_samples.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(10, np.nan, np.float32), 16000, subtype="FLOAT")
    for name, message in {
        "missing.wav": "There is no audio file",
        "empty": "is empty",
        "text.wav": "cannot be read as audio",
        "no_samples.wav": "holds no audio",
        "nan.wav": "not finite",
        "": "is a folder",
    }.items():
        with pytest.raises(AudioError, match=message) as caught:
            load_audio(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_truncated_file_gives_a_sentence_or_what_is_there(tmp_path):
    path = tmp_path / "tone.flac"
    soundfile.write(path, tone(16000, 2.0), 16000)
    content = path.read_bytes()
    for kept in (10, 60, len(content) // 2):
        path.write_bytes(content[:kept])
        try:
            assert 0 < len(load_audio(path)) <= 32000
        except AudioError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("package", ["soundfile", "soxr"])
def test_missing_package(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AudioError, match=rf"needs {package}.*pip install 'whisper_static_cache\[audio\]'"):
        load_audio(tmp_path / "any.wav")
