"""From file, environment and flags to one Config: precedence, places, unknown keys, cross-checks."""

import re
import socket
from pathlib import Path

import pytest

from helixd.config import Address, Config, ConfigErrors, Override, PinConfig, load, load_config
from helixd.config.lines import key_lines
from helixd.config.load import SCHEMA
from helixd.config.sources import find_file
from helixd.layers import LayerRange
from helixd.wire.probe import FIRST_PROBE_BYTES

DEMO = Override("model.path", "demo", "--model")


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """An environment in which no configuration file of this machine is found."""
    (tmp_path / "empty.toml").touch()
    return {"HOME": str(tmp_path), "HELIXD_CONFIG": str(tmp_path / "empty.toml")}


def flag(key: str, value: str) -> Override:
    return Override(key, value, f"--set {key}")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "helixd.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(*overrides: Override, env: dict[str, str], file: Path | None = None) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        load_config(overrides, env, file)
    return [str(problem) for problem in caught.value.problems]


def test_defaults_are_usable(env: dict[str, str]) -> None:
    config = load_config([DEMO], env)
    assert config.coordinates
    assert config.computes
    assert config.api.listen == Address("127.0.0.1", 8080)
    assert config.cluster.listen == Address("127.0.0.1", 7070)
    assert config.cluster.timers.ping_s == 0.5
    assert config.api.limits.body_bytes == 4 * 2**20
    assert (config.model.name, config.node.name) == ("demo", socket.gethostname())
    assert config.node.state_dir == Path(env["HOME"]) / ".local/state/helixd"


def test_a_model_without_a_name_is_called_as_its_checkpoint_is(tmp_path: Path, env: dict[str, str]) -> None:
    """A snapshot's own directory is called by a hash that nobody would ask for."""
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for path, name in ((snapshot, "org/tiny"), (tmp_path, tmp_path.name)):
        assert load_config([flag("model.path", str(path))], env).model.name == name
    named = load_config([flag("model.path", str(snapshot)), flag("model.name", "mine")], env)
    assert named.model.name == "mine"


def test_flags_beat_environment_beats_file_beats_defaults(tmp_path: Path, env: dict[str, str]) -> None:
    file = write(tmp_path, 'model.path = "demo"\n[engine]\nmax_batch_sequences = 2\nmax_batch_tokens = 300\n')
    env |= {"HELIXD_ENGINE__MAX_BATCH_SEQUENCES": "3", "HELIXD_LOG__LEVEL": "debug"}
    loaded = load([flag("log.level", "error")], env, file)
    engine, origins = loaded.config.engine, loaded.origins
    assert (engine.max_batch_tokens, engine.max_batch_sequences, loaded.config.log.level) == (300, 3, "error")
    assert engine.prefill_chunk_tokens == Config().engine.prefill_chunk_tokens
    assert origins["engine", "max_batch_tokens"] == f"{file}:4"
    assert origins["engine", "max_batch_sequences"] == "$HELIXD_ENGINE__MAX_BATCH_SEQUENCES"
    assert origins["log", "level"] == "--set log.level"
    assert ("engine", "prefill_chunk_tokens") not in origins


def test_every_problem_is_listed_with_its_place(tmp_path: Path, env: dict[str, str]) -> None:
    file = write(
        tmp_path,
        '# a comment\nrole = "boss"\n\n[api]\nlisten = "nowhere"\nlimits.n = 0\n\n[clutser]\nsecret = "x"\n'
        '[cluster.timers]\npnig = "1s"\ndead_after = "0.5s"\nping = 1\n',
    )
    env |= {"HELIXD_API__LIMTS__N": "1", "HELIXD_PORT": "tcp://10.0.0.1:80", "HELIXD_DEVICE__MEMORY": "big"}
    found = problems(flag("modle.path", "demo"), DEMO, env=env, file=file)
    assert [line.split(": ")[0] for line in found] == [
        f"{file}:8", f"{file}:11", "$HELIXD_API__LIMTS__N", "--set modle.path", f"{file}:2", f"{file}:5", f"{file}:6",
        "$HELIXD_DEVICE__MEMORY", f"{file}:12",
    ]  # fmt: skip
    text = "\n".join(found)
    for hint in (
        "did you mean cluster?", "did you mean cluster.timers.ping?", "did you mean model.path?",
        "did you mean api.limits.n?", "has no port", "0 is out of range", "twice cluster.timers.ping",
    ):  # fmt: skip
        assert hint in text


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ('[api]\nlistn = "a:1"', "did you mean api.listen?"),
        ('state_dir = "/x"', "did you mean node.state_dir?"),
        ('listen = "a:1"', "did you mean api.listen or cluster.listen?"),
        ('[planner.pins.a]\nmax_layer = 1', "did you mean planner.pins.a.max_layers?"),
        ("zzz = 1", "documents every key"),
        ("api = 3", "api is a section"),
        ("[[api]]\nlisten = 'a:1'", "api is a section"),
        ("[role]\nx = 1", "expected one of"),
        ("planner.pins.a = 3", "planner.pins.a is a section"),
    ],
)  # fmt: skip
def test_misplaced_and_misspelt_keys_get_a_hint(text: str, hint: str, tmp_path: Path, env: dict[str, str]) -> None:
    found = problems(DEMO, env=env, file=write(tmp_path, text))
    assert len(found) == 1
    assert hint in found[0]


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [(b"a = 1\nb = \n", 2, "not valid TOML"), (b"[log]\nlevel = 'info'\nlevel = 'info'\n", 3, "not valid TOML"),
     (b"a = 1\nb = [1,\n2", 3, "not valid TOML")],
)  # fmt: skip
def test_a_broken_file_is_one_problem(
    content: bytes, line: int, reason: str, tmp_path: Path, env: dict[str, str]
) -> None:
    file = tmp_path / "broken.toml"
    file.write_bytes(content)
    (found,) = problems(env=env, file=file)
    assert found.startswith(f"{file}:{line}: {reason}")


