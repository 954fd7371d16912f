"""The test matrix: `nox -s releases` runs the parity, cache and patch tests on releases of transformers."""

import nox


nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True

TORCH = "2.13.0"
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
)
# What depends on the release; the compile engine runs the same step on all of them and is tested on the pinned one.
TESTS = (
    "tests/parity/test_generate.py",
    "tests/test_generation_whisper.py",
    "tests/test_monkey_patch.py",
    "tests/test_cache_utils.py",
    "tests/test_logits_process.py",
)


@nox.session
@nox.parametrize("release", [nox.param(release, id=release) for release in RELEASES])
def releases(session, release):
    """One release, in an environment of its own."""
    # torch by its exact version: an unpinned one pulls gigabytes of CUDA packages.
    session.install(f"torch=={TORCH}", f"transformers=={release}", "pytest", "pytest-xdist", "hypothesis")
    session.install("--no-deps", "-e", ".")
    arguments = session.posargs or ("-n", "2", "-q", "-k", "not compile or nothing_compiles")
    session.run("python", "-m", "pytest", *TESTS, *arguments, env={"OMP_NUM_THREADS": "1"})


@nox.session
def lint(session):
    """Ruff, with the settings of pyproject.toml."""
    session.install("ruff", "-c", "constraints.txt")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
