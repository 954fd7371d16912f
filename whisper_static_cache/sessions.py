"""What is kept between calls: for each model its engines and sessions, for each running call one session."""

import contextlib
import threading
import weakref

import torch

from .cache_utils import EncoderDecoderStaticCache
from .cuda_graphs import FinishedWatch
from .modeling_whisper import ModuleFingerprint, why_not_plain


class Session:
    """What one running call owns: the cache's buffers and the loop's tensors, reused from call to call.

    A session serves one call at a time. It keeps no reference to the cache object that the buffers came from, so that
    a cache of the user's can be collected while the session is remembered under it.

    Args:
        cache: the `EncoderDecoderStaticCache` whose buffers the session works on.
    """

    def __init__(self, cache):
        buffers = cache.layer_buffers
        self.max_batch_size, self.max_inputs = cache.max_batch_size, cache.max_inputs
        self.cross_dtype = cache.cross_dtype
        self.device = buffers[0].self_keys.device
        self.slots = buffers[0].self_keys.shape[2]
        self.source_length = buffers[0].cross_keys.shape[2]
        self.buffers = [tuple(layer) for layer in buffers]
        # One column more than the cache has slots: the last token chosen is never fed.
        self.tokens = torch.zeros(self.max_batch_size, self.slots + 1, dtype=torch.int64, device=self.device)
        self.length = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.position_offset = torch.zeros(self.max_batch_size, 1, dtype=torch.int64, device=self.device)
        self.valid = torch.ones(self.max_batch_size, self.slots, dtype=torch.bool, device=self.device)
        self.token_logprobs = torch.zeros(self.max_batch_size, self.slots + 1, device=self.device)
        self.watch = FinishedWatch(self.device, self.slots + 1)
        self.padded_prompt = False
        self.graph_pool = None
        # Graphs of the compiled step by rows and by the adapters' switches, and the switches of the running call.
        self.graphs = {}
        self.switches = ()
        # What an engine keeps for this session, by the engine's name.
        self.engine_buffers = {}
        self._rows = {}

    def works_on(self, cache):
        """Whether these are still `cache`'s buffers: moving it to another device gives it new ones."""
        return self.buffers[0][0] is cache.layer_buffers[0].self_keys

    def rows(self, count, beams=1):
        """Views of the first `count` rows of every tensor, `beams` of which share an input: `Rows`."""
        if (count, beams) not in self._rows:
            self._rows[count, beams] = Rows(self, count, beams)
        return self._rows[count, beams]

    def clear(self):
        """Leave no trace of the last call in what a step may read without having written it."""
        torch._foreach_zero_([buffer for layer in self.buffers for buffer in layer[:2]])


