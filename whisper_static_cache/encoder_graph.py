"""The encoder's forward as a CUDA graph: eager, its hundreds of small kernels wait for the host."""

import functools
import inspect
import logging
import threading

import torch
from torch import nn

from .cuda_graphs import CapturedCall
from .modeling_whisper import ModuleFingerprint, foreign_modules, forward_hooks


logger = logging.getLogger(__name__)

# The largest batch that is captured; beyond it the arithmetic hides the launches.
MAX_ROWS = 16
_SERVED_ATTENTION = ("sdpa", "eager")


def rows_for(batch_size):
    """Rows to run for a batch: the next power of two, so that few graphs are captured."""
    return 1 << (batch_size - 1).bit_length()


@functools.lru_cache(maxsize=8)
def _signature(function):
    return inspect.signature(function)


def named_arguments(encoder, args, kwargs):
    """The arguments of a call of `encoder` by name, those that its signature has no name for among them."""
    if "forward" in vars(encoder):
        bound = inspect.signature(encoder.forward).bind(*args, **kwargs).arguments
    else:
        bound = _signature(type(encoder).forward).bind(encoder, *args, **kwargs).arguments
        bound.pop("self", None)
    unnamed = bound.pop("kwargs", {})
    return {**bound, **unnamed}


def why_not(encoder, features, arguments, why_not_modules=None):
    """The reason why this call of `encoder` cannot be replayed from a graph, or None.

    Args:
        encoder: a `WhisperEncoder`.
        features: what it is called on; `(batch, mel_bins, frames)` if it can be replayed.
        arguments: the call's other arguments by name.
        why_not_modules: function without arguments that stands for the one of that name, which looks at every module.
    """
    parameter = next(encoder.parameters())
    if not isinstance(features, torch.Tensor) or features.dim() != 3:
        return "the features are not one batch"
    if not _on_one_gpu(features, parameter):
        return "features and encoder are not on one GPU"
    if features.dtype != parameter.dtype:
        return "the features are of another dtype than the encoder"
    if not 1 <= features.shape[0] <= MAX_ROWS:
        return f"a batch of {features.shape[0]}"
    for name, value in arguments.items():
        # Whisper's encoder reads no mask.
        if name not in ("attention_mask", "return_dict") and value is not None and value is not False:
            return f"the argument `{name}` is given"
    if arguments.get("return_dict") is False:
        return "a tuple is asked for"
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
        return "gradients or autocast are on"
    if getattr(encoder.config, "_attn_implementation", None) not in _SERVED_ATTENTION:
        return "the attention implementation may not be capturable"
    frames = encoder.config.max_source_positions * encoder.conv1.stride[0] * encoder.conv2.stride[0]
    if tuple(features.shape[1:]) != (encoder.config.num_mel_bins, frames):
        return "the features are of another shape than the encoder takes"
    return why_not_modules() if why_not_modules else _why_not_modules(encoder)


def _why_not_modules(encoder):
    """The part of `why_not` that hinges on the encoder's modules alone."""
    for module in encoder.modules():
        if module.training:
            return f"{type(module).__name__} is in training mode"
        if forward_hooks(module) or "forward" in module.__dict__:
            return f"{type(module).__name__} has a forward of its own or a hook"
    for module in foreign_modules(encoder):
        # An adapter computes by switches and factors that no fingerprint sees.
        return f"{type(module).__name__} may not compute the same every time"
    return None


def _arithmetic():
    """PyTorch's settings that decide which kernels a graph has captured.

    From 2.9 on the older names of the precisions raise once the newer have been set; the newer follow the older.
    """
    backends, cublas = torch.backends, torch.backends.cuda.matmul
    if hasattr(backends.cudnn, "conv"):
        precisions = cublas.fp32_precision, backends.cudnn.conv.fp32_precision
    else:
        precisions = cublas.allow_tf32, backends.cudnn.allow_tf32
    return (
        *precisions,
        cublas.allow_fp16_reduced_precision_reduction,
        cublas.allow_bf16_reduced_precision_reduction,
        backends.cudnn.enabled,
        backends.cudnn.benchmark,
        backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        backends.cuda.flash_sdp_enabled(),
        backends.cuda.mem_efficient_sdp_enabled(),
        backends.cuda.math_sdp_enabled(),
        backends.cuda.cudnn_sdp_enabled(),
    )


