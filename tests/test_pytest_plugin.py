"""`pytest -p whisper_static_cache.pytest_plugin` on a suite that knows nothing of this package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
SUITE = """
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

# Collection is late enough for what a test module binds at import.
generate = WhisperForConditionalGeneration.generate


def test_generate():
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=60, num_mel_bins=4, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_source_positions=10,
        max_target_positions=12, pad_token_id=50, bos_token_id=50, eos_token_id=50, decoder_start_token_id=51,
        suppress_tokens=None, begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config).eval()
    tokens = generate(model, torch.zeros(1, 4, 20), max_new_tokens=4)
    print("tokens", tokens.tolist())
    engine = None
    if hasattr(generate, "__wrapped__") and hasattr(WhisperForConditionalGeneration._sample, "__wrapped__"):
        import whisper_static_cache
        engine = whisper_static_cache.last_run(model).engine
    print("served by", engine)
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_theirs.py").write_text(SUITE)
    return folder


def run(suite, *arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *arguments]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command,
        cwd=suite,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": ""},
    )
    return done.returncode, done.stdout + done.stderr


def line(output, beginning):
    return next(text for text in output.splitlines() if beginning in text).split(beginning, 1)[1].strip()


def test_the_suite_runs_patched_with_the_same_tokens(suite):
    code, stock = run(suite)
    assert (code, line(stock, "served by")) == (0, "None")
    code, patched = run(suite, "-v", "-p", "whisper_static_cache.pytest_plugin", "--whisper-engine", "eager")
    assert (code, line(patched, "served by")) == (0, "eager"), patched
    assert line(patched, "tokens") == line(stock, "tokens")
    assert "patched, engine eager" in patched


def test_an_unknown_engine_stops_the_run(suite):
    code, output = run(suite, "-p", "whisper_static_cache.pytest_plugin", "--whisper-engine", "steam")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: `engine` is 'steam': use one of 'auto'" in output
    assert "Traceback" not in output


def test_a_release_that_does_not_fit_stops_the_run(suite):
    (suite / "renamed.py").write_text(
        "from transformers.generation import GenerationMixin\n"
        "GenerationMixin._sample_tokens = GenerationMixin._sample\n"
        "del GenerationMixin._sample\n"
    )
    code, output = run(suite, "-p", "renamed", "-p", "whisper_static_cache.pytest_plugin")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "WhisperForConditionalGeneration._sample is missing" in output
    assert "Traceback" not in output


def test_everything_is_unpatched_at_the_end(suite):
    (suite / "afterwards.py").write_text(
        "import pytest\n"
        "@pytest.hookimpl(trylast=True)\n"
        "def pytest_unconfigure(config):\n"
        "    import whisper_static_cache\n"
        "    from transformers import WhisperForConditionalGeneration as model\n"
        "    files = [getattr(model, name).__code__.co_filename for name in ('_sample', 'generate')]\n"
        "    clean = not any('monkey_patch' in file for file in files)\n"
        "    print('unpatched', clean and not whisper_static_cache.is_patched())\n"
    )
    code, output = run(suite, "-p", "whisper_static_cache.pytest_plugin", "-p", "afterwards")
    assert (code, line(output, "unpatched")) == (0, "True")
