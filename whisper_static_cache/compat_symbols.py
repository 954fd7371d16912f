"""The one table of upstream names and signatures that this package counts on, and the comparison with a release.

`compat` reads a release's sources and compares them with `SYMBOLS`, `patch()` compares the live objects, and
tests/compat pins every row on the installed release. Neither torch nor transformers is imported here.
"""

import dataclasses
import importlib
import inspect
import re


# Releases that the matrix of noxfile.py runs on.
RELEASES = (
    "4.46.3",
    "4.48.3",
    "4.50.3",
    "4.53.3",
    "4.55.4",
    "4.57.6",
    "5.0.0",
    "5.3.0",
    "5.4.0",
    "5.10.4",
    "5.17.0",
    "5.23.0",
    "5.24.0",
)
NEWEST = RELEASES[-1]
# What setup.py allows: from the first, up to and without the second.
RANGE = ("4.46", "6")


@dataclasses.dataclass(frozen=True)
class Symbol:
    """One upstream name and what is counted on.

    Attributes:
        module: transformers' module, without the leading `transformers.`.
        name: the name in it, `Class.method` for a method, which may be inherited.
        file: the file of this package to look at when the row breaks.
        signatures: the signatures known, each a string of parameters; one must hold. Empty: the name is all there is.
        exact: whether a further optional parameter is a difference too, as where ours overrides the method.
        attributes: names set by a class (in its body or on `self`) or by a function (on any object); "a|b" is either.
        asks: all that a method may ask of `self`, where ours calls it with a stand-in; told from sources only.
        since, until: first release with the name and first release without it, where not all supported ones have it.
        otherwise: what happens without it; empty if `patch()` must refuse.
    """

    module: str
    name: str
    file: str
    signatures: tuple = ()
    exact: bool = False
    attributes: tuple = ()
    asks: frozenset = frozenset()
    since: str = ""
    until: str = ""
    otherwise: str = ""

    @property
    def full_name(self):
        return f"transformers.{self.module}.{self.name}"

    def applies_to(self, release):
        """Whether `release` is expected to have it."""
        return not (self.since and _number(release) < _number(self.since)) and not (
            self.until and _number(release) >= _number(self.until)
        )


_WHISPER = "models.whisper.modeling_whisper"
_HOST = "calls that use it step with the host"
_OUTSIDE = "EncoderDecoderStaticCache may not fit transformers' own forward"
_STATES = "self, key_states, value_states"


def _rows(module, file, *rows, otherwise=""):
    """Rows of one module and file, each `(name, signatures, further fields)`."""
    return [
        Symbol(module, name, file, signatures, **{"otherwise": otherwise, **(more[0] if more else {})})
        for name, signatures, *more in rows
    ]


# What is replaced. A further optional parameter is passed through, or sends the call to stock.
PATCHED = tuple(
    _rows(
        _WHISPER,
        "monkey_patch.py",
        ("WhisperForConditionalGeneration.generate", ("self, input_features, generation_config, **kwargs",)),
        (
            "WhisperForConditionalGeneration._sample",
            (
                "self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, "
                "**model_kwargs",
            ),
        ),
        (
            "WhisperForConditionalGeneration._retrieve_avg_logprobs",
            # Up to 4.46 the end token's id stands before the temperature.
            ("scores, tokens, temperature", "scores, tokens, eos_token_id, temperature"),
        ),
        (
            "WhisperForConditionalGeneration._beam_search",
            (
                "self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, **model_kwargs",
                # Up to 4.48; left to stock.
                "self, input_ids, beam_scorer, logits_processor, stopping_criteria, generation_config, synced_gpus, "
                "**model_kwargs",
            ),
        ),
        (
            "WhisperForConditionalGeneration.get_encoder",
            ("self", "self, modality"),
        ),
    )
)

