"""Greedy decoding and sampling for Whisper on a preallocated cache, without waiting for the host.

`sample` stands in for `GenerationMixin._sample` on the Whisper class; everything above it, long-form windows, temperature
fallback, prompts, language detection, is transformers' own. What `sample` does not serve goes to the stock path, with the
reason in `last_run` and, once, in the log.
"""

import contextlib
import contextvars
import dataclasses
import logging
import threading
import time
import weakref

import torch
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateEncoderDecoderOutput

from . import _compat
from .cache_utils import EncoderDecoderStaticCache
from .engines import ENGINES, Session, new_session
from .logits_process import UnsupportedProcessor, build_plan
from .modeling_whisper import ModuleFingerprint, activation_dtype, decoder_device, why_not_plain


logger = logging.getLogger(__name__)

# Arguments of `_sample` that the loop understands; any other that is set means something it would silently drop.
_UNDERSTOOD = frozenset(
    ("encoder_outputs", "past_key_values", "decoder_attention_mask", "attention_mask", "use_cache", "cache_position")
)
# Implementations of stock's that this package's cache stands in for.
_REPLACED_CACHES = (None, "static")


@dataclasses.dataclass(frozen=True)
class RunReport:
    """What the last `generate` call of a model did; `last_run` returns it.

    Attributes:
        engine: "eager", "compile", ..., or "stock" if transformers' own loop served the call (or a part of it).
        reason: why stock served, or why another engine than the one asked for did; None if neither.
        batch_size: rows of the largest decode.
        windows: decodes run: one for short audio, one a window and temperature for long.
        compiles: times torch.compile compiled during the call; 0 once warm.
        captures: CUDA graphs captured during the call; 0 once warm.
        prefill_seconds: time from the encoder's output to the logits of the first token, summed over windows.
        decode_seconds: time from there to the last token.
        steps: decode steps, summed over windows.
        tokens: steps times rows, summed over windows.
        tokens_per_second: `tokens / decode_seconds`, all rows together; 0.0 if nothing was decoded.
    """

    engine: str
    reason: str | None = None
    batch_size: int = 0
    windows: int = 0
    compiles: int = 0
    captures: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    tokens: int = 0

    @property
    def tokens_per_second(self):
        return self.tokens / self.decode_seconds if self.decode_seconds else 0.0


class _Call:
    """One call of `generate`: what the user asked of it, and what became of it."""

    def __init__(self, model, engine="auto", *, stock_reason=None, keeps_results=True, is_shortform=True):
        self.model = weakref.ref(model)
        self.engine = engine
        self.stock_reason = stock_reason
        # Whether the user will see the result objects of the inner calls, or only their tokens.
        self.keeps_results = keeps_results
        self.is_shortform = is_shortform
        self.windows = []

    def served_by_stock(self, reason):
        self.windows.append(_Window(engine="stock", reason=reason))
        _log_once(self.model(), reason)

    def report(self):
        """The `RunReport` of the windows so far; waits for the device where its clock is needed."""
        windows = self.windows or [_Window(engine="stock", reason=self.stock_reason)]
        stock = [window for window in windows if window.engine == "stock"]
        return RunReport(
            engine="stock" if stock else windows[-1].engine,
            reason=next((window.reason for window in [*stock, *windows] if window.reason), None),
            batch_size=max(window.batch_size for window in windows),
            windows=len(windows),
            compiles=sum(window.compiles for window in windows),
            captures=sum(window.captures for window in windows),
            prefill_seconds=sum(window.clock.seconds(0) for window in windows if window.clock),
            decode_seconds=sum(window.clock.seconds(1) for window in windows if window.clock),
            steps=sum(window.steps for window in windows),
            tokens=sum(window.steps * window.batch_size for window in windows),
        )


@dataclasses.dataclass
class _Window:
    engine: str
    reason: str | None = None
    batch_size: int = 0
    compiles: int = 0
    captures: int = 0
    steps: int = 0
    clock: "_Clock | None" = None


