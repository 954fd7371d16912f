"""CTranslate2's `model.bin`, the format of faster-whisper's models, as a transformers Whisper model."""

import json
import math
import re
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch


__all__ = ["CheckpointError", "ModelBin", "Vocabulary", "load_ctranslate2"]

# model.bin: code of a variable's type -> torch dtype. Codes 1 to 3 are integers: scalars, or quantized weights.
TYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16, 5: torch.bfloat16}
FORMAT_VERSION = 6
SOURCE_POSITIONS = "encoder/position_encodings/encodings"

# OpenAI's English-only models have one text token fewer than the first multilingual ones.
ENGLISH_ONLY_VOCAB_SIZE = 51864
TIMESTAMPS = 1501  # from 0.00 to 30.00 s in steps of 0.02 s
ADDED_TOKEN_KEYS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


class CheckpointError(ValueError):
    """A checkpoint that is unknown, cannot be fetched, or does not hold a Whisper model; the message says which."""


def load_ctranslate2(folder, dtype=torch.float32):
    """Loads the model of a folder with `model.bin`, `config.json` and `tokenizer.json`, on the CPU.

    Args:
        folder: pathlib.Path of the folder.
        dtype: floating-point dtype of the returned model's parameters, whatever the file holds.

    Returns:
        (WhisperForConditionalGeneration in eval mode, WhisperProcessor).

    Raises:
        CheckpointError: a file is missing, truncated, damaged, of another version, or not a Whisper model's.
    """
    from transformers import WhisperFeatureExtractor, WhisperProcessor

    weights = ModelBin(folder / "model.bin")
    vocabulary = Vocabulary(folder / "tokenizer.json")
    settings = _read_json(folder / "config.json")
    model = _build_model(weights, vocabulary, dtype)
    model.generation_config = _generation_config(model.config, vocabulary, settings)
    processor = WhisperProcessor(
        feature_extractor=WhisperFeatureExtractor(feature_size=model.config.num_mel_bins),
        tokenizer=vocabulary.tokenizer(),
    )
    return model, processor


def _read_json(path):
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return content


class Variable(NamedTuple):
    """Where a variable of a `model.bin` lies in it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    size: int


class ModelBin:
    """The variables of a CTranslate2 `model.bin`, mapped, not read.

    Little-endian: u32 format version, string name of the model class, u32 its revision, u32 number of variables; each
    one is string name, u8 rank, u32 dimensions, u8 type, u32 size in bytes, data; then aliases. A string is a u16
    length, which counts a trailing NUL, and its bytes.

    Raises:
        CheckpointError: the file is truncated, of another version, or not a Whisper model.
    """

    def __init__(self, path):
        self.path = path
        if path.stat().st_size < 4:
            raise CheckpointError(f"{path} is truncated: it has {path.stat().st_size} bytes.")
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        self._position = 0
        self._unread = {}

        (version,) = self._unpack("I")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path} has format version {version}; only version {FORMAT_VERSION} can be read.")
        spec = self._string()
        if spec != "WhisperSpec":
            raise CheckpointError(f"{path} holds a {spec}, not a Whisper model.")
        _, count = self._unpack("II")
        for _ in range(count):
            name = self._string()
            (rank,) = self._unpack("B")
            shape = self._unpack(f"{rank}I")
            code, size = self._unpack("BI")
            if code not in TYPES or size != math.prod(shape) * TYPES[code].itemsize:
                raise CheckpointError(f"{path} is damaged: variable {name} of shape {shape} has {size} bytes.")
            self._unread[name] = Variable(shape, TYPES[code], self._position, size)
            self._skip(size)
        # Nothing needs the aliases (the output projection is the embeddings in every Whisper), but a file that ends
        # among them is not whole.
        (count,) = self._unpack("I")
        for _ in range(2 * count):
            self._string()
        if any(name.endswith("/weight_scale") for name in self._unread):
            raise CheckpointError(f"{path} holds quantized weights: convert the model again with float16 or float32.")

    def _skip(self, size):
        self._position += size
        if self._position > len(self._bytes):
            raise CheckpointError(
                f"{self.path} is truncated: it ends after {len(self._bytes)} bytes, inside the model."
            )

    def _unpack(self, layout):
        layout = "<" + layout
        start = self._position
        self._skip(struct.calcsize(layout))
        return struct.unpack(layout, self._bytes[start : self._position].tobytes())

    def _string(self):
        (length,) = self._unpack("H")
        start = self._position
        self._skip(length)
        try:
            return self._bytes[start : self._position].tobytes().rstrip(b"\0").decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path} is damaged: a name at byte {start} is not text.") from error

    def _variable(self, name):
        if name not in self._unread:
            raise CheckpointError(f"{self.path} is not a whole Whisper model: it has no variable {name}.")
        return self._unread[name]

    def __contains__(self, name):
        return name in self._unread

    def shape(self, name, rank):
        """Shape, a tuple of `rank` integers, of a variable that has not been taken yet."""
        shape = self._variable(name).shape
        if len(shape) != rank:
            raise CheckpointError(f"{self.path} is damaged: variable {name} of shape {shape} should have rank {rank}.")
        return shape

    def take(self, name):
        """Reads a variable, once, as a tensor of its own dtype that shares no memory with the file."""
        variable = self._variable(name)
        del self._unread[name]
        raw = np.array(self._bytes[variable.offset : variable.offset + variable.size])
        return torch.from_numpy(raw).view(variable.dtype).reshape(variable.shape)

    def left_over(self):
        """Names of the weights that nobody took. Scalars are settings of CTranslate2's own and do not count."""
        return sorted(name for name, variable in self._unread.items() if variable.shape)

    def count_layers(self, side):
        """Number of layers of the "encoder" or the "decoder"."""
        pattern = re.compile(rf"{side}/(layer_\d+)/")
        return len({found[1] for name in self._unread if (found := pattern.match(name))})


