"""One class for each logits processor of transformers that is reproduced as device-side tensor code.

A class reads transformers' object once, on the host, and is then a function ``(tokens, length, scores) -> scores``:

- ``tokens``: ``(batch, max_length)`` int64, valid in its first ``length`` columns and anything beyond;
- ``length``: 0-dim int64 on the device;
- ``scores``: ``(batch, vocab_size)`` float32, owned by the callee: the result is ``scores`` itself or a new tensor.

The floating-point operations are transformers' own in transformers' order, so that results agree to the last bit.
`logits_process` puts the classes together into a plan.
"""

import functools
import math
import types
import weakref
from typing import NamedTuple

import torch
from torch.distributions import Categorical


STOCK_MODULE = "transformers.generation.logits_process"


class UnsupportedProcessor(Exception):
    """A logits processor that is not reproduced exactly; the message is the reason and names the class."""


class Setting(NamedTuple):
    """What a list of processors is read for."""

    prompt_length: int
    vocab_size: int
    device: torch.device


# --- reading transformers' objects -----------------------------------------------------------------------------------


def is_stock(cls):
    """Whether calling an instance of ``cls`` runs the code that transformers ships for a class of that name.

    The globals of the function are compared, not its ``__module__``: `functools.wraps` copies the latter.
    """
    call = cls.__call__
    return (
        cls.__module__ == STOCK_MODULE
        and isinstance(call, types.FunctionType)
        and call.__globals__.get("__name__") == STOCK_MODULE
        and call.__qualname__ == f"{cls.__name__}.__call__"
    )


def require(condition, stock, reason):
    if not condition:
        raise UnsupportedProcessor(f"{type(stock).__name__}: {reason}")


def _float(stock, name):
    value = getattr(stock, name)
    require(isinstance(value, (int, float)), stock, f"{name} is a {type(value).__name__}, not a number")
    return float(value)


def _int(stock, name, low, high=math.inf):
    """An integer attribute in ``[low, high]``; outside, Python's slices would count from the end, or not at all."""
    value = getattr(stock, name)
    require(isinstance(value, int), stock, f"{name} is a {type(value).__name__}, not an int")
    require(low <= value <= high, stock, f"{name} is {value}, outside [{low}, {high}]")
    return int(value)


# Processor -> attribute -> (tensor, version, ids). The token lists lie on the device, and reading one back waits for
# all that is queued there, which is the encoder; Whisper's generate keeps its processors from window to window.
_ids_read = weakref.WeakKeyDictionary()


def _ids(stock, name):
    tensor = getattr(stock, name)
    require(isinstance(tensor, torch.Tensor), stock, f"{name} is a {type(tensor).__name__}, not a tensor")
    if tensor.is_inference():  # counts no versions, so that a change in place would go unseen
        return tensor.flatten().tolist()
    known = _ids_read.setdefault(stock, {})
    if name not in known or known[name][0] is not tensor or known[name][1] != tensor._version:
        known[name] = (tensor, tensor._version, tensor.flatten().tolist())
    return known[name][2]


def _vocabulary_ids(stock, name, vocab_size):
    """The ids that `torch.isin` finds in ``arange(vocab_size)``: others, negative ones too, mark nothing."""
    return tuple(sorted({int(i) for i in _ids(stock, name) if 0 <= i < vocab_size and i == int(i)}))


def _division(value, device):
    """Operation and operand that stand for ``scores / value`` with a Python number.

    Where the divisor is a number, CUDA kernels multiply by its reciprocal, which is asked of them: they round it their
    own way.
    """
    if device.type == "cuda":
        return torch.mul, torch.ones((), device=device) / value
    return torch.div, value


# --- one class a processor -------------------------------------------------------------------------------------------