class Rows:
    """Views of `count` of a session's rows, from the first one on, and of the cross-attention rows of their inputs."""

    def __init__(self, session, count, beams, first=0):
        self.session = session
        self.count = count
        self.beams = beams
        self.span = slice(first, first + count)
        inputs = slice(first // beams, -(-(first + count) // beams))
        self.buffers = [
            (*(buffer[self.span] for buffer in layer[:2]), *(buffer[inputs] for buffer in layer[2:]))
            for layer in session.buffers
        ]
        self.tokens = session.tokens[self.span]
        self.position_offset = session.position_offset[self.span]
        self.valid = session.valid[self.span]
        self.token_logprobs = session.token_logprobs[self.span]

    def one_by_one(self):
        """Each of these rows by itself."""
        return [Rows(self.session, 1, self.beams, row) for row in range(self.span.start, self.span.stop)]

    def halves(self):
        """Two of as many rows each that have all of these; some are in both where it does not come out even."""
        # Rows that share an input stay together. Where only some rows were asked for, buffers tell how many do.
        beams = self.count // len(self.buffers[0][2])
        half = -(-self.count // (2 * beams)) * beams
        firsts = self.span.start, self.span.stop - half
        return [Rows(self.session, half, beams, first) for first in firsts]


class ModelState:
    """What is kept for a model between calls: engines, sessions, the last report."""

    def __init__(self):
        self.lock = threading.Lock()
        self.last_call = None
        self.logged = set()
        # What stands in for the encoder; it looks after its own staleness.
        self.encoder = None
        self._forget()

    def _forget(self):
        # What an engine could not do although it said it could: name -> reason.
        self.failed = {}
        self.fingerprint = None
        # What was found out about the model as it is, and the circumstances in which it was.
        self._reasons = {}
        self._circumstances = None
        self.engines = {}
        self.sessions = []
        self.user_sessions = weakref.WeakKeyDictionary()

    def refresh(self, model):
        """Drop what was built for the model as it no longer is; return why it cannot be served, or None."""
        with self.lock:
            if self.fingerprint is None or not self.fingerprint.still_holds():
                self._forget()
                self.fingerprint = ModuleFingerprint(model, "model.decoder", "proj_out")
            circumstances = (self.fingerprint.circumstances(model), _facts(model))
            if circumstances != self._circumstances:
                self._reasons, self._circumstances = {}, circumstances
        if model.training:
            # Hinges on the rates of dropout as well, and nobody is in a hurry.
            return why_not_plain(model)
        return self.reason("plain", lambda: why_not_plain(model))

    def reason(self, key, find):
        """What `find()` gives for the model as the last `refresh` saw it: the reason why something cannot serve it.

        Asked for before every window and found out once. It may hinge on nothing but what `ModuleFingerprint` and
        `_facts` tell, and on `key`.
        """
        reasons = self._reasons
        if key not in reasons:
            reasons[key] = find()
        return reasons[key]

    def engine(self, model, kind):
        """The model's engine of class `kind`, made on first use."""
        with self.lock:
            if kind.name not in self.engines:
                self.engines[kind.name] = kind(model)
            return self.engines[kind.name]

    @contextlib.contextmanager
    def session(self, model, rows, dtype, device, user_cache, inputs=None, cross_dtype=None):
        """A session for at least `rows` rows, of `inputs` inputs if not one each, that no other call is using.

        It works on `user_cache`, or on a cache of its own, with cross-attention in `cross_dtype`.
        """
        inputs = rows if inputs is None else inputs
        session = self._take(model, rows, inputs, dtype, device, user_cache, cross_dtype)
        try:
            yield session
        finally:
            with self.lock:
                if user_cache is None:
                    self.sessions.append(session)
                else:
                    self.user_sessions[user_cache] = session

    def _take(self, model, rows, inputs, dtype, device, user_cache, cross_dtype):
        with self.lock:
            if user_cache is not None:
                session = self.user_sessions.get(user_cache)
                if session is _IN_USE:
                    raise ValueError(
                        "The cache is in use by another generate call: give each thread a cache of its own."
                    )
                if session is None or not session.works_on(user_cache):
                    session = Session(user_cache)
                self.user_sessions[user_cache] = _IN_USE
                return session
            for index, session in enumerate(self.sessions):
                fits = session.max_batch_size >= rows and session.max_inputs >= inputs
                if fits and session.device == device and session.cross_dtype == cross_dtype:
                    return self.sessions.pop(index)
            if self.sessions:
                # Too small, or in the wrong width: another takes its place, and its memory is free before that one is
                # allocated.
                old = self.sessions.pop()
                # Beams need rows and a batch needs inputs: a model that is used for both must not go to and fro.
                rows, inputs = max(rows, old.max_batch_size), max(inputs, old.max_inputs)
                del old
        cache = EncoderDecoderStaticCache(
            model.config, rows, max_inputs=inputs, dtype=dtype, device=device, cross_dtype=cross_dtype
        )
        return Session(cache)


def _facts(model):
    """What the reasons hinge on beside modules and tensors."""
    config = model.config
    return config.d_model, config.decoder_attention_heads, config.decoder_ffn_dim, config.activation_function


# Stands in `user_sessions` while a call has the session.
_IN_USE = object()
_STATES = weakref.WeakKeyDictionary()
_STATES_LOCK = threading.Lock()


def state_of(model):
    """The `ModelState` of `model`, made on first use. Kept outside the model: a deep copy takes none along."""
    with _STATES_LOCK:
        if model not in _STATES:
            _STATES[model] = ModelState()
        return _STATES[model]


def forget(model=None):
    """Free every cache, compiled step and graph kept for `model`, or for all models."""
    with _STATES_LOCK:
        if model is None:
            _STATES.clear()
        else:
            _STATES.pop(model, None)


def last_call(model):
    """The `Call` that `model` finished last, or None."""
    state = _STATES.get(model)
    return None if state is None else state.last_call
