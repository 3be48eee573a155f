"""Estimates from datasheets: how far from what was measured, and what they are made of."""

import json
from dataclasses import replace
from statistics import median

import pytest

from helixd.plan.cluster.clusterfile import parse_cluster
from helixd.plan.cluster.hardware import HARDWARE, find_hardware, near_names
from helixd.plan.cluster.profile import layer_time_s
from helixd.plan.cluster.roofline import estimate
from helixd.plan.cluster.spec import LayerWork, ModelSpec, WorkloadSpec
from tests.unit.plan_worlds import shared_clusters

# What the docs promise: no estimate is further off than this, and the middle one is close.
WORST, MIDDLE = 2.3, 1.2

MODEL = ModelSpec("m", 10, 1e9, 8192, 4, work=LayerWork(4096, 1e9, "bfloat16"))
WORK = LayerWork(4096, 1e9, "bfloat16")


@pytest.mark.parametrize(
    ("cluster", "weights", "kv_bytes"),
    [("heterogeneous42-llama70b", 0.856e9, 4096), ("single24-llama30b", 0.532e9, 4 * 6656)],
)
def test_estimates_are_near_the_published_layer_times(cluster: str, weights: float, kv_bytes: float) -> None:
    spec = parse_cluster(json.loads((shared_clusters() / f"{cluster}.json").read_text()))
    work = LayerWork(kv_bytes, 2 * weights, "float16")
    model = replace(spec.model, layer_bytes=2 * weights, work=work)
    types = {node.profile.type: node.profile for node in spec.nodes}
    ratios = []
    for name, hardware in (("A100", "A100-40GB"), ("V100", "V100-16GB"), ("L4", "L4"), ("T4", "T4")):
        if name not in types:
            continue
        found = estimate(HARDWARE[hardware], model, work, spec.workload)
        for batches, guessed, measured in (
            ((250, 500, 1000, 2000, 4000), found.prompt_layer_time_s, types[name].prompt_layer_time_s),
            ((2, 8, 16, 32, 64, 128, 256), found.decode_layer_time_s, types[name].decode_layer_time_s),
        ):
            ratios += [layer_time_s(guessed, n) / layer_time_s(measured, n) for n in batches]
    assert len(ratios) >= 36
    assert all(1 / WORST < ratio < WORST for ratio in ratios), sorted(ratios)
    assert 1 / MIDDLE < median(ratios) < MIDDLE


def test_every_figure_of_the_table_is_possible() -> None:
    assert len(HARDWARE) > 50
    for name, found in HARDWARE.items():
        assert find_hardware(name) is found
        assert found.memory_bytes is None or 5e9 < found.memory_bytes < 3e11
        assert 1e10 < found.bandwidth_bytes_per_s < 1e13
        assert all(1e11 <= rate < 1e16 for rate in found.flops_per_s.values())
        assert found.rate("float16") >= found.rate("float32")
        assert 0.5 < found.usable < 1


@pytest.mark.parametrize(
    ("name", "memory_gb", "gb_per_s", "dtype", "tflops"),
    [
        # What the sheets print, dense.
        ("A100-80GB", 80, 2039, "bfloat16", 312),
        ("H100", 80, 3350, "bfloat16", 989),
        ("H200", 141, 4800, "float16", 989),
        ("L4", 24, 300, "float16", 121),
        ("L40S", 48, 864, "bfloat16", 362),
        ("T4", 16, 320, "float16", 65),
        # Before Ampere bfloat16 is computed as float32.
        ("T4", 16, 320, "bfloat16", 8.1),
        ("V100-32GB", 32, 900, "float16", 125),
        ("RTX 3090", 24, 936, "bfloat16", 71),
        ("RTX 4090", 24, 1008, "bfloat16", 165),
        ("RTX 5090", 32, 1792, "float32", 105),
        ("MI300X", 192, 5300, "bfloat16", 1307),
        ("M2 Ultra", None, 800, "float16", 27.2),
        # Cores x base GHz x operations per cycle.
        ("Xeon 8480+", None, 8 * 4.8 * 8, "bfloat16", 56 * 2.0 * 1.024),
        ("Xeon 8380", None, 8 * 3.2 * 8, "float32", 40 * 2.3 * 0.064),
        ("EPYC 9654", None, 12 * 4.8 * 8, "bfloat16", 96 * 2.4 * 0.064),
        ("Ryzen 9 7950X", None, 2 * 5.2 * 8, "float32", 16 * 4.5 * 0.032),
    ],
)
def test_well_known_figures(
    name: str, memory_gb: float | None, gb_per_s: float, dtype: str, tflops: float
) -> None:  # fmt: skip
    found = HARDWARE[name]
    assert found.memory_bytes == (None if memory_gb is None else memory_gb * 1e9)
    assert found.bandwidth_bytes_per_s == pytest.approx(gb_per_s * 1e9, rel=0.01)
    assert found.rate(dtype) == pytest.approx(tflops * 1e12, rel=0.02)


