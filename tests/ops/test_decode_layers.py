"""The persistent kernel: its source on emulated CUDA threads, and on a GPU, against float64."""

import ctypes
import functools
import inspect
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.ops import EMULATION, compile_emulated
from whisper_static_cache import int8_states
from whisper_static_cache.ops import decode_layers as ops
from whisper_static_cache.ops import decode_tokens
from whisper_static_cache.ops.decode_linear import Weight
from whisper_static_cache.ops.packing import LEVELS, pack


ROWS = 120  # of the vocabulary
EPS = 1e-5


class Model:
    """Random layers in the kernel's layout, and their caches."""

    def __init__(self, shape, device="cpu", seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        dtype = torch.bfloat16 if shape.bfloat16 else torch.float16
        width, ffn = shape.width, shape.ffn

        def random(*size, scale=1.0, mean=0.0):
            return (mean + scale * torch.randn(*size, generator=generator, device=device)).to(dtype)

        def weight(rows, depth, bits=shape.bits, group_size=shape.group_size):
            if bits == 16:
                return Weight(random(rows, depth, scale=depth**-0.5), None, None, 16, 0, depth)
            levels, groups = LEVELS[bits], depth // group_size
            values = torch.randint(0, levels, (rows, depth), generator=generator, dtype=torch.uint8, device=device)
            scales = random(rows, groups, scale=0.1, mean=1.0) * (2.0 / levels * depth**-0.5)
            zeros = random(rows, groups, scale=0.02 * levels, mean=(levels - 1) / 2)
            return Weight(pack(values, bits), scales, zeros, bits, group_size, depth)

        self.shape, self.device, self.dtype = shape, device, dtype
        self.layers, rows = [], []
        self.caches, self.buffers = [], []
        sizes = [(width, width)] * 6 + [(ffn, width), (width, ffn)]
        for _ in range(shape.layers):
            weights = [weight(*size) for size in sizes]
            biases = [random(size[0], scale=0.1) for size in sizes]
            biases[1] = None
            norms = [(random(width, scale=0.1, mean=1.0), random(width, scale=0.1), EPS) for _ in range(3)]
            caches = [random(shape.batch, shape.heads, shape.slots, 64) for _ in range(2)]
            caches += [random(shape.batch // shape.beams, shape.heads, shape.source, 64) for _ in range(2)]
            self.layers.append((weights, biases, norms))
            self.buffers.append(self.in_8_bits(caches) if shape.cross_int8 else caches)
            self.caches.append(caches)
        self.last_norm = random(width, scale=0.1, mean=1.0)
        self.embedding, self.positions = random(max(ROWS, shape.vocab), width), random(shape.slots, width, scale=0.3)
        self.vectors = []
        for index, (weights, biases, norms) in enumerate(self.layers):
            constants, folded = [], []
            for group, norm in (([0, 1, 2], 0), ([4], 1), ([6], 2)):
                gain, offset = norms[norm][0].double(), norms[norm][1].double()
                dense = [weights[i].dense().double() for i in group]
                added = [0 if biases[i] is None else biases[i].double() for i in group]
                constants.append(torch.cat([w @ offset + b for w, b in zip(dense, added)]).float())
                folded.append(torch.cat([w @ gain for w in dense]).float())
            self.vectors.append((constants, folded))
            following = self.layers[index + 1][2][0][0] if index + 1 < shape.layers else self.last_norm
            rows.append(
                [
                    *(weight.values for weight in weights),
                    *(weight.scales for weight in weights),
                    *(weight.zeros for weight in weights),
                    *constants,
                    *folded,
                    *(biases[i] for i in (3, 5, 7)),
                    *(norms[1][0], norms[2][0], following),
                    *self.buffers[index],
                ]
            )
        self.rows = rows
        self.table = ops.pointer_table(rows)
        self.eps = torch.full((shape.layers, 3), EPS, device=device)
        self.work = ops.work_space(shape, device)
        self.finished = torch.zeros(1, dtype=torch.uint8, device=device)
        self.gained = torch.full((shape.batch, width), torch.nan, device=device)
        self.stats = torch.full((2, shape.batch, shape.givers), torch.nan, device=device)
        self.head, self.choice, self.count = [None] * 7, [None] * 7, 0
        if shape.vocab:
            logits = torch.full((1, shape.vocab + 1), torch.nan, dtype=dtype, device=device)
            head = weight(shape.vocab, width, shape.head_bits, shape.head_group_size)
            assert ops.why_no_head(head, dtype) is None
            self.last_bias, self.head_weight = random(width, scale=0.1), head.dense().double()
            constant, folded = (self.head_weight @ v.double() for v in (self.last_bias, self.last_norm))
            self.head = [
                logits,
                head.values,
                self.last_norm,
                constant.float(),
                folded.float(),
                head.scales,
                head.zeros,
            ]
        self.valid = torch.ones(shape.batch, shape.slots, dtype=torch.bool, device=device)
        self.tokens = torch.randint(0, ROWS, (shape.batch, shape.slots + 1), generator=generator, device=device)

    def in_8_bits(self, caches):
        """The layer's buffers with cross-attention in 8 bits; `caches` then hold what these stand for."""
        buffers, scales = caches[:2], []
        for index in (2, 3):
            integers = torch.empty_like(caches[index], dtype=torch.int8)
            scales.append(torch.empty_like(caches[index][..., 0]))
            int8_states.quantize(caches[index], integers, scales[-1])
            caches[index] = int8_states.dequantize(integers.double(), scales[-1].double())
            buffers.append(integers)
        return [*buffers, *scales]

    def result(self):
        """What a launch writes."""
        return self.gained if self.head[0] is None else self.head[0][:, :-1]

    def operands(self, slot, offset):
        length = torch.tensor([slot + 1], device=self.device)
        # Rows differ in where they begin.
        offsets = [[max(offset - row, 0)] for row in range(self.shape.batch)]
        self.keep = length, torch.tensor(offsets, device=self.device)
        return (self.gained, self.stats, self.work), (
            self.table,
            self.tokens,
            *self.keep,
            self.valid,
            self.embedding,
            self.positions,
            self.layers[0][2][0][0],
            self.eps,
            0.125,
            self.finished,
            *self.head,
            EPS,
        )

    def expected(self, slot, offset):
        """What the step gives, in float64, and the caches after it."""
        caches = [[cache.double() for cache in layer] for layer in self.caches]
        x = self.embedding[self.tokens[:, slot]].double() + self.positions[slot - self.keep[1][:, 0]].double()
        for (weights, biases, norms), layer in zip(self.layers, caches):
            layer[2:] = (states.repeat_interleave(self.shape.beams, 0) for states in layer[2:])
            dense = [weight.dense() for weight in weights]
            x = ops.reference_decode_layer(x, dense, biases, norms, layer, slot, self.valid, 0.125)
        return x, caches


@functools.cache
def emulated(shape):
    """The source as a library for the CPU, which also looks for races in shared memory."""
    defines = [f"-D{name}={value}" for name, value in ops.definitions(shape).items()]
    # A library that is loaded outlives its file.
    with tempfile.TemporaryDirectory(prefix="whisper_static_cache_") as folder:
        wrapper, kernel = Path(folder) / "wrapper.cpp", Path(folder) / "kernel.so"
        wrapper.write_text(f"{ops.source_of(shape)}\nEMULATED_ENTRY(decode_layers, Arguments)\n")
        compile_emulated(wrapper, kernel, "-w", *defines, races=True)
        library = ctypes.CDLL(str(kernel))
    library.decode_layers_message.restype = ctypes.c_char_p
    return library


def launch_emulated(shape, arguments, seed=0):
    library = emulated(shape)
    status = library.decode_layers_emulated(ctypes.byref(arguments), shape.programs, ops.THREADS, shape.memory, seed)
    assert status == 0, library.decode_layers_message().decode()


def emulate(model, slot, offset=0, seed=0):
    outputs, inputs = model.operands(slot, offset)
    launch_emulated(model.shape, ops.arguments_for(*outputs, *inputs, *model.choice, count=model.count), seed)


def launch_as_emulated(shape, gained, stats, work, caches, *others):
    """What `ops.decode_layers` does with its arguments, on emulated threads."""
    inputs, (scale, _, _, _), (*head, _, _, eps), (*choice, count) = (
        others[:9],
        others[9:13],
        others[13:24],
        others[24:],
    )
    arguments = *inputs, scale, *head, eps, *choice
    launch_emulated(shape, ops.arguments_for(gained, stats, work, *arguments, count=count))


def compare(model, slot, offset, run):
    model.operands(slot, offset)
    x, caches = model.expected(slot, offset)
    model.gained.fill_(torch.nan)
    model.stats.fill_(torch.nan)
    logits = model.head[0]
    if logits is not None:
        logits.fill_(torch.nan)
    run(model, slot, offset)
    bound = {torch.float16: 4e-3, torch.bfloat16: 3e-2}[model.dtype]
    if logits is not None:
        normed = F.layer_norm(x, x.shape[-1:], model.last_norm.double(), model.last_bias.double(), EPS)
        wanted = normed @ model.head_weight.T
        error = (logits[:, :-1].double() - wanted).norm() / wanted.norm()
        assert error < bound, error
        # Nothing behind the vocabulary was written.
        assert logits[:, -1].isnan().all()
    else:
        wanted = x * model.last_norm.double()
        error = (model.gained.double() - wanted).norm() / wanted.norm()
        assert error < bound, error
        sums = model.stats.double().sum(-1)
        assert torch.allclose(sums[0], x.sum(-1), atol=bound * x.norm().item() * 10)
        assert torch.allclose(sums[1], x.square().sum(-1), rtol=4 * bound)
    for mine, theirs in zip(model.caches, caches):
        for cache, wanted in zip(mine[:2], theirs[:2]):
            wrong = (cache.double() - wanted).norm() / wanted.norm()
            assert wrong < bound, wrong
            # No slot but the newest was touched.
            cache, wanted = cache.clone(), wanted.clone()
            cache[:, :, slot] = wanted[:, :, slot] = 0
            assert torch.equal(cache.double(), wanted)


# What tokens are chosen by: marks of some, the rules of timestamps, ends.
PLAIN = {}
MARKED = {"marks": {1: range(0, 100, 3), 2: range(1, 100, 3)}, "min_length": 128}
STAMPED = {"timestamp_begin": 80, "no_timestamps": 79, "text_end": 50, "begin_index": 123, "detect": 1}
CHOICES = [PLAIN, MARKED, STAMPED, {**STAMPED, "detect": 0, "begin_index": 125}, {**STAMPED, "timestamp_begin": 30}]


def give_choice(model, choice, count, ends=()):
    """Have launches of `model` choose `count` tokens; the tensors that they write, by name."""
    vocab, device = model.shape.vocab, model.device
    given = {"timestamp_begin": vocab, "no_timestamps": -1, "prompt_length": 2, "eos_count": len(ends), "pad": 7}
    rules = [{**given, **choice}.get(field, 0) for field in decode_tokens.Rules._fields]
    marks = torch.zeros(vocab, dtype=torch.uint8, device=device)
    for bit, tokens in choice.get("marks", {}).items():
        marks[list(tokens)] |= bit
    all_ends = torch.zeros(16, dtype=torch.int64, device=device)
    all_ends[: len(ends)] = torch.tensor(ends, dtype=torch.int64)
    written = {
        "logprobs": torch.full(model.tokens.shape, torch.nan, device=device),
        "unfinished": torch.ones(1, dtype=torch.uint8, device=device),
        "steps": torch.full((1,), 5, device=device),
        "seen": torch.zeros(1, dtype=torch.int64, device=device),
    }
    model.choice, model.count = [*written.values(), marks, torch.tensor(rules, device=device), all_ends], count
    return written


def chosen(logits, tokens, choice):
    """The token that transformers' processors let be chosen behind `tokens`, and its log-probability, in float64."""
    from transformers import GenerationConfig
    from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

    scores = logits.double().cpu()
    for bit, marked in choice.get("marks", {}).items():
        if bit == 1 or tokens.shape[1] < choice["min_length"]:
            scores[:, list(marked)] = -torch.inf
    if "timestamp_begin" in choice:
        names = {"no_timestamps_token_id": choice["no_timestamps"], "eos_token_id": choice["text_end"]}
        config = GenerationConfig(**names, bos_token_id=choice["text_end"])
        processor = WhisperTimeStampLogitsProcessor(
            config, choice["begin_index"], _detect_timestamp_from_logprob=bool(choice["detect"])
        )
        processor.timestamp_begin = choice["timestamp_begin"]
        scores = processor(tokens.cpu(), scores)
    token = scores.argmax(-1)
    return int(token), float(scores.log_softmax(-1)[0, token])


def counts(model, written):
    return int(model.keep[0]), int(written["steps"]), int(written["seen"])


def compare_choice(model, slot, steps, choice, run):
    """`steps` tokens in one launch, and in two, against as many launches for logits and transformers' choice."""
    begun = [[cache.clone() for cache in layer[:2]] for layer in model.caches], model.tokens.clone()

    def restart():
        for layer, caches in zip(model.caches, begun[0]):
            for cache, kept in zip(layer, caches):
                cache.copy_(kept)
        model.tokens.copy_(begun[1])
        model.finished.zero_()

    model.count, logprobs = 0, []
    for at in range(slot, slot + steps):
        run(model, at, 3)
        logits = model.result().float()
        token, logprob = chosen(logits, model.tokens[:, : at + 1], choice)
        model.tokens[:, at + 1] = token
        logprobs.append(logprob)
    wanted = model.tokens.clone(), model.result().clone(), [cache.clone() for layer in model.caches for cache in layer]
    first = slot + 1 - 2  # of the log-probabilities
    for launches in ([steps], [1, steps - 1]):
        restart()
        written, at = give_choice(model, choice, 0), slot
        for model.count in launches:
            run(model, at, 3)
            at += model.count
        assert torch.equal(model.tokens, wanted[0])
        assert torch.equal(model.result(), wanted[1])
        assert all(map(torch.equal, (cache for layer in model.caches for cache in layer), wanted[2]))
        found = written["logprobs"][0]
        assert torch.allclose(found[first : first + steps].double().cpu(), torch.tensor(logprobs).double(), atol=1e-4)
        assert found.isnan().sum() == len(found) - steps
        assert counts(model, written) == (slot + 1 + steps, 5 + steps, slot - 1 + steps)
        assert int(written["unfinished"]) == 1 and int(model.finished) == 0
    # The tokens up to one that ends the row, and no further.
    restart()
    new = wanted[0][0, slot + 1 : slot + 1 + steps].tolist()
    end, never = new[2], next(token for token in range(steps + 1) if token not in new)
    done = new.index(end) + 1
    written = give_choice(model, choice, steps, (never, end))
    run(model, slot, 3)
    assert torch.equal(model.tokens[:, : slot + 1 + done], wanted[0][:, : slot + 1 + done])
    assert torch.equal(model.tokens[:, slot + 1 + done :], begun[1][:, slot + 1 + done :])
    assert counts(model, written) == (slot + 1 + done, 5 + done, 1 - slot - done)
    assert int(written["unfinished"]) == 0 and int(model.finished) == 1
    # Nothing more is done, but that whoever waits is told; and a row that has finished goes on as padding.
    written["seen"].zero_()
    kept = [tensor.clone() for tensor in (model.tokens, *model.work)]
    run(model, slot + done, 3)
    assert all(map(torch.equal, (model.tokens, *model.work), kept))
    assert counts(model, written) == (slot + 1 + done, 5 + done, 1 - slot - done)
    model.finished.zero_()
    run(model, slot + done, 3)
    assert int(model.tokens[0, slot + done + 1]) == 7 and int(model.finished) == 1
    restart()
    model.choice, model.count = [None] * 7, 0


SMALL = ops.Shape(128, 512, 2, 300, 50, False, 16, 0, 12, 120_000)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: the kernel cannot be emulated")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bfloat16": True},
        {"bits": 4, "group_size": 64},
        {"bits": 8, "group_size": 64, "bfloat16": True},
        {"bits": 3, "group_size": 32},
        {"bits": 2, "group_size": 16},
        {"bits": 1.58, "group_size": 16},
        # Blocks of 32 elements of which each half has another scale, for all that groups are of 64.
        {"bits": 1.58, "group_size": 64},
        # Steps that share a home in shared memory, two by two: one pair, two, all three.
        {"memory": 100_000},
        {"bits": 8, "group_size": 64, "memory": 72_000},
        {"memory": 91_000, "vocab": 2999, "bfloat16": True},
        # Weights that go around a ring, as they do not fit into shared memory.
        {"memory": 72_000},
        {"bits": 4, "group_size": 64, "source": 300, "memory": 52_000},
        # Eight rows to a program: half of a tile is free.
        {"bits": 4, "group_size": 64, "programs": 16},
        {"bits": 3, "group_size": 64, "programs": 16, "memory": 60_000},
        # Runs of one group in one warp.
        {"bits": 4, "group_size": 64, "width": 1024, "ffn": 1024, "programs": 66, "memory": 200_000},
        # The head in the kernel: all of it fits into shared memory at once, does not, or follows a ring.
        {"vocab": 120},
        {"bits": 4, "group_size": 64, "vocab": 3001},
        {"memory": 72_000, "vocab": 2999, "bfloat16": True},
        {"bits": 3, "group_size": 64, "programs": 16, "memory": 60_000, "vocab": 1500},
        # Packed itself: lanes that have nothing of a row, groups that two of a row's halves share, float16 layers.
        {"bits": 4, "group_size": 64, "vocab": 3001, "head_bits": 4, "head_group_size": 64},
        {"bits": 2, "group_size": 16, "vocab": 3001, "head_bits": 8, "head_group_size": 16, "bfloat16": True},
        {"width": 192, "ffn": 768, "programs": 16, "vocab": 2999, "head_bits": 4, "head_group_size": 192},
        # Cross-attention in 8 bits: few keys to a program, several tiles, a home of their own, a shared one, a ring.
        {"cross_int8": True},
        {"cross_int8": True, "source": 1130, "bits": 4, "group_size": 64},
        {"cross_int8": True, "source": 947, "bits": 8, "group_size": 64, "memory": 94_000, "bfloat16": True},
        {"cross_int8": True, "source": 1500, "memory": 118_000},
        {"cross_int8": True, "source": 947, "bits": 8, "group_size": 64, "memory": 80_000, "vocab": 2999},
        # Programs that have none of the hidden layer.
        {"ffn": 192, "programs": 16, "layers": 4},
        {"batch": 3, "ffn": 192, "programs": 16, "layers": 4},
        {"batch": 16, "memory": 200_000},
        {"batch": 8, "bits": 8, "group_size": 64, "bfloat16": True},
        {"batch": 4, "bits": 4, "group_size": 64, "beams": 2},
        {"batch": 12, "bits": 3, "group_size": 32, "memory": 200_000},
        {"batch": 5, "bits": 2, "group_size": 16},
        {"batch": 2, "bits": 1.58, "group_size": 16},
        {"batch": 10, "cross_int8": True, "beams": 5, "bfloat16": True, "memory": 200_000},
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()) or "float16",
)
def test_emulated(changes):
    model = Model(SMALL._replace(**changes))
    assert ops.why_not(model.shape) is None
    for slot in (0, 1):
        compare(model, slot, 0, emulate)
    model.valid[0, :3] = False
    for seed, (slot, offset) in enumerate(((5, 3), (127, 0), (128, 0), (256, 1), (299, 3), (4, 3))):
        compare(model, slot, offset, functools.partial(emulate, seed=seed))
    # Whatever ran before.
    result = model.result().clone()
    emulate(model, 4, 3, seed)
    assert torch.equal(model.result(), result)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: the kernel cannot be emulated")
