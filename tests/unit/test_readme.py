"""What README.md tells people to type exists: flags, files, configuration keys, JSON."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from helixd.cli import build_parser, main
from helixd.commands.plan import build_parser as build_plan_parser
from helixd.commands.simulate import build_parser as build_simulate_parser
from helixd.config import ConfigErrors, load
from helixd.config.load import SCHEMA
from helixd.exits import Exit

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every command line of the shell blocks as words, without leading assignments."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines if line]
    return [line[next(n for n, word in enumerate(line) if "=" not in word) :] for line in words]


def test_helixd_command_lines_parse() -> None:
    lines = [words for words in commands() if words[0] == "helixd" and not {"plan", "simulate"} & set(words[1:2])]
    assert len(lines) >= 6
    for words in lines:
        arguments = build_parser().parse_args(words[1:])
        for assignment in arguments.set:
            assert tuple(assignment.split("=")[0].split(".")) in SCHEMA.keys


def test_plans_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = (text for text in blocks("toml") if "helixd-cluster/1" in text)
    (tmp_path / "lab.toml").write_text(file, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    lines = [words[1:] for words in commands() if words[:2] == ["helixd", "plan"]]
    assert len(lines) == 3
    for words in lines:
        assert main([*words, "--time-limit", "1"]) == Exit.OK
    printed = capsys.readouterr()
    assert printed.err == ""
    for text in ("lab: Qwen2.5-14B, 48 layers", "~RTX 4090", "other rules", "lab: demo", "any one node may be lost"):
        assert text in printed.out


def test_the_table_that_is_explained_is_the_one_that_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = (text for text in blocks("toml") if "helixd-cluster/1" in text)
    (tmp_path / "lab.toml").write_text(file, encoding="utf-8")
    explained = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8").split("```\n")
    (table,) = (text for text in explained if text.startswith("lab: "))
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["plan", str(tmp_path / "lab.toml")]) == Exit.OK
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    timed = "  search        "
    assert [line.startswith(timed) for line in printed] == [line.startswith(timed) for line in table.splitlines()]
    assert [s for s in printed if not s.startswith(timed)] == [s for s in table.splitlines() if not s.startswith(timed)]


def test_simulate_command_lines_parse_and_a_plan_made_on_the_way_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [words[2:] for words in commands() if words[:2] == ["helixd", "simulate"]]
    assert len(lines) >= 3
    for words in lines:
        build_simulate_parser().parse_args(words)
    [lab] = [text for text in blocks("toml") if "helixd-cluster/1" in text]
    (tmp_path / "lab.toml").write_text(lab)
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", *lines[0], "--warm-up", "1", "--measure", "5"]) == 0


def test_flags_in_the_text_exist() -> None:
    parsers = (build_parser(), build_plan_parser(), build_simulate_parser())
    flags = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    for file in ("scripts/quickstart", "scripts/bench_serve.py", "tests/conftest.py"):
        flags |= set(re.findall(r"--[a-z][a-z-]+", (ROOT / file).read_text(encoding="utf-8")))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT))
    assert len(named) > 8
    assert named <= flags


def test_files_named_exist() -> None:
    named = re.findall(r"(?:^|[\s`(])((?:scripts|tests|docs|\.ci)/[\w./-]+)", TEXT)
    linked = [target for target in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in target]
    assert len(named) > 5
    assert [name for name in {*named, *linked} if not (ROOT / name).exists()] == []


def test_configuration_files_have_known_keys_and_values(tmp_path: Path) -> None:
    files = [text for text in blocks("toml") if "helixd-cluster/" not in text]
    assert len(files) == 2
    secret = tmp_path / "cluster.secret"
    secret.write_text("s" * 40)
    secret.chmod(0o600)
    for number, text in enumerate(files):
        tomllib.loads(text)
        file = tmp_path / f"{number}.toml"
        file.write_text(text, encoding="utf-8")
        # The model's directory is the reader's own.
        assert problems(file) <= {"model.path: /srv/models/llama is not a directory"}


def problems(file: Path) -> set[str]:
    """What is wrong with a configuration file."""
    try:
        load([], {"HOME": str(file.parent)}, file)
    except ConfigErrors as errors:
        return {problem.message for problem in errors.problems}
    return set()


def test_environment_variables_named_are_keys() -> None:
    known = {spec.env_name for spec in SCHEMA.keys.values()} | {"HELIXD_CONFIG", "HELIXD_TORCH"}
    assert set(re.findall(r"HELIXD_\w+", TEXT)) <= known


def test_request_bodies_are_json() -> None:
    bodies = [words[words.index("-d") + 1] for words in commands() if words[0] == "curl" and "-d" in words]
    assert bodies
    for body in bodies:
        assert json.loads(body)["model"] == "demo"


def test_python_parses() -> None:
    (source,) = blocks("python")
    compile(source, "README.md", "exec")


@pytest.mark.parametrize("name", ["README.md", "helixd.toml", "LICENSE"])
def test_what_a_package_needs_is_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 1000
