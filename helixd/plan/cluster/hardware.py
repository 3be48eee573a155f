"""What vendors print about common GPUs, chips and processors: memory, its bandwidth, arithmetic per second.

Figures as vendors' datasheets and white papers give them, rounded. Dense rates (sheets often print twice that, with
sparsity), matrix units with 32-bit accumulation where the vendor tells them apart: a GeForce card from the 30 series on
then has twice its 32-bit rate. Vendors of unified-memory chips and of processors publish no rate: cores x base clock x
operations per cycle (16 FP32 lanes of AVX-512 are 32 operations per unit, an AMX core does 1024 in bfloat16). Nothing
here was measured: four devices were held against published layer times (see `helixd.plan.cluster.roofline`).
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

SOURCE = "vendor datasheet"


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device. `memory_bytes` is None where it is sold with different memories.

    `flops_per_s` by dtype; a dtype that is missing is computed at the float32 rate. `usable`: the share of memory
    that weights and KV may take, beside the driver, buffers and whatever else lives there.
    """

    name: str
    memory_bytes: float | None
    bandwidth_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    usable: float = 0.85

    def rate(self, dtype: str) -> float:
        """Operations per second in `dtype`."""
        return self.flops_per_s.get(dtype, self.flops_per_s["float32"])


def _gpu(
    name: str, memory_gb: float, gb_per_s: float, half: float, single: float, *, bfloat16: bool = True
) -> Hardware:
    rates = {"float32": single * 1e12, "float16": half * 1e12} | ({"bfloat16": half * 1e12} if bfloat16 else {})
    return Hardware(name, memory_gb * 1e9, gb_per_s * 1e9, rates)


def _apple(name: str, gb_per_s: float, single: float) -> Hardware:
    rate = single * 1e12
    return Hardware(name, None, gb_per_s * 1e9, {"float32": rate, "float16": rate, "bfloat16": rate}, usable=0.7)


def _processor(name: str, gb_per_s: float, single: float, bfloat16: float | None = None) -> Hardware:
    rates = {"float32": single * 1e12} | ({"bfloat16": bfloat16 * 1e12} if bfloat16 else {})
    return Hardware(name, None, gb_per_s * 1e9, rates, usable=0.8)


