"""quantize_decoder: hqq's own weights bit for bit, every backend against the reference, saving, and bad requests."""

import copy
import io
import json
import os
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tests.conftest import TINY_TOKENS, tiny_config, tiny_features, tiny_model
from whisper_static_cache import quantization
from whisper_static_cache.quantization import (
    BITS,
    DEFAULT_GROUP_SIZES,
    MANIFEST,
    WEIGHTS,
    decoder_footprint,
    load_quantized,
    quantize_decoder,
    save_quantized,
    set_backend,
)
from whisper_static_cache.quantization_backends import BACKENDS, LinearSpec, select_backend
from whisper_static_cache.quantized_linear import QuantizedLinear


pytest.importorskip("hqq.core.quantize", reason="needs the hqq package: its solver is the default method")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def wide_model(seed=0, **overrides):
    """A tiny model whose linears take every group size."""
    sizes = {"d_model": 128, "encoder_ffn_dim": 128, "decoder_ffn_dim": 256, "encoder_layers": 1, "decoder_layers": 2}
    model = tiny_model(seed, **{**sizes, **overrides})
    # Random weights like timestamp tokens, and transformers' loop over a recording seeks back to 0.00 for ever.
    first = TINY_TOKENS["no_timestamps"] + 1
    model.generation_config.suppress_tokens += range(first, model.config.vocab_size)
    return model


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def random_linear(out_features, in_features, bits, group_size, dtype=torch.float32, backend="torch", device="cpu"):
    """A quantised random matrix with random scales: no solver, so that any shape is quick."""
    generator = torch.Generator().manual_seed(out_features * 1000 + in_features)
    weight = torch.randn(out_features, in_features, generator=generator)
    values, scales, zeros = quantization._solve_rtn(weight, bits, group_size)
    bias = nn.Parameter(torch.randn(out_features, generator=generator).to(dtype))
    options = {"bits": bits, "group_size": group_size, "method": "rtn", "backend": backend}
    return QuantizedLinear.from_integers(values, scales.to(dtype), zeros.to(dtype), bias, **options).to(device)


def sqnr(reference, value):
    """Signal to quantisation noise of `value` against `reference`, in dB."""
    reference, value = reference.detach().double(), value.detach().double()
    return float(20 * torch.log10(reference.norm() / (reference - value).norm().clamp_min(1e-30)))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, expected):
    got = model.state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


# --- what is stored


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_dequantised_weights_are_hqqs_own(bits, group_size, dtype, device):
    core = pytest.importorskip("hqq.core.quantize", reason="needs the hqq package to compare with")
    with torch.random.fork_rng():
        torch.manual_seed(int(bits * 100) + group_size)
        linear = nn.Linear(384, 48).to(device, dtype)
    config = core.BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
    config["weight_quant_params"]["round_zero"] = False  # as Quantizer.quantize has it: rounding costs accuracy
    theirs = core.HQQLinear(linear, config, compute_dtype=dtype, device=device, del_orig=False)
    values, scales, zeros = quantization._solve_hqq(linear.weight.detach(), bits, group_size)
    options = {"bits": bits, "group_size": group_size, "method": "hqq"}
    ours = QuantizedLinear.from_integers(values, scales.to(dtype), zeros.to(dtype), linear.bias, **options)
    assert ours.dequantize().dtype == dtype
    assert torch.equal(ours.dequantize(), theirs.dequantize())


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_decoder_holds_hqqs_weights_in_every_linear(bits):
    quantize = pytest.importorskip("hqq.core.quantize", reason="needs the hqq package to compare with").Quantizer
    model = wide_model()
    dense = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert quantize_decoder(model, bits, progress=False) is model
    found = linears(model)
    assert len(found) == 2 * 10
    assert all(name.startswith("model.decoder.layers.") for name in found)
    for name, linear in found.items():
        size = DEFAULT_GROUP_SIZES[bits]
        packed, meta = quantize.quantize(dense[name], nbits=bits, group_size=size, axis=1, device="cpu")
        meta["compute_dtype"] = torch.float32
        assert torch.equal(linear.dequantize(), quantize.dequantize(packed, meta)), name


