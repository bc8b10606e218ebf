"""The rules of the house that a program can see: width, length, who imports whom, what copies alone, what is
named."""

import ast
import graphlib
import importlib
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from conftest import ROOT

import common
import tune
from models import METHODS
from models.optimisers import OPTIMISERS
from models.weights import ARCHITECTURES
from scores import TASKS
from transfer import LOSSES

FILES = sorted(f for f in ROOT.rglob("*.py") if not any(p.startswith(".") for p in f.relative_to(ROOT).parts))
FILES = [f for f in FILES if f.relative_to(ROOT).parts[0] != "runs"]
COMMANDS = ["bench", "paper", "plot", "predict", "train_ssl", "transfer", "tune"]
ROOMS = {"data", "losses", "models", "plots", "scores", "common", "examples", "tests", *COMMANDS}
MAY_IMPORT = {
    "common": set(),
    "losses": set(),
    "models": {"common", "losses", "models"},
    "data": {"common", "data"},
    "scores": {"common", "scores"},
    "plots": {"common", "plots", "scores"},
}


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imports_of(file: Path) -> set[str]:
    """Top-level names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def modules_of(file: Path) -> set[str]:
    """The modules that a file imports from, wherever in it, as they are written."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    plain = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}


def test_top_level_files_are_commands_and_common():
    assert sorted(f.stem for f in ROOT.glob("*.py")) == sorted([*COMMANDS, "common"])
    for name in COMMANDS:
        tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert {"build_parser", "main"} <= set(functions), name
        assert f"python {name}.py" in ast.get_docstring(tree), f"{name}.py shows no example"


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_functions_fit_on_a_screen_and_lines_on_a_page(file):
    text = file.read_text(encoding="utf-8")
    wide = [i for i, line in enumerate(text.split("\n"), 1) if len(line) > 110]
    assert not wide, f"{relative(file)}: lines {wide} are wider than 110 columns"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            at_most = 80 if node.name == "main" else 60
            assert lines <= at_most, f"{relative(file)}: {node.name} has {lines} lines"


@pytest.mark.parametrize("file", [f for f in FILES if relative(f).split("/")[0] != "tests"], ids=relative)
def test_data_flows_one_way(file):
    room = relative(file).split("/")[0].removesuffix(".py")
    ours = imports_of(file) & ROOMS
    if room in MAY_IMPORT:
        assert ours <= MAY_IMPORT[room], f"{relative(file)} imports {ours - MAY_IMPORT[room]}"
    assert not ours & set(COMMANDS), f"{relative(file)} imports a command"


def test_no_two_files_need_each_other():
    code = {relative(f).removesuffix(".py").replace("/", "."): f for f in FILES if "tests" not in f.parts}
    needs = {name: modules_of(file) & code.keys() - {name} for name, file in code.items()}
    list(graphlib.TopologicalSorter(needs).static_order())  # CycleError names them


