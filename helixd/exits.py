"""Exit statuses of the helixd command, after sysexits.h. Service managers decide by them whether to start it again."""

from enum import IntEnum


class Exit(IntEnum):
    """Why the process ended. 65, 77 and 78 will not go away by starting again; 70 may.

    66 and 69 are subcommands' own: a file that cannot be read, a cluster that cannot hold the model.
    """

    OK = 0
    USAGE = 2
    BAD_MODEL = 65
    BAD_DATA = 65
    NO_INPUT = 66
    INFEASIBLE = 69
    INTERNAL = 70
    STATE_NOT_WRITABLE = 73
    CANNOT_WRITE = 73
    REJECTED = 77
    CONFIG = 78
    INTERRUPTED = 130
