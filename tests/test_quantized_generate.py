"""The patched generate on a quantised decoder: stock's tokens from every engine, and nothing compiled on the way."""

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

import whisper_static_cache
from whisper_static_cache._compat import CACHE_NAME

from .conftest import tiny_features, tiny_model


ENGINES = ("eager", "compile")
LONG_FORM = {
    "return_timestamps": True,
    "temperature": (0.0, 0.4, 0.8),
    "logprob_threshold": -0.1,
    "compression_ratio_threshold": 1.2,
    "no_speech_threshold": 0.2,
}


@pytest.fixture(autouse=True)
def unpatched():
    yield
    whisper_static_cache.unpatch()


def quantized_model(bits=4, seed=0, **options):
    # Two layers: every step is compiled once a test.
    model = tiny_model(seed, decoder_layers=2, encoder_layers=1)
    return whisper_static_cache.quantize_decoder(model, bits, 16, method="rtn", progress=False, **options)


def generate(model, *args, **kwargs):
    torch.manual_seed(0)
    return model.generate(*args, **kwargs)


@pytest.mark.parametrize(
    ("engine", "bits", "head_bits"), [("eager", 4, None), ("eager", 3, 8), ("eager", 1.58, None), ("compile", 3, 8)]
)
def test_the_tokens_of_stock_in_batches_of_one_to_five(engine, bits, head_bits):
    model = quantized_model(bits, head_bits=head_bits)
    inputs = [tiny_features(size, seed=size) for size in (5, 1, 2, 3, 4)]
    expected = [generate(model, one) for one in inputs]
    with whisper_static_cache.patched(model, engine=engine):
        for one, tokens in zip(inputs, expected):
            assert torch.equal(generate(model, one), tokens)
            assert whisper_static_cache.last_run(model).engine == engine


@pytest.mark.parametrize("engine", ENGINES)
def test_long_form_with_timestamps_and_temperature_fallback(engine):
    model = quantized_model()
    recording = tiny_features(windows=3.3)
    arguments = [{"return_timestamps": True}, LONG_FORM]
    try:
        expected = [generate(model, recording, **one) for one in arguments]
    except TypeError as error:
        if "input_ids" not in str(error):
            raise
        pytest.skip(f"in 4.50 stock's no-speech detector passes forward an argument that it does not take: {error}")
    with whisper_static_cache.patched(model, engine=engine):
        for one, tokens in zip(arguments, expected):
            assert torch.equal(generate(model, recording, **one), tokens)
            assert whisper_static_cache.last_run(model).engine == engine


def test_nothing_compiles_after_warmup():
    model = quantized_model(seed=5)
    whisper_static_cache.patch(model, engine="compile")
    assert whisper_static_cache.warmup(model, batch_sizes=(1, 5)).compiles == 2
    counters.clear()
    workload = [
        (tiny_features(1), {}),
        (tiny_features(5, seed=1), {}),
        (tiny_features(3), {"max_new_tokens": 7}),
        (tiny_features(1), {"prompt_ids": torch.tensor([108, 5, 6, 7, 8])}),
        (tiny_features(2), {"do_sample": True, "temperature": 0.6}),
        (tiny_features(4, seed=2), {}),
        (tiny_features(1, windows=2.2), LONG_FORM),
        (tiny_features(5, windows=2.2), {"return_timestamps": True, "attention_mask": torch.ones(5, 132).long()}),
    ]
    with torch.compiler.set_stance("fail_on_recompile"):
        for inputs, arguments in workload:
            generate(model, inputs, **arguments)
            report = whisper_static_cache.last_run(model)
            assert (report.engine, report.reason, report.compiles) == ("compile", None, 0), arguments
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_saved_and_loaded_the_tokens_are_the_same(tmp_path, engine):
    model = quantized_model(2)
    expected = generate(model, tiny_features(2))
    whisper_static_cache.save_quantized(model, tmp_path)
    loaded = whisper_static_cache.load_quantized(tmp_path)
    with whisper_static_cache.patched(loaded, engine=engine):
        assert torch.equal(generate(loaded, tiny_features(2)), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_quantised_after_its_first_call(engine):
    model = tiny_model(decoder_layers=2, encoder_layers=1)
    expected = generate(quantized_model(2), tiny_features(2))
    whisper_static_cache.patch(model, engine=engine)
    dense = generate(model, tiny_features(2))
    whisper_static_cache.quantize_decoder(model, 2, 16, method="rtn", progress=False)
    tokens = generate(model, tiny_features(2))
    assert not torch.equal(tokens, dense)
    assert torch.equal(tokens, expected)


def torchao_config(bits):
    quantization = pytest.importorskip("torchao.quantization", reason="needs the torchao package")
    from transformers import TorchAoConfig

    if bits == 8:
        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    granularity = quantization.PerGroup(32)
    return TorchAoConfig(quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity))


def hqq_config():
    pytest.importorskip("hqq.core.quantize", reason="needs the hqq package")
    from transformers import HqqConfig

    return HqqConfig(nbits=4, group_size=64, axis=1)


