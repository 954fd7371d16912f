"""Every reproduced logits processor against transformers' own class, bit for bit, on random logits and histories."""

import functools
import inspect
import math
import types

import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as stock

from tests.conftest import TINY_TOKENS, tiny_features, tiny_model
from whisper_static_cache.logits_process import UnsupportedProcessor, build_plan
from whisper_static_cache.logits_processors import _division, _ids


VOCAB_SIZE = 60
EOS = 40
NO_SPEECH = 43
NO_TIMESTAMPS = 44
TIMESTAMP_BEGIN = 45
MAX_LENGTH = 14
INF = math.inf

exact = functools.partial(settings, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def timestamps(begin_index, max_initial=5, eos=EOS, detect=True):
    config = types.SimpleNamespace(
        no_timestamps_token_id=NO_TIMESTAMPS,
        eos_token_id=eos,
        bos_token_id=EOS,
        forced_decoder_ids=None,
        max_initial_timestamp_index=max_initial,
        _detect_timestamp_from_logprob=detect,
    )
    return stock.WhisperTimeStampLogitsProcessor(config, begin_index=begin_index)


def repetition(penalty, ignored=None):
    options = {} if ignored is None else {"prompt_ignore_length": ignored}  # since 4.53
    return stock.RepetitionPenaltyLogitsProcessor(penalty, **options)


# Name -> (prompt length, draw) -> transformers' processor. Parameters straddle the prompt's end and the vocabulary's.
def _processors():
    integers, floats, sampled = st.integers, st.floats, st.sampled_from
    near = integers(0, MAX_LENGTH + 2)
    ids = st.lists(integers(-2, VOCAB_SIZE + 2), min_size=1, max_size=6)
    eos = st.one_of(integers(0, VOCAB_SIZE - 1), st.lists(integers(0, VOCAB_SIZE - 1), min_size=1, max_size=3))
    keep = integers(1, VOCAB_SIZE + 3)
    filtered = sampled([-INF, -1e4])
    table = {
        "epsilon": lambda n, draw: stock.EpsilonLogitsWarper(draw(floats(1e-4, 0.3)), draw(filtered), draw(keep)),
        "eta": lambda n, draw: stock.EtaLogitsWarper(draw(floats(1e-4, 0.3)), draw(filtered), draw(keep)),
        "forced_bos": lambda n, draw: stock.ForcedBOSTokenLogitsProcessor(draw(integers(0, VOCAB_SIZE - 1))),
        "forced_eos": lambda n, draw: stock.ForcedEOSTokenLogitsProcessor(
            draw(integers(1, MAX_LENGTH + 2)), draw(eos)
        ),
        "inf_nan": lambda n, draw: stock.InfNanRemoveLogitsProcessor(),
        "normalization": lambda n, draw: stock.LogitNormalization(),
        "min_length": lambda n, draw: stock.MinLengthLogitsProcessor(draw(near), draw(eos)),
        "min_new_tokens": lambda n, draw: stock.MinNewTokensLengthLogitsProcessor(n, draw(integers(0, 8)), draw(eos)),
        "min_p": lambda n, draw: stock.MinPLogitsWarper(draw(floats(0, 1)), draw(filtered)),
        "ngram": lambda n, draw: stock.NoRepeatNGramLogitsProcessor(draw(integers(1, 5))),
        "repetition": lambda n, draw: repetition(draw(floats(0.3, 3.0))),
        "suppress": lambda n, draw: stock.SuppressTokensLogitsProcessor(draw(ids)),
        "suppress_at_begin": lambda n, draw: stock.SuppressTokensAtBeginLogitsProcessor(draw(ids), draw(near)),
        "temperature": lambda n, draw: stock.TemperatureLogitsWarper(draw(floats(0.05, 4.0))),
        "timestamps": lambda n, draw: timestamps(
            draw(st.one_of(st.just(n), near)),
            draw(sampled([None, 0, 3, 50])),
            draw(sampled([EOS, 1, VOCAB_SIZE + 5])),
            draw(st.booleans()),
        ),
        "top_k": lambda n, draw: stock.TopKLogitsWarper(draw(keep), draw(filtered)),
        "top_p": lambda n, draw: stock.TopPLogitsWarper(draw(floats(0, 1)), draw(filtered), draw(keep)),
        "typical": lambda n, draw: stock.TypicalLogitsWarper(draw(floats(0.01, 0.99)), draw(filtered), draw(keep)),
    }
    if "prompt_ignore_length" in inspect.signature(stock.RepetitionPenaltyLogitsProcessor).parameters:
        table["repetition_ignoring"] = lambda n, draw: repetition(draw(floats(0.3, 3.0)), draw(near))
    if hasattr(stock, "TopHLogitsWarper"):
        table["top_h"] = lambda n, draw: stock.TopHLogitsWarper(draw(floats(0.01, 1.0)), draw(filtered))
    return table


PROCESSORS = _processors()


@st.composite
def histories(draw):
    """A token buffer ``(batch, MAX_LENGTH)`` with garbage beyond the length, the prompt length, and the length."""
    batch_size = draw(st.integers(1, 5))
    prompt_length = draw(st.integers(1, 6))
    length = draw(st.one_of(st.just(prompt_length), st.integers(prompt_length, MAX_LENGTH)))
    seed = draw(st.integers(0, 2**31))
    # few different tokens make n-grams repeat; timestamps come often, in any order and place, in the prompt as well
    pool = draw(
        st.sampled_from([[1, 2], [3, EOS, 46, 47], [46, 50, 51], list(range(VOCAB_SIZE)), [EOS, 59, 45, 5, 6]])
    )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor(pool)[torch.randint(len(pool), (batch_size, MAX_LENGTH), generator=generator)]
    garbage = draw(st.sampled_from([0, -1, 46, VOCAB_SIZE + 1000, 2**62]))
    tokens[:, length:] = garbage
    return tokens, prompt_length, length


@st.composite
def logits(draw, batch_size, nan=False):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randn(batch_size, VOCAB_SIZE, generator=generator) * draw(st.sampled_from([0.1, 1.0, 8.0, 300.0]))
    kind = draw(st.sampled_from(["plain", "ties", "-inf", "timestamps", "huge"]))
    if kind == "ties":
        scores = scores.round()
    elif kind == "-inf":
        scores[torch.rand(scores.shape, generator=generator) < 0.6] = -INF
        scores[:, draw(st.integers(0, VOCAB_SIZE - 1))] = 1.0
    elif kind == "timestamps":
        scores[:, TIMESTAMP_BEGIN:] += draw(st.sampled_from([1.0, 5.0]))
    elif kind == "huge":
        scores[0, draw(st.integers(0, VOCAB_SIZE - 1))] = 3e38
    if nan:
        special = torch.tensor([math.nan, INF, -INF])
        where = torch.rand(scores.shape, generator=generator) < 0.2
        scores[where] = special[torch.randint(3, (int(where.sum()),), generator=generator)]
    return scores


def run(processors, tokens, prompt_length, length, scores):
    """Ours, and transformers' own; the garbage beyond `length` is for ours only."""
    plan = build_plan(LogitsProcessorList(processors), prompt_length, VOCAB_SIZE, "cpu")
    step = plan.first if length == prompt_length else plan.rest
    ours = step(tokens.clone(), torch.tensor(length), scores.clone())
    return ours, LogitsProcessorList(processors)(tokens[:, :length].clone(), scores.clone())


def assert_same(ours, theirs):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert torch.equal(ours.view(torch.int32), theirs.contiguous().view(torch.int32))  # bits: NaN and -0.0 count too


# --- equality with transformers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSORS)
@exact(max_examples=150)
@given(data=st.data())
def test_processor_equals_transformers(name, data):
    tokens, prompt_length, length = data.draw(histories())
    processor = PROCESSORS[name](prompt_length, data.draw)
    scores = data.draw(logits(len(tokens), nan=name == "inf_nan"))
    assert_same(*run([processor], tokens, prompt_length, length, scores))


@exact(max_examples=500)
@given(data=st.data())
def test_timestamp_rules_equal_transformers_after_a_whisper_prompt(data):
    tokens, prompt_length, length = data.draw(histories())
    processor = timestamps(prompt_length, data.draw(st.sampled_from([None, 0, 3])))
    assert_same(*run([processor], tokens, prompt_length, length, data.draw(logits(len(tokens)))))


@exact(max_examples=150)
@given(data=st.data())
def test_lists_in_the_order_of_whisper_equal_transformers(data):
    tokens, prompt_length, length = data.draw(histories())

    def some(names):
        chosen = data.draw(st.lists(st.sampled_from(names), unique=True))
        return [PROCESSORS[name](prompt_length, data.draw) for name in names if name in chosen]

    processors = [
        *some(["repetition", "ngram", "min_length", "min_new_tokens", "forced_bos", "forced_eos", "inf_nan"]),
        stock.SuppressTokensAtBeginLogitsProcessor([1, EOS], begin_index=prompt_length),
        stock.SuppressTokensLogitsProcessor([2, 3, NO_SPEECH, VOCAB_SIZE + 7]),
        *([timestamps(prompt_length)] if data.draw(st.booleans()) else []),
        *some(["temperature", "top_k", "top_p", "min_p", "typical", "epsilon", "eta", "normalization"]),
    ]
    scores = data.draw(logits(len(tokens)))
    before_eta = LogitsProcessorList(p for p in processors if not isinstance(p, stock.EtaLogitsWarper))
    # Eta has torch.distributions refuse a row without a finite score; ours leaves that to the sampling that follows.
    assume(before_eta(tokens[:, :length], scores).isfinite().any(dim=-1).all())
    assert_same(*run(processors, tokens, prompt_length, length, scores))


@pytest.mark.parametrize("width", [2, 1501], ids=["few timestamps", "Whisper's timestamps"])
def test_timestamp_rules_equal_transformers_over_whispers_vocabulary(width):
    # The widths of the real reductions: another split of a sum would change its last bits.
    vocab_size, begin = 51865, 51865 - width
    config = types.SimpleNamespace(
        no_timestamps_token_id=begin - 1,
        eos_token_id=50257,
        bos_token_id=50257,
        forced_decoder_ids=None,
        max_initial_timestamp_index=50,
    )
    processor = stock.WhisperTimeStampLogitsProcessor(config, begin_index=3)
    tokens = torch.tensor([[50258, 50259, 50359, begin, 11, 12, 13], [50258, 50259, 50359, begin, 11, 12, begin + 1]])
    generator = torch.Generator().manual_seed(0)
    for length in (3, 4, 5, 6, 7):
        scores = torch.randn(2, vocab_size, generator=generator) * 3
        plan = build_plan([processor], 3, vocab_size, "cpu")
        ours = (plan.first if length == 3 else plan.rest)(tokens, torch.tensor(length), scores.clone())
        assert_same(ours, processor(tokens[:, :length], scores))


ROWS = [
    ([], "nothing generated"),
    ([5], "text"),
    ([46], "the first timestamp, alone"),
    ([46, 5], "an open pair, text after it"),
    ([46, 5, 48], "a pair half closed"),
    ([46, 5, 48, 48], "a closed pair"),
    ([46, 5, 48, 48, 5], "text after a closed pair"),
    ([59], "the last timestamp, alone"),
    ([5, 59], "the last timestamp, half closed"),
    ([50, 5, 46], "timestamps that go back"),
    ([45, 45, 45], "three in a row"),
    ([EOS, EOS], "finished"),
]


@pytest.mark.parametrize(("generated", "name"), ROWS, ids=[name for _, name in ROWS])
@pytest.mark.parametrize("prompt", [[41, 42], [46, 59, 41, 42], [59]], ids=["plain", "with history", "timestamp last"])
def test_timestamp_rules_in_every_state_of_a_pair(generated, name, prompt):
    row = prompt + generated
    tokens = torch.full((1, MAX_LENGTH), 59)
    tokens[0, : len(row)] = torch.tensor(row)
    scores = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(len(row)))
    for processor in (timestamps(len(prompt)), timestamps(len(prompt), None), timestamps(len(prompt), detect=False)):
        assert_same(*run([processor], tokens, len(prompt), len(row), scores))


