"""`python -m whisper_static_cache.compat` on sources that have been tampered with, and on bad input."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import transformers

from whisper_static_cache import compat
from whisper_static_cache._compat import CACHE_NAME
from whisper_static_cache.compat_symbols import SYMBOLS


ROOT = Path(transformers.__file__).parent
# Whisper's classes inherit through these.
BETWEEN = {"generation.__init__", "modeling_utils", "models.whisper.generation_whisper"}
MODULES = sorted({symbol.module for symbol in SYMBOLS} | BETWEEN)
SAMPLE = "def _sample(\n"


@pytest.fixture
def release(tmp_path):
    """A function that writes a release with one text replaced by another, as a folder or a wheel."""

    def write(old="", new="", *, wheel=False, version="5.99.0"):
        folder = tmp_path / "changed" / "transformers"
        changed = 0
        for module in MODULES:
            source = ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
            changed += old != "" and old in source
            target = folder.joinpath(*module.split(".")).with_suffix(".py")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(source.replace(old, new) if old else source, encoding="utf-8")
        assert changed or not old, f"{old!r} is nowhere in the sources: choose another text"
        (folder / "__init__.py").write_text(f'__version__ = "{version}"\n')
        if not wheel:
            return folder.parent
        path = tmp_path / f"transformers-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*.py")):
                archive.write(file, file.relative_to(folder.parent).as_posix())
        return path

    return write


def run(*arguments):
    command = [sys.executable, "-m", "whisper_static_cache.compat", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_installed_release_is_supported():
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{transformers.__version__}: supported")


def test_neither_torch_nor_transformers_is_imported():
    code = """
import sys
from whisper_static_cache import compat
assert compat.main([]) == 0
assert not {"torch", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("wheel", [False, True])
def test_an_unknown_release_that_has_everything_is_supported(release, capsys, wheel):
    assert compat.main([str(release(wheel=wheel))]) == 0
    assert capsys.readouterr().out.startswith("5.99.0: supported, not in the test matrix")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (SAMPLE, "def _sample_tokens(\n", "WhisperForConditionalGeneration._sample is missing, expected with"),
        (SAMPLE, "def _sample(\n        extra,\n", "_sample has the parameters (extra, self, input_ids"),
        ("self.fc1 = ", "self.up = ", "WhisperDecoderLayer no longer sets fc1"),
        (f"    {CACHE_NAME}: ", "    kept: ", "GenerateEncoderDecoderOutput no longer sets cache or past_key_values"),
        ("class MaxLengthCriteria(", "class LengthCriteria(", "MaxLengthCriteria is missing"),
    ],
)
def test_what_patch_needs_is_missed(release, capsys, old, new, said):
    assert compat.main([str(release(old, new))]) == 1
    out = capsys.readouterr().out
    assert out.startswith("5.99.0: not supported")
    assert said in out and "; see " in out


def test_what_patch_can_do_without_is_told_with_its_effect(release, capsys):
    assert compat.main([str(release("class TopKLogitsWarper(", "class TopK("))]) == 0
    out = capsys.readouterr().out
    assert out.startswith("5.99.0: supported")
    assert "TopKLogitsWarper.__call__ is missing" in out
    assert "step with the host; see logits_processors.py" in out


@pytest.mark.parametrize("version", ["4.45.2", "6.0.0"])
def test_a_release_outside_of_the_range_is_not_supported(release, capsys, version):
    assert compat.main([str(release(version=version))]) == 1
    assert capsys.readouterr().out.startswith(f"{version}: not supported, outside of the range 4.46 up to 6")


def test_several_releases_are_reported_one_by_one(release, capsys):
    bad = release(SAMPLE, "def sample(\n")
    assert compat.main([str(ROOT), str(bad)]) == 1
    heads = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert [head.split(":")[0] for head in heads] == [transformers.__version__, "5.99.0"]


@pytest.mark.parametrize("kind", ["missing", "text", "empty folder", "other wheel"])
def test_what_is_no_release_is_refused_in_one_sentence(tmp_path, kind):
    path = tmp_path / "thing.whl"
    if kind == "text":
        path.write_text("no wheel")
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "other wheel":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("other/__init__.py", "")
    done = run(path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert str(path) in done.stderr and "give a version, a wheel, or a folder." in done.stderr


NO_SUCH_VERSION = "Could not find a version that satisfies the requirement transformers==9.9.9 (from versions: {})"


@pytest.mark.parametrize(
    ("versions", "reason"),
    [("4.0, 5.0", "give a version that has been released"), ("none", "check the network or give a wheel")],
)
def test_what_pip_cannot_fetch_is_told_in_one_sentence(monkeypatch, capsys, versions, reason):
    def fail(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=NO_SUCH_VERSION.format(versions))

    monkeypatch.setattr(compat.subprocess, "run", fail)
    assert compat.main(["9.9.9"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("transformers 9.9.9 cannot be downloaded: ") and reason in captured.err
    assert captured.err.count("\n") == 1


def test_a_version_is_fetched_by_pip_as_a_wheel_alone(release, monkeypatch, capsys):
    wheel = release(wheel=True)
    commands = []

    def fetch(command, **kwargs):
        commands.append(command)
        target = Path(command[command.index("--dest") + 1]) / wheel.name
        target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(compat.subprocess, "run", fetch)
    assert compat.main(["5.99.0", "latest"]) == 0
    assert capsys.readouterr().out.count("5.99.0: supported") == 2
    assert all("--no-deps" in command and "download" in command for command in commands)
    assert commands[0][-1] == "transformers==5.99.0" and commands[1][-2:] == ["--pre", "transformers"]
