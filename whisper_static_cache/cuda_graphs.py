"""Capture of a function's GPU work, and its replay. Knows nothing of Whisper."""

import ctypes
import threading
import time

import torch


# One capture at a time in the process: a capture forbids work that other threads' captures would do.
_CAPTURE_LOCK = threading.Lock()
# Looks at a counter between two questions to the driver.
_LOOKS = 32


class CapturedCall:
    """The GPU work of `function()`, recorded once and replayed at will.

    `function` takes nothing, reads and writes tensors whose addresses stay, waits for the device nowhere, and gives
    the same result when it is run again: it runs `warmups` times before the capture, so that lazy initialisation
    (library handles, compilation, autotuning) is over.

    Args:
        function: callable without arguments, returning a tensor.
        pool: memory pool handle shared with captures that never run at the same time as this one, or None.
        warmups: runs before the capture.

    Attributes:
        output: the tensor that every replay writes; the next replay overwrites it.
    """

    def __init__(self, function, pool=None, warmups=2):
        self._graph = torch.cuda.CUDAGraph()
        with _CAPTURE_LOCK:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(warmups):
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            # "thread_local": other threads may go on allocating and launching while this one captures.
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self.output = function()

    def __call__(self):
        """Replay on the current stream and return `output`."""
        self._graph.replay()
        return self.output


class FinishedWatch:
    """Tells the host at which step a flag on the device rose, without ever emptying the device's queue.

    After each step the flag is copied asynchronously into pinned memory; the host reads the copy of `lag` steps ago,
    which has long arrived unless the host is that far ahead of the device, and then it waits for that one, not for the
    newest. On the CPU there is nothing to wait for and the newest flag is read.

    Args:
        device: where the flags live.
        max_steps: the most steps of a run.
        lag: steps that the host may be ahead.
    """

    def __init__(self, device, max_steps, lag=2):
        self._on_gpu = device.type == "cuda"
        self._lag = lag if self._on_gpu else 0
        self._flags = torch.zeros(max_steps, dtype=torch.bool, pin_memory=self._on_gpu)
        self._events = [torch.cuda.Event() for _ in range(max_steps)] if self._on_gpu else None
        self.restart()

    def restart(self):
        """Forget the last run."""
        self._step = 0
        self._read = 0

    def record(self, flag):
        """Note the 0-dim bool tensor `flag` as that of the step just queued."""
        if self._on_gpu:
            self._flags[self._step].copy_(flag, non_blocking=True)
            self._events[self._step].record()
        else:
            self._flags[self._step] = flag
        self._step += 1

    def risen_at(self, *, drain=False):
        """The first step whose flag is known to have risen, counted from 0, or None; `drain` waits for all of them."""
        known = self._step if drain else self._step - self._lag
        while self._read < known:
            if self._on_gpu:
                self._events[self._read].synchronize()
            if self._flags[self._read]:
                return self._read
            self._read += 1
        return None


class StepCounter:
    """A number that the device writes and the host reads, by which the host keeps a few steps ahead of the device.

    It is the number of steps done, negative once the run is over. Reading it asks neither PyTorch nor the driver, and
    tells of every step, also of one in the middle of a graph of several.

    Args:
        device: where the steps run.

    Attributes:
        tensor: int64 `(1,)`, in pinned memory for a GPU, which the device is to write.
    """

    def __init__(self, device):
        self._device = device
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self.tensor = torch.zeros(1, dtype=torch.int64, pin_memory=self._event is not None)
        self._number = ctypes.c_int64.from_address(self.tensor.data_ptr())
        self._stream = None
        self._running = False

    def restart(self):
        """Begin a run on the current stream."""
        if self._event is not None:
            if self._running:
                # The last run was interrupted. What it left in the queue must not count in this one.
                torch.cuda.synchronize(self._device)
            self._stream = torch.cuda.current_stream(self._device)
        self._number.value = 0
        self._running = True

    def wait(self, queued, ahead):
        """Wait until no more than `ahead` of the `queued` steps are still to be done; True once the run is over."""
        number, enough = self._number, queued - ahead
        if self._event is not None:
            self._event.record(self._stream)
            # At the latest when all that is queued is done the number is what the last step wrote.
            while 0 <= number.value < enough and not self._event.query():
                for _ in range(_LOOKS):
                    if not 0 <= number.value < enough:
                        break
                    time.sleep(0)  # lets other threads run
        return number.value < 0

    def close(self):
        """End the run: the caller has waited for all of it."""
        self._running = False