# Name, GB, GB/s, TFLOP/s in 16 bits, TFLOP/s in 32 bits.
_ALL = (
    _gpu("A100-40GB", 40, 1555, 312, 19.5),
    _gpu("A100-80GB", 80, 2039, 312, 19.5),
    _gpu("H100", 80, 3350, 989, 67),
    _gpu("H100-PCIe", 80, 2000, 756, 51),
    _gpu("H200", 141, 4800, 989, 67),
    _gpu("GH200", 96, 4000, 989, 67),
    _gpu("H20", 96, 4000, 148, 44),
    _gpu("B200", 180, 7700, 2250, 75),
    _gpu("L4", 24, 300, 121, 30.3),
    _gpu("L40", 48, 864, 181, 90.5),
    _gpu("L40S", 48, 864, 362, 91.6),
    _gpu("T4", 16, 320, 65, 8.1, bfloat16=False),
    _gpu("P100", 16, 732, 18.7, 9.3, bfloat16=False),
    _gpu("V100-16GB", 16, 900, 125, 15.7, bfloat16=False),
    _gpu("V100-32GB", 32, 900, 125, 15.7, bfloat16=False),
    _gpu("A10", 24, 600, 125, 31.2),
    _gpu("A30", 24, 933, 165, 10.3),
    _gpu("A40", 48, 696, 150, 37.4),
    _gpu("RTX A4000", 16, 448, 76.7, 19.2),
    _gpu("RTX A5000", 24, 768, 111, 27.8),
    _gpu("RTX A6000", 48, 768, 155, 38.7),
    _gpu("RTX 4000 Ada", 20, 360, 81.9, 26.7),
    _gpu("RTX 6000 Ada", 48, 960, 364, 91.1),
    _gpu("RTX 2080 Ti", 11, 616, 53.8, 13.4, bfloat16=False),
    _gpu("RTX 3060", 12, 360, 25.5, 12.7),
    _gpu("RTX 3060 Ti", 8, 448, 32.4, 16.2),
    _gpu("RTX 3070", 8, 448, 40.6, 20.3),
    _gpu("RTX 3070 Ti", 8, 608, 43.5, 21.7),
    _gpu("RTX 3080", 10, 760, 59.5, 29.8),
    _gpu("RTX 3080 Ti", 12, 912, 68.2, 34.1),
    _gpu("RTX 3090", 24, 936, 71, 35.6),
    _gpu("RTX 3090 Ti", 24, 1008, 80, 40),
    _gpu("RTX 4060", 8, 272, 30.2, 15.1),
    _gpu("RTX 4060 Ti 16GB", 16, 288, 44.1, 22.1),
    _gpu("RTX 4070", 12, 504, 58.3, 29.1),
    _gpu("RTX 4070 Super", 12, 504, 71, 35.5),
    _gpu("RTX 4070 Ti", 12, 504, 80.2, 40.1),
    _gpu("RTX 4070 Ti Super", 16, 672, 88.2, 44.1),
    _gpu("RTX 4080", 16, 717, 97.5, 48.7),
    _gpu("RTX 4080 Super", 16, 736, 104, 52.2),
    _gpu("RTX 4090", 24, 1008, 165, 82.6),
    _gpu("RTX 5060 Ti 16GB", 16, 448, 47.4, 23.7),
    _gpu("RTX 5070", 12, 672, 61.7, 30.9),
    _gpu("RTX 5070 Ti", 16, 896, 87.9, 43.9),
    _gpu("RTX 5080", 16, 960, 113, 56.3),
    _gpu("RTX 5090", 32, 1792, 210, 105),
    _gpu("RX 7900 XT", 20, 800, 103, 51.5),
    _gpu("RX 7900 XTX", 24, 960, 123, 61.4),
    _gpu("MI210", 64, 1638, 181, 22.6),
    # A card is two devices to the system; this is one.
    _gpu("MI250", 64, 1638, 181, 22.6),
    _gpu("MI300X", 192, 5300, 1307, 163),
    _gpu("MI325X", 256, 6000, 1307, 163),
    _apple("M1", 68, 2.6),
    _apple("M1 Pro", 200, 5.2),
    _apple("M1 Max", 400, 10.4),
    _apple("M1 Ultra", 800, 20.8),
    _apple("M2", 100, 3.6),
    _apple("M2 Pro", 200, 6.8),
    _apple("M2 Max", 400, 13.6),
    _apple("M2 Ultra", 800, 27.2),
    _apple("M3", 100, 3.5),
    _apple("M3 Pro", 150, 6.4),
    _apple("M3 Max", 400, 14.1),
    _apple("M3 Ultra", 819, 28.2),
    _apple("M4", 120, 4.3),
    _apple("M4 Pro", 273, 8.5),
    _apple("M4 Max", 546, 17.0),
    _processor("EPYC 7763", 205, 5.0),
    _processor("EPYC 9654", 461, 7.4, 14.7),
    _processor("Xeon 8380", 205, 5.9),
    _processor("Xeon 8480+", 307, 7.2, 115),
    _processor("Ryzen 9 7950X", 83, 2.3, 4.6),
    _processor("Core i9-13900K", 90, 1.4),
    _processor("Raspberry Pi 5", 17, 0.15),
)

HARDWARE: Mapping[str, Hardware] = {found.name: found for found in _ALL}

# What systems add to a name that tells no two devices of the table apart: vendor, line, board, kind of memory.
_ADDED = re.compile(
    r"\b(nvidia|amd|apple|intel|geforce|tesla|radeon|instinct|platinum|generation|processor|cpu|sxm\d?|hbm\de?)\b"
    r"|\b\d+-core\b|\(r\)|\(tm\)"
)
_SIZE = re.compile(r"(\d+) ?gb\b")


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "", _ADDED.sub(" ", name.lower()))


_KEYS = {_key(name): found for name, found in HARDWARE.items()}


def find_hardware(name: str) -> Hardware | None:
    """The device called `name`, as people write it or as its system prints it; None if it is not known.

    A board or an amount of memory that the table does not tell apart may be part of the name, another amount not.
    """
    lower = name.lower()
    for spelled in (lower, re.sub(r"\bpcie\b", " ", lower)):
        if (found := _KEYS.get(_key(spelled))) is not None:
            return found
    size = _SIZE.search(lower)
    found = _KEYS.get(_key(_SIZE.sub(" ", lower))) if size is not None else None
    return found if size is not None and found is not None and found.memory_bytes == int(size[1]) * 1e9 else None


def near_names(name: str) -> list[str]:
    """Up to four names of the table that may be meant by one that is not in it."""
    names = {key: found.name for key, found in _KEYS.items()}
    key = _key(name)
    begun = [names[known] for known in names if key and (known.startswith(key) or key.startswith(known))]
    alike = [names[known] for known in difflib.get_close_matches(key, names, n=4, cutoff=0.75)]
    return list(dict.fromkeys(begun[:4] + alike))[:4]
