"""benchmarks/token_parity.py: how windows are read and compared."""

import sys
from pathlib import Path

import pytest
import torch

from .conftest import tiny_features, tiny_model


pytest.importorskip("jiwer", reason="needs the jiwer package, which the benchmark scores with")
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import token_parity
from token_parity import Window


EOS = 50


def segments(*windows):
    """Segments as `generate` returns them, two for every window: `(prompt, tokens)` each."""
    found = []
    for prompt, tokens in windows:
        result = torch.tensor(prompt + tokens)
        found += [{"result": result, "idxs": (len(prompt), 0)}, {"result": result, "idxs": (len(prompt) + 1, 0)}]
    return found


def test_a_window_is_taken_once_up_to_its_end():
    found = token_parity.windows_of(segments(([1, 2], [3, 4, EOS, 9, 9]), ([1], [5, 6])), EOS)
    assert found == [Window([1, 2], [3, 4, EOS]), Window([1], [5, 6])]


@pytest.fixture
def compared(monkeypatch):
    monkeypatch.setattr(token_parity, "margin_of", lambda *arguments: arguments)
    return lambda stock, ours: token_parity.compare("reference", ["a", "b"], stock, ours)


def test_equal_windows_have_no_difference(compared):
    windows = [Window([1], [2, 3]), Window([1, 9], [4])]
    assert compared(windows, windows) == (3, None)


def test_the_first_difference_is_found_with_what_precedes_it(compared):
    stock, ours = [Window([1], [2, 3, 4, 5])], [Window([1], [2, 3, 7, 5])]
    same, difference = compared(stock, ours)
    assert (same, difference.place, difference.stock, difference.ours) == (2, 2, 4, 7)
    assert difference.margin == ("reference", "a", [1], [2, 3], 4, 7)


@pytest.mark.parametrize(
    ("stock", "ours", "said"),
    [
        ([Window([1], [2])], [Window([8], [2])], "windows differ before their tokens do"),
        ([Window([1], [2])], [Window([1], [2]), Window([1], [3])], "windows differ before their tokens do"),
        ([Window([1], [2])], [Window([1], [2, 3])], "goes on after the other's end"),
    ],
)
def test_what_no_token_explains_is_an_error(compared, stock, ours, said):
    with pytest.raises(RuntimeError, match=said):
        compared(stock, ours)


def test_the_margin_is_the_reference_models_own():
    model = tiny_model()
    feature = tiny_features(1, config=model.config)[0]
    logits = model(feature[None], decoder_input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1]
    begin = model.generation_config.no_timestamps_token_id + 1
    assert begin > 9
    margin = token_parity.margin_of(model, feature, [5, 6], [7], 8, 9)
    assert margin == pytest.approx((logits[8] - logits[9]).item(), abs=1e-5)
    assert token_parity.rounding_of(model, model, [feature], [Window([5, 6], [7, 8])]) == 0.0


def test_a_head_is_quantised_with_its_decoder(capsys):
    assert token_parity.parse(["--bits", "16", "4", "--head-bits", "0", "4"]).head_bits == [0, 4]
    with pytest.raises(SystemExit):
        token_parity.parse(["--head-bits", "4"])
    assert "give --bits below 16 as well" in capsys.readouterr().err