class _Clock:
    """Marks on the device's own timeline, read only when somebody asks."""

    def __init__(self, device):
        self._on_gpu = device.type == "cuda"
        self._marks = []

    def mark(self):
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self, index):
        """Seconds between mark `index` and the next, 0.0 if the run did not get that far."""
        if index + 1 >= len(self._marks):
            return 0.0
        start, end = self._marks[index : index + 2]
        if not self._on_gpu:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


# The `generate` call that the current thread is in; inner calls (an assistant's) nest.
_CALL = contextvars.ContextVar("whisper_static_cache_call", default=None)


class _ModelState:
    """What is kept for a model between calls: engines, sessions, the last report."""

    def __init__(self):
        self.lock = threading.Lock()
        self.last_call = None
        self.logged = set()
        # What an engine could not do although it said it could: name -> reason.
        self.failed = {}
        self._forget()

    def _forget(self):
        self.fingerprint = None
        self.plain_reason = None
        self.engines = {}
        self.sessions = []
        self.user_sessions = weakref.WeakKeyDictionary()

    def refresh(self, model):
        """Drop what was built for the model as it no longer is; return why it cannot be served, or None."""
        if self.fingerprint is None or not self.fingerprint.still_holds():
            self._forget()
            self.fingerprint = ModuleFingerprint(model)
        return why_not_plain(model)

    def engine(self, model, name):
        if name not in self.engines:
            self.engines[name] = ENGINES[name](model)
        return self.engines[name]

    @contextlib.contextmanager
    def session(self, model, rows, dtype, device, user_cache):
        """A session for at least `rows` rows that no other call is using."""
        session = self._take(model, rows, dtype, device, user_cache)
        try:
            yield session
        finally:
            with self.lock:
                if user_cache is None:
                    self.sessions.append(session)
                else:
                    self.user_sessions[user_cache] = session

    def _take(self, model, rows, dtype, device, user_cache):
        with self.lock:
            if user_cache is not None:
                if user_cache in self.user_sessions:
                    session = self.user_sessions.pop(user_cache)
                    if session is None:
                        raise ValueError(
                            "`past_key_values` is in use by another generate call; give each thread a cache of its own."
                        )
                else:
                    session = Session(user_cache)
                self.user_sessions[user_cache] = None
                return session
            for index, session in enumerate(self.sessions):
                if session.max_batch_size >= rows and session.device == device:
                    return self.sessions.pop(index)
            if self.sessions:
                # Too small: a larger one takes its place, and its memory is free before the new one is allocated.
                self.sessions.pop()
        return new_session(model, rows, dtype, device)


_STATES = weakref.WeakKeyDictionary()
_STATES_LOCK = threading.Lock()


def state_of(model):
    """The `_ModelState` of `model`, made on first use. Kept outside the model: a deep copy or a pickle takes none along."""
    with _STATES_LOCK:
        if model not in _STATES:
            _STATES[model] = _ModelState()
        return _STATES[model]


def forget(model=None):
    """Free every cache, compiled step and graph kept for `model`, or for all models."""
    with _STATES_LOCK:
        if model is None:
            _STATES.clear()
        else:
            _STATES.pop(model, None)


def last_run(model):
    """What the last finished `generate` call of `model` did.

    Args:
        model: a Whisper model that `generate` was called on while patched.

    Returns:
        A `RunReport`.

    Raises:
        ValueError: `generate` has not been called on `model` since `patch()`.
    """
    state = _STATES.get(model)
    if state is None or state.last_call is None:
        raise ValueError("`model` has not generated since patch(): call model.generate(...) first.")
    return state.last_call.report()


def _log_once(model, reason):
    logged = state_of(model).logged
    if reason not in logged:
        logged.add(reason)
        logger.info("Whisper's generate is served by transformers' own loop: %s.", reason)