def test_a_file_that_cannot_be_read_is_a_problem(tmp_path: Path, env: dict[str, str]) -> None:
    assert "cannot be read" in problems(DEMO, env=env, file=tmp_path / "absent.toml")[0]
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    assert "not UTF-8" in problems(DEMO, env=env, file=tmp_path / "latin.toml")[0]


def test_a_variable_for_a_pin_is_told_where_pins_go(env: dict[str, str]) -> None:
    """Nodes have names that variables cannot have; the advice must not be the very name that was given."""
    found = problems(DEMO, env=env | {"HELIXD_PLANNER__PINS__GPU1__EXCLUDE": "true"})
    assert found == [
        "$HELIXD_PLANNER__PINS__GPU1__EXCLUDE: planner.pins cannot be set by a variable, which cannot have a node's "
        "name; use the file, or --set 'planner.pins.\"node-id\".KEY=VALUE'"
    ]


def test_where_the_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = tmp_path / "etc.toml"
    user = tmp_path / "xdg" / "helixd" / "helixd.toml"
    user.parent.mkdir(parents=True)
    (tmp_path / "helixd.toml").touch()
    monkeypatch.chdir(tmp_path)
    env = {"XDG_CONFIG_HOME": str(tmp_path / "xdg"), "HOME": str(tmp_path)}

    assert find_file(env, None, is_root=False, system=system) is None
    system.touch()
    assert find_file(env, None, is_root=False, system=system) == system
    user.touch()
    assert find_file(env, None, is_root=False, system=system) == user
    assert find_file(env, None, is_root=True, system=system) == system
    assert find_file(env | {"HELIXD_CONFIG": "/named"}, None, is_root=False, system=system) == Path("/named")
    assert find_file(env | {"HELIXD_CONFIG": "/named"}, Path("/flag"), is_root=False, system=system) == Path("/flag")


def test_relative_paths_start_from_the_file(tmp_path: Path, env: dict[str, str]) -> None:
    (tmp_path / "m").mkdir()
    config = load_config([], env, write(tmp_path, 'model.path = "m"\nnode.state_dir = "s"\n'))
    assert (config.model.path, config.model.name) == (str(tmp_path / "m"), "m")
    assert config.node.state_dir == tmp_path / "s"


def test_directories_of_the_service_manager(env: dict[str, str]) -> None:
    env |= {"STATE_DIRECTORY": "/s/one:/s/two", "XDG_CACHE_HOME": "/xdg", "XDG_STATE_HOME": "relative"}
    config = load_config([DEMO], env)
    assert (config.node.state_dir, config.node.cache_dir) == (Path("/s/one"), Path("/xdg/helixd"))
    del env["STATE_DIRECTORY"]
    assert load_config([DEMO], env).node.state_dir == Path(env["HOME"]) / ".local/state/helixd"