def test_geforce_cards_multiply_matrices_at_twice_their_single_rate() -> None:
    cards = [found for name, found in HARDWARE.items() if name.startswith(("RTX 30", "RTX 40", "RTX 50"))]
    cards = [found for found in cards if "Ada" not in found.name]
    assert len(cards) > 15
    for found in cards:
        assert found.rate("bfloat16") == pytest.approx(2 * found.rate("float32"), rel=0.01), found.name


@pytest.mark.parametrize("name", ["nvidia rtx 4090", "NVIDIA GeForce RTX 4090", "RTX-4090", "rtx4090"])
def test_names_as_people_write_them(name: str) -> None:
    assert find_hardware(name) is HARDWARE["RTX 4090"]


@pytest.mark.parametrize(
    ("printed", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("Tesla V100-PCIE-32GB", "V100-32GB"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060"),
        ("NVIDIA GeForce RTX 4060 Ti 16GB", "RTX 4060 Ti 16GB"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Radeon RX 7900 XTX", "RX 7900 XTX"),
        ("Apple M2 Max", "M2 Max"),
        ("AMD EPYC 9654 96-Core Processor", "EPYC 9654"),
        ("Intel(R) Xeon(R) Platinum 8480+", "Xeon 8480+"),
    ],
)
def test_names_as_the_system_prints_them(printed: str, name: str) -> None:
    assert find_hardware(printed) is HARDWARE[name]


@pytest.mark.parametrize("name", ["A100", "V100", "RTX 4090 Laptop GPU", "RTX 3080 12GB", "H100 94GB", "", "GPU", "M5"])
def test_what_may_be_another_device_is_not_taken_for_one(name: str) -> None:
    assert find_hardware(name) is None


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("A100", ["A100-40GB", "A100-80GB"]),
        ("V100", ["V100-16GB", "V100-32GB"]),
        ("RTX 3O60", ["RTX 3060", "RTX 3060 Ti"]),
        ("RTX 3080 12GB", ["RTX 3080"]),
        ("abacus", []),
    ],
)
def test_a_name_that_is_not_known_has_near_ones(name: str, near: list[str]) -> None:
    found = near_names(name)
    assert found[: len(near)] == near
    assert len(found) <= 4
    assert bool(found) == bool(near)


def test_a_name_that_is_not_known_is_not_guessed() -> None:
    assert find_hardware("RTX 4091") is None
    assert find_hardware("") is None


def test_a_small_batch_reads_weights_and_a_large_one_computes() -> None:
    hardware = HARDWARE["A100-40GB"]
    found = estimate(hardware, MODEL, WORK, WorkloadSpec())
    first, last = found.prompt_layer_time_s[0][1], found.prompt_layer_time_s[-1][1]
    assert first == pytest.approx(1e9 / (1555e9 * 0.8) + 5e-5)
    assert last == pytest.approx(8192 * 1e9 / (312e12 * 0.5) + 5e-5)
    # A decode step reads the KV cache besides.
    assert found.decode_layer_time_s[0][1] > first
    assert found.memory_bytes == pytest.approx(34e9)


def test_a_dtype_without_units_of_its_own_runs_at_the_full_width_rate() -> None:
    hardware = HARDWARE["T4"]
    half = estimate(hardware, MODEL, replace(WORK, dtype="float16"), WorkloadSpec())
    brain = estimate(hardware, MODEL, WORK, WorkloadSpec())
    assert brain.prompt_layer_time_s[-1][1] > 7 * half.prompt_layer_time_s[-1][1]
    assert brain.prompt_layer_time_s[0] == half.prompt_layer_time_s[0]


def test_a_lone_token_reads_only_its_experts() -> None:
    hardware = HARDWARE["A100-40GB"]
    sparse = replace(WORK, expert_bytes=0.9e9, expert_share=1 / 8)
    found = estimate(hardware, MODEL, sparse, WorkloadSpec())
    dense = estimate(hardware, MODEL, WORK, WorkloadSpec())
    assert found.decode_layer_time_s[0][1] < dense.decode_layer_time_s[0][1] / 2
    assert found.decode_layer_time_s[-1][1] == pytest.approx(dense.decode_layer_time_s[-1][1])


def test_memory_that_the_datasheet_does_not_know_must_be_given() -> None:
    with pytest.raises(ValueError, match="M2 Max is sold with different memories"):
        estimate(HARDWARE["M2 Max"], MODEL, WORK, WorkloadSpec())
    assert estimate(HARDWARE["M2 Max"], MODEL, WORK, WorkloadSpec(), memory_bytes=24e9).memory_bytes == 24e9
