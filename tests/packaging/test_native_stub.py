"""`_native.pyi` is written by hand: here it is held against the module, name by name and argument by argument.

pybind11 writes each function's signature into its docstring. An argument renamed, added, moved or retyped in C++ alone
would pass mypy and fail at run time.
"""

import ast
import re
from pathlib import Path

import pytest

from lightning_accel import _native

STUB = Path(__file__).parents[2] / "src" / "lightning_accel" / "_native.pyi"


def spelled_alike(annotation):
    """pybind11's words for a type, which change with its version, in the stub's words."""
    annotation = re.sub(r"\b(typing|collections\.abc|lightning_accel\._native)\.", "", annotation)
    annotation = re.sub(r"\bList\[", "list[", annotation)
    annotation = re.sub(r"\bSupportsFloat( \| SupportsIndex)?", "float", annotation)
    annotation = re.sub(r"\bSupportsInt( \| SupportsIndex)?", "int", annotation)
    return re.sub(r"\bAnnotated\[(.*), .*\]", r"\1", annotation)


def signature(function):
    """[(name, type, default), ...], return type; without self."""
    arguments = function.args
    assert not any([arguments.vararg, arguments.kwarg, arguments.kwonlyargs, arguments.posonlyargs])
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + [ast.unparse(value) for value in arguments.defaults]
    parameters = [
        (argument.arg, spelled_alike(ast.unparse(argument.annotation)), default)
        for argument, default in zip(arguments.args, defaults, strict=True)
        if argument.arg != "self"
    ]
    return parameters, spelled_alike(ast.unparse(function.returns))


def documented_signature(function):
    """What pybind11 wrote into the docstring's first line."""
    line = function.__doc__.splitlines()[0]
    assert not line.startswith("Overloaded"), f"{line}: the stub has no overloads"
    name = re.sub(r"^\(arg0", f"{getattr(function, '__name__', '') or 'getter'}(self", line)
    (parsed,) = ast.parse(f"def {name}: ...").body
    return signature(parsed)


def functions_of(tree):
    return {item.name: item for item in tree.body if isinstance(item, ast.FunctionDef)}


def is_property(function):
    return [ast.unparse(decorator) for decorator in function.decorator_list] == ["property"]


TREE = ast.parse(STUB.read_text())
CLASSES = {item.name: item for item in TREE.body if isinstance(item, ast.ClassDef)}
CONSTANTS = {item.target.id: ast.unparse(item.annotation) for item in TREE.body if isinstance(item, ast.AnnAssign)}


def test_the_stub_names_what_the_module_holds():
    named = {*functions_of(TREE), *CLASSES, *CONSTANTS}
    assert named == {name for name in vars(_native) if not name.startswith("__")}


@pytest.mark.parametrize("name", functions_of(TREE))
def test_function(name):
    assert signature(functions_of(TREE)[name]) == documented_signature(getattr(_native, name))


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant(name):
    assert type(getattr(_native, name)).__name__ == CONSTANTS[name]


@pytest.mark.parametrize("name", CLASSES)
def test_class(name):
    native = getattr(_native, name)
    members = {member for member in vars(native) if not member.startswith("_")} | {"__init__"}
    stubs = functions_of(CLASSES[name])
    assert set(stubs) == members
    for member, stub in stubs.items():
        attribute = vars(native)[member]
        assert is_property(stub) == isinstance(attribute, property), member
        documented = documented_signature(attribute.fget if is_property(stub) else attribute)
        assert signature(stub) == documented, member
