"""Greedy decoding and sampling for Whisper on a preallocated cache, without waiting for the host.

`sample` stands in for `GenerationMixin._sample` on the Whisper class; everything above it, long-form windows,
temperature fallback, prompts, language detection, is transformers' own. What `sample` does not serve goes to the stock
path, with the reason in `last_run` and, once, in the log.
"""

import contextlib
import contextvars
import logging
import types

import torch
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.utils import GenerateEncoderDecoderOutput

from . import _compat
from .cache_utils import EncoderDecoderStaticCache
from .encoder_graph import encoder_of
from .engines import ENGINES
from .int8_states import in_full
from .logits_processors import WhisperNoSpeechDetection
from .modeling_whisper import activation_dtype, decoder_device
from .run_report import Call, Clock, Window
from .sessions import last_call, state_of
from .token_choice import choice_for


logger = logging.getLogger(__name__)

# Arguments of `_sample` that the loop understands; any other that is set means something it would silently drop.
_UNDERSTOOD = {
    "encoder_outputs",
    _compat.CACHE_NAME,
    "decoder_attention_mask",
    "attention_mask",
    "use_cache",
    "cache_position",
}
# Implementations of stock's that this package's cache stands in for.
_REPLACED_CACHES = (None, "static")


# The `generate` call that the current thread is in; inner calls (an assistant's) nest.
_CALL = contextvars.ContextVar("whisper_static_cache_call", default=None)


def last_run(model):
    """What the last finished `generate` call of `model` did.

    Args:
        model: a Whisper model that `generate` was called on while patched.

    Returns:
        A `RunReport`.

    Raises:
        ValueError: `generate` has not been called on `model` since `patch()`.
    """
    call = last_call(model)
    if call is None:
        raise ValueError("`model` has not generated since patch(): call model.generate(...) first.")
    return call.report()


def _leave_to_stock(model, call, reason):
    call.served_by_stock(reason)
    logged = state_of(model).logged
    if reason not in logged:
        logged.add(reason)
        logger.info("Whisper's generate is served by transformers' own loop: %s.", reason)


@contextlib.contextmanager
def generate_call(model, engine, arguments, cross_dtype=None):
    """Surround a `generate` call: understand its arguments, and keep its report.

    Args:
        model: the Whisper model.
        engine: name of the engine asked for, or "auto".
        arguments: the call's arguments by name, those of `**kwargs` included.
        cross_dtype: what cross-attention's keys and values are held in, as `EncoderDecoderStaticCache` takes it.
    """
    call = _describe(model, engine, arguments)
    call.cross_dtype = cross_dtype
    token = _CALL.set(call)
    try:
        yield call
    finally:
        _CALL.reset(token)
    if not call.windows:
        _leave_to_stock(model, call, call.stock_reason or "this way of decoding is not served")
    state_of(model).last_call = call


def _describe(model, engine, arguments):
    config = arguments.get("generation_config")

    def setting(name):
        value = arguments.get(name)
        if value is None and config is not None:
            value = getattr(config, name, None)
        return getattr(model.generation_config, name, None) if value is None else value

    cache = _compat.cache_of(arguments)
    implementation = setting("cache_implementation")
    stock_reason = None
    if cache is not None and not isinstance(cache, EncoderDecoderStaticCache):
        stock_reason = f"{_compat.CACHE_NAME} is a {type(cache).__name__} of the caller's"
    elif implementation not in _REPLACED_CACHES:
        stock_reason = f'cache_implementation="{implementation}"'
    features = arguments.get("input_features")
    frames = 2 * model.config.max_source_positions if features is None else features.shape[-1]
    if isinstance(cache, EncoderDecoderStaticCache):
        encoded = features if features is not None else first_tensor(arguments.get("encoder_outputs"))
        if encoded is not None:
            rows = encoded.shape[0] * (setting("num_return_sequences") or 1)
            prompt_ids = arguments.get("prompt_ids")
            length = (setting("max_new_tokens") or 0) + (0 if prompt_ids is None else len(prompt_ids))
            cache.check_fits(model.config, rows, length, activation_dtype(model), decoder_device(model))
        # What the last call left there is over; language detection is the first to use it.
        cache.reset()
    return Call(
        model,
        engine,
        stock_reason=stock_reason,
        keeps_results=bool(arguments.get("return_segments") or setting("return_dict_in_generate")),
        is_shortform=frames <= 2 * model.config.max_source_positions,
    )