def _on_one_gpu(features, parameter):
    return features.device == parameter.device and features.device.type == "cuda"


def row_by_row(encoder, features):
    """The encoder's states, with those of a position next to each other in memory from the first layer on.

    The convolutions leave them position by position for each dimension, and whatever is added to them keeps that
    order: every residual sum and layer norm of every layer would read one tensor across. The numbers are the same.
    """
    layer = encoder.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, arguments: (arguments[0].contiguous(), *arguments[1:]))
    try:
        return encoder(features).last_hidden_state
    finally:
        hook.remove()


class CapturedEncoder:
    """Stands in for a model's encoder during `generate`: replays a graph where it can, else calls the encoder."""

    def __init__(self, encoder):
        self.encoder = encoder
        self.captures = 0
        self._lock = threading.Lock()
        self._forget()
        self._failed = False

    def _forget(self):
        self._fingerprint = None
        # The circumstances that were found last, and what they mean.
        self._circumstances = None
        self._reason = None
        self._graphs = {}
        self._pools = {}

    @property
    def forward(self):
        """What transformers reads the signature of."""
        return self.encoder.forward

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def __call__(self, *args, **kwargs):
        try:
            arguments = named_arguments(self.encoder, args, kwargs)
        except TypeError:
            return self.encoder(*args, **kwargs)
        features = arguments.pop("input_features", None)
        if self._failed or why_not(self.encoder, features, arguments, self._why_not_modules) is not None:
            return self.encoder(*args, **kwargs)
        try:
            states = self._replay(features)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            self._failed = True
            self._forget()
            logger.warning("The encoder could not be captured (%s): it runs uncaptured from here on.", error)
            return self.encoder(*args, **kwargs)
        return _output_class()(last_hidden_state=states)

    def _why_not_modules(self):
        """As the function of this name, found out once; graphs of what the encoder no longer is are let go."""
        with self._lock:
            if self._fingerprint is None or not self._fingerprint.still_holds():
                self._forget()
                self._fingerprint = ModuleFingerprint(self.encoder)
            circumstances = (self._fingerprint.in_training(), self._fingerprint.circumstances(self.encoder))
            if circumstances != self._circumstances:
                self._reason, self._circumstances = _why_not_modules(self.encoder), circumstances
            return self._reason

    def _replay(self, features):
        # A caller may be in inference mode; buffers outlive the call and could not be written outside of it again.
        with self._lock, torch.inference_mode(False), torch.no_grad(), torch.cuda.device(features.device):
            # Replays on two streams could overlap: each stream has graphs and a pool of its own.
            stream = torch.cuda.current_stream().cuda_stream
            rows = rows_for(features.shape[0])
            key = (stream, rows, self.encoder.config._attn_implementation, _arithmetic())
            if key not in self._graphs:
                self._graphs[key] = self._capture(stream, rows, features)
            graph, buffer = self._graphs[key]
            buffer[: features.shape[0]].copy_(features)
            # `generate` keeps the states over retries, and the next replay overwrites them.
            return graph()[: features.shape[0]].clone()

    def _capture(self, stream, rows, features):
        buffer = torch.zeros(rows, *features.shape[1:], dtype=features.dtype, device=features.device)
        if stream not in self._pools:
            self._pools[stream] = torch.cuda.graph_pool_handle()
        graph = CapturedCall(lambda: row_by_row(self.encoder, buffer), pool=self._pools[stream])
        self.captures += 1
        return graph, buffer


def _output_class():
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput


def encoder_of(state, encoder):
    """The stand-in for `encoder` that `state`, the model's `ModelState`, keeps; `encoder` itself where it has none.

    Only a module of transformers' own is stood in for.
    """
    if not isinstance(encoder, nn.Module) or type(encoder).__name__ != "WhisperEncoder":
        return encoder
    with state.lock:
        if state.encoder is None or state.encoder.encoder is not encoder:
            state.encoder = CapturedEncoder(encoder)
        return state.encoder
