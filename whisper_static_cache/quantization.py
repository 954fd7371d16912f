"""Low-bit decoders: quantise a Whisper model's decoder in place, save it, load it, weigh it."""

import fnmatch
import importlib.util
import inspect
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, WhisperConfig
from transformers.models.whisper import modeling_whisper

from .ops.packing import LEVELS
from .quantization_backends import LinearSpec
from .quantized_linear import QuantizedLinear, check_backend


BITS = tuple(LEVELS)
GROUP_SIZES = (16, 32, 64, 128)
METHODS = ("hqq", "rtn")
# Fewer levels need a finer grid of scales: whisper-base transcribes with 2 bits at group 16 and babbles at group 32.
DEFAULT_GROUP_SIZES = {8: 64, 4: 64, 3: 32, 2: 16, 1.58: 16}
# Above the first, an output head: no layer has so large a linear. The second is what the solver then works on at once.
MAX_WEIGHTS_AT_ONCE = 2**24
WEIGHTS_IN_A_BLOCK = 2**20

FORMAT = "whisper_static_cache.quantized_decoder"
FORMAT_VERSION = 1
MANIFEST = "quantized_decoder.json"
# Not "model.safetensors": transformers' from_pretrained would take it for a full-precision checkpoint, and initialise
# every quantised weight at random.
WEIGHTS = "quantized_decoder.safetensors"
MODEL_CLASSES = ("WhisperForConditionalGeneration", "WhisperForCausalLM", "WhisperModel")
HEAD = "proj_out"


@torch.no_grad()
def quantize_decoder(
    model,
    bits=4,
    group_size=None,
    *,
    method="hqq",
    backend="auto",
    modules=("self_attn", "encoder_attn", "fc"),
    head_bits=None,
    compute_dtype=None,
    progress=True,
):
    """Replace linears of a Whisper model's decoder, in place, by `QuantizedLinear`.

    One linear is quantised and its full-precision weight dropped before the next is looked at, the smallest first, so
    that memory stays below the full-precision model plus one layer (on a GPU: plus 37 to 39 MB where a layer of
    large-v2 has 52). The head comes last and in blocks of groups, with hqq's own result; where few layers have made
    room for it the peak is its own, above that of one layer (turbo, 4 bits: plus 72 MB). A request that cannot be
    served raises before anything is changed.

    Args:
        model: a transformers Whisper model with a decoder, full-precision, on any real device.
        bits: 8, 4, 3, 2 or 1.58 (ternary). Not used where `modules` is a mapping.
        group_size: weights of a row that share a scale and a zero point: 16, 32, 64 or 128, and a divisor of every
            chosen linear's in_features. Default: 64 at 8 and 4 bits, 32 at 3, 16 below.
        method: "hqq", the half-quadratic solver of the hqq package along rows, which needs no calibration data; or
            "rtn", rounding to the nearest on the grid between a group's least and greatest weight.
        backend: "auto", the fastest that can serve each linear where it is; or "torch", "torchao", "gemlite".
        modules: which linears. Patterns (`*` and `?` as in file names) for whole dotted parts of a linear's name
            inside the decoder, as in "layers.0.self_attn.q_proj"; a trailing number may be left out, so that "fc"
            means fc1 and fc2. Or a mapping from such patterns to bits, the first that matches deciding, None leaving a
            linear alone.
        head_bits: quantise the output head too. It is tied to the token embedding, which keeps its own precision: the
            head becomes a copy of ``vocab_size * d_model * head_bits / 8`` bytes and scales, and a decode step reads
            that instead of the full-precision matrix. Default: the head stays tied.
        compute_dtype: dtype of scales and zero points, in which products are computed; activations are cast to it and
            back. Default: each linear's own dtype. On the CPU, torch.bfloat16 is what the int4 kernel is fast in.
        progress: show a progress bar.

    Returns:
        `model`.

    Raises:
        ValueError: a request that is not supported, a group size that does not divide, a backend that cannot serve, a
            model that is quantised already or on the meta device.
        TypeError: a model that is not a Whisper model with a decoder.
        ImportError: method="hqq" without the hqq package.
    """
    decoder, prefix = _find_decoder(model)
    _check_model(model)
    _check_choice("method", method, METHODS)
    if compute_dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"compute_dtype must be torch.float32, float16 or bfloat16, not {compute_dtype!r}")
    if group_size is not None:
        _check_choice("group_size", group_size, GROUP_SIZES)
    plan = {prefix + name: width for name, width in _choose(decoder, modules, bits).items()}
    if head_bits is not None:
        _check_choice("head_bits", head_bits, BITS)
        if not isinstance(getattr(model, HEAD, None), nn.Linear):
            raise ValueError(f"head_bits needs a model with an output head, not {type(model).__name__}; pass None")
        plan[HEAD] = head_bits
    for name, width in plan.items():
        _check_linear(name, model.get_submodule(name), width, group_size, backend, compute_dtype)
    if method == "hqq" and importlib.util.find_spec("hqq") is None:
        raise ImportError("method='hqq' needs the hqq package: pip install hqq, or use method='rtn'")

    from tqdm.auto import tqdm

    # hqq's solver needs several times the memory of what it solves: when it comes to the largest linears, the others
    # have made room for it.
    plan = dict(sorted(plan.items(), key=lambda item: model.get_submodule(item[0]).weight.numel()))
    for name, width in tqdm(plan.items(), desc="Quantising the decoder", unit="linear", disable=not progress):
        linear = model.get_submodule(name)
        size = group_size or DEFAULT_GROUP_SIZES[width]
        values, scales, zeros = _SOLVERS[method](linear.weight.detach(), width, size)
        dtype = compute_dtype or linear.weight.dtype
        options = {"bits": width, "group_size": size, "method": method, "backend": backend}
        quantized = QuantizedLinear.from_integers(values, scales.to(dtype), zeros.to(dtype), linear.bias, **options)
        quantized.train(linear.training)
        _replace(model, name, quantized)
        # The last references to the dense weight, and to what was solved from it, go before the next linear is solved.
        del linear, values, scales, zeros, quantized
    return model


