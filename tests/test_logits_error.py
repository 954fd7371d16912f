"""Logits of whole models, teacher-forced: the Triton engine rounds no worse than stock transformers in half precision.

Both decode the same tokens with the same half-precision weights, and both are compared with stock in float32 on these
weights cast up, by the root mean square over steps and vocabulary of the difference. The bound is stock's own error
times 1.0, plus an allowance for the two being finite samples of rounding errors. Errors of a step are taken for wholly
dependent, those of different steps for independent; then the logarithm of the quotient of two mean squares over `n`
steps of Gaussian errors has the standard deviation sqrt(4 / n), that of the root mean squares sqrt(1 / n). Two of
these are allowed: 1.14 over 200 steps.

On a GPU the models have the real checkpoints' shapes or are these; elsewhere a tiny one runs in Triton's interpreter,
over fewer steps.
"""

import math

import pytest
import torch


pytest.importorskip("triton", reason="needs the triton package")

from transformers import DynamicCache, EncoderDecoderCache

from whisper_static_cache._compat import CACHE_NAME
from whisper_static_cache.cache_utils import EncoderDecoderStaticCache
from whisper_static_cache.ops import decode_dot, launch
from whisper_static_cache.sessions import Session
from whisper_static_cache.triton_engine import TritonEngine

from .conftest import tiny_model


HALVES = (torch.float16, torch.bfloat16)
STEPS = 200


def stock_logits(model, tokens, states):
    """Float32 `(steps, vocab_size)` logits of stock's decoder, a token at a time on a cache that grows."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    steps = []
    with torch.no_grad():
        for token in tokens:
            output = model(
                encoder_outputs=(states,), decoder_input_ids=token.view(1, 1), **{CACHE_NAME: cache}, use_cache=True
            )
            cache = output[CACHE_NAME]
            steps.append(output.logits[0, -1].float())
    return torch.stack(steps)


def engine_logits(model, tokens, states, count):
    """The same of the Triton engine, called as its loop does, with `count` rows of which all are the same."""
    cache = EncoderDecoderStaticCache(
        model.config, count, max_source_len=states.shape[1], dtype=model.dtype, device=model.device
    )
    session, engine = Session(cache), TritonEngine(model)
    rows = session.rows(count)
    with torch.no_grad():
        engine.prepare(rows)
        logits, _ = engine.prefill(rows, tokens[None, :1].expand(count, -1), states.expand(count, -1, -1))
        steps = [logits[0].clone()]
        for slot in range(1, len(tokens)):
            rows.tokens[:, slot] = tokens[slot]
            session.length.fill_(slot + 1)
            steps.append(engine.step(rows, slot)[0].clone())
    return torch.stack(steps)


def assert_no_worse_than_stock(model, dtype, steps, count=1):
    config = model.config
    generator = torch.Generator().manual_seed(5)
    device = model.device
    tokens = torch.randint(0, config.vocab_size, (steps,), generator=generator).to(device)
    states = torch.randn(1, config.max_source_positions, config.d_model, generator=generator).to(device, dtype)
    half = model.to(dtype)
    assert TritonEngine.why_not(half, device) is None
    ours, stock = engine_logits(half, tokens, states, count), stock_logits(half, tokens, states)
    # The weights as rounded: what is compared is arithmetic.
    reference = stock_logits(half.float(), tokens, states.float())

    def error(logits):
        return (logits - reference).double().square().mean().sqrt().item()

    scale = reference.double().std().item()
    # A sound comparison at all: stock is off by rounding, not by another computation, and off at all.
    assert 0 < error(stock) < 0.1 * scale
    limit = error(stock) * (1 + 2 * math.sqrt(1 / steps))
    assert error(ours) <= limit, f"{error(ours):.3e} against stock's {error(stock):.3e}, logits of {scale:.3e}"


def random_model(**overrides):
    shape = {"d_model": 128, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 192}
    return tiny_model(6, **{**shape, "max_target_positions": STEPS + 8, **overrides})


@pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1; on a GPU the tests below stand for it")
@pytest.mark.parametrize("count", [1, 12])
@pytest.mark.parametrize("dtype", HALVES)
def test_interpreted_on_a_small_model(dtype, count, monkeypatch):
    # A GPU so small that of many rows the wide products go through tiles.
    monkeypatch.setattr(decode_dot, "room", lambda device: (2, 100 * 1024))
    shape = {"d_model": 64, "encoder_attention_heads": 1, "decoder_attention_heads": 1, "decoder_ffn_dim": 64}
    assert_no_worse_than_stock(random_model(decoder_layers=1, **shape), dtype, steps=8, count=count)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"max_source_positions": 600, "decoder_layers": 4, "vocab_size": 1000},
        # The shape of whisper-tiny's decoder, and half the layers of large-v2's turbo.
        {"d_model": 384, "decoder_attention_heads": 6, "encoder_attention_heads": 6, "decoder_ffn_dim": 1536,
         "decoder_layers": 4, "max_source_positions": 1500, "max_target_positions": 448, "vocab_size": 51865},
        {"d_model": 1280, "decoder_attention_heads": 20, "encoder_attention_heads": 20, "decoder_ffn_dim": 5120,
         "decoder_layers": 2, "max_source_positions": 1500, "max_target_positions": 448, "vocab_size": 51866},
    ],
    ids=["two-heads", "600-positions", "tiny", "turbo-of-2-layers"],
)  # fmt: skip
@pytest.mark.parametrize("count", [1, 16])
def test_random_weights(count, overrides, dtype):
    model = random_model(**overrides)
    # Weights of 0.25, as the other tests' small models have them, saturate attention and amplify every rounding.
    with torch.no_grad():
        for parameter in model.model.decoder.parameters():
            if parameter.dim() > 1:
                parameter.div_(0.25 * math.sqrt(model.config.d_model))
    assert_no_worse_than_stock(model.cuda(), dtype, STEPS, count)


@pytest.mark.gpu
@pytest.mark.checkpoint
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["tiny.en", "base"])
def test_real_checkpoints(name, dtype):
    from whisper_static_cache.checkpoints import load_checkpoint

    assert_no_worse_than_stock(load_checkpoint(name)[0].cuda(), dtype, STEPS)