class Processor:
    """One processor of the list. Construction reads transformers' object; `materialize` is what allocates.

    ``attributes`` are all the instance attributes that the class has had in the supported releases, ``static`` is what
    the tensor code depends on by structure, ``numbers`` what it reads from device tensors of the same names, which
    `load` overwrites. ``at_first`` and ``at_rest`` say whether it can act at the first token and at later ones.
    """

    attributes: frozenset = frozenset()
    at_first = True
    at_rest = True
    static: tuple = ()

    def __init__(self, stock, setting):
        self.numbers = {}

    @property
    def key(self):
        return (type(self).__name__, self.at_first, self.at_rest, self.static)

    def materialize(self, setting):
        """Puts what the code reads onto the device."""
        for name, value in self.numbers.items():
            if isinstance(value, torch.Tensor):
                tensor = value.detach().to(setting.device, copy=True)
            else:
                dtype = torch.int64 if isinstance(value, int) else torch.float32
                tensor = torch.full((), value, dtype=dtype, device=setting.device)
            setattr(self, name, tensor)

    def load(self, other):
        for name, value in other.numbers.items():
            tensor = getattr(self, name)
            # fill_ passes the number with the launch: no copy from the host, nothing to wait for
            tensor.copy_(value) if isinstance(value, torch.Tensor) else tensor.fill_(value)

    def first(self, tokens, length, scores, sot_logits):
        return self(tokens, length, scores)

    def __call__(self, tokens, length, scores):
        raise NotImplementedError


def _mask(ids, vocab_size, device):
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[list(ids)] = True
    return mask.to(device)


# Copying one to the device waits for all that is queued there, and calls of `generate` have the same ones.
_kept_mask = functools.lru_cache(maxsize=16)(_mask)


class Mask(Processor):
    """A processor that forbids a fixed set of tokens, always or under a condition."""

    def materialize(self, setting):
        super().materialize(setting)
        # "cuda" without a number is another device at another time.
        make = _kept_mask if setting.device.type == "cpu" or setting.device.index is not None else _mask
        self.mask = make(self.static, setting.vocab_size, setting.device)


class SuppressTokens(Mask):
    attributes = frozenset({"suppress_tokens"})

    def __init__(self, stock, setting):
        super().__init__(stock, setting)
        self.static = _vocabulary_ids(stock, "suppress_tokens", setting.vocab_size)

    def __call__(self, tokens, length, scores):
        return scores.masked_fill_(self.mask, -math.inf)


class SuppressTokensAtBegin(Mask):
    attributes = frozenset({"begin_suppress_tokens", "begin_index"})

    def __init__(self, stock, setting):
        super().__init__(stock, setting)
        self.static = _vocabulary_ids(stock, "begin_suppress_tokens", setting.vocab_size)
        begin_index = _int(stock, "begin_index", 0)
        self.numbers["begin_index"] = begin_index
        self.at_first = begin_index == setting.prompt_length
        self.at_rest = begin_index > setting.prompt_length

    def __call__(self, tokens, length, scores):
        return scores.masked_fill_(self.mask & (length == self.begin_index), -math.inf)


class MinLength(Mask):
    attributes = frozenset({"min_length", "eos_token_id"})

    def __init__(self, stock, setting):
        super().__init__(stock, setting)
        self.static = _vocabulary_ids(stock, "eos_token_id", setting.vocab_size)
        min_length = self._min_length(stock)
        self.numbers["min_length"] = min_length
        self.at_first = setting.prompt_length < min_length
        self.at_rest = setting.prompt_length + 1 < min_length

    def _min_length(self, stock):
        return _int(stock, "min_length", 0)

    def __call__(self, tokens, length, scores):
        return scores.masked_fill_(self.mask & (length < self.min_length), -math.inf)


class MinNewTokensLength(MinLength):
    attributes = frozenset({"prompt_length_to_skip", "min_new_tokens", "eos_token_id"})

    def _min_length(self, stock):
        return _int(stock, "prompt_length_to_skip", 0) + _int(stock, "min_new_tokens", 0)


class ForcedBOSToken(Mask):
    attributes = frozenset({"bos_token_id"})
    at_rest = False  # acts on a history of one token, and a later history has at least two

    def __init__(self, stock, setting):
        super().__init__(stock, setting)
        self.static = (_int(stock, "bos_token_id", 0, setting.vocab_size - 1),)
        self.at_first = setting.prompt_length == 1

    def __call__(self, tokens, length, scores):
        return scores.fill_(-math.inf).masked_fill_(self.mask, 0.0)


