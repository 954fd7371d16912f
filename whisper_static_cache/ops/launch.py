"""What the Triton kernels share: whether they can run here, and how they are launched. Needs the triton package.

Programmatic dependent launch (compute capability 9.0 and later) lets a kernel start while the one before it still
runs. Every kernel here says at once that its successor may start, fetches what no earlier kernel of the step writes,
weights above all, and only then waits for its predecessor.
"""

import contextlib
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


@functools.cache
def interpreted():
    """Whether the kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on the CPU."""
    return not isinstance(let_successor_start, triton.runtime.JITFunction)


@functools.cache
def overlaps(device):
    """Whether kernels on `device` are launched ahead of their predecessor's end."""
    return not interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)


def options(device, num_warps, *, overlap=True):
    """Launch options of a kernel: its warps, and the overlap with its predecessor and successor."""
    if interpreted():
        return {"OVERLAP": False}
    ahead = overlaps(device)
    launch = {"OVERLAP": ahead, "num_warps": num_warps}
    if ahead and overlap:
        launch["launch_pdl"] = True
    return launch


_compiling = False


def start(kernel, grid, *args, **meta):
    """Launch `kernel` over `grid`; inside `compiled_together`, have it compiled only."""
    if _compiling:
        kernel.warmup(*args, grid=grid, **meta)
    else:
        kernel[grid](*args, **meta)


@contextlib.contextmanager
def compiled_together():
    """Kernels that are started inside are compiled side by side, a thread for each CPU core, and not run.

    The compiler runs outside of Python's lock for most of the time. What is launched afterwards finds its kernel; a
    release of Triton that cannot compile so, or a kernel that does not compile, is left to the launch.
    """
    global _compiling
    if interpreted() or _compiling or not hasattr(triton, "AsyncCompileMode"):
        yield
        return
    with ThreadPoolExecutor(os.cpu_count()) as threads, triton.AsyncCompileMode(threads, ignore_errors=True):
        _compiling = True
        try:
            yield
        finally:
            _compiling = False
