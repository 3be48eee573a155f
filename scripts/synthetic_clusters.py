"""Clusters of any size from published node types, for benchmarks: seeded, so that a size is always the same cluster.

Node types, model and workload are those of a helixd-cluster/1 file; how many of each type there are is drawn in that
file's proportions. In one region every pair has a fat link; between regions links carry a given number of tokens/s.
"""

from random import Random
from typing import Any

_FAT_BYTES_PER_S, _FAT_LATENCY_S = 1.25e9, 0.001
_THIN_LATENCY_S = 0.03


def synthetic(
    like: dict[str, Any],
    count: int,
    *,
    region_size: int | None = None,
    cross_tokens_per_s: float = 800.0,
    seed: int = 0,
) -> dict[str, Any]:
    """A helixd-cluster/1 document of `count` nodes of the types of `like`.

    `region_size`: nodes per region (None: one region). The coordinator is as near to all of them.
    """
    random = Random(seed)
    drawn = [random.choice([node["type"] for node in like["nodes"]]) for _ in range(count)]
    nic = {end: like["nodes"][0][end] for end in ("nic_in_bytes_per_s", "nic_out_bytes_per_s")}
    size = region_size or count
    nodes = [
        {"id": f"{kind}-{i:04}", "type": kind, "region": f"region-{i // size}", **nic} for i, kind in enumerate(drawn)
    ]
    thin_bytes_per_s = cross_tokens_per_s * like["model"]["activation_bytes"]
    links: list[list[Any]] = []
    for a in nodes:
        links.append(["coordinator", a["id"], _FAT_BYTES_PER_S, _FAT_LATENCY_S])
        links.append([a["id"], "coordinator", _FAT_BYTES_PER_S, _FAT_LATENCY_S])
        for b in nodes:
            if a["region"] != b["region"]:
                links.append([a["id"], b["id"], thin_bytes_per_s, _THIN_LATENCY_S])
            elif a is not b:
                links.append([a["id"], b["id"], _FAT_BYTES_PER_S, _FAT_LATENCY_S])
    name = f"synthetic{count}" + (f"-regions-of-{region_size}" if region_size else "")
    return {**like, "name": name, "nodes": nodes, "links": links}


def region_of(cluster: dict[str, Any], region: str) -> dict[str, Any]:
    """The part of a cluster that lies in one region, with the coordinator."""
    nodes = [node for node in cluster["nodes"] if node["region"] == region]
    there = {node["id"] for node in nodes} | {"coordinator"}
    links = [link for link in cluster["links"] if link[0] in there and link[1] in there]
    return {**cluster, "name": f"{cluster['name']}/{region}", "nodes": nodes, "links": links}
