"""Why there is no pipeline, in words a client can pass on."""

from types import SimpleNamespace
from typing import Any

import pytest

from helixd.coordinator.epochs import PlanInForce
from helixd.coordinator.view import readiness
from helixd.ids import Epoch, NodeId
from helixd.layers import LayerRange
from helixd.plan.plan import Plan
from helixd.protocol.messages import EpochState

A, B = NodeId("a"), NodeId("b")


def coordinator(*, here: list[NodeId], failed: list[NodeId], infeasible: bool = False) -> Any:
    plan = Plan(2, {A: LayerRange(0, 1), B: LayerRange(1, 2)}, {}, 1.0)
    states = {node: EpochState(1, node, "failed", 0, 1, "disk /srv is broken") for node in failed}
    return SimpleNamespace(
        epochs=SimpleNamespace(active=PlanInForce(Epoch(1), plan, {}, states), coming=None),
        fleet=SimpleNamespace(nodes=dict.fromkeys(here)),
        admission=SimpleNamespace(waiting=0, running=0, has_pipeline=lambda: False),
        replanner=SimpleNamespace(infeasible=infeasible, why_no_plan="it needs 2 GiB"),
        draining=False,
    )


@pytest.mark.parametrize(
    ("here", "failed", "words"),
    [
        ([A], [], "missing: b"),
        ([A, B], [B], "failed: b (/cluster has the reasons)"),
        ([B], [B], "missing: a; failed: b (/cluster has the reasons)"),
        ([A, B], [], "waiting for nodes to be ready"),
    ],
)
def test_a_lost_pipeline_names_the_nodes(here: list[NodeId], failed: list[NodeId], words: str) -> None:
    said = readiness(coordinator(here=here, failed=failed))
    assert (said.ready, said.code) == (False, "pipeline_lost")
    assert said.message == f"no complete pipeline is up; {words}"


def test_nodes_that_may_come_back_are_no_reason_to_give_up_for_good() -> None:
    """`no_feasible_placement` tells clients not to try again."""
    said = readiness(coordinator(here=[A], failed=[], infeasible=True))
    assert said.code == "pipeline_lost"
    assert said.message == "no complete pipeline is up; missing: b; without them it needs 2 GiB"
    said = readiness(coordinator(here=[A, B], failed=[B], infeasible=True))
    assert (said.code, said.message) == ("no_feasible_placement", "it needs 2 GiB")
