"""Imports between the modules of EqM go down only, no module hides an installed package, functions stay short."""

import ast
import functools
import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGINE = ROOT / "EqM"
ENTRY = ("train", "train_vae", "cache_latents", "sample_gd", "evaluate")
LAYERS = (  # from the top; a module may import from layers below, and from its own as long as there is no cycle
    ENTRY,
    ("preflight", "scoring"),
    ("generation", "validation", "given"),
    ("checkpoint", "published", "optim", "schedule", "forcing", "sharding"),
    ("models", "vae", "autoencoder", "samplers"),
    ("rope", "transport", "video"),
    ("runtime",),
)
SHORT = 60  # lines of a function
EXCEPTIONS = {("train", "main"): 200, ("train_vae", "main"): 120}  # the visible loops


def modules():
    """name -> syntax tree of every module of EqM: "train", "video.clips", ..."""
    trees = {}
    for path in sorted(ENGINE.rglob("*.py")):
        name = ".".join(path.relative_to(ENGINE).with_suffix("").parts).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text())
    return trees


MODULES = modules()
ROOMS = {name.split(".")[0] for name in MODULES}


@functools.cache
def own_imports(tree):
    """The modules of EqM that a module imports, also inside functions."""
    targets, found = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports have no room name"
            targets |= {f"{node.module}.{alias.name}" for alias in node.names}
    for target in targets:
        parts = target.split(".")
        found |= {dotted for dotted in (".".join(parts[:n]) for n in (1, 2)) if dotted in MODULES}
    return {one for one in found if not any(other.startswith(f"{one}.") for other in found)}  # the module, not its room


def layer(name):
    return next(number for number, rooms in enumerate(LAYERS) if name.split(".")[0] in rooms)


def test_every_module_has_its_layer():
    known = {room for rooms in LAYERS for room in rooms}
    assert known >= ROOMS, f"say in LAYERS where {sorted(ROOMS - known)} belong"


def test_imports_go_down():
    for name, tree in MODULES.items():
        up = {target for target in own_imports(tree) if layer(target) < layer(name)}
        assert not up, f"{name} imports {', '.join(sorted(up))} from above it"


def test_an_import_that_points_up_is_named(monkeypatch):
    monkeypatch.setitem(MODULES, "runtime.rng", ast.parse("def f():\n    from video import clips\n"))
    with pytest.raises(AssertionError, match="runtime.rng imports video.clips from above it"):
        test_imports_go_down()


def test_nothing_imports_an_entry_script():
    others = [*(ROOT / "scripts").rglob("*.py"), *(ROOT / "datasets").glob("*.py")]
    for name, tree in MODULES.items() | {(path.name, ast.parse(path.read_text())) for path in others}:
        found = own_imports(tree) & set(ENTRY)
        assert not found, f"{name} imports {', '.join(found)}"


def test_imports_form_no_cycle():
    left = {name: own_imports(tree) for name, tree in MODULES.items()}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"a cycle among {', '.join(left)}"


@pytest.mark.parametrize("name", ["transport", "samplers"])
def test_the_objective_and_the_samplers_stand_alone(name):
    assert own_imports(MODULES[name]) <= {"transport", "samplers"}


def test_no_module_hides_one_that_is_installed_or_in_the_standard_library():
    installed = set(importlib.metadata.packages_distributions())
    assert not ROOMS & (installed | set(sys.stdlib_module_names))


def test_functions_fit_on_a_screen():
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= EXCEPTIONS.get((name, node.name), SHORT), f"{name}.{node.name} has {lines} lines"


def test_train_py_has_at_most_450_lines():
    assert len((ENGINE / "train.py").read_text().splitlines()) <= 450
