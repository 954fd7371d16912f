"""Whisper's decoder as a function over a model's own modules and a preallocated cache.

One function serves the prompt (prefill) and the one-token step. It calls the model's linears, layer norms, embeddings
and activation as modules, so that whatever stands in their place (LoRA, low-bit linears) is honoured; only the wiring
between them, which has not changed since Whisper came to transformers, is written here. `why_not_plain` says when a
model is wired differently, and then the stock path serves it.
"""

from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter

import torch
from torch import nn
from torch.nn import functional as F

from .int8_states import in_full, store


# Modules whose own `forward` is bypassed. A hook on one of these, or another forward, would be lost without a word.
_BYPASSED = ("WhisperModel", "WhisperDecoder", "WhisperDecoderLayer", "WhisperAttention", "WhisperPositionalEmbedding")
# Up to transformers 4.53 the attention implementation is a class of its own.
_ATTENTION_VARIANTS = ("WhisperSdpaAttention", "WhisperFlashAttention2")
# Where the classes come from whose forward reads nothing but parameters, buffers and inputs.
_KNOWN_PACKAGES = ("torch.nn.", "transformers.", f"{__package__}.")
# What every module has: children, tensors and hooks, which `ModuleFingerprint` and the engines look at.
_MODULE_TABLES = vars(nn.Module()).keys() - {"training"}
_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Plain attributes that a captured step has baked in, or that decide whether an engine can serve.
_SETTINGS = ("approximate", "bits", "eps", "group_size", "out_features", "scaling")


def decoder_forward(decoder, input_ids, position_ids, buffers, write_at, attention_mask=None):
    """Run the decoder's layers over `input_ids`, writing self-attention keys and values into `buffers`.

    Args:
        decoder: the model's `WhisperDecoder`.
        input_ids: `(batch, length)` int64.
        position_ids: `(batch or 1, length)` int64, indices into the learned positions.
        buffers: per layer `(self_keys, self_values, cross_keys, cross_values)`, each `(batch, heads, slots,
            head_dim)`; the cross-attention ones are filled already (`project_cross_attention`), and may have fewer
            rows: one for the beams of each input. Held in 8 bits, their scales follow: `Int8LayerBuffers`.
        write_at: where the first of the `length` new entries goes. An `int`, known to the host: attention then reads
            the slots up to the last one written and no others, which is what a growing cache does. Or an int64 tensor
            of shape `(length,)`, known to the device only: attention reads every slot, and `attention_mask` must hide
            the unwritten ones.
        attention_mask: None (causal), or bool, broadcastable to `(batch, heads, length, slots read)`, True where a
            query may look.

    Returns:
        `(batch, length, d_model)` hidden states after the final layer norm.
    """
    batch, length = input_ids.shape
    hidden = decoder.embed_tokens(input_ids) + decoder.embed_positions.weight[position_ids]
    host_knows = isinstance(write_at, int)
    is_causal = attention_mask is None and length > 1
    for layer, (self_keys, self_values, *cross) in zip(decoder.layers, buffers):
        attention = layer.self_attn
        residual = hidden
        hidden = layer.self_attn_layer_norm(hidden)
        # Whisper scales the query before the product, not the product: the order matters to the last bit.
        query = _heads(attention.q_proj(hidden) * attention.scaling, attention)
        key = _heads(attention.k_proj(hidden), attention)
        value = _heads(attention.v_proj(hidden), attention)
        if host_knows:
            end = write_at + length
            self_keys[:, :, write_at:end] = key
            self_values[:, :, write_at:end] = value
            key, value = self_keys[:, :, :end], self_values[:, :, :end]
        else:
            key = self_keys.index_copy_(2, write_at, key)
            value = self_values.index_copy_(2, write_at, value)
        hidden = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, is_causal=is_causal, scale=1.0
        )
        hidden = residual + attention.out_proj(hidden.transpose(1, 2).reshape(batch, length, -1))

        attention = layer.encoder_attn
        residual = hidden
        hidden = layer.encoder_attn_layer_norm(hidden)
        query = _heads(attention.q_proj(hidden) * attention.scaling, attention)
        hidden = _cross_attention(query, *in_full(*cross))
        hidden = residual + attention.out_proj(hidden.transpose(1, 2).reshape(batch, length, -1))

        residual = hidden
        hidden = layer.final_layer_norm(hidden)
        hidden = residual + layer.fc2(layer.activation_fn(layer.fc1(hidden)))
    return decoder.layer_norm(hidden)


