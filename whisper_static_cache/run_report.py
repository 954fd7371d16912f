"""What became of a `generate` call: the report that `last_run` returns, and the clock behind it."""

import dataclasses
import time
import weakref

import torch


@dataclasses.dataclass(frozen=True)
class RunReport:
    """What the last `generate` call of a model did; `last_run` returns it.

    Attributes:
        engine: "eager", "compile", ..., or "stock" if transformers' own loop served the call (or a part of it).
        reason: why stock served, or why another engine than the one asked for did; None if neither.
        batch_size: rows of the largest decode.
        windows: decodes run: one for short audio, one a window and temperature for long.
        compiles: times torch.compile compiled during the call; 0 once warm.
        captures: CUDA graphs captured during the call; 0 once warm.
        prefill_seconds: time from the encoder's output to the logits of the first token, summed over windows.
        decode_seconds: time from there to the last token.
        steps: decode steps, summed over windows.
        tokens: steps times rows, summed over windows.
        cross_dtype: `torch.int8` if cross-attention's keys and values were held in 8 bits, else None.
        tokens_per_second: `tokens / decode_seconds`, all rows together; 0.0 if nothing was decoded.
    """

    engine: str
    reason: str | None = None
    batch_size: int = 0
    windows: int = 0
    compiles: int = 0
    captures: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    cross_dtype: torch.dtype | None = None

    @property
    def tokens_per_second(self):
        return self.tokens / self.decode_seconds if self.decode_seconds else 0.0


class Call:
    """One call of `generate`: what the user asked of it, and what became of it."""

    def __init__(
        self, model, engine="auto", *, stock_reason=None, keeps_results=True, is_shortform=True, cross_dtype=None
    ):
        self.model = weakref.ref(model)
        self.engine = engine
        self.stock_reason = stock_reason
        # Whether the user will see the result objects of the inner calls, or only their tokens.
        self.keeps_results = keeps_results
        self.is_shortform = is_shortform
        # What cross-attention's keys and values are to be held in, where the caller brings no cache of their own.
        self.cross_dtype = cross_dtype
        self.windows = []

    def served_by_stock(self, reason):
        """Note that transformers' own loop serves (a part of) the call."""
        self.windows.append(Window(engine="stock", reason=reason))

    def report(self):
        """The `RunReport` of the windows so far; waits for the device where its clock is needed."""
        windows = self.windows or [Window(engine="stock", reason=self.stock_reason)]
        stock = [window for window in windows if window.engine == "stock"]
        return RunReport(
            engine="stock" if stock else windows[-1].engine,
            reason=next((window.reason for window in [*stock, *windows] if window.reason), None),
            batch_size=max(window.batch_size for window in windows),
            windows=len(windows),
            compiles=sum(window.compiles for window in windows),
            captures=sum(window.captures for window in windows),
            prefill_seconds=sum(window.clock.seconds(0) for window in windows if window.clock),
            decode_seconds=sum(window.clock.seconds(1) for window in windows if window.clock),
            steps=sum(window.steps for window in windows),
            tokens=sum(window.steps * window.batch_size for window in windows),
            cross_dtype=windows[-1].cross_dtype,
        )


@dataclasses.dataclass
class Window:
    """One decode: its share of a `RunReport`."""

    engine: str
    reason: str | None = None
    batch_size: int = 0
    compiles: int = 0
    captures: int = 0
    steps: int = 0
    cross_dtype: torch.dtype | None = None
    clock: "Clock | None" = None


class Clock:
    """Marks on the device's own timeline, read only when somebody asks."""

    def __init__(self, device):
        self._on_gpu = device.type == "cuda"
        self._marks = []

    def mark(self):
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self, index):
        """Seconds between mark `index` and the next, 0.0 if the run did not get that far."""
        if index + 1 >= len(self._marks):
            return 0.0
        start, end = self._marks[index : index + 2]
        if not self._on_gpu:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000