def _find_decoder(model):
    """The `WhisperDecoder` of `model`, and its name in it with a trailing dot."""
    if isinstance(model, modeling_whisper.WhisperPreTrainedModel):
        for name, module in model.named_modules():
            if isinstance(module, modeling_whisper.WhisperDecoder):
                return module, f"{name}." if name else ""
    raise TypeError(f"model must be a transformers Whisper model with a decoder, not {type(model).__name__}")


def _check_model(model):
    if _quantized_linears(model):
        raise ValueError("model is quantised already: quantise the full-precision model, or load that again")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        raise ValueError("model came quantised through transformers: load it without quantization_config")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model is on the meta device and has no weights to quantise: load them first")


def _check_choice(argument, value, choices):
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(map(str, choices))}, not {value!r}")


def _check_linear(name, linear, bits, group_size, backend, compute_dtype):
    size = group_size or DEFAULT_GROUP_SIZES[bits]
    if type(linear.weight) is not nn.Parameter or not linear.weight.is_floating_point():
        raise ValueError(f"the weight of {name} is not a plain floating-point parameter: it is quantised already")
    if linear.in_features % size:
        fitting = [s for s in GROUP_SIZES if linear.in_features % s == 0]
        remedy = f"use {' or '.join(map(str, fitting))}" if fitting else "leave it out of modules"
        raise ValueError(f"group_size={size} does not divide the {linear.in_features} inputs of {name}: {remedy}")
    dtype = compute_dtype or linear.weight.dtype
    spec = LinearSpec(linear.in_features, linear.out_features, bits, size, dtype, linear.weight.device)
    check_backend(backend, spec, name)


def _choose(decoder, modules, bits):
    """Names of linears inside `decoder` -> bits, in the order of its layers."""
    if isinstance(modules, str):
        raise ValueError(
            f"modules must be a tuple of names or a mapping, not the string {modules!r}: use ({modules!r},)"
        )
    widths = dict(modules) if hasattr(modules, "items") else dict.fromkeys(modules, bits)
    if not widths:
        raise ValueError("modules is empty: name at least one part of the decoder")
    for pattern, width in widths.items():
        if width is not None or not hasattr(modules, "items"):
            _check_choice("bits", width, BITS)
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"modules must hold names or patterns, not {pattern!r}")
    names = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    found = {pattern: [name for name in names if _matches(pattern, name)] for pattern in widths}
    for pattern, matching in found.items():
        if not matching:
            raise ValueError(f"modules: {pattern!r} matches no linear of the decoder, such as {', '.join(names[-3:])}")
    chosen = {}
    for name in names:
        width = next((width for pattern, width in widths.items() if name in found[pattern]), None)
        if width is not None:
            chosen[name] = width
    return chosen