def encoder_for_call(model, encoder):
    """What stands in for `encoder` inside a `generate` call of `model`; outside of one, `encoder`."""
    call = _CALL.get()
    if call is None or call.model() is not model or next(encoder.parameters()).device.type != "cuda":
        return encoder
    return encoder_of(state_of(model), encoder)


def first_tensor(encoder_outputs):
    if encoder_outputs is None or isinstance(encoder_outputs, torch.Tensor):
        return encoder_outputs
    return encoder_outputs[0]


def sample(
    stock,
    model,
    input_ids,
    logits_processor,
    stopping_criteria,
    generation_config,
    synced_gpus=False,
    streamer=None,
    job_class=None,
    **model_kwargs,
):
    """`GenerationMixin._sample` for Whisper; `stock` is the method it replaces, and serves what this does not.

    With a `job_class` of its own, another decoding method of `GenerationMixin`.
    """
    call = _CALL.get()
    if call is None or call.model() is not model:
        call = Call(model)
    state = state_of(model)
    job = (job_class or Job)(
        model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs, call
    )
    job.stock = stock
    reason = job.why_stock(state, synced_gpus)
    if reason is not None:
        _leave_to_stock(model, call, reason)
        # Up to 4.46 `_sample` has no default for it, and `_beam_search` takes none.
        if streamer is not None or job_class is None:
            model_kwargs["streamer"] = streamer
        result = stock(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            **model_kwargs,
        )
        WhisperNoSpeechDetection.ran(logits_processor)
        return result
    # Buffers outlive the call: made under a caller's inference_mode they could not be written outside of one again.
    with torch.inference_mode(False), torch.no_grad():
        return job.run(state)


