"""A key/value cache for Whisper that is allocated once and reused, whatever the batch and the length of a call."""

from typing import NamedTuple

import torch
from transformers import WhisperConfig
from transformers.cache_utils import EncoderDecoderCache, StaticCache

from ._compat import CACHE_NAME, CROP_ZERO_EMPTIES, LayerColumns, StaticLayer, init_cache, init_module
from .int8_states import check_cross_dtype, dequantize, store


__all__ = ["EncoderDecoderStaticCache", "Int8LayerBuffers", "LayerBuffers"]


class LayerBuffers(NamedTuple):
    """The four buffers of one decoder layer, each `(rows, heads, length, head_dim)`.

    There are `max_batch_size` rows for self-attention and `max_inputs` for cross-attention.

    The length is `max_cache_len` for self-attention and `max_source_len` for cross-attention.
    """

    self_keys: torch.Tensor
    self_values: torch.Tensor
    cross_keys: torch.Tensor
    cross_values: torch.Tensor


class Int8LayerBuffers(NamedTuple):
    """`LayerBuffers` with cross-attention in 8 bits: `cross_keys` and `cross_values` are int8.

    The scales are `(max_inputs, heads, max_source_len)` in the dtype of the others; `int8_states` says what they mean.
    """

    self_keys: torch.Tensor
    self_values: torch.Tensor
    cross_keys: torch.Tensor
    cross_values: torch.Tensor
    cross_key_scales: torch.Tensor
    cross_value_scales: torch.Tensor


class _Contents:
    """What the buffers hold just now, shared by all layers of a cache.

    Numbers that change from one decode step to the next are on the device: a compiled step would be specialised on a
    Python integer, and recompiled for the next one. Those that stay for a whole recording are Python integers.
    """

    def __init__(self, max_batch_size, device):
        self.max_batch_size = max_batch_size
        self.batch_size = 0  # rows in use; 0 says that nothing is held
        self.source_length = 0  # positions of the encoder's output that are held
        self.in_pass = False  # a forward pass has written the first layer and not yet the last one
        self.length = torch.zeros((), dtype=torch.int64, device=device)  # tokens held by self-attention
        torch._dynamo.mark_static_address(self.length)

    def take_rows(self, rows):
        """Claim the first `rows` rows, or check that the call goes on with those in use."""
        if rows > self.max_batch_size:
            raise ValueError(
                f"The cache has max_batch_size={self.max_batch_size} and the call has a batch of {rows}; "
                f"create EncoderDecoderStaticCache with max_batch_size={rows} or more."
            )
        if self.batch_size == 0:
            self.batch_size = rows
        elif rows != self.batch_size:
            raise ValueError(
                f"The cache holds {self.batch_size} rows and the call has a batch of {rows}; "
                "call reset() before a new recording, or batch_select_indices() to go on with some of the rows."
            )


class _StaticLayer(StaticLayer):
    """Keys and values of one layer for one kind of attention; `keys` and `values` are views of what is in use."""

    is_compileable = True
    is_sliding = False
    is_croppable = True
    is_initialized = True
    buffer_names = ("key_buffer", "value_buffer")
    stored_dtype = None  # of the buffers, if not that of the states

    # StaticLayer.__init__ differs from release to release, and only prepares an allocation that is done here already.
    def __init__(self, contents, layer_idx, num_layers, shape, dtype, device):
        self.contents = contents
        self.layer_idx = layer_idx
        self.is_first = layer_idx == 0
        self.is_last = layer_idx == num_layers - 1
        self.num_layers = num_layers
        self.max_batch_size, self.num_heads, self.max_cache_len, self.head_dim = shape
        self.dtype = dtype  # of the states that come and go
        stored = self.stored_dtype or dtype
        self.key_buffer = _static(torch.zeros(shape, dtype=stored, device=device))
        self.value_buffer = _static(torch.zeros(shape, dtype=stored, device=device))

    @property
    def buffers(self):
        return tuple(getattr(self, name) for name in self.buffer_names)

    @property
    def batch_size(self):
        return self.contents.batch_size

    @property
    def device(self):
        return self.key_buffer.device

    def lazy_initialization(self, *args, **kwargs):
        """Nothing is left to allocate; transformers calls this to allocate ahead of the first update."""

    def get_mask_sizes(self, *args):
        """Length and offset of what attention sees; transformers passes the query's positions or its length."""
        return self.max_cache_len, 0

    def get_max_cache_shape(self):
        return self.max_cache_len

    get_max_length = get_max_cache_shape

    def check_states(self, states):
        """Raise ValueError for what these buffers cannot take, from shapes and types alone, without a wait."""
        _, heads, length, head_dim = states.shape
        if (heads, head_dim) != (self.num_heads, self.head_dim):
            raise ValueError(
                f"The cache has {self.num_heads} heads of {self.head_dim} and the model has {heads} of {head_dim}; "
                "create EncoderDecoderStaticCache from this model's config."
            )
        if length > self.max_cache_len:
            raise ValueError(
                f"The cache has {self.max_cache_len} {self.positions} and the call has {length}; "
                f"create EncoderDecoderStaticCache with {self.length_argument}={length} or more."
            )
        if states.dtype != self.dtype:
            raise ValueError(
                f"The cache is of {self.dtype} and the model computes in {states.dtype}; "
                f"create EncoderDecoderStaticCache with dtype={states.dtype}."
            )
        if states.device != self.key_buffer.device:
            raise ValueError(
                f"The cache is on {self.key_buffer.device} and the model on {states.device}; "
                f'move the cache with to("{states.device}").'
            )


