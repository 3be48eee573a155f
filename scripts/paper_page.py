#!/usr/bin/env python3
"""Write docs/paper.md and its pictures from docs/paper/figures.json, which scripts/bench_paper.py --save keeps.

    scripts/paper_page.py [--folder DOCS]

Every figure on the page comes from that file.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paper_drawings import Bars, figures, placements

DOCS = Path(__file__).resolve().parents[1] / "docs"
Data = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]

HEAD = """\
# The paper's evaluation, and ours beside it

Helix (arXiv 2406.01566) was evaluated on three clusters that serve LLaMA-2 70B: *single24*, 4 A100, 8 L4 and 12 T4 on
one network; *distributed24*, the same machines in three regions, 100 Mbit/s and 40 to 60 ms apart; *heterogeneous42*,
42 nodes of seven types. This page has what was published and what helixd makes of the same clusters, the same
profiles and the same request lengths (Azure conversation trace). All of it is simulated time, on both sides; nothing
here is a measurement of hardware. `scripts/bench_paper.py --save docs/paper/figures.json` makes the figures, in
pieces if asked, and `scripts/paper_page.py` makes this page and its pictures of them.

Two ways to serve are simulated with one cost model. *Policy paper* has the rules of the paper's own simulator: a node
runs one layer at a time over whatever waits there, prompts whole. *Policy helixd* is what this project's engine and
coordinator do: whole ranges at a time, decode first, prefill in chunks, the queue in front of prefill, and the
coordinator's own router, ledger and admission.
"""

FIDELITY = """\
## Are the paper's rules reproduced

Policy paper on published placements, decode tokens/s offline, 600 s after 60 s. The paper's scheduler draws routes in
proportion to *a* max flow, and these placements have many: which nodes of a layer carry how much is free wherever
they have room to spare, and throughput depends on it. The flow that was drawn from is not published. So each
placement is simulated with several equally large flows: one that loads alternatives evenly, one laid path by path,
and preflow pushes (the kind of algorithm that the paper's graph library runs) over arcs in several orders. Where
there is but one flow, as in a chain, the published figure is met within a percent or two. Where there are many, the
spread is wide.
"""

AFTER_FIDELITY = """\
"Nearest" is the nearest flow's figure; a row falls short where even that is off by more than 5 %. Which flow it is
moves figures by that much and more. The planner's own plans name their flow, so for them this freedom is gone.

One rule decides how many requests are in flight, and is easily taken for another: new requests are held back while the
fullest *layer*, all nodes that hold it together, is expected to be more than 0.8 full, each node counting with its mean
over its layers; not while the fullest *node* is. Counted by node, the published plan of the large cluster came out 7 %
low with every flow.
"""

PAPER = """\
## Our plan under the paper's rules

Only the plan differs here: placement and flow are ours, everything else is policy paper. Of the eight plans that are
predicted best for these rules, the one that simulates best.
"""

OFFLINE = """\
## As much work as fits

Policy helixd with the plan that `helixd plan` makes, against what was published for Helix.
"""

ONLINE = """\
## At the rates of the paper's latency figures

Policy helixd, requests with the bursts of the trace at the token rates at which the paper shows latency; medians. A
first token is counted from a request's creation, its wait in line included.
"""

BASELINES = """\
## What planning gives, and what routing gives

Everything is served by policy helixd; only the placement, or only the choice of hops, is somebody else's (240 s after
120 s). Of these, `separate` gives every type of node pipelines of its own, and `milp` is the paper's program.
"""

CHOICE = """\
## Does the planner take the right plan

A search knows placements by a prediction; of those predicted best, `helixd plan` simulates a few for as long as a
request takes, and takes the one that serves most. Here its choice is simulated for longer, and so are the ten plans
predicted best and all that no other beats in both flow and stages. A plan that survives the loss of any one node is
taken where that seems to cost little: it is held against others that do, and its price is shown.
"""

EXPLORE = """\
## What the paper did not try

