"""The test matrix.

nox -s releases              # every release of transformers in RELEASES, and the newest one, pre-releases included
nox -s "releases(5.4.0)"     # one of them
nox -s releases -- speed     # the ratio to each release's stock instead, on a machine that does nothing else
nox -s releases -- ARGUMENTS # those for pytest, instead of the whole matrix
nox -s torches               # the oldest and the newest torch supported
nox -s minimal               # no optional package at all
nox -s patches               # the series for upstream, on each release that it is made for

The first three write the rows of README.md's table of releases.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from xml.etree import ElementTree

import nox


ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from whisper_static_cache.compat_symbols import NEWEST, RELEASES  # noqa: E402


nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True

TORCH = "2.13.0"
OLDEST_TORCH = "2.6.0"
LATEST = "latest"
RESULTS = ROOT / "benchmarks" / "results"
TEST_TOOLS = ("pytest", "pytest-xdist", "hypothesis")
QUANTISERS = ("hqq==0.2.8.post1", "torchao==0.18.0")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
# What depends on the release; the compile engine runs the same step on all of them and is tested on the pinned one.
TESTS = (
    "tests/parity/test_generate.py",
    "tests/compat",
    "tests/test_generation_whisper.py",
    "tests/test_beam_search.py",
    "tests/test_monkey_patch.py",
    "tests/test_pytest_plugin.py",
    "tests/test_cache_utils.py",
    "tests/test_logits_process.py",
    "tests/test_quantization.py",
    "tests/test_quantized_generate.py",
)
NOT_COMPILED = ("-k", "not compile or nothing_compiles")


def share_torch(session, version):
    """Let the environment see a CPU torch that is installed once for all environments: unpacking it takes minutes.

    What a release wants in another version than torch brings along is installed into its own environment, which comes
    first.
    """
    layer = Path(session.cache_dir).resolve() / f"torch-{version}-{sys.implementation.cache_tag}"
    if not layer.is_dir():
        report = Path(session.create_tmp()) / "torch.json"
        pip = ("python", "-m", "pip", "install", "--quiet")
        session.run_install(
            *pip, "--dry-run", "--ignore-installed", "--no-deps", "--report", str(report), f"torch=={version}"
        )
        wanted = json.loads(report.read_text())["install"][0]["metadata"].get("requires_dist", [])
        if sys.platform == "linux" and any(name.startswith(("nvidia-", "cuda-")) for name in wanted):
            session.skip(f"of torch {version} only the CUDA build, several gigabytes of it, is to be had here")
        partial = layer.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        session.run_install(*pip, "--target", str(partial), f"torch=={version}")
        partial.rename(layer)
    paths = {"base": session.virtualenv.location, "platbase": session.virtualenv.location}
    site = Path(sysconfig.get_path("purelib", sysconfig.get_default_scheme(), paths))
    (site / "shared_torch.pth").write_text(f"{layer}\n")


def install_release(session, release):
    """That release of transformers, on the pinned torch."""
    share_torch(session, TORCH)
    # A bound that is a pre-release admits pre-releases of transformers, and of nothing else.
    wanted = f"transformers>={NEWEST}rc0" if release == LATEST else f"transformers=={release}"
    session.install(wanted, *TEST_TOOLS, *QUANTISERS, *(("--upgrade",) if release == LATEST else ()))


def write_row(name, row):
    """Put `row`, and the commit, into a results file in place of the one of the same release."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    row = {**row, "commit": commit.stdout.strip()}
    path = RESULTS / name
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [r for r in rows if r["release"] != row["release"]] + [row]
    order = (*RELEASES, LATEST)
    rows.sort(key=lambda r: order.index(r["release"]) if r["release"] in order else -1)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@nox.session
@nox.parametrize("release", [nox.param(path.name, id=path.name) for path in sorted(ROOT.glob("patches/[0-9]*"))])
def patches(session, release):
    """The series for upstream: it is up to date and applies; the parity table and its own tests after each step."""
    install_release(session, release)
    session.install("ruff", "-c", "constraints.txt")
    session.run("python", "-m", "pytest", "-q", "tests/test_patches.py", env={**ENVIRONMENT, "WSC_PATCH_STEPS": "all"})


@nox.session
@nox.parametrize("release", [nox.param(name, id=name) for name in (*RELEASES, LATEST)])
def releases(session, release):
    """One release of transformers, in an environment of its own: parity, cache, patch, compat, quantisation."""
    install_release(session, release)
    if session.posargs == ["speed"]:
        measure(session, release)
    elif session.posargs:
        session.run("python", "-m", "pytest", *NOT_COMPILED, *session.posargs, env=ENVIRONMENT)
    else:
        test(session, release)


def test(session, release):
    record = Path(session.create_tmp()) / "tests.xml"
    started = time.time()
    arguments = ("-q", "-n", os.environ.get("WSC_TEST_WORKERS", "2"), f"--junitxml={record}")
    session.run("python", "-m", "pytest", *TESTS, *NOT_COMPILED, *arguments, env=ENVIRONMENT)
    cases = list(ElementTree.parse(record).iter("testcase"))
    passed = [case for case in cases if case.find("skipped") is None]
    code = "import torch, transformers; print(transformers.__version__, torch.__version__)"
    said = session.run("python", "-c", code, silent=True, env=ENVIRONMENT)
    version, torch_version = said.strip().splitlines()[-1].split()
    row = {
        "release": release,
        "transformers": version,
        "torch": torch_version,
        "python": platform.python_version(),
        "passed": len(passed),
        "skipped": len(cases) - len(passed),
        # A parity test passes only where every token is stock's.
        "parity_identical": sum("tests.parity" in case.get("classname") for case in passed),
        "seconds": round(time.time() - started),
        "command": "nox -s releases",
    }
    write_row("releases_tests.jsonl", row)


def measure(session, release):
    output = Path(session.create_tmp()) / "row.json"
    session.run("python", "benchmarks/release_speed.py", "--output", str(output), env={"PYTHONPATH": str(ROOT)})
    row = {"release": release, **json.loads(output.read_text()), "command": "nox -s releases -- speed"}
    write_row("releases_speed.jsonl", row)


@nox.session
@nox.parametrize("torch", [nox.param(version, id=version) for version in (OLDEST_TORCH, TORCH)])
def torches(session, torch):
    """The oldest torch supported and the newest, on the newest transformers, the compile engine included.

    Only CPU builds are installed. Where the package index has none of a version, its session is skipped and says so:
    that version is then untested there.
    """
    share_torch(session, torch)
    session.install(f"transformers=={NEWEST}", *TEST_TOOLS, *QUANTISERS)
    arguments = session.posargs or ("-q", "-n", "2")
    session.run("python", "-m", "pytest", *TESTS, *arguments, env=ENVIRONMENT)


@nox.session
def minimal(session):
    """torch, transformers and the test tools, and no optional package: what needs one is skipped by name."""
    share_torch(session, TORCH)
    session.install(f"transformers=={NEWEST}", *TEST_TOOLS, "ruff")
    arguments = session.posargs or ("-q", "-n", "2", "-m", "not checkpoint and not speech", *NOT_COMPILED)
    session.run("python", "-m", "pytest", *arguments, env=ENVIRONMENT)


@nox.session
def lint(session):
    """Ruff, with the settings of pyproject.toml."""
    session.install("ruff", "-c", "constraints.txt")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
