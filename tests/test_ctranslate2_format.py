"""Reading `model.bin`: the inverse of writing it, for any dtype, and a sentence for what is not a Whisper model."""

import json

import pytest
import torch

from tests.ctranslate2_folder import TEXT, VOCAB_SIZE, small_model, variables, write_folder, write_model_bin
from whisper_static_cache.ctranslate2_format import CheckpointError, ModelBin, load_ctranslate2


POSITIONS = "encoder/position_encodings/encodings"


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def folder(tmp_path, model):
    return write_folder(tmp_path / "model", model)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asked", [torch.float32, torch.float16])
def test_weights_come_back_as_they_were(tmp_path, model, stored, asked):
    loaded, _ = load_ctranslate2(write_folder(tmp_path, model, stored), asked)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], expected.to(stored).to(asked), rtol=0, atol=0)
    assert not loaded.training
    assert loaded.proj_out.weight is loaded.model.decoder.embed_tokens.weight


def test_configuration_has_every_size_of_the_model(folder, model):
    loaded, processor = load_ctranslate2(folder)
    for name in (
        "vocab_size",
        "num_mel_bins",
        "d_model",
        "encoder_layers",
        "decoder_layers",
        "encoder_attention_heads",
        "decoder_attention_heads",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "max_source_positions",
        "max_target_positions",
        "eos_token_id",
        "decoder_start_token_id",
    ):
        assert getattr(loaded.config, name) == getattr(model.config, name), name
    assert processor.feature_extractor.feature_size == model.config.num_mel_bins


def test_the_file_may_go_away_after_loading(folder, model):
    loaded, _ = load_ctranslate2(folder)
    (folder / "model.bin").write_bytes(b"")
    name = "model.encoder.conv1.weight"
    assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])


def test_encoder_positions_that_are_not_stored_are_sinusoids(folder, model):
    stored = variables(model)
    expected = stored.pop(POSITIONS)  # transformers fills them with its own sinusoids
    write_model_bin(folder / "model.bin", stored)
    loaded, _ = load_ctranslate2(folder)
    torch.testing.assert_close(loaded.model.encoder.embed_positions.weight.data, expected, rtol=0, atol=1e-4)


def test_tokenizer_round_trip(folder):
    tokenizer = load_ctranslate2(folder)[1].tokenizer
    ids = tokenizer("the cat", add_special_tokens=False).input_ids
    assert ids[0] == TEXT.index("the")
    start = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    zero = tokenizer.convert_tokens_to_ids("<|notimestamps|>") + 1
    tokens = [start, zero, *ids, zero + 75, tokenizer.eos_token_id]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "the cat"
    assert "<|0.00|>the cat<|1.50|>" in tokenizer.decode(tokens, decode_with_timestamps=True)
    assert tokenizer.convert_tokens_to_ids("<|30.00|>") == VOCAB_SIZE - 1
    assert tokenizer.get_prompt_ids("the")[0] == tokenizer.convert_tokens_to_ids("<|startofprev|>")


def test_generates_with_timestamps_in_every_language_given(folder):
    loaded, processor = load_ctranslate2(folder)
    assert loaded.generation_config.lang_to_id == {
        f"<|{language}|>": len(TEXT) + 2 + index for index, language in enumerate(("en", "de", "fr"))
    }
    features = processor([0.0] * 16000, sampling_rate=16000, return_tensors="pt").input_features
    ids = loaded.generate(features, language="de", return_timestamps=True, max_new_tokens=8)
    assert ids.shape[0] == 1
    assert processor.batch_decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kept", [0, 3, 4, 15, 60, 400, 5000, -40])
def test_truncated_file(folder, kept):
    path = folder / "model.bin"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="truncated"):
        ModelBin(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [({"version": 7}, "format version 7; only version 6"), ({"spec": "TransformerSpec"}, "holds a TransformerSpec")],
)
def test_other_formats(folder, model, header, message):
    write_model_bin(folder / "model.bin", variables(model), **header)
    with pytest.raises(CheckpointError, match=message):
        load_ctranslate2(folder)


def test_bytes_that_are_no_model(folder):
    (folder / "model.bin").write_bytes(b"\x06\x00\x00\x00" + bytes(range(256)) * 4)
    with pytest.raises(CheckpointError, match=r"model\.bin"):
        load_ctranslate2(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: x.pop("decoder/layer_1/attention/linear_2/weight"),
            "no variable decoder/layer_1/attention/linear_2",
        ),
        (lambda x: x.update({"encoder/conv1/weight": torch.zeros(3)}), "should have rank 3"),
        (lambda x: x.pop("decoder/num_heads"), "no variable decoder/num_heads"),
        (lambda x: x.update({"decoder/layer_0/ffn/linear_1/bias": torch.zeros(3)}), r"fc2\.bias has shape \(3,\)"),
        (lambda x: x.update({"decoder/num_heads": torch.tensor(3, dtype=torch.int16)}), "3 heads for a width of 16"),
        (lambda x: x.update({"decoder/projection/bias": torch.zeros(4)}), "no Whisper model has.*projection/bias"),
        (
            lambda x: x.update({"encoder/layer_0/ffn/linear_0/weight_scale": torch.zeros(24)}),
            "quantized weights",
        ),
    ],
)
def test_weights_that_do_not_fit_together(folder, model, change, message):
    stored = variables(model)
    change(stored)
    write_model_bin(folder / "model.bin", stored)
    with pytest.raises(CheckpointError, match=message):
        load_ctranslate2(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, r"config\.json is missing"),
        ("tokenizer.json", None, r"tokenizer\.json is missing"),
        ("tokenizer.json", "{", "is not JSON"),
        ("config.json", "[]", "not a JSON object"),
        ("tokenizer.json", "{}", "not a tokenizers file"),
        (
            "tokenizer.json",
            json.dumps({"added_tokens": [], "model": {"vocab": {}, "merges": []}}),
            "not a Whisper tok",
        ),
    ],
)
def test_files_beside_the_weights(folder, file, content, message):
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_ctranslate2(folder)
