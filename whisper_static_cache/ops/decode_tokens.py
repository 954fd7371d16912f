"""The two ends of a one-token step: the embedding of the newest token, and the choice of the next one.

Greedy choice under the rules that Whisper's decoding knows: suppressed tokens, a least number of tokens, timestamps.
They are those of transformers' `SuppressTokensLogitsProcessor`, `MinNewTokensLengthLogitsProcessor` and
`WhisperTimeStampLogitsProcessor`, the last in the order in which `generate` puts them, as tensor code in
`logits_processors`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import let_successor_start, options, start, wait_for_predecessor


# Bits of a token's entry in the table of rules.
SUPPRESSED, SUPPRESSED_EARLY = 1, 2
_BLOCK = 1024


class Rules(NamedTuple):
    """The rules of one call as numbers, in the order of the kernel's table; every one an int.

    `min_length` is the length below which tokens marked SUPPRESSED_EARLY may not be chosen. `eos_count` says whether
    rows can finish, on the tokens of the table of ends. The rest is WhisperTimeStampLogitsProcessor's;
    `timestamp_begin` is the size of the vocabulary where there are no timestamps.
    """

    min_length: int
    eos_count: int
    pad: int
    prompt_length: int
    begin_index: int
    timestamp_begin: int
    no_timestamps: int
    text_end: int
    detect: int


@triton.jit
def _embed_kernel(
    out_ptr, gained_ptr, stats_ptr, tokens_ptr, length_ptr, offset_ptr, embedding_ptr, positions_ptr, gain_ptr,
    stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # Launched the ordinary way: the step before, which chose the token, is over.
    let_successor_start(OVERLAP)
    row = tl.program_id(0)
    slot = tl.load(length_ptr) - 1
    token = tl.load(tokens_ptr + row * stride + slot)
    # Rows that only pad the batch may hold anything.
    position = tl.maximum(slot - tl.load(offset_ptr + row), 0)
    index = tl.arange(0, BLOCK)
    inside = index < WIDTH
    value = tl.load(embedding_ptr + token * WIDTH + index, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(positions_ptr + position * WIDTH + index, mask=inside, other=0.0).to(tl.float32)
    wait_for_predecessor(OVERLAP)
    tl.store(out_ptr + row * WIDTH + index, value, mask=inside)
    gain = tl.load(gain_ptr + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(gained_ptr + row * WIDTH + index, value * gain, mask=inside)
    tl.store(stats_ptr + row, tl.sum(value, axis=0))
    tl.store(stats_ptr + ROWS + row, tl.sum(value * value, axis=0))


@torch.library.custom_op(
    "whisper_static_cache::embed_newest", mutates_args=("out", "gained", "stats"), device_types=("cpu", "cuda")
)
def embed_newest(
    out: torch.Tensor,
    gained: torch.Tensor,
    stats: torch.Tensor,
    tokens: torch.Tensor,
    length: torch.Tensor,
    position_offset: torch.Tensor,
    embedding: torch.Tensor,
    positions: torch.Tensor,
    gain: torch.Tensor,
) -> None:
    """Sum of the token's and the position's embedding, for the token in slot ``length - 1`` of each row.

    Args:
        out: float32 ``(rows, d_model)``, written.
        gained, stats: float32, written: `out` times the gain of the first layer norm, and ``(2, rows, 1)`` sums and
            sums of squares of `out`, for `decode_linear`.
        tokens: int64 ``(rows, slots)``, rows at any stride.
        length: int64 ``(1,)``.
        position_offset: int64 ``(rows, 1)``, subtracted from the slot.
        embedding, positions: ``(vocab_size, d_model)``, ``(max_target_positions, d_model)``.
        gain: ``(d_model,)``, the first layer norm's weight.
    """
    rows, width = out.shape
    start(
        _embed_kernel,
        (rows,),
        out,
        gained,
        stats,
        tokens,
        length,
        position_offset,
        embedding,
        positions,
        gain,
        tokens.stride(0),
        ROWS=rows,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        **options(out.device, 4, overlap=False),
    )


@embed_newest.register_fake
def _(*args, **kwargs):
    return None


@triton.jit
def _best_kernel(
    scores_ptr, ids_ptr, tokens_ptr, length_ptr, logits_ptr, table_ptr, rules_ptr, stride,
    ROWS: tl.constexpr, VOCAB: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr, HISTORY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_successor_start(OVERLAP)
    row = tl.program_id(0)
    block = tl.program_id(1)
    # All that is read is asked for at once: nothing waits for an address that another load gives.
    ids = block * BLOCK + tl.arange(0, BLOCK)
    inside = ids < VOCAB
    rule = tl.load(table_ptr + ids, mask=inside, other=1).to(tl.int32)
    length = tl.load(length_ptr).to(tl.int32)
    min_length = tl.load(rules_ptr)
    begin_index = tl.load(rules_ptr + 4)
    begin = tl.load(rules_ptr + 5)
    no_timestamps = tl.load(rules_ptr + 6)
    text_end = tl.load(rules_ptr + 7)
    position = tl.arange(0, HISTORY)
    token = tl.load(tokens_ptr + row * stride + position, mask=position < TOKENS, other=0).to(tl.int32)
    wait_for_predecessor(OVERLAP)
    score = tl.load(logits_ptr + row * WIDE + ids, mask=inside, other=-float("inf")).to(tl.float32)

    # Where the timestamps stand. They come in pairs, and never decrease. The newest one, with its position in front:
    stamped = (token >= begin) & (position >= begin_index) & (position < length)
    newest = tl.max(tl.where(stamped, position * VOCAB + token, -1), axis=0)
    before = tl.max(tl.where(stamped & (position == length - 2), 1, 0), axis=0) | (length - begin_index < 2)
    last = (newest >= 0) & (newest // VOCAB == length - 1)
    pair_open = last & (before == 0)
    pair_closed = last & (before != 0)
    earliest = tl.where(newest >= 0, newest % VOCAB + tl.where(pair_open, 0, 1), begin)
    earliest = tl.where(pair_closed, VOCAB, earliest)
    text_begin = tl.where(pair_open, text_end, 0)
    forbidden = tl.where(length < min_length, 3, 1)
    allowed = ((rule & forbidden) == 0) & (ids != no_timestamps) & inside
    is_text = allowed & (ids < begin) & (ids >= text_begin)
    is_stamp = allowed & (ids >= begin) & (ids >= earliest)

    at = row * BLOCKS + block
    plane: tl.constexpr = ROWS * BLOCKS
    # Text first, then timestamps: the best score, the sum of exponentials beside it, the first token that has it.
    for kind in tl.static_range(2):
        kept = tl.where(is_text if kind == 0 else is_stamp, score, -float("inf"))
        best = tl.max(kept, axis=0)
        total = tl.sum(tl.exp(kept - tl.maximum(best, -1e30)), axis=0)
        first = tl.min(tl.where(kept == best, ids, VOCAB), axis=0)
        tl.store(scores_ptr + (2 * kind) * plane + at, best)
        tl.store(scores_ptr + (2 * kind + 1) * plane + at, total)
        tl.store(ids_ptr + kind * plane + at, first)


@triton.jit
def _merged_blocks(scores_ptr, ids_ptr, at, inside, PLANE: tl.constexpr, KIND: tl.constexpr):
    best = tl.load(scores_ptr + (2 * KIND) * PLANE + at, mask=inside, other=-float("inf"))
    total = tl.load(scores_ptr + (2 * KIND + 1) * PLANE + at, mask=inside, other=0.0)
    first = tl.load(ids_ptr + KIND * PLANE + at, mask=inside, other=2147483647)
    top = tl.max(best, axis=1)
    total = tl.sum(total * tl.exp(best - tl.maximum(top, -1e30)[:, None]), axis=1)
    first = tl.min(tl.where(best == top[:, None], first, 2147483647), axis=1)
    return top, total, first


@triton.jit
def _choose_kernel(
    tokens_ptr, logprobs_ptr, unfinished_ptr, length_ptr, steps_ptr, finished_ptr, seen_ptr,
    scores_ptr, ids_ptr, rules_ptr, ends_ptr, stride, logprobs_stride,
    ROWS: tl.constexpr, PADDED_ROWS: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, ENDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    let_successor_start(OVERLAP)
    row = tl.arange(0, PADDED_ROWS)
    exists = row < ROWS
    column = tl.arange(0, COLUMNS)
    length = tl.load(length_ptr)
    eos_count = tl.load(rules_ptr + 1)
    pad = tl.load(rules_ptr + 2)
    prompt_length = tl.load(rules_ptr + 3)
    detect = tl.load(rules_ptr + 8)
    end = tl.arange(0, ENDS)
    ends = tl.load(ends_ptr + end, mask=end < eos_count, other=-1)
    was_unfinished = tl.load(unfinished_ptr + row, mask=exists, other=0).to(tl.int32)
    had_finished = tl.load(finished_ptr).to(tl.int32)
    steps = tl.load(steps_ptr)

    wait_for_predecessor(OVERLAP)
    at = row[:, None] * BLOCKS + column[None, :]
    inside = (column < BLOCKS)[None, :] & exists[:, None]
    text_best, text_sum, text_id = _merged_blocks(scores_ptr, ids_ptr, at, inside, ROWS * BLOCKS, 0)
    stamp_best, stamp_sum, stamp_id = _merged_blocks(scores_ptr, ids_ptr, at, inside, ROWS * BLOCKS, 1)
    # A timestamp is forced when all of them together are likelier than the likeliest text token.
    stamp_total = stamp_best + tl.log(tl.maximum(stamp_sum, 1e-37))
    forced = (detect != 0) & (stamp_best > -float("inf")) & (stamp_total > text_best)
    pick_stamp = forced | (stamp_best > text_best)
    chosen = tl.where(pick_stamp, stamp_id, text_id).to(tl.int64)
    score = tl.where(pick_stamp, stamp_best, text_best)
    reference = tl.maximum(score, -1e30)
    total = tl.where(forced, 0.0, text_sum * tl.exp(tl.maximum(text_best, -1e30) - reference))
    total += stamp_sum * tl.exp(tl.maximum(stamp_best, -1e30) - reference)
    logprob = score - reference - tl.log(total)

    chosen = tl.where((was_unfinished != 0) | (eos_count == 0), chosen, pad)
    ended = tl.sum(tl.where(ends[None, :] == chosen[:, None], 1, 0), axis=1)
    unfinished = tl.where(ended > 0, 0, was_unfinished)
    tl.store(tokens_ptr + row * stride + length, chosen, mask=exists)
    tl.store(logprobs_ptr + row * logprobs_stride + length - prompt_length, logprob, mask=exists)
    tl.store(unfinished_ptr + row, unfinished.to(tl.uint8), mask=exists)
    finished = tl.maximum(had_finished, tl.where(tl.sum(unfinished, axis=0) == 0, 1, 0)).to(tl.uint8)
    tl.store(finished_ptr, finished)
    generated = length + 1 - prompt_length
    tl.store(seen_ptr, tl.where(finished != 0, -generated, generated))
    # Steps queued after the last row's end do not count.
    tl.store(steps_ptr, steps + tl.where(had_finished == 0, 1, 0))
    tl.store(length_ptr, length + 1)


@torch.library.custom_op(
    "whisper_static_cache::choose_next",
    mutates_args=("tokens", "logprobs", "unfinished", "length", "steps", "finished", "seen", "scores", "ids"),
    device_types=("cpu", "cuda"),
)
def choose_next(
    tokens: torch.Tensor,
    logprobs: torch.Tensor,
    unfinished: torch.Tensor,
    length: torch.Tensor,
    steps: torch.Tensor,
    finished: torch.Tensor,
    seen: torch.Tensor,
    scores: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    table: torch.Tensor,
    rules: torch.Tensor,
    ends: torch.Tensor,
) -> None:
    """Choose each row's next token, write it into slot `length`, and count the step.

    Args:
        tokens: int64 ``(rows, slots + 1)``, rows at any stride, valid in the first `length` columns; written.
        logprobs: float32 ``(rows, slots + 1)``, rows at any stride; column ``length - prompt_length`` gets the chosen
            token's log-probability under the processed scores.
        unfinished: uint8 ``(rows,)``: 0 once a row has chosen an end; written.
        length: int64 ``(1,)``, incremented.
        steps: int64 ``(1,)``: steps up to the one that finished the last row.
        finished: uint8 ``(1,)``: 1 once every row has finished.
        seen: int64 ``(1,)``, may be in pinned host memory: gets how many tokens a row now has behind the prompt,
            negative once every row has finished.
        scores, ids: float32 ``(4, rows, blocks)`` and int32 ``(2, rows, blocks)`` to work in, `blocks` as
            `blocks_of` gives it.
        logits: ``(rows, vocab_size or more)``, contiguous; what is beyond the table is not read.
        table: uint8 ``(vocab_size,)`` of SUPPRESSED and SUPPRESSED_EARLY.
        rules: int64, a `Rules`.
        ends: int64, a power of two of them: the first ``rules.eos_count`` are the tokens that end a row.
    """
    rows, blocks = ids.shape[1:]
    start(
        _best_kernel,
        (rows, blocks),
        scores,
        ids,
        tokens,
        length,
        logits,
        table,
        rules,
        tokens.stride(0),
        ROWS=rows,
        VOCAB=table.shape[0],
        WIDE=logits.shape[1],
        BLOCK=_BLOCK,
        BLOCKS=blocks,
        TOKENS=tokens.shape[1],
        HISTORY=triton.next_power_of_2(tokens.shape[1]),
        **options(logits.device, 4),
    )
    start(
        _choose_kernel,
        (1,),
        tokens,
        logprobs,
        unfinished,
        length,
        steps,
        finished,
        seen,
        scores,
        ids,
        rules,
        ends,
        tokens.stride(0),
        logprobs.stride(0),
        ROWS=rows,
        PADDED_ROWS=triton.next_power_of_2(rows),
        BLOCKS=blocks,
        COLUMNS=triton.next_power_of_2(blocks),
        ENDS=ends.shape[0],
        **options(logits.device, 1),
    )


@choose_next.register_fake
def _(*args, **kwargs):
    return None


def blocks_of(vocab_size):
    """Blocks in which `choose_next` looks through a vocabulary."""
    return triton.cdiv(vocab_size, _BLOCK)
