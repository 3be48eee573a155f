"""Exit statuses of the helixd command, after sysexits.h. Service managers decide by them whether to start it again."""

from enum import IntEnum


class Exit(IntEnum):
    """Why the process ended. 65, 77 and 78 will not go away by starting again; 70 may."""

    OK = 0
    USAGE = 2
    BAD_MODEL = 65
    INTERNAL = 70
    STATE_NOT_WRITABLE = 73
    REJECTED = 77
    CONFIG = 78
    INTERRUPTED = 130
