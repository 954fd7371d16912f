"""A linear layer whose weight is packed low-bit integers."""

import torch
from torch import nn
from torch.utils._pytree import tree_map

from .ops.packing import pack, packed_width, unpack
from .quantization_backends import BACKENDS, LinearSpec, select_backend


class PackedWeight:
    """What `QuantizedLinear.weight` answers: the shape, dtype and device of the weight, without a dense copy of it.

    A torch function that is given one works on the dequantised weight. It cannot be written to.
    """

    requires_grad = False

    def __init__(self, linear):
        self._linear = linear

    @property
    def shape(self):
        return torch.Size((self._linear.out_features, self._linear.in_features))

    @property
    def dtype(self):
        return self._linear.scales.dtype

    @property
    def device(self):
        return self._linear.scales.device

    @property
    def is_cuda(self):
        return self._linear.scales.is_cuda

    @property
    def ndim(self):
        return 2

    def dim(self):
        return 2

    def size(self, dim=None):
        return self.shape if dim is None else self.shape[dim]

    def numel(self):
        return self.shape.numel()

    def __getattr__(self, name):
        raise AttributeError(f"a packed weight has no {name!r}: call dequantize() of its QuantizedLinear for a tensor")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        def dense(value):
            return value._linear.dequantize() if isinstance(value, cls) else value

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))

    def __repr__(self):
        return f"PackedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


class QuantizedLinear(nn.Module):
    """``y = x W^T + b`` with ``W = (q - zero) * scale`` and the integers ``q`` packed.

    Buffers, all in the state dict:
        packed: uint8 ``(out_features, packed_width(bits, in_features))``, laid out as in `ops.packing`.
        scales, zeros: ``(out_features, in_features // group_size)`` in the dtype that the product is computed in.
        bias: ``(out_features,)``, a parameter, as it was in the linear that was quantised, or None.

    A kernel that needs another layout gets a second copy of the integers in buffers named ``kernel_*``, which are
    built anew whenever the module is moved, cast, copied, loaded or unpickled, and belong to no state dict.

    Attributes:
        bits, group_size, method: as `quantize_decoder` was asked for; the method is kept for the record.
        requested_backend: "auto" or the name that was asked for.
        backend: the name of the one that serves, or None where the one asked for cannot, since the module was moved.
    """

    def __init__(self, packed, scales, zeros, bias=None, *, in_features, bits, group_size, method, backend="auto"):
        super().__init__()
        self.in_features = in_features
        self.out_features = packed.shape[0]
        self.bits = bits
        self.group_size = group_size
        self.method = method
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.bias = bias
        self.set_backend(backend)

    @classmethod
    def from_integers(cls, values, scales, zeros, bias=None, *, bits, **options):
        """Pack `values`, uint8 ``(out_features, in_features)``; the other arguments are those of the class."""
        return cls(pack(values, bits), scales, zeros, bias, in_features=values.shape[1], bits=bits, **options)

    @classmethod
    def empty(cls, in_features, out_features, *, bits, group_size, method, bias, dtype=torch.float32, device="meta"):
        """A module of the right shapes and no values, to load a state dict into."""
        groups = in_features // group_size
        return cls(
            torch.empty(out_features, packed_width(bits, in_features), dtype=torch.uint8, device=device),
            torch.empty(out_features, groups, dtype=dtype, device=device),
            torch.empty(out_features, groups, dtype=dtype, device=device),
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None,
            in_features=in_features,
            bits=bits,
            group_size=group_size,
            method=method,
        )

    @property
    def weight(self):
        return PackedWeight(self)

    @property
    def prefers_compile(self):
        """Whether a step is slow unless compiled: uncompiled, the `torch` backend writes out the dense weight."""
        return self.backend == "torch"

    @property
    def spec(self):
        """`LinearSpec` of this module where it is now."""
        device, dtype = self.scales.device, self.scales.dtype
        return LinearSpec(self.in_features, self.out_features, self.bits, self.group_size, dtype, device)

    def integers(self):
        """uint8 ``(out_features, in_features)``."""
        return unpack(self.packed, self.bits, self.in_features)

    def dequantize(self):
        """The weight, ``(out_features, in_features)``, in the dtype of the scales."""
        values = self.integers().to(self.scales.dtype).view(*self.scales.shape, self.group_size)
        return ((values - self.zeros[..., None]) * self.scales[..., None]).view(self.out_features, self.in_features)

    def set_backend(self, backend):
        """Serve from another backend: "auto" or a name of `quantization_backends.BACKENDS`.

        Raises:
            ValueError: an unknown name, or one that cannot serve this module; it then stays as it was.
        """
        check_backend(backend, self.spec)
        self.requested_backend = backend
        self._prepare()

    def forward(self, x):
        if self.backend is None:
            raise ValueError(
                f"backend={self.requested_backend!r} cannot serve this module since it was moved or cast: "
                f"{self.refusal}; move it back or call set_backend"
            )
        out = BACKENDS[self.backend].product(self, x.to(self.scales.dtype))
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype)

    def extra_repr(self):
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, method={self.method}, bias={self.bias is not None}, "
            f"dtype={self.scales.dtype}, backend={self.backend}"
        )

    def _drop_layout(self):
        for name in [name for name in self._buffers if name.startswith("kernel_")]:
            delattr(self, name)
        self.__dict__.pop("kernel_arguments", None)

    def _prepare(self):
        """Choose the backend for where the module is now, and build its layout."""
        self._drop_layout()
        if self.scales.is_meta:
            self.backend, self.refusal = "torch", None
            return
        self.backend, self.refusal = select_backend(self.requested_backend, self.spec)
        if self.backend is not None:
            with torch.no_grad():
                for name, tensor in BACKENDS[self.backend].layout(self).items():
                    self.register_buffer(name, tensor, persistent=False)

    # A layout belongs to one device and dtype: everything that may change either, or replace the integers, drops it
    # and builds it again.

    def _apply(self, fn, recurse=True):
        self._drop_layout()
        super()._apply(fn, recurse)
        self._prepare()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._prepare()

    def __getstate__(self):
        state = self.__dict__.copy()
        state["_buffers"] = {k: v for k, v in self._buffers.items() if not k.startswith("kernel_")}
        state["_non_persistent_buffers_set"] = set()
        state.pop("kernel_arguments", None)
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        self._prepare()


def check_backend(backend, spec, name=None):
    """Raise ValueError unless `backend` is known and can serve `spec`; `name` is the module's, for the sentence."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, not {backend!r}")
    if not spec.device.type == "meta":
        reason = select_backend(backend, spec)[1]
        if reason is not None:
            where = f" {name}" if name else " this linear"
            raise ValueError(f"backend={backend!r} cannot serve{where}: {reason}")
