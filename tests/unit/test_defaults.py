"""No tensor of ours follows the device or dtype that a user's script has made the default."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "lightning_accel"

WITHOUT_VALUES = {"zeros", "ones", "empty", "full", "eye", "linspace", "rand", "randn", "tensor", "scalar_tensor"}
"""Functions of torch that take the default dtype, at least for some arguments."""

CONSTRUCTORS = WITHOUT_VALUES | {"arange", "randint", "randperm"}
"""Functions of torch that take the default device."""


def problems_of(source: str, name: str) -> list[str]:
    """What a module's source makes by default, as file, line and the argument that lacks."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if not isinstance(node.func.value, ast.Name) or node.func.value.id != "torch" or node.func.attr not in CONSTRUCTORS:
            continue
        given = {keyword.arg for keyword in node.keywords}
        wanted = {"device"} | ({"dtype"} if node.func.attr in WITHOUT_VALUES else set())
        found += [f"{name}:{node.lineno} torch.{node.func.attr} without {lacking}" for lacking in sorted(wanted - given)]
    return found


def test_every_new_tensor_says_its_device_and_dtype():
    """Catches what works until a script calls torch.set_default_device or torch.set_default_dtype."""
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "reference"]
    assert len(paths) > 80
    assert [problem for path in paths for problem in problems_of(path.read_text(), str(path.relative_to(PACKAGE)))] == []


@pytest.mark.parametrize(
    ("source", "lacking"),
    [
        ("torch.zeros(3)", ["device", "dtype"]),
        ("torch.tensor(0.0, device=d)", ["dtype"]),
        ("torch.empty(3, dtype=torch.uint8)", ["device"]),
        ("torch.randperm(3, generator=g)", ["device"]),
        ("torch.zeros(3, dtype=torch.int32, device=d)", []),
        ("torch.empty_like(x), x.new_zeros(3), numpy.zeros(3)", []),
    ],
)
def test_the_check_finds_what_lacks(source, lacking):
    assert [problem.split()[-1] for problem in problems_of(source, "a.py")] == lacking
