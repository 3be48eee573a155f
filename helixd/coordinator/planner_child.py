"""The planner's own process: a ClusterSpec as JSON on stdin, a Plan as JSON on stdout; exit 3 and a text if infeasible.

`python -m helixd.coordinator.planner_child TIME_LIMIT_S`. Niced, so that planning never takes the processor from
serving.
"""

import os
import sys
import time

import msgspec

from helixd.coordinator.planning import INFEASIBLE_EXIT
from helixd.plan.plan import Infeasible
from helixd.plan.planner import plan_cluster
from helixd.plan.spec import ClusterSpec


def main() -> int:
    """Plan once."""
    os.nice(5)
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=ClusterSpec)
    try:
        plan = plan_cluster(spec, time_limit_s=float(sys.argv[1]), clock=time.monotonic)
    except Infeasible as error:
        sys.stdout.write(str(error))
        return INFEASIBLE_EXIT
    sys.stdout.buffer.write(msgspec.json.encode(plan))
    return 0


if __name__ == "__main__":
    sys.exit(main())
