"""A preallocated encoder-decoder cache and a decode loop that never waits for the host, for transformers' Whisper.

    import whisper_static_cache

    whisper_static_cache.patch()      # every Whisper model; an unchanged program now runs on it
    ids = model.generate(features)    # exactly stock's tokens

Importing the package changes nothing and loads nothing heavy: every public name is resolved on first use.
"""

import importlib


__version__ = "0.1.0"

# Public name -> module that defines it.
_EXPORTS = {
    "EncoderDecoderStaticCache": "cache_utils",
    "RunReport": "run_report",
    "decoder_footprint": "quantization",
    "is_patched": "monkey_patch",
    "last_run": "generation_whisper",
    "load_quantized": "quantization",
    "patch": "monkey_patch",
    "patched": "monkey_patch",
    "quantize_decoder": "quantization",
    "save_quantized": "quantization",
    "set_backend": "quantization",
    "unpatch": "monkey_patch",
    "warmup": "generation_whisper",
}

__all__ = [
    "EncoderDecoderStaticCache",
    "RunReport",
    "decoder_footprint",
    "is_patched",
    "last_run",
    "load_quantized",
    "patch",
    "patched",
    "quantize_decoder",
    "save_quantized",
    "set_backend",
    "unpatch",
    "warmup",
]


def __getattr__(name):
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(set(globals()) | set(__all__))