def model_with_hqq_linears():
    """What HqqConfig makes of a model, in releases that no longer load it, or not without a GPU."""
    core = pytest.importorskip("hqq.core.quantize", reason="needs the hqq package")
    model = tiny_model(d_model=64, decoder_ffn_dim=128, decoder_layers=2, encoder_layers=1)
    config = core.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    for module in list(model.model.decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, core.HQQLinear(child, config, compute_dtype=torch.float32, device="cpu"))
    return model


def loaded_through_transformers(config, folder):
    from transformers import WhisperForConditionalGeneration

    dense = tiny_model(d_model=64, decoder_ffn_dim=128, encoder_ffn_dim=64, decoder_layers=2, encoder_layers=1)
    dense.save_pretrained(folder)
    load = WhisperForConditionalGeneration.from_pretrained
    try:
        model = load(folder, quantization_config=config, device_map="cpu")
    except (ImportError, NotImplementedError, RuntimeError, TypeError) as error:
        pytest.skip(f"transformers {transformers.__version__} cannot load it here: {str(error).splitlines()[0]}")
    model.generation_config = dense.generation_config
    from accelerate.hooks import remove_hook_from_module

    # With HqqConfig transformers wraps every module's forward, to move its inputs to its device, be there one or many.
    return remove_hook_from_module(model, recurse=True)


@pytest.mark.parametrize("kind", ["hqq linears", "HqqConfig", "TorchAoConfig int8", "TorchAoConfig int4"])
def test_models_that_others_quantised_run_compiled_with_the_tokens_of_stock(tmp_path, kind):
    if kind == "hqq linears":
        model = model_with_hqq_linears()
    else:
        config = hqq_config() if kind == "HqqConfig" else torchao_config(int(kind[-1]))
        model = loaded_through_transformers(config, tmp_path)
    inputs = [tiny_features(size, seed=size) for size in (1, 3)]
    expected = [generate(model, one) for one in inputs]
    for engine in ENGINES:
        with whisper_static_cache.patched(model, engine=engine):
            for one, tokens in zip(inputs, expected):
                assert torch.equal(generate(model, one), tokens)
                report = whisper_static_cache.last_run(model)
                assert (report.engine, report.reason) == (engine, None)


def test_hooks_of_accelerate_go_to_stock_with_the_remedy_in_the_reason():
    hooks = pytest.importorskip("accelerate.hooks", reason="needs the accelerate package")
    model = quantized_model()
    inputs = tiny_features(2)
    expected = generate(model, inputs)
    # As HqqConfig leaves a model loaded with device_map="cpu".
    hooks.attach_align_device_hook(model, torch.device("cpu"))
    hooks.add_hook_to_module(model, hooks.AlignDevicesHook(io_same_device=True, skip_keys=CACHE_NAME))
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(torch.device("cpu")), append=True)
    with whisper_static_cache.patched(model, engine="compile"):
        assert torch.equal(generate(model, inputs), expected)
        report = whisper_static_cache.last_run(model)
        assert report.engine == "stock"
        assert "remove_hook_from_module(model, recurse=True)" in report.reason
        hooks.remove_hook_from_module(model, recurse=True)
        assert torch.equal(generate(model, inputs), expected)
        assert whisper_static_cache.last_run(model).engine == "compile"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "bits", "compute_dtype"),
    [
        ("torch", 4, torch.float32),
        ("torch", 1.58, torch.float32),
        ("torchao", 4, torch.bfloat16),
    ],
)
def test_compiled_and_captured_on_a_gpu_the_tokens_are_those_of_the_eager_engine(backend, bits, compute_dtype):
    # The model itself stays in float32, and the tokens few: between linears that round to bfloat16 the engines' sums,
    # in another order, come to a near-tie sooner or later.
    model = tiny_model(d_model=64, decoder_ffn_dim=128, decoder_layers=2, encoder_layers=1).cuda()
    options = {"backend": backend, "compute_dtype": compute_dtype, "method": "rtn", "progress": False}
    whisper_static_cache.quantize_decoder(model, bits, 32, **options)
    short = {"max_new_tokens": 12}
    workload = [(tiny_features(size, seed=size).cuda(), short) for size in (5, 1, 2, 3, 4)]
    recordings = tiny_features(2, windows=3.3).cuda()
    mask = torch.ones(2, recordings.shape[-1], dtype=torch.long, device="cuda")
    workload.append((recordings, {**short, "return_timestamps": True, "attention_mask": mask}))
    with whisper_static_cache.patched(model, engine="eager"):
        expected = [generate(model, features, **arguments) for features, arguments in workload]
    with whisper_static_cache.patched(model, engine="compile"):
        for again in (False, True):
            for (features, arguments), tokens in zip(workload, expected):
                assert torch.equal(generate(model, features, **arguments), tokens)
                report = whisper_static_cache.last_run(model)
                assert (report.engine, report.reason) == ("compile", None)
                assert not again or (report.compiles, report.captures) == (0, 0)
