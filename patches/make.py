"""Make the patch series for a release of transformers from this package's own modules.

    python patches/make.py 5.24.0            # rewrites patches/5.24.0/
    python patches/make.py --check           # every release in RELEASES: fails where a series is not up to date

A module of the package becomes a new file beside Whisper's own, with its imports rewritten and the seams of `_compat`
resolved for that release; upstream's files get the small edits listed here; tests and documentation are copied from
`parts/`. The released wheel is the base: its `transformers/` is `src/transformers/` of the source tree. Wheels are
kept in `build/wheels` and fetched with pip when missing.
"""

import argparse
import ast
import difflib
import json
import re
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PARTS = ROOT / "patches" / "parts"
RUFF = ("--config", str(ROOT / "patches" / "ruff.toml"))  # upstream's settings
WHEELS = ROOT / "build" / "wheels"
RELEASES = ("4.57.6", "5.17.0", "5.24.0")
CASE = ("shape", "bits", "batch", "timestamps", "dtype")  # what a row of benchmarks/results was measured on
WHISPER = "src/transformers/models/whisper"
OLD_NAME = "past_key_values"  # of the cache, in the package's own texts and in `parts/`; from 5.24 it is another

LICENSE = """\
# Copyright 2026 The HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""

# Module of the package -> file beside Whisper's own upstream.
MODULES = {
    "cache_utils": "cache_whisper",
    "int8_states": "int8_states_whisper",
    "modeling_whisper": "decode_step_whisper",
    "cuda_graphs": "cuda_graphs_whisper",
    "logits_process": "device_logits_process_whisper",
    "logits_processors": "device_logits_processors_whisper",
    "engines": "engines_whisper",
    "sessions": "sessions_whisper",
    "run_report": "run_report_whisper",
    "token_choice": "token_choice_whisper",
    "generation_whisper": "static_generation_whisper",
    "beam_search": "beam_search_whisper",
}
# How a module of the package imports -> how a file beside Whisper's own does.
IMPORTS = (
    (r"^from transformers import WhisperConfig$", "from .configuration_whisper import WhisperConfig"),
    (r"^from transformers\.", "from ..."),
    (r"^import logging$", "from ...utils import logging"),
    (r"logging\.getLogger\(", "logging.get_logger("),
    (r"^ *from \. import _compat\n", ""),
)


class Tree(dict):
    """Files of a source tree by path: read from the wheel when first asked for, changed by the steps."""

    def __init__(self, release):
        super().__init__()
        self.release = release
        self.archive = zipfile.ZipFile(wheel(release))

    def __missing__(self, path):
        self[path] = self.archive.read(path.removeprefix("src/")).decode()
        return self[path]

    def add(self, path, text):
        if path.removeprefix("src/") in self.archive.namelist():
            raise ValueError(f"{path} exists in transformers {self.release} already: choose another name.")
        self[path] = text

    @property
    def cache_name(self):
        """What the release calls the cache, as an argument and in what is returned."""
        fields = self["src/transformers/generation/utils.py"]
        return "cache" if "\n    cache: Cache" in fields else OLD_NAME

    def edit(self, path, pattern, replacement):
        """Replace the one match of a regular expression."""
        self[path] = substitute(self[path], pattern, replacement, path)


def substitute(text, pattern, replacement, where):
    text, count = re.subn(pattern, lambda match: match.expand(replacement), text, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"{where}: {count} matches of {pattern!r} where one is expected; mend patches/make.py.")
    return text


def wheel(release):
    """Path of the release's wheel, fetched with pip if it is not there yet."""
    path = WHEELS / f"transformers-{release}-py3-none-any.whl"
    if not path.exists():
        WHEELS.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        # Two test processes may want it at once: it appears whole or not at all.
        with tempfile.TemporaryDirectory(dir=WHEELS) as folder:
            subprocess.run([*command, "--only-binary=:all:", "-d", folder, f"transformers=={release}"], check=True)
            (Path(folder) / path.name).replace(path)
    return path


# --- the package's modules -------------------------------------------------------------------------------------------


def definition(tree, name):
    """The statement that defines `name`, at the top level or, as `Class.method`, in a class; None without one."""
    scope, _, name = name.rpartition(".")
    for node in definition(tree, scope).body if scope else tree.body:
        targets = [getattr(target, "id", None) for target in getattr(node, "targets", [])]
        if getattr(node, "name", None) == name or name in targets:
            return node
    return None


