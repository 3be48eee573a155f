"""A configuration as the rooms want it: the options of each, made from the keys that concern it.

Reads the key file, and nothing else; starts nothing. Asked again when a configuration is read anew.
"""

from collections.abc import Mapping
from pathlib import Path

from helixd.api.auth import load_keys
from helixd.api.options import ApiOptions, Limits
from helixd.config import Config
from helixd.config.checks import passed_in
from helixd.coordinator.coordinator import CoordinatorOptions, ServedModel
from helixd.coordinator.drift import DriftOptions
from helixd.coordinator.planning import Pin, PlanningOptions
from helixd.coordinator.replanning import ReplanOptions
from helixd.errors import ConfigError
from helixd.model.checkpoint import Checkpoint
from helixd.model.digests import data_identity, weight_digests
from helixd.model.tokenizer import IncrementalDetokenizer
from helixd.plan.cluster.spec import WorkloadSpec
from helixd.tls import KeyPair, PeerTls
from helixd.wire.options import WireOptions

LEAST_KV_TOKENS = 256


def served_model(config: Config, checkpoint: Checkpoint) -> ServedModel:
    """The model as it is served. Raises ConfigError for a context longer than the model's."""
    decoder, wanted = checkpoint.config, config.model.max_context_tokens
    if wanted > decoder.max_positions:
        raise ConfigError(f"model.max_context_tokens = {wanted}, but the model has {decoder.max_positions} positions")
    tokenizer = checkpoint.tokenizer
    return ServedModel(
        name=config.model.name or checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        config=decoder,
        config_text=checkpoint.config_text,
        dtype=decoder.dtype if config.model.dtype == "auto" else config.model.dtype,
        max_context_tokens=wanted or decoder.max_positions,
        eos_ids=checkpoint.eos_ids,
        index=checkpoint.index,
        new_detokenizer=lambda prompt: IncrementalDetokenizer(tokenizer, prompt),
        digests=lambda stop: weight_digests(checkpoint.index, digest_cache(config), stop),
        weights=data_identity(checkpoint.index),
    )


def digest_cache(config: Config) -> Path:
    """Where the digests of the local checkpoint's weights are remembered."""
    return config.node.state_dir / "weight-digests.json"


def coordinator_options(config: Config) -> CoordinatorOptions:
    """The coordinator's."""
    timers, planner, engine = config.cluster.timers, config.planner, config.engine
    workload = WorkloadSpec(
        mean_input_tokens=planner.mean_input_tokens, mean_output_tokens=planner.mean_output_tokens,
        min_kv_tokens=LEAST_KV_TOKENS,
    )  # fmt: skip
    pins = {
        name: Pin(pin.min_layers, pin.max_layers, pin.range, pin.exclude) for name, pin in planner.pins.items()
    }  # fmt: skip
    return CoordinatorOptions(
        queue=config.api.limits.queue,
        max_batch_sequences=engine.max_batch_sequences,
        max_batch_tokens=engine.max_batch_tokens,
        prefill_chunk_tokens=engine.prefill_chunk_tokens,
        step_s=timers.step_s,
        failover_wait_s=timers.failover_wait_s,
        max_migrations=timers.max_migrations,
        probe_bytes=config.cluster.probe_bytes,
        planning=PlanningOptions(
            planner.time_limit_s, workload, engine.kv_fraction, pins, float(planner.load_speed_bytes),
            planner.horizon_s, planner.simulate,
        ),
        replan=ReplanOptions(
            planner.wait_for_nodes, planner.settle_s, planner.replan_gain, planner.replan_cooldown_s
        ),
        drift=DriftOptions(planner.drift_factor, planner.drift_hold_s),
    )  # fmt: skip


def wire_options(config: Config) -> WireOptions:
    """The peer links'."""
    cluster = config.cluster
    return WireOptions(
        ping_interval_s=cluster.timers.ping_s,
        dead_after_s=cluster.timers.dead_after_s,
        send_deadline_s=cluster.timers.send_s,
        chunk_bytes=cluster.chunk_bytes,
        bulk_window_bytes=cluster.window_bytes,
    )


def peer_tls(config: Config) -> PeerTls | None:
    """The peer links' encryption, if there is one. Blocking. Raises ConfigError."""
    tls = config.cluster.tls
    if tls.ca is None or tls.cert is None or tls.key is None:
        return None
    return PeerTls.load(tls.ca, KeyPair(tls.cert, tls.key))


def api_pair(config: Config) -> KeyPair | None:
    """The API's certificate, if it has one."""
    tls = config.api.tls
    return None if tls.cert is None or tls.key is None else KeyPair(tls.cert, tls.key)


def api_options(config: Config, env: Mapping[str, str]) -> ApiOptions:
    """The HTTP surface's. Blocking: reads the key file. Raises ConfigError."""
    api = config.api
    keys: frozenset[bytes] = frozenset()
    if api.keys_file is not None:
        keys = load_keys(api.keys_file, guarded=passed_in(api.keys_file, env))
    return ApiOptions(
        limits=Limits(n=api.limits.n),
        key_digests=keys,
        cors_origins=api.cors_origins,
        body_bytes=api.limits.body_bytes,
        connections=api.limits.connections,
        per_key_in_flight=api.limits.per_key_in_flight,
        request_timeout_s=api.limits.request_s,
        keep_alive_s=api.limits.keep_alive_s,
        write_stall_s=api.limits.write_stall_s,
        vllm_metric_names=config.metrics.vllm_names,
    )
