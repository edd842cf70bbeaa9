"""How many cells a process may hold at once: each is a lock, which is an open file."""

import resource
from contextlib import suppress


def most_locks(wanted: int) -> int:
    """How many of so many locks this process may hold, one at least.

    Half of the files that it may have open are for libraries, drivers and what is being written. The soft
    limit is raised to what that takes, as far as the hard one permits.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    # macOS has limits beside the hard one.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft = raised
    return max(1, min(wanted, soft // 2))