SYMBOLS = (
    *PATCHED,
    # The decoder that modeling_whisper.py runs by itself, module by module.
    *_rows(
        _WHISPER,
        "modeling_whisper.py",
        ("WhisperForConditionalGeneration", (), {"attributes": ("model", "proj_out")}),
        ("WhisperModel", (), {"attributes": ("encoder", "decoder")}),
        (
            "WhisperDecoder",
            (),
            {"attributes": ("embed_tokens", "embed_positions", "layers", "layer_norm", "dropout", "layerdrop")},
        ),
        (
            "WhisperDecoderLayer",
            (),
            {
                "attributes": (
                    *("self_attn", "self_attn_layer_norm", "encoder_attn", "encoder_attn_layer_norm"),
                    *("fc1", "fc2", "activation_fn", "final_layer_norm"),
                )
            },
        ),
        (
            "WhisperAttention",
            (),
            {
                "attributes": (
                    *("q_proj", "k_proj", "v_proj", "out_proj"),
                    *("num_heads", "head_dim", "scaling", "dropout"),
                )
            },
        ),
        (
            "WhisperPositionalEmbedding.forward",
            ("self, input_ids, cache_length, position_ids", "self, input_ids, past_key_values_length, position_ids"),
        ),
        ("WhisperSdpaAttention", (), {"until": "4.53"}),
        ("WhisperFlashAttention2", (), {"until": "4.53"}),
    ),
    *_rows(
        _WHISPER,
        "_compat.py",
        # Its code tells whether padding moves positions.
        ("WhisperForConditionalGeneration.prepare_inputs_for_generation", ()),
    ),
    *_rows(
        "models.whisper.configuration_whisper",
        "cache_utils.py",
        (
            "WhisperConfig",
            (),
            {
                "attributes": (
                    *("vocab_size", "d_model", "decoder_layers", "decoder_attention_heads"),
                    *("max_source_positions", "max_target_positions"),
                )
            },
        ),
    ),
    # The loop.
    *_rows(
        "generation.utils",
        "generation_whisper.py",
        (
            "GenerateEncoderDecoderOutput",
            (),
            # Up to 5.23 `past_key_values`.
            {"attributes": ("sequences", "scores", "logits", "cache|past_key_values")},
        ),
        ("GenerationMixin._prepare_special_tokens", (), {"attributes": ("_pad_token_tensor",)}),
    ),
    # Transformers' own beam search, called with a stand-in for the model.
    *_rows(
        "generation.utils",
        "beam_search.py",
        (
            "GenerationMixin._beam_search",
            (),
            {
                "asks": frozenset(
                    (
                        *("__call__", "__class__", "config", "get_output_embeddings", "prepare_inputs_for_generation"),
                        *("_prefill", "_get_initial_cache_position", "_update_model_kwargs_for_generation"),
                        *("_reorder_cache", "_temporary_reorder_cache", "_flatten_beam_dim", "_unflatten_beam_dim"),
                        *("_has_unfinished_sequences", "_beam_search_has_unfinished_sequences"),
                        *("_check_early_stop_heuristic", "_get_running_beams_for_next_iteration"),
                        *("_get_top_k_continuations", "_update_finished_beams"),
                    )
                )
            },
        ),
        otherwise="beam search may ask something of the stand-in that only a model can answer",
    ),
    *_rows(
        "generation.configuration_utils",
        "generation_whisper.py",
        (
            "GenerationConfig",
            (),
            {
                "attributes": (
                    *("return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores"),
                    *("output_logits", "cache_implementation", "do_sample", "temperature", "num_return_sequences"),
                )
            },
        ),
    ),
    *_rows(
        "generation.configuration_utils",
        "_compat.py",
        ("ALL_CACHE_IMPLEMENTATIONS", ()),
        otherwise='cache_implementation="dynamic" is taken for known',
    ),
    *_rows(
        "modeling_outputs",
        "encoder_graph.py",
        ("BaseModelOutput", (), {"attributes": ("last_hidden_state",)}),
    ),
    *_rows(
        "generation.stopping_criteria",
        "token_choice.py",
        ("MaxLengthCriteria", (), {"attributes": ("max_length",)}),
        ("MaxLengthCriteria.__init__", ("self, max_length",)),
        ("EosTokenCriteria", (), {"attributes": ("eos_token_id",)}),
        ("StoppingCriteriaList.__call__", ("self, input_ids, scores, **kwargs",)),
    ),
    *_rows(
        "generation.logits_process",
        "logits_processors.py",
        ("LogitsProcessorList.__call__", ("self, input_ids, scores, **kwargs",)),
        *(
            (f"{name}.__call__", ("self, input_ids, scores",), more)
            for name, more in (
                ("EpsilonLogitsWarper", {}),
                ("EtaLogitsWarper", {}),
                ("ForcedBOSTokenLogitsProcessor", {}),
                ("ForcedEOSTokenLogitsProcessor", {}),
                ("InfNanRemoveLogitsProcessor", {}),
                ("LogitNormalization", {}),
                ("MinLengthLogitsProcessor", {}),
                ("MinNewTokensLengthLogitsProcessor", {}),
                ("MinPLogitsWarper", {}),
                ("NoRepeatNGramLogitsProcessor", {}),
                ("RepetitionPenaltyLogitsProcessor", {}),
                ("SuppressTokensAtBeginLogitsProcessor", {}),
                ("SuppressTokensLogitsProcessor", {}),
                ("TemperatureLogitsWarper", {}),
                ("TopHLogitsWarper", {"since": "5.0"}),
                ("TopKLogitsWarper", {}),
                ("TopPLogitsWarper", {}),
                ("TypicalLogitsWarper", {}),
                ("WhisperNoSpeechDetection", {}),
                ("WhisperTimeStampLogitsProcessor", {}),
            )
        ),
        otherwise=_HOST,
    ),
    # The cache, which the loop makes and reads by itself: what is overridden matters where a caller hands it to
    # transformers' own forward.
    *_rows(
        "cache_utils",
        "_compat.py",
        (
            "Cache.__init__",
            ("self, layers", "self, layer_classes, config, cache_processor", "self"),
        ),
        ("DynamicCache.__init__", ("self",)),
        ("DynamicCache.update", (f"{_STATES}, layer_idx",)),
        ("EncoderDecoderCache.__init__", ("self, *caches", "self, self_attention_cache, cross_attention_cache")),
        ("EncoderDecoderCache.crop", ("self, tokens_to_remove", "self, maximum_length"), {"exact": True}),
    ),
    *_rows(
        "cache_utils",
        "cache_utils.py",
        (
            "EncoderDecoderCache",
            (),
            {"attributes": ("self_attention_cache", "cross_attention_cache", "is_updated"), "otherwise": ""},
        ),
        ("StaticCache.update", (f"{_STATES}, layer_idx, *args, **kwargs", f"{_STATES}, layer_idx, cache_kwargs")),
        (
            "StaticCache.get_mask_sizes",
            ("self, query_length, layer_idx", "self, cache_position, layer_idx"),
            {"since": "4.53"},
        ),
        ("StaticCache.get_seq_length", ("self, layer_idx", "self, layer_idx, cache_position")),
        (
            "StaticLayer.update",
            (f"{_STATES}, *args, **kwargs", f"{_STATES}, cache_kwargs"),
            {"since": "4.54"},
        ),
        ("StaticLayer.get_mask_sizes", ("self, query_length", "self, cache_position"), {"since": "4.54"}),
        ("StaticLayer.get_seq_length", ("self", "self, cache_position"), {"since": "4.54"}),
        ("EncoderDecoderCache.get_seq_length", ("self, layer_idx", "self, layer_idx, cache_position")),
        (
            "EncoderDecoderCache.get_mask_sizes",
            ("self, query_length, layer_idx", "self, cache_position, layer_idx"),
            {"since": "4.53"},
        ),
        ("EncoderDecoderCache.reset", ("self",)),
        ("EncoderDecoderCache.reorder_cache", ("self, beam_idx",)),
        ("EncoderDecoderCache.batch_repeat_interleave", ("self, repeats",)),
        ("EncoderDecoderCache.batch_select_indices", ("self, indices",)),
        otherwise=_OUTSIDE,
    ),
    # Checkpoints and the command line.
    *_rows(
        "models.whisper.feature_extraction_whisper",
        "ctranslate2_format.py",
        ("WhisperFeatureExtractor", ()),
        otherwise="checkpoints of CTranslate2 cannot be read",
    ),
    *_rows(
        "models.whisper.tokenization_whisper",
        "ctranslate2_format.py",
        ("WhisperTokenizer", ()),
        ("TO_LANGUAGE_CODE", (), {"otherwise": "the command line cannot check a language"}),
        otherwise="checkpoints of CTranslate2 cannot be read",
    ),
    *_rows(
        "models.whisper.processing_whisper",
        "checkpoints.py",
        ("WhisperProcessor", ()),
        otherwise="checkpoints cannot be loaded by name",
    ),
)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of an upstream function: its name, with the stars of its kind, and whether it may be left out."""

    name: str
    optional: bool = False

    def __str__(self):
        return f"{self.name}=..." if self.optional and not self.name.startswith("*") else self.name


@dataclasses.dataclass(frozen=True)
class Found:
    """What a release has under a name: parameters (None where it is no function), names set, names asked of self."""

    parameters: tuple | None
    attributes: frozenset
    asked: frozenset = frozenset()


def in_range(release):
    """Whether `release` is one that setup.py allows beside this package."""
    return _number(RANGE[0]) <= _number(release) < _number(RANGE[1])


def _number(release):
    return tuple(int(part) for part in re.findall(r"\d+", release)[:3])


def _show(parameters):
    return "(" + ", ".join(map(str, parameters)) + ")"


def difference(symbol, found):
    """How `found` differs from the row, as the end of a sentence that begins with the name, or None.

    Args:
        symbol: a row of `SYMBOLS`.
        found: `Found`, or None where the release has no such name.
    """
    if found is None:
        wanted = f", expected with the parameters ({symbol.signatures[0]})" if symbol.signatures else ""
        return f"is missing{wanted}"
    if symbol.signatures:
        if found.parameters is None:
            return f"is no function, expected with the parameters ({symbol.signatures[0]})"
        if not any(_holds(signature, found.parameters, symbol.exact) for signature in symbol.signatures):
            wanted = " or ".join(f"({signature})" for signature in symbol.signatures)
            return f"has the parameters {_show(found.parameters)} where {wanted} were expected"
    missing = [name for name in symbol.attributes if found.attributes.isdisjoint(name.split("|"))]
    if missing:
        return f"no longer sets {', '.join(missing).replace('|', ' or ')}"
    unknown = sorted(found.asked - symbol.asks) if symbol.asks else []
    return f"now asks {', '.join(unknown)} of the model" if unknown else None


def _holds(signature, parameters, exact):
    """Whether the wanted parameters come first, in order, and whatever else there is may be left out."""
    wanted = [name for name in signature.split(", ") if name]
    names = [parameter.name for parameter in parameters]
    positional = [name for name in wanted if not name.startswith("*")]
    rest = [p for p in parameters[len(positional) :] if not p.name.startswith("*")]
    return (
        names[: len(positional)] == positional
        and all(name in names for name in wanted)
        and all(parameter.optional for parameter in rest)
        and not (exact and rest)
    )


# --- the live package ------------------------------------------------------------------------------------------------


def live(symbol):
    """`Found` for the imported release, or None."""
    try:
        target = importlib.import_module(f"transformers.{symbol.module}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("transformers"):
            return None
        raise
    for part in symbol.name.split("."):
        if not hasattr(target, part):
            return None
        target = getattr(target, part)
    if inspect.isclass(target):
        return Found(None, frozenset(_live_names(target)))
    if not callable(target):
        return Found(None, frozenset())
    stored = getattr(getattr(inspect.unwrap(target), "__code__", None), "co_names", ())
    return Found(_live_parameters(target), frozenset(stored))


def _live_parameters(function):
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return tuple(
        Parameter(stars.get(p.kind, "") + p.name, p.default is not p.empty)
        for p in inspect.signature(function).parameters.values()
    )


def _live_names(cls):
    for base in cls.__mro__:
        if base.__module__.startswith("transformers."):
            yield from vars(base)
            yield from vars(base).get("__annotations__", ())
            for value in vars(base).values():
                code = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
                yield from code.co_names if code else ()


def check_live(release):
    """Compare the imported transformers with every row that `patch()` cannot do without.

    Args:
        release: its version.

    Raises:
        RuntimeError: a row does not hold; the sentence names the symbol, what was found and expected, and the newest
            release known to work.
    """
    for symbol in SYMBOLS:
        if symbol.otherwise or not symbol.applies_to(release):
            continue
        what = difference(symbol, live(symbol))
        if what is not None:
            raise RuntimeError(
                f"{symbol.full_name} {what}: nothing has been patched in transformers {release}, install another "
                f"(the newest known to work is {NEWEST})."
            )
