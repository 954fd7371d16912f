"""Where releases of transformers differ: the only module that asks which one is installed.

Each shim names its cause, the upstream change, and when it goes away. Signatures and names are probed, not version
numbers, wherever one tells the difference.
"""

import functools
import inspect

import numpy as np
import torch
import transformers
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import configuration_utils
from transformers.generation.utils import GenerateEncoderDecoderOutput


# Cause: from 4.54 a cache is a list of layer objects, and attention reads `cache.layers[i].keys` of cross-attention.
# Up to 4.53 there are no layers and nothing to inherit from.
# Goes away: with support for 4.53.
StaticLayer = getattr(cache_utils, "StaticLayer", object)

# Cause: `crop(0)` empties a cache where the argument is the final length (`maximum_length`, as in 5.10), and removes
# nothing where it is the number of tokens to remove (`tokens_to_remove`, as in 5.17). The sign of any other value says
# which of the two is meant.
# Goes away: with support for the last release that calls it `maximum_length`.
CROP_ZERO_EMPTIES = "maximum_length" in inspect.signature(EncoderDecoderCache.crop).parameters

# Cause: from 5.24 the cache is called `cache`, as an argument and as a field of what is returned; before that it is
# `past_key_values`, which `generate` still takes, and warns of.
# Goes away: with support for 5.23.
CACHE_NAME = "cache" if "cache" in GenerateEncoderDecoderOutput.__dataclass_fields__ else "past_key_values"
# Names that `generate` takes it by.
_CACHE_NAMES = ("cache", "past_key_values", "cache_params") if CACHE_NAME == "cache" else (CACHE_NAME,)

# Cause: `Cache.__init__` takes the finished layers from 4.56 only. In 4.54 and 4.55 it makes them itself from the
# configuration of a model, and before that there is nothing to take.
# Goes away: with support for 4.55.
_CACHE_TAKES_LAYERS = "layers" in inspect.signature(Cache.__init__).parameters


def cache_of(arguments):
    """The cache among the arguments of a `generate` call, or None."""
    return next((arguments[name] for name in _CACHE_NAMES if arguments.get(name) is not None), None)


def init_cache(cache, layers):
    """Initialise the `Cache` part of a cache that allocates for itself, skipping the release's own allocation.

    Args:
        cache: an instance of a subclass of `Cache`, before any attribute is set on it.
        layers: list of the layer objects that it consists of.
    """
    if _CACHE_TAKES_LAYERS:
        Cache.__init__(cache, layers=layers)
        return
    init_module(cache)
    cache.layers = layers
    cache.cache_processor = None  # 4.54 and 4.55 look here for offloading or quantisation


def init_module(cache):
    """Run `nn.Module.__init__` where caches are modules.

    Cause: `Cache` is an `nn.Module` up to 4.48, and a module refuses attributes before its own initialisation.
    Goes away: with support for 4.48.
    """
    if isinstance(cache, torch.nn.Module):
        torch.nn.Module.__init__(cache)


class LayerColumn:
    """`layers[i].keys` (or values) under the list interface of older releases: see `LayerColumns`."""

    def __init__(self, layers, name):
        self._layers = layers
        self._name = name

    def __getitem__(self, layer_idx):
        return getattr(self._layers[layer_idx], self._name)

    def __len__(self):
        return len(self._layers)


class LayerColumns:
    """Adds `key_cache` and `value_cache` to a cache that has `layers`.

    Cause: up to 4.53 cross-attention reads `cache.key_cache[i]`; in 4.54 and 4.55 the names still work and warn.
    Goes away: with support for 4.53.
    """

    @property
    def key_cache(self):
        return LayerColumn(self.layers, "keys")

    @property
    def value_cache(self):
        return LayerColumn(self.layers, "values")


def version():
    """The transformers release, as "5.23.0"."""
    return transformers.__version__


@functools.lru_cache(maxsize=1)
def mask_moves_positions():
    """Whether padding of the prompt shifts the decoder's learned positions.

    Cause: up to 5.2 `prepare_inputs_for_generation` counts `decoder_position_ids` from the first valid token of
    `decoder_attention_mask`; from 5.3 positions are those of the slots, padded or not.
    Goes away: with support for 5.2.
    """
    from transformers import WhisperForConditionalGeneration

    method = inspect.unwrap(WhisperForConditionalGeneration.prepare_inputs_for_generation)
    return "cumsum" in method.__code__.co_names


def dynamic_cache(buffers, length):
    """The `EncoderDecoderCache` that stock's loop would hand out: a copy of the first `length` slots.

    Args:
        buffers: per layer `(self_keys, self_values, cross_keys, cross_values)`, each `(batch, heads, slots,
            head_dim)`.
        length: self-attention slots that are filled; 0 gives an empty cache.
    """
    self_attention, cross_attention = DynamicCache(), DynamicCache()
    if length:
        for index, (self_keys, self_values, cross_keys, cross_values) in enumerate(buffers):
            self_attention.update(self_keys[:, :, :length].clone(), self_values[:, :, :length].clone(), index)
            cross_attention.update(cross_keys.clone(), cross_values.clone(), index)
    cache = EncoderDecoderCache(self_attention, cross_attention)
    for index in range(len(buffers)):
        cache.is_updated[index] = bool(length)
    return cache


def average_logprob(logprobs, tokens, arguments, keywords):
    """Average of the chosen tokens' log-probabilities, as this release's `_retrieve_avg_logprobs` has it.

    Cause: up to 4.46 the end token is left out of the sum and counted in the length, and its id is the third argument;
    later the sum is over all tokens.
    Goes away: with support for 4.46.

    Args:
        logprobs: `(length,)` float32, of the tokens in order.
        tokens: `(length,)` int64.
        arguments, keywords: what followed `scores` and `tokens` in the call.
    """
    if len(arguments) + len(keywords) < 2:
        # A running sum in token order, as in transformers: another order would round differently.
        return torch.from_numpy(np.add.accumulate(logprobs.numpy()))[-1] / len(tokens)
    eos = keywords["eos_token_id"] if "eos_token_id" in keywords else arguments[0]
    kept = tokens.to(logprobs.device) != eos
    return sum(logprobs[index] * kept[index] for index in range(len(logprobs))) / (kept.sum(-1) + 1)


def forget_unused_cache(model):
    """Take off `model` the static cache that `generate` has made for a call that did not use it.

    Cause: `generate` keeps the cache, which the next call asks for its size; in 4.57, and up to 5.4 at least, a cache
    has none before its first forward, and no memory either.
    Goes away: with support for the last of these; 5.17 and 5.23 are none of them.
    """
    cache = getattr(model, "_cache", None)
    cache = getattr(cache, "self_attention_cache", cache)
    if cache is not None and not any(hasattr(cache, name) for name in ("max_batch_size", "batch_size")):
        del model._cache


def without_dynamic(keywords):
    """`generate`'s keywords without `cache_implementation="dynamic"` where the release does not know the name.

    Cause: up to 4.49 a dynamic cache is what no `cache_implementation` gives, and it cannot be asked for by name.
    Goes away: with support for 4.49.
    """
    known = getattr(configuration_utils, "ALL_CACHE_IMPLEMENTATIONS", ("dynamic",))
    if keywords.get("cache_implementation") == "dynamic" and "dynamic" not in known:
        return {**keywords, "cache_implementation": None}
    return keywords
