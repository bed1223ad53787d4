"""The source archive, the wheel built from it, and what the wheel's native module asks of a machine.

Building twice (archive, then wheel from the archive alone) catches a file that the build needs and the archive lacks. CUDA is
left out for time, and what the compiler would optimise: what is packed and linked does not depend on them.
"""

import configparser
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lightning_accel

pytest.importorskip("build", reason="the extra `dev` is not installed")
pytest.importorskip("scikit_build_core", reason="the extra `dev` is not installed")

pytestmark = pytest.mark.timeout(600)  # the first test waits for the build

ROOT = Path(__file__).parents[2]
NATIVE = re.compile(r"lightning_accel/_native\.[\w-]+\.so")


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """A folder with the source archive and the wheel."""
    folder = tmp_path_factory.mktemp("archives")
    options = ["-Ccmake.define.ACCEL_CUDA=OFF", "-Ccmake.build-type=Debug", f"-Cbuild-dir={folder / 'build'}"]
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), *options, str(ROOT)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    return folder


@pytest.fixture(scope="module")
def wheel(archives):
    (path,) = archives.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel's files, unpacked: a folder for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("installed")
    wheel.extractall(folder)
    return folder


# An editable install's finder comes before PYTHONPATH: neither it nor the working tree may answer for the wheel.
ONLY_THE_WHEEL = (
    "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'ScikitBuild' not in type(finder).__name__]\n"
)


def run_python(code, path):
    environment = {"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", ONLY_THE_WHEEL + code]
    result = subprocess.run(command, env=environment, cwd=path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_source_archive_holds_what_is_needed_and_no_build(archives):
    (path,) = archives.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "CMakeLists.txt", "constraints.txt", "Makefile"} <= names
    assert {"native/CMakeLists.txt", "native/bindings/module.cpp", "native/cuda/codecs.cu"} <= names
    assert {"src/lightning_accel/py.typed", "src/lightning_accel_autoload.py", "tests/packaging/test_distribution.py"} <= names
    unwanted = re.compile(r"(build|dist|\.venv|\.git|\.ci)(/|$)|.*(\.so|\.pyc|\.o)$|(.*/)?(__pycache__|\.\w+_cache)(/|$)")
    assert [name for name in names if unwanted.match(name)] == []


def test_wheel_holds_the_package_and_nothing_else(wheel):
    source = ROOT / "src"
    package = {
        path.relative_to(source).as_posix()
        for pattern in ("lightning_accel/**/*.py", "lightning_accel/*.pyi", "lightning_accel/py.typed", "*.py")
        for path in source.glob(pattern)
    }
    assert {"lightning_accel/py.typed", "lightning_accel/_native.pyi", "lightning_accel_autoload.py"} <= package
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    native = {name for name in names if NATIVE.fullmatch(name)}
    assert len(native) == 1
    assert names - native == package


def test_wheel_has_the_licence_and_the_entry_point(wheel):
    (info,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    points = configparser.ConfigParser()
    points.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {lightning_accel.__version__}\n" in metadata
    assert dict(points["torch.backends"]) == {"lightning_accel": "lightning_accel_autoload:activate"}


def test_entry_point_names_a_function_of_the_wheel(installed):
    assert run_python("import lightning_accel_autoload as a; print(callable(a.activate), a.__file__)", installed).split() == [
        "True",
        str(installed / "lightning_accel_autoload.py"),
    ]


def test_native_module_links_neither_torch_nor_cuda(installed):
    (module,) = (installed / "lightning_accel").glob("_native.*.so")
    dynamic = subprocess.run(["readelf", "--dynamic", "--wide", module], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*?)\.so", dynamic)
    # The C and C++ runtimes, and what a static cudart asks for; no libtorch, libc10, libcudart or libcuda.
    assert needed
    assert set(needed) <= {
        "libc",
        "libm",
        "libstdc++",
        "libgcc_s",
        "libpthread",
        "libdl",
        "librt",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    }
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_native_module_loads_without_torch_and_without_a_driver(installed):
    (module,) = (installed / "lightning_accel").glob("_native.*.so")
    loaded = run_python(
        f"""
import importlib.util, pathlib
spec = importlib.util.spec_from_file_location("lightning_accel._native", {str(module)!r})
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
assert "torch" not in sys.modules
assert native.instruction_set() in native.instruction_sets()
print(native.CUDA_ARCHITECTURES == "", pathlib.Path("/proc/self/maps").read_text())
""",
        installed,
    )
    assert loaded.startswith("True ")
    assert not re.search(r"libtorch|libc10|libcuda", loaded)


def test_package_of_the_wheel_imports(installed):
    code = """
import lightning_accel
import lightning_accel.compression.operations
from lightning_accel import _native
print(lightning_accel.__file__, _native.__file__)
"""
    for file in run_python(code, installed).split():
        assert Path(file).is_relative_to(installed)