@contextlib.contextmanager
def generate_call(model, engine, arguments):
    """Surround a `generate` call: understand its arguments, and keep its report.

    Args:
        model: the Whisper model.
        engine: name of the engine asked for, or "auto".
        arguments: the call's arguments by name, those of `**kwargs` included.
    """
    call = _describe(model, engine, arguments)
    token = _CALL.set(call)
    try:
        yield call
    finally:
        _CALL.reset(token)
    if not call.windows:
        call.served_by_stock(call.stock_reason or "beam search and assisted decoding are not served yet")
    state_of(model).last_call = call


def _describe(model, engine, arguments):
    config = arguments.get("generation_config")

    def setting(name):
        value = arguments.get(name)
        if value is None and config is not None:
            value = getattr(config, name, None)
        return getattr(model.generation_config, name, None) if value is None else value

    cache = arguments.get("past_key_values")
    implementation = setting("cache_implementation")
    stock_reason = None
    if cache is not None and not isinstance(cache, EncoderDecoderStaticCache):
        stock_reason = f"past_key_values is a {type(cache).__name__} of the caller's"
    elif implementation not in _REPLACED_CACHES:
        stock_reason = f'cache_implementation="{implementation}"'
    features = arguments.get("input_features")
    frames = 2 * model.config.max_source_positions if features is None else features.shape[-1]
    if isinstance(cache, EncoderDecoderStaticCache):
        encoded = features if features is not None else _first_tensor(arguments.get("encoder_outputs"))
        if encoded is not None:
            rows = encoded.shape[0] * (setting("num_return_sequences") or 1)
            prompt_ids = arguments.get("prompt_ids")
            length = (setting("max_new_tokens") or 0) + (0 if prompt_ids is None else len(prompt_ids))
            cache.check_fits(model.config, rows, length, activation_dtype(model), decoder_device(model))
    return _Call(
        model,
        engine,
        stock_reason=stock_reason,
        keeps_results=bool(arguments.get("return_segments") or setting("return_dict_in_generate")),
        is_shortform=frames <= 2 * model.config.max_source_positions,
    )


