"""Every name and signature of transformers that the package counts on, on the installed release.

A failure says what changed and which file to look at. The rows are `whisper_static_cache.compat_symbols.SYMBOLS`.
"""

import ast
import importlib
from pathlib import Path

import pytest
import transformers

import whisper_static_cache
from whisper_static_cache import compat, logits_process
from whisper_static_cache.compat_symbols import (
    PATCHED,
    RANGE,
    RELEASES,
    SYMBOLS,
    _number,
    difference,
    in_range,
    live,
)


PACKAGE = Path(whisper_static_cache.__file__).parent
HERE = [symbol for symbol in SYMBOLS if symbol.applies_to(transformers.__version__)]
NAMES = [f"{symbol.module}.{symbol.name}" for symbol in HERE]


@pytest.fixture(scope="module")
def sources():
    return compat.Sources(Path(transformers.__file__).parent)


def explain(symbol, what):
    effect = symbol.otherwise or "patch() refuses this release"
    return (
        f"{symbol.full_name} {what} in transformers {transformers.__version__}. Look at "
        f"whisper_static_cache/{symbol.file}, and at its row in compat_symbols.py; until then {effect}."
    )


@pytest.mark.parametrize("symbol", HERE, ids=NAMES)
def test_the_imported_release_has_it(symbol):
    what = difference(symbol, live(symbol))
    assert what is None, explain(symbol, what)


@pytest.mark.parametrize("symbol", HERE, ids=NAMES)
def test_the_sources_say_the_same(symbol, sources):
    found = sources.find(symbol)
    what = difference(symbol, found)
    assert what is None, explain(symbol, what)
    assert found.parameters == live(symbol).parameters, "whisper_static_cache/compat.py reads the signature wrongly"


@pytest.mark.parametrize("symbol", [s for s in SYMBOLS if s not in HERE] or [None], ids=lambda s: s and s.name)
def test_what_is_said_to_be_absent_is_absent(symbol, sources):
    if symbol is None:
        return
    assert sources.find(symbol) is None, (
        f"{symbol.full_name} is in transformers {transformers.__version__}: "
        "mend since and until of its row in compat_symbols.py."
    )


def test_every_row_names_a_file_of_the_package():
    assert [s.full_name for s in SYMBOLS if not (PACKAGE / s.file).is_file()] == []
    assert len({(s.module, s.name) for s in SYMBOLS}) == len(SYMBOLS)


def test_the_rows_that_are_replaced_are_the_ones_pinned():
    from transformers import WhisperForConditionalGeneration

    before = {
        s.name.rpartition(".")[2]: getattr(WhisperForConditionalGeneration, s.name.split(".")[1]) for s in PATCHED
    }
    with whisper_static_cache.patched():
        for name, stock in before.items():
            assert getattr(WhisperForConditionalGeneration, name).__wrapped__ is stock


def imported_names():
    """`(file, module, name)` of everything that the package imports from transformers."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "transformers":
                yield from ((path.name, node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize(("file", "module", "name"), sorted(set(imported_names())))
def test_every_import_from_transformers_is_pinned(file, module, name):
    target = getattr(importlib.import_module(module), name)
    if type(target).__name__ == "module":
        return
    first_names = {s.name.split(".")[0] for s in SYMBOLS}
    assert name in first_names, f"{file} imports {module}.{name}: add a row to SYMBOLS in compat_symbols.py."


def test_every_reproduced_processor_is_pinned():
    pinned = {s.name.split(".")[0] for s in SYMBOLS if s.module == "generation.logits_process"}
    assert pinned - {"LogitsProcessorList"} == set(logits_process._PROCESSORS)


@pytest.mark.parametrize("name", sorted(logits_process._PROCESSORS))
def test_a_processor_keeps_no_state_that_its_reproduction_does_not_know(name, sources):
    symbol = next(s for s in SYMBOLS if s.name == f"{name}.__call__")
    if not symbol.applies_to(transformers.__version__):
        pytest.skip(f"{name} came with transformers {symbol.since}")
    kept = sources.instance_attributes(symbol.module, name)
    unknown = sorted(kept - logits_process._PROCESSORS[name].attributes)
    assert not unknown, (
        f"transformers.{symbol.module}.{name} now keeps {', '.join(unknown)}: calls with it step with the host until "
        "whisper_static_cache/logits_processors.py knows what that means."
    )


def test_the_matrix_is_in_order_and_in_the_range_that_setup_allows():
    numbers = [_number(release) for release in RELEASES]
    assert numbers == sorted(numbers)
    assert all(in_range(release) for release in RELEASES)
    first, beyond = RANGE
    assert f'"transformers>={first},<{beyond}"' in (PACKAGE.parent / "setup.py").read_text()