def _matches(pattern, name):
    core = fnmatch.translate(pattern)
    number = "" if pattern[-1].isdigit() else r"\d*"
    parts = name.split(".")
    return any(
        re.match(core, ".".join(parts[start:stop]))
        or (number and re.match(core, re.sub(r"\d+$", "", ".".join(parts[start:stop]))))
        for start in range(len(parts))
        for stop in range(start + 1, len(parts) + 1)
    )


def _solve_hqq(weight, bits, group_size):
    """hqq's own solver, zero points not rounded.

    Returns:
        Integers, uint8 ``(out_features, in_features)``; scales and zero points, float32
        ``(out_features, in_features // group_size)``.
    """
    from hqq.core import optimize
    from hqq.core.quantize import Quantizer

    known = Quantizer.optimize_weights is getattr(optimize, "optimize_weights_proximal_legacy", None)
    if known and weight.numel() > MAX_WEIGHTS_AT_ONCE:
        return _solve_hqq_in_blocks(weight, bits, group_size)
    values, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=group_size, axis=1, bitpack=False, device=weight.device
    )
    shape = (weight.shape[0], -1)
    # It works in inference mode: copies, or nothing that records gradients could read the results.
    return (
        values.to(torch.uint8).view(weight.shape),
        meta["scale"].float().clone().view(shape),
        meta["zero"].float().clone().view(shape),
    )


