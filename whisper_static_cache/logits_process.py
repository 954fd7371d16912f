"""transformers' logits processors as device-side tensor code.

A processor of transformers is called with the history as a tensor that grows by one token a step; some of them read it
back to the host. Here every processor is a function of a fixed-shape token buffer and a device-side length, without a
host synchronisation or a data-dependent shape, so that a decode step that contains it can be captured in a CUDA graph.
The results are transformers' own to the last bit on the CPU, in every supported release.

    plan = build_plan(logits_processor, prompt_length, vocab_size, device)  # or raises UnsupportedProcessor
    scores = plan.first(tokens, length, logits, sot_logits)                 # first generated token
    scores = plan.rest(tokens, length, logits)                              # every later one

Only what is known to be reproduced exactly is accepted: a subclass, a patched ``__call__``, an attribute or a value
that no supported release has makes `build_plan` raise with the reason; the caller then runs transformers' own list.
"""

import torch

from . import logits_processors as reproductions
from .logits_processors import STOCK_MODULE, Setting, UnsupportedProcessor, is_stock, require


__all__ = ["ProcessorPlan", "UnsupportedProcessor", "build_plan"]

# transformers' class, by its name -> its reproduction.
_PROCESSORS = {
    "EpsilonLogitsWarper": reproductions.Epsilon,
    "EtaLogitsWarper": reproductions.Eta,
    "ForcedBOSTokenLogitsProcessor": reproductions.ForcedBOSToken,
    "ForcedEOSTokenLogitsProcessor": reproductions.ForcedEOSToken,
    "InfNanRemoveLogitsProcessor": reproductions.InfNanRemove,
    "LogitNormalization": reproductions.LogitNormalization,
    "MinLengthLogitsProcessor": reproductions.MinLength,
    "MinNewTokensLengthLogitsProcessor": reproductions.MinNewTokensLength,
    "MinPLogitsWarper": reproductions.MinP,
    "NoRepeatNGramLogitsProcessor": reproductions.NoRepeatNGram,
    "RepetitionPenaltyLogitsProcessor": reproductions.RepetitionPenalty,
    "SuppressTokensAtBeginLogitsProcessor": reproductions.SuppressTokensAtBegin,
    "SuppressTokensLogitsProcessor": reproductions.SuppressTokens,
    "TemperatureLogitsWarper": reproductions.Temperature,
    "TopHLogitsWarper": reproductions.TopH,
    "TopKLogitsWarper": reproductions.TopK,
    "TopPLogitsWarper": reproductions.TopP,
    "TypicalLogitsWarper": reproductions.Typical,
    "WhisperNoSpeechDetection": reproductions.WhisperNoSpeechDetection,
    "WhisperTimeStampLogitsProcessor": reproductions.WhisperTimeStamp,
}