def _read_config(weights, vocabulary):
    """WhisperConfig with the sizes of a `ModelBin` and the token ids of a `Vocabulary`."""
    from transformers import WhisperConfig

    vocab_size, d_model = weights.shape("decoder/embeddings/weight", 2)
    sizes = {}
    for side in ("encoder", "decoder"):
        heads = int(weights.take(f"{side}/num_heads"))
        if heads < 1 or d_model % heads:
            raise CheckpointError(f"{weights.path} does not fit together: {heads} heads for a width of {d_model}.")
        sizes[f"{side}_attention_heads"] = heads
        sizes[f"{side}_layers"] = weights.count_layers(side)
        sizes[f"{side}_ffn_dim"] = weights.shape(f"{side}/layer_0/ffn/linear_0/weight", 2)[0]
    end, start = vocabulary["<|endoftext|>"], vocabulary["<|startoftranscript|>"]
    return WhisperConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_mel_bins=weights.shape("encoder/conv1/weight", 3)[1],
        max_source_positions=weights.shape(SOURCE_POSITIONS, 2)[0] if SOURCE_POSITIONS in weights else 1500,
        max_target_positions=weights.shape("decoder/position_encodings/encodings", 2)[0],
        pad_token_id=end,
        # As in the published configurations, where the English-only models have another one than the multilingual.
        bos_token_id=start if vocab_size == ENGLISH_ONLY_VOCAB_SIZE else end,
        eos_token_id=end,
        decoder_start_token_id=start,
        # What is suppressed is a matter of the generation configuration.
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **sizes,
    )


def _build_model(weights, vocabulary, dtype):
    from transformers import WhisperForConditionalGeneration

    config = _read_config(weights, vocabulary)
    # On the meta device, so that no time goes into random weights that are replaced at once.
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}

    state = {}
    for name, value in _state_dict(weights, config):
        if shapes.get(name) != tuple(value.shape):
            raise CheckpointError(
                f"{weights.path} does not fit together: {name} has shape {tuple(value.shape)}, where its other sizes "
                f"ask for {shapes.get(name)}."
            )
        state[name] = value.to(dtype)
    if unknown := weights.left_over():
        raise CheckpointError(f"{weights.path} holds weights that no Whisper model has, such as {unknown[0]}.")
    model.load_state_dict({**state, "proj_out.weight": state["model.decoder.embed_tokens.weight"]}, assign=True)
    model.tie_weights()
    return model.eval()


def _state_dict(weights, config):
    """Yields transformers' (name, tensor) for every weight of a `ModelBin`."""

    def pair(source, target, parts=("weight", "bias")):
        for stored, part in zip(parts, ("weight", "bias")):
            yield f"{target}.{part}", weights.take(f"{source}/{stored}")

    def norm(source, target):
        return pair(f"{source}/layer_norm", target, ("gamma", "beta"))

    def fused(source, targets):
        """A linear layer whose rows are those of several, one after the other; transformers' keys have no bias."""
        parts = [weights.take(f"{source}/{part}").chunk(len(targets)) for part in ("weight", "bias")]
        for target, weight, bias in zip(targets, *parts):
            yield f"{target}.weight", weight
            if not target.endswith("k_proj"):
                yield f"{target}.bias", bias

    for layer in ("conv1", "conv2"):
        yield from pair(f"encoder/{layer}", f"model.encoder.{layer}")
    if SOURCE_POSITIONS in weights:
        yield "model.encoder.embed_positions.weight", weights.take(SOURCE_POSITIONS)
    else:
        yield "model.encoder.embed_positions.weight", _sinusoids(config.max_source_positions, config.d_model)
    yield "model.decoder.embed_tokens.weight", weights.take("decoder/embeddings/weight")
    yield "model.decoder.embed_positions.weight", weights.take("decoder/position_encodings/encodings")

    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        yield from norm(side, f"model.{side}.layer_norm")
        for index in range(layers):
            source, target = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            attention = f"{target}.self_attn"
            yield from norm(f"{source}/self_attention", f"{attention}_layer_norm")
            yield from fused(f"{source}/self_attention/linear_0", [f"{attention}.{x}_proj" for x in "qkv"])
            yield from pair(f"{source}/self_attention/linear_1", f"{attention}.out_proj")
            if side == "decoder":
                attention = f"{target}.encoder_attn"
                yield from norm(f"{source}/attention", f"{attention}_layer_norm")
                yield from pair(f"{source}/attention/linear_0", f"{attention}.q_proj")
                yield from fused(f"{source}/attention/linear_1", [f"{attention}.{x}_proj" for x in "kv"])
                yield from pair(f"{source}/attention/linear_2", f"{attention}.out_proj")
            yield from norm(f"{source}/ffn", f"{target}.final_layer_norm")
            yield from pair(f"{source}/ffn/linear_0", f"{target}.fc1")
            yield from pair(f"{source}/ffn/linear_1", f"{target}.fc2")


