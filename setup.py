"""Packaging of whisper_static_cache.

The ranges below are what the code supports; `constraints.txt` is the one pinned set that the tests run on.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "whisper_static_cache" / "__init__.py").read_text()).group(1)

EXTRAS = {
    # Low-bit decoder weights.
    "quantize": ["hqq>=0.2.8", "torchao>=0.17", "safetensors"],
    # Where CUDA is: no marker can ask for that, and triton is large. CUDA builds of torch bring triton along.
    "cuda": ["triton>=3.3; platform_system == 'Linux'", "gemlite>=0.6"],
    # Reading and resampling of audio files.
    "audio": ["soundfile>=0.12", "soxr>=0.3"],
    "demo": ["soundfile>=0.12", "soxr>=0.3", "tokenizers"],
    # The plots of benchmarks/.
    "benchmarks": ["jiwer>=3", "matplotlib>=3.8"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.5",
        "hypothesis>=6.100",
        "ruff>=0.9",
        "nox>=2024.4",
        "soundfile>=0.12",
        "soxr>=0.3",
        "jiwer>=3",
        # The tests run the GPU engine's kernels in its interpreter.
        "triton>=3.3; platform_system == 'Linux'",
    ],
}

setup(
    name="whisper_static_cache",
    version=VERSION,
    description="A preallocated encoder-decoder cache and a host-free decode loop for transformers' Whisper",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["whisper_static_cache", "whisper_static_cache.*"]),
    # The source of the persistent kernel, which is compiled where it runs.
    package_data={"whisper_static_cache.ops": ["*.cu"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "transformers>=4.46,<6"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["whisper-static-cache = whisper_static_cache.cli:main"]},
)
