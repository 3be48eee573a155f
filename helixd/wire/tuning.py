"""What a daemon process sets once at its start: the allocator's thresholds and the event loop."""

import asyncio
import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_MIB = 1 << 20


def tune_malloc() -> bool:
    """Keep large buffers in the heap instead of mapping and unmapping each; True if it took effect.

    glibc maps every buffer above its threshold and gives it back on free, so each large message pays for fresh page
    faults: 4 to 6 times the CPU per message from 256 KiB up. Nothing happens on other C libraries.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version") or not hasattr(libc, "mallopt"):
        return False
    settings = ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, (1 << 31) - 1), (_M_TOP_PAD, 64 * _MIB))
    taken = [libc.mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings]
    return all(taken)


def install_uvloop() -> bool:
    """Make new event loops uvloop's where it is installed; True if it is."""
    try:
        import uvloop
    except ImportError:
        return False
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    return True


def release_free_memory() -> bool:
    """Give freed heap back to the system, once after something large (loading weights); True if there was some.

    `tune_malloc` keeps what is freed for reuse, which is right for messages and wrong for a checkpoint's buffers.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    return hasattr(libc, "malloc_trim") and libc.malloc_trim(ctypes.c_size_t(0)) == 1
