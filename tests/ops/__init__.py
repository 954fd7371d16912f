"""Tests of whisper_static_cache/ops."""

import subprocess
from pathlib import Path


EMULATION = Path(__file__).with_name("cuda_emulation.h")


def compile_emulated(source, library, *flags, races=False):
    """Compiles CUDA C++ for the CPU emulation; with `races` it looks at every access to shared memory."""
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-DEMULATED", *flags, "-include", EMULATION, "-x", "c++", source]
    if not races:
        subprocess.run([*command, "-shared", "-o", library], check=True)
        return
    # The compiler is to call the emulation's own hooks, and the sanitizer's library is not to be linked.
    compiled = library.with_suffix(".o")
    subprocess.run([*command, "-DEMULATED_RACES", "-fsanitize=thread", "-c", "-o", compiled], check=True)
    subprocess.run(["g++", "-shared", compiled, "-o", library], check=True)