def _first_tensor(encoder_outputs):
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
    **model_kwargs,
):
    """`GenerationMixin._sample` for Whisper; `stock` is the method it replaces, and serves what this does not."""
    call = _CALL.get()
    if call is None or call.model() is not model:
        call = _Call(model)
    state = state_of(model)
    job = _Job(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs, call)
    reason = job.why_stock(state, synced_gpus)
    if reason is not None:
        call.served_by_stock(reason)
        return stock(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
    # Buffers outlive the call: made under a caller's inference_mode they could not be written outside of one again.
    with torch.inference_mode(False), torch.no_grad():
        return job.run(state)


class _Job:
    """One decode: its arguments, whether it can be served, and the loop."""

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
        cache = model_kwargs.get("past_key_values")
        self.user_cache = cache if isinstance(cache, EncoderDecoderStaticCache) else None
        lengths = [c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria]
        self.max_length = min(lengths) if lengths else None

    def why_stock(self, state, synced_gpus):
        """Why transformers' own loop must serve, or None. Raises ValueError if a cache of the user's cannot hold the call."""
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
        if config.cache_implementation and self.call.keeps_results and self.call.is_shortform:
            return f'the caller sees the cache of cache_implementation="{config.cache_implementation}"'
        if self.user_cache is None and _has_content(kwargs.get("past_key_values")):
            return "past_key_values has content"
        states = _first_tensor(kwargs.get("encoder_outputs"))
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
            self.user_cache.check_fits(self.model.config, self.batch_size, self.max_length, dtype, device)
        if states.shape[1] != source_length:
            return f"encoder_outputs have {states.shape[1]} positions where the cache has {source_length}"
        mask = kwargs.get("decoder_attention_mask")
        if mask is not None and tuple(mask.shape) != tuple(self.input_ids.shape):
            return "decoder_attention_mask is not of the prompt's shape"
        return state.refresh(self.model)

    def run(self, state):
        device = self.input_ids.device
        dtype = activation_dtype(self.model)
        engine, reason = self._choose_engine(state, device)
        try:
            return self._run_on(state, engine, reason, dtype, device)
        except _EngineFailed as failure:
            # Never a crash: the reference engine repeats the window from its start. Nothing of it has been handed out yet.
            reason = f"the {engine.name} engine failed ({failure})"
            state.failed[engine.name] = reason
            logger.warning("%s; the eager engine serves from here on.", reason)
            return self._run_on(state, state.engine(self.model, "eager"), reason, dtype, device)

    def _choose_engine(self, state, device):
        wanted = self.call.engine
        name = default_engine(device) if wanted == "auto" else wanted
        reason = state.failed.get(name) or ENGINES[name].why_not(self.model, device)
        if reason:
            name = "eager"
        return state.engine(self.model, name), reason

    def _run_on(self, state, engine, reason, dtype, device):
        rows_wanted = engine.rows_for(self.batch_size)
        if self.user_cache is not None:
            rows_wanted = self.batch_size if rows_wanted > self.user_cache.max_batch_size else rows_wanted
        compiles, captures = engine.compiles, engine.captures
        window = _Window(engine.name, reason, self.batch_size, clock=_Clock(device))
        with state.session(self.model, rows_wanted, dtype, device, self.user_cache) as session:
            result, window.steps = self._decode(engine, session, rows_wanted, window.clock)
        window.compiles, window.captures = engine.compiles - compiles, engine.captures - captures
        self.call.windows.append(window)
        return result

    def _decode(self, engine, session, rows_wanted, clock):
        choice = _choice_for(self, session)
        padded, rows = session.rows(rows_wanted), session.rows(self.batch_size)
        mask = self.kwargs.get("decoder_attention_mask")
        clock.mark()
        logits, extra = engine.prefill(
            rows,
            self.input_ids,
            _first_tensor(self.kwargs["encoder_outputs"]),
            valid=None if mask is None else mask.bool(),
            mask_moves_positions=_compat.mask_moves_positions(),
            extra_index=choice.extra_index,
        )
        clock.mark()
        slot = self.prompt_length
        finished = choice.first(logits, extra)
        while not finished:
            logits = _step(engine, padded, slot)[: self.batch_size]
            slot += 1
            finished = choice.next(logits, slot)
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
        cache = self.user_cache
        if cache is None:
            # Nobody sees the cache of a long recording: transformers drops it, and only its presence counts.
            visible = cached if self.call.keeps_results and self.call.is_shortform else 0
            cache = _compat.dynamic_cache(rows.buffers, visible)
        return GenerateEncoderDecoderOutput(
            sequences=sequences,
            scores=choice.scores(steps),
            logits=choice.raw_logits(steps),
            past_key_values=cache,
        )


class _EngineFailed(Exception):
    """A step could not be built or launched."""


def _step(engine, rows, slot):
    if engine.name == "eager":
        return engine.step(rows, slot)
    try:
        return engine.step(rows, slot)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        raise _EngineFailed(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error


def _has_content(cache):
    return cache is not None and cache.get_seq_length() > 0


def default_engine(device):
    """The engine that "auto" means on `device`."""
    return "compile" if device.type == "cuda" else "eager"


def _choice_for(job, session):
    own_criteria = all(type(c) in (MaxLengthCriteria, EosTokenCriteria) for c in job.stopping_criteria)
    if job.streamer is None and own_criteria:
        try:
            vocab_size = job.model.config.vocab_size
            plan = build_plan(job.logits_processor, job.prompt_length, vocab_size, job.input_ids.device)
            return _DeviceChoice(job, session, plan)
        except UnsupportedProcessor as unsupported:
            logger.debug("%s: the loop steps with the host", unsupported)
    return _HostChoice(job, session)


class _Choice:
    """Chooses each next token from its logits and writes it into the session; keeps what the caller asked to see."""

    extra_index = None

    def __init__(self, job, session):
        config = job.config
        self.job = job
        self.session = session
        self.rows = session.rows(job.batch_size)
        self.do_sample = config.do_sample
        self.pad = config._pad_token_tensor
        self.has_eos = any(hasattr(criterion, "eos_token_id") for criterion in job.stopping_criteria)
        self.unfinished = torch.ones(job.batch_size, dtype=torch.bool, device=session.device)
        wants = config.return_dict_in_generate
        self._raw = [] if wants and config.output_logits else None
        self._scores = [] if wants and config.output_scores else None

    def _pick(self, scores):
        if self.do_sample:
            return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        return torch.argmax(scores, dim=-1)

    def _pad_finished(self, tokens):
        # Finished rows go on as padding, as in stock.
        return torch.where(self.unfinished, tokens, self.pad) if self.has_eos else tokens

    def scores(self, steps):
        return None if self._scores is None else tuple(self._scores[:steps])

    def raw_logits(self, steps):
        return None if self._raw is None else tuple(self._raw[:steps])


class _DeviceChoice(_Choice):
    """Token choice as tensor code: the host queues it and looks at the finished flag of some steps ago."""

    def __init__(self, job, session, plan):
        super().__init__(job, session)
        self.plan = plan
        self.extra_index = plan.no_speech_index
        eos = [c.eos_token_id.to(session.device) for c in job.stopping_criteria if type(c) is EosTokenCriteria]
        self.eos = torch.cat([ids.reshape(-1) for ids in eos]) if eos else None
        self.watch = session.watch
        self.watch.restart()
        self.length = session.length
        self.max_steps = max(job.max_length - job.prompt_length, 1)
        # Scores that only transformers' average log-probability will read need not be kept: the chosen tokens' will do.
        self.only_logprobs = self._scores is not None and not job.call.keeps_results
        self.temperature = job.config.temperature if self.do_sample and job.config.temperature else 1.0
        self._queued = 0
        self._generator_offsets = [] if self.do_sample and session.device.type == "cuda" else None

    def first(self, logits, extra):
        return self._take(logits, self.plan.first, extra)

    def next(self, logits, slot):
        return self._take(logits, self.plan.rest)

    def _take(self, logits, process, *extra):
        rows, length = self.rows, self.length
        if self._raw is not None:
            self._raw.append(logits.clone())
        scores = process(rows.tokens, length[0], logits, *extra)
        if self._scores is not None and not self.only_logprobs:
            self._scores.append(scores.clone())
        chosen = self._pick(scores)
        if self.only_logprobs:
            logprobs = torch.log_softmax(scores * self.temperature, dim=-1).gather(1, chosen[:, None])
            rows.token_logprobs[:, self._queued] = logprobs[:, 0]
        tokens = self._pad_finished(chosen)
        rows.tokens.index_copy_(1, length, tokens[:, None])
        length += 1
        if self.eos is not None:
            self.unfinished &= torch.isin(tokens, self.eos, invert=True)
        self._queued += 1
        if self._generator_offsets is not None:
            self._generator_offsets.append(_generator(self.session.device).get_offset())
        self.watch.record(~self.unfinished.any())
        return self._queued >= self.max_steps or self.watch.risen_at() is not None

    def steps(self):
        """Steps that count: up to the one that finished the last row. Later ones were queued before the host knew."""
        risen = self.watch.risen_at(drain=True)
        steps = self._queued if risen is None else risen + 1
        if self._generator_offsets and steps < self._queued:
            # The next draw must be the one that stock would make.
            _generator(self.session.device).set_offset(self._generator_offsets[steps - 1])
        return steps

    def scores(self, steps):
        if self.only_logprobs:
            # One tensor `(batch,)` a step, on the host, where `average_logprob` finds them.
            return tuple(self.rows.token_logprobs[:, :steps].cpu().unbind(1))
        return super().scores(steps)


class _HostChoice(_Choice):
    """Token choice with processors, criteria and streamers of the user's own, which see what stock would show them."""

    def __init__(self, job, session):
        super().__init__(job, session)
        self._steps = 0

    def first(self, logits, extra):
        return self.next(logits, self.job.prompt_length)

    def next(self, logits, slot):
        job, tokens = self.job, self.rows.tokens
        scores = job.logits_processor(tokens[:, :slot].clone(), logits.clone())
        if self._raw is not None:
            self._raw.append(logits.clone())
        if self._scores is not None:
            self._scores.append(scores)
        chosen = self._pad_finished(self._pick(scores))
        tokens[:, slot] = chosen
        self.session.length += 1
        if job.streamer is not None:
            job.streamer.put(chosen.cpu())
        scores_so_far = None if self._scores is None else tuple(self._scores)
        self.unfinished &= ~job.stopping_criteria(tokens[:, : slot + 1].clone(), scores_so_far)
        self._steps += 1
        return not bool(self.unfinished.any())

    def steps(self):
        return self._steps


def _generator(device):
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def average_logprob(stock, scores, tokens, *args, **kwargs):
    """`_retrieve_avg_logprobs` that also reads the per-token log-probabilities `_DeviceChoice` keeps in place of scores.

    Args:
        stock: the method it replaces, called where `scores` are scores.
        scores: per step a float tensor, `(vocab_size,)` scores or a 0-dim log-probability of the token chosen.
        tokens: `(length,)` int64 tokens, the end token included.
    """
    if scores[0].dim() != 0:
        return stock(scores, tokens, *args, **kwargs)
    logprobs = torch.stack(list(scores))
    if logprobs.shape[0] > tokens.shape[0]:
        logprobs = logprobs[: tokens.shape[0]]
    else:
        tokens = tokens[-logprobs.shape[0] :]
    return _compat.average_logprob(logprobs, tokens, args, kwargs)


def warmup(model, batch_sizes=(1,), *, engine=None):
    """Allocate, compile and capture ahead of time what `generate` will need for these batch sizes.

    Args:
        model: a Whisper model on the device and in the dtype it will be used in.
        batch_sizes: batch sizes (rows: audio files times `num_return_sequences`) to be ready for. Smaller batches than the
            largest one need nothing more.
        engine: name of an engine, or None for the one that `patch` was told to use.

    Returns:
        `RunReport` of the warm-up: compiles, captures and seconds.

    Raises:
        ValueError: a batch size is not a positive integer, the engine is unknown, or the model cannot be served.
    """
    from .monkey_patch import check_engine, engine_of

    sizes = sorted(set(batch_sizes))
    for size in sizes:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"`batch_sizes` has {size!r}: pass positive integers.")
    call = _Call(model, check_engine(engine) if engine is not None else engine_of(model))
    state = state_of(model)
    config = model.generation_config
    device, dtype = decoder_device(model), activation_dtype(model)
    start = config.decoder_start_token_id
    for size in reversed(sizes):
        shape = (size, model.config.max_source_positions, model.config.d_model)
        generation_config = _compat.plain_generation_config(model)
        job = _Job(
            model,
            torch.full((size, 1), 0 if start is None else start, dtype=torch.int64, device=device),
            [],
            [MaxLengthCriteria(max_length=4)],
            generation_config,
            None,
            {"encoder_outputs": (torch.zeros(shape, dtype=dtype, device=device),)},
            call,
        )
        reason = job.why_stock(state, synced_gpus=False)
        if reason is not None:
            raise ValueError(f"`model` cannot be warmed up: {reason}.")
        with torch.inference_mode(False), torch.no_grad():
            job.run(state)
    return call.report()