class ForcedEOSToken(Mask):
    attributes = frozenset({"max_length", "eos_token_id"})

    def __init__(self, stock, setting):
        super().__init__(stock, setting)
        self.static = _vocabulary_ids(stock, "eos_token_id", setting.vocab_size)
        outside = [i for i in _ids(stock, "eos_token_id") if i not in self.static]
        require(not outside, stock, f"eos_token_id {outside} is outside a vocabulary of {setting.vocab_size}")
        self.numbers["forced_length"] = _int(stock, "max_length", 1) - 1

    def __call__(self, tokens, length, scores):
        forced = length == self.forced_length
        return scores.masked_fill_(forced & ~self.mask, -math.inf).masked_fill_(forced & self.mask, 0.0)


class InfNanRemove(Processor):
    def __call__(self, tokens, length, scores):
        return scores.nan_to_num_(nan=0.0)  # infinities become the largest and the smallest number of the dtype


class LogitNormalization(Processor):
    def __call__(self, tokens, length, scores):
        return scores.log_softmax(dim=-1)


class RepetitionPenalty(Processor):
    # the last three belong to continuous batching, whose scores have three dimensions
    attributes = frozenset(
        {"penalty", "prompt_ignore_length", "logits_indices", "cu_seq_lens_q", "cumulative_seqlens_q"}
    )

    def __init__(self, stock, setting):
        super().__init__(stock, setting)
        penalty = _float(stock, "penalty")
        self.divide, divisor = _division(penalty, setting.device)
        ignored = getattr(stock, "prompt_ignore_length", None)  # since 4.53; of each row since 5.23
        if isinstance(ignored, torch.Tensor):
            require(ignored.dim() == 1, stock, f"prompt_ignore_length has {ignored.dim()} dimensions, not 1")
            self.static = (ignored.shape[0],)
            ignored = ignored[:, None].long()
        elif ignored is None:
            ignored = 0
        else:
            ignored = _int(stock, "prompt_ignore_length", 0)
        self.numbers.update(penalty=penalty, divisor=divisor, ignored=ignored)

    def __call__(self, tokens, length, scores):
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        counted = (positions >= self.ignored) & (positions < length)
        # What does not count stands in as the last token: that one counts as soon as any does, and a token that is
        # scattered twice is scattered with the same value.
        ids = torch.where(counted, tokens, tokens.index_select(1, (length - 1).view(1)))
        score = scores.gather(1, ids)
        penalised = torch.where(score < 0, score * self.penalty, self.divide(score, self.divisor))
        return scores.scatter_(1, ids, torch.where(self.ignored < length, penalised, score))


class NoRepeatNGram(Processor):
    attributes = frozenset({"ngram_size"})

    def __init__(self, stock, setting):
        super().__init__(stock, setting)
        self.ngram_size = _int(stock, "ngram_size", 1)
        self.static = (self.ngram_size,)

    def __call__(self, tokens, length, scores):
        batch_size, max_length = tokens.shape
        size = self.ngram_size
        if max_length < size:  # a shape, not a device value: no history in this buffer can hold such an n-gram
            return scores
        windows = tokens.unfold(1, size, 1)  # (batch, windows, size); the last token of window i is token i + size - 1
        prefix_positions = (torch.arange(1 - size, 0, device=tokens.device) + length).clamp_(min=0)
        prefix = tokens.index_select(1, prefix_positions)
        complete = torch.arange(size - 1, max_length, device=tokens.device) < length
        repeats = (windows[..., :-1] == prefix[:, None]).all(dim=-1) & complete
        # One column more than the vocabulary takes the windows that forbid nothing.
        vocab_size = scores.shape[-1]
        banned = torch.zeros(batch_size, vocab_size + 1, dtype=torch.bool, device=scores.device)
        banned.scatter_(1, torch.where(repeats, windows[..., -1], vocab_size), True)
        return scores.masked_fill_(banned[:, :vocab_size], -math.inf)


