"""The planner's own process: a ClusterSpec as JSON on stdin, a Plan as JSON on stdout; exit 3 and a text if infeasible.

`python -m helixd.coordinator.planner_child TIME_LIMIT_S`. Niced, so that planning never takes the processor from
serving. The answer is the only thing on its stdout, whatever the solver's library has to say.
"""

import os
import sys
import time
from typing import BinaryIO

import msgspec

from helixd.coordinator.planning import INFEASIBLE_EXIT
from helixd.plan.plan import Infeasible
from helixd.plan.planner import plan_cluster
from helixd.plan.spec import ClusterSpec


def main() -> int:
    """Plan once."""
    os.nice(5)
    answer = _own_stdout()
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=ClusterSpec)
    try:
        plan = plan_cluster(spec, time_limit_s=float(sys.argv[1]), clock=time.monotonic)
    except Infeasible as error:
        answer.write(str(error).encode())
        return INFEASIBLE_EXIT
    else:
        answer.write(msgspec.json.encode(plan))
        return 0
    finally:
        answer.close()


def _own_stdout() -> BinaryIO:
    """The process's stdout as a file of our own. Descriptor 1 leads nowhere from now on: HiGHS prints its licence
    there even when it is told to be silent.
    """
    answer = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return answer


if __name__ == "__main__":
    sys.exit(main())
