"""The rooms of the package: imports point one way, and nothing goes round in circles."""

import ast
from pathlib import Path

import pytest

import tpatch_jax

ROOT = Path(tpatch_jax.__file__).parent
ROOMS = ("core", "storage", "models", "training", "editors", "bank", "evaluation", "display", "benchmarks", "cli")
"""In this order: a room imports from those before it. What stands at the top is for everyone."""
LOOSE = {
    "__init__.py", "audio.py", "embeddings.py", "errors.py", "images.py", "moved.py", "requests.py", "typing.py",
}  # fmt: skip
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.name != "__init__.py")


def dotted(path: Path) -> str:
    """A file as the module that it is, without the package's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {dotted(path) for path in MODULES}


def imported(path: Path, top_level: bool = False) -> set[str]:
    """The modules of the package that a file imports, inside functions as well or at its top level alone."""
    tree = ast.parse(path.read_text("utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tpatch_jax"):
            base = (node.module or "").removeprefix("tpatch_jax").lstrip(".")
            for alias in node.names:
                deeper = f"{base}.{alias.name}".lstrip(".")
                found.add(deeper if deeper in NAMES else base)
    return found - {""}


def test_nothing_else_stands_at_the_top():
    assert {path.name for path in ROOT.glob("*.py")} <= LOOSE
    assert {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_point_one_way(path):
    room = dotted(path).split(".")[0]
    allowed = ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else ()
    climbs = {name for name in imported(path) if name.split(".")[0] in ROOMS and name.split(".")[0] not in allowed}
    assert not climbs


def test_no_module_imports_itself_in_a_circle():
    graph = {dotted(path): imported(path, top_level=True) for path in MODULES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*above, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_what_is_private_to_a_module_stays_there(path):
    """Neither ``from module import _name`` nor ``module._name``; fields of a named tuple are no such names."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and "tpatch_jax" in (node.module or "")]
    names = {alias.asname or alias.name for node in imports for alias in node.names}
    reached = {name for name in names if name.startswith("_")}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            reached |= {f"{node.value.id}.{node.attr}"} if node.attr.startswith("_") else set()
    assert not {name for name in reached if not name.endswith(("._replace", "._asdict", "._fields", "._make", "__"))}
