"""Choosing the next token from its logits: as tensor code on the device, or step by step with the host."""

import logging

import torch
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from . import _compat
from .logits_process import UnsupportedProcessor, build_plan


logger = logging.getLogger(__name__)


def choice_for(job, session, engine):
    """The `DeviceChoice` for a job if everything it asks for is known here, else the `HostChoice`.

    An engine that chooses tokens itself gets the job as a `RuledChoice` where rules are all that it takes.
    """
    own_criteria = all(type(c) in (MaxLengthCriteria, EosTokenCriteria) for c in job.stopping_criteria)
    if job.streamer is None and own_criteria:
        try:
            vocab_size = job.model.config.vocab_size
            plan = build_plan(job.logits_processor, job.prompt_length, vocab_size, job.input_ids.device)
            rules = plan.greedy_rules() if hasattr(engine, "choosing_steps") else None
            if rules is not None and RuledChoice.serves(job, engine.max_ends):
                return RuledChoice(job, session, plan, rules)
            return DeviceChoice(job, session, plan)
        except UnsupportedProcessor as unsupported:
            logger.debug("The loop steps with the host: %s.", unsupported)
    return HostChoice(job, session)


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

    def advance(self, engine, padded, slot):
        """Feed the token in column `slot` and choose the next one; True once every row is known to have finished."""
        return self.next(engine.step(padded, slot)[: self.job.batch_size], slot + 1)

    def begin(self, engine, padded):
        """Called once, after the first token."""

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


class DeviceChoice(_Choice):
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
        # Scores that only transformers' average log-probability will read need not be kept: the chosen tokens' will
        # do.
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


class RuledChoice(DeviceChoice):
    """Greedy choice by rules that the engine's own kernel knows: a step is one launch, the choice included.

    Where the length allows, one launch is several steps. Those behind the end of the last row do not count, and are
    few: the next launch waits until no more than `ahead` steps are left of the one before.
    """

    ahead = 2

    def __init__(self, job, session, plan, rules):
        super().__init__(job, session, plan)
        self._given = rules

    @staticmethod
    def serves(job, max_ends):
        """Whether tokens and their log-probabilities are all that the job wants, and its ends are few enough."""
        config = job.config
        if sum(c.eos_token_id.numel() for c in job.stopping_criteria if type(c) is EosTokenCriteria) > max_ends:
            return False
        wants_scores = config.return_dict_in_generate and config.output_scores and job.call.keeps_results
        return not (config.do_sample or wants_scores or (config.return_dict_in_generate and config.output_logits))

    def begin(self, engine, padded):
        forbidden, early, min_length, stamps = self._given
        rules = {
            "min_length": min_length,
            "eos_count": 0 if self.eos is None else len(self.eos),
            "prompt_length": self.job.prompt_length,
            "timestamp_begin": self.plan.vocab_size if stamps is None else stamps.timestamp_begin,
            "begin_index": 0 if stamps is None else stamps.numbers["begin_index"],
            "no_timestamps": -1 if stamps is None else stamps.no_timestamps,
            "text_end": 0 if stamps is None else stamps.eos,
            "detect": int(stamps is not None and stamps.detect),
        }
        self._state = engine.set_rules(padded, rules, forbidden, early, self.eos, self.pad)
        self._state.unfinished[: self.job.batch_size].copy_(self.unfinished)
        self._state.finished.copy_(~self.unfinished.any())
        self._one, self._several = engine.choosing_steps(padded)
        self._chained = engine.chained(padded)
        self._wait = self._state.counter.wait

    def advance(self, engine, padded, slot):
        # `slot` is the device's to know.
        if self.max_steps - self._queued >= self._chained:
            self._several()
            self._queued += self._chained
        else:
            self._one()
            self._queued += 1
        return self._queued >= self.max_steps or self._wait(self._queued, self.ahead)

    def steps(self):
        if self._queued == 1:
            return 1
        # The device counts: later steps were queued before the host knew that all rows had finished.
        steps = 1 + int(self._state.steps)
        self._state.counter.close()
        return steps


class HostChoice(_Choice):
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
    """`_retrieve_avg_logprobs` that also reads the per-token log-probabilities `DeviceChoice` keeps in place of
    scores.

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
