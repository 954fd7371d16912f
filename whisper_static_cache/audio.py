"""Audio files as the samples that Whisper's feature extractor takes."""

from pathlib import Path

import numpy as np


__all__ = ["AudioError", "audio_file", "load_audio"]


class AudioError(ValueError):
    """An audio file that is missing, cannot be read, or is empty; the message says which."""


def audio_file(path):
    """`path` as a pathlib.Path, once it is known to be a file with something in it.

    Raises:
        AudioError: there is nothing there, or a folder, or an empty file.
    """
    path = Path(path)
    if path.is_dir():
        raise AudioError(f"{path} is a folder, not an audio file.")
    if not path.is_file():
        raise AudioError(f"There is no audio file {path}.")
    if path.stat().st_size == 0:
        raise AudioError(f"{path} is empty.")
    return path


def load_audio(path, sampling_rate=16000):
    """Reads an audio file as one channel at one sampling rate.

    Channels are averaged. Silence and clips of a fraction of a second are audio like any other.

    Args:
        path: a file in a format that libsndfile reads: WAV, FLAC, OGG, MP3 and others.
        sampling_rate: samples per second, in Hz, of what is returned.

    Returns:
        float32 numpy array (samples,), full scale being 1.0.

    Raises:
        AudioError: the file is missing, is not audio, holds no samples or some that are not finite, or the packages
            for reading audio are not installed.
    """
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise AudioError(
            f"Reading audio needs {error.name}, which is not installed: pip install 'whisper_static_cache[audio]'."
        ) from error

    path = audio_file(path)
    try:
        samples, stored_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise AudioError(f"{path} cannot be read as audio (WAV, FLAC, OGG and MP3 can): {error}") from error
    samples = samples.mean(axis=1)
    if stored_rate != sampling_rate:
        samples = soxr.resample(samples, stored_rate, sampling_rate)
    if not len(samples):
        raise AudioError(f"{path} holds no audio.")
    if not np.isfinite(samples).all():
        raise AudioError(f"{path} holds samples that are not finite numbers.")
    return samples