class _SelfAttentionLayer(_StaticLayer):
    positions = "positions"
    length_argument = "max_cache_len"

    @property
    def keys(self):
        return self.key_buffer[: self.contents.batch_size]

    @property
    def values(self):
        return self.value_buffer[: self.contents.batch_size]

    def update(self, key_states, value_states, cache_kwargs=None, **kwargs):
        """Write `(batch, heads, new_tokens, head_dim)` after the tokens held, or where `cache_position` says."""
        self.check_states(key_states)
        contents = self.contents
        # Up to 5.3 the model numbers the positions itself; from 5.4 the cache does.
        position = cache_kwargs.get("cache_position") if cache_kwargs else None
        if position is None:
            position = torch.arange(key_states.shape[2], device=key_states.device) + contents.length
        if self.is_first:
            self._begin_pass(key_states.shape[0], position)
        # Through the whole buffer, not a view of its first rows: the compiler would copy such a view back and forth.
        # Detached: the buffers would join the graph of a caller who forgot no_grad().
        rows = torch.arange(key_states.shape[0], device=key_states.device)[:, None]
        self.key_buffer[rows, :, position] = key_states.detach().transpose(1, 2)
        self.value_buffer[rows, :, position] = value_states.detach().transpose(1, 2)
        if self.is_last:
            # Only now: every layer of this pass has counted from the same length.
            contents.length.copy_(position[-1] + 1)
            contents.in_pass = False
        return self.keys, self.values

    def _begin_pass(self, rows, position):
        if self.contents.in_pass:
            raise ValueError(
                f"The cache has {self.num_layers} layers and the last forward pass did not reach the last one: "
                "reset() it if that pass failed, or create EncoderDecoderStaticCache from this model's config."
            )
        # Reading the position is free in host memory. On another device it would wait; indexing asserts there.
        if position.device.type == "cpu" and not torch.compiler.is_compiling():
            needed = int(position[-1]) + 1
            if needed > self.max_cache_len:
                raise ValueError(
                    f"The cache has {self.max_cache_len} positions and this call needs {needed}; crop() or reset() "
                    f"it, or create EncoderDecoderStaticCache with max_cache_len={needed} or more."
                )
        self.contents.take_rows(rows)
        self.contents.in_pass = True

    def get_seq_length(self, *args):
        contents = self.contents
        if contents.batch_size == 0:
            return 0
        if contents.length.device.type == "cpu" and not torch.compiler.is_compiling():
            return int(contents.length)
        # A copy: the caller's number must not grow with the next step.
        return contents.length.clone()


class _CrossAttentionLayer(_StaticLayer):
    positions = "source positions"
    length_argument = "max_source_len"

    @property
    def keys(self):
        return self._in_use(self.key_buffer)

    @property
    def values(self):
        return self._in_use(self.value_buffer)

    def _in_use(self, buffer):
        return buffer[: self.contents.batch_size, :, : self.contents.source_length]

    def update(self, key_states, value_states, cache_kwargs=None, **kwargs):
        """Write `(batch, heads, source_length, head_dim)` from the first source position on."""
        self.check_states(key_states)
        if key_states.shape[0] > self.max_batch_size:
            raise ValueError(
                f"The cache has max_inputs={self.max_batch_size} and the call has a batch of {key_states.shape[0]}; "
                f"create EncoderDecoderStaticCache with max_inputs={key_states.shape[0]} or more."
            )
        self.contents.take_rows(key_states.shape[0])
        self.contents.source_length = key_states.shape[2]
        # Keys, values, and the scales of both if there are any.
        targets = [self._in_use(buffer) for buffer in self.buffers]
        store(key_states.detach(), *targets[::2])
        store(value_states.detach(), *targets[1::2])
        return self.keys, self.values

    def get_seq_length(self, *args):
        return self.contents.source_length


