"""Run the parity table in a process of its own, on whichever transformers is first on the path, without this package.

    PYTHONPATH=tree/src python -m tests.parity.run_rows RESULTS static

writes two dictionaries: row name -> result, or -> the error's text; row name -> engine. With `static`, every row that
can asks for `cache_implementation="static"`.
"""

import importlib.util
import sys
import warnings

import torch
from transformers.cache_utils import EncoderDecoderCache

from ..conftest import tiny_model
from .compare import _layers
from .rows import ROWS, run


# No static cache can be asked for in these: no cache at all, and attentions over what a growing cache holds.
DYNAMIC_ONLY = ("no-cache", "attentions")


def plain(value):
    """`value` with result objects and caches as dictionaries and tuples, to be read by another transformers."""
    if isinstance(value, EncoderDecoderCache):
        value = {"self": _layers(value.self_attention_cache), "cross": _layers(value.cross_attention_cache)}
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(plain(entry) for entry in value)
    return value


def results(static=False):
    """The table's results on one tiny model, and the engine that served each row where transformers can say."""
    model = tiny_model()
    found, engines = {}, {}
    reports = importlib.util.find_spec("transformers.models.whisper.static_generation_whisper")
    last_run = reports and importlib.import_module(reports.name).last_run
    for name, row in ROWS.items():
        overrides = {"cache_implementation": "static"} if static and name not in DYNAMIC_ONLY else {}
        try:
            found[name] = plain(run(model, row, overrides=overrides))
        except Exception as error:  # whatever it is, it is the row's result
            found[name] = f"{type(error).__name__}: {error}"
        if last_run:
            report = last_run(model)
            engines[name] = report.engine if report.reason is None else f"{report.engine}: {report.reason}"
    return found, engines


if __name__ == "__main__":
    assert "whisper_static_cache" not in sys.modules
    sys.modules["whisper_static_cache"] = None  # from here on importing it raises ImportError
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.save(results(static="static" in sys.argv[2:]), sys.argv[1])