def without(source, *names):
    """`source` without the definitions of `names`, and the comments directly above them."""
    for name in names:
        node = definition(ast.parse(source), name)
        if node is None:
            raise ValueError(f"{name} is not defined any more; mend patches/make.py.")
        lines = source.splitlines(keepends=True)
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while lines[first - 1].lstrip().startswith("#"):
            first -= 1
        source = "".join(lines[:first] + lines[node.end_lineno :])
    return source


def taken(module, name):
    """The source of one top-level definition of a module of the package."""
    source = (ROOT / "whisper_static_cache" / f"{module}.py").read_text()
    return ast.get_source_segment(source, definition(ast.parse(source), name))


def ported(tree, module, drop=(), edits=(), append=""):
    """A module of the package as a file upstream.

    Args:
        tree: the release's `Tree`.
        module: its name in the package.
        drop: definitions that stay in the package, as `name` or `Class.method`.
        edits: pairs of regular expression and replacement, each for one match.
        append: source added at the end.
    """
    source = (ROOT / "whisper_static_cache" / f"{module}.py").read_text()
    source = without(source, *drop)
    if definition(ast.parse(source), "__all__"):
        source = without(source, "__all__")  # upstream exports whatever a file lists there
    for pattern, replacement in edits:
        source = substitute(source, pattern, replacement, module)
    source = f"{source}\n\n{append}" if append else source
    name = tree.cache_name
    for pattern, replacement in (
        (r"_compat\.cache_of\(arguments\)", f'arguments.get("{name}")'),
        (r"\*\*\{_compat\.CACHE_NAME: (.*)\}", rf"{name}=\1"),
        (r"\{(?:_compat\.)?CACHE_NAME\}", name),
        (r"_compat\.CACHE_NAME", f'"{name}"'),
        (OLD_NAME, name),
    ):
        source = re.sub(pattern, replacement, source)
    for pattern, replacement in IMPORTS:
        source = re.sub(pattern, replacement, source, flags=re.MULTILINE)
    for name, upstream in MODULES.items():
        source = re.sub(rf"^( *from )\.{name} import", rf"\1.{upstream} import", source, flags=re.MULTILINE)
        source = re.sub(rf"^from \. import {name} as", f"from . import {upstream} as", source, flags=re.MULTILINE)
    left = re.findall(r".*(?:_compat|whisper_static_cache|monkey_patch).*", source)
    if left:
        raise ValueError(f"{module}: left over from the package: {left}; mend patches/make.py.")
    return polished(LICENSE + source)


def polished(source):
    """`source` with unused imports removed, sorted and formatted as upstream does."""
    for command in (("check", "--fix", "-q", "--select=F401,I"), ("format", "-q")):
        run = [sys.executable, "-m", "ruff", *command, *RUFF, "--stdin-filename=file.py", "-"]
        source = subprocess.run(run, input=source, text=True, capture_output=True, check=True).stdout
    return source


def method(source):
    """Source of methods, formatted, to stand before another one."""
    return polished(f"class _:\n{source}").split("\n", 1)[1] + "\n"


# --- step 1: the cache -----------------------------------------------------------------------------------------------

OWN_CACHE = '''\
    def {name}(self, {arguments}):
        """A static cache that persists across calls and serves any smaller batch: a larger one replaces it."""
        if cache_implementation != "static":
            return super().{name}({arguments})
        states = model_kwargs["encoder_outputs"][0]
        cache = getattr(self, "_cache", None)
        wanted = (states.device, self.dtype, states.shape[1])
        if (
            not isinstance(cache, EncoderDecoderStaticCache)
            or cache.max_batch_size < batch_size
            or (cache.device, cache.dtype, cache.max_source_len) != wanted
        ):
            cache = EncoderDecoderStaticCache(
                self.config, batch_size, max_source_len=states.shape[1], device=states.device, dtype=self.dtype
            )
        self._cache = cache
        return cache

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("{cache_name}")
        if isinstance(cache, EncoderDecoderStaticCache):
            # Each decode is a recording, a window or a temperature of its own.
            cache.reset()

'''


