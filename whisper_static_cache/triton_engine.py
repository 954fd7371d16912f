"""The GPU engine: hand-written Triton kernels in a CUDA graph, no compiler in the path.

A step is eight kernels a layer, one for the embedding, one for the head and two for the choice of the token. Every
other thing that a step does (layer norms, residual sums, the cache update, the merge of split attention) is part of
one of them; `ops` says how. Up to 2 rows, of float32 8, are multiplied row by row, up to 32 on the tensor cores;
larger batches go to the next engine. Up to 16 rows in half precision have their layers in one persistent kernel on a
GPU of compute capability 9.0, and up to 32 in two launches of it. A single row has its head there, too, and of packed
weights the choice of the token and with it several steps to a launch; two rows of packed weights go one after the
other: `ops.decode_layers`.
"""

import importlib.util
import logging
from typing import NamedTuple

import torch
from torch import nn

from .cuda_graphs import CapturedCall, StepCounter
from .engines import ENGINES, EagerEngine
from .modeling_whisper import forward_hooks, forwards_as_its_class, project_cross_attention
from .quantized_linear import QuantizedLinear


logger = logging.getLogger(__name__)

# Longest prompt that is fed token by token through the step.
MAX_STEPPED_PROMPT = 8
# Keys a program of the attention kernels takes.
SELF_SPLIT, CROSS_SPLIT = 256, 512
# What `ops.decode_tokens` can hold of tokens that end a row.
MAX_ENDS = 16
# Steps in one graph, or in one launch: some 26 us pass between two graphs. Twice as many where those behind the last
# row's end, without layers and head, are next to nothing.
CHAINED_STEPS = 8


class _Product(NamedTuple):
    """One weight, or three of a shape, and the vectors that go with it."""

    weights: list
    arguments: tuple
    constant: torch.Tensor
    folded: torch.Tensor | None
    norm: nn.LayerNorm | None
    biases: list
    pair: torch.Tensor | None

    @property
    def eps(self):
        return self.norm.eps


class _Layer(NamedTuple):
    qkv: _Product
    self_out: _Product
    query: _Product
    cross_out: _Product
    fc1: _Product
    fc2: _Product


class _Whole(NamedTuple):
    """The arguments of `decode_layers`: those in front of the finished flag, the head's, and the choice's.

    `stats` is where the sums of these rows, the second argument, belong among those of all rows.
    """

    layers: tuple
    head: tuple
    choice: tuple
    stats: torch.Tensor

    @property
    def has_head(self):
        return self.head[0] is not None

    @property
    def chooses(self):
        return self.choice[0] is not None


class _Calls(NamedTuple):
    """What is captured for a number of rows: functions of no arguments."""

    enter: object
    logits: object
    choose: object
    choose_several: object


