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
from shlex import split

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGINE = ROOT / "EqM"
ENTRY = ("train", "train_vae", "cache_latents", "sample_gd", "evaluate")
# from the top; a module may import from layers below, and from its own as long as there is no cycle
LAYERS = (
    ENTRY,
    ("preflight", "scoring"),
    ("generation", "validation", "run"),
    ("plans", "given"),
    ("checkpoint", "inflate", "published", "optim", "schedule", "sharding"),
    ("models", "vae", "autoencoder", "samplers"),
    ("rope", "causal", "transport", "video"),
    ("runtime",),
    ("uncaught",),
)
STAND_ALONE = {
    "transport": {"runtime"},
    "samplers": {"runtime", "transport"},
}  # the rooms that they may import
SLOW = {"diffusers", "huggingface_hub", "matplotlib", "wandb"}
LINES = 70  # of a function
FLAGS = 130  # of a function that only declares flags
LOOP = 230  # of main() in a script with a visible loop
TRAIN = 600  # of train.py
# A condition is opaque: only the models, the data, what is on the disk and the flags know that it
# is a class, and actions.
KNOW_CLASSES = split("""
    models
    published
    video
    cache_latents
    preflight
    plans
    given
    sample_gd
    scoring
    evaluate
""")
# not datasets, classmethods, fractions, or the actions of argparse
WORDS = r"label|(?<!data)class(?!method)|(?<![a-z_])action(s|_)"
NAME_CLASSES = {  # what the others name without knowing it
    "train": {
        "classes",
        "class_dropout_prob",
        "labels",
    },  # of folders; of dropped conditions; of samples
    "train_vae": {"classes"},
    "run": {"classes", "new_classes", "num_classes"},  # in the config of a run; two flags
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


def imported(nodes):
    """The dotted names that the imports among syntax nodes import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports have no room name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@functools.cache
def own_imports(tree):
    """The modules of EqM that a module imports, also inside functions."""
    modules = set()
    for target in imported(ast.walk(tree)):
        room, *parts = target.split(".")
        dotted = ".".join([room, *parts[:1]])
        if dotted in MODULES:
            modules.add(dotted)
        elif room in MODULES:
            modules.add(room)
    return modules


def room_of(module):
    return module.split(".")[0]


def test_imports_go_down_without_a_cycle_and_never_to_an_entry_script():
    layers = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
    assert layers.keys() == ROOMS, f"say in LAYERS where {sorted(ROOMS ^ layers.keys())} belong"
    imports = {name: own_imports(tree) for name, tree in MODULES.items()}
    for name, targets in imports.items():
        for target in targets:
            assert layers[room_of(target)] >= layers[room_of(name)], f"{name} imports {target}"
    for name, rooms in STAND_ALONE.items():
        assert {room_of(target) for target in imports[name]} <= rooms, name
    for name, tree in (MODULES | SCRIPTS).items():
        assert not own_imports(tree) & set(ENTRY), f"{name} imports an entry script"
    while free := [name for name, targets in imports.items() if not targets & imports.keys()]:
        for name in free:
            del imports[name]
    assert not imports, f"a cycle among {', '.join(imports)}"


def test_packages_that_load_slowly_are_imported_inside_functions():
    for name in MODULES.keys() - {"scoring.plots"}:  # which is imported inside functions
        assert not SLOW & set(map(room_of, imported(MODULES[name].body))), name


def test_what_is_true_of_one_data_set_is_imported_by_evaluate_alone_and_only_for_its_metric():
    of_data_sets = modules(ROOT / "datasets").keys()
    for name, tree in MODULES.items():
        nodes = tree.body if name == "evaluate" else ast.walk(tree)
        assert not set(map(room_of, imported(nodes))) & of_data_sets, name


def test_no_module_hides_one_that_is_installed_or_in_the_standard_library():
    installed = set(importlib.metadata.packages_distributions())
    assert not ROOMS & (installed | set(sys.stdlib_module_names))


def test_only_preflight_resolves_flags_and_nothing_assigns_to_one():
    for name, tree in (MODULES | SCRIPTS).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                # resolve() of a path or of the ranks' vote has no keywords
                is_resolve = node.func.attr == "resolve" and node.keywords
                assert not is_resolve or name == "preflight", f"{name}: {ast.unparse(node)}"
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                assert ast.unparse(node.value) != "args", f"{name}: {ast.unparse(node)}"


def identifiers(tree):
    """All names in a module, and texts that could be names."""
    names = set()
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "value"):
            name = getattr(node, field, None)
            if isinstance(name, str) and name.isidentifier():
                names.add(name)
    return names


def test_few_modules_know_that_a_condition_is_a_class():
    for module, tree in MODULES.items():
        if room_of(module) not in KNOW_CLASSES:
            names = identifiers(tree) - NAME_CLASSES.get(module, set())
            names = {name for name in names if re.search(WORDS, name)}
            assert not names, f"{module} knows of {', '.join(sorted(names))}"


def source_files(*folders):
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def test_no_call_could_run_code_from_a_file():  # commands on such files: test_bad_inputs.py
    forbidden = (
        r"allow_pickle=True|weights_only=False|pickle\.loads?\(|yaml|(?<!\.)eval\(|\bexec\("
        r"|os\.system|shell=True"
    )
    for path in source_files("EqM", "scripts", "datasets"):
        text = path.read_text()
        assert not re.search(forbidden, text), path
        for load in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in load, path
        for load in re.findall(r"from_pretrained\([^)]*", text):
            assert "use_safetensors=True" in load, path


LIBRARIES = [path for path in source_files("scripts") if "\nif __name__ ==" not in path.read_text()]


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.stem)
def test_a_library_of_the_scripts_says_so_when_it_is_run(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(path), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    instead = re.fullmatch(f"{path.name}: error: this is a library; run (.*) instead", line)[1]
    assert any((ROOT / word).exists() for word in instead.split())


def most_lines(module, function):
    if function == "parse_args" or re.fullmatch(r"add_\w*flags", function):
        return FLAGS
    if function == "main" and module in ("train", "train_vae"):
        return LOOP
    return LINES


def test_functions_fit_on_a_screen_and_train_py_keeps_its_length():
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                most = most_lines(module, node.name)
                assert lines <= most, f"{module}.{node.name}: {lines} lines, at most {most}"
    assert (ENGINE / "train.py").read_text().count("\n") <= TRAIN


def test_the_source_is_formatted_without_exceptions():
    for path in source_files("EqM", "scripts", "datasets", "tests"):
        assert not re.search("# fmt" + ": (off|skip)", path.read_text()), path