@pytest.mark.parametrize("size", [1, 2, 3, MAX_LENGTH, MAX_LENGTH + 1])
def test_no_repeat_ngram_at_the_ends_of_the_buffer(size):
    tokens = torch.ones(2, MAX_LENGTH, dtype=torch.long)
    scores = torch.zeros(2, VOCAB_SIZE)
    for length in range(1, MAX_LENGTH + 1):
        assert_same(*run([stock.NoRepeatNGramLogitsProcessor(size)], tokens, 1, length, scores))


@pytest.mark.skipif(
    "Tensor"
    not in str(inspect.signature(stock.RepetitionPenaltyLogitsProcessor).parameters.get("prompt_ignore_length")),
    reason="this release's RepetitionPenaltyLogitsProcessor takes no prompt_ignore_length of each row",
)
@exact(max_examples=60)
@given(data=st.data())
def test_repetition_penalty_that_ignores_each_rows_padding(data):
    tokens, prompt_length, length = data.draw(histories())
    ignored = data.draw(st.lists(st.integers(0, MAX_LENGTH), min_size=len(tokens), max_size=len(tokens)))
    processor = repetition(1.7, torch.tensor(ignored))
    assert_same(*run([processor], tokens, prompt_length, length, data.draw(logits(len(tokens)))))


