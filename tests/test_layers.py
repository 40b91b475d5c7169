"""Imports between the modules of EqM go down only, no module hides an installed package, functions stay short."""

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGINE = ROOT / "EqM"
ENTRY = ("train", "cache_latents", "sample_gd", "evaluate")
LAYERS = (  # from the top; a module may import from layers below, and from its own as long as there is no cycle
    ENTRY,
    ("preflight", "scoring"),
    ("generation", "validation"),
    ("checkpoint", "published", "optim", "schedule"),
    ("models", "vae", "samplers"),
    ("rope", "transport", "video"),
    ("runtime",),
)
SHORT = 60  # lines of a function
EXCEPTIONS = {("train", "main"): 200}  # the visible loop


def modules():
    """name -> syntax tree of every module of EqM: "train", "video.clips", ..."""
    trees = {}
    for path in sorted(ENGINE.rglob("*.py")):
        name = ".".join(path.relative_to(ENGINE).with_suffix("").parts).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text())
    return trees


MODULES = modules()
ROOMS = {name.split(".")[0] for name in MODULES}


def imports(tree):
    """The modules and names that a module imports, dotted, also those inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports have no room name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(name):
    """The modules of EqM that one of them imports."""
    found = set()
    for target in imports(MODULES[name]):
        parts = target.split(".")
        found |= {dotted for dotted in (".".join(parts[:n]) for n in (1, 2)) if dotted in MODULES}
    return {one for one in found if not any(other.startswith(f"{one}.") for other in found)}  # the module, not its room


def layer(name):
    return next(number for number, rooms in enumerate(LAYERS) if name.split(".")[0] in rooms)


def test_every_module_has_its_layer():
    known = {room for rooms in LAYERS for room in rooms}
    assert known >= ROOMS, f"say in LAYERS where {sorted(ROOMS - known)} belong"


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    up = {target for target in own_imports(name) if layer(target) < layer(name)}
    assert not up, f"{name} imports {', '.join(sorted(up))} from above it"


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_an_entry_script(name):
    assert not own_imports(name) & set(ENTRY)


def test_scripts_import_no_entry_script_either():
    for path in [*(ROOT / "scripts").rglob("*.py"), *(ROOT / "datasets").glob("*.py")]:
        found = {target.split(".")[0] for target in imports(ast.parse(path.read_text()))} & set(ENTRY)
        assert not found, f"{path.name} imports {', '.join(found)}"


def test_imports_form_no_cycle():
    def reach(name, path=()):
        assert name not in path, f"a cycle: {' -> '.join((*path, name))}"
        for target in own_imports(name):
            reach(target, (*path, name))

    for name in MODULES:
        reach(name)


@pytest.mark.parametrize("name", ["transport", "samplers"])
def test_the_objective_and_the_samplers_stand_alone(name):
    assert own_imports(name) <= {"transport", "samplers"}


def test_runtime_imports_nothing_of_the_rooms_above_it():
    for name in MODULES:
        if name.startswith("runtime"):
            assert all(target.startswith("runtime") for target in own_imports(name)), name


def test_no_module_hides_one_that_is_installed_or_in_the_standard_library():
    installed = set(importlib.metadata.packages_distributions())
    assert not ROOMS & (installed | set(sys.stdlib_module_names))


@pytest.mark.parametrize("name", MODULES)
def test_functions_fit_on_a_screen(name):
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= EXCEPTIONS.get((name, node.name), SHORT), f"{name}.{node.name} has {lines} lines"


def test_train_py_has_at_most_450_lines():
    assert len((ENGINE / "train.py").read_text().splitlines()) <= 450


def test_an_import_that_points_up_is_named(monkeypatch):
    monkeypatch.setitem(MODULES, "runtime.rng", ast.parse("def f():\n    from video import clips\n"))
    with pytest.raises(AssertionError, match="runtime.rng imports video.clips from above it"):
        test_imports_go_down("runtime.rng")