class WhisperTimeStamp(Processor):
    attributes = frozenset(
        {
            "no_timestamps_token_id",
            "timestamp_begin",
            "eos_token_id",
            "_detect_timestamp_from_logprob",
            "begin_index",
            "max_initial_timestamp_index",
        }
    )

    def __init__(self, stock, setting):
        super().__init__(stock, setting)
        vocab_size = setting.vocab_size
        self.no_timestamps = _int(stock, "no_timestamps_token_id", 0, vocab_size - 1)
        self.timestamp_begin = _int(stock, "timestamp_begin", 1, vocab_size)
        self.eos = _int(stock, "eos_token_id", 0)
        detect = stock._detect_timestamp_from_logprob
        require(isinstance(detect, int), stock, f"_detect_timestamp_from_logprob is a {type(detect).__name__}")
        self.detect = bool(detect)
        self.last_allowed = vocab_size
        if stock.max_initial_timestamp_index is not None:
            self.last_allowed = self.timestamp_begin + _int(stock, "max_initial_timestamp_index", 0)
        begin_index = _int(stock, "begin_index", 0)
        self.numbers["begin_index"] = begin_index
        self.initial_at_first = begin_index == setting.prompt_length
        self.initial_at_rest = begin_index > setting.prompt_length
        self.static = (
            self.no_timestamps,
            self.timestamp_begin,
            self.eos,
            self.detect,
            self.last_allowed,
            self.initial_at_first,
            self.initial_at_rest,
        )

    def materialize(self, setting):
        super().materialize(setting)
        ids = torch.arange(setting.vocab_size, device=setting.device)
        self.timestamp_ids = ids[self.timestamp_begin :]
        self.not_initial = (ids < self.timestamp_begin) | (ids > self.last_allowed)
        self.last_two = torch.arange(1, 3, device=setting.device)

    def first(self, tokens, length, scores, sot_logits):
        return self._apply(tokens, length, scores, self.initial_at_first)

    def __call__(self, tokens, length, scores):
        return self._apply(tokens, length, scores, self.initial_at_rest)

    def _apply(self, tokens, length, scores, initial):
        begin = self.timestamp_begin
        scores[:, self.no_timestamps].fill_(-math.inf)

        generated = length - self.begin_index
        recent = (
            tokens.index_select(1, (length - self.last_two).clamp_(min=0)) >= begin
        )  # (batch, 2): last, one before
        last_was_timestamp = recent[:, :1] & (generated >= 1)
        penultimate_was_timestamp = recent[:, 1:] | (generated < 2)
        # Timestamps come in pairs: after a closed pair text must follow, after a single one its partner or the end.
        pair_open = last_was_timestamp & ~penultimate_was_timestamp
        pair_closed = last_was_timestamp & penultimate_was_timestamp

        # Timestamps do not decrease, and only the partner of an open pair may repeat its value.
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        is_timestamp = (tokens >= begin) & (positions >= self.begin_index) & (positions < length)
        position = torch.where(is_timestamp, positions, -1).amax(dim=1, keepdim=True)
        earliest = tokens.gather(1, position.clamp(min=0)) + ~pair_open
        forbidden = pair_closed | ((position >= 0) & (self.timestamp_ids < earliest))
        scores[:, begin:].masked_fill_(forbidden, -math.inf)
        scores[:, : self.eos].masked_fill_(pair_open, -math.inf)

        if initial:
            scores.masked_fill_(self.not_initial & (length == self.begin_index), -math.inf)

        if self.detect:
            logprobs = scores.log_softmax(dim=-1)
            timestamp_logprob = logprobs[:, begin:].logsumexp(dim=-1, keepdim=True)
            max_text_logprob = logprobs[:, :begin].amax(dim=-1, keepdim=True)
            scores[:, :begin].masked_fill_(timestamp_logprob > max_text_logprob, -math.inf)
        return scores


