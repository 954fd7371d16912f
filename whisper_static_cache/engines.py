"""Engines: ways to run prefill and the one-token step over one session's tensors.

An engine is asked whether it can serve a model (`why_not`), how many rows it runs for a batch (`rows_for`), and then
for the logits of one step at a time (`step`). `eager` runs the decoder's modules as they are and is the reference;
`compile` runs the same step through torch.compile, and on a GPU inside a CUDA graph. `ENGINES` holds them by name; a
hand-written GPU engine is one more row.
"""

import threading
import types

import torch

from .cuda_graphs import CapturedCall
from .modeling_whisper import (
    decode_step,
    decoder_forward,
    foreign_modules,
    forward_hooks,
    padded_prompt_mask,
    project_cross_attention,
    switches,
)


# Settings of adapters that a session keeps graphs for; one more, and all are let go, so that memory is bounded.
_MAX_SETTINGS = 8


class EagerEngine:
    """The decoder's own modules, one call after the other: the reference, and any device.

    Attention reads the written slots only, so that every product has the shape that a growing cache would give it.
    """

    name = "eager"
    # The engine that serves where this one cannot.
    fallback = None
    # The largest batch that it takes, None for any.
    max_batch_size = None

    def __init__(self, model):
        self.decoder = model.model.decoder
        self.proj_out = model.proj_out
        self.compiles = 0
        self.captures = 0

    @staticmethod
    def why_not(model, device):
        """None if this engine can serve `model`, else the reason."""
        return None

    def rows_for(self, batch_size):
        """Rows to run for a batch of `batch_size`."""
        return batch_size

    def prepare(self, rows):
        """Build what `step` will need for these rows, before anything of a call has been handed out."""

    def prefill(
        self, rows, prompt_ids, encoder_hidden_states, valid=None, mask_moves_positions=False, extra_index=None
    ):
        """Project the encoder's output, run the prompt, and leave the rows ready for `step`.

        Args:
            rows: `Rows` of the batch.
            prompt_ids: `(batch, prompt_length)` int64.
            encoder_hidden_states: `(batch, source_length, d_model)`.
            valid: `(batch, prompt_length)` bool, False on (left) padding, or None.
            mask_moves_positions: whether learned positions are counted from the first valid token.
            extra_index: a prompt position whose logits are wanted as well, or None.

        Returns:
            `(batch, vocab_size)` float32 logits after the prompt, and those at `extra_index` (or None).
        """
        session = rows.session
        length = prompt_ids.shape[1]
        position_ids = torch.arange(length, device=prompt_ids.device)[None]
        attention_mask = None
        session.padded_prompt = valid is not None
        rows.position_offset.zero_()
        rows.valid.fill_(True)
        if valid is not None:
            rows.valid[:, :length] = valid
            attention_mask = padded_prompt_mask(valid)
            if mask_moves_positions:
                position_ids = (valid.long().cumsum(-1) - 1).clamp(min=0)
                rows.position_offset.copy_(length - valid.long().sum(-1, keepdim=True))
        rows.tokens[:, :length] = prompt_ids
        session.length.fill_(length)
        self._project(rows, encoder_hidden_states)
        hidden = decoder_forward(self.decoder, prompt_ids, position_ids, rows.buffers, 0, attention_mask)
        logits = self.proj_out(hidden[:, -1]).float()
        extra = None if extra_index is None else self.proj_out(hidden[:, extra_index]).float()
        return logits, extra

    def _project(self, rows, encoder_hidden_states):
        project_cross_attention(self.decoder, encoder_hidden_states, rows.buffers)

    def step(self, rows, slot):
        """Logits `(rows, vocab_size)` after feeding the token in column `slot`."""
        session = rows.session
        position_ids, attention_mask = slot - rows.position_offset, None
        if session.padded_prompt:
            attention_mask = rows.valid[:, None, None, : slot + 1]
        tokens = rows.tokens[:, slot : slot + 1]
        hidden = decoder_forward(self.decoder, tokens, position_ids, rows.buffers, slot, attention_mask)
        return self.proj_out(hidden[:, -1]).float()


