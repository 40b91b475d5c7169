"""What README.md and docs/ say: links, commands, flags, numbers and versions, and their Python."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict

import pytest
import yaml
from PIL import Image
from torch.distributed.run import get_args_parser

import checkpoint
from models import EqM_models, model_config
from tiny_data import random_checkpoint
from training import ROOT
from video.index import INDEX_FORMAT
from video.source import LATENTS_FORMAT

WRITTEN = [  # by hand; other pages of results/ are written by scripts
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    ROOT / "datasets/README.md",
    ROOT / "results/README.md",
    *ROOT.glob("results/demo*/README.md"),
    *ROOT.glob("results/studies/*/README.md"),
]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(WRITTEN)}
# Shell script: the Python script that gets the words after it, and flags that the shell script adds
TARGETS = {
    "scripts/train_progressive.sh": ("EqM/train.py", ["--data-path", "DIR"]),
    "scripts/train_slurm.sh": ("EqM/train.py", ["--data-path", "DIR"]),
    "scripts/sample.sh": ("EqM/sample_gd.py", ["--ckpt", "FILE"]),
    "scripts/score.sh": ("EqM/sample_gd.py", ["--ckpt", "FILE"]),
    "scripts/gpu_check.sh": ("scripts/gpu_check.py", []),
}
WORDS = {
    "scripts/test.sh": ".*",
    "scripts/setup.sh": "(dev)?",
    "scripts/faults.sh": "([0-9]+( --.*)?)?",
    "datasets/prepare_ucf101.sh": "[^ ]*",
}


def fences(text, language):
    """The blocks of a page between ``` and ``` in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def prose(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


LIMITED = "README.md|docs/.*|results/studies/.*"  # pages


@pytest.mark.parametrize("page", [page for page in PAGES if re.fullmatch(LIMITED, page)])
def test_the_readme_and_each_page_of_docs_and_studies_have_at_most_1500_words(page):
    words = [word for word in PAGES[page].split() if word.strip("|-")]  # no lines of tables
    assert len(words) <= 1_500


def anchors(text):
    """The names of a page's headings in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for name, heading in re.findall(r"\]\((?!https://)([^)#]*)#?([^)]*)\)", prose(PAGES[page])):
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), name
        if heading:
            assert heading in anchors(path.read_text())
    for script in re.findall(r"`((?:\w+/)+[\w.]+\.(?:py|sh))`", PAGES[page]):
        assert (ROOT / script).is_file(), script


def test_the_readme_links_every_page_and_the_design_names_every_module():
    for path in ROOT.glob("docs/*.md"):
        assert f"](docs/{path.name})" in PAGES["README.md"], path.name
    for path in (ROOT / "EqM").rglob("[!_]*.py"):
        assert re.search(rf"\b{path.name}\b", PAGES["docs/design.md"]), path.name


# Commands and flags -------------------------------------------------------------------------------
# Restricted bash (-r: no files are written) with functions in place of programs. Each writes the
# names of the variables that are set for it and its words, a line each, and an empty line; other
# programs are not found.
BASH = """
set -euf
call() { local names=$(compgen -e); printf '%s\\n' "${names//$'\\n'/ }" "$@" ''; }
for name in python torchrun bash sbatch; do eval "$name() { call $name \\"\\$@\\"; }"; done
git() { :; }; cd() { :; }; source() { :; }; tensorboard() { :; }
"""


def commands(text):
    """(names of variables that are set, words) of each command of our scripts, in blocks and in
    code in the text.
    """
    pattern = r"`((?:[A-Z_]+=\S+\s)*(?:python|bash|torchrun|sbatch)\s[^`]+)`"
    inline = [code.replace("\n", " ") for code in re.findall(pattern, prose(text))]
    shell = subprocess.run(
        [shutil.which("bash"), "-rc", "\n".join([BASH, *fences(text, "bash"), *inline])],
        env={"PATH": ""},
        capture_output=True,
        text=True,
    )
    assert shell.returncode == 0, shell.stderr
    for command in shell.stdout.split("\n\n")[:-1]:
        names, *words = command.split("\n")
        yield set(names.split()) - {"PATH", "PWD", "OLDPWD", "SHLVL", "_"}, words


def parse(script, words, monkeypatch):
    """Have a Python script parse its command line. Returns its flags."""
    path = ROOT / script
    assert path.is_file()
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.syspath_prepend(path.parent)  # as for `python script`
    return importlib.import_module(path.stem).parse_args()


def check_command(names, words, monkeypatch):
    """Raise, or exit, unless a command is one that its script takes. Returns the flags of a Python
    script.
    """
    program, *words = words
    if program == "torchrun":
        args = get_args_parser().parse_args(words)
        program = "python"
        words = [args.training_script, *args.training_script_args]
    if program == "sbatch":
        words = words[words[0].startswith("--") :]
    script, *words = words
    source = (ROOT / script).read_text()
    if script == "scripts/train_slurm.sh":  # runs this one
        source += (ROOT / "scripts/train_progressive.sh").read_text()
    for name in names:
        assert f"${{{name}:-" in source, f"{script} has no {name}"
    if program == "python":
        return parse(script, words, monkeypatch)
    if script in TARGETS:
        target, flags = TARGETS[script]
        return parse(target, [*words, *flags], monkeypatch)
    assert re.fullmatch(WORDS.get(script, ""), " ".join(words)), f"{script} does not take {words}"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_scripts_take_the_commands_of_a_page(page, monkeypatch, capsys):
    for names, words in commands(PAGES[page]):
        try:
            check_command(names, words, monkeypatch)
        except (SystemExit, AssertionError, OSError) as error:
            pytest.fail(f"{shlex.join(words)}: {error} {capsys.readouterr().err}")


def test_the_readme_has_the_command_that_users_know():
    command = "torchrun --nproc_per_node=8 EqM/train.py --video --num-frames 4 "
    command += '--model "EqM-S/4" --data-path datasets/ucf-101 --use-rope'
    _, first_section, *_ = re.split("^## ", PAGES["README.md"], flags=re.M)
    assert command in first_section


def test_the_phases_of_the_readme_have_equal_memory_and_the_flops_that_it_says(monkeypatch):
    (block,) = [block for block in fences(PAGES["README.md"], "bash") if "torchrun" in block]
    runs = [check_command(*command, monkeypatch) for command in commands(f"```bash\n{block}```")]
    phases = runs[:3]
    assert [run.num_frames for run in runs] == [4, 8, 16, [16], [24]]
    assert [phase.max_steps for phase in phases] == [50_000, 100_000, 150_000]
    assert len({phase.num_frames * phase.global_batch_size for phase in phases}) == 1
    config = model_config("EqM-S/4", num_classes=101, use_rope=True)
    for phase in phases:
        clips = 50_000 * phase.global_batch_size
        flops = clips * config.training_flops(phase.num_frames)
        assert f"{flops / 1e17:.2f}e17" in PAGES["README.md"]


def test_flags_that_the_pages_mention_exist(monkeypatch, capsys):
    for folder in ("EqM", "datasets", "scripts"):
        for script in (ROOT / folder).rglob("*.py"):
            if "\nif __name__ ==" in script.read_text():
                with pytest.raises(SystemExit):
                    parse(script.relative_to(ROOT), ["--help"], monkeypatch)
    known = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    known.add("--logdir")  # of tensorboard
    known |= set(get_args_parser()._option_string_actions)  # with - and with _
    for page, text in PAGES.items():
        if page != "CHANGELOG.md":  # which names removed ones
            code = " ".join(re.findall(r"`([^`]+)`", prose(text)))
            unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - known
            assert not unknown, page


# Numbers ------------------------------------------------------------------------------------------
# A comment before a table, a paragraph or a list says which files of results/ have its numbers:
# "rows of": those of each row are in the rows of the file that have the same first cell
# "numbers of": those with a decimal point, in percent, points or MB are in the files
# A number is in a file if one there, or one of its numbers in percent, rounds to it.
NUMBER = r"(?<![\w.])\d[\d,]*(?:\.\d+)?"


def checked_blocks(text):
    """(kind, files, block) of each comment and the block after it."""
    pattern = r"^<!-- (rows|numbers) of ([^>]*) -->\n(.*?)(?=\n\n|\Z)"
    for kind, files, block in re.findall(pattern, text, re.M | re.S):
        yield kind, [ROOT / file for file in files.split()], block


def cells(row):
    row = row.replace("*", "").replace("`", "")
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def table_rows(text):
    """The cells of each row of the tables in a text."""
    return [cells(line) for line in text.splitlines() if line.startswith("|")]


def is_in(number, source):
    """Whether a number, as text, is one of a text, rounded as it is."""
    value = float(number.replace(",", ""))
    half_a_digit = 0.501 * 10 ** -len(number.partition(".")[2])
    candidates = [float(text.replace(",", "")) for text in re.findall(NUMBER, source)]
    candidates += [100 * candidate for candidate in candidates]
    return any(abs(value - candidate) < half_a_digit for candidate in candidates)


def missing(kind, block, source):
    """The numbers of a block that a source does not have, after the first cell of their row in a
    table.
    """
    if kind == "numbers":
        numbers = re.findall(rf"{NUMBER}(?=%| points| MB)|(?<![\w.])\d+\.\d+", block)
        return [number for number in numbers if not is_in(number, source)]
    texts = defaultdict(str)  # of the rows of the source by their first cell
    for name, *values in table_rows(source):
        texts[name] += " ".join(["", *values])
    lacking = []
    for name, *values in table_rows(block)[2:]:
        for number in re.findall(NUMBER, " ".join(values)):
            if not is_in(number, texts[name]):
                lacking.append(f"{name}: {number}")
    return lacking


@pytest.mark.parametrize("page", [page for page in PAGES if list(checked_blocks(PAGES[page]))])
def test_numbers_are_those_of_the_files_in_results(page):
    for kind, files, block in checked_blocks(PAGES[page]):
        assert missing(kind, block, "\n".join(file.read_text() for file in files)) == []


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_table_of_models_has_their_parameters():
    rows = {size: row for size, *row in table_rows(PAGES["README.md"])}
    for name, build in EqM_models.items():
        size, patch = name.split("/")
        config = model_config(name)
        sizes = [str(config.depth), str(config.hidden_size), str(config.num_heads)]
        assert rows[size][:3] == sizes
        # one block, which takes less time than all
        model = build(input_size=32, in_channels=4, num_classes=101, use_rope=True, depth=1)
        count = count_parameters(model) + (config.depth - 1) * count_parameters(model.blocks)
        column = ["2", "4", "8"].index(patch)
        assert rows[size][3 + column] == f"{count / 1e6:.1f}"


def test_the_newest_version_is_the_version_to_cite():
    about = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+) \((\S+)\)$", PAGES["CHANGELOG.md"], re.M)
    assert newest.groups() == (about["version"], str(about["date-released"]))


def test_the_promise_names_the_formats_that_the_code_writes():
    rows = re.findall(r"^\| (\w[\w ]*):.* \| (\d+|-) \|$", PAGES["CHANGELOG.md"], re.M)
    assert dict(rows) == {
        "checkpoint": str(checkpoint.VERSION),
        "exported folder": str(checkpoint.VERSION),
        "latent or pixel cache": str(LATENTS_FORMAT),
        "sample folder": "-",
        "index of a scan": str(INDEX_FORMAT),
    }


def run_python(snippet, folder, monkeypatch):
    """Run Python in a folder that has the code, the results and a copy of the figures."""
    for name in ("EqM", "hubconf.py"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "results/figures", folder / "results/figures")
    for name in ("demo", "studies"):
        (folder / "results" / name).symlink_to(ROOT / "results" / name)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(compile(snippet, "page.md", "exec"), {})


def test_the_python_of_the_sampling_page_runs_and_writes_videos(tmp_path, monkeypatch):
    hub, modules = fences(PAGES["docs/sampling.md"], "python")
    modules = modules.replace('"ngd", 20', '"ngd", 2')  # fewer evaluations, for speed
    run_python(hub + modules, tmp_path, monkeypatch)
    assert len(list(tmp_path.glob("clips/*.mp4"))) == 12


def test_the_python_of_the_page_on_long_videos_streams(tmp_path, monkeypatch):
    (snippet,) = fences(PAGES["docs/long-videos.md"], "python")
    settings = {"use_rope": True, "num_frames": 8, "causal": True, "context": 8}
    random_checkpoint(tmp_path / "FILE", **settings)
    snippet = snippet.replace('"FILE"', repr(str(tmp_path / "FILE")))
    snippet = snippet.replace("CircleLeft", "A").replace("CircleUp", "B")
    run_python(f"{snippet}\nassert frames.shape == (2, 4, 16, 16, 3)", tmp_path, monkeypatch)


def test_the_first_picture_of_the_readme_is_what_its_code_draws(tmp_path, monkeypatch):
    (snippet,) = fences(PAGES["results/README.md"], "python")
    run_python(snippet, tmp_path, monkeypatch)
    picture = Image.open(tmp_path / "results/figures/front.png")
    assert picture.tobytes() == Image.open(ROOT / "results/figures/front.png").tobytes()
