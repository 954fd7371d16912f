"""The patch series for upstream: made from the package's modules, and right on the released source.

Making and applying are tested for every release of the series. What imports a patched tree needs that release's
dependencies, and is tested for the release that is installed: `nox -s patches` installs each.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from .parity import run_rows
from .parity.compare import assert_same


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "patches"))
import make  # noqa: E402


# Rows that the device-side loop leaves to transformers' own, with the reason that it gives.
ENGINES = {
    "attentions": "stock: attentions or hidden states of every step are asked for",
    "hidden-states": "stock: attentions or hidden states of every step are asked for",
    "no-cache": "stock: use_cache is False",
}
STEPS = [name for name, _ in make.STEPS]


def wheel(release):
    try:
        return make.wheel(release)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the wheel of transformers {release} cannot be had: {error}")


def patches(release):
    return sorted((ROOT / "patches" / release).glob("*.patch"))


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Function from release and number of steps to the patched source tree, each unpacked once."""
    made = {}

    def tree(release, steps):
        if (release, steps) not in made:
            root = tmp_path_factory.mktemp(f"transformers-{release}-{steps}-")
            with make.zipfile.ZipFile(wheel(release)) as archive:
                members = [name for name in archive.namelist() if name.startswith("transformers/")]
                archive.extractall(root / "src", members)
            subprocess.run(["git", "init", "-q", str(root)], check=True)
            for package in ("tests", "tests/models", "tests/models/whisper"):
                (root / package).mkdir()
                (root / package / "__init__.py").touch()  # as in the repository
            for patch in patches(release)[:steps]:
                subprocess.run(["git", "apply", "--whitespace=error-all", str(patch)], cwd=root, check=True)
            made[release, steps] = root
        return made[release, steps]

    return tree


@pytest.fixture
def installed():
    """The installed release, if there is a series for it."""
    release = transformers.__version__
    if release not in make.RELEASES:
        pytest.skip(f"no series for transformers {release}, which is installed here")
    return release


def python(root, *arguments, cwd=ROOT):
    """Run python with a patched tree in place of the installed transformers."""
    path = os.pathsep.join([str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return run.stdout


@pytest.mark.parametrize("release", make.RELEASES)
def test_the_series_is_what_the_package_makes(release):
    wheel(release)
    made = make.series(release)
    committed = {patch.name: patch.read_text() for patch in patches(release)}
    assert list(committed) == list(made)
    for name, text in made.items():
        assert committed[name] == text, f"{name} is not up to date: run python patches/make.py {release}"


@pytest.mark.parametrize("release", make.RELEASES)
def test_it_applies_in_order_and_passes_upstreams_lint(trees, release):
    for steps in range(1, len(STEPS) + 1):
        root = trees(release, steps)
        patch = patches(release)[steps - 1]
        touched = re.findall(r"^\+\+\+ b/(.*)$", patch.read_text(), flags=re.MULTILINE)
        files = [name for name in touched if name.endswith(".py")]
        new = [name for name in files if make.original(make.Tree(release), name) is None]
        assert new and len(new) < len(files)
        ruff(root, "check", *new)
        ruff(root, "format", "--check", *new)
        # Of upstream's own files only what an edit could break: older releases kept other rules.
        ruff(root, "check", "--ignore=UP,FURB,SIM,C4,RUF013", *set(files).difference(new))


def ruff(root, *arguments):
    command = [sys.executable, "-m", "ruff", *arguments, *make.RUFF]
    report = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert report.returncode == 0, report.stdout


@pytest.fixture(scope="module")
def stock():
    return run_rows.results()[0]


@pytest.mark.parametrize("steps", range(1, len(STEPS) + 1))
def test_each_step_gives_stocks_result_on_the_static_cache(trees, installed, stock, steps, tmp_path):
    """Every row of the parity table, on the patched tree and without this package."""
    if steps < len(STEPS) and os.environ.get("WSC_PATCH_STEPS") != "all":
        pytest.skip("the last step alone, which holds the others: nox -s patches runs the table after each")
    root = trees(installed, steps)
    python(root, "-m", "tests.parity.run_rows", str(tmp_path / "rows"), "static")
    patched, engines = torch.load(tmp_path / "rows", weights_only=False)
    for name, expected in stock.items():
        if isinstance(expected, str):
            assert name == "attentions", expected  # in 4.57 sdpa attention returns none, and generate fails
            continue
        actual = patched[name]
        assert not isinstance(actual, str), f"{name}: {actual}"
        assert_same(expected, cropped(actual, expected), name)
        if steps > 1:
            assert (steps == 2 and "beams" in name) or engines[name] == ENGINES.get(name, "eager"), name


def cropped(actual, expected):
    """`actual` with the caches in it cut to the slots that a growing cache would hold."""
    if isinstance(expected, torch.Tensor) and expected.dim() == 4:
        return actual[:, :, : expected.shape[2]]
    if isinstance(expected, dict):
        return {key: cropped(value, expected[key]) if key in expected else value for key, value in actual.items()}
    if isinstance(expected, tuple) and len(expected) == len(actual):
        return tuple(cropped(one, other) for one, other in zip(actual, expected))
    return actual


@pytest.mark.parametrize("steps", range(1, len(STEPS) + 1))
def test_each_steps_own_tests_pass(trees, installed, steps):
    root = trees(installed, steps)
    python(root, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/models/whisper", cwd=root)
