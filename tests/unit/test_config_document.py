"""The shipped helixd.toml and --print-config say what the declarations say."""

import re
import tomllib
from pathlib import Path

import pytest

from helixd.config import Config, Override, load
from helixd.config.document import documented_defaults, effective
from helixd.config.kinds import to_toml
from helixd.config.load import SCHEMA

SHIPPED = Path(__file__).parents[2] / "helixd.toml"


def uncommented(text: str) -> str:
    """The document with every commented-out setting and section put in force."""
    return re.sub(r'^#(?=[a-z_]+ = |\[)', "", text, flags=re.MULTILINE)  # fmt: skip


def test_the_shipped_file_is_the_documented_defaults() -> None:
    assert SHIPPED.read_text(encoding="utf-8") == documented_defaults(), "run: helixd --print-defaults > helixd.toml"


def test_the_shipped_file_has_every_key_at_its_default(tmp_path: Path) -> None:
    document = tomllib.loads(uncommented(SHIPPED.read_text(encoding="utf-8")))
    for path, spec in SCHEMA.keys.items():
        value: object = document
        for name in path:
            assert isinstance(value, dict)
            value = value[name]
        assert spec.parse(value, tmp_path, is_text=False) == spec.default, path


def test_the_shipped_file_changes_nothing_as_it_is_and_parses_with_all_in_force(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path)}
    demo = [Override("model.path", "demo", "--model")]
    plain = load(demo, env | {"HELIXD_CONFIG": str(SHIPPED)}, None)
    assert set(plain.origins) - {("model", "path")} <= {
        ("node", "name"), ("node", "state_dir"), ("node", "cache_dir"), ("model", "name"), ("cluster", "listen"),
    }  # fmt: skip
    file = tmp_path / "all.toml"
    file.write_text(uncommented(SHIPPED.read_text(encoding="utf-8")), encoding="utf-8")
    all_in_force = load(demo, env, file)
    assert set(all_in_force.config.planner.pins) == {"node-id"}
    assert all_in_force.config.api == plain.config.api
    assert all_in_force.config.cluster == plain.config.cluster


def test_every_key_has_a_meaning_and_a_valid_default() -> None:
    for spec in SCHEMA.keys.values():
        assert spec.doc.endswith("."), spec.path
        rendered = spec.kind.render(spec.default)
        assert spec.kind.parse(rendered, Path("/")) == spec.default, spec.path
        assert re.fullmatch(r"HELIXD_[A-Z_]+", spec.env_name)


def test_every_key_can_be_set_from_the_environment(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "HELIXD_CONFIG": "/dev/null"}
    for spec in SCHEMA.keys.values():
        rendered = spec.kind.render(spec.default)
        env[spec.env_name] = rendered if isinstance(rendered, str) else to_toml(rendered)
    env["HELIXD_MODEL__PATH"] = "demo"
    assert set(load([], env, None).origins) == set(SCHEMA.keys)


def test_effective_values_read_back_as_the_same_configuration(tmp_path: Path) -> None:
    given = [
        Override("model.path", "demo", "--model"),
        Override("api.listen", "[::1]:9", "--listen"),
        Override("device.memory", "1.5GiB", "--memory"),
        Override("device.devices", "cuda:0,cpu", "--device"),
        Override('planner.pins."a.b".range', "[1, 3]", "--set"),
        Override("node.name", 'quoted "name" \u00e9', "--name"),
    ]
    env = {"HOME": str(tmp_path), "HELIXD_CONFIG": "/dev/null"}
    loaded = load(given, env, None)
    text = effective(loaded)
    assert 'listen = "[::1]:9"  # --listen' in text
    assert 'memory = "1.5GiB"  # --memory' in text
    assert "ping = " in text
    file = tmp_path / "again.toml"
    file.write_text(text, encoding="utf-8")
    assert load([], env, file).config == loaded.config


def test_the_declared_defaults_are_those_of_the_dataclasses() -> None:
    assert Config().cluster.timers.dead_after_s == SCHEMA.keys["cluster", "timers", "dead_after"].default


@pytest.mark.parametrize("name", ["secret", "password", "token", "api_key"])
def test_no_key_holds_a_secret_itself(name: str) -> None:
    assert not [path for path in SCHEMA.keys if path[-1] == name]