@pytest.mark.parametrize(
    "changes, choices",
    [
        ({}, CHOICES),
        ({"bits": 4, "group_size": 64, "vocab": 3001}, [PLAIN, STAMPED]),
        ({"memory": 72_000, "vocab": 2999, "bfloat16": True}, [STAMPED, MARKED]),
        ({"bits": 8, "group_size": 64, "memory": 70_000, "vocab": 3001}, [STAMPED]),
        ({"bits": 3, "group_size": 64, "programs": 16, "memory": 60_000, "vocab": 1500}, [STAMPED]),
        (
            {"bits": 4, "group_size": 64, "memory": 60_000, "vocab": 3001, "head_bits": 8, "head_group_size": 64},
            [STAMPED],
        ),
        ({"bits": 2, "group_size": 16, "vocab": 2000, "head_bits": 4, "head_group_size": 32}, [MARKED]),
        ({"bits": 4, "group_size": 64, "cross_int8": True, "source": 1130}, [STAMPED]),
        ({"ffn": 192, "programs": 16, "layers": 4}, [MARKED]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_emulated_choice(changes, choices):
    model = Model(SMALL._replace(**{"vocab": 120, "chooses": True, **changes}))
    for seed, choice in enumerate(choices):
        compare_choice(model, 125, 4, choice, functools.partial(emulate, seed=seed))
    compare(model, 5, 3, emulate)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: the kernel cannot be emulated")
@pytest.mark.parametrize(
    "memory, batch, vocab", [(SMALL.memory, 1, 0), (72_000, 1, 0), (72_000, 1, 120), (SMALL.memory, 3, 0)]
)
def test_emulated_when_all_rows_have_finished(memory, batch, vocab):
    model = Model(SMALL._replace(batch=batch, memory=memory, vocab=vocab))
    compare(model, 5, 0, emulate)
    written = [model.result(), *([] if vocab else [model.stats]), *model.work, *model.caches[0]]
    kept = [tensor.clone() for tensor in written]
    model.finished.fill_(1)
    emulate(model, 6)
    assert all(map(torch.equal, written, kept))
    model.finished.zero_()
    compare(model, 6, 0, emulate)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: the kernel cannot be emulated")
@pytest.mark.parametrize(
    "batch, bits, group_size, changes",
    [
        (1, 16, 0, {}),
        (1, 4, 64, {}),
        (1, 3, 32, {}),
        (1, 2, 16, {"head_bits": 4, "head_group_size": 64}),
        (1, 16, 0, {"cross_int8": True}),
        (1, 8, 64, {"cross_int8": True}),
        (8, 16, 0, {}),
        (4, 4, 64, {}),
    ],
    ids=str,
)
def test_emulated_on_all_of_a_gpu(batch, bits, group_size, changes):
    """The kernel as it runs for large-v2 on an H100, two layers of it: what small shapes do not have, a full ring."""
    vocab = 20_000 if batch == 1 else 0
    shape = ops.Shape(1280, 5120, 2, 448, 1500, False, bits, group_size, 132, 232448, batch, vocab=vocab)
    shape = shape._replace(chooses=bits in (8, 4, 2) and batch == 1, **changes)
    compare(Model(shape), 260, 3, emulate)


def assert_compiles(shape, claim="true"):
    """What the source asserts of itself, and `claim`, hold for `shape`."""
    defines = [f"-D{name}={value}" for name, value in ops.definitions(shape).items()]
    command = ["g++", "-std=c++17", "-w", "-fsyntax-only", "-DEMULATED", *defines, "-include", str(EMULATION)]
    source = f'{ops.source_of(shape)}\nstatic_assert({claim}, "");\n'
    result = subprocess.run([*command, "-x", "c++", "-"], input=source, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: the kernel cannot be emulated")
@pytest.mark.parametrize("batch, cross_int8", [(1, False), (1, True), (2, False), (16, True)])
@pytest.mark.parametrize("width", [384, 512, 768, 1024, 1280])
def test_every_whisper_shape_fits(width, batch, cross_int8):
    """What the source asserts of itself holds for the family, on an H100's multiprocessors and shared memory."""
    vocab = 51866 if batch == 1 else 0
    more_groups = ((8, 32), (4, 32), (4, 16), (3, 16), (1.58, 64)) if batch == 1 else ()
    for bits, group_size in ((16, 0), (8, 64), (4, 64), (3, 32), (2, 16), (1.58, 16), *more_groups):
        size = width, 4 * width, 4, 448, 1500
        shape = ops.Shape(*size, False, bits, group_size, 132, 232448, batch, cross_int8, vocab=vocab)
        shape = shape._replace(chooses=vocab > 0)
        if ops.why_not(shape) is not None:
            assert bits == 1.58
            continue
        assert_compiles(shape)
        for head in ((8, 64), (4, 16)) if vocab and (bits, group_size) in ((8, 64), (2, 16)) else ():
            assert_compiles(shape._replace(head_bits=head[0], head_group_size=head[1]))


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: the kernel cannot be emulated")
@pytest.mark.parametrize("bits, group_size", [(16, 0), (8, 128), (4, 16), (3, 16), (2, 64), (1.58, 64)])
def test_other_shapes_fit(bits, group_size):
    sizes = [(64, 64), (128, 4096), (640, 1280), (768, 256), (1280, 1280), (1280, 2560)]
    shapes = [ops.Shape(*size, 32, 448, 1500, False, bits, group_size, 132, 232448) for size in sizes]
    served = [shape for shape in shapes if ops.why_not(shape) is None and not (group_size and shape.ffn % group_size)]
    assert served
    for shape in served:
        assert_compiles(shape)
        assert_compiles(shape._replace(vocab=51866, chooses=True))


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: the kernel cannot be emulated")
@pytest.mark.parametrize(
    "changes, pairs",
    [
        ({}, 0),
        ({"memory": 100_000}, 1),
        ({"bits": 8, "group_size": 64, "memory": 72_000}, 2),
        ({"memory": 91_000, "vocab": 2999, "bfloat16": True}, 3),
        ({"bits": 8, "group_size": 64, "memory": 70_000, "vocab": 3001, "chooses": True}, 3),
        ({"cross_int8": True, "source": 1130, "bits": 4, "group_size": 64}, 0),
        ({"cross_int8": True, "source": 947, "bits": 8, "group_size": 64, "memory": 94_000, "bfloat16": True}, 2),
        ({"cross_int8": True, "source": 1500, "memory": 118_000}, 3),
    ],
)
def test_steps_share_homes(changes, pairs):
    """The emulated cases above that are to have steps share homes do, as many as they say."""
    assert_compiles(SMALL._replace(**changes), f"AT_HOME && PAIRS == {pairs}")


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: the kernel cannot be emulated")
@pytest.mark.parametrize(
    "memory, changes",
    [
        (72_000, {}),
        (52_000, {"bits": 4, "group_size": 64, "source": 300}),
        (80_000, {"cross_int8": True, "source": 947, "bits": 8, "group_size": 64, "vocab": 2999}),
    ],
)
def test_what_does_not_fit_goes_around_a_ring(memory, changes):
    assert_compiles(SMALL._replace(memory=memory, **changes), "!AT_HOME")


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: the kernel cannot be emulated")
def test_orders_that_wait_for_themselves_do_not_compile():
    """Of orders in which a layer's weights and keys are fetched, the source knows those that would never end."""
    # The last keys, or the last weights, of a layer behind the first of the next one's; a step left out.
    wrong = "QSOUKCFDk", "KQSOUCFDk", "QSOUKCFDf", "QSOUKCF", "QSOUCFD"
    right = "QSOUKCFD", "QSOUKCFd", "QSOUkKCFD", "kQSOUKCFD", "fkDQSUOKCF", "DFCKUOSQ"
    claims = [*(f'!ends("{letters}")' for letters in wrong), *(f'ends("{letters}")' for letters in right)]
    assert_compiles(SMALL, f"AT_HOME && PAIRS == 0 && KEY_CHUNKS > 1 && {' && '.join(claims)}")
    # Of two steps with one home the later one is fetched when the earlier has been read.
    pairs = SMALL._replace(memory=91_000, vocab=2999, bfloat16=True)
    assert_compiles(pairs, 'PAIRS == 3 && ends("QScfdOUK") && !ends("QSOUcfdK") && !ends("QSfOKcUd")')


def op_arguments(model, slot, offset):
    """What the op takes for a launch of `model`."""
    outputs, inputs = model.operands(slot, offset)
    caches = [buffer for layer in model.buffers for buffer in layer]
    inputs, head, eps = inputs[:-9], inputs[-9:-1], inputs[-1]
    weights = model.shape.ffn, float(model.shape.bits), model.shape.group_size
    packed = model.shape.head_bits, model.shape.head_group_size
    return *outputs, caches, *inputs, *weights, *head, *packed, eps, *model.choice, model.count


def run(model, slot, offset):
    ops.decode_layers(*op_arguments(model, slot, offset))
    torch.cuda.synchronize()


def on_this_gpu(width, bits, group_size, dtype, *rows, **head):
    if torch.cuda.get_device_capability() != ops.CAPABILITY:
        pytest.skip(f"the persistent kernel is made for compute capability {ops.CAPABILITY[0]}.{ops.CAPABILITY[1]}")
    properties = torch.cuda.get_device_properties(0)
    programs, memory = properties.multi_processor_count, properties.shared_memory_per_block_optin
    size = width, 4 * width, 2, 448, 1500
    shape = ops.Shape(*size, dtype == "bfloat16", bits, group_size, programs, memory, *rows)
    shape = shape._replace(**head)
    reason = ops.why_not(shape)
    if reason is not None:
        assert bits == 1.58
        pytest.skip(reason)
    return shape


def check_on_a_gpu(shape):
    model = Model(shape, "cuda")
    if shape.chooses:
        for choice in CHOICES:
            compare_choice(model, 125, 8, choice, run)
    for slot in (0, 1):
        compare(model, slot, 0, run)
    model.valid[0, :3] = False
    for slot, offset in ((5, 3), (127, 0), (128, 0), (256, 0), (257, 3), (447, 3), (4, 3)):
        compare(model, slot, offset, run)
    result = model.result()
    first = result.clone()
    model.finished.fill_(1)
    result.fill_(torch.nan)
    run(model, 4, 3)
    assert result.isnan().all()
    model.finished.zero_()
    for _ in range(20):
        run(model, 4, 3)
        assert torch.equal(result, first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits, group_size", [(16, 0), (8, 64), (4, 64), (3, 32), (2, 16), (1.58, 16)])
@pytest.mark.parametrize(
    "width, vocab, chooses",
    [(384, 51865, True), (512, 0, False), (768, 51865, False), (1280, 0, False), (1280, 51866, True)],
)
def test_on_a_gpu(width, vocab, chooses, bits, group_size, dtype):
    check_on_a_gpu(on_this_gpu(width, bits, group_size, dtype, vocab=vocab, chooses=chooses))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits, group_size", [(16, 0), (8, 64), (4, 64), (3, 32), (2, 16), (1.58, 16)])
@pytest.mark.parametrize("width, vocab, chooses", [(384, 51865, False), (1280, 51866, True)])
def test_cross_attention_in_8_bits_on_a_gpu(width, vocab, chooses, bits, group_size, dtype):
    check_on_a_gpu(on_this_gpu(width, bits, group_size, dtype, 1, True, vocab=vocab, chooses=chooses))


@pytest.mark.gpu
@pytest.mark.parametrize("bits, group_size", [(4, 32), (3, 16), (4, 16), (8, 32)])
def test_groups_on_a_gpu(bits, group_size):
    """Groups with which large-v2's layers fit into an H100's shared memory as some steps share a home, or do not."""
    check_on_a_gpu(on_this_gpu(1280, bits, group_size, "float16", vocab=51866, chooses=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_bits, head_group_size", [(8, 64), (4, 64), (4, 32)])
@pytest.mark.parametrize(
    "width, bits, group_size", [(384, 4, 64), (768, 2, 16), (1280, 8, 64), (1280, 4, 64), (1280, 2, 16)]
)
def test_a_packed_head_on_a_gpu(width, bits, group_size, head_bits, head_group_size, dtype):
    head = {"vocab": 51866, "chooses": True, "head_bits": head_bits, "head_group_size": head_group_size}
    check_on_a_gpu(on_this_gpu(width, bits, group_size, dtype, **head))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits, group_size", [(16, 0), (8, 64), (4, 64), (3, 32), (2, 16), (1.58, 16)])
@pytest.mark.parametrize(
    "width, rows", [(384, (4,)), (512, (10, False, 5)), (1280, (2, True)), (1280, (8,)), (1280, (16, True))], ids=str
)
def test_rows_on_a_gpu(width, rows, bits, group_size, dtype):
    check_on_a_gpu(on_this_gpu(width, bits, group_size, dtype, *rows))


def check_op(model):
    """The op writes what it says that it writes: layers alone, with the head, with the choice of two tokens."""
    if model.shape.chooses:
        give_choice(model, PLAIN, 2)
    before = [cache.clone() for layer in model.caches for cache in layer[:2]]
    op = torch.ops.whisper_static_cache.decode_layers.default
    torch.library.opcheck(op, op_arguments(model, 5, 3), test_utils=("test_schema", "test_faketensor"))
    # It did run: tensors are passed as copies, but the caches are where the table's pointers say.
    assert not all(map(torch.equal, (cache for layer in model.caches for cache in layer[:2]), before))


CHECKED = pytest.mark.parametrize(
    "head",
    [
        {},
        {"vocab": ROWS},
        {"vocab": ROWS, "chooses": True},
        {"vocab": ROWS, "chooses": True, "head_bits": 4, "head_group_size": 64},
    ],
    ids=str,
)


@CHECKED
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: the kernel cannot be emulated")
def test_opcheck_emulated(head):
    model = Model(SMALL._replace(bits=4, group_size=64, **head))

    on_the_cpu = functools.partial(launch_as_emulated, model.shape)
    with torch.library._scoped_library("whisper_static_cache", "IMPL") as library:
        library.impl("decode_layers", on_the_cpu, "CPU")
        check_op(model)


@CHECKED
@pytest.mark.gpu
def test_opcheck_on_a_gpu(head):
    check_op(Model(on_this_gpu(384, 4, 64, "float16", **head), "cuda"))


def test_what_is_not_served():
    assert ops.why_not(SMALL) is None
    assert "compute capability" in ops.why_not(SMALL, (8, 0))
    assert "64 dimensions" in ops.why_not(SMALL._replace(width=100))
    assert "even" in ops.why_not(SMALL._replace(layers=3))
    assert "tile" in ops.why_not(SMALL._replace(programs=4))
    assert "too many" in ops.why_not(SMALL._replace(slots=448 * 8))
    assert "too much" in ops.why_not(SMALL._replace(ffn=4096, programs=16))
    assert "too much" in ops.why_not(SMALL._replace(ffn=1280, programs=64))
    for width in (384, 512, 768, 1024, 1280):
        for programs in (114, 132):
            assert ops.why_not(SMALL._replace(width=width, ffn=4 * width, slots=448, programs=programs)) is None
    assert "hidden layer" in ops.why_not(SMALL._replace(ffn=192))
    assert "17 rows" in ops.why_not(SMALL._replace(batch=17))
    assert ops.why_not(SMALL._replace(cross_int8=True)) is None
    assert ops.why_not(SMALL._replace(batch=2, slots=448 * 8)) is None


def test_what_is_asked_for_keeps_the_pace_of_the_memory():
    def device(**properties):
        return ops.bandwidth_of(SimpleNamespace(clock_rate=1_980_000, **properties))

    h100, h200 = (
        device(memory_clock_rate=2_619_000, memory_bus_width=5120),
        device(memory_clock_rate=3_201_000, memory_bus_width=6016),
    )
    assert (h100, h200) == (1693, 2431)
    assert device() == h100, "what torch does not know"
    assert device(memory_clock_rate=0, memory_bus_width=5120) == h100, "what the driver does not tell"
    whole = SMALL._replace(width=1280, ffn=5120, programs=132)
    assert [whole._replace(bandwidth=bandwidth).pace for bandwidth in (h100, h200)] == [15, 22]
    assert [whole._replace(bits=4, bandwidth=bandwidth).pace for bandwidth in (h100, h200)] == [12, 17]
    assert SMALL._replace(bandwidth=1).pace == 1
    assert ops.definitions(whole)["PACE"] == 15


def test_scales_that_halves_cannot_take():
    def weight(scale, dtype):
        return Weight(None, torch.full((2, 2), scale, dtype=dtype), None, 4, 64, 128)

    assert ops.scales_fit([weight(0.1, torch.float16), weight(-120.0, torch.float16)])
    assert not ops.scales_fit([weight(0.1, torch.float16), weight(-130.0, torch.float16)])
    assert ops.scales_fit([weight(1e9, torch.bfloat16)])
    assert ops.scales_fit([Weight(None, None, None, 16, 0, 128)])
    assert "multiples of 128" in ops.why_not(SMALL._replace(bits=3, group_size=32, ffn=576, programs=16))
    assert "group_size 8" in ops.why_not(SMALL._replace(bits=4, group_size=8))
    assert "runs of 32 bytes" in ops.why_not(
        SMALL._replace(bits=1.58, group_size=16, width=384, ffn=1536, programs=132)
    )


def test_heads_that_are_not_served():
    def head(bits=4, group_size=64, dtype=torch.float16, rows=64):
        values = torch.zeros(rows, 32, dtype=torch.uint8)
        scales = torch.zeros(rows, 64 // group_size, dtype=dtype)
        return Weight(values, scales, scales.clone(), bits, group_size, 64)

    whole = Weight(torch.zeros(64, 64, dtype=torch.float16), None, None, 16, 0, 64)
    for served in (head(), head(8), whole):
        assert ops.why_no_head(served, torch.float16) is None
    assert "a head in 3 bits" in ops.why_no_head(head(3), torch.float16)
    assert "a head in 32 bits" in ops.why_no_head(whole._replace(bits=32), torch.float32)
    assert "group_size 8" in ops.why_no_head(head(group_size=8), torch.float16)
    assert "another dtype" in ops.why_no_head(head(dtype=torch.bfloat16), torch.float16)
    assert "another dtype" in ops.why_no_head(whole, torch.bfloat16)
    assert "aligned" in ops.why_no_head(whole._replace(values=torch.zeros(64, 65).half()[:, 1:]), torch.float16)
    assert "65536 tokens" in ops.why_no_head(head(rows=1 << 16), torch.float16)


def test_tokens_are_not_chosen_without_rules():
    # The op's own function: on a CPU the op has none. It asks before it looks at anything else.
    arguments = len(inspect.signature(ops.decode_layers._init_fn).parameters)
    with pytest.raises(ValueError, match="count=3, but tokens cannot be chosen without rules"):
        ops.decode_layers._init_fn(*[None] * (arguments - 1), 3)


def test_pointers_must_be_aligned():
    whole = torch.zeros(64, dtype=torch.float16)
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        ops.pointer_table([[whole[1:]] * ops.POINTERS])
    with pytest.raises(ValueError, match="contiguous"):
        ops.pointer_table([[whole.view(8, 8).T] * ops.POINTERS])
