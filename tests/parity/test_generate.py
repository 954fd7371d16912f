"""Stock and patched `generate` on the same arguments give the same result, to the token: every row of `rows.ROWS`."""

import random

import pytest

import whisper_static_cache

from ..conftest import tiny_model
from .compare import assert_same
from .rows import ROWS, SHAPES, Row, run


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


def several(seed):
    """Shapes and rows with the arguments of two or three rows together, in random batches and lengths."""
    chance = random.Random(seed)
    for _ in range(12):
        shape, batch = chance.choice(list(SHAPES)), chance.choice((1, 1, 2, 2, 3))
        names = [name for name in ROWS if shape != "english" or not ROWS[name].multilingual_only]
        # What has a batch of its own stays by itself.
        names = [name for name in names if name not in ("encoder-outputs", "language-list")]
        names = chance.sample(names, chance.choice((2, 2, 3)))
        rows = [ROWS[name] for name in names]
        windows = max(row.windows for row in rows)

        def arguments(model, rows=rows):
            found = {}
            for row in rows:
                found.update(row.arguments(model) if callable(row.arguments) else row.arguments)
            return found

        masked = any(row.attention_mask for row in rows) or (windows > 1 and batch > 1)
        yield names, shape, Row(arguments, batch, windows, masked)


@pytest.mark.parametrize("seed", range(8))
def test_rows_together_give_stocks_result(models, seed):
    """Or stock's error, but for what early releases fail at: a static cache of its size, no-speech in 4.50."""
    mistakes = {
        "cache_implementation": "index_copy_",
        "no_speech_threshold": "forward() got an unexpected keyword argument 'input_ids'",
    }

    def attempt(model, row):
        try:
            return run(model, row, seed)
        except Exception as error:
            return {"result": f"{type(error).__name__}: {error}"}

    for names, shape, row in several(seed):
        expected = attempt(models[shape], row)
        arguments, result = row.arguments(models[shape]), expected["result"]
        if any(name in arguments and isinstance(result, str) and text in result for name, text in mistakes.items()):
            continue
        with whisper_static_cache.patched(engine="eager"):
            assert_same(expected, attempt(models[shape], row), f"{names} of {shape}, batch {row.batch}")


@pytest.mark.parametrize("name", [name for name in ROWS if "static" in name])
def test_a_static_cache_that_stock_never_ran(name):
    """transformers makes one for the call, and asks it for its size in the next window."""
    model = tiny_model()
    with whisper_static_cache.patched(engine="eager"):
        result = run(model, ROWS[name])
    assert_same(run_stock(model, ROWS[name]), result)


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