def _cross_attention(query, keys, values):
    """Attention of `(batch, heads, length, head_dim)` queries to the encoder's output.

    `keys` and `values` have a row per input. The rows of `query` may be more, those of one input (its beams) next to
    each other: they become further queries of that input, so that its keys and values are held and read once.
    """
    batch, inputs = query.shape[0], keys.shape[0]
    if batch == inputs:
        return F.scaled_dot_product_attention(query, keys, values, scale=1.0)
    beams, length = batch // inputs, query.shape[2]
    folded = query.unflatten(0, (inputs, beams)).transpose(1, 2).flatten(2, 3)
    hidden = F.scaled_dot_product_attention(folded, keys, values, scale=1.0)
    return hidden.unflatten(2, (beams, length)).transpose(1, 2).flatten(0, 1)


def project_cross_attention(decoder, encoder_hidden_states, buffers):
    """Fill every layer's cross-attention keys and values from encoder states `(batch, source_length, d_model)`."""
    for layer, (_, _, *cross) in zip(decoder.layers, buffers):
        attention = layer.encoder_attn
        # Keys, values, and the scales of both if there are any.
        store(_heads(attention.k_proj(encoder_hidden_states), attention), *cross[::2])
        store(_heads(attention.v_proj(encoder_hidden_states), attention), *cross[1::2])


def decode_step(decoder, proj_out, tokens, length, position_offset, valid, buffers):
    """One token for every row, with nothing that the host must know: the unit that is compiled and captured.

    Args:
        decoder, proj_out: the model's decoder and output head.
        tokens: `(batch, max_length)` int64, valid in `[:, :length]`; the last valid token is the one to feed.
        length: int64 tensor of shape `(1,)`.
        position_offset: `(batch, 1)` int64, subtracted from the slot to get the learned position (left padding), or
            None.
        valid: `(batch, slots)` bool, False where a slot holds padding, or None.
        buffers: as in `decoder_forward`, unwritten slots finite.

    Returns:
        `(batch, vocab_size)` float32 logits of the next token.
    """
    slot = length - 1
    position_ids = slot[None] if position_offset is None else slot - position_offset
    slots = buffers[0][0].shape[2]
    attention_mask = (torch.arange(slots, device=tokens.device) <= slot)[None, None, None]
    if valid is not None:
        attention_mask = attention_mask & valid[:, None, None]
    hidden = decoder_forward(decoder, tokens.index_select(1, slot), position_ids, buffers, slot, attention_mask)
    return proj_out(hidden[:, -1]).float()


def padded_prompt_mask(valid):
    """`(batch, 1, length, length)` bool mask of a left-padded prompt, from `(batch, length)` bool.

    A query may look at valid earlier positions and always at itself: a padding position that could look nowhere would
    give NaN, and a NaN value reaches every query, masked or not, through its product with a zero weight.
    """
    length = valid.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    return (causal & valid[:, None]).logical_or_(torch.eye(length, dtype=torch.bool, device=valid.device))[:, None]


def _heads(states, attention):
    """`(batch, length, d_model)` to `(batch, heads, length, head_dim)`."""
    return states.view(*states.shape[:2], attention.num_heads, attention.head_dim).transpose(1, 2)