def test_pins_are_tables_named_by_node(tmp_path: Path, env: dict[str, str]) -> None:
    file = write(tmp_path, '[planner.pins."gpu.1"]\nmax_layers = 4\n[planner.pins.b]\nrange = [2, 5]\n')
    config = load_config([DEMO, flag('planner.pins."gpu.1".min_layers', "2")], env, file)
    assert config.planner.pins == {
        "gpu.1": PinConfig(min_layers=2, max_layers=4), "b": PinConfig(range=LayerRange(2, 5))
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pin", "fine"),
    [("min_layers = 3\nmax_layers = 3", True), ("min_layers = 4\nmax_layers = 3", False),
     ("range = [0, 3]\nmax_layers = 3", True), ("range = [0, 4]\nmax_layers = 3", False),
     ("range = [0, 4]\nmin_layers = 5", False), ("exclude = true\nmax_layers = 3", True),
     ("exclude = true\nrange = [0, 4]", False)],
)  # fmt: skip
def test_pins_that_contradict_themselves(pin: str, fine: bool, tmp_path: Path, env: dict[str, str]) -> None:
    file = write(tmp_path, f"[planner.pins.a]\n{pin}\n")
    if fine:
        load_config([DEMO], env, file)
    else:
        (found,) = problems(DEMO, env=env, file=file)
        assert re.match(rf'{re.escape(str(file))}:[23]: planner\.pins\."a": ', found)


def test_roles_need_what_they_need(env: dict[str, str]) -> None:
    coordinator = flag("cluster.coordinator", "127.0.0.1:7070")
    assert "needs model.path" in problems(env=env)[0]
    assert "needs cluster.coordinator" in problems(flag("role", "worker"), env=env)[0]
    assert 'role = "worker"' in problems(DEMO, coordinator, env=env)[0]
    assert load_config([flag("role", "worker"), coordinator], env).computes
    assert not load_config([flag("role", "coordinator"), DEMO, coordinator], env).computes
    assert "is not a directory" in problems(flag("model.path", "/no/such"), env=env)[0]


@pytest.mark.parametrize(
    ("role", "coordinator", "listen"),
    [("worker", "127.0.0.1:7070", "127.0.0.1:0"), ("worker", "10.0.0.1:7070", "0.0.0.0:7071"),
     ("coordinator", "", "127.0.0.1:7070")],
)  # fmt: skip
def test_the_peer_address_follows_from_the_role(role: str, coordinator: str, listen: str, env: dict[str, str]) -> None:
    given = [DEMO, flag("role", role), flag("cluster.insecure_open", "true")]
    config = load_config([*given, flag("cluster.coordinator", coordinator)], env)
    assert str(config.cluster.listen) == listen


@pytest.mark.parametrize("section", ["cluster", "api"])
def test_an_address_others_reach_needs_a_secret(section: str, tmp_path: Path, env: dict[str, str]) -> None:
    file_key = {"cluster": "cluster.secret_file", "api": "api.keys_file"}[section]
    listen = flag(f"{section}.listen", "0.0.0.0:7000")
    (found,) = problems(DEMO, listen, env=env)
    assert found.startswith(f"--set {section}.listen: ")
    assert file_key in found

    assert load_config([DEMO, listen, flag(f"{section}.insecure_open", "true")], env)
    secret = tmp_path / "secret"
    secret.write_text("s" * 40)
    secret.chmod(0o600)
    assert load_config([DEMO, listen, flag(file_key, str(secret))], env)
    assert load_config([DEMO, flag(f"{section}.listen", "[::1]:7000")], env)


def test_a_worker_serves_no_api_and_needs_no_keys(env: dict[str, str]) -> None:
    given = [flag("role", "worker"), flag("cluster.coordinator", "127.0.0.1:1"), flag("api.listen", "0.0.0.0:80")]
    assert load_config(given, env).role == "worker"


@pytest.mark.parametrize("key", ["cluster.secret_file", "api.keys_file"])
def test_secret_files_are_private(key: str, tmp_path: Path, env: dict[str, str]) -> None:
    secret = tmp_path / "secret"
    given = flag(key, str(secret))
    assert "No such file" in problems(DEMO, given, env=env)[0]
    secret.touch(0o600)
    assert "holds 0 bytes" in problems(DEMO, given, env=env)[0]
    secret.write_text("s" * 40)
    for mode in (0o640, 0o604, 0o610):
        secret.chmod(mode)
        assert "chmod 600" in problems(DEMO, given, env=env)[0]
    secret.chmod(0o400)
    assert load_config([DEMO, given], env)
    assert "is not a file" in problems(DEMO, flag(key, str(tmp_path)), env=env)[0]