class _Buffers:
    """A session's tensors between the kernels, and what the choice of tokens goes by."""

    def __init__(self, session, config, decoder, vocab_size):
        device = session.device
        rows, width = session.max_batch_size, config.d_model
        heads = config.decoder_attention_heads
        self_splits = -(-session.slots // SELF_SPLIT)
        cross_splits = -(-session.source_length // CROSS_SPLIT)

        def floats(*shape):
            return torch.zeros(shape, device=device)

        self.stream, self.gained = floats(rows, width), floats(rows, width)
        self.stats = {}
        self.runs = floats(rows, self_splits, width), floats(rows, cross_splits, width)
        self.logarithms = floats(rows, self_splits, heads), floats(rows, cross_splits, heads)
        dtype = decoder.embed_positions.weight.dtype
        self.query = torch.zeros(rows, width, dtype=dtype, device=device)
        self.hidden = torch.zeros(rows, config.decoder_ffn_dim, dtype=dtype, device=device)
        # Rows at a multiple of 16 elements, for wide loads.
        self.logits = torch.zeros(rows, -(-vocab_size // 16) * 16, dtype=dtype, device=device)
        self.states = torch.zeros(rows, session.source_length, width, dtype=dtype, device=device)
        self.unfinished = torch.zeros(rows, dtype=torch.uint8, device=device)
        self.steps = torch.zeros(1, dtype=torch.int64, device=device)
        self.finished = torch.zeros(1, dtype=torch.uint8, device=device)
        self.going_on = torch.zeros(1, dtype=torch.uint8, device=device)  # For steps that are not the loop's.
        # How far the steps are, where the host can look without asking the device.
        self.counter = StepCounter(device)
        self.best = {}
        self.table = torch.zeros(vocab_size, dtype=torch.uint8, device=device)
        self.rules = torch.zeros(9, dtype=torch.int64, device=device)
        self.ends = torch.zeros(MAX_ENDS, dtype=torch.int64, device=device)
        # What `table` and `rules` hold, as the host knows it.
        self.held = None, None
        self.graphs = {}
        # The arguments of `decode_layers` for a number of rows, and what only its table of pointers names.
        self.whole, self.no_bias = {}, None

    def best_for(self, rows):
        """What `choose_next` works in, for this number of rows."""
        from .ops.decode_tokens import blocks_of

        if rows not in self.best:
            blocks, device = blocks_of(len(self.table)), self.stream.device
            floats = torch.zeros(4, rows, blocks, device=device)
            self.best[rows] = floats, torch.zeros(2, rows, blocks, dtype=torch.int32, device=device)
        return self.best[rows]

    def stats_for(self, count, rows):
        """Float32 `(2, rows, count)`, contiguous for this number of rows."""
        if (count, rows) not in self.stats:
            self.stats[count, rows] = torch.zeros(2, rows, count, device=self.stream.device)
        return self.stats[count, rows]

    def runs_for(self, kind, rows):
        """Attention's runs and their logarithms, 0 self and 1 cross: one run where many rows fill the GPU without."""
        from .ops.decode_linear import FEW_ROWS

        runs, logarithms = self.runs[kind], self.logarithms[kind]
        if rows <= FEW_ROWS:
            return runs[:rows], logarithms[:rows]
        return tuple(tensor.flatten()[: rows * tensor.shape[2]].view(rows, 1, -1) for tensor in (runs, logarithms))


class TritonEngine(EagerEngine):
    """The one-token step in hand-written kernels, with the choice of the token, as one CUDA graph."""

    name = "triton"
    fallback = "compile"
    max_ends = MAX_ENDS
    max_batch_size = 32

    def __init__(self, model):
        from .ops import launch

        super().__init__(model)
        self._config = model.config
        self._on_gpu = not launch.interpreted()
        self._scaling = self.decoder.layers[0].self_attn.scaling
        self._layers = [self._layer(layer) for layer in self.decoder.layers]
        self._head = self._product([self.proj_out], self.decoder.layer_norm)
        self._whole_failed = self._joined_failed = False

    @staticmethod
    def why_not(model, device):
        if importlib.util.find_spec("triton") is None:
            return "the triton package is not installed"
        from .ops import launch

        if not launch.interpreted():
            if device.type != "cuda" or torch.version.hip is not None:
                return "the Triton kernels run on NVIDIA GPUs"
            if torch.cuda.get_device_capability(device) < (8, 0):
                return "the Triton kernels need compute capability 8.0 or later"
        return _why_not_served(model)

    def rows_for(self, batch_size):
        # Every row that only pads a large batch has its cross-attention read: closer sizes there.
        if batch_size > 8:
            step = 4 if batch_size <= 16 else 8
            return -(-batch_size // step) * step
        return 1 << (batch_size - 1).bit_length()

    # -- What is built once ------------------------------------------------------------------------------------------

    def _product(self, linears, norm=None):
        from .ops.decode_linear import arguments, folded_pair, weight_of

        weights = [weight_of(linear) for linear in linears]
        total = sum(weight.out_features for weight in weights)
        device = weights[0].values.device
        biases = [linear.bias for linear in linears]
        folded = pair = None
        if norm is None:
            constant = biases[0] if biases[0] is not None else torch.zeros(total, device=device)
        else:
            pair = folded_pair(weights)
            constant, folded = pair[:, :total]
        return _Product(weights, arguments(weights), constant, folded, norm, biases, pair)

    def _layer(self, layer):
        own, cross = layer.self_attn, layer.encoder_attn
        return _Layer(
            self._product([own.q_proj, own.k_proj, own.v_proj], layer.self_attn_layer_norm),
            self._product([own.out_proj]),
            self._product([cross.q_proj], layer.encoder_attn_layer_norm),
            self._product([cross.out_proj]),
            self._product([layer.fc1], layer.final_layer_norm),
            self._product([layer.fc2]),
        )

    def _buffers(self, session):
        if "triton" not in session.engine_buffers:
            session.engine_buffers["triton"] = _Buffers(
                session, self._config, self.decoder, self.proj_out.out_features
            )
        return session.engine_buffers["triton"]

    @staticmethod
    def _programs(product, splits, rows):
        """Programs of a product, each of which leaves its sums for the layer norm that follows."""
        from .ops.decode_linear import plan_for

        return plan_for(product.weights[0], splits=splits, rows=rows).programs(product.weights[0])

    def prepare(self, rows):
        buffers = self._buffers(rows.session)
        if rows.count in buffers.graphs:
            return
        rows.session.length.fill_(1)
        calls = [
            lambda: self._enter(rows, buffers),
            lambda: self._logits(rows, buffers, buffers.going_on),
            lambda: self._choose(rows, buffers),
        ]

        def several():
            return self._choose(rows, buffers, self._in_graph(rows, buffers))

        if self._on_gpu:
            from .ops.launch import compiled_together

            with compiled_together():
                for call in calls:
                    call()
            if rows.session.graph_pool is None:
                rows.session.graph_pool = torch.cuda.graph_pool_handle()
            pool = rows.session.graph_pool
            calls = [CapturedCall(call, pool=pool, warmups=1) for call in calls]
            # The kernels of these are warm by now, and nothing is compiled for them.
            several = CapturedCall(several, pool=pool, warmups=0)
            self.captures += len(calls) + 1
        buffers.graphs[rows.count] = _Calls(*calls, several)

    # -- The start of a window ---------------------------------------------------------------------------------------

    def _enter(self, rows, buffers):
        """What precedes the first step: cross-attention's keys and values, and the folded layer norms.

        The folded vectors are made anew for every window: weights that were changed in place since are then followed.
        There is no telling whether they were: a change through `.data`, such as the merging of an adapter, leaves the
        address and PyTorch's count of versions as they are.
        """
        from .ops.decode_linear import fold_norms

        project_cross_attention(self.decoder, buffers.states[: rows.count], rows.buffers)
        products = [product for layer in self._layers for product in (layer.qkv, layer.query, layer.fc1)]
        fold_norms([(one.pair, one.weights, one.biases, one.norm) for one in (*products, self._head)])
        return self._head.folded

    def _project(self, rows, encoder_hidden_states):
        padded = self._padded(rows)
        buffers = self._buffers(rows.session)
        buffers.states[: rows.count] = encoder_hidden_states
        self._calls(padded, buffers).enter()

    def _padded(self, rows):
        return rows.session.rows(min(self.rows_for(rows.count), rows.session.max_batch_size))

    def prefill(
        self, rows, prompt_ids, encoder_hidden_states, valid=None, mask_moves_positions=False, extra_index=None
    ):
        session, length = rows.session, prompt_ids.shape[1]
        padded = self._padded(rows)
        if length > MAX_STEPPED_PROMPT:
            return super().prefill(rows, prompt_ids, encoder_hidden_states, valid, mask_moves_positions, extra_index)
        self._project(rows, encoder_hidden_states)
        rows.position_offset.zero_()
        rows.valid.fill_(True)
        session.padded_prompt = valid is not None
        if valid is not None:
            rows.valid[:, :length] = valid
            if mask_moves_positions:
                rows.position_offset.copy_(length - valid.long().sum(-1, keepdim=True))
        rows.tokens[:, :length] = prompt_ids
        extra = None
        for fed in range(1, length + 1):
            session.length.fill_(fed)
            logits = self.step(padded, fed - 1)[: rows.count]
            if fed - 1 == extra_index:
                # In float32 they are the buffer that the next step writes.
                extra = logits.clone()
        return logits, extra

    # -- A step ------------------------------------------------------------------------------------------------------

    def _calls(self, rows, buffers):
        if rows.count not in buffers.graphs:
            self.prepare(rows)
        return buffers.graphs[rows.count]

    def step(self, rows, slot):
        logits = self._calls(rows, self._buffers(rows.session)).logits()
        return logits[:, : self.proj_out.out_features].float()

    def choosing_steps(self, rows):
        """Functions that queue a step, or `chained` of them, with the choice of each row's token.

        The choice is as the rules that `set_rules` was given have it.
        """
        calls = self._calls(rows, self._buffers(rows.session))
        return calls.choose, calls.choose_several

    def chained(self, rows):
        """How many steps of these rows the second function of `choosing_steps` queues."""
        return self._in_graph(rows, self._buffers(rows.session))

    def _in_graph(self, rows, buffers):
        whole = self._whole(rows, buffers)
        return CHAINED_STEPS * (2 if whole is not None and whole[0].has_head else 1)

    def set_rules(self, rows, rules, forbidden, early, ends, pad):
        """Make ready for the steps of `choosing_steps`.

        Args:
            rows: the padded `Rows`.
            rules: dict of the fields of `ops.decode_tokens.Rules`, `pad` aside.
            forbidden: tuple of the tokens that are never chosen.
            early: tuple of those that are not before `min_length`.
            ends: int64 tensor of the tokens that end a row, or None.
            pad: 0-dim tensor of the token that finished rows go on with, or None.

        Returns:
            The session's `_Buffers`: `steps`, `finished`, `unfinished` and `counter` are the state of the loop, no row
            counting yet.
        """
        from .ops.decode_tokens import SUPPRESSED, SUPPRESSED_EARLY, Rules

        buffers = self._buffers(rows.session)
        buffers.counter.restart()
        # Most windows go by the rules of the one before.
        numbers, tokens = (Rules(pad=0, **rules), pad is None), (forbidden, early)
        if buffers.held[0] != numbers:
            buffers.rules.copy_(torch.tensor(numbers[0]), non_blocking=True)
        if pad is not None:
            buffers.rules[Rules._fields.index("pad")].copy_(pad)
        if buffers.held[1] != tokens:
            table = torch.zeros(len(buffers.table), dtype=torch.uint8)
            table[list(early)] = SUPPRESSED_EARLY
            table[list(forbidden)] += SUPPRESSED
            buffers.table.copy_(table, non_blocking=True)
        buffers.held = numbers, tokens
        if ends is not None:
            buffers.ends[: len(ends)].copy_(ends)
        for state in (buffers.steps, buffers.finished, buffers.unfinished):
            state.zero_()
        return buffers

    def _choose(self, rows, buffers, steps=1):
        """So many steps with the choice of the token; logits of the last one."""
        from .ops.decode_layers import decode_layers
        from .ops.decode_tokens import choose_next

        count, session, whole = rows.count, rows.session, self._whole(rows, buffers)
        if whole is not None and whole[0].chooses:
            decode_layers(*whole[0].layers, buffers.finished, *whole[0].head, *whole[0].choice, steps)
            return buffers.logits[:count]
        for _ in range(steps):
            logits = self._logits(rows, buffers, buffers.finished)
            choose_next(
                rows.tokens,
                rows.token_logprobs,
                buffers.unfinished[:count],
                session.length,
                buffers.steps,
                buffers.finished,
                buffers.counter.tensor,
                *buffers.best_for(count),
                logits,
                buffers.table,
                buffers.rules,
                buffers.ends,
            )
        return logits

    def _whole(self, rows, buffers):
        """A `_Whole` for these rows, or one for each of them; None where the layers go kernel by kernel."""
        if not self._on_gpu or self._whole_failed:
            return None
        if rows.count not in buffers.whole:
            buffers.whole[rows.count] = self._made_whole(rows, buffers)
        return buffers.whole[rows.count]

    def _made_whole(self, rows, buffers):
        from .ops import decode_layers

        device = rows.session.device
        weights = [weight for layer in self._layers for product in layer for weight in product.weights]
        dtype = rows.buffers[0][0].dtype
        formats = {(weight.bits, weight.group_size) for weight in weights}
        halves = [weight.scales for weight in weights]
        halves += [bias for layer in self._layers for product in layer for bias in product.biases]
        if len(formats) > 1 or dtype == torch.float32 or any(t is not None and t.dtype != dtype for t in halves):
            return None

        def served(part):
            head = self._head.weights[0] if self._head_joins(part, dtype) else None
            # Of several rows, tokens are chosen together.
            shape = decode_layers.shape_for(self._config, part.buffers[0], weights[0], device, head, rows.count == 1)
            return shape, decode_layers.why_not(shape, torch.cuda.get_device_capability(device)) is None

        parts = [rows]
        if rows.count == 2 and weights[0].bits != 16:
            # Packed weights are multiplied in half of the time for one row, without the tensor cores.
            each = rows.one_by_one()
            if self._head_joins(each[0], dtype) and served(each[0])[1]:
                parts = each
        elif rows.count > decode_layers.MAX_ROWS:
            parts = rows.halves()
        shape, can = served(parts[0])
        if not can or (parts[0].count > 1 and not decode_layers.scales_fit(weights)):
            return None
        try:
            decode_layers.kernel_for(shape, self._head.constant.device.index)
            all_stats = buffers.stats_for(shape.givers, rows.count)
            return [self._whole_arguments(part, buffers, shape, all_stats[:, part.span]) for part in parts]
        except (RuntimeError, ValueError, OSError) as error:
            if shape.vocab:
                self._joined_failed = True
                logger.warning("The kernel of all layers cannot have the head (%s), which has one of its own.", error)
                return self._made_whole(rows, buffers)
            self._whole_failed = True
            logger.warning("The kernel of all layers cannot be used (%s): they go kernel by kernel.", error)

    def _head_joins(self, rows, dtype):
        """Whether the kernel of all layers can have the head as well."""
        from .ops.decode_layers import why_no_head

        return rows.count == 1 and not self._joined_failed and why_no_head(self._head.weights[0], dtype) is None

    def _whole_arguments(self, rows, buffers, shape, stats):
        """The `_Whole` of these rows and a kernel of `shape`; `stats` are theirs among those of all rows."""
        from .ops import decode_layers

        device = rows.session.device
        if buffers.no_bias is None:
            # One for all numbers of rows: their tables hold its address.
            buffers.no_bias = torch.zeros(self._config.d_model, dtype=rows.buffers[0][0].dtype, device=device)
        following = [layer.qkv.norm for layer in self._layers[1:]] + [self._head.norm]
        table = [
            _pointers(layer, norm, buffers.no_bias, caches)
            for layer, norm, caches in zip(self._layers, following, rows.buffers)
        ]
        eps = [[layer.qkv.eps, layer.query.eps, layer.fc1.eps] for layer in self._layers]
        head, joined = self._head, ((None,) * 7 + (16, 0, 0.0))
        if shape.vocab:
            weight, vectors = head.weights[0], (head.norm.weight, head.constant, head.folded)
            packed = weight.scales, weight.zeros, shape.head_bits, shape.head_group_size
            joined = buffers.logits[rows.span], weight.values, *vectors, *packed, head.eps
        layers = (
            buffers.gained[rows.span],
            stats.contiguous(),
            decode_layers.work_space(shape, device),
            [tensor for tensors in rows.buffers for tensor in tensors],
            decode_layers.pointer_table(table),
            rows.tokens,
            rows.session.length,
            rows.position_offset,
            rows.valid,
            self.decoder.embed_tokens.weight,
            self.decoder.embed_positions.weight,
            self._layers[0].qkv.norm.weight,
            torch.tensor(eps, device=device),
            self._scaling,
            self._config.decoder_ffn_dim,
            float(shape.bits),
            shape.group_size,
        )
        choice = (None,) * 7
        if shape.chooses:
            written = rows.token_logprobs, buffers.unfinished[:1], buffers.steps, buffers.counter.tensor
            choice = *written, buffers.table, buffers.rules, buffers.ends
        return _Whole(layers, joined, choice, stats)

    def _logits(self, rows, buffers, finished):
        """Logits of the newest tokens, or what they were where `finished` is set."""
        from .ops.decode_layers import decode_layers
        from .ops.decode_linear import STORE, decode_linear

        whole, logits = self._whole(rows, buffers), buffers.logits[: rows.count]
        if whole is None:
            stats = self._layers_by_kernels(rows, buffers)
        else:
            for part in whole:
                decode_layers(*part.layers, finished, *part.head, *part.choice, 0)
            if whole[0].has_head:
                return logits
            if len(whole) > 1:
                for part in whole:
                    part.stats.copy_(part.layers[1])
            stats = buffers.stats_for(whole[0].stats.shape[2], rows.count)
        gained, head = buffers.gained[: rows.count], self._head
        decode_linear(logits, gained, *head.arguments, head.constant, STORE, 1.0, head.folded, stats, head.eps)
        return logits

    def _layers_by_kernels(self, rows, buffers):
        """Embedding and layers; leaves their result times the last gain in `gained`, and returns its norm's sums."""
        from .ops.decode_attention import decode_attention
        from .ops.decode_linear import GELU, HEADS, RESIDUAL, STORE, decode_linear
        from .ops.decode_tokens import embed_newest

        count, session, decoder = rows.count, rows.session, self.decoder
        stream, gained = buffers.stream[:count], buffers.gained[:count]
        query, hidden = buffers.query[:count], buffers.hidden[:count]
        (runs, logs), (cross_runs, cross_logs) = (buffers.runs_for(kind, count) for kind in range(2))
        # A single run is whole, wherever the length stands.
        split_size = 0 if runs.shape[1] == 1 else SELF_SPLIT
        length, valid, scale = session.length, session.valid[:count], self._scaling
        norms = [layer.qkv.norm for layer in self._layers[1:]] + [self._head.norm]
        stats = buffers.stats_for(1, count)
        embed_newest(
            stream,
            gained,
            stats,
            rows.tokens,
            length,
            rows.position_offset,
            decoder.embed_tokens.weight,
            decoder.embed_positions.weight,
            self._layers[0].qkv.norm.weight,
        )

        def normed(out, product, epilogue, scale=1.0, **options):
            decode_linear(
                out,
                gained,
                *product.arguments,
                product.constant,
                epilogue,
                scale,
                product.folded,
                stats,
                product.eps,
                **options,
            )

        def residual(x, product, next_norm, **options):
            splits = x.shape[1] if "lse" in options else 0
            after = buffers.stats_for(self._programs(product, splits, count), count)
            decode_linear(
                stream,
                x,
                *product.arguments,
                product.constant,
                RESIDUAL,
                gained=gained,
                next_gain=next_norm.weight,
                next_stats=after,
                **options,
            )
            return after

        for layer, (keys, values, *cross), next_norm in zip(self._layers, rows.buffers, norms):
            normed(query, layer.qkv, HEADS, scale, keys=keys, values=values, length=length)
            decode_attention(runs, logs, query, keys, values, SELF_SPLIT, length, valid)
            stats = residual(runs, layer.self_out, layer.query.norm, lse=logs, split_size=split_size, length=length)
            normed(query, layer.query, STORE, scale)
            decode_attention(cross_runs, cross_logs, query, *cross[:2], CROSS_SPLIT, None, None, *cross[2:])
            stats = residual(cross_runs, layer.cross_out, layer.fc1.norm, lse=cross_logs)
            normed(hidden, layer.fc1, GELU)
            stats = residual(hidden, layer.fc2, next_norm)
        return stats


def _pointers(layer, next_norm, no_bias, caches):
    """A layer's tensors in the order of `decode_layers`' table."""
    first, second = (layer.qkv, layer.query, layer.fc1), (layer.self_out, layer.cross_out, layer.fc2)
    weights = [weight for pair in zip(first, second) for product in pair for weight in product.weights]
    biases = [product.biases[0] for product in second]
    return [
        *(weight.values for weight in weights),
        *(weight.scales for weight in weights),
        *(weight.zeros for weight in weights),
        *(product.constant for product in first),
        *(product.folded for product in first),
        *(no_bias if bias is None else bias for bias in biases),
        *(norm.weight for norm in (layer.query.norm, layer.fc1.norm, next_norm)),
        *caches,
    ]


def _why_not_served(model):
    """Why the kernels cannot stand for `model`'s decoder, or None."""
    config, decoder = model.config, model.model.decoder
    if config.d_model != 64 * config.decoder_attention_heads:
        return f"heads of {config.d_model // config.decoder_attention_heads} dimensions; the Triton kernels take 64"
    if config.activation_function != "gelu":
        return f"the activation {config.activation_function}; the Triton kernels have gelu"
    if config.decoder_ffn_dim % 64:
        return f"decoder_ffn_dim {config.decoder_ffn_dim} is no multiple of 64"
    dtype = decoder.embed_positions.weight.dtype
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the Triton kernels compute in float16, bfloat16 and float32, not {dtype}"
    norms, linears, activations = [decoder.layer_norm], [model.proj_out], []
    for layer in decoder.layers:
        own, cross = layer.self_attn, layer.encoder_attn
        norms += [layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm]
        linears += [
            own.q_proj,
            own.k_proj,
            own.v_proj,
            own.out_proj,
            cross.q_proj,
            cross.out_proj,
            layer.fc1,
            layer.fc2,
        ]
        if not _is_gelu(layer.activation_fn):
            return f"the activation {type(layer.activation_fn).__name__}; the Triton kernels have gelu"
        if {own.scaling, cross.scaling} != {decoder.layers[0].self_attn.scaling}:
            return "attention is not scaled the same in all layers"
        activations.append(layer.activation_fn)
        trio = {_format(linear) for linear in (own.q_proj, own.k_proj, own.v_proj)}
        if len(trio) > 1:
            return "query, key and value weights are of different formats"
    for module in norms:
        if type(module) is not nn.LayerNorm or module.weight is None or module.bias is None:
            return f"a {type(module).__name__} stands where a layer norm with weight and bias is expected"
        if module.weight.dtype != dtype:
            return "layer norms and embeddings are of different dtypes"
    if type(decoder.embed_tokens) is not nn.Embedding or decoder.embed_tokens.weight.dtype != dtype:
        return f"a {type(decoder.embed_tokens).__name__} stands where a plain embedding is expected"
    for module in linears:
        if type(module) not in (nn.Linear, QuantizedLinear):
            return f"the Triton kernels do not know {type(module).__name__}"
        if type(module) is nn.Linear and (module.weight.dtype != dtype or not module.weight.is_contiguous()):
            return "a weight is not contiguous, or of another dtype than the embeddings"
    for module in (*norms, *linears, *activations, decoder.embed_tokens):
        if forward_hooks(module) or not forwards_as_its_class(module):
            return f"{type(module).__name__} has a forward of its own or a hook, which the kernels would not call"
    return None


def _is_gelu(module):
    return type(module).__name__ == "GELUActivation" or (type(module) is nn.GELU and module.approximate == "none")


def _format(linear):
    return (
        type(linear),
        linear.out_features,
        getattr(linear, "bits", None),
        getattr(linear, "group_size", None),
    )


ENGINES[TritonEngine.name] = TritonEngine
