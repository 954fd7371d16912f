"""Time the decoder's part of `generate`, patched beside stock, on the installed transformers, on the CPU.

python benchmarks/release_speed.py                    # print a row
python benchmarks/release_speed.py --output row.json  # and write it

The model has the shape of whisper-tiny.en and random weights, so that nothing is fetched and every release runs the
same one; the encoder's output is given. Stock and patched take turns in one process, so that what else the machine
does falls on both, and the ratio is the median over the turns.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

import whisper_static_cache


def tiny_english_shape():
    """A random model of whisper-tiny.en's shape, with logits wide enough apart that rounding decides no token."""
    config = WhisperConfig(
        vocab_size=51864,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        pad_token_id=50256,
        bos_token_id=50256,
        eos_token_id=50256,
        decoder_start_token_id=50257,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.05)
        # Far apart, so that the tokens differ from place to place.
        model.model.decoder.embed_positions.weight.normal_(0.0, 1.0)
    model.generation_config = GenerationConfig(
        pad_token_id=50256,
        bos_token_id=50256,
        eos_token_id=50256,
        decoder_start_token_id=50257,
        no_timestamps_token_id=50362,
        is_multilingual=False,
        max_length=448,
    )
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default 7)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a call (default 64)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--output", type=Path, help="write the row there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = tiny_english_shape()
    features = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        encoded = model.model.encoder(features)
    length = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens}

    def timed():
        started = time.perf_counter()
        tokens = model.generate(encoder_outputs=encoded, **length)
        return time.perf_counter() - started, tokens

    def turn():
        stock = timed()
        with whisper_static_cache.patched(engine="eager"):
            ours = timed()
            assert whisper_static_cache.last_run(model).reason is None, whisper_static_cache.last_run(model)
        return stock, ours

    turn()  # warm-up
    turns = [turn() for _ in range(options.rounds)]
    seconds = [statistics.median(pair[which][0] for pair in turns) for which in (0, 1)]
    row = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "cpu": platform.machine(),
        "threads": options.threads,
        "engine": "eager",
        "new_tokens": options.tokens,
        "rounds": options.rounds,
        "stock_seconds": round(seconds[0], 4),
        "patched_seconds": round(seconds[1], 4),
        "ratio": round(statistics.median(stock[0] / ours[0] for stock, ours in turns), 3),
        "tokens_identical": all(torch.equal(stock[1], ours[1]) for stock, ours in turns),
        "distinct_tokens": len(set(turns[0][0][1][0].tolist())),
        # Of the whole machine, this process included: above 1 somebody else was at work.
        "load": round(os.getloadavg()[0], 1),
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(row))
    if options.output:
        options.output.write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