class WhisperNoSpeechDetection(Processor):
    """Stores the probability of the no-speech token at ``<|startoftranscript|>`` on transformers' own object.

    transformers runs the whole model again for it, at every temperature, over the batch that the first temperature
    began with. The logits of the prefill are the same ones; later temperatures see fewer rows and keep what is stored.
    The object is referred to weakly: a plan outlives the call, and the object holds the model and the audio.
    """

    attributes = frozenset(
        {
            "no_speech_token",
            "start_of_trans_offset",
            "begin_index",
            "_no_speech_prob",
            "is_scores_logprobs",
            "model",
            "inputs",
            "_stored_for_inputs",
        }
    )
    at_rest = False

    @classmethod
    def ran(cls, processors):
        """Note that transformers' own objects in the list have run, and stored what holds for all temperatures.

        A later temperature sees other rows than these were stored for: fewer, or as many where a static cache pads
        them.
        """
        for stock in processors:
            if type(stock).__name__ == cls.__name__:
                stock._stored_for_inputs = getattr(stock, "inputs", None)

    def __init__(self, stock, setting):
        super().__init__(stock, setting)
        self.stock = weakref.ref(stock)
        self.prompt_length = setting.prompt_length
        begin_index = _int(stock, "begin_index", 0)
        require(
            begin_index <= setting.prompt_length,
            stock,
            f"begin_index {begin_index} is beyond the prompt of {setting.prompt_length} tokens",
        )
        self.no_speech_token = _int(stock, "no_speech_token", 0, setting.vocab_size - 1)
        offset = _int(stock, "start_of_trans_offset", 0)
        self.acts = begin_index == setting.prompt_length
        self.index = None
        if self.acts and offset > 1:
            require(offset <= begin_index, stock, f"start_of_trans_offset {offset} is above begin_index {begin_index}")
            ids = (stock.inputs or {}).get("decoder_input_ids")
            require(isinstance(ids, torch.Tensor), stock, "its inputs hold no decoder_input_ids")
            self.index = begin_index - offset

    @property
    def needed_index(self):
        """Prompt position whose logits `first` needs, or None where it needs none (any more)."""
        stock = self.stock()
        stored = stock is not None and getattr(stock, "_stored_for_inputs", None) is stock.inputs
        return None if self.index is None or stored else self.index

    def load(self, other):
        self.stock = other.stock
        self.prompt_length = other.prompt_length
        self.no_speech_token = other.no_speech_token
        self.acts = other.acts
        self.index = other.index

    def first(self, tokens, length, scores, sot_logits):
        stock = self.stock()
        if not self.acts or stock is None:
            return scores
        if self.index is None:
            probs = scores.exp() if stock.is_scores_logprobs else scores.softmax(dim=-1)
            stock._no_speech_prob = probs[:, self.no_speech_token].clone()
        elif self.needed_index is not None:
            if stock.inputs["decoder_input_ids"].shape[0] != scores.shape[0]:
                # Several rows of the batch have one input, or an earlier temperature was not seen here.
                stock(tokens[:, : self.prompt_length], scores)
            elif sot_logits is None:
                raise ValueError(f"sot_logits is missing: pass the prefill's logits at prompt position {self.index}.")
            else:
                stock._no_speech_prob = sot_logits.float().softmax(dim=-1)[:, self.no_speech_token].clone()
            stock._stored_for_inputs = stock.inputs
        return scores


class Temperature(Processor):
    attributes = frozenset({"temperature"})

    def __init__(self, stock, setting):
        super().__init__(stock, setting)
        self.divide, self.numbers["divisor"] = _division(_float(stock, "temperature"), setting.device)

    def __call__(self, tokens, length, scores):
        return self.divide(scores, self.divisor)


class Filter(Processor):
    """A warper: sets the scores of the tokens that are not to be sampled to its ``filter_value``."""

    def __init__(self, stock, setting):
        super().__init__(stock, setting)
        self.filter_value = _float(stock, "filter_value")
        self.static = (self.filter_value,)

    def removed(self, scores):
        """``(batch, vocab)`` bool: what is filtered."""
        raise NotImplementedError

    def __call__(self, tokens, length, scores):
        return scores.masked_fill_(self.removed(scores), self.filter_value)


class KeepFilter(Filter):
    """A warper that keeps at least ``min_tokens_to_keep`` tokens."""

    def __init__(self, stock, setting):
        super().__init__(stock, setting)
        self.keep = _int(stock, "min_tokens_to_keep", 1)
        self.static += (self.keep,)


class TopK(Filter):
    attributes = frozenset({"top_k", "filter_value", "min_tokens_to_keep"})

    def __init__(self, stock, setting):
        super().__init__(stock, setting)
        self.top_k = min(_int(stock, "top_k", 1), setting.vocab_size)
        self.static += (self.top_k,)

    def removed(self, scores):
        return scores < scores.topk(self.top_k).values[:, -1:]


