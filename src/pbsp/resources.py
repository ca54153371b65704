"""What the process has used of the machine."""

import sys


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far, in bytes; 0 where the system does not tell.

    Linux counts `ru_maxrss` in KiB, macOS in bytes, and Windows has no such call.
    """
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