@pytest.mark.parametrize(("section", "names"), [("cluster", ("ca", "cert", "key")), ("api", ("cert", "key"))])
def test_certificates_come_whole_and_their_key_is_private(
    section: str, names: tuple[str, ...], tmp_path: Path, env: dict[str, str]
) -> None:
    """The cluster's make its secret unnecessary; the API's are no substitute for keys."""
    given = []
    for name in names:
        (tmp_path / name).write_text("PEM")
        given.append(flag(f"{section}.tls.{name}", str(tmp_path / name)))
    (tmp_path / "key").chmod(0o600)
    assert getattr(load_config([DEMO, *given], env), section).tls.on
    assert not getattr(load_config([DEMO], env), section).tls.on
    listen = flag(f"{section}.listen", "0.0.0.0:7000")
    if section == "cluster":
        assert load_config([DEMO, listen, *given], env)
    else:
        assert "give api.keys_file" in problems(DEMO, listen, *given, env=env)[0]
    for left_out in range(len(names)):
        (found,) = problems(DEMO, *given[:left_out], *given[left_out + 1 :], env=env)
        assert f"{section}.tls: {names[left_out]} is missing; give all, or none" in found
    (tmp_path / "key").chmod(0o640)
    assert "chmod 600" in problems(DEMO, *given, env=env)[0]
    (tmp_path / "key").chmod(0o600)
    (tmp_path / "cert").unlink()
    assert f"{section}.tls.cert: {tmp_path / 'cert'} is not a file" in problems(DEMO, *given, env=env)[0]


def test_no_key_takes_a_secret_itself() -> None:
    """Flags and environment can be read by other processes; files of one's own cannot."""
    for path, spec in SCHEMA.keys.items():
        if re.search("secret|key|password|token(?!s)", path[-1]) and path != ("api", "limits", "per_key_in_flight"):
            assert spec.kind.label == "path", path


def test_a_cluster_secret_is_long_enough(tmp_path: Path, env: dict[str, str]) -> None:
    secret = tmp_path / "secret"
    secret.touch(0o600)
    given = flag("cluster.secret_file", str(secret))
    secret.write_text("s" * 31)
    assert "at least 32" in problems(DEMO, given, env=env)[0]
    secret.write_text("s" * 32)
    assert load_config([DEMO, given], env)


def test_secrets_that_systemd_passes_in(tmp_path: Path, env: dict[str, str]) -> None:
    env["CREDENTIALS_DIRECTORY"] = str(tmp_path)
    assert load_config([DEMO], env).cluster.secret_file is None
    for name in ("cluster-secret", "api-keys"):
        (tmp_path / name).write_text("s" * 40)
        (tmp_path / name).chmod(0o440)
    config = load_config([DEMO], env)
    assert (config.cluster.secret_file, config.api.keys_file) == (tmp_path / "cluster-secret", tmp_path / "api-keys")


@pytest.mark.parametrize(
    ("values", "hint"),
    [({"engine.max_batch_tokens": "256", "engine.prefill_chunk_tokens": "256"}, None),
     ({"engine.max_batch_tokens": "255", "engine.prefill_chunk_tokens": "256"}, "engine.prefill_chunk_tokens"),
     ({"engine.max_batch_tokens": "256", "engine.max_batch_sequences": "257"}, "engine.max_batch_sequences"),
     ({"cluster.chunk": "8KiB", "cluster.window": "8KiB"}, None),
     ({"cluster.chunk": "8KiB", "cluster.window": "4KiB"}, "cluster.window"),
     ({"cluster.timers.ping": "1s", "cluster.timers.dead_after": "2s"}, None),
     ({"cluster.timers.ping": "1s", "cluster.timers.dead_after": "1999ms"}, "cluster.timers.dead_after")],
)  # fmt: skip
def test_limits_that_contradict_each_other(values: dict[str, str], hint: str | None, env: dict[str, str]) -> None:
    given = [DEMO, *(flag(key, value) for key, value in values.items())]
    if hint is None:
        load_config(given, env)
    else:
        (found,) = problems(*given, env=env)
        assert hint in found


def test_the_line_of_every_kind_of_key() -> None:
    text = (
        'a = 1\n"b c".d = 2 # comment\n\n[t]\r\nx = """\n[not.a.table]\ny = 1\n"""\nz = [\n  1, # [no]\n  {q = 3},\n]\n'
        "  [ u . 'v.w' ]\nk = 'a = 1'\n[[list]]\nm = 1\n[[list]]\nm = 2"
    )
    lines = key_lines(text)
    expected = {
        ("a",): 1, ("b c", "d"): 2, ("t",): 4, ("t", "x"): 5, ("t", "z"): 9, ("u", "v.w"): 13, ("u", "v.w", "k"): 14,
        ("list",): 15, ("list", "m"): 16,
    }  # fmt: skip
    assert {path: lines.get(path) for path in expected} == expected
    assert ("not", "a", "table") not in lines


def test_a_probe_may_be_as_small_as_a_probe_can_be_and_no_smaller(env: dict[str, str]) -> None:
    assert load_config([DEMO, flag("cluster.probe", str(FIRST_PROBE_BYTES))], env)
    (problem,) = problems(DEMO, flag("cluster.probe", str(FIRST_PROBE_BYTES - 1)), env=env)
    assert "cluster.probe" in problem
