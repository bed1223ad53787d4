"""What a build compiles without being asked: CUDA kernels for the GPUs of this machine, and for no others.

CMake is only configured. nvidia-smi is a stand-in; nvcc is the real one, where there is one.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="needs cmake and ninja")


@pytest.fixture
def configure(tmp_path):
    """Configures a build, and gives what CMake says of our CUDA kernels; `gpus` is what nvidia-smi prints, None if it fails."""

    def configure(*options: str, gpus: str | None) -> str:
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\nexit 9\n" if gpus is None else f"#!/bin/sh\nprintf '{gpus}'\n")
        program.chmod(0o755)
        build = tmp_path / "build"
        shutil.rmtree(build, ignore_errors=True)
        done = subprocess.run(
            ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DACCEL_PYTHON=OFF", *options],
            env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        (said,) = [line for line in done.stdout.splitlines() if "lightning_accel: " in line]
        return said.partition("lightning_accel: ")[2]

    return configure


def test_without_a_gpu_there_are_no_cuda_kernels(configure):
    """Catches minutes of compiling for GPUs that are not there."""
    for gpus in (None, "", "7.0\\n"):
        assert configure(gpus=gpus).startswith("CPU kernels only: nvidia-smi shows no GPU of sm_75 or newer")
    assert configure("-DACCEL_CUDA=OFF", gpus="9.0\\n") == "CPU kernels only: ACCEL_CUDA is OFF"


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.timeout(300)
def test_with_gpus_there_are_kernels_for_them_alone(configure):
    """Catches kernels for other GPUs, and a wish for certain ones that is ignored."""
    assert configure(gpus="8.6\\n9.0\\n8.6\\n").endswith(" for 86,90")
    assert configure("-DCMAKE_CUDA_ARCHITECTURES=80-real;90", gpus=None).endswith(" for 80-real,90")
