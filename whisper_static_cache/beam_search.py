"""Beam search for Whisper on a preallocated cache in which the beams of an input share its cross-attention row.

The search itself is the installed transformers' own `_beam_search`: it is called with a stand-in for the model, which
decodes with this package's engine where transformers would call the model's forward, and reorders the self-attention
half where it would reorder the cache. Cross-attention keys and values are the same for all beams of an input: they are
projected once, held once, read once a step, and never moved.
"""

import logging
import types

import torch

from . import _compat
from .engines import ENGINES
from .generation_whisper import Job, default_engine, first_tensor, sample
from .logits_process import UnsupportedProcessor, build_plan
from .logits_processors import WhisperNoSpeechDetection


logger = logging.getLogger(__name__)


def beam_search(stock, model, *args, **kwargs):
    """`GenerationMixin._beam_search` for Whisper; `stock` is the method it replaces, and serves what this does not."""
    return sample(stock, model, *args, job_class=BeamJob, **kwargs)


class BeamJob(Job):
    """One beam search: its arguments, whether it can be served, and the run."""

    def __init__(self, *args):
        super().__init__(*args)
        self.beams = self.config.num_beams

    def why_stock(self, state, synced_gpus):
        if self.batch_size % self.beams:
            return "the batch is no multiple of num_beams"
        return super().why_stock(state, synced_gpus)

    def engine(self, state):
        """The reference engine; a reason only where another one was asked for by name or would have been taken."""
        name = self.call.engine
        if name == "auto":
            name = default_engine(self.model, self.input_ids.device)
        reason = None if name == "eager" else f"beam search runs on the eager engine, not on {name}"
        return state.engine(self.model, ENGINES["eager"]), reason

    def _decode(self, engine, session, padded_rows, clock):
        rows = session.rows(self.batch_size, self.beams)
        kwargs = {**self.kwargs, _compat.CACHE_NAME: None}
        stand_in = _StandIn(self, engine, rows, clock)
        result = self.stock(
            stand_in,
            self.input_ids,
            logits_processor=_Processors(self),
            stopping_criteria=self.stopping_criteria,
            generation_config=self.config,
            synced_gpus=False,
            **kwargs,
        )
        clock.mark()
        cached = stand_in.length - 1
        if self.user_cache is not None:
            self._fill_user_cache(rows, cached)
        if self.config.return_dict_in_generate:
            result[_compat.CACHE_NAME] = self._visible_cache(rows.buffers, cached)
        return result, stand_in.steps

    def _visible_cache(self, buffers, cached):
        if self.user_cache is None and self.call.is_shortform:
            # As transformers has it: a cross-attention row for each beam.
            buffers = [
                (*layer[:2], *(half.repeat_interleave(self.beams, 0) for half in layer[2:])) for layer in buffers
            ]
        return super()._visible_cache(buffers, cached)

    def _fill_user_cache(self, rows, cached):
        """Leave in the caller's cache what any other decode leaves there, if it has a row for each beam."""
        if self.user_cache.max_inputs < self.batch_size:
            self.user_cache.reset()
            return
        for own, layer in zip(self.user_cache.layer_buffers, rows.buffers):
            for buffer, used in zip(own[2:], layer[2:]):
                buffer[: self.batch_size] = used.repeat_interleave(self.beams, 0)
        self.user_cache.mark_filled(self.batch_size, cached)


class _StandIn:
    """What transformers' `_beam_search` takes for the model: the model, but for the forward pass and the cache."""

    def __init__(self, job, engine, rows, clock):
        self._job = job
        self._engine = engine
        self._rows = rows
        self._clock = clock
        self.steps = 0
        self.length = job.prompt_length  # tokens chosen or given

    def __getattr__(self, name):
        return getattr(self._job.model, name)

    def __call__(self, input_ids, **kwargs):
        """`logits`, `(batch * beams, 1, vocab_size)`, after the prompt, and later after the last of `input_ids`."""
        if self.steps == 0:
            logits = self._prompt(input_ids)
        else:
            slot = input_ids.shape[1] - 1
            self._rows.tokens[:, slot] = input_ids[:, -1]
            self._rows.session.length.fill_(slot + 1)
            logits = self._engine.step(self._rows, slot)
        self.steps += 1
        self.length += 1
        return types.SimpleNamespace(logits=logits[:, None])

    def _prompt(self, input_ids):
        job = self._job
        mask = job.kwargs.get("decoder_attention_mask")
        self._clock.mark()
        logits, _ = self._engine.prefill(
            self._rows,
            input_ids,
            first_tensor(job.kwargs["encoder_outputs"])[:: job.beams],
            valid=None if mask is None else mask.bool(),
            mask_moves_positions=_compat.mask_moves_positions(),
        )
        self._clock.mark()
        return logits

    def _prefill(self, input_ids, *args, **kwargs):
        return self(input_ids)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    def _get_initial_cache_position(self, *args):
        return args[-1]

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        # Anything but None has the cache reordered, and asks `_reorder_cache` how.
        return {**model_kwargs, _compat.CACHE_NAME: self}

    # By position or, up to 4.53, by these names.
    def _reorder_cache(self, past_key_values, beam_idx):
        end = self.length - 1
        for keys, values, *_ in self._rows.buffers:
            keys[:, :, :end] = keys[:, :, :end].index_select(0, beam_idx)
            values[:, :, :end] = values[:, :, :end].index_select(0, beam_idx)
        return past_key_values

    _temporary_reorder_cache = _reorder_cache


class _Processors:
    """The job's logits processors: transformers' own for the first token, later as tensor code if they can be."""

    def __init__(self, job):
        self._stock = job.logits_processor
        self._prompt_length = job.prompt_length
        try:
            vocab_size = job.model.config.vocab_size
            self._plan = build_plan(job.logits_processor, job.prompt_length, vocab_size, job.input_ids.device)
        except UnsupportedProcessor as unsupported:
            logger.debug("The logits processors run on the host: %s.", unsupported)
            self._plan = None

    def __call__(self, input_ids, scores):
        length = input_ids.shape[1]
        if self._plan is None or length == self._prompt_length:
            scores = self._stock(input_ids, scores)
            WhisperNoSpeechDetection.ran(self._stock)
            return scores
        return self._plan.rest(input_ids, torch.full((), length, device=input_ids.device), scores)