# --- the plan --------------------------------------------------------------------------------------------------------


def whisper_list(begin_index, temperature=0.7, top_p=0.9, penalty=1.3, min_length=9):
    return [
        repetition(penalty),
        stock.MinLengthLogitsProcessor(min_length, EOS),
        stock.SuppressTokensAtBeginLogitsProcessor([1, EOS], begin_index=begin_index),
        stock.SuppressTokensLogitsProcessor([2, 3, NO_SPEECH]),
        timestamps(begin_index),
        stock.TemperatureLogitsWarper(temperature),
        stock.TopKLogitsWarper(20),
        stock.TopPLogitsWarper(top_p),
        stock.MinPLogitsWarper(0.01),
        stock.EtaLogitsWarper(0.02),
    ]


def test_load_takes_over_numbers_in_place():
    other = whisper_list(5, temperature=1.9, top_p=0.3, penalty=0.8, min_length=12)
    plan = build_plan(whisper_list(3), 3, VOCAB_SIZE, "cpu")
    new = build_plan(other, 5, VOCAB_SIZE, "cpu")
    assert plan.key == new.key and hash(plan.key) == hash(new.key)
    plan.materialize()
    tensors = [value for p in plan._processors for value in vars(p).values() if isinstance(value, torch.Tensor)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    plan.load(new)
    assert addresses == [tensor.data_ptr() for tensor in tensors]
    generator = torch.Generator().manual_seed(0)
    for length in range(5, MAX_LENGTH + 1):
        tokens = torch.randint(VOCAB_SIZE, (3, MAX_LENGTH), generator=generator)
        scores = torch.randn(3, VOCAB_SIZE, generator=generator)
        ours = (plan.first if length == 5 else plan.rest)(tokens, torch.tensor(length), scores.clone())
        assert_same(ours, LogitsProcessorList(other)(tokens[:, :length], scores))


@pytest.mark.parametrize(
    "other",
    [
        [stock.SuppressTokensLogitsProcessor([4])],
        [stock.SuppressTokensLogitsProcessor([3]), stock.TopKLogitsWarper(5)],
        [stock.TopKLogitsWarper(5)],
        [],
    ],
)
def test_other_structure_is_another_key(other):
    plan = build_plan([stock.SuppressTokensLogitsProcessor([3])], 3, VOCAB_SIZE, "cpu")
    new = build_plan(other, 3, VOCAB_SIZE, "cpu")
    assert plan.key != new.key
    with pytest.raises(ValueError, match="build a plan of its own"):
        plan.load(new)


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def operations(step, *args):
    with _Recorder() as recorder:
        step(*args)
    return recorder.operations


def test_greedy_plan_is_one_masked_fill_a_token():
    processors = [
        stock.SuppressTokensAtBeginLogitsProcessor([1, EOS], begin_index=3),
        stock.SuppressTokensLogitsProcessor([2, 3]),
    ]
    plan = build_plan(processors, 3, VOCAB_SIZE, "cpu")
    plan.materialize()
    scores = torch.randn(1, VOCAB_SIZE)
    tokens = torch.zeros(1, MAX_LENGTH, dtype=torch.long)
    assert operations(plan.rest, tokens, torch.tensor(4), scores) == ["masked_fill_"]
    assert plan.rest(tokens, torch.tensor(4), scores) is scores


HOST_READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2"}


@pytest.mark.parametrize("name", PROCESSORS)
@exact(max_examples=8)
@given(data=st.data())
def test_no_step_waits_for_the_device(name, data):
    prompt_length = data.draw(st.integers(1, 6))
    plan = build_plan([PROCESSORS[name](prompt_length, data.draw)], prompt_length, VOCAB_SIZE, "cpu")
    plan.materialize()
    tokens, scores = torch.ones(2, MAX_LENGTH, dtype=torch.long), torch.zeros(2, VOCAB_SIZE)
    shortest = operations(plan.rest, tokens, torch.tensor(prompt_length + 1), scores.clone())
    assert shortest == operations(plan.rest, tokens, torch.tensor(MAX_LENGTH), scores.clone())
    assert not HOST_READS & {*shortest, *operations(plan.first, tokens, torch.tensor(prompt_length), scores)}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # raises where a value or a shape depends on the data
        fakes = [mode.from_tensor(tensor) for tensor in (tokens, torch.tensor(prompt_length), scores)]
        for step in (plan.first, plan.rest):
            assert step(*fakes).shape == scores.shape


def test_rest_compiles_whole_and_once():
    compiles = torch._dynamo.testing.CompileCounter()
    plan = build_plan(whisper_list(3), 3, VOCAB_SIZE, "cpu")
    plan.materialize()
    rest = torch.compile(plan.rest, fullgraph=True, backend=compiles)
    generator = torch.Generator().manual_seed(0)
    for begin_index, temperature in ((3, 0.7), (5, 0.2)):
        processors = whisper_list(begin_index, temperature=temperature)
        plan.load(build_plan(processors, begin_index, VOCAB_SIZE, "cpu"))
        for length in range(begin_index + 1, MAX_LENGTH + 1):
            tokens = torch.randint(VOCAB_SIZE, (2, MAX_LENGTH), generator=generator)
            scores = torch.randn(2, VOCAB_SIZE, generator=generator)
            ours = rest(tokens, torch.tensor(length), scores.clone())
            assert_same(ours, LogitsProcessorList(processors)(tokens[:, :length], scores))
    assert compiles.frame_count == 1


def test_plan_made_in_inference_mode_serves_a_call_outside_it():
    with torch.inference_mode():
        processors = whisper_list(3)
        plan = build_plan(processors, 3, VOCAB_SIZE, "cpu")
        plan.materialize()
    plan.load(build_plan(whisper_list(3, temperature=0.5), 3, VOCAB_SIZE, "cpu"))
    tokens, scores = torch.zeros(1, MAX_LENGTH, dtype=torch.long), torch.randn(1, VOCAB_SIZE)
    theirs = LogitsProcessorList(whisper_list(3, temperature=0.5))(tokens[:, :4], scores)
    assert_same(plan.rest(tokens, torch.tensor(4), scores.clone()), theirs)


def test_token_lists_are_read_from_the_device_once_and_again_when_changed(monkeypatch):
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(1) or tolist(tensor))
    processor = stock.SuppressTokensLogitsProcessor([4, 5])
    assert _ids(processor, "suppress_tokens") == _ids(processor, "suppress_tokens") == [4, 5]
    assert len(reads) == 1
    processor.suppress_tokens[0] = 9
    assert _ids(processor, "suppress_tokens") == [9, 5]
    processor.suppress_tokens = torch.tensor([7])
    assert _ids(processor, "suppress_tokens") == [7]


