"""Writes small models as faster-whisper folders, the inverse of `whisper_static_cache.ctranslate2_format`."""

import json
import struct

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import WhisperConfig, WhisperForConditionalGeneration


CODES = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.float16: 4, torch.bfloat16: 5}
LANGUAGES = ("en", "de", "fr")
TEXT = [*sorted(ByteLevel.alphabet()), "th", "the"]
SPECIAL = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    *(f"<|{language}|>" for language in LANGUAGES),
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
]
VOCAB_SIZE = len(TEXT) + len(SPECIAL) + 1501
SETTINGS = {"suppress_ids": [1, 2], "suppress_ids_begin": [3, len(TEXT)], "alignment_heads": [[1, 0]]}


def small_model(seed=0, **overrides):
    """A random Whisper model with windows of the real length, so that the real feature extractor serves it."""
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "num_mel_bins": 8,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 32,
        "max_target_positions": 48,
        "pad_token_id": len(TEXT),
        "bos_token_id": len(TEXT),
        "eos_token_id": len(TEXT),
        "decoder_start_token_id": len(TEXT) + 1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = WhisperForConditionalGeneration(WhisperConfig(**{**sizes, **overrides})).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "embed_positions" not in name:
                    parameter.normal_(0.0, 0.2)
    return model


def variables(model):
    """CTranslate2's name -> tensor of every weight and of the scalars that are read."""
    weights = dict(model.state_dict())
    found = {"decoder/activation": torch.tensor(3, dtype=torch.int8)}

    def pair(target, source, parts=("weight", "bias")):
        for part, name in zip(parts, ("weight", "bias")):
            found[f"{target}/{part}"] = weights[f"{source}.{name}"]

    def fused(target, sources):
        found[f"{target}/weight"] = torch.cat([weights[f"{source}.weight"] for source in sources])
        biases = [weights.get(f"{source}.bias", torch.zeros(model.config.d_model)) for source in sources]
        found[f"{target}/bias"] = torch.cat(biases)

    norm = ("gamma", "beta")
    for side in ("encoder", "decoder"):
        found[f"{side}/num_heads"] = torch.tensor(getattr(model.config, f"{side}_attention_heads"), dtype=torch.int16)
        found[f"{side}/position_encodings/encodings"] = weights[f"model.{side}.embed_positions.weight"]
        pair(f"{side}/layer_norm", f"model.{side}.layer_norm", norm)
        for index in range(getattr(model.config, f"{side}_layers")):
            target, source = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            pair(f"{target}/self_attention/layer_norm", f"{source}.self_attn_layer_norm", norm)
            fused(f"{target}/self_attention/linear_0", [f"{source}.self_attn.{x}_proj" for x in "qkv"])
            pair(f"{target}/self_attention/linear_1", f"{source}.self_attn.out_proj")
            pair(f"{target}/ffn/layer_norm", f"{source}.final_layer_norm", norm)
            pair(f"{target}/ffn/linear_0", f"{source}.fc1")
            pair(f"{target}/ffn/linear_1", f"{source}.fc2")
            if side == "decoder":
                pair(f"{target}/attention/layer_norm", f"{source}.encoder_attn_layer_norm", norm)
                pair(f"{target}/attention/linear_0", f"{source}.encoder_attn.q_proj")
                fused(f"{target}/attention/linear_1", [f"{source}.encoder_attn.{x}_proj" for x in "kv"])
                pair(f"{target}/attention/linear_2", f"{source}.encoder_attn.out_proj")
    pair("encoder/conv1", "model.encoder.conv1")
    pair("encoder/conv2", "model.encoder.conv2")
    found["decoder/embeddings/weight"] = weights["model.decoder.embed_tokens.weight"]
    return found


def write_model_bin(path, tensors, *, version=6, spec="WhisperSpec"):
    """Writes tensors as a `model.bin`."""

    def string(text):
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    with open(path, "wb") as stream:
        stream.write(struct.pack("<I", version) + string(spec) + struct.pack("<II", 3, len(tensors)))
        for name, tensor in sorted(tensors.items()):
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().astype(np.uint8).tobytes()
            stream.write(string(name) + struct.pack(f"<B{tensor.dim()}I", tensor.dim(), *tensor.shape))
            stream.write(struct.pack("<BI", CODES[tensor.dtype], len(data)) + data)
        stream.write(struct.pack("<I", 1) + string("decoder/projection/weight") + string("decoder/embeddings/weight"))


def write_folder(folder, model, dtype=torch.float32):
    """Writes a model with the small vocabulary as a faster-whisper folder, its weights in `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = variables(model)
    stored = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    write_model_bin(folder / "model.bin", stored)
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": len(TEXT) + i, "content": x, "special": True, **flags} for i, x in enumerate(SPECIAL)]
    vocab = {token: index for index, token in enumerate(TEXT)}
    tokenizer = {"added_tokens": added, "model": {"type": "BPE", "vocab": vocab, "merges": ["t h", ["th", "e"]]}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder
