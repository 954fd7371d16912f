"""patch() and unpatch(): the only place that assigns into transformers.

Five attributes of `WhisperForConditionalGeneration` are replaced, the rows of `compat_symbols.PATCHED`. Each
replacement asks first whether the model at hand is switched on, so that `patch(model)` leaves every other model on the
stock path, and calls the attribute it replaced where it is not.
"""

import contextlib
import functools
import inspect
import logging
import threading
import weakref
from typing import NamedTuple

from . import _compat
from .compat_symbols import PATCHED, check_live
from .engines import ENGINES
from .int8_states import check_cross_dtype


logger = logging.getLogger(__name__)


class Setting(NamedTuple):
    """What `patch` was told: `engine` and `cross_dtype`, as it takes them."""

    engine: str = "auto"
    cross_dtype: object = None


_LOCK = threading.RLock()
# `Setting` for all models, None while patch() was not called; those of single models.
_EVERYWHERE = None
_MODELS = weakref.WeakKeyDictionary()
# (class, attribute) -> (what stood in the class's own dictionary or _INHERITED, what we put there)
_APPLIED = {}
_INHERITED = object()


def _make_generate(stock):
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def generate(self, *args, **kwargs):
        setting = _setting_or_none(self)
        if setting is None:
            return stock(self, *args, **kwargs)
        from .generation_whisper import generate_call

        arguments = signature.bind(self, *args, **kwargs).arguments
        arguments = {**arguments, **arguments.pop("kwargs", {})}
        with generate_call(self, setting.engine, arguments, setting.cross_dtype):
            return stock(self, *args, **_compat.without_dynamic(kwargs))

    return generate


def _make_sample(stock):
    @functools.wraps(stock)
    def _sample(self, *args, **kwargs):
        if _setting_or_none(self) is None:
            return stock(self, *args, **kwargs)
        from .generation_whisper import sample

        result = sample(stock, self, *args, **kwargs)
        _compat.forget_unused_cache(self)
        return result

    return _sample


def _make_average_logprob(stock):
    @functools.wraps(stock)
    def _retrieve_avg_logprobs(scores, tokens, *args, **kwargs):
        from .token_choice import average_logprob

        return average_logprob(stock, scores, tokens, *args, **kwargs)

    return staticmethod(_retrieve_avg_logprobs)


def _make_beam_search(stock):
    # Up to 4.48 a scorer object keeps the beams, and that loop is left alone.
    has_scorer = "beam_scorer" in inspect.signature(stock).parameters

    @functools.wraps(stock)
    def _beam_search(self, *args, **kwargs):
        if _setting_or_none(self) is None:
            return stock(self, *args, **kwargs)
        if has_scorer:
            from .logits_processors import WhisperNoSpeechDetection

            result = stock(self, *args, **kwargs)
            WhisperNoSpeechDetection.ran(kwargs.get("logits_processor") or ())
            return result
        from .beam_search import beam_search

        result = beam_search(stock, self, *args, **kwargs)
        _compat.forget_unused_cache(self)
        return result

    return _beam_search


def _make_get_encoder(stock):
    @functools.wraps(stock)
    def get_encoder(self, *args, **kwargs):
        encoder = stock(self, *args, **kwargs)
        # Accelerate puts its hooks on what this returns.
        setting = _setting_or_none(self)
        if setting is None or setting.engine not in ("auto", "triton") or hasattr(self, "hf_device_map"):
            return encoder
        from .generation_whisper import encoder_for_call

        return encoder_for_call(self, encoder)

    return get_encoder


# What makes the replacement from the attribute replaced, in the order of `PATCHED`.
_ROWS = (_make_generate, _make_sample, _make_average_logprob, _make_beam_search, _make_get_encoder)


