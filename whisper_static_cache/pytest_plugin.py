"""Run any test suite on the patched Whisper classes: `pytest -p whisper_static_cache.pytest_plugin`.

Every `WhisperForConditionalGeneration` is patched before the first test is collected and unpatched at the end. Nothing
that passes on stock transformers may fail here.
"""

import pytest

from . import __version__


def pytest_addoption(parser):
    group = parser.getgroup("whisper_static_cache")
    group.addoption(
        "--whisper-engine",
        default="auto",
        metavar="ENGINE",
        help='the engine that transformers\' Whisper is patched with: "auto" (default), "eager", "compile", ...',
    )


def pytest_configure(config):
    from .monkey_patch import patch

    try:
        patch(engine=config.getoption("--whisper-engine"))
    except (ValueError, RuntimeError) as error:
        raise pytest.UsageError(str(error)) from error


def pytest_report_header(config):
    from . import _compat

    engine = config.getoption("--whisper-engine")
    return f"whisper_static_cache {__version__}: Whisper of transformers {_compat.version()} patched, engine {engine}"


def pytest_unconfigure(config):
    from .monkey_patch import unpatch

    unpatch()
