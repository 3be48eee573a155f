"""A configuration read anew: what it changes at once, what waits for a restart, what it is refused for."""

from pathlib import Path

import pytest

from helixd.config import Config, ConfigErrors, Override, load
from helixd.config.load import SCHEMA
from helixd.config.reload import RELOADABLE, reloaded


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path), "HELIXD_CONFIG": "/dev/null"}


def config(env: dict[str, str], **values: str) -> Config:
    given = [Override(name.replace("__", "."), value, name) for name, value in values.items()]
    return load([Override("model.path", "demo", "--model"), *given], env, None).config


def private(path: Path, text: str = "k\n") -> str:
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


def test_nothing_changed(env: dict[str, str]) -> None:
    old = config(env)
    change = reloaded(old, config(env), env)
    assert (change.config, change.applied, change.waiting) == (old, (), ())


def test_some_keys_change_at_once_and_the_others_are_named(env: dict[str, str], tmp_path: Path) -> None:
    old = config(env, api__limits__n="4")
    keys = private(tmp_path / "keys")
    new = config(
        env, log__level="debug", api__keys_file=keys, api__limits__queue="7", cluster__timers__drain="1s",
        cluster__timers__ping="100ms", planner__time_limit="1s", model__name="other",
    )  # fmt: skip
    change = reloaded(old, new, env)
    assert set(change.applied) == {
        "log.level", "api.keys_file", "api.limits.n", "api.limits.queue", "cluster.timers.drain",
    }  # fmt: skip
    assert set(change.waiting) == {"cluster.timers.ping", "planner.time_limit", "model.name"}
    assert change.config.api.limits == new.api.limits
    assert change.config.api.keys_file == Path(keys)
    assert change.config.cluster.timers.drain_s == 1.0
    assert change.config.cluster.timers.ping_s == old.cluster.timers.ping_s
    assert (change.config.planner, change.config.model) == (old.planner, old.model)
    # Asked again, what waits is named again and nothing else is.
    assert reloaded(change.config, new, env).applied == ()
    assert set(reloaded(change.config, new, env).waiting) == set(change.waiting)


def test_pins_wait(env: dict[str, str]) -> None:
    old = config(env, planner__pins__a__max_layers="3")
    change = reloaded(old, config(env, planner__pins__b__exclude="true"), env)
    assert change.config == old
    assert {name for name in change.waiting if ".b." in name or ".a." in name} == set(change.waiting)
    assert {"planner.pins.a.max_layers", "planner.pins.b.exclude"} <= set(change.waiting)


def test_half_of_a_change_that_opens_the_door_is_refused(env: dict[str, str], tmp_path: Path) -> None:
    """Without keys on loopback is fine; without keys on the address that stays bound is not."""
    keys = private(tmp_path / "keys")
    old = config(env, api__listen="0.0.0.0:8080", api__keys_file=keys)
    new = config(env)
    with pytest.raises(ConfigErrors) as caught:
        reloaded(old, new, env)
    first, second = map(str, caught.value.problems)
    assert "api.listen is 0.0.0.0:8080" in first
    assert "api.listen cannot change without a restart" in second


def test_certificates_may_change_but_tls_neither_begins_nor_ends(env: dict[str, str], tmp_path: Path) -> None:
    files = {name: private(tmp_path / name) for name in ("cert", "key", "newer")}
    plain = config(env)
    tls = config(env, api__tls__cert=files["cert"], api__tls__key=files["key"])
    assert reloaded(plain, tls, env).applied == ()
    assert set(reloaded(plain, tls, env).waiting) == {"api.tls.cert", "api.tls.key"}
    assert set(reloaded(tls, plain, env).waiting) == {"api.tls.cert", "api.tls.key"}
    newer = config(env, api__tls__cert=files["newer"], api__tls__key=files["key"])
    change = reloaded(tls, newer, env)
    assert (change.applied, change.waiting) == (("api.tls.cert",), ())
    assert change.config.api.tls.cert == Path(files["newer"])


def test_every_reloadable_key_is_one() -> None:
    assert set(SCHEMA.keys) >= RELOADABLE