@pytest.mark.parametrize("bits", BITS)
def test_rtn_is_hqq_without_its_solver(bits):
    quantize = pytest.importorskip("hqq.core.quantize", reason="needs the hqq package to compare with").Quantizer
    weight = torch.randn(32, 128)
    weight[3] = 0.25  # a row of equal weights has no spread to divide by
    values, scales, zeros = quantization._solve_rtn(weight, bits, 32)
    theirs, meta = quantize.quantize(weight, nbits=bits, group_size=32, axis=1, optimize=False, bitpack=False)
    assert torch.equal(values.float().view(-1), theirs.view(-1))
    assert torch.equal(scales.view(-1), meta["scale"].view(-1))
    assert torch.equal(zeros.view(-1), meta["zero"].view(-1))


def assert_blocks_give_hqqs_own(weight, bits, monkeypatch):
    """Solve `weight` whole by hqq, and in blocks of some rows, the last one short."""
    size = DEFAULT_GROUP_SIZES[bits]
    whole = quantization._solve_hqq(weight, bits, size)
    monkeypatch.setattr(quantization, "MAX_WEIGHTS_AT_ONCE", weight.numel() - 1)
    monkeypatch.setattr(quantization, "WEIGHTS_IN_A_BLOCK", weight.numel() * 3 // 10)
    steps = []
    optimize = pytest.importorskip("hqq.core.optimize", reason="needs the hqq package to compare with")
    step = optimize.optimize_weights_proximal_legacy_step
    monkeypatch.setattr(
        optimize, "optimize_weights_proximal_legacy_step", lambda *args: steps.append(len(args[0])) or step(*args)
    )
    blocks = quantization._solve_hqq(weight, bits, size)
    # hqq's early end is part of what has to agree, so that it must not be the last iteration that ends it.
    assert len(set(steps)) == 2
    assert 4 <= len(steps) < 4 * 20
    assert all(torch.equal(one, other) for one, other in zip(whole, blocks, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_a_head_solved_in_blocks_is_hqqs_own_to_the_last_bit(bits, dtype, monkeypatch):
    weight = 0.03 * torch.randn(517, 384)
    weight[7] = 0.25
    assert_blocks_give_hqqs_own(weight.to(dtype), bits, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_a_head_solved_in_blocks_on_a_gpu_is_hqqs_own_to_the_last_bit(bits, dtype, monkeypatch):
    weight = 0.03 * torch.randn(51865, 384)
    assert_blocks_give_hqqs_own(weight.to("cuda", dtype), bits, monkeypatch)


def test_more_bits_lose_less_and_hqq_no_more_than_rtn():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    errors = {}
    for method in ("hqq", "rtn"):
        for bits in BITS:
            linear = QuantizedLinear.from_integers(
                *quantization._SOLVERS[method](weight, bits, 32), bits=bits, group_size=32, method=method
            )
            errors[method, bits] = float((linear.dequantize() - weight).abs().mean())
    for method in ("hqq", "rtn"):
        by_width = [errors[method, bits] for bits in BITS]
        assert by_width == sorted(by_width)
    assert all(errors["hqq", bits] <= errors["rtn", bits] * 1.001 for bits in BITS)


def test_ternary_has_three_levels():
    model = quantize_decoder(wide_model(), 1.58, progress=False)
    for linear in linears(model).values():
        assert linear.integers().unique().tolist() == [0, 1, 2]


# --- the request


def test_modules_choose_by_name_pattern_and_mapping():
    def chosen(modules):
        model = quantize_decoder(wide_model(), modules=modules, method="rtn", progress=False)
        return {name.removeprefix("model.decoder."): m.bits for name, m in linears(model).items()}

    assert set(chosen(("fc",))) == {f"layers.{i}.fc{j}" for i in (0, 1) for j in (1, 2)}
    cross = {f"layers.{i}.encoder_attn.{p}_proj" for i in (0, 1) for p in "qkv"}
    assert set(chosen(("encoder_attn.?_proj",))) == cross
    mixed = chosen({"layers.1.fc2": 8, "encoder_attn": 3, "layers.0.self_attn": None, "*": 4})
    assert mixed["layers.1.fc2"] == 8
    assert mixed["layers.0.fc2"] == 4
    assert mixed["layers.0.encoder_attn.k_proj"] == 3
    assert "layers.0.self_attn.q_proj" not in mixed
    assert mixed["layers.1.self_attn.q_proj"] == 4
    assert not quantization._matches("layers.1", "layers.10.fc1")


def test_default_group_sizes_follow_the_width():
    model = quantize_decoder(wide_model(), modules={"fc1": 3, "fc2": 2, "*": 4}, method="rtn", progress=False)
    sizes = {m.bits: m.group_size for m in linears(model).values()}
    assert sizes == {3: 32, 2: 16, 4: 64}


def test_quantised_head_leaves_the_embedding_alone():
    model = wide_model()
    embedding = model.model.decoder.embed_tokens.weight
    before = embedding.detach().clone()
    quantize_decoder(model, 4, head_bits=8, modules=("fc",), progress=False)
    assert isinstance(model.proj_out, QuantizedLinear)
    assert model.model.decoder.embed_tokens.weight is embedding
    assert torch.equal(embedding, before)
    assert sqnr(before, model.proj_out.dequantize()) > 40
    model.tie_weights()
    assert isinstance(model.proj_out, QuantizedLinear)
    assert model.get_output_embeddings() is model.proj_out


def test_weight_answers_for_shape_dtype_and_device():
    model = quantize_decoder(wide_model(), progress=False, head_bits=4)
    weight = model.proj_out.weight
    assert weight.shape == (200, 128)
    assert (weight.size(0), weight.size(), weight.dim(), weight.ndim) == (200, torch.Size((200, 128)), 2, 2)
    assert (weight.dtype, weight.device, weight.is_cuda) == (torch.float32, torch.device("cpu"), False)
    assert weight.numel() == 200 * 128
    assert not weight.requires_grad
    x = torch.randn(3, 128)
    assert torch.equal(nn.functional.linear(x, weight), nn.functional.linear(x, model.proj_out.dequantize()))
    with pytest.raises(AttributeError, match="dequantize"):
        _ = weight.data
    assert model.dtype == torch.float32
    assert model.device.type == "cpu"
    assert "bits=4, group_size=64, method=hqq" in repr(model.proj_out)


BAD_REQUESTS = [
    ({"bits": 5}, ValueError, "bits must be one of"),
    ({"bits": True}, ValueError, "bits must be one of"),
    ({"bits": "4"}, ValueError, "bits must be one of"),
    ({"group_size": 48}, ValueError, "group_size must be one of"),
    ({"group_size": 64}, ValueError, "does not divide the 32 inputs .* use 16 or 32"),
    ({"method": "gptq", "group_size": 32}, ValueError, "method must be one of"),
    ({"backend": "marlin", "group_size": 32}, ValueError, "backend must be 'auto' or one of"),
    ({"backend": "torchao", "group_size": 16}, ValueError, "group sizes 32, 64, 128 and 256, not 16"),
    ({"backend": "torchao", "group_size": 32, "bits": 8}, ValueError, "hold no 8-bit"),
    ({"backend": "gemlite", "group_size": 32}, ValueError, "run on cuda, not cpu; move the model"),
    ({"modules": "fc", "group_size": 32}, ValueError, "not the string"),
    ({"modules": (), "group_size": 32}, ValueError, "modules is empty"),
    ({"modules": ("mlp",), "group_size": 32}, ValueError, "'mlp' matches no linear"),
    ({"modules": {"fc": 7}, "group_size": 32}, ValueError, "bits must be one of"),
    ({"head_bits": 6, "group_size": 32}, ValueError, "head_bits must be one of"),
    ({"compute_dtype": torch.int8, "group_size": 32}, ValueError, "compute_dtype must be"),
]


@pytest.mark.parametrize(("request_", "error", "match"), BAD_REQUESTS)
def test_bad_requests_fail_at_once_and_change_nothing(request_, error, match):
    model = tiny_model()
    before, modules = state(model), dict(model.named_modules())
    with pytest.raises(error, match=match):
        quantize_decoder(model, progress=False, **request_)
    assert_same_state(model, before)
    assert dict(model.named_modules()) == modules
    assert model.config.tie_word_embeddings


def test_models_that_cannot_be_quantised_are_refused():
    with pytest.raises(TypeError, match="not Linear"):
        quantize_decoder(nn.Linear(64, 64))
    from transformers.models.whisper.modeling_whisper import WhisperEncoder, WhisperModel

    with pytest.raises(TypeError, match="not WhisperEncoder"):
        quantize_decoder(WhisperEncoder(tiny_config()))
    with torch.device("meta"):
        meta = WhisperModel(tiny_config())
    with pytest.raises(ValueError, match="meta device"):
        quantize_decoder(meta)
    with pytest.raises(ValueError, match="head_bits needs a model with an output head"):
        quantize_decoder(WhisperModel(tiny_config()), group_size=32, head_bits=4)
    model = quantize_decoder(wide_model(), modules=("fc",), progress=False)
    with pytest.raises(ValueError, match="quantised already"):
        quantize_decoder(model, modules=("self_attn",))
    came_quantised = wide_model()
    came_quantised.config.quantization_config = {"quant_method": "hqq"}
    with pytest.raises(ValueError, match="through transformers"):
        quantize_decoder(came_quantised)


def test_hqq_without_the_package_is_an_import_error(monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    model = wide_model()
    with pytest.raises(ImportError, match="pip install hqq, or use method='rtn'"):
        quantize_decoder(model)
    assert not linears(model)
    quantize_decoder(model, method="rtn", modules=("fc",), progress=False)


def test_a_model_without_head_quantises():
    from transformers.models.whisper.modeling_whisper import WhisperModel

    model = quantize_decoder(WhisperModel(tiny_config()), group_size=32, progress=False)
    assert len(linears(model)) == 30
    assert all(name.startswith("decoder.layers") for name in linears(model))


# --- kernels


def test_auto_takes_the_fastest_that_serves():
    def auto(bits, group_size, dtype):
        return select_backend("auto", LinearSpec(384, 384, bits, group_size, dtype, torch.device("cpu")))[0]

    vectorised = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert auto(4, 64, torch.bfloat16) == ("torchao" if vectorised else "torch")
    assert auto(4, 64, torch.float32) == "torch"
    assert auto(4, 16, torch.bfloat16) == "torch"
    assert auto(8, 64, torch.bfloat16) == "torch"


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_a_backend_serves_or_says_why_not(backend):
    for bits in BITS:
        for group_size in (16, 64):
            for dtype in (*DTYPES, torch.float64):
                for device in ("cpu", "mps"):
                    spec = LinearSpec(384, 384, bits, group_size, dtype, torch.device(device))
                    reason = BACKENDS[backend].why_not(spec)
                    assert reason is None or len(reason) > 20
                    assert backend != "torch" or reason is None


SHAPES = [(16, 128), (48, 384), (51, 256), (1, 640), (200, 128)]
# Least SQNR of the int4 kernel against the torch backend, in dB. In float32 both compute the same sums in another
# order. In 16 bits the torch backend rounds every dequantised weight and the kernel rounds its zero points and
# accumulates in another precision: half a unit in the last place of 8 (bfloat16) or 11 bits, of values up to 15 steps.
INT4_SQNR = {torch.float32: 110, torch.float16: 55, torch.bfloat16: 36}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (4, 32), (4, 128), (3, 32), (2, 64), (1.58, 32)])
def test_int4_kernel_against_the_torch_backend(bits, group_size, dtype):
    for out_features, in_features in SHAPES:
        linear = random_linear(out_features, in_features, bits, group_size, dtype, "torchao")
        assert linear.backend == "torchao"
        outputs, references = [], []
        for rows in ((1,), (2, 1), (3, 5), (65,)):
            x = torch.randn(*rows, in_features).to(dtype)
            out = linear(x)
            assert out.shape == (*rows, out_features)
            assert out.dtype == dtype
            outputs.append(out.flatten())
            references.append(nn.functional.linear(x.double(), linear.dequantize().double(), linear.bias.double()))
        assert sqnr(torch.cat([r.flatten() for r in references]), torch.cat(outputs)) > INT4_SQNR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_torch_backend_against_float64(bits, dtype):
    for out_features, in_features in SHAPES:
        linear = random_linear(out_features, in_features, bits, 16, dtype)
        x = torch.randn(8, 3, in_features).to(dtype)
        reference = nn.functional.linear(x.double(), linear.dequantize().double(), linear.bias.double())
        assert sqnr(reference, linear(x)) > {torch.float32: 115, torch.float16: 55, torch.bfloat16: 40}[dtype]


@pytest.mark.parametrize("bits", BITS)
def test_the_fused_form_is_the_dense_product(bits):
    backend = BACKENDS["torch"]
    for out_features, in_features in SHAPES:
        linear = random_linear(out_features, in_features, bits, 16)
        x = torch.randn(4, 3, in_features)
        assert sqnr(nn.functional.linear(x, linear.dequantize()), backend._fused(linear, x)) > 110


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("backend", ["torch", "torchao"])
def test_forward_is_one_graph(bits, backend):
    if backend == "torchao" and bits == 8:
        pytest.skip("the int4 kernels hold no 8-bit integers")
    torch.compiler.reset()  # the widths would count as recompiles of one another
    linear = random_linear(32, 128, bits, 32, backend=backend)
    aot = {"fullgraph": True, "backend": "aot_eager"}
    step = torch.compile(lambda x: linear(x.to(linear.weight.dtype)) * (linear.weight.shape[0] == 32), **aot)
    for rows in (1, 7):
        x = torch.randn(rows, 1, 128)
        with torch.no_grad():
            assert sqnr(linear(x), step(x)) > 110


@pytest.mark.parametrize("bits", BITS)
def test_forward_compiles_with_inductor(bits):
    torch.compiler.reset()
    linear = random_linear(48, 384, bits, 32)
    step = torch.compile(lambda x: linear(x), fullgraph=True)
    x = torch.randn(1, 1, 384)
    with torch.no_grad():
        assert sqnr(linear(x), step(x)) > 110


def test_compute_dtype_is_apart_from_the_models():
    model = quantize_decoder(wide_model(), compute_dtype=torch.bfloat16, progress=False)
    linear = model.model.decoder.layers[0].fc1
    assert linear.scales.dtype == torch.bfloat16
    out = linear(torch.randn(2, 128))
    assert out.dtype == torch.float32
    assert model.dtype == torch.float32


@pytest.fixture
def briefly_tuned(monkeypatch):
    """gemlite chooses among two tunings of each kernel, not twenty: all of them take half a minute a shape."""
    try:
        from gemlite.core import GEMLITE_TRITON_KERNELS
    except ImportError:
        return
    for kernel in (kernel for family in GEMLITE_TRITON_KERNELS for kernel in family.kernel):
        monkeypatch.setattr(kernel, "configs", kernel.configs[:2])


@pytest.mark.gpu
@pytest.mark.usefixtures("briefly_tuned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "torchao", "gemlite"])
@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (4, 64), (4, 32), (3, 32), (2, 16), (2, 32), (1.58, 32)])
def test_cuda_kernels_against_the_torch_backend(bits, group_size, backend, dtype):
    for out_features, in_features in ((384, 384), (51, 1280), (51865, 384)):
        spec = LinearSpec(in_features, out_features, bits, group_size, dtype, torch.device("cuda"))
        reason = BACKENDS[backend].why_not(spec)
        if reason is not None:
            pytest.skip(reason)
        linear = random_linear(out_features, in_features, bits, group_size, dtype, "auto", "cuda")
        # What a kernel reads beyond its tensors, it shall not find to be zeros by luck.
        free = [torch.full((2**power,), torch.nan, dtype=dtype, device="cuda") for power in range(8, 22)]
        del free
        linear.set_backend(backend)
        for rows in (1, 4, 17, 70):
            x = torch.randn(rows, in_features, device="cuda", dtype=dtype)
            reference = nn.functional.linear(x.double(), linear.dequantize().double(), linear.bias.double())
            assert sqnr(reference, linear(x)) > {torch.float16: 50, torch.bfloat16: 34}[dtype]


@pytest.mark.gpu
def test_moving_to_cuda_and_back_rebuilds_the_layout():
    linear = random_linear(64, 128, 4, 64, torch.bfloat16, "torchao")
    x = torch.randn(2, 128, dtype=torch.bfloat16)
    expected, packed = linear(x), linear.packed.clone()
    moved = linear.to("cuda")
    assert sqnr(expected, moved(x.cuda()).cpu()) > 34
    assert torch.equal(moved.to("cpu").packed, packed)
    assert torch.equal(moved(x), expected)


# --- life of a module


def test_casting_carries_scales_and_chooses_the_kernel_again():
    model = quantize_decoder(wide_model(), progress=False)
    linear = model.model.decoder.layers[0].fc1
    integers = linear.integers()
    model.to(torch.bfloat16)
    assert linear.packed.dtype == torch.uint8
    assert torch.equal(linear.integers(), integers)
    assert linear.scales.dtype == linear.zeros.dtype == torch.bfloat16
    assert linear.backend == select_backend("auto", linear.spec)[0]
    assert linear(torch.randn(1, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16
    model.half()
    assert linear.scales.dtype == torch.float16
    assert linear.backend == "torch"
    assert not any(name.startswith("kernel_") for name, _ in linear.named_buffers())


def test_a_kernel_that_cannot_follow_says_so_at_the_next_product():
    linear = random_linear(32, 128, 4, 64, torch.bfloat16, "torchao")
    x = torch.randn(1, 128)
    expected = linear(x.bfloat16())
    linear.double()
    with pytest.raises(ValueError, match=r"'torchao' cannot serve .* move it back or call set_backend"):
        linear(x.double())
    linear.bfloat16()
    assert torch.equal(linear(x.bfloat16()), expected)


def test_set_backend_refuses_what_one_linear_cannot_take():
    model = quantize_decoder(wide_model(), modules={"fc": 8, "*": 4}, method="rtn", progress=False)
    with pytest.raises(ValueError, match=r"cannot serve model.decoder.layers.0.fc1: .* no 8-bit"):
        set_backend(model, "torchao")
    assert {linear.backend for linear in linears(model).values()} == {"torch"}
    with pytest.raises(ValueError, match="no quantised linear"):
        set_backend(wide_model(), "torch")


@pytest.mark.parametrize("backend", ["torch", "torchao"])
def test_deepcopy_pickle_and_state_dict(backend):
    model = quantize_decoder(wide_model(), backend=backend, progress=False)
    features = torch.randn(1, 5, 128)
    linear = model.model.decoder.layers[1].fc1
    expected = linear(features)
    assert linear.state_dict().keys() == {"packed", "scales", "zeros", "bias"}

    twin = copy.deepcopy(model)
    assert torch.equal(twin.model.decoder.layers[1].fc1(features), expected)
    twin.model.decoder.layers[1].fc1.packed.zero_()
    assert torch.equal(linear(features), expected)

    buffer = io.BytesIO()
    torch.save(linear, buffer)
    assert len(buffer.getvalue()) < 2 * (linear.packed.numel() + 8 * linear.scales.numel() + 4 * 256)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert loaded.backend == backend
    assert torch.equal(loaded(features), expected)

    other = quantize_decoder(wide_model(seed=1), backend=backend, progress=False)
    assert not torch.equal(other.model.decoder.layers[1].fc1(features), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.model.decoder.layers[1].fc1(features), expected)
    three = quantize_decoder(wide_model(), 3, progress=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        three.load_state_dict(model.state_dict())


@pytest.mark.parametrize("bits", BITS)
def test_stock_generate_runs_on_a_quantised_model(bits):
    model = wide_model()
    features = tiny_features(2)
    arguments = {"max_new_tokens": 12, "do_sample": False, "language": "en"}
    dense = copy.deepcopy(model)
    quantize_decoder(model, bits, head_bits=bits, progress=False)
    for name, linear in linears(model).items():
        with torch.no_grad():
            target = dense.get_submodule(name)
            if name == "proj_out":
                target.weight = nn.Parameter(linear.dequantize())
            else:
                target.weight.copy_(linear.dequantize())
    assert torch.equal(model.generate(features, **arguments), dense.generate(features, **arguments))


def test_generate_in_half_precision_through_the_int4_kernel():
    model = quantize_decoder(wide_model(dtype=torch.bfloat16), backend="torchao", head_bits=4, progress=False)
    out = model.generate(tiny_features(1, dtype=torch.bfloat16), max_new_tokens=8, language="en")
    assert out.shape[0] == 1


# --- saving and loading


@pytest.mark.parametrize("head_bits", [None, 4])
@pytest.mark.parametrize("bits", BITS)
def test_saved_and_loaded_bit_for_bit(tmp_path, bits, head_bits):
    model = quantize_decoder(wide_model(), bits, head_bits=head_bits, progress=False)
    model.generation_config.max_length = 17
    save_quantized(model, tmp_path / "new" / "folder")
    loaded = load_quantized(tmp_path / "new" / "folder")
    assert_same_state(loaded, state(model))
    assert not loaded.training
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert {n: (m.bits, m.group_size, m.method) for n, m in linears(loaded).items()} == {
        n: (m.bits, m.group_size, m.method) for n, m in linears(model).items()
    }
    if head_bits is None:
        assert loaded.proj_out.weight is loaded.model.decoder.embed_tokens.weight
    features = tiny_features(2)
    arguments = {"max_new_tokens": 10, "language": "en"}
    assert torch.equal(model.generate(features, **arguments), loaded.generate(features, **arguments))


def test_mixed_widths_dtypes_and_backend_survive(tmp_path):
    model = wide_model(dtype=torch.float16)
    modules = {"layers.0": 4, "fc": 3, "*": 1.58}
    quantize_decoder(model, modules=modules, group_size=32, compute_dtype=torch.bfloat16, progress=False)
    save_quantized(model, tmp_path)
    loaded = load_quantized(tmp_path, backend="torchao")
    assert_same_state(loaded, state(model))
    assert {linear.backend for linear in linears(loaded).values()} == {"torchao"}
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["format_version"] == 1
    assert manifest["modules"]["model.decoder.layers.1.fc1"]["bits"] == 3
    with pytest.raises(ValueError, match="run on cuda, not cpu"):
        load_quantized(tmp_path, backend="gemlite")


def test_saving_over_the_folder_that_a_model_was_loaded_from(tmp_path):
    save_quantized(quantize_decoder(wide_model(), progress=False), tmp_path)
    loaded = load_quantized(tmp_path)
    expected = state(loaded)
    save_quantized(quantize_decoder(wide_model(seed=5), 2, progress=False), tmp_path)
    assert_same_state(loaded, expected)
    assert {linear.bits for linear in linears(load_quantized(tmp_path)).values()} == {2}
    assert not list(tmp_path.glob("*.partial"))


def test_a_processor_is_saved_along(tmp_path):
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=8)
    save_quantized(quantize_decoder(wide_model(), progress=False), tmp_path, processor=extractor)
    assert WhisperFeatureExtractor.from_pretrained(tmp_path).feature_size == 8


def test_what_is_not_a_quantised_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="no quantised linear"):
        save_quantized(wide_model(), tmp_path)
    assert not list(tmp_path.iterdir())


def edit_manifest(folder, change):
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def truncate(folder, size):
    os.truncate(folder / WEIGHTS, size)


FC1 = "model.decoder.layers.0.fc1"
BROKEN = {
    "another version": (lambda f: edit_manifest(f, lambda m: m.update(format_version=2)), "format version 2"),
    "another format": (lambda f: edit_manifest(f, lambda m: m.update(format="x")), "does not describe"),
    "not JSON": (lambda f: (f / MANIFEST).write_text("{"), "not readable JSON"),
    "unknown class": (lambda f: edit_manifest(f, lambda m: m.update(model_class="os")), "unknown model class"),
    "no modules": (lambda f: edit_manifest(f, lambda m: m.pop("modules")), "incomplete"),
    "unknown width": (lambda f: edit_manifest(f, lambda m: m["modules"][FC1].update(bits=5)), "incomplete or names"),
    "another width": (lambda f: edit_manifest(f, lambda m: m["modules"][FC1].update(bits=8)), "packed has shape"),
    "another group": (lambda f: edit_manifest(f, lambda m: m["modules"][FC1].update(group_size=32)), "has shape"),
    "another shape": (lambda f: edit_manifest(f, lambda m: m["modules"][FC1].update(in_features=64)), "disagree on"),
    "unknown module": (lambda f: edit_manifest(f, lambda m: m["modules"].update(x=m["modules"][FC1])), "on x:"),
    "truncated": (lambda f: truncate(f, (f / WEIGHTS).stat().st_size - 100), "truncated"),
    "truncated header": (lambda f: truncate(f, 20), "truncated"),
    "empty": (lambda f: truncate(f, 0), "truncated"),
    "tensor missing": (lambda f: edit_tensors(f, lambda t: t.pop(f"{FC1}.scales")), "lacks"),
    "tensor too many": (lambda f: edit_tensors(f, lambda t: t.update(x=torch.zeros(1))), "unexpected x"),
    "tensor of another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{FC1}.zeros": torch.zeros(256, 4)})),
        "zeros has shape",
    ),
    "tensor of another kind": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{FC1}.zeros": t[f"{FC1}.zeros"].to(torch.int8)})),
        "not the kind",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused(tmp_path, case):
    damage, match = BROKEN[case]
    save_quantized(quantize_decoder(wide_model(), method="rtn", progress=False), tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=match):
        load_quantized(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"has no {MANIFEST}"):
        load_quantized(tmp_path / "nowhere")
    save_quantized(quantize_decoder(wide_model(), method="rtn", progress=False), tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {WEIGHTS}"):
        load_quantized(tmp_path)


# --- memory


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensor storage alive at once of those made by operators within it."""

    def __enter__(self):
        self.live = self.peak = self.largest = 0
        self.seen = set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage.data_ptr() and storage.data_ptr() not in self.seen:
                    self.seen.add(storage.data_ptr())
                    self.live += storage.nbytes()
                    self.largest = max(self.largest, storage.nbytes())
                    weakref.finalize(storage, self._free, storage.data_ptr(), storage.nbytes())
                self.peak = max(self.peak, self.live)
        return out

    def _free(self, pointer, size):
        self.seen.discard(pointer)
        self.live -= size


def test_loading_makes_no_dense_copy_of_a_quantised_weight(tmp_path):
    model = quantize_decoder(wide_model(d_model=256, decoder_ffn_dim=1024), progress=False)
    save_quantized(model, tmp_path)
    file_size = (tmp_path / WEIGHTS).stat().st_size
    with LiveBytes() as memory:
        load_quantized(tmp_path)
    assert memory.largest < 1024 * 256 * 4  # a dense fc1
    assert memory.peak < 1.1 * file_size


def test_a_head_is_solved_in_little_more_than_its_own_memory(monkeypatch):
    weight = torch.randn(2048, 256)
    peaks = []
    for at_once in (weight.numel(), weight.numel() - 1):
        monkeypatch.setattr(quantization, "MAX_WEIGHTS_AT_ONCE", at_once)
        monkeypatch.setattr(quantization, "WEIGHTS_IN_A_BLOCK", 2**14)
        with LiveBytes() as memory:
            solved = quantization._solve_hqq(weight, 4, 64)
        peaks.append(memory.peak / weight.nbytes)
        del solved
    # The weight, the errors of all of it, scales and zero points of its groups, and a block's temporaries.
    assert peaks[1] < 2.4 < 5 < peaks[0]


@pytest.mark.parametrize("method", ["hqq", "rtn"])
def test_linears_are_freed_one_by_one(method):
    model = wide_model(decoder_layers=3)
    weights = [weakref.ref(m.weight) for m in model.model.decoder.modules() if isinstance(m, nn.Linear)]
    alive, sizes = [], []
    solver = quantization._SOLVERS[method]

    def spy(weight, bits, group_size):
        sizes.append(weight.numel())
        alive.append(sum(ref() is not None for ref in weights))
        return solver(weight, bits, group_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(quantization._SOLVERS, method, spy)
        quantize_decoder(model, method=method, progress=False)
    assert alive == list(range(len(weights), 0, -1))
    assert sizes == sorted(sizes)


def test_footprint_adds_up():
    model = wide_model()
    dense = decoder_footprint(model)
    parameters = sum(p.numel() for p in model.model.decoder.parameters())
    assert dense.total - dense.caches == 4 * parameters
    assert dense.head == 4 * 200 * 128
    assert dense.bits_per_weight == 32
    assert dense.caches == 2 * 2 * 128 * (40 + 30) * 4
    quantize_decoder(model, 4, progress=False)
    packed = decoder_footprint(model)
    assert packed.weights == dense.weights // 8
    assert packed.scales == dense.weights // 4 // 64 * 8
    assert packed.bits_per_weight == 5
    assert (packed.head, packed.embeddings, packed.other) == (dense.head, dense.embeddings, dense.other)
    assert packed.kernel_layouts == 0
    half = decoder_footprint(set_backend(model.to(torch.bfloat16), "torchao"))
    assert half.bits_per_weight == 4.5
    assert half.kernel_layouts >= half.weights
    untied = decoder_footprint(quantize_decoder(wide_model(), 4, head_bits=4, progress=False))
    assert untied.head == 200 * (64 + 2 * 2 * 4)
    assert untied.embeddings == dense.embeddings + dense.head
    with pytest.raises(TypeError, match="not Linear"):
        decoder_footprint(nn.Linear(2, 2))


def test_footprint_takes_a_cache():
    from whisper_static_cache import EncoderDecoderStaticCache

    model = wide_model()
    cache = EncoderDecoderStaticCache(model.config, max_batch_size=2)
    assert decoder_footprint(model, cache).caches == cache.memory_footprint()
    assert decoder_footprint(model).caches == EncoderDecoderStaticCache(model.config).memory_footprint()