class _Int8CrossAttentionLayer(_CrossAttentionLayer):
    """The same in 8 bits; `keys` and `values` are made from them whenever they are read."""

    buffer_names = ("key_buffer", "value_buffer", "key_scales", "value_scales")
    stored_dtype = torch.int8

    def __init__(self, contents, layer_idx, num_layers, shape, dtype, device):
        super().__init__(contents, layer_idx, num_layers, shape, dtype, device)
        self.key_scales = _static(torch.zeros(shape[:-1], dtype=dtype, device=device))
        self.value_scales = _static(torch.zeros(shape[:-1], dtype=dtype, device=device))

    @property
    def keys(self):
        return dequantize(self._in_use(self.key_buffer), self._in_use(self.key_scales))

    @property
    def values(self):
        return dequantize(self._in_use(self.value_buffer), self._in_use(self.value_scales))


class _StaticHalf(LayerColumns, StaticCache):
    """The self- or the cross-attention cache of an `EncoderDecoderStaticCache`.

    A StaticCache by type, because Whisper up to 4.52 asks for that before it builds a mask for the whole length.
    """

    is_compileable = True

    # StaticCache.__init__ would allocate, from `num_hidden_layers`, which in Whisper counts the encoder's layers.
    def __init__(self, layers):
        init_cache(self, layers)

    @property
    def max_batch_size(self):
        return self.layers[0].max_batch_size

    @property
    def batch_size(self):
        return self.layers[0].batch_size

    @property
    def max_cache_len(self):
        return self.layers[0].max_cache_len

    def __len__(self):
        return len(self.layers)

    def __repr__(self):
        return f"{type(self).__name__}({len(self.layers)} x {self.layers[0].key_buffer.shape})"

    def update(self, key_states, value_states, layer_idx, cache_kwargs=None, **kwargs):
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"The cache has {len(self.layers)} layers and the model has more than {layer_idx}; "
                "create EncoderDecoderStaticCache from this model's config."
            )
        return self.layers[layer_idx].update(key_states, value_states, cache_kwargs)

    def get_seq_length(self, layer_idx=0, cache_position=None):
        return self.layers[0].get_seq_length()

    def get_max_cache_shape(self, layer_idx=0):
        return self.max_cache_len

    def get_max_length(self, layer_idx=None):
        return self.max_cache_len

    def get_mask_sizes(self, query, layer_idx=0):
        return self.max_cache_len, 0

    def _of_the_pair(self, *args, **kwargs):
        """The halves share their rows and lengths, so what changes one of them must change both."""
        raise TypeError(
            "Call reset(), crop(), reorder_cache(), batch_repeat_interleave() and batch_select_indices() on the "
            "EncoderDecoderStaticCache, not on its self_attention_cache or cross_attention_cache."
        )

    reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _of_the_pair