class CompileEngine(EagerEngine):
    """The one-token step through torch.compile (fullgraph), and on a GPU inside a CUDA graph.

    Two compilations serve every batch: one for a single row, one with a symbolic batch size for two rows and more. A
    single row runs padded to two where only the second is there, rather than compile again. On a GPU, batches are
    padded to powers of two, so that few graphs are captured. Prompts are run uncompiled: their lengths differ from
    call to call. Adapters are looked at before every window: a graph replays what they were when it was captured, so
    each setting of them has its own.
    """

    name = "compile"
    fallback = "eager"

    def __init__(self, model):
        super().__init__(model)
        self._steps = {}
        self._adapters = foreign_modules(self.decoder, self.proj_out)
        # What has been compiled, or found compiled, on the CPU: kind of batch, dtype of the session's cross-attention,
        # and adapters' switches.
        self._ready = set()
        self._lock = threading.Lock()
        self._on_gpu = next(self.decoder.parameters()).device.type == "cuda"

    @staticmethod
    def why_not(model, device):
        if device.type not in ("cuda", "cpu"):
            return f"torch.compile is not used on {device.type}"
        for module in (*model.model.decoder.modules(), model.proj_out):
            if forward_hooks(module):
                return f"{type(module).__name__} has a forward hook, which a compiled step would not call"
        return None

    def rows_for(self, batch_size):
        if self._on_gpu:
            return 1 << (batch_size - 1).bit_length()
        if batch_size == 1 and "many" in self._steps and "one" not in self._steps:
            return 2
        return batch_size

    def prefill(self, rows, *args, **kwargs):
        # A step reads every slot, and what is masked must still be finite: 0 * NaN is NaN.
        rows.session.clear()
        return super().prefill(rows, *args, **kwargs)

    def prepare(self, rows):
        session = rows.session
        with self._lock:
            session.switches = switches(self._adapters)
            key = (rows.count, session.switches)
            if not self._on_gpu:
                key = (_kind(rows), session.cross_dtype, session.switches)
            if key in (session.graphs if self._on_gpu else self._ready):
                return
            session.clear()
            session.length.fill_(1)
            if not self._on_gpu:
                self._run(rows)
                self._ready.add(key)
                return
            if len({setting for _, setting in session.graphs} | {session.switches}) > _MAX_SETTINGS:
                session.graphs.clear()
            if session.graph_pool is None:
                session.graph_pool = torch.cuda.graph_pool_handle()
            session.graphs[key] = CapturedCall(lambda: self._run(rows), pool=session.graph_pool)
            self.captures += 1

    def step(self, rows, slot):
        session = rows.session
        return session.graphs[rows.count, session.switches]() if self._on_gpu else self._run(rows)

    def _run(self, rows):
        kind = _kind(rows)
        step = self._steps.get(kind) or self._compile()
        if kind == "many":
            loop = (rows.tokens, rows.position_offset, rows.valid)
            for tensor in (*loop, *(buffer for layer in rows.buffers for buffer in layer)):
                torch._dynamo.mark_dynamic(tensor, 0)
        logits = step(
            self.decoder,
            self.proj_out,
            rows.tokens,
            rows.session.length,
            rows.position_offset,
            rows.valid,
            rows.buffers,
        )
        # Only now: a step that could not be compiled is none.
        self._steps[kind] = step
        return logits

    def _compile(self):
        # Dynamo keeps compiled code, and counts recompiles against its limit, per code object. Every engine gets one
        # of its own, so that models do not push each other's steps out.
        step = types.FunctionType(decode_step.__code__.replace(), decode_step.__globals__, "decode_step")
        return torch.compile(step, backend=self._backend, fullgraph=True)

    def _backend(self, graph, example_inputs):
        from torch._inductor.compile_fx import compile_fx

        self.compiles += 1
        return compile_fx(graph, example_inputs)


def _kind(rows):
    return "one" if rows.count == 1 else "many"


ENGINES = {engine.name: engine for engine in (EagerEngine, CompileEngine)}

# Last, since its class derives from one above: it adds its own row.
from . import triton_engine  # noqa: E402, F401