def static_cache(tree):
    is_v4 = tree.release.startswith("4.")
    source = ported(
        tree,
        "cache_utils",
        edits=(
            (r"^from \._compat import .*\n", "from transformers.utils.import_utils import requires\n"),
            (
                r"^(from transformers\.cache_utils import) .*",
                r"\1 Cache, EncoderDecoderCache, StaticCache, StaticLayer",
            ),
            (r"^class _StaticHalf\(LayerColumns, StaticCache\)", "class _StaticHalf(StaticCache)"),
            (r"^        init_cache\(self, layers\)", "        Cache.__init__(self, layers=layers)"),
            (r"^        init_module\(self\)\n", ""),
            (r" does under `patch\(\)`", " does"),
            (r"^    From transformers 5\.24 on .*\n\n", ""),
            # `crop(0)` keeps nothing in 4.57 and removes nothing in 5.x
            (r"tokens > 0 or CROP_ZERO_EMPTIES:", "tokens >= 0:" if is_v4 else "tokens > 0:"),
            (r"^class EncoderDecoderStaticCache", '@requires(backends=("torch",))\n\\g<0>'),
        ),
        append='__all__ = ["EncoderDecoderStaticCache"]\n',
    )
    tree.add(f"{WHISPER}/cache_whisper.py", source)
    tree.add(f"{WHISPER}/{MODULES['int8_states']}.py", ported(tree, "int8_states"))
    configuration = r"^ *from \.configuration_whisper"
    tree.edit(f"{WHISPER}/__init__.py", configuration, "    from .cache_whisper import *\n\\g<0>")
    path = f"{WHISPER}/generation_whisper.py"
    own_import = "from .cache_whisper import EncoderDecoderStaticCache\n"
    tree.edit(path, r"^from \.tokenization_whisper", own_import + r"\g<0>")
    name, rest = ("_prepare_static_cache", "prefill_chunk_size, model_kwargs")
    if is_v4:
        name, rest = ("_get_cache", "model_kwargs")
    arguments = f"cache_implementation, batch_size, max_cache_len, {rest}"
    own = OWN_CACHE.format(name=name, arguments=arguments, cache_name=tree.cache_name)
    tree.edit(path, r"^    def generate_with_fallback\(", method(own) + r"\g<0>")
    # The batch of a long recording shrinks; rows were added back for a cache that could not.
    padding = r'if generation_config\.cache_implementation == "static" and cur_bsz < batch_size:'
    tree.edit(path, rf"^ {{12}}{padding}\n(?: {{16}}.*\n)+\n", "")
    tree.edit(path, r"^ {12}if cur_bsz < batch_size:\n(?: {16}.*\n)+\n", "")
    # Nor need every prompt be as long as the longest possible: only the step of one token is ever compiled.
    tree.edit(path, r'^ +padding = "max_length" if .* == "static" else "longest"\n\n', "")
    tree.edit(path, r"padding=padding,\n( +bos_token_tensor=prev_ids)", r'padding="longest",\n\1')


# --- step 2: the loop ------------------------------------------------------------------------------------------------

ENGINE_CHOICE = '''\
def default_engine(model, device):
    """The engine that "auto" means."""
    return "compile" if device.type == "cuda" else "eager"


def on_static_cache(generate):
    """Decorator of Whisper's `generate`: the decodes of a call know what its caller will see of them."""
    signature = inspect.signature(generate)

    @functools.wraps(generate)
    def wrapper(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs).arguments
        arguments = {**arguments, **arguments.pop("kwargs", {})}
        config = arguments.get("generation_config") or self.generation_config
        uncompiled = arguments.get("disable_compile", getattr(config, "disable_compile", False))
        with generate_call(self, "eager" if uncompiled else "auto", arguments):
            return generate(self, *args, **kwargs)

    return wrapper


def reads_logprobs(retrieve):
    """Decorator of `_retrieve_avg_logprobs`: scores may also be the log-probabilities of the chosen tokens."""
    return functools.wraps(retrieve)(functools.partial(average_logprob, retrieve))
'''

LOOP = """\
    def _sample(self, *args, **kwargs):
        return sample(GenerationMixin._sample, self, *args, **kwargs)

"""