def why_not_plain(model):
    """The reason why `model`'s decoder is not wired as this file assumes, or None if it is."""
    decoder = model.model.decoder
    bypassed = [model.model, decoder, decoder.embed_positions]
    for layer in decoder.layers:
        bypassed += [layer, layer.self_attn, layer.encoder_attn]
    for module in bypassed:
        kind = type(module)
        if kind.__name__ not in _BYPASSED + _ATTENTION_VARIANTS or not kind.__module__.startswith("transformers."):
            return f"{kind.__name__} is not transformers' own"
    for module in [model, *bypassed]:
        if _is_hooked(module):
            return f"{type(module).__name__} has a forward hook"
        if not forwards_as_its_class(module):
            # Loading with device_map does that, also where everything is on one device.
            accelerate = ": accelerate.hooks.remove_hook_from_module(model, recurse=True) takes accelerate's hooks off"
            remedy = accelerate if hasattr(module, "_hf_hook") else ""
            return f"{type(module).__name__}.forward is replaced on the instance{remedy}"
    if model.training and any(
        rate > 0 for rate in (decoder.dropout, decoder.layerdrop, decoder.layers[0].self_attn.dropout)
    ):
        return "the model is in training mode with dropout"
    devices = {parameter.device for module in (decoder, model.proj_out) for parameter in module.parameters()}
    if len(devices) > 1:
        return "the decoder is spread over several devices"
    return None


def forward_hooks(module):
    """The forward hooks and pre-hooks on `module` that do something.

    From 5.3 a call that asks for attentions or hidden states leaves transformers' own hooks behind, for ever: they
    collect where such a call is running, and such a call is stock's.
    """
    return [*_acting(module._forward_hooks), *_acting(module._forward_pre_hooks)]


def _acting(hooks):
    return [
        hook for hook in hooks.values() if getattr(hook, "__module__", None) != "transformers.utils.output_capturing"
    ]


def _is_hooked(module):
    return bool(forward_hooks(module) or module._backward_hooks or module._backward_pre_hooks)


def forwards_as_its_class(module):
    """Whether `module` runs its class's forward; `module.forward = torch.compile(module.forward)` still does."""
    own = module.__dict__.get("forward")
    if own is None:
        return True
    own = getattr(own, "_torchdynamo_orig_callable", own)
    return getattr(own, "__func__", None) is type(module).forward


class ModuleFingerprint:
    """Notices that parts of a module are no longer what was seen before: replaced, moved, cast, requantised.

    Everything that a compiled step or a captured graph has baked in is compared (`still_holds`): which module of which
    class stands where, where each parameter's storage is, and the settings in plain attributes. What only decides who
    may serve is told apart (`circumstances`), since it may change and change back. A deep copy is another model and
    never gets here.

    It is asked before every window, while a GPU may have nothing to do: the thousand modules and tensors of a large
    model are gone through by functions written in C, over lists made once.

    Args:
        module: the model.
        parts: dotted names of the submodules to look at; without any, `module` is looked at.
    """

    def __init__(self, module, *parts):
        # Of the model itself no more than its table of children: who keeps the fingerprint must not keep the model.
        self._parts = parts
        self._modules, tables, children = [], [], []
        for part in parts or ("",):
            root = module
            for name in filter(None, part.split(".")):
                children.append((root._modules, name, root._modules[name]))
                root = root._modules[name]
            self._modules += root.modules()
        for inner in self._modules:
            tables += [inner._modules, inner._parameters, inner._buffers]
        children += [(table, name, child) for table in tables for name, child in table.items()]
        self._dicts = [vars(inner) for inner in self._modules]
        self._tables, self._sizes = tables, [len(table) for table in tables]
        self._owners, self._names, self._children = zip(*children) if children else ((), (), ())
        tensors = [child for child in self._children if isinstance(child, torch.Tensor)]
        # A tensor subclass (torchao's) may have no storage to point at, nor strides.
        self._plain = [tensor for tensor in tensors if type(tensor) in (torch.Tensor, nn.Parameter)]
        self._matrices = [tensor for tensor in self._plain if tensor.dim() > 1]
        self._others = [tensor for tensor in tensors if type(tensor) not in (torch.Tensor, nn.Parameter)]
        # An adapter may mean anything by these names: see `switches`.
        known = [vars(inner) for inner in self._modules if _is_known(type(inner))]
        self._settings = [(itemgetter(name), [own for own in known if name in own]) for name in _SETTINGS]
        self._seen = self._describe()

    def _describe(self):
        plain = self._plain
        return (
            list(map(type, self._modules)),
            # The same object may have been given other storage, of another dtype or on another device.
            list(map(torch.Tensor.data_ptr, plain)),
            list(map(attrgetter("dtype"), plain)),
            list(map(torch.Tensor.get_device, plain)),
            list(map(torch.Tensor.is_contiguous, self._matrices)),
            list(map(attrgetter("dtype", "device"), self._others)),
            [list(map(get, dicts)) for get, dicts in self._settings],
        )

    def still_holds(self):
        if list(map(len, self._tables)) != self._sizes:
            return False
        if not all(map(is_, map(dict.get, self._owners, self._names), self._children)):
            return False
        try:
            return self._seen == self._describe()
        except KeyError:  # a setting is gone
            return False

    def circumstances(self, module):
        """What stands on the modules, to compare: which ones have hooks that act, or a forward that is not their
        class's.

        Args:
            module: the one that the fingerprint was made of.
        """
        above, root = [], module
        for part in self._parts:
            root = module
            for name in filter(None, part.split(".")):
                above.append(root)
                root = root._modules[name]
        modules, dicts = self._modules, self._dicts
        if above:
            modules, dicts = [*above, *modules], [*map(vars, above), *dicts]
        found = []
        # The tables of hooks are looked up anew: to put an empty one in a full one's place is how some remove hooks.
        if any(chain.from_iterable(map(_HOOKS, dicts))):
            for n, own in enumerate(dicts):
                forward, forward_pre, *backward = _HOOKS(own)
                if _acting(forward) or _acting(forward_pre):
                    found.append(("forward hook", n))
                if any(backward):
                    found.append(("backward hook", n))
        for n, forward in enumerate(map(dict.get, dicts, repeat("forward"))):
            if forward is not None:
                found.append(("as its class" if forwards_as_its_class(modules[n]) else "forward", n))
        return found

    def in_training(self):
        """Whether any of the modules is in training mode."""
        return any(map(itemgetter("training"), self._dicts))


