"""The public names: what type checkers are told of them, and what importing the package and its command loads."""

import ast
import sys
from pathlib import Path

import pytest

import lightning_accel
from helpers import programs

STUB = Path(lightning_accel.__file__).with_suffix(".pyi")


def names_in(stub):
    """Reads {name: module inside the package} from a stub of imports such as `from lightning_accel.a.b import C as C`."""
    names = {}
    for statement in ast.parse(stub).body:
        assert isinstance(statement, ast.ImportFrom), f"line {statement.lineno} of the stub is no import of a name"
        for alias in statement.names:
            assert alias.asname == alias.name, f"type checkers hide {alias.name} unless it is imported `as {alias.name}`"
            names[alias.name] = statement.module.removeprefix("lightning_accel.")
    return names


def test_type_checkers_see_the_same_names_in_the_same_modules():
    """Catches a name that moves in one of `__init__.py` and `__init__.pyi` only."""
    others = {"AccelStrategy": "strategy.trainer_unified", "__version__": "version"}  # which class it is depends on the root
    table = {**lightning_accel._MODULES, **others}
    assert names_in(STUB.read_text()) == table
    assert sorted(table) == sorted(lightning_accel.__all__)
    with pytest.raises(AssertionError, match="hide Plan"):
        names_in("from lightning_accel.compression.plan import Plan")


def test_each_name_is_defined_in_its_module():
    """Catches a promised name that is missing, and a table that points at a module which only imports the name."""
    for name, module in lightning_accel._MODULES.items():
        value = getattr(lightning_accel, name)
        assert value.__module__ == f"lightning_accel.{module}", name
        assert value.__name__ == {"QAdamOptimizer": "QAdam"}.get(name, name)  # Bagua's name of it
    assert not hasattr(lightning_accel, "no_such_name")


@pytest.mark.parametrize(
    "module", ["", ".launch.cli", ".launch.node_agent", ".launch.arguments", ".environment"], ids=lambda name: name or "package"
)
def test_torch_and_lightning_wait_until_they_are_needed(module):
    """Catches two seconds before each message of the command line, in an interpreter that lists every import."""
    done = programs.run(sys.executable, "-X", "importtime", "-c", f"import lightning_accel{module}")
    assert done.returncode == 0, done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert f"lightning_accel{module}" in loaded
    assert not loaded & {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "numpy"}
