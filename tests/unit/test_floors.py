"""The architecture, read from the imports and the sizes of the modules: which folder may use which, and how large they get."""

import ast
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "lightning_accel"

FLOORS = (
    ("environment", "logs", "native", "_native", "version"),
    ("transport", "compression"),
    ("collectives",),
    ("background",),
    ("optim",),
    ("algorithms",),
    ("data_parallel",),
    ("checkpoint",),
    ("strategy", "launch"),
    ("bagua",),
    ("fabric", "__init__"),
)
"""Rooms (folders and top-level modules), from the lowest floor to the highest. A room imports its own floor and lower ones."""

HEIGHTS = {room: height for height, floor in enumerate(FLOORS) for room in floor}

SPECIFICATION = "reference"
"""The room apart: it imports torch and itself, and only tests import it."""

SELF_TEST = "launch.self_test"
"""A test that users run: it compares what their machine computes with the specification."""

MOST_FILE_LINES = 400
MOST_CLASS_LINES = 300

ENVIRONMENT_READERS = {
    "environment": "reads the environment for everybody",
    "launch.cli": "sets the network options of `run` for the processes that torchrun starts",
    "launch.node_agent": "hands its own environment on to the job, with the job's variables",
}
"""Modules that may touch os.environ, and why."""


@dataclass(frozen=True)
class Import:
    """An import statement: what it imports, where it stands, and whether it runs when its module is imported."""

    target: str
    line: int
    is_at_module_level: bool


@dataclass(frozen=True)
class Module:
    """A module's name inside the package ("optim.qadam", "algorithms", "__init__" at the top) and its source."""

    name: str
    path: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def room(self) -> str:
        return self.name.partition(".")[0]


