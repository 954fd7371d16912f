"""What is noticed of a model between two windows: everything that a captured step has baked in, and who may serve."""

from collections import OrderedDict

import pytest
import torch

import whisper_static_cache
from whisper_static_cache import sessions
from whisper_static_cache.engines import CompileEngine
from whisper_static_cache.modeling_whisper import ModuleFingerprint

from .conftest import tiny_features, tiny_model


def layer_of(model):
    return model.model.decoder.layers[1]


def swap_data(model):
    layer_of(model).fc1.weight.data = layer_of(model).fc1.weight.data.clone()


def transpose_in_place(model):
    weight = layer_of(model).self_attn.q_proj.weight
    weight.data = weight.data.t()


def cast_and_back(model):
    # Back to the first address, as an allocator may have it, in another dtype.
    bias = layer_of(model).fc2.bias
    bias.data = bias.data.view(torch.int32).view(torch.float16)[: bias.numel()]


def drop_last_layer(model):
    del model.model.decoder.layers[-1]


def repeat_last_layer(model):
    model.model.decoder.layers.append(layer_of(model))


def swap_projections(model):
    attention = layer_of(model).self_attn
    attention.q_proj, attention.v_proj = attention.v_proj, attention.q_proj


def change_class(model):
    linear = layer_of(model).fc1
    linear.__class__ = type("Other", (torch.nn.Linear,), {})


def fill_an_empty_bias(model):
    projection = layer_of(model).self_attn.k_proj
    assert projection.bias is None
    projection.bias = torch.nn.Parameter(torch.ones(projection.out_features))


def rename(model):
    table = layer_of(model).fc2._parameters
    table["offset"] = table.pop("bias")


def replace_head(model):
    model.proj_out = torch.nn.Linear(*reversed(model.proj_out.weight.shape), bias=False)


def change_scaling(model):
    layer_of(model).encoder_attn.scaling = 0.5


def change_eps(model):
    layer_of(model).final_layer_norm.eps = 1e-3


BAKED_IN = [
    swap_data,
    transpose_in_place,
    cast_and_back,
    drop_last_layer,
    repeat_last_layer,
    swap_projections,
    change_class,
    fill_an_empty_bias,
    rename,
    replace_head,
    change_scaling,
    change_eps,
    lambda model: model.half(),
    lambda model: model.to("meta"),
]


@pytest.mark.parametrize("change", BAKED_IN, ids=lambda change: change.__name__.strip("<>"))
def test_a_fingerprint_no_longer_holds(change):
    model = tiny_model(decoder_layers=2)
    fingerprint = ModuleFingerprint(model, "model.decoder", "proj_out")
    assert fingerprint.still_holds()
    change(model)
    assert not fingerprint.still_holds()


def test_what_is_computed_anew_in_every_window_leaves_a_fingerprint():
    model = tiny_model(decoder_layers=2)
    fingerprint = ModuleFingerprint(model, "model.decoder", "proj_out")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    model.train()
    model.eval()
    layer_of(model).register_forward_hook(lambda *_: None)
    assert fingerprint.still_holds()


def hook(*_):
    return None


def replace_table_of_hooks(model):
    """As those do who take all hooks off: what is registered afterwards lands in another table."""
    layer_of(model).fc1._forward_hooks = OrderedDict()
    layer_of(model).fc1.register_forward_hook(hook)


STANDING_ON_IT = {
    "hook": lambda model: layer_of(model).fc1.register_forward_hook(hook),
    "pre-hook": lambda model: layer_of(model).register_forward_pre_hook(hook),
    "backward hook": lambda model: layer_of(model).register_full_backward_hook(hook),
    "on the model": lambda model: model.register_forward_hook(hook),
    "on the inner model": lambda model: model.model.register_forward_hook(hook),
    "on the head": lambda model: model.proj_out.register_forward_hook(hook),
    "another table": replace_table_of_hooks,
    "forward": lambda model: setattr(layer_of(model).fc1, "forward", hook),
    "forward of the model": lambda model: setattr(model, "forward", hook),
}


@pytest.mark.parametrize("change", STANDING_ON_IT.values(), ids=STANDING_ON_IT)
def test_circumstances_change(change):
    model = tiny_model(decoder_layers=2)
    fingerprint = ModuleFingerprint(model, "model.decoder", "proj_out")
    before = fingerprint.circumstances(model)
    change(model)
    assert fingerprint.circumstances(model) != before
    assert fingerprint.still_holds()


def test_a_hook_that_moves_is_another():
    model = tiny_model(decoder_layers=2)
    fingerprint = ModuleFingerprint(model, "model.decoder", "proj_out")
    handle = layer_of(model).fc1.register_forward_hook(hook)
    before = fingerprint.circumstances(model)
    handle.remove()
    layer_of(model).register_forward_hook(hook)
    assert fingerprint.circumstances(model) != before


def test_reasons_are_found_once_and_again_when_they_may_have_changed(monkeypatch):
    model = tiny_model(decoder_layers=2)
    features = tiny_features(1, config=model.config)
    asked = []
    why_not = CompileEngine.why_not

    def counted(*arguments):
        asked.append(1)
        return why_not(*arguments) or "not today"

    monkeypatch.setattr(CompileEngine, "why_not", staticmethod(counted))
    with whisper_static_cache.patched(model, engine="compile"):
        for _ in range(3):
            model.generate(features, language="en", max_new_tokens=2)
        assert len(asked) == 1
        engines = dict(sessions.state_of(model).engines)
        handle = layer_of(model).fc1.register_forward_hook(hook)
        model.generate(features, language="en", max_new_tokens=2)
        assert "forward hook" in whisper_static_cache.last_run(model).reason
        handle.remove()
        model.generate(features, language="en", max_new_tokens=2)
        assert whisper_static_cache.last_run(model).reason == "not today"
        assert len(asked) == 3
        # A hook that comes and goes costs no engine what it has built.
        assert sessions.state_of(model).engines == engines
        model.config.activation_function = "relu"
        model.generate(features, language="en", max_new_tokens=2)
        assert len(asked) == 4