class Job:
    """One decode: its arguments, whether it can be served, and the loop."""

    beams = 1  # rows of the batch that share an input

    def __init__(self, model, input_ids, logits_processor, stopping_criteria, config, streamer, model_kwargs, call):
        self.model = model
        self.input_ids = input_ids
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.config = config
        self.streamer = streamer
        self.kwargs = model_kwargs
        self.call = call
        self.batch_size, self.prompt_length = input_ids.shape
        cache = model_kwargs.get(_compat.CACHE_NAME)
        self.user_cache = cache if isinstance(cache, EncoderDecoderStaticCache) else None
        lengths = [c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria]
        self.max_length = min(lengths) if lengths else None

    def why_stock(self, state, synced_gpus):
        """Why transformers' own loop must serve, or None.

        Raises:
            ValueError: the caller passed a cache of this package that cannot hold the call.
        """
        config, kwargs = self.config, self.kwargs
        if self.call.stock_reason:
            return self.call.stock_reason
        if synced_gpus:
            return "synced_gpus is set"
        if getattr(config, "is_assistant", False):
            return "the model is the assistant of another"
        if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
            return "attentions or hidden states of every step are asked for"
        if kwargs.get("use_cache") is False:
            return "use_cache is False"
        for name, value in kwargs.items():
            if value is not None and value is not False and name not in _UNDERSTOOD:
                return f"the argument `{name}` is given"
        if config.cache_implementation not in _REPLACED_CACHES:
            return f'cache_implementation="{config.cache_implementation}"'
        if getattr(getattr(config, "compile_config", None), "_compile_all_devices", False):
            return "compile_config insists on transformers' own compilation"
        if config.cache_implementation and self.call.keeps_results and self.call.is_shortform:
            return f'the caller sees the cache of cache_implementation="{config.cache_implementation}"'
        if self.user_cache is None and _has_content(kwargs.get(_compat.CACHE_NAME)):
            return f"{_compat.CACHE_NAME} has content"
        states = first_tensor(kwargs.get("encoder_outputs"))
        device = decoder_device(self.model)
        if states is None or states.dim() != 3 or states.shape[0] != self.batch_size:
            return "encoder_outputs do not match the batch"
        if states.device != device or self.input_ids.device != device:
            return "inputs and decoder are on different devices"
        if torch.is_autocast_enabled(device.type):
            return "autocast is on"
        dtype = activation_dtype(self.model)
        if states.dtype != dtype:
            return f"encoder_outputs are {states.dtype} and the decoder computes in {dtype}"
        slots = self.model.config.max_target_positions
        if self.max_length is None or self.max_length > slots + 1:
            return f"the length is not bounded by the model's {slots} positions"
        source_length = self.model.config.max_source_positions
        if self.user_cache is not None:
            source_length = self.user_cache.max_source_len
            inputs = self.batch_size // self.beams
            self.user_cache.check_fits(self.model.config, self.batch_size, self.max_length, dtype, device, inputs)
        if states.shape[1] != source_length:
            return f"encoder_outputs have {states.shape[1]} positions where the cache has {source_length}"
        mask = kwargs.get("decoder_attention_mask")
        if mask is not None and tuple(mask.shape) != tuple(self.input_ids.shape):
            return "decoder_attention_mask is not of the prompt's shape"
        return state.refresh(self.model)

    def run(self, state):
        """Decode on the engine asked for, or on the next best where that one cannot."""
        while True:
            engine, reason = self.engine(state)
            try:
                return self._run_on(state, engine, reason)
            except _EngineFailed as failure:
                # Never a crash. Nothing of the window has been handed out yet.
                state.failed[engine.name] = f"the {engine.name} engine could not be built: {failure}"
                logger.warning("%s. Another engine serves from here on.", state.failed[engine.name])

    def engine(self, state):
        """The engine to decode on, and the reason if it is not the one asked for."""
        device, reason = self.input_ids.device, None
        name = default_engine(self.model, device) if self.call.engine == "auto" else self.call.engine
        while (why := self._why_not(ENGINES[name], state, device)) is not None:
            reason, name = reason or why, ENGINES[name].fallback
        return state.engine(self.model, ENGINES[name]), reason

    def _why_not(self, engine, state, device):
        if engine.max_batch_size is not None and self.batch_size > engine.max_batch_size:
            return f"a batch of {self.batch_size}; the {engine.name} engine takes up to {engine.max_batch_size}"
        if engine.name in state.failed:
            return state.failed[engine.name]
        return state.reason((engine, device), lambda: engine.why_not(self.model, device))

    def _run_on(self, state, engine, reason):
        rows = engine.rows_for(self.batch_size)
        if self.user_cache is not None:
            rows = min(rows, self.user_cache.max_batch_size)
        compiles, captures = engine.compiles, engine.captures
        device, inputs = self.input_ids.device, rows // self.beams
        window = Window(engine.name, reason, self.batch_size, clock=Clock(device))
        taken = state.session(
            self.model, rows, activation_dtype(self.model), device, self.user_cache, inputs, self.call.cross_dtype
        )
        with taken as session:
            window.cross_dtype = session.cross_dtype
            _prepare(engine, session.rows(rows, self.beams))
            result, window.steps = self._decode(engine, session, rows, window.clock)
        window.compiles, window.captures = engine.compiles - compiles, engine.captures - captures
        self.call.windows.append(window)
        return result

    def _decode(self, engine, session, padded_rows, clock):
        choice = choice_for(self, session, engine)
        padded, rows = session.rows(padded_rows), session.rows(self.batch_size)
        mask = self.kwargs.get("decoder_attention_mask")
        clock.mark()
        logits, extra = engine.prefill(
            rows,
            self.input_ids,
            first_tensor(self.kwargs["encoder_outputs"]),
            valid=None if mask is None else mask.bool(),
            mask_moves_positions=_compat.mask_moves_positions(),
            extra_index=choice.extra_index,
        )
        clock.mark()
        slot = self.prompt_length
        finished = choice.first(logits, extra)
        if not finished:
            choice.begin(engine, padded)
        while not finished:
            finished = choice.advance(engine, padded, slot)
            slot += 1
        steps = choice.steps()
        clock.mark()
        return self._result(choice, rows, steps), steps

    def _result(self, choice, rows, steps):
        if self.streamer is not None:
            self.streamer.end()
        length = self.prompt_length + steps
        sequences = rows.tokens[:, :length].clone()
        cached = length - 1
        if self.user_cache is not None:
            self.user_cache.mark_filled(self.batch_size, cached)
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateEncoderDecoderOutput(
            sequences=sequences,
            scores=choice.scores(steps),
            logits=choice.raw_logits(steps),
            **{_compat.CACHE_NAME: self._visible_cache(rows.buffers, cached)},
        )

    def _visible_cache(self, buffers, cached):
        """The cache that the caller is handed, `cached` tokens long."""
        cache = self.user_cache
        if cache is None:
            # Nobody sees the cache of a long recording: transformers drops it, and only its presence counts. That of a
            # short one it takes apart layer by layer, even where the caller asked for tokens alone.
            visible = cached if self.call.is_shortform else 0
            full = [(*layer[:2], *in_full(*layer[2:])) for layer in buffers] if visible else buffers
            cache = _compat.dynamic_cache(full, visible)
        return cache