@pytest.mark.parametrize("file", [f for f in FILES if f.parent.name in MAY_IMPORT], ids=relative)
def test_what_is_public_in_a_room_says_what_it_does(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    defined = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    silent = [node.name for node in defined if node.name[0] != "_" and not ast.get_docstring(node)]
    assert not silent, f"{relative(file)}: {silent}"


def test_requirements_name_what_is_imported_and_nothing_else():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    named = {re.match(r"[\w-]+", line)[0] for line in lines if line and not line.startswith("#")}
    module = {"scikit-learn": "sklearn", "pyyaml": "yaml", "Pillow": "PIL", "nvidia-dali-cuda130": "nvidia"}
    code = [f for f in FILES if relative(f).split("/")[0] != "tests"]
    used = set().union(*map(imports_of, code)) - set(sys.stdlib_module_names) - ROOMS
    used -= {"augment", "barlow", "fused"}  # examples/minimal.py and data/fused.py, copied alone
    assert used == {module.get(name, name) for name in named}


@pytest.mark.parametrize(
    "file", ["losses/barlow.py", "losses/moco.py", "losses/simclr.py", "losses/simsiam.py"]
)
def test_losses_copy_alone(file):
    assert imports_of(ROOT / file) == {"torch"}


def test_heads_and_the_tuner_copy_alone(tmp_path):
    for file in ("models/heads.py", "tune.py", "data/augment.py"):
        shutil.copy(ROOT / file, tmp_path)
    code = "import heads, tune, augment; print(heads.mlp([4, 3, 2]), tune.build_parser().prog)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "Linear" in done.stdout, done.stderr


def test_what_the_tuner_brings_along_equals_what_the_others_have():
    assert inspect.getsource(tune.cores) == inspect.getsource(common.cores)
    ours, theirs = tune.FlagLoader, common.FlagLoader
    assert ours.yaml_implicit_resolvers == theirs.yaml_implicit_resolvers
    assert inspect.getsource(ours.construct_mapping) == inspect.getsource(theirs.construct_mapping)


def test_the_idea_on_one_screen_runs_in_an_empty_folder(tmp_path, folder):
    text = (ROOT / "examples" / "minimal.py").read_text()
    assert len(text.splitlines()) <= 70
    needed = re.search(r"cp (.+) mine/", text)[1].split()
    for file in needed:
        shutil.copy(ROOT / file, tmp_path)
    few = re.sub(r"EPOCHS, RATE = \d+, \d+, \d+,", "EPOCHS, RATE = 32, 16, 2,", text)
    assert few != text
    (tmp_path / "minimal.py").write_text(few)
    command = [sys.executable, "minimal.py", str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0 and "epoch 2/2" in done.stdout, done.stderr
    state = torch.load(tmp_path / "backbone.pth")
    none = subprocess.run(command[:2], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert none.returncode == 1 and none.stderr.startswith("PATCHES: no .jpg"), none.stderr
    missing = torchvision.models.resnet18().load_state_dict(state, strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys


@pytest.mark.parametrize("name", ["train_ssl", "transfer", "bench"])
def test_a_saved_configuration_gives_every_flag_back(name, tmp_path):
    parser = importlib.import_module(name).build_parser()
    args = parser.parse_args([])
    for action in common.flag_actions(parser).values():
        if isinstance(action.default, bool):
            setattr(args, action.dest, not action.default)
    args.seed = 20240101
    args.lr = 0.1 + 0.2
    args.images = 1000  # of bench.py; config.yaml has a key of the same name
    saved = common.flags_of(args, parser)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    again = importlib.import_module(name).build_parser()
    read = common.parse(again, ["--config", str(tmp_path / "config.yaml")])
    for key, value in saved.items():
        if key != "config":
            assert getattr(read, common.flag_actions(again)[key].dest) == value, key


def test_help_shows_the_examples_and_no_empty_default():
    for name in COMMANDS:
        parser = importlib.import_module(name).build_parser()
        text = parser.format_help()
        assert parser.description.endswith("."), f"{name}: the docstring's first line is no whole sentence"
        assert "(default: [" not in text and str(ROOT) not in text, f"{name}: a default as Python has it"
        assert f"python {name}.py" in text and "(default: None)" not in text, name
        assert len(text.split("\n\n")[0].splitlines()) <= 2, f"{name}: the usage line lists the flags"


@pytest.mark.parametrize(
    "name, flag", [("train_ssl", "--no-such-flag"), *((name, "--help") for name in COMMANDS)]
)
def test_help_and_wrong_flags_do_not_wait_for_torch(name, flag):
    code = (
        "import contextlib, runpy, sys; sys.argv = sys.argv[1:]\n"
        "with contextlib.suppress(SystemExit): runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, f"{name}.py", flag]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "False", done.stderr


@pytest.mark.parametrize("name", ["train_ssl", "transfer", "bench"])
def test_the_choices_of_a_flag_are_what_there_is(name):
    """They stand as words in the flags, which are read before anything of ours is imported."""
    there = {
        "method": METHODS,
        "arch": ARCHITECTURES,
        "optimizer": OPTIMISERS,
        "task": TASKS,
        "loss": LOSSES,
    }
    actions = common.flag_actions(importlib.import_module(name).build_parser())
    for flag in there.keys() & actions.keys():
        assert list(actions[flag].choices) == list(there[flag]), flag


def test_readme_is_read_to_its_end():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130 and len(text.split()) <= 1400
    for file in re.findall(r"\]\(([\w./-]+)\)|src=\"([\w./-]+)\"", text):
        assert (ROOT / (file[0] or file[1])).exists(), file