class ProcessorPlan:
    """A list of logits processors as one function of a token buffer, made by `build_plan`.

    Attributes
    ----------
    key : tuple
        Hashable. Plans of equal key run the same kernels and differ in numbers only, which `load` carries over.
    """

    def __init__(self, processors, setting):
        self._processors = processors
        self._setting = setting
        self._at_first = [p for p in processors if p.at_first]
        self._at_rest = [p for p in processors if p.at_rest]
        self._no_speech = next((p for p in processors if isinstance(p, reproductions.WhisperNoSpeechDetection)), None)
        self._materialized = False
        self.vocab_size = setting.vocab_size
        self.key = (setting.vocab_size, str(setting.device), tuple(p.key for p in processors))

    @property
    def no_speech(self):
        """transformers' `WhisperNoSpeechDetection` of the list, or None."""
        return self._no_speech and self._no_speech.stock()

    @property
    def no_speech_index(self):
        """Prompt position whose logits `first` needs as ``sot_logits``, or None if it needs none."""
        return self._no_speech and self._no_speech.needed_index

    def greedy_rules(self):
        """What `rest` does to the scores, as data for a kernel, if it forbids tokens and nothing else.

        Returns
        -------
        tuple or None
            ``(forbidden, early, min_length, timestamps)``: ids that are always forbidden; ids that are forbidden while
            the length is below ``min_length``; the reproduction of WhisperTimeStampLogitsProcessor, which comes last,
            or None. None where a processor does something else.
        """
        forbidden, early, min_length, timestamps = (), (), 0, None
        for processor in self._at_rest:
            if timestamps is not None:
                return None
            if type(processor) is reproductions.SuppressTokens:
                forbidden += processor.static
            elif isinstance(processor, reproductions.MinLength):
                if early not in ((), processor.static):
                    return None
                early, min_length = processor.static, max(min_length, processor.numbers["min_length"])
            elif type(processor) is reproductions.WhisperTimeStamp and not processor.initial_at_rest:
                timestamps = processor
            else:
                return None
        return forbidden, early, min_length, timestamps

    def materialize(self):
        """Allocates the plan's tensors, as `first`, `rest` and `load` do when needed: call it ahead of a capture."""
        if not self._materialized:
            # Never inference tensors: the plan may be used again by a call that is not in inference mode.
            with torch.inference_mode(False):
                for processor in self._processors:
                    processor.materialize(self._setting)
            self._materialized = True

    def load(self, other):
        """Takes over the numbers of a plan of the same key, in place: a graph captured with this plan stays valid.

        Raises
        ------
        ValueError
            If the keys differ.
        """
        if other.key != self.key:
            raise ValueError("other is a plan for another list of processors: build a plan of its own for that list.")
        self.materialize()
        for mine, theirs in zip(self._processors, other._processors):
            mine.load(theirs)

    def first(self, tokens, length, scores, sot_logits=None):
        """Scores of the first generated token. Runs Python code that a graph would not replay: do not capture it.

        Parameters
        ----------
        tokens : torch.Tensor
            ``(batch, max_length)`` int64, the prompt in its first ``prompt_length`` columns; the others are not read.
        length : torch.Tensor
            0-dim int64 on the plan's device, equal to the plan's ``prompt_length``.
        scores : torch.Tensor
            ``(batch, vocab_size)`` float32 logits. May be overwritten: pass a tensor that is not needed again.
        sot_logits : torch.Tensor, optional
            ``(batch, vocab_size)`` logits at prompt position `no_speech_index`; needed if that is not None.

        Returns
        -------
        torch.Tensor
            ``(batch, vocab_size)`` float32 processed scores, in ``scores`` itself or a new tensor.

        Raises
        ------
        ValueError
            If ``sot_logits`` is needed and not given.
        """
        self.materialize()
        for processor in self._at_first:
            scores = processor.first(tokens, length, scores, sot_logits)
        return scores

    def rest(self, tokens, length, scores):
        """Scores of a later token, ``prompt_length < length <= max_length``: tensor code only, fit for capture.

        Parameters and result as of `first`; ``tokens`` is read in its first ``length`` columns.
        """
        self.materialize()
        for processor in self._at_rest:
            scores = processor(tokens, length, scores)
        return scores


def build_plan(logits_processor, prompt_length, vocab_size, device):
    """The tensor code that stands for a list of transformers' logits processors.

    Cheap enough for every call of `generate`: it reads parameters and leaves the allocation to the first use.

    Parameters
    ----------
    logits_processor : transformers.LogitsProcessorList
        As `generate` hands it to `_sample`; its order is kept.
    prompt_length : int
        Tokens in the decoder prompt, padding included.
    vocab_size : int
        Columns of the logits.
    device : torch.device or str
        Where tokens and scores live.

    Returns
    -------
    ProcessorPlan

    Raises
    ------
    UnsupportedProcessor
        If the list holds something that is not reproduced exactly; the message is the reason and names the class.
    """
    if type(logits_processor) is not list and not is_stock(type(logits_processor)):
        raise UnsupportedProcessor(f"{type(logits_processor).__name__} is not transformers' own list")
    setting = Setting(prompt_length, vocab_size, torch.device(device))
    processors = []
    for stock in logits_processor:
        cls = type(stock)
        reproduction = _PROCESSORS.get(cls.__name__)
        if reproduction is None or cls.__module__ != STOCK_MODULE:
            raise UnsupportedProcessor(f"{cls.__name__} is not among the reproduced logits processors")
        require(is_stock(cls) and "__call__" not in vars(stock), stock, "its __call__ is not transformers' own")
        unknown = sorted(vars(stock).keys() - reproduction.attributes)
        require(not unknown, stock, f"it has attributes of unknown meaning: {', '.join(unknown)}")
        processors.append(reproduction(stock, setting))
    detectors = [p for p in processors if isinstance(p, reproductions.WhisperNoSpeechDetection)]
    if len(detectors) > 1:
        raise UnsupportedProcessor("WhisperNoSpeechDetection: there is more than one in the list")
    return ProcessorPlan(processors, setting)
