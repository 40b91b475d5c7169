"""Rules for the source: imports go down, flags are resolved once, few modules know of classes, no
file runs code.
"""

import ast
import functools
import importlib.metadata
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGINE = ROOT / "EqM"
ENTRY = ("train", "train_vae", "cache_latents", "sample_gd", "evaluate")
# from the top; a module may import from layers below, and from its own as long as there is no cycle
LAYERS = (
    ENTRY,
    ("preflight", "scoring"),
    ("generation", "validation", "given", "run"),
    ("checkpoint", "inflate", "published", "optim", "schedule", "sharding"),
    ("models", "vae", "autoencoder", "samplers"),
    ("rope", "transport", "video"),
    ("runtime",),
    ("uncaught",),
)
STAND_ALONE = {
    "transport": {"runtime"},
    "samplers": {"runtime", "transport"},
}  # the rooms that they may import
LINES = 70  # of a function, at most
FLAGS = 130  # of a function that only declares flags
LOOP = 230  # of the visible loops
# A condition is opaque: only the models, the data, what is on the disk and the flags know that it
# is a class.
KNOW_CLASSES = {
    "models",
    "published",
    "video",
    "cache_latents",
    "preflight",
    "generation",
    "given",
    "sample_gd",
}
KNOW_CLASSES |= {"scoring", "evaluate"}
NAME_CLASSES = {  # what the others name without knowing it
    "train": {
        "classes",
        "class_dropout_prob",
        "labels",
    },  # of folders; of dropped conditions; of samples
    "train_vae": {"classes"},
    "checkpoint": {"new_classes"},  # a flag
    "runtime.cli": {"formatter_class"},  # of argparse
}


def modules(folder):
    """name -> syntax tree of every module below a folder: "train", "video.clips", ..."""
    trees = {}
    for path in sorted(folder.rglob("*.py")):
        name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text())
    return trees


MODULES = modules(ENGINE)
SCRIPTS = modules(ROOT / "scripts") | modules(ROOT / "datasets")
ROOMS = {name.split(".")[0] for name in MODULES}


@functools.cache
def own_imports(tree):
    """The modules of EqM that a module imports, also inside functions."""
    targets = set()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports have no room name"
            targets |= {f"{node.module}.{alias.name}" for alias in node.names}
    for target in targets:
        parts = target.split(".")
        found |= {dotted for dotted in (".".join(parts[:n]) for n in (1, 2)) if dotted in MODULES}
    return {
        one for one in found if not any(other.startswith(f"{one}.") for other in found)
    }  # the module, not its room


def test_imports_go_down_without_a_cycle_and_never_to_an_entry_script():
    layers = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
    assert layers.keys() == ROOMS, f"say in LAYERS where {sorted(ROOMS ^ layers.keys())} belong"
    left = {name: own_imports(tree) for name, tree in MODULES.items()}
    for name, targets in left.items():
        up = {
            target
            for target in targets
            if layers[target.split(".")[0]] < layers[name.split(".")[0]]
        }
        assert not up, f"{name} imports {', '.join(sorted(up))} from above it"
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"a cycle among {', '.join(left)}"
    for name, rooms in STAND_ALONE.items():
        assert {target.split(".")[0] for target in own_imports(MODULES[name])} <= rooms, name
    for name, tree in (MODULES | SCRIPTS).items():
        assert not own_imports(tree) & set(ENTRY), f"{name} imports an entry script"


def test_what_is_true_of_one_data_set_is_imported_by_evaluate_alone_and_only_for_its_metric():
    of_data_sets = modules(ROOT / "datasets").keys()
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
                is_late = name == "evaluate" and node not in tree.body
                assert is_late or not names & of_data_sets, f"{name}, line {node.lineno}"


def test_no_module_hides_one_that_is_installed_or_in_the_standard_library():
    installed = set(importlib.metadata.packages_distributions())
    assert not ROOMS & (installed | set(sys.stdlib_module_names))


def test_only_preflight_resolves_flags_and_nothing_assigns_to_one():
    for name, tree in (MODULES | SCRIPTS).items():
        for node in ast.walk(tree):
            called = (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr
            )
            of_flags = (
                called == "resolve" and node.keywords
            )  # that of a path or of the ranks' vote takes none
            assert not of_flags or name == "preflight", (
                f"{name}, line {node.lineno}: resolves flags"
            )
            is_stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            assert not is_stored or ast.unparse(node.value) != "args", (
                f"{name}, line {node.lineno}: sets a flag"
            )


def test_few_modules_know_that_a_condition_is_a_class():
    for module, tree in MODULES.items():
        if module.split(".")[0] in KNOW_CLASSES:
            continue
        names = {
            getattr(node, field, None)
            for node in ast.walk(tree)
            for field in ("id", "attr", "arg", "value")
        }
        names = {name for name in names if isinstance(name, str) and name.isidentifier()}
        found = {name for name in names if re.search("label|(?<!data)class(?!method)", name)}
        found -= NAME_CLASSES.get(module, set())
        assert not found, f"{module} knows of {', '.join(sorted(found))}"


def test_no_call_could_run_code_from_a_file():  # commands on such files: test_bad_inputs.py
    forbidden = (
        r"allow_pickle=True|weights_only=False|pickle\.loads?\(|yaml|\beval\(|\bexec\("
        r"|os\.system|shell=True"
    )
    for path in (
        path for part in ("EqM", "scripts", "datasets") for path in (ROOT / part).rglob("*.py")
    ):
        text = re.sub(r"\.eval\(\)", "", path.read_text())  # of a network
        assert not re.search(forbidden, text), path
        assert all(
            "weights_only=True" in load for load in re.findall(r"torch\.load\([^)]*\)", text)
        ), path
        assert all(
            "use_safetensors=True" in load for load in re.findall(r"from_pretrained\([^)]*", text)
        ), path


LIBRARIES = [
    path
    for path in sorted(ROOT.rglob("scripts/**/*.py"))
    if "\nif __name__ ==" not in path.read_text()
]


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.stem)
def test_a_library_of_the_scripts_says_so_when_it_is_run(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    instead = re.fullmatch(f"{path.name}: error: this is a library; run (.*) instead", line)[1]
    assert (
        ended.value.code == 2 and (ROOT / instead.split()[-2 if "--" in instead else -1]).exists()
    )


def test_functions_fit_on_a_screen():
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            most = LINES
            if node.name == "parse_args" or re.fullmatch(r"add_\w*flags", node.name):
                most = FLAGS
            elif (module, node.name) in {("train", "main"), ("train_vae", "main")}:
                most = LOOP
            lines = node.end_lineno - node.lineno + 1
            assert lines <= most, f"{module}.{node.name} has {lines} lines; expected at most {most}"


def test_the_source_is_formatted_without_exceptions():
    parts = "EqM", "scripts", "datasets", "tests"
    for path in (path for part in parts for path in (ROOT / part).rglob("*.py")):
        assert not re.search("# fmt" + ": (off|skip)", path.read_text()), path