class _EngineFailed(Exception):
    """What an engine needs could not be compiled or captured."""


def _prepare(engine, rows):
    try:
        engine.prepare(rows)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        cause = getattr(error, "inner_exception", error)
        lines = str(cause).splitlines() or [""]
        raise _EngineFailed(f"{type(cause).__name__}: {lines[0]}") from error


def _has_content(cache):
    return cache is not None and cache.get_seq_length() > 0


def default_engine(model, device):
    """The engine that "auto" means: "triton" on CUDA, and on the CPU "compile" for low-bit linears in need of it."""
    if device.type == "cuda":
        return "triton"
    if device.type == "cpu" and any(getattr(m, "prefers_compile", False) for m in model.model.decoder.modules()):
        return "compile"
    return "eager"


def warmup(model, batch_sizes=(1,), *, engine=None):
    """Allocate, compile and capture ahead of time what `generate` will need for these batch sizes.

    Args:
        model: a Whisper model on the device and in the dtype it will be used in.
        batch_sizes: batch sizes (rows: audio files times `num_return_sequences`) to be ready for. Smaller batches than
            the largest one need nothing more.
        engine: name of an engine, or None for the one that `patch` was told to use.

    Returns:
        `RunReport` of the warm-up: compiles, captures and seconds.

    Raises:
        ValueError: a batch size is not a positive integer, the engine is unknown, or the model cannot be served.
    """
    from .monkey_patch import check_engine, setting_of

    sizes = sorted(set(batch_sizes))
    for size in sizes:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"`batch_sizes` has {size!r}: pass positive integers.")
    setting = setting_of(model)
    call = Call(model, setting.engine if engine is None else check_engine(engine), cross_dtype=setting.cross_dtype)
    state = state_of(model)
    for size in sizes:
        job = _warmup_job(model, size, call)
        reason = job.why_stock(state, synced_gpus=False)
        if reason is not None:
            raise ValueError(f"`model` cannot be warmed up: {reason}.")
        with torch.inference_mode(False), torch.no_grad():
            # Buffers for the largest batch first: growing them later would throw away what is captured on these.
            rows = job.engine(state)[0].rows_for(sizes[-1])
            place = (activation_dtype(model), decoder_device(model))
            with state.session(model, rows, *place, None, cross_dtype=call.cross_dtype):
                pass
            job.run(state)
    return call.report()


def _warmup_job(model, batch_size, call):
    device = decoder_device(model)
    states = torch.zeros(
        batch_size,
        model.config.max_source_positions,
        model.config.d_model,
        dtype=activation_dtype(model),
        device=device,
    )
    settings = {"return_dict_in_generate": False, "do_sample": False, "cache_implementation": None}
    return Job(
        model,
        torch.zeros(batch_size, 1, dtype=torch.int64, device=device),
        logits_processor=[],
        stopping_criteria=[MaxLengthCriteria(max_length=4)],
        config=types.SimpleNamespace(**settings, _pad_token_tensor=None),
        streamer=None,
        model_kwargs={"encoder_outputs": (states,)},
        call=call,
    )