@pytest.mark.gpu
def test_division_by_a_number_on_a_gpu():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 4096, generator=generator).cuda()
    for value in (torch.rand(300, generator=generator, dtype=torch.float64) * 3 + 0.01).tolist():
        operation, operand = _division(value, scores.device)
        assert_same(operation(scores, operand), scores / value)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PROCESSORS)
@exact(max_examples=15)
@given(data=st.data())
def test_processor_equals_transformers_on_a_gpu(name, data):
    tokens, prompt_length, length = data.draw(histories())
    processor = PROCESSORS[name](prompt_length, data.draw)
    for attribute, value in vars(processor).items():
        if isinstance(value, torch.Tensor):
            setattr(processor, attribute, value.cuda())
    tokens, scores = tokens.cuda(), data.draw(logits(len(tokens))).cuda()
    plan = build_plan([processor], prompt_length, VOCAB_SIZE, "cuda")
    step = plan.first if length == prompt_length else plan.rest
    plan.materialize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = step(tokens, torch.full((), length, device="cuda"), scores.clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(ours, processor(tokens[:, :length], scores))


@pytest.mark.gpu
def test_captured_rest_follows_load():
    plan = build_plan(whisper_list(3), 3, VOCAB_SIZE, "cuda")
    plan.materialize()
    tokens = torch.randint(VOCAB_SIZE, (2, MAX_LENGTH), device="cuda")
    length = torch.full((), 4, device="cuda")
    scores = torch.zeros(2, VOCAB_SIZE, device="cuda")
    plan.rest(tokens, length, scores.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = plan.rest(tokens, length, scores.clone())
    for begin_index, temperature in ((3, 0.7), (5, 0.2)):
        processors = whisper_list(begin_index, temperature=temperature)
        fresh = build_plan(processors, begin_index, VOCAB_SIZE, "cuda")
        plan.load(fresh)
        for step in range(begin_index + 1, MAX_LENGTH + 1):
            length.fill_(step)
            scores.normal_()
            tokens.random_(0, VOCAB_SIZE)
            graph.replay()
            assert_same(captured, fresh.rest(tokens, length, scores.clone()))


# --- the no-speech probability ---------------------------------------------------------------------------------------


def no_speech_list(model, prompt, features, init_tokens=3):
    """Whisper's own set-up of the detector for one window."""
    detector = stock.WhisperNoSpeechDetection(TINY_TOKENS["no_speech"], begin_index=init_tokens)
    detector.set_model(model)
    detector.set_begin_index(prompt.shape[1])
    model._setup_no_speech_detection([detector], features, prompt, {})
    if detector.inputs.keys() - inspect.signature(model.forward).parameters.keys():
        pytest.skip("the detector of this release calls the model with an argument it does not take, and raises")
    suppress = stock.SuppressTokensLogitsProcessor([1, 2])
    return detector, LogitsProcessorList([repetition(1.5), detector, suppress])


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_no_speech_probability_comes_from_the_prefill(model, batch_size):
    prompt = torch.randint(100, (batch_size, 7), generator=torch.Generator().manual_seed(1))
    prompt[:, 4:] = torch.tensor([101, 102, 106])
    features = tiny_features(batch_size)
    detector, processors = no_speech_list(model, prompt, features)
    with torch.no_grad():
        prefill = model(input_features=features, decoder_input_ids=prompt).logits
    theirs = processors(prompt, prefill[:, -1].clone())
    expected = detector.no_speech_prob

    detector._no_speech_prob = None
    plan = build_plan(processors, 7, 200, "cpu")
    assert plan.no_speech is detector and plan.no_speech_index == 4
    tokens = torch.nn.functional.pad(prompt, (0, 5))
    ours = plan.first(tokens, torch.tensor(7), prefill[:, -1].clone(), prefill[:, 4])
    assert_same(ours, theirs)
    torch.testing.assert_close(detector.no_speech_prob, expected)

    # a later temperature over some of the rows: transformers stores the same again, for all of them
    stored = detector.no_speech_prob
    again = build_plan(processors, 7, 200, "cpu")
    assert again.no_speech_index is None
    again.first(tokens[:1], torch.tensor(7), prefill[:1, -1].clone())
    assert detector.no_speech_prob is stored

    # the next window
    model._setup_no_speech_detection([detector], features, prompt, {})
    assert again.no_speech_index == 4
    with pytest.raises(ValueError, match="sot_logits is missing: pass the prefill's logits at prompt position 4"):
        again.first(tokens, torch.tensor(7), prefill[:, -1].clone())
    again.first(tokens, torch.tensor(7), prefill[:, -1].clone(), prefill[:, 4])
    torch.testing.assert_close(detector.no_speech_prob, expected)


def test_no_speech_probability_of_more_rows_than_this_temperature_sees(model):
    # The first temperature was served by transformers' loop, beam search for one, so that nothing is stored yet.
    prompt = torch.tensor([[101, 102, 106]]).repeat(3, 1)
    features = tiny_features(3)
    detector, processors = no_speech_list(model, prompt, features)
    scores = torch.randn(2, 200)
    processors(prompt[:2], scores.clone())
    expected = detector.no_speech_prob
    detector._no_speech_prob = None
    plan = build_plan(processors, 3, 200, "cpu")
    plan.first(prompt[:2], torch.tensor(3), scores.clone(), torch.randn(2, 200))
    assert torch.equal(detector.no_speech_prob, expected) and len(expected) == 3


@pytest.mark.parametrize("logprobs", [False, True])
def test_no_speech_probability_from_the_scores_where_the_prompt_is_one_token(logprobs):
    detector = stock.WhisperNoSpeechDetection(NO_SPEECH, begin_index=1, scores_is_logprobs=logprobs)
    processors = [repetition(1.5), detector, stock.SuppressTokensLogitsProcessor([NO_SPEECH])]
    tokens, scores = torch.full((2, MAX_LENGTH), 41), torch.randn(2, VOCAB_SIZE)
    for rows in (2, 1):  # nothing is kept here: transformers overwrites it at every temperature
        ours, theirs = run(processors, tokens[:rows], 1, 1, scores[:rows])
        assert_same(ours, theirs)
        expected = detector.no_speech_prob  # transformers ran last
        plan = build_plan(processors, 1, VOCAB_SIZE, "cpu")
        assert plan.no_speech_index is None
        plan.first(tokens[:rows], torch.tensor(1), scores[:rows].clone())
        assert torch.equal(detector.no_speech_prob, expected)


def test_plan_does_not_keep_the_detector_alive(model):
    prompt = torch.tensor([[101, 102, 106]])
    plan = build_plan(no_speech_list(model, prompt, tiny_features())[1], 3, 200, "cpu")
    assert plan.no_speech is None
    other, others = no_speech_list(model, prompt, tiny_features())
    plan.load(build_plan(others, 3, 200, "cpu"))
    assert plan.no_speech is other
    del other, others
    assert plan.no_speech is None
    scores = torch.randn(1, 200)
    assert plan.first(prompt, torch.tensor(3), scores.clone(), scores).shape == scores.shape


# --- what is not reproduced ------------------------------------------------------------------------------------------


class Subclass(stock.TemperatureLogitsWarper):
    pass


class Custom(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class ListOfMine(LogitsProcessorList):
    def __call__(self, input_ids, scores, **kwargs):
        return scores


def altered(processor, **attributes):
    for name, value in attributes.items():
        setattr(processor, name, value)
    return processor


def no_speech(begin_index=3, prompt_length=3, **attributes):
    detector = stock.WhisperNoSpeechDetection(NO_SPEECH, begin_index)
    detector.set_begin_index(prompt_length)
    return altered(detector, **attributes)


UNSUPPORTED = {
    "subclass": (lambda: Subclass(0.5), "Subclass is not among"),
    "custom": (Custom, "Custom is not among"),
    "function": (lambda: lambda input_ids, scores: scores, "function is not among"),
    "sequence bias": (lambda: stock.SequenceBiasLogitsProcessor({(1,): -1.0}), "SequenceBiasLogitsProcessor is not"),
    "prefix": (
        lambda: stock.PrefixConstrainedLogitsProcessor(lambda row, ids: [1], 1),
        "PrefixConstrainedLogitsProcessor is not",
    ),
    "call on the instance": (
        lambda: altered(stock.LogitNormalization(), __call__=lambda ids, scores: scores),
        "__call__ is not transformers' own",
    ),
    "unknown attribute": (lambda: altered(stock.TopKLogitsWarper(3), ignored=[1]), "unknown meaning: ignored"),
    "temperature tensor": (
        lambda: altered(stock.TemperatureLogitsWarper(0.5), temperature=torch.tensor([0.5, 0.7])),
        "temperature is a Tensor, not a number",
    ),
    "ngram": (lambda: altered(stock.NoRepeatNGramLogitsProcessor(2), ngram_size=2.0), "ngram_size is a float"),
    "several ends": (lambda: timestamps(3, eos=[EOS, 1]), "eos_token_id is a list, not an int"),
    "negative begin": (lambda: altered(timestamps(3), begin_index=-1), r"begin_index is -1, outside \[0, inf\]"),
    "no begin": (lambda: altered(timestamps(3), begin_index=None), "begin_index is a NoneType"),
    "end beyond": (
        lambda: stock.ForcedEOSTokenLogitsProcessor(9, [EOS, VOCAB_SIZE]),
        r"eos_token_id \[60\] is outside",
    ),
    "negative bos": (lambda: stock.ForcedBOSTokenLogitsProcessor(-1), "bos_token_id is -1"),
    "list of tokens": (
        lambda: altered(stock.SuppressTokensLogitsProcessor([1]), suppress_tokens=[1]),
        "suppress_tokens is a list, not a tensor",
    ),
    "ignored length": (lambda: altered(repetition(1.2), prompt_ignore_length=-1), "prompt_ignore_length is -1"),
    "min_p keeps two": (lambda: stock.MinPLogitsWarper(0.1, min_tokens_to_keep=2), "min_tokens_to_keep is 2"),
    "eta in double": (
        lambda: altered(stock.EtaLogitsWarper(0.1), epsilon=torch.tensor(0.1, dtype=torch.float64)),
        "not a float32 scalar tensor",
    ),
    "no-speech later": (lambda: no_speech(prompt_length=5), "begin_index 5 is beyond the prompt of 3"),
    "no-speech without inputs": (no_speech, "inputs hold no decoder_input_ids"),
    "no-speech before the prompt": (lambda: no_speech(begin_index=4), "start_of_trans_offset 4 is above"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_processor_is_named(name):
    make, reason = UNSUPPORTED[name]
    processor = make()
    with pytest.raises(UnsupportedProcessor, match=reason) as error:
        build_plan([stock.LogitNormalization(), processor], 3, VOCAB_SIZE, "cpu")
    assert type(processor).__name__ in str(error.value)


def test_patched_class_is_unsupported(monkeypatch):
    original = stock.TopKLogitsWarper.__call__
    for replacement in (
        lambda self, input_ids, scores: scores,
        functools.wraps(original)(lambda self, input_ids, scores: original(self, input_ids, scores)),
        stock.TopPLogitsWarper.__call__,
    ):
        with monkeypatch.context() as patched:
            patched.setattr(stock.TopKLogitsWarper, "__call__", replacement)
            with pytest.raises(UnsupportedProcessor, match="TopKLogitsWarper: its __call__ is not transformers' own"):
                build_plan([stock.TopKLogitsWarper(3)], 3, VOCAB_SIZE, "cpu")
    build_plan([stock.TopKLogitsWarper(3)], 3, VOCAB_SIZE, "cpu")


def test_list_with_a_call_of_its_own_is_unsupported():
    with pytest.raises(UnsupportedProcessor, match="ListOfMine"):
        build_plan(ListOfMine([]), 3, VOCAB_SIZE, "cpu")


def test_two_detectors_are_unsupported():
    detectors = [stock.WhisperNoSpeechDetection(NO_SPEECH, 1), stock.WhisperNoSpeechDetection(NO_SPEECH, 1)]
    with pytest.raises(UnsupportedProcessor, match="more than one"):
        build_plan(detectors, 1, VOCAB_SIZE, "cpu")


def test_no_speech_detection_of_a_shorter_prompt_never_acts():
    detector = no_speech(begin_index=2, prompt_length=2)
    plan = build_plan([detector], 3, VOCAB_SIZE, "cpu")
    assert plan.no_speech_index is None
    plan.first(torch.zeros(1, 3, dtype=torch.long), torch.tensor(3), torch.zeros(1, VOCAB_SIZE))
    assert detector.no_speech_prob == [0.0]