def _solve_hqq_in_blocks(weight, bits, group_size):
    """What `_solve_hqq` returns, bit for bit, from hqq's steps over some groups at a time.

    Groups know nothing of one another but for the end: hqq stops when the error averaged over the whole tensor, in the
    dtype it works in, has not shrunk. So the errors of all groups are kept and averaged in one go, since block sums
    would add up to another last bit; all else that hqq holds, some 20 bytes a weight, is there for one block only.
    """
    from hqq.core import optimize

    signature = inspect.signature(optimize.optimize_weights_proximal_legacy)
    known = signature.parameters["opt_params"].default
    dtype = torch.float16 if weight.device.type == "cuda" else torch.float32
    top = LEVELS[bits] - 1
    groups = weight.reshape(-1, group_size)
    blocks = groups.split(max(WEIGHTS_IN_A_BLOCK // group_size, 1))
    grids = [[tensor.to(dtype) for tensor in _grid(block.float(), top)] for block in blocks]
    errors = torch.empty(groups.shape, dtype=dtype, device=weight.device)
    best = torch.tensor(torch.inf, device=weight.device)
    for _ in range(known["iters"]):
        for block, grid, error in zip(blocks, grids, errors.split(len(blocks[0]))):
            block = block.to(dtype)
            restored, _, grid[1], _ = optimize.optimize_weights_proximal_legacy_step(
                block, *grid, [0, top], known["beta"], known["lp_norm"], 1
            )
            torch.abs(block - restored, out=error)
        error = errors.mean().float()
        if not error < best:
            break
        best = error
    del errors
    values = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
    for block, (inverse, zeros), out in zip(blocks, grids, values.split(len(blocks[0]))):
        out.copy_((block.float() * inverse + zeros).round_().clamp_(0, top))
    inverse, zeros = (torch.cat(tensors).view(weight.shape[0], -1) for tensors in zip(*grids))
    return values.view(weight.shape), (1.0 / inverse).float(), zeros.float()


def _solve_rtn(weight, bits, group_size):
    """Round to the nearest on a grid from each group's least weight to its greatest; results as `_solve_hqq`'s."""
    groups = weight.float().reshape(weight.shape[0], -1, group_size)
    top = LEVELS[bits] - 1
    inverse, zeros = _grid(groups, top)
    values = (groups * inverse + zeros).round_().clamp_(0, top)
    return values.to(torch.uint8).view(weight.shape), (1.0 / inverse).squeeze(-1), zeros.squeeze(-1)


def _grid(groups, top):
    """Inverse steps and zero points, ``(..., 1)``, of grids of integers from 0 to `top` over ``(..., group_size)``."""
    least, greatest = groups.aminmax(dim=-1, keepdim=True)
    spread = greatest - least
    # A group of equal weights has no grid: step 1 and its value as the zero point give it back. The limit keeps the
    # step within the normal numbers of float16.
    inverse = torch.where(spread > 1e-4, top / spread, torch.ones_like(spread)).clamp(max=2e4)
    return inverse, -least * inverse


_SOLVERS = {"hqq": _solve_hqq, "rtn": _solve_rtn}


def _replace(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    if name == HEAD:
        # Nothing may tie the head to the embedding again: not tie_weights, nor a loader that reads the config.
        model.config.tie_word_embeddings = False
        if hasattr(model, "all_tied_weights_keys"):
            model.all_tied_weights_keys = {}


def _quantized_linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def set_backend(model, backend="auto"):
    """Serve every quantised linear of `model` from `backend`; returns `model`.

    Raises:
        ValueError: no quantised linear, an unknown backend, or one that cannot serve; nothing is changed then.
    """
    linears = _quantized_linears(model)
    if not linears:
        raise ValueError("model has no quantised linear: call quantize_decoder first")
    for name, linear in linears.items():
        check_backend(backend, linear.spec, name)
    for linear in linears.values():
        linear.set_backend(backend)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Saving and loading


def save_quantized(model, folder, processor=None):
    """Write a quantised model to `folder`, made if need be: safetensors, a JSON manifest, config, generation config.

    Args:
        model: a Whisper model that `quantize_decoder` has been through.
        folder: path. Files of an earlier save are replaced, each at once.
        processor: a processor, tokenizer or feature extractor to save along with it.

    Raises:
        ValueError: a model that is not quantised, or whose class is a subclass that loading could not know.
    """
    from safetensors.torch import save_file

    linears = _quantized_linears(model)
    if not linears:
        raise ValueError("model has no quantised linear: call quantize_decoder first, or model.save_pretrained")
    if type(model).__name__ not in MODEL_CLASSES:
        raise ValueError(f"model must be one of {', '.join(MODEL_CLASSES)}, not {type(model).__name__}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model_class": type(model).__name__,
        "tied_head": _head_is_tied(model),
        "modules": {
            name: {
                "bits": linear.bits,
                "group_size": linear.group_size,
                "method": linear.method,
                "in_features": linear.in_features,
                "out_features": linear.out_features,
                "bias": linear.bias is not None,
            }
            for name, linear in linears.items()
        },
    }
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if manifest["tied_head"]:
        del tensors[f"{HEAD}.weight"]
    # The manifest makes a folder readable: it goes first and comes last, so that an interrupted save is not readable.
    # Renaming keeps the old file alive for a model that was loaded from it and still reads its pages.
    (folder / MANIFEST).unlink(missing_ok=True)
    save_file(tensors, str(folder / f"{WEIGHTS}.partial"), metadata={"format": "pt"})
    os.replace(folder / f"{WEIGHTS}.partial", folder / WEIGHTS)
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _head_is_tied(model):
    head = getattr(model, HEAD, None)
    return isinstance(head, nn.Linear) and head.weight is _find_decoder(model)[0].embed_tokens.weight


def load_quantized(folder, *, device="cpu", backend="auto"):
    """Build a model from what `save_quantized` wrote, without the original and without quantising again.

    The model is made on the meta device and takes the tensors of the file as they are: no dense copy of a quantised
    weight is ever made.

    Args:
        folder: path.
        device: where the tensors go.
        backend: as in `quantize_decoder`.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: `folder` is not one, or a file is missing from it.
        ValueError: another format or format version, a truncated or unreadable file, tensors missing, left over or of
            another shape than the config asks for, a backend that cannot serve.
    """
    folder = Path(folder)
    for name in (MANIFEST, WEIGHTS, "config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"folder {folder} has no {name}: it is not what save_quantized writes")
    manifest = _read_manifest(folder / MANIFEST)
    config = WhisperConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = getattr(modeling_whisper, manifest["model_class"])(config)
    for name, entry in manifest["modules"].items():
        shape = (entry["in_features"], entry["out_features"])
        linear = _submodule(model, name)
        if not isinstance(linear, nn.Linear) or (linear.in_features, linear.out_features) != shape:
            raise ValueError(f"folder {folder}: {MANIFEST} and config.json disagree on {name}: save the model again")
        options = {key: entry[key] for key in ("bits", "group_size", "method", "bias")}
        _replace(model, name, QuantizedLinear.empty(*shape, **options))
    expected = dict(model.state_dict())
    if manifest["tied_head"]:
        expected.pop(f"{HEAD}.weight", None)
    tensors = _read_tensors(folder / WEIGHTS, expected, device)
    model.load_state_dict(tensors, strict=False, assign=True)
    if manifest["tied_head"]:
        model.proj_out.weight = _find_decoder(model)[0].embed_tokens.weight
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()
    return set_backend(model, backend) if backend != "auto" else model


def _submodule(model, name):
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _read_manifest(path):
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}): save the model again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} does not describe a quantised decoder: use a folder that save_quantized wrote")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, and this package reads {FORMAT_VERSION}: save it again"
        )
    known = manifest.get("model_class") in MODEL_CLASSES and isinstance(manifest.get("modules"), dict)
    keys = {"bits", "group_size", "method", "in_features", "out_features", "bias"}
    for entry in manifest["modules"].values() if known else ():
        known = known and isinstance(entry, dict) and keys <= entry.keys()
        known = known and entry["bits"] in BITS and entry["group_size"] in GROUP_SIZES
    if not known or "tied_head" not in manifest:
        raise ValueError(f"{path} is incomplete or names an unknown model class, width or group size: save it again")
    return manifest


