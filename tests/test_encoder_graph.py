"""The encoder's stand-in: what it replays, what it leaves to the encoder, and that the states are the same."""

import pytest
import torch

import whisper_static_cache
from whisper_static_cache import encoder_graph, generation_whisper
from whisper_static_cache.sessions import state_of

from .conftest import tiny_features, tiny_model


class Refusing(encoder_graph.CapturedEncoder):
    calls = 0

    def _replay(self, features):
        self.calls += 1
        raise RuntimeError("no graph here")


def test_batches_share_few_graphs():
    assert [encoder_graph.rows_for(size) for size in (1, 2, 3, 4, 5, 16)] == [1, 2, 4, 4, 8, 16]


def test_a_capture_that_fails_is_tried_once_and_the_encoder_serves(monkeypatch, caplog):
    model = tiny_model()
    features = tiny_features(2, config=model.config)
    encoder = Refusing(model.model.encoder)
    monkeypatch.setattr(encoder_graph, "why_not", lambda *_: None)
    with torch.no_grad():
        expected = model.model.encoder(features).last_hidden_state
        for _ in range(2):
            assert torch.equal(encoder(input_features=features, return_dict=True).last_hidden_state, expected)
    assert encoder.calls == 1
    assert caplog.text.count("could not be captured") == 1


def test_states_row_by_row_are_the_encoder_s():
    model = tiny_model()
    encoder, features = model.model.encoder, tiny_features(2, config=model.config)
    seen = []
    with torch.no_grad():
        expected = encoder(features).last_hidden_state
        handle = encoder.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
        assert torch.equal(encoder_graph.row_by_row(encoder, features), expected)
        encoder(features)
        # What the second look finds is why the first layer's states are put in order at all.
        assert seen == [True, False]
        handle.remove()
        with pytest.raises(ValueError):
            encoder_graph.row_by_row(encoder, features[..., :-2])
    assert not encoder.layers[0]._forward_pre_hooks


def test_the_cpu_is_left_to_the_encoder():
    model = tiny_model()
    with whisper_static_cache.patched(model, engine="auto"):
        assert model.get_encoder() is model.model.encoder
        model.generate(tiny_features(1, config=model.config), max_new_tokens=2)
        assert state_of(model).encoder is None
    reason = encoder_graph.why_not(model.model.encoder, tiny_features(1, config=model.config), {})
    assert "GPU" in reason


def test_what_generate_passes_is_served(monkeypatch):
    """The arguments that transformers calls the encoder with are none that keep it from its graph."""
    model, seen = tiny_model(), []

    class Watched(encoder_graph.CapturedEncoder):
        def __call__(self, *args, **kwargs):
            arguments = encoder_graph.named_arguments(self.encoder, args, kwargs)
            features = arguments.pop("input_features")
            monkeypatch.setattr(encoder_graph, "_on_one_gpu", lambda *_: True)
            seen.append(encoder_graph.why_not(self.encoder, features, arguments))
            return self.encoder(*args, **kwargs)

    monkeypatch.setattr(generation_whisper, "encoder_for_call", lambda _, encoder: Watched(encoder))
    with whisper_static_cache.patched(model):
        model.generate(tiny_features(2, config=model.config), max_new_tokens=2)
    assert seen == [None]


class Scaled(torch.nn.Linear):
    """An adapter: what it computes depends on a number that is no parameter."""

    scale = 1.0

    def forward(self, states):
        return self.scale * super().forward(states)


def test_what_a_graph_could_not_follow_is_left_to_the_encoder(monkeypatch):
    monkeypatch.setattr(encoder_graph, "_on_one_gpu", lambda *_: True)
    model = tiny_model()
    encoder, features = model.model.encoder, tiny_features(1, config=model.config)
    with torch.no_grad():
        assert encoder_graph.why_not(encoder, features, {}) is None
        assert "another shape" in encoder_graph.why_not(encoder, features[..., :-2], {})
        assert "output_attentions" in encoder_graph.why_not(encoder, features, {"output_attentions": True})
        assert "one batch" in encoder_graph.why_not(encoder, None, {})
        encoder.layers[0].train()
        assert "training" in encoder_graph.why_not(encoder, features, {})
        encoder.eval()
        encoder.layers[0].fc1 = Scaled(encoder.layers[0].fc1.in_features, encoder.layers[0].fc1.out_features).eval()
        assert encoder_graph.why_not(encoder, features, {}) == "Scaled may not compute the same every time"
    assert "gradients" in encoder_graph.why_not(encoder, features, {})


def test_modules_are_looked_at_once_and_changes_are_seen(monkeypatch):
    monkeypatch.setattr(encoder_graph, "_on_one_gpu", lambda *_: True)
    looked = []
    look = encoder_graph._why_not_modules
    monkeypatch.setattr(encoder_graph, "_why_not_modules", lambda encoder: looked.append(1) or look(encoder))
    monkeypatch.setattr(encoder_graph.CapturedEncoder, "_replay", lambda self, features: features)
    model = tiny_model()
    encoder, features = model.model.encoder, tiny_features(1, config=model.config)
    stand_in = encoder_graph.CapturedEncoder(encoder)

    def is_replayed():
        return stand_in(features).last_hidden_state is features

    with torch.no_grad():
        assert is_replayed() and is_replayed() and len(looked) == 1
        handle = encoder.layers[1].fc1.register_forward_hook(lambda *_: None)
        assert not is_replayed() and not is_replayed() and len(looked) == 2
        handle.remove()
        assert is_replayed()
        encoder.layers[0].train()
        assert not is_replayed()
        encoder.layers[0].eval()
        assert is_replayed()
        stand_in._graphs["one"] = None
        encoder.layers[0].fc2.weight.data = encoder.layers[0].fc2.weight.data.clone()
        assert is_replayed() and not stand_in._graphs
        encoder.forward = encoder.forward
        assert not is_replayed()


def test_settings_that_choose_kernels_choose_the_graph(monkeypatch):
    before = encoder_graph._arithmetic()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32)
    assert encoder_graph._arithmetic() != before
    monkeypatch.undo()
    assert encoder_graph._arithmetic() == before


@pytest.mark.gpu
def test_generate_replays_it():
    model = tiny_model().cuda()
    with whisper_static_cache.patched(model, engine="auto"):
        for _ in range(2):
            model.generate(tiny_features(2, config=model.config).cuda(), max_new_tokens=2)
        assert state_of(model).encoder.captures == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_replays_what_the_encoder_gives(dtype):
    model = tiny_model().cuda().to(dtype)
    encoder = encoder_graph.CapturedEncoder(model.model.encoder)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    kept = []
    with torch.no_grad():
        for size in (1, 3, 2, 4, 3, 1):
            features = torch.randn_like(tiny_features(size, config=model.config)).cuda().to(dtype)
            kept.append((encoder(input_features=features)[0], model.model.encoder(features)[0]))
    assert encoder.captures == 3
    for actual, expected in kept:
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        features = features.to(dtype)
        for parameter in model.model.encoder.parameters():
            parameter.data = parameter.data * 1.1
        torch.testing.assert_close(
            encoder(input_features=features)[0], model.model.encoder(features)[0], rtol=tolerance, atol=tolerance
        )
        assert encoder_graph.why_not(model.model.encoder, features, {"output_attentions": True})
    assert encoder_graph.why_not(model.model.encoder, features, {})
