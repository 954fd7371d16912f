"""What the Triton kernels share: whether they can run here, how they are launched, and small arithmetic.

Needs the triton package.

Programmatic dependent launch (compute capability 9.0 and later) lets a kernel start while the one before it still
runs. Every kernel here says at once that its successor may start, fetches what no earlier kernel of the step writes,
weights above all, and only then waits for its predecessor.
"""

import contextlib
import contextvars
import functools
import os
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def let_successor_start(OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait_for_predecessor(OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_wait()


@triton.jit
def fetch_line(pointer, line):
    """Have the lines of 128 bytes numbered `line` behind `pointer` fetched into the L2 cache; waits for nothing."""
    address = pointer.to(tl.int64) + line.to(tl.int64) * 128
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def digit(packed, INDEX: tl.constexpr, BASE: tl.constexpr):
    """Digit INDEX, an int32, of bytes held in int32."""
    if BASE == 256:
        return packed
    elif BASE == 3:
        # Quotients by 3, 9, 27, 81 by multiplication, exact below 256.
        low = packed
        if INDEX == 1:
            low = (packed * 21846) >> 16
        elif INDEX == 2:
            low = (packed * 7282) >> 16
        elif INDEX == 3:
            low = (packed * 2428) >> 16
        elif INDEX == 4:
            low = (packed * 810) >> 16
        if INDEX == 4:
            return low
        else:
            return low - 3 * ((low * 21846) >> 16)
    elif BASE == 16:
        return (packed >> (4 * INDEX)) & 15
    elif BASE == 4:
        return (packed >> (2 * INDEX)) & 3
    else:
        return (packed >> INDEX) & 1


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@functools.cache
def interpreted():
    """Whether the kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on the CPU."""
    return not isinstance(let_successor_start, triton.runtime.JITFunction)


@functools.cache
def overlaps(device):
    """Whether kernels on `device` are launched ahead of their predecessor's end."""
    return not interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def room(device):
    """Multiprocessors of `device`, and the bytes of shared memory that a program may have there."""
    if device.type != "cuda":
        return 132, 227 * 1024
    device = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(device)
    return properties["multiprocessor_count"], properties["max_shared_mem"]


def options(device, num_warps, *, overlap=True):
    """Launch options of a kernel: its warps, and the overlap with its predecessor and successor."""
    if interpreted():
        return {"OVERLAP": False}
    ahead = overlaps(device)
    launch = {"OVERLAP": ahead, "num_warps": num_warps}
    if ahead and overlap:
        launch["launch_pdl"] = True
    return launch


# Of this thread, as another one may be launching kernels meanwhile.
_compiling = contextvars.ContextVar("compiling", default=False)


def compiling():
    """Whether this thread is inside `compiled_together`: kernels are to be compiled, not run."""
    return _compiling.get()


def start(kernel, grid, *args, **meta):
    """Launch `kernel` over `grid`; inside `compiled_together`, have it compiled only."""
    if _compiling.get():
        kernel.warmup(*args, grid=grid, **meta)
    else:
        kernel[grid](*args, **meta)


@contextlib.contextmanager
def compiled_together():
    """Kernels that are started inside are compiled side by side, a thread for each CPU core, and not run.

    The compiler runs outside of Python's lock for most of the time. What is launched afterwards finds its kernel; a
    release of Triton that cannot compile so, or a kernel that does not compile, is left to the launch.
    """
    if interpreted() or _compiling.get() or not hasattr(triton, "AsyncCompileMode"):
        yield
        return
    with ThreadPoolExecutor(os.cpu_count()) as threads, triton.AsyncCompileMode(threads, ignore_errors=True):
        token = _compiling.set(True)
        try:
            yield
        finally:
            _compiling.reset(token)