def _identity(tensor):
    """What tells one parameter's storage from another's; a tensor subclass (torchao's) may have none to point at."""
    address = tensor.data_ptr() if type(tensor) in (torch.Tensor, nn.Parameter) else None
    return id(tensor), address, tensor.dtype, tensor.device


def foreign_modules(*roots):
    """The modules below `roots` of classes that are not PyTorch's, transformers' or ours: adapters, most of all."""
    modules = (module for root in roots for module in root.modules())
    return [module for module in modules if not _is_known(type(module))]


def _is_known(kind):
    return kind.__module__.startswith(_KNOWN_PACKAGES)


def switches(modules):
    """The plain attributes of `modules`, to compare and to hash.

    What an adapter computes hinges on such: PEFT keeps which adapter is active, whether any is, and
    the scales in them.
    A captured graph reads none of them again.
    """
    return tuple(
        _frozen({name: value for name, value in vars(module).items() if name not in _MODULE_TABLES})
        for module in modules
    )


def _frozen(value, depth=6):
    """`value` as far as it is made of plain ones; of others, and of what lies deeper, which object it is."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        return value
    if isinstance(value, torch.Tensor):
        return _identity(value)
    if depth and isinstance(value, dict):
        return tuple((_frozen(key, depth - 1), _frozen(one, depth - 1)) for key, one in value.items())
    if depth and isinstance(value, (list, tuple)):
        return tuple(_frozen(one, depth - 1) for one in value)
    if depth and isinstance(value, (set, frozenset)):
        return frozenset(_frozen(one, depth - 1) for one in value)
    return id(value)


def decoder_device(model):
    """The device that the decoder computes on."""
    return next(model.model.decoder.parameters()).device


def activation_dtype(model):
    """The floating dtype of the decoder's activations: that of its layer norms, which quantisation leaves alone."""
    norm = model.model.decoder.layer_norm
    return norm.weight.dtype if isinstance(norm, nn.LayerNorm) else model.model.decoder.embed_positions.weight.dtype