def _sinusoids(length, channels):
    """Encoder positions, float32 (length, channels): sines, then cosines, of wavelengths from 2 pi to 20000 pi."""
    rates = torch.exp(-math.log(10000) * torch.arange(channels // 2) / (channels // 2 - 1))
    angles = torch.arange(length)[:, None] * rates[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Vocabulary:
    """Token ids of a `tokenizer.json`, and the transformers tokenizer made of it.

    Raises:
        CheckpointError: the file is missing, is not a byte-level BPE tokenizer, or lacks Whisper's special tokens.
    """

    def __init__(self, path):
        self.path = path
        content = _read_json(path)
        try:
            self.text = content["model"]["vocab"]
            merges = content["model"]["merges"]
            self.added = {
                token["id"]: {key: token[key] for key in ADDED_TOKEN_KEYS} for token in content["added_tokens"]
            }
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not a tokenizers file of a byte-level BPE model (no {error})."
            ) from error
        # A merge was one string in older files, and is a pair in newer ones.
        self.merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        self.ids = {**self.text, **{token["content"]: index for index, token in self.added.items()}}

        # Early conversions left the timestamps out; without them a decoded transcript has no times.
        first = self["<|notimestamps|>"] + 1
        for index in range(TIMESTAMPS):
            content = f"<|{index * 0.02:.2f}|>"
            if content not in self.ids:
                self.ids[content] = first + index
                self.added[first + index] = {**dict.fromkeys(ADDED_TOKEN_KEYS, False), "content": content}

    def __getitem__(self, token):
        if token not in self.ids:
            raise CheckpointError(f"{self.path} is not a Whisper tokenizer: it has no token {token}.")
        return self.ids[token]

    def languages(self):
        """Language token -> id: the tokens between the start of transcript and the first task."""
        between = range(self["<|startoftranscript|>"] + 1, self["<|translate|>"])
        return {self.added[index]["content"]: index for index in between if index in self.added}

    def tokenizer(self):
        """WhisperTokenizer. It is read from files, the one way that transformers 4 and 5 share."""
        from transformers import WhisperTokenizer

        special = [token["content"] for _, token in sorted(self.added.items()) if token["special"]]
        files = {
            "vocab.json": json.dumps(self.text, ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *self.merges, ""]),
            "normalizer.json": "{}",
            "tokenizer_config.json": json.dumps(
                {
                    "added_tokens_decoder": {str(index): token for index, token in sorted(self.added.items())},
                    "additional_special_tokens": special,
                    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
                    "clean_up_tokenization_spaces": False,
                    "tokenizer_class": "WhisperTokenizer",
                }
            ),
        }
        with tempfile.TemporaryDirectory() as folder:
            for file, content in files.items():
                Path(folder, file).write_text(content, encoding="utf-8")
            return WhisperTokenizer.from_pretrained(folder)


def _generation_config(config, vocabulary, settings):
    """GenerationConfig as the published checkpoints have it; `settings` is the config.json beside the `model.bin`."""
    from transformers import GenerationConfig

    multilingual = config.vocab_size != ENGLISH_ONLY_VOCAB_SIZE
    languages = {}
    if multilingual:
        tasks = {task: vocabulary[f"<|{task}|>"] for task in ("transcribe", "translate")}
        # The published files force the transcribe token by the deprecated forced_decoder_ids. Without either, there
        # is no task in the prompt when the language is detected, and the model repeats itself.
        languages = {"lang_to_id": vocabulary.languages(), "task_to_id": tasks, "task": "transcribe"}
    return GenerationConfig(
        alignment_heads=settings.get("alignment_heads"),
        begin_suppress_tokens=settings.get("suppress_ids_begin"),
        suppress_tokens=settings.get("suppress_ids"),
        bos_token_id=config.bos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        is_multilingual=multilingual,
        max_initial_timestamp_index=50,
        max_length=config.max_target_positions,
        no_timestamps_token_id=vocabulary["<|notimestamps|>"],
        prev_sot_token_id=vocabulary["<|startofprev|>"],
        return_timestamps=False,
        **languages,
    )
