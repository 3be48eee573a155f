"""What a device does, measured once on random weights of the model's shape and remembered in the state directory.

The cache key is everything that changes the answer: the model's shape, dtype, device, threads, torch's version. A
file that cannot be read or written costs a new measurement, never an error.
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path

import torch

from helixd import logs
from helixd.engine.timing import measure_layer_times
from helixd.engine.types import EngineOptions, LayerTimes
from helixd.model.decoder import DecoderConfig

log = logging.getLogger(__name__)

FORMAT = 1


def measured_layer_times(
    config: DecoderConfig, options: EngineOptions, device_name: str, cache: Path | None
) -> LayerTimes:
    """The device's layer times, from the cache if it has them. Blocking: run it in the node's thread."""
    key = _key(config, options, device_name)
    remembered = None if cache is None else _read(cache, key)
    if remembered is not None:
        return remembered
    times = measure_layer_times(config, options)
    if cache is not None:
        _write(cache, key, times)
    return times


def _key(config: DecoderConfig, options: EngineOptions, device_name: str) -> str:
    facts = {
        "format": FORMAT,
        "config": asdict(config),
        "device": options.device,
        "dtype": options.dtype,
        "threads": options.threads or torch.get_num_threads(),
        "name": device_name,
        "torch": torch.__version__,
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _read(cache: Path, key: str) -> LayerTimes | None:
    try:
        entry = json.loads(cache.read_text())[key]
        return LayerTimes(
            prompt_layer_time_s=tuple((float(n), float(s)) for n, s in entry["prompt"]),
            decode_layer_time_s=tuple((float(n), float(s)) for n, s in entry["decode"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(cache: Path, key: str, times: LayerTimes) -> None:
    try:
        try:
            known = json.loads(cache.read_text())
        except (OSError, ValueError):
            known = {}
        known[key] = {"prompt": times.prompt_layer_time_s, "decode": times.decode_layer_time_s}
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(known))
        partial.replace(cache)
    except OSError as error:
        logs.event(log, logging.WARNING, "measurement_not_kept", path=str(cache), reason=str(error))