def patch(model=None, *, engine="auto", cross_dtype=None):
    """Let transformers' Whisper models generate on a preallocated cache, with the tokens they would give anyway.

    Calling it again changes `engine` and `cross_dtype` and nothing else. Safe to call from several threads.

    Args:
        model: one `WhisperForConditionalGeneration` to switch on; None switches on all, present and future.
        engine: "auto", "triton" (hand-written kernels, NVIDIA GPUs), "compile" (torch.compile; CUDA graphs on a GPU)
            or "eager" (the same step uncompiled). "auto" takes "triton" on a CUDA device and "eager" elsewhere; what
            an engine cannot serve goes to the next one in this order, with the reason in `last_run`.
        cross_dtype: None holds the encoder's keys and values in what the decoder computes in. `torch.int8` holds them
            in 8 bits, as `EncoderDecoderStaticCache` does: less memory to hold and to read, and no longer exactly
            stock's tokens. A call with a cache of this package goes by that cache's.

    Raises:
        ValueError: the engine is not known, or `cross_dtype` is another than `torch.int8`.
        TypeError: `model` is not a Whisper model with a language modelling head, or `cross_dtype` is no `torch.dtype`.
        RuntimeError: a symbol of transformers that the package counts on is missing or different; the sentence names
            it, both signatures and the newest release known to work, and nothing has been patched.
    """
    global _EVERYWHERE
    setting = Setting(check_engine(engine), check_cross_dtype(cross_dtype))
    if model is not None and not isinstance(model, _whisper_class()):
        raise TypeError(
            f"`model` is a {type(model).__name__}: pass a WhisperForConditionalGeneration, or nothing to patch all."
        )
    with _LOCK:
        _apply()
        if model is None:
            _EVERYWHERE = setting
        else:
            _MODELS[model] = setting


def unpatch(model=None):
    """Undo `patch`: every attribute of transformers is the object that it was, and caches and graphs are freed.

    Args:
        model: the one model to switch off again, if it was switched on by itself; None undoes every patch.
    """
    global _EVERYWHERE
    from .sessions import forget

    with _LOCK:
        if model is not None:
            _MODELS.pop(model, None)
            if _EVERYWHERE is None:
                forget(model)
        else:
            _EVERYWHERE = None
            _MODELS.clear()
            forget()
        if _EVERYWHERE is None and not _MODELS:
            _revert()


def is_patched(model=None):
    """Whether `model` generates on the preallocated cache; without a model, whether all do."""
    with _LOCK:
        return (_EVERYWHERE if model is None else _setting_or_none(model)) is not None


@contextlib.contextmanager
def patched(model=None, *, engine="auto", cross_dtype=None):
    """`patch` with these arguments for the length of a `with` block; afterwards all is as before it.

    Args:
        model, engine, cross_dtype: as for `patch`.
    """
    with _LOCK:
        before = _EVERYWHERE if model is None else _MODELS.get(model)
        patch(model, engine=engine, cross_dtype=cross_dtype)
    try:
        yield
    finally:
        if before is None:
            _leave(model)
        else:
            patch(model, **before._asdict())


def _leave(model):
    global _EVERYWHERE
    with _LOCK:
        if model is None and _MODELS:
            # Single models that were switched on by themselves stay so.
            _EVERYWHERE = None
        else:
            unpatch(model)


def setting_of(model):
    """The `Setting` of `model`: its own, that of `patch()`, or the defaults if it is not patched."""
    return _setting_or_none(model) or Setting()


def check_engine(engine):
    """Return `engine` if it is one, else raise ValueError naming those there are."""
    if engine != "auto" and engine not in ENGINES:
        raise ValueError(f"`engine` is {engine!r}: use one of 'auto', {', '.join(map(repr, ENGINES))}.")
    return engine


def _setting_or_none(model):
    return _MODELS.get(model, _EVERYWHERE) if _MODELS else _EVERYWHERE


def _whisper_class():
    from transformers.models.whisper.modeling_whisper import WhisperForConditionalGeneration

    return WhisperForConditionalGeneration


def _apply():
    """Put the rows in place, all or none."""
    if _APPLIED:
        return
    check_live(_compat.version())
    target = _whisper_class()
    replacements = []
    for symbol, make in zip(PATCHED, _ROWS):
        attribute = symbol.name.rpartition(".")[2]
        replacements.append((attribute, make(getattr(target, attribute))))
    for attribute, replacement in replacements:
        _APPLIED[target, attribute] = (target.__dict__.get(attribute, _INHERITED), replacement)
        setattr(target, attribute, replacement)


def _revert():
    for (target, attribute), (before, ours) in list(_APPLIED.items()):
        if target.__dict__.get(attribute) is not ours:
            # Somebody patched over us; taking theirs away would break them.
            logger.warning("%s.%s was replaced by someone else and stays so.", target.__name__, attribute)
        elif before is _INHERITED:
            delattr(target, attribute)
        else:
            setattr(target, attribute, before)
    _APPLIED.clear()