class EncoderDecoderStaticCache(EncoderDecoderCache):
    """Whisper's self- and cross-attention keys and values in buffers that are allocated once.

    A call of any batch up to `max_batch_size` runs in the first rows; `reset()` makes room for the next one and frees
    nothing. The buffers never move, so that a compiled step or a captured CUDA graph stays valid:

        cache = EncoderDecoderStaticCache(model.config, max_batch_size=4, device=model.device, dtype=model.dtype)
        for features in recordings:
            cache.reset()
            ids = model.generate(features, past_key_values=cache)

    From transformers 5.24 on the argument is called `cache`.

    By hand, `model(..., past_key_values=cache)` takes it like any other cache, compiled with `fullgraph=True` or not.
    What is written is detached: no gradient flows through the cache.

    Args:
        config: the model's `WhisperConfig`.
        max_batch_size: rows to allocate; with beams or several sequences per input, count every one.
        max_cache_len: tokens per row, prompt included; at most and by default `config.max_target_positions`.
        max_source_len: encoder positions per row; at most and by default `config.max_source_positions`.
        max_inputs: rows of the cross-attention half; by default, and at most, `max_batch_size`. Fewer serve a decoder
            in which the beams of an input share its row, as Whisper's beam search does under `patch()`; the model's
            own forward needs one for each row of the batch.
        device: where the model's decoder is.
        dtype: what the decoder computes in, a floating-point `torch.dtype`.
        cross_dtype: None holds cross-attention's keys and values in `dtype`. `torch.int8` holds them in 8 bits, with a
            scale in `dtype` for each vector of a head: in half precision 52 % of the bytes, at the price of a rounding
            of 1/254 of the largest element of each vector.

    Raises:
        TypeError: `config` is no WhisperConfig, a size is no integer, or `dtype` or `cross_dtype` is no `torch.dtype`.
        ValueError: a size is out of range, `dtype` is not floating-point, or `cross_dtype` is another than
            `torch.int8`.
    """

    is_compileable = True

    # EncoderDecoderCache.__init__ differs from release to release; it only stores what is stored here.
    def __init__(
        self,
        config,
        max_batch_size=1,
        *,
        max_cache_len=None,
        max_source_len=None,
        max_inputs=None,
        device="cpu",
        dtype=torch.float32,
        cross_dtype=None,
    ):
        if not isinstance(config, WhisperConfig):
            raise TypeError(f"`config` must be a WhisperConfig, not {type(config).__name__}; pass model.config.")
        _check_size("max_batch_size", max_batch_size)
        max_inputs = max_batch_size if max_inputs is None else max_inputs
        _check_size("max_inputs", max_inputs)
        if max_inputs > max_batch_size:
            raise ValueError(f"`max_inputs` must be at most max_batch_size={max_batch_size}, not {max_inputs}.")
        max_cache_len = _length("max_cache_len", max_cache_len, "max_target_positions", config)
        max_source_len = _length("max_source_len", max_source_len, "max_source_positions", config)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"`dtype` must be a torch.dtype, not {dtype!r}; pass model.dtype.")
        if not dtype.is_floating_point:
            raise ValueError(f"`dtype` must be floating-point, not {dtype}; pass what the decoder computes in.")

        check_cross_dtype(cross_dtype)
        cross_layer = _CrossAttentionLayer if cross_dtype is None else _Int8CrossAttentionLayer

        num_layers, heads, head_dim = _decoder_shape(config)

        def layers(kind, rows, length):
            shape = (rows, heads, length, head_dim)
            return [kind(contents, index, num_layers, shape, dtype, device) for index in range(num_layers)]

        init_module(self)
        # A buffer made inside inference_mode() could never be written outside it.
        with torch.inference_mode(False):
            contents = _Contents(max_batch_size, device)
            self.self_attention_cache = _StaticHalf(layers(_SelfAttentionLayer, max_batch_size, max_cache_len))
            self.cross_attention_cache = _StaticHalf(layers(cross_layer, max_inputs, max_source_len))
        self.contents = contents
        # Attention reads and sets this: whether cross-attention's keys and values are there already.
        self.is_updated = dict.fromkeys(range(num_layers), False)

    @property
    def layer_buffers(self):
        """Tuple of `LayerBuffers`, one a layer: the whole buffers, for an engine that reads and writes them itself.

        With a `cross_dtype`, of `Int8LayerBuffers`.
        """
        kind = LayerBuffers if self.cross_dtype is None else Int8LayerBuffers
        pairs = zip(self.self_attention_cache.layers, self.cross_attention_cache.layers)
        return tuple(kind(*a.buffers, *b.buffers) for a, b in pairs)

    @property
    def max_batch_size(self):
        """Rows allocated."""
        return self.contents.max_batch_size

    @property
    def max_inputs(self):
        """Rows allocated for cross-attention: `max_batch_size`, or fewer that beams share."""
        return self.cross_attention_cache.max_batch_size

    @property
    def batch_size(self):
        """Rows in use; 0 when nothing is held."""
        return self.contents.batch_size

    @property
    def max_cache_len(self):
        """Tokens that a row can hold."""
        return self.self_attention_cache.max_cache_len

    @property
    def max_source_len(self):
        """Encoder positions that a row can hold."""
        return self.cross_attention_cache.max_cache_len

    @property
    def device(self):
        return self.contents.length.device

    @property
    def dtype(self):
        return self.self_attention_cache.layers[0].dtype

    @property
    def cross_dtype(self):
        """`torch.int8` if cross-attention's keys and values are held in 8 bits, None if in `dtype`."""
        return self.cross_attention_cache.layers[0].stored_dtype

    def __repr__(self):
        cross_dtype = "" if self.cross_dtype is None else f", cross_dtype={self.cross_dtype}"
        return (
            f"{type(self).__name__}(max_batch_size={self.max_batch_size}, max_cache_len={self.max_cache_len}, "
            f"max_source_len={self.max_source_len}, device={str(self.device)!r}, dtype={self.dtype}"
            f"{cross_dtype})"
        )

    def get_seq_length(self, layer_idx=0, cache_position=None):
        """Tokens held.

        Returns:
            A Python integer where the host knows it without waiting: nothing is held, or the cache is in host memory
            and no graph is being traced. Otherwise a 0-dim int64 tensor on the cache's device.
        """
        return self.self_attention_cache.get_seq_length()

    def get_max_cache_shape(self, layer_idx=0):
        """`max_cache_len`, under the name that transformers used first."""
        return self.max_cache_len

    def get_max_length(self, layer_idx=None):
        """`max_cache_len`, under the name that the newest releases use."""
        return self.max_cache_len

    def get_mask_sizes(self, query, layer_idx=0):
        """Length and offset of the keys that a mask must cover: `(max_cache_len, 0)`."""
        return self.max_cache_len, 0

    def check_fits(self, config, batch_size, length, dtype, device, inputs=None):
        """Check that the cache can hold a call, before anything is computed.

        Args:
            config: the model's `WhisperConfig`.
            batch_size: rows of the call.
            length: tokens of the longest row, prompt and new tokens together.
            dtype: what the decoder computes in.
            device: where the decoder is.
            inputs: rows of the encoder's output, if beams share them; `batch_size` by default.

        Raises:
            ValueError: it cannot; the sentence names both numbers.
        """
        first = self.self_attention_cache.layers[0]
        here, there = (first.num_layers, first.num_heads, first.head_dim), _decoder_shape(config)
        if here != there:
            raise ValueError(
                f"`{CACHE_NAME}` has {here[0]} layers of {here[1]} heads of {here[2]} and the model has {there[0]} "
                f"layers of {there[1]} heads of {there[2]}; create EncoderDecoderStaticCache from this model's config."
            )
        if batch_size > self.max_batch_size:
            raise ValueError(
                f"`{CACHE_NAME}` has max_batch_size={self.max_batch_size} and the call has {batch_size} rows; "
                f"create EncoderDecoderStaticCache with max_batch_size={batch_size} or more."
            )
        inputs = batch_size if inputs is None else inputs
        if inputs > self.max_inputs:
            raise ValueError(
                f"`{CACHE_NAME}` has max_inputs={self.max_inputs} and the call has {inputs} inputs; "
                f"create EncoderDecoderStaticCache with max_inputs={inputs} or more."
            )
        if length > self.max_cache_len:
            raise ValueError(
                f"`{CACHE_NAME}` has max_cache_len={self.max_cache_len} and the prompt and `max_new_tokens` need "
                f"{length}; lower `max_new_tokens`, or create EncoderDecoderStaticCache with a larger max_cache_len."
            )
        if dtype != self.dtype:
            raise ValueError(
                f"`{CACHE_NAME}` is of {self.dtype} and the model computes in {dtype}; "
                f"create EncoderDecoderStaticCache with dtype={dtype}."
            )
        # An empty tensor knows which index a bare "cuda" means.
        device = torch.empty(0, device=device).device
        if device != self.device:
            raise ValueError(
                f'`{CACHE_NAME}` is on {self.device} and the model on {device}; move it with to("{device}").'
            )

    def mark_filled(self, batch_size, length, source_length=None):
        """Record what an engine that wrote to `layer_buffers` itself has left there, so that it can be gone on with.

        Args:
            batch_size: rows written, from the first.
            length: tokens held in each, a Python integer.
            source_length: encoder positions held; `max_source_len` by default.

        Raises:
            ValueError: more than there is room for.
        """
        source_length = self.max_source_len if source_length is None else source_length
        held = (batch_size, length, source_length)
        room = (self.max_batch_size, self.max_cache_len, self.max_source_len)
        if any(count > limit for count, limit in zip(held, room)):
            raise ValueError(
                f"The cache has room for (rows, tokens, source positions) = {room}, and {held} were given."
            )
        contents = self.contents
        contents.batch_size, contents.source_length, contents.in_pass = batch_size, source_length, False
        contents.length.fill_(length)
        self._set_updated(True)

    def reset(self):
        """Forget everything: keys, values and lengths become zero in place, and nothing is freed."""
        torch._foreach_zero_(self._all_buffers())
        contents = self.contents
        contents.batch_size, contents.source_length, contents.in_pass = 0, 0, False
        contents.length.zero_()
        self._set_updated(False)

    def crop(self, tokens):
        """Shorten what self-attention holds, without waiting for the device.

        Both conventions of transformers are understood, whichever release is installed: in 5.10 a positive number is
        the final length, and the newest releases accept only negative ones.

        Args:
            tokens: positive, the length to keep at most; negative, how many tokens to remove; 0 as the installed
                release has it: in 5.10 it keeps none, in 5.17 it removes none.
        """
        length = self.contents.length
        if tokens < 0:
            length.add_(tokens).clamp_(min=0)
        elif tokens > 0 or CROP_ZERO_EMPTIES:
            length.clamp_(max=tokens)

    def reorder_cache(self, beam_idx):
        """Give row `i` the contents of row `beam_idx[i]`, in place.

        Args:
            beam_idx: `(batch_size,)` int64.

        Raises:
            ValueError: more rows than `max_batch_size`.
        """
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats):
        """Repeat every row `repeats` times, copies next to each other, in place.

        Raises:
            ValueError: `repeats` is below 1, or the result has more rows than `max_batch_size`.
        """
        _check_size("repeats", repeats)
        self._select_rows(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices):
        """Keep the rows at `indices`, in that order, in place.

        Args:
            indices: int64 row numbers (repeats allowed), or `(batch_size,)` bool.

        Raises:
            ValueError: no row, or more rows than `max_batch_size`.
            IndexError: a row that is not in use.
        """
        self._select_rows(indices)

    def to(self, device):
        """Move the cache, with what it holds, and return it. Graphs captured over the old buffers no longer apply."""
        if torch.empty(0, device=device).device != self.device:
            with torch.inference_mode(False):
                for layer in (*self.self_attention_cache.layers, *self.cross_attention_cache.layers):
                    for name in layer.buffer_names:
                        setattr(layer, name, _static(getattr(layer, name).to(device)))
                self.contents.length = _static(self.contents.length.to(device))
        return self

    def memory_footprint(self):
        """Bytes of all keys and values allocated, and of their scales, whether in use or not."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._all_buffers())

    # Not `_buffers`: that name is taken where caches are modules.
    def _all_buffers(self):
        return [buffer for layer in self.layer_buffers for buffer in layer]

    def _set_updated(self, value):
        for layer_idx in self.is_updated:
            self.is_updated[layer_idx] = value

    def _select_rows(self, indices):
        contents = self.contents
        if contents.batch_size == 0:
            return
        # Indexing understands row numbers and booleans alike, and fails here rather than halfway through the layers.
        rows = torch.arange(contents.batch_size, device=self.device)[torch.as_tensor(indices, device=self.device)]
        count = rows.shape[0]
        if not 1 <= count <= self.max_inputs:
            limit = "max_batch_size" if self.max_inputs == self.max_batch_size else "max_inputs"
            raise ValueError(
                f"The cache has {limit}={self.max_inputs} and {count} rows were selected; "
                f"select at least one, or create EncoderDecoderStaticCache with a larger {limit}."
            )
        for buffer in self._all_buffers():
            buffer[:count] = buffer.index_select(0, rows)
        contents.batch_size = count


def _static(tensor):
    """Tell the compiler that `tensor` stays where it is, so that CUDA graphs write to it in place."""
    torch._dynamo.mark_static_address(tensor)
    return tensor


def _decoder_shape(config):
    """Layers, heads and head_dim of the decoder, cross-attention included."""
    heads = config.decoder_attention_heads
    return config.decoder_layers, heads, config.d_model // heads


def _check_size(name, value):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, not {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, not {value}.")


def _length(name, value, limit_name, config):
    limit = getattr(config, limit_name)
    if value is None:
        return limit
    _check_size(name, value)
    if value > limit:
        raise ValueError(f"`{name}` must be at most config.{limit_name}={limit}, not {value}.")
    return value
