"""Stock and patched `generate` on the same arguments give the same result, to the token: every row of `rows.ROWS`."""

import pytest

import whisper_static_cache

from ..conftest import tiny_model
from .compare import assert_same
from .rows import ROWS, SHAPES, run


def run_stock(model, row):
    """Stock's result; where stock itself fails on this release there is nothing to compare with."""
    arguments = row.arguments if isinstance(row.arguments, dict) else {}
    known = {
        "cache_implementation": "early releases size the static cache by the encoder's heads",
        "output_attentions": "in 4.5x sdpa attention returns no attentions",
        "no_speech_threshold": "in 4.50 the no-speech detector passes forward an argument that it does not take",
    }
    reason = next((why for name, why in known.items() if name in arguments), None)
    try:
        return run(model, row)
    except (RuntimeError, TypeError) as error:
        if reason is None:
            raise
        pytest.skip(f"transformers' own path fails here ({reason}): {error}")


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(index, **shape) for index, (name, shape) in enumerate(SHAPES.items())}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ROWS)
def test_eager_gives_stocks_result(models, name, shape):
    row = ROWS[name]
    if row.multilingual_only and shape == "english":
        pytest.skip("an English-only model takes no language")
    model = models[shape]
    expected = run_stock(model, row)
    with whisper_static_cache.patched(engine="eager"):
        assert_same(expected, run(model, row))


@pytest.mark.parametrize("name", ROWS)
def test_compile_gives_stocks_result(models, name):
    row = ROWS[name]
    model = models["plain"]
    expected = run_stock(model, row)
    whisper_static_cache.patch(model, engine="compile")
    try:
        assert_same(expected, run(model, row))
    finally:
        whisper_static_cache.monkey_patch._MODELS.pop(model)