def _read_tensors(path, expected, device):
    """The tensors of a safetensors file, on `device`, after their names, shapes and kinds were compared."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            names = set(file.keys())
            wrong = sorted(names ^ set(expected))
            if wrong:
                what = "lacks" if wrong[0] in expected else "holds an unexpected"
                raise ValueError(f"{path} {what} {wrong[0]} ({len(wrong)} such): save the model again")
            tensors = {}
            for name, like in expected.items():
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(like.shape):
                    raise ValueError(f"{path}: {name} has shape {shape}, the config asks for {tuple(like.shape)}")
                tensors[name] = file.get_tensor(name)
                if tensors[name].is_floating_point() != like.is_floating_point():
                    raise ValueError(f"{path}: {name} holds {tensors[name].dtype}, not the kind that belongs there")
            return tensors
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}): save the model again") from error


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


@dataclass(frozen=True)
class DecoderFootprint:
    """Bytes of a decoder by part; see `decoder_footprint`."""

    weights: int
    scales: int
    kernel_layouts: int
    head: int
    embeddings: int
    other: int
    caches: int
    bits_per_weight: float

    @property
    def total(self):
        """All of it, in bytes."""
        parts = (self.weights, self.scales, self.kernel_layouts, self.head, self.embeddings, self.other, self.caches)
        return sum(parts)


def decoder_footprint(model, cache=None):
    """Bytes of a Whisper model's decoder by part.

    Args:
        model: a transformers Whisper model, quantised or not.
        cache: the `EncoderDecoderStaticCache` to count; default: what one of batch size 1 takes in the model's dtype.

    Returns:
        `DecoderFootprint`, in bytes:
            weights: matrices of the layers, packed or dense, without scales.
            scales: scales and zero points of the layers.
            kernel_layouts: second copies in the layout of a kernel.
            head: the output head with its scales; where it is tied, the matrix it shares with the token embedding.
            embeddings: positions, and the token embedding unless it is the head's.
            other: biases and layer norms.
            caches: self- and cross-attention keys and values.
        and ``bits_per_weight``, of the layers' matrices, scales and zero points included.

    Raises:
        TypeError: a model that is not a Whisper model with a decoder.
    """
    decoder, _ = _find_decoder(model)
    head = getattr(model, HEAD, None)
    parts = dict.fromkeys(("weights", "scales", "kernel_layouts", "head", "embeddings", "other"), 0)
    seen = set()
    count = 0

    def add(part, tensor):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            parts[part] += tensor.numel() * tensor.element_size()

    for tensor in [] if head is None else [*head.parameters(), *head.named_buffers()]:
        name, tensor = tensor if isinstance(tensor, tuple) else ("", tensor)
        add("kernel_layouts" if name.startswith("kernel_") else "head", tensor)
    for module in decoder.modules():
        matrix = isinstance(module, (nn.Linear, QuantizedLinear))
        if matrix:
            count += module.in_features * module.out_features
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if isinstance(module, nn.Embedding):
                add("embeddings", tensor)
            elif name.startswith("kernel_"):
                add("kernel_layouts", tensor)
            elif matrix and name in ("weight", "packed"):
                add("weights", tensor)
            elif matrix and name in ("scales", "zeros"):
                add("scales", tensor)
            else:
                add("other", tensor)
    caches = cache.memory_footprint() if cache is not None else _cache_bytes(model)
    bits_per_weight = 8 * (parts["weights"] + parts["scales"]) / count if count else 0.0
    return DecoderFootprint(**parts, caches=caches, bits_per_weight=bits_per_weight)


def _cache_bytes(model):
    config = model.config
    positions = config.max_target_positions + config.max_source_positions
    itemsize = torch.empty((), dtype=model.dtype).element_size()
    return 2 * config.decoder_layers * config.d_model * positions * itemsize