def read_modules(package):
    """Reads every module of a package."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        parts = relative.with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"
        modules[name] = Module(name, relative.as_posix(), path.read_text())
    return modules


def imports_of(module, modules, package):
    """Lists a module's imports of the package, each as the name of the module it loads."""
    found = []

    def visit(node, is_at_module_level):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                folder = [package, *([] if module.name == "__init__" else module.name.split("."))]
                folder = folder[: len(folder) - node.level + module.path.endswith("__init__.py")]
                base = ".".join([*folder, *filter(None, [base])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            names = []
        for name in names:
            if name.partition(".")[0] == package:
                inside = name.partition(".")[2] or "__init__"
                while "." in inside and inside not in modules:  # a class or function: the module that holds it
                    inside = inside.rpartition(".")[0]
                if inside not in modules and inside not in HEIGHTS:  # a public name of the package itself
                    inside = "__init__"
                found.append(Import(inside, node.lineno, is_at_module_level))
        is_lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _checks_types_only(node)
        for child in ast.iter_child_nodes(node):
            visit(child, is_at_module_level and not is_lazy)

    visit(module.tree, True)
    return found


def _checks_types_only(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def find_circles(edges):
    """Returns the strongly connected parts of a graph, given as successors of each node, that have more than one node."""

    def reach(start):
        seen, open_nodes = set(), [start]
        while open_nodes:
            for target in edges.get(open_nodes.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    open_nodes.append(target)
        return seen

    reached = {node: reach(node) for node in edges}
    circles = {frozenset({node} | {other for other in reached[node] if node in reached.get(other, ())}) for node in edges}
    return sorted(sorted(circle) for circle in circles if len(circle) > 1)


def check_floors(modules, package="lightning_accel"):
    """Finds imports that go up, rooms without a floor, and imports into or out of the specification."""
    problems = [
        f"{room} stands on no floor: add it to FLOORS in tests/unit/test_floors.py"
        for room in sorted({module.room for module in modules.values()} - HEIGHTS.keys() - {SPECIFICATION})
    ]
    for module in modules.values():
        for item in imports_of(module, modules, package):
            target = item.target.partition(".")[0]
            what = f"{module.path}:{item.line} imports {item.target}"
            if SPECIFICATION in (module.room, target):
                if module.room != target and module.name != SELF_TEST:
                    problems.append(f"{what}: {SPECIFICATION} imports torch and itself, and only tests import it")
            elif HEIGHTS.get(target, 0) > HEIGHTS.get(module.room, 0):
                remedy = f"move the shared part to {module.room} or below, or pass it in"
                problems.append(f"{what}, which is a higher floor: {remedy}")
        if module.room == SPECIFICATION:
            for name in sorted(_foreign_packages(module) - {package, "torch"}):
                problems.append(
                    f"{module.path} imports {name}: {SPECIFICATION} imports torch and itself, and only tests import it"
                )
    return problems


def _foreign_packages(module):
    """Names the top-level packages that a module imports, without the standard library's."""
    names = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names


def check_circles(modules, package="lightning_accel"):
    """Finds circles: between modules by the imports that run with the module, between rooms by all imports."""
    between_modules, between_rooms = {}, {}
    for module in modules.values():
        items = imports_of(module, modules, package)
        targets = {item.target for item in items if item.is_at_module_level and item.target in modules}
        between_modules[module.name] = targets - {module.name}
        rooms = {item.target.partition(".")[0] for item in items}
        between_rooms.setdefault(module.room, set()).update(rooms - {module.room})
    remedy = "move what both need to a module below both"
    return [
        f"{what} import each other in a circle, {', '.join(circle)}: {remedy}"
        for what, edges in (("modules", between_modules), ("folders", between_rooms))
        for circle in find_circles(edges)
    ]


def check_sizes(modules):
    """Finds files and classes that are too long."""
    problems = []
    for module in modules.values():
        if (count := len(module.source.splitlines())) > MOST_FILE_LINES:
            problems.append(f"{module.path} has {count} lines, more than {MOST_FILE_LINES}: split it by its jobs")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > MOST_CLASS_LINES:
                    problems.append(
                        f"{module.path}: class {node.name} has {count} lines, more than {MOST_CLASS_LINES}: give a job of it "
                        "to a class of its own"
                    )
    return problems


def check_native(modules, package="lightning_accel"):
    """Finds modules that import the extension past its one door."""
    return [
        f"{module.path}:{item.line} imports _native: call it through native.py, the only module that knows the extension"
        for module in modules.values()
        if module.name != "native"
        for item in imports_of(module, modules, package)
        if item.target.partition(".")[0] == "_native"
    ]


def check_environment(modules):
    """Finds modules that touch the process's environment, through `os` or names imported from it."""
    names = ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv")
    problems = []
    for module in modules.values():
        if module.name in ENVIRONMENT_READERS:
            continue
        for node in ast.walk(module.tree):
            is_attribute = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os" and node.attr in names
            is_import = isinstance(node, ast.ImportFrom) and node.module == "os" and any(a.name in names for a in node.names)
            if is_attribute or is_import:
                problems.append(
                    f"{module.path}:{node.lineno} touches the environment: let environment.py read it, and pass the value in; "
                    "a module that must hand it on to children belongs in ENVIRONMENT_READERS, with a reason"
                )
    return problems


CHECKS = (check_floors, check_circles, check_sizes, check_native, check_environment)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_package_keeps_its_architecture(check):
    """Catches an import that goes up or around, a module with too many jobs, and a second door to native code or variables."""
    problems = check(read_modules(PACKAGE))
    assert not problems, "\n" + "\n".join(problems)


def test_every_exception_is_in_use():
    """Catches a room or an exception that is listed and no longer there, which would let something new take its name."""
    modules = read_modules(PACKAGE)
    rooms = {module.room for module in modules.values()} | {"_native"}
    assert set(HEIGHTS) | {SPECIFICATION} == rooms
    for name in ENVIRONMENT_READERS:
        assert "os.environ" in modules[name].source
    used = {item.target.partition(".")[0] for item in imports_of(modules[SELF_TEST], modules, "lightning_accel")}
    assert SPECIFICATION in used


def make_modules(folder, sources):
    """Writes made-up modules, {path: source}, each folder a package; returns them as the checks take them."""
    for name, source in {"__init__.py": "", **sources}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(source)
    return read_modules(folder)


@pytest.mark.parametrize(
    ("check", "sources", "message"),
    [
        (
            check_floors,
            {"background/x.py": "from lightning_accel.data_parallel.replica import Replica", "data_parallel/replica.py": ""},
            "background/x.py:1 imports data_parallel.replica, which is a higher floor: move the shared part to background or",
        ),
        (
            check_floors,
            {"transport/x.py": "import lightning_accel.optim", "optim/qadam.py": ""},
            "transport/x.py:1 imports optim, which is a higher floor",
        ),
        (
            check_floors,
            {"transport/x.py": "def f():\n    from lightning_accel import optim", "optim/qadam.py": ""},
            "transport/x.py:2 imports optim, which is a higher floor",
        ),
        (
            check_floors,
            {"compression/x.py": "if TYPE_CHECKING:\n    from ..optim import qadam", "optim/qadam.py": ""},
            "compression/x.py:2 imports optim.qadam, which is a higher floor",
        ),
        (
            check_floors,
            {"optim/x.py": "from lightning_accel import Replica"},
            "optim/x.py:1 imports __init__, which is a higher floor",
        ),
        (
            check_floors,
            {"bagua/x.py": "from lightning_accel.reference.codecs import quantise", "reference/codecs.py": ""},
            "bagua/x.py:1 imports reference.codecs: reference imports torch and itself, and only tests import it",
        ),
        (
            check_floors,
            {"reference/x.py": "from lightning_accel.native import DTYPES", "native.py": ""},
            "reference/x.py:1 imports native: reference imports torch and itself",
        ),
        (
            check_floors,
            {"reference/x.py": "import numpy"},
            "reference/x.py imports numpy: reference imports torch and itself",
        ),
        (check_floors, {"cellar/x.py": ""}, "cellar stands on no floor: add it to FLOORS"),
        (
            check_circles,
            {
                "optim/a.py": "from lightning_accel.optim import b",
                "optim/b.py": "from .c import f",
                "optim/c.py": "import lightning_accel.optim.a",
            },
            "modules import each other in a circle, optim.a, optim.b, optim.c: move what both need to a module below both",
        ),
        (
            check_circles,
            {
                "transport/a.py": "def f():\n    import lightning_accel.compression.b",
                "compression/b.py": "if TYPE_CHECKING:\n    from lightning_accel.transport.c import C",
                "transport/c.py": "",
            },
            "folders import each other in a circle, compression, transport: move what both need",
        ),
        (check_sizes, {"optim/x.py": "pass\n" * 401}, "optim/x.py has 401 lines, more than 400: split it by its jobs"),
        (
            check_sizes,
            {"optim/x.py": "pass\n" * 9 + "class Large:\n" + "    pass\n" * 300},
            "optim/x.py: class Large has 301 lines, more than 300: give a job of it to a class of its own",
        ),
        (
            check_native,
            {"optim/x.py": "from lightning_accel import _native", "native.py": "from lightning_accel import _native"},
            "optim/x.py:1 imports _native: call it through native.py",
        ),
        (
            check_native,
            {"optim/x.py": "def f():\n    from lightning_accel._native import Plan"},
            "optim/x.py:2 imports _native: call it through native.py",
        ),
        (
            check_environment,
            {"optim/x.py": "import os\nx = os.environ.get('X')", "environment.py": "import os\nos.environ"},
            "optim/x.py:2 touches the environment: let environment.py read it, and pass the value in",
        ),
        (check_environment, {"optim/x.py": "import os\nos.getenv('X')"}, "optim/x.py:2 touches the environment"),
        (check_environment, {"optim/x.py": "from os import environ"}, "optim/x.py:1 touches the environment"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "+".join(value) if isinstance(value, dict) else "",
)
def test_the_checks_find_what_is_wrong(tmp_path, check, sources, message):
    """Catches a check that passes whatever the package looks like: each made-up package has one fault."""
    problems = check(make_modules(tmp_path, sources))
    assert len(problems) == 1, problems
    assert problems[0].startswith(message)


def test_the_checks_pass_what_is_right(tmp_path):
    """Catches a check that forbids what is allowed: a floor below, a neighbour, lazy circles of modules, sizes at the limit."""
    modules = make_modules(
        tmp_path,
        {
            "__init__.py": "def __getattr__(name):\n    import lightning_accel.fabric",
            "environment.py": "import os\nos.environ",
            "native.py": "from lightning_accel import _native\nimport torch",
            "transport/group.py": "import os\nfrom lightning_accel import environment, native\nos.path",
            "optim/a.py": "from lightning_accel.transport.group import Group\nfrom .b import B",
            "optim/b.py": "def f():\n    from lightning_accel.optim import a",
            "optim/c.py": "pass\n" * 100 + "class Large:\n" + "    pass\n" * 299,
            "reference/a.py": "import math\nimport torch\nfrom lightning_accel.reference import b",
            "reference/b.py": "",
            "fabric.py": "if TYPE_CHECKING:\n    from lightning_accel.strategy.s import S",
            "strategy/s.py": "",
        },
    )
    assert [problem for check in CHECKS for problem in check(modules)] == []