def device_loop(tree):
    tree.add(f"{WHISPER}/{MODULES['cuda_graphs']}.py", ported(tree, "cuda_graphs", drop=["StepCounter", "_LOOKS"]))
    tree.add(f"{WHISPER}/{MODULES['modeling_whisper']}.py", ported(tree, "modeling_whisper"))
    tree.add(f"{WHISPER}/{MODULES['logits_processors']}.py", ported(tree, "logits_processors"))
    tree.add(
        f"{WHISPER}/{MODULES['logits_process']}.py",
        ported(tree, "logits_process", drop=["ProcessorPlan.greedy_rules"]),
    )
    tree.add(f"{WHISPER}/{MODULES['run_report']}.py", ported(tree, "run_report"))
    tree.add(
        f"{WHISPER}/{MODULES['engines']}.py",
        ported(
            tree,
            "engines",
            edits=[(r"^\n# Last, since its class.*\n.*triton_engine.*\n", "")],
        ),
    )
    kept = (
        r"^ +# What an engine keeps for this session, by the engine's name\.\n.*\n",
        r"^ +# What stands in for the encoder; .*\n.*\n",
    )
    tree.add(f"{WHISPER}/{MODULES['sessions']}.py", ported(tree, "sessions", edits=[(line, "") for line in kept]))
    tree.add(
        f"{WHISPER}/{MODULES['token_choice']}.py",
        ported(
            tree,
            "token_choice",
            drop=["RuledChoice"],
            edits=(
                (r"^ +rules = plan\.greedy_rules.*\n.*\n +return RuledChoice.*\n", ""),
                (r"\n\n    An engine that chooses tokens itself gets .*\n    ", ""),
                (
                    r"_compat\.average_logprob\(logprobs, tokens, args, kwargs\)",
                    "sum(logprobs[index] for index in range(len(logprobs))) / len(tokens)",
                ),
            ),
        ),
    )
    tree.add(
        f"{WHISPER}/{MODULES['generation_whisper']}.py",
        ported(
            tree,
            "generation_whisper",
            drop=["warmup", "_warmup_job", "default_engine", "encoder_for_call", "_has_content"],
            edits=(
                (r"^import logging$", "import functools\nimport inspect\nimport logging"),
                (r"^(from \.token_choice import)", r"\1 average_logprob,"),
                (r"_compat\.mask_moves_positions\(\)", "True"),  # in the releases of the series
                # The cache is the caller's or the model's own here, and either may be seen.
                (r"^ +if config\.cache_implementation and self\.call\.keeps_results.*\n.*\n", ""),
                (
                    r'if self\.user_cache is None and .*\n.*"',
                    r'if self.user_cache is None:\n            return "the cache is not an EncoderDecoderStaticCache"',
                ),
                (r"^        if cache is None:\n(?: {12}.*\n)+", ""),
                (
                    r"\n\n    Raises:\n        ValueError: `generate` has not been called on `model` since `patch\(\)`\.\n    ",
                    "\n    ",
                ),
                (r"that `generate` was called on while patched", "that `generate` was called on"),
                (r"has not generated since patch\(\)", "has not generated"),
                (
                    r"# Implementations of stock's that this package's cache stands in for\.",
                    "# Implementations that this loop serves.",
                ),
                (r'"whisper_static_cache_call"', '"whisper_generate_call"'),
                (r"a cache of this package that cannot", "a cache that cannot"),
                (r"this way of decoding is not served", "it never sampled"),
            ),
            append=ENGINE_CHOICE,
        ),
    )
    path = f"{WHISPER}/generation_whisper.py"
    tree.edit(
        path,
        r"^from \.tokenization_whisper",
        "from .static_generation_whisper import on_static_cache, reads_logprobs, sample\n\\g<0>",
    )
    tree.edit(path, r"^    def generate\($", r"    @on_static_cache\n\g<0>")
    tree.edit(path, r"^    def _retrieve_avg_logprobs\(", r"    @reads_logprobs\n\g<0>")
    tree.edit(path, r"^    def generate_with_fallback\(", method(LOOP) + r"\g<0>")


# --- step 3: beams ---------------------------------------------------------------------------------------------------

BEAMS = """\
    def _beam_search(self, *args, **kwargs):
        return beam_search(GenerationMixin._beam_search, self, *args, **kwargs)

"""


def shared_beams(tree):
    tree.add(
        f"{WHISPER}/{MODULES['beam_search']}.py",
        ported(
            tree,
            "beam_search",
            edits=[(r"_compat\.mask_moves_positions\(\)", "True"), (r"this package's", "Whisper's")],
        ),
    )
    path = f"{WHISPER}/generation_whisper.py"
    tree.edit(path, r"^from \.cache_whisper", "from .beam_search_whisper import beam_search\n\\g<0>")
    tree.edit(path, r"^    def generate_with_fallback\(", method(BEAMS) + r"\g<0>")


STEPS = (
    ("0001-static-cache", static_cache),
    ("0002-device-loop", device_loop),
    ("0003-shared-beams", shared_beams),
)


# --- diffs -----------------------------------------------------------------------------------------------------------


