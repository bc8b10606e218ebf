"""Every command in the README, in a docstring and in a YAML header parses with the script's own parser."""

import ast
import importlib
import re
import shlex

import pytest
import yaml
from conftest import ROOT

import common
import train_ssl

SCRIPTS = ["train_ssl", "transfer", "predict", "bench", "tune", "plot", "paper"]
MODULES = ["check", "synthetic", "tiles"]  # of data/, which are commands as well
SOURCES = [
    "README.md",
    *(str(f.relative_to(ROOT)) for f in sorted((ROOT / "docs").glob("*.md"))),
    *(f"{s}.py" for s in SCRIPTS if (ROOT / f"{s}.py").exists()),
    *(f"data/{name}.py" for name in MODULES),
    *(str(f.relative_to(ROOT)) for f in sorted((ROOT / "yaml").rglob("*.yaml"))),
]
COMMAND = re.compile(
    r"(?:^|[\s#&`])(?:python|torchrun(?: --[\w=]+)*) ((?:%s)\.py|-m data\.\w+)((?: [^#\n`&;]*)?)"
    % "|".join(SCRIPTS)
)


def commands():
    for source in SOURCES:
        text = (ROOT / source).read_text()
        text = (ast.get_docstring(ast.parse(text)) or "") if source.endswith(".py") else text
        for script, words in COMMAND.findall(text):
            script, words = script.removeprefix("-m ").removesuffix(".py"), words.strip()
            mentioned = "..." in words or (script.startswith("data.") and not words)
            if not mentioned:
                yield pytest.param(script, words, id=f"{source}: {script} {words}"[:90])


def options(script):
    module = importlib.import_module(script)
    return module.build_parser() if hasattr(module, "build_parser") else module.flags()


@pytest.mark.parametrize("script, words", commands())
def test_command_parses(script, words):
    words = shlex.split(words)
    if script == "tune":
        args, words = options("tune").parse_known_args(words)
        script = args.script.stem
    options(script).parse_args(words)


def test_there_are_commands_to_check():
    found = [p.id for p in commands()]
    assert (
        len(found) >= 10
        and any(i.startswith("README") for i in found)
        and any(i.startswith("yaml/paper/moco") for i in found)
    )
    for name in MODULES:
        assert any(i.startswith(f"README.md: data.{name}") for i in found), name


@pytest.mark.parametrize(
    "file", [f for f in SOURCES if f.startswith("yaml") and "tune" not in f and "transfer" not in f]
)
def test_recipes_hold_valid_values_and_little_else(file):
    parser = train_ssl.build_parser()
    args = common.parse(parser, ["--config", str(ROOT / file)])
    for name, default in train_ssl.own_settings(args).items():
        setattr(args, name, getattr(args, name) or default)
    train_ssl.build_method(args)
    lines = (ROOT / file).read_text().splitlines()
    assert lines[0].startswith("# python ") and len(lines) < 24


@pytest.mark.parametrize("file", [f for f in SOURCES if f.startswith("yaml/paper")])
def test_the_papers_recipes_say_in_what_they_are_not_the_authors(file):
    text = (ROOT / file).read_text()
    decays = yaml.safe_load(text)["weight_decay"] != 0
    assert "--precision fp32" in text and ("Norms and biases do not decay" in text) == decays


@pytest.mark.parametrize("target", ["demo", "test", "install", "paper", "paper-small"])
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