class TopP(KeepFilter):
    attributes = frozenset({"top_p", "filter_value", "min_tokens_to_keep"})

    def __init__(self, stock, setting):
        super().__init__(stock, setting)
        self.numbers["removed_mass"] = 1 - _float(stock, "top_p")

    def removed(self, scores):
        sorted_scores, order = scores.sort(descending=False)
        removed = sorted_scores.softmax(dim=-1).cumsum(dim=-1) <= self.removed_mass
        removed[:, -self.keep :].fill_(False)
        return removed.scatter(1, order, removed)


# Validation of a distribution's parameters reads them on the host. Without it a row that holds no finite score is not
# refused here, but by the sampling that follows.
_unchecked = functools.partial(Categorical, validate_args=False)


class TopH(Filter):
    attributes = frozenset({"top_n", "top_h", "filter_value"})

    def __init__(self, stock, setting):
        super().__init__(stock, setting)
        self.top_n = min(_int(stock, "top_n", 1), setting.vocab_size)
        self.static += (self.top_n,)
        self.numbers["top_h"] = _float(stock, "top_h")

    def removed(self, scores):
        top_scores, order = scores.topk(self.top_n, dim=-1)
        top = _unchecked(logits=top_scores)
        threshold = (top.entropy() * self.top_h)[:, None]
        kept = (-top.probs * torch.log(top.probs)).cumsum(dim=-1) <= threshold
        kept[:, :1].fill_(True)
        return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order, ~kept)


class MinP(Filter):
    attributes = frozenset({"min_p", "filter_value", "min_tokens_to_keep"})

    def __init__(self, stock, setting):
        super().__init__(stock, setting)
        # Of equal scores, 4.x keeps others than 5.x does. The one best token is never below the threshold anyway.
        keep = _int(stock, "min_tokens_to_keep", 1)
        require(keep == 1, stock, f"min_tokens_to_keep is {keep}, and releases differ in which tokens that keeps")
        self.numbers["min_p"] = _float(stock, "min_p")
        require(0 <= stock.min_p <= 1, stock, f"min_p is {stock.min_p}, outside [0, 1]")

    def removed(self, scores):
        probs = scores.softmax(dim=-1)
        return probs < self.min_p * probs.amax(dim=-1, keepdim=True)


class Typical(KeepFilter):
    attributes = frozenset({"mass", "filter_value", "min_tokens_to_keep"})

    def __init__(self, stock, setting):
        super().__init__(stock, setting)
        self.numbers["mass"] = _float(stock, "mass")

    def removed(self, scores):
        logprobs = scores.log_softmax(dim=-1)
        entropy = -(logprobs * logprobs.exp()).nansum(-1, keepdim=True)
        distance, order = (-logprobs - entropy).abs().sort(descending=False)
        mass = scores.gather(-1, order).softmax(dim=-1).cumsum(dim=-1)
        last = (mass < self.mass).sum(dim=1, keepdim=True).clamp_(max=scores.shape[-1] - 1)
        removed = distance > distance.gather(1, last)
        removed[:, : self.keep].fill_(False)
        return removed.scatter(1, order, removed)


class Epsilon(KeepFilter):
    attributes = frozenset({"epsilon", "filter_value", "min_tokens_to_keep"})

    def __init__(self, stock, setting):
        super().__init__(stock, setting)
        self.top_k = min(self.keep, setting.vocab_size)
        self.numbers["epsilon"] = self._epsilon(stock)

    def _epsilon(self, stock):
        return _float(stock, "epsilon")

    def threshold(self, scores):
        return self.epsilon

    def removed(self, scores):
        improbable = scores.softmax(dim=-1) < self.threshold(scores)
        return improbable & (scores < scores.topk(self.top_k).values[:, -1:])


class Eta(Epsilon):
    def _epsilon(self, stock):
        epsilon = stock.epsilon
        is_scalar = isinstance(epsilon, torch.Tensor) and epsilon.dim() == 0 and epsilon.dtype == torch.float32
        require(is_scalar, stock, "epsilon is not a float32 scalar tensor")
        return epsilon

    def threshold(self, scores):
        entropy = _unchecked(logits=scores).entropy()
        return torch.min(self.epsilon, torch.sqrt(self.epsilon) * torch.exp(-entropy))[:, None]