def series(release):
    """The series for a release: file name -> text of the patch, its pull request's text first."""
    tree = Tree(release)
    patches = {}
    for name, step in STEPS:
        before = dict(tree)
        step(tree)
        for path in sorted((PARTS / name).rglob("*")):
            if path.is_file() and path.name != "pull_request.md":
                tree.add(str(path.relative_to(PARTS / name)), path.read_text().replace(OLD_NAME, tree.cache_name))
        text = (PARTS / name / "pull_request.md").read_text().rstrip().replace(OLD_NAME, tree.cache_name)
        for field, value in (("{release}", release), ("{rows}", parity_rows()), ("{numbers}", numbers())):
            text = text.replace(field, value)
        known = {path: before[path] if path in before else original(tree, path) for path in tree}
        diffs = [diff(path, known[path], tree[path]) for path in sorted(tree) if known[path] != tree[path]]
        patches[f"{name}.patch"] = f"Subject: {text}\n---\n" + "".join(diffs)
    return patches


def parity_rows():
    """How many rows the parity table has."""
    source = (ROOT / "tests" / "parity" / "rows.py").read_text()
    return str(len(definition(ast.parse(source), "ROWS").value.keys))


def numbers():
    """What benchmarks/results has on the engines that the series brings, as sentences."""
    results = ROOT / "benchmarks" / "results"
    rows = [json.loads(line) for line in (results / "decode_h100.jsonl").read_text().splitlines()]
    lines = []
    for row in rows:
        case = [row[key] for key in CASE]
        if row["engine"] != "compile" or row["bits"] != 16:
            continue
        # Only stock of the same run: another run's host may be half as fast.
        stock = [r for r in rows if r["engine"] == "stock-static" and case == [r[k] for k in CASE]]
        other = next((r for r in stock if r["command"] == row["command"] and r["commit"] == row["commit"]), None)
        speed, first_call = (f"{row['tok_s']:.0f} tokens/s", f"first call {row['first_call_s']:.1f} s")
        if other is not None:
            speed = f"{other['tok_s']:.0f} to {speed}"
            first_call = f"first call {other['first_call_s']:.1f} s to {row['first_call_s']:.1f} s"
        lines.append(
            f"- Decoding, {row['shape']} at random weights, {row['dtype']}, batch {row['batch']}"
            f"{', timestamps' if row['timestamps'] else ''}: {speed}, {first_call}, "
            f"{row['tokens_equal_to_first_case']:.0%} of the tokens those of the static cache "
            f"({row['gpu']}, torch {row['torch']}, transformers {row['transformers']})."
        )
    rows = [json.loads(line) for line in (results / "transcription_cpu.jsonl").read_text().splitlines()]
    for row in rows:
        if row["engine"] == "eager":
            lines.append(
                f"- Real speech on {row['threads']} CPU threads, fp32, {row['model']}, {row['measured']}: "
                f"{row['speed_up_over_faster_stock']:.2f}x the faster of the dynamic and the static cache, tokens "
                f"{'identical' if row['tokens_identical'] else 'not identical'}."
            )
    return "\n".join(textwrap.fill(line, 119, subsequent_indent="  ") for line in lines)


def original(tree, path):
    name = path.removeprefix("src/")
    return tree.archive.read(name).decode() if path.startswith("src/") and name in tree.archive.namelist() else None


def diff(path, before, after):
    """One file's part of a patch as git writes it; `before` is None for a new file."""
    head = f"diff --git a/{path} b/{path}\n"
    if before is None:
        head += "new file mode 100644\n"
    lines = difflib.unified_diff(
        (before or "").splitlines(keepends=True),
        after.splitlines(keepends=True),
        "/dev/null" if before is None else f"a/{path}",
        f"b/{path}",
    )
    return head + "".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("releases", nargs="*", help=f"of transformers; all of {', '.join(RELEASES)} if none is named")
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a series is not up to date")
    options = parser.parse_args()
    stale = []
    for release in options.releases or RELEASES:
        folder = ROOT / "patches" / release
        made = series(release)
        if {path.name: path.read_text() for path in folder.glob("*.patch")} == made:
            continue
        stale.append(release)
        if not options.check:
            folder.mkdir(exist_ok=True)
            for path in folder.glob("*.patch"):
                path.unlink()
            for name, text in made.items():
                (folder / name).write_text(text)
    print(
        "\n".join(f"{release}: {'not up to date' if options.check else 'written'}" for release in stale)
        or "up to date"
    )
    return options.check and bool(stale)


if __name__ == "__main__":
    sys.exit(main())