One thing at a time is done otherwise than the engine and the coordinator do it; output tokens/s offline (240 s after
120 s), then medians at the rates above.
"""


def page(data: Data) -> str:
    """The text."""
    parts = [HEAD]
    for cluster in data["offline"]:
        name = cluster.split("-")[0]
        parts.append(
            f"## {name}\n\n![Placement and flow of {name}: published and ours](paper/{name}-placement.svg)\n\n"
            f"![Throughput and latency of {name}: published and ours](paper/{name}-figures.svg)\n"
        )
    parts += [FIDELITY, _fidelity(data), AFTER_FIDELITY]
    for text, section in (
        (PAPER, "paper"), (OFFLINE, "offline"), (ONLINE, "online"), (BASELINES, "baselines"), (CHOICE, "choice"),
        (EXPLORE, "explore"),
    ):  # fmt: skip
        if section in data:
            parts += [text, _shown(data, section)]
    return "\n".join(parts)


def _fidelity(data: Data) -> str:
    lines = [
        "| placement | published | least | median | most | flows | nearest |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for rows in data["fidelity"].values():
        for row in rows:
            off = row["nearest"] / row["published"] - 1
            spread = " | ".join(f"{row[key]:.1f}" for key in ("published", "least", "median", "most"))
            lines.append(f"| {row['name']} | {spread} | {row['flows']} | {off:+.1%} |")
    return "\n".join(lines) + "\n"


def _shown(data: Data, section: str) -> str:
    """A section's rows as they were printed."""
    lines = ["| | |", "|---|---|"]
    for cluster, rows in data[section].items():
        lines += [f"| {_name(row['name'], cluster, at)} | {row['shown'].strip()} |" for at, row in enumerate(rows)]
    return "\n".join(lines) + "\n"


def _name(name: str, cluster: str, at: int) -> str:
    return name if at == 0 or cluster in name else f"&emsp;{name}"


def pictures(data: Data) -> dict[str, str]:
    """File name -> SVG."""
    found: dict[str, str] = {}
    for cluster, rows in data["offline"].items():
        name = cluster.split("-")[0]
        helix = next(row for row in data["fidelity"][cluster] if row["name"].endswith("--helix"))
        plans = {"published Helix": helix["plan"], "helixd": rows[0]["plan"]}
        found[f"{name}-placement.svg"] = placements(
            f"{name}: who holds which of {rows[0]['plan']['layers']} layers, and how much of the max flow goes through",
            {
                title: (plan["layers"], plan["nodes"], f"max flow {plan['max_flow_tokens_per_s']:.0f} tokens/s")
                for title, plan in plans.items()
            },
        )
        found[f"{name}-figures.svg"] = figures(f"{name}: published, and ours in simulated time", _groups(data, cluster))
    return found


def _groups(data: Data, cluster: str) -> dict[str, Bars]:
    helix = next(row for row in data["fidelity"][cluster] if row["name"].endswith("--helix"))
    swarm = next(row for row in data["fidelity"][cluster] if row["name"].endswith("--swarm"))
    online, ours = data["online"][cluster][0], data["offline"][cluster][0]
    served = [
        ("published Swarm", swarm["published"], f"{swarm['published']:.1f}", False),
        ("published Helix", helix["published"], f"{helix['published']:.1f}", False),
        ("its rules, our simulator", helix["median"], f"{helix['least']:.1f} to {helix['most']:.1f}", True),
    ]
    if cluster in data.get("paper", {}):
        plan = data["paper"][cluster][0]["decode_tokens_per_s"]
        served.append(("its rules, our plan", plan, f"{plan:.1f}", True))
    rate = ours["decode_tokens_per_s"]
    served.append(("helixd", rate, f"{rate:.1f}", True))
    groups: dict[str, Bars] = {"output tokens/s, as much work as fits": served}
    for key, what in (("ttft_p50_s", "first token"), ("tpot_p50_s", "next token")):
        published, seen = online[f"published_{key}"], online[key]
        groups[f"{what}, median seconds at {online['rate']:.0f} tokens/s"] = [
            ("published Helix", published, f"{published:.2f} s", False), ("helixd", seen, f"{seen:.2f} s", True),
        ]  # fmt: skip
    return groups


def main() -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DOCS, help="where paper.md and paper/ are")
    folder: Path = parser.parse_args().folder
    source = folder / "paper" / "figures.json"
    if not source.exists():
        print(f"{source}: is missing; scripts/bench_paper.py --save {source} makes it", file=sys.stderr)
        return 2
    data = json.loads(source.read_text())
    for name, text in pictures(data).items():
        (folder / "paper" / name).write_text(text)
    (folder / "paper.md").write_text(page(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
