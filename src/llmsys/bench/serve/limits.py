"""What the system lets one process have."""

from __future__ import annotations

import sys


def many_files() -> None:
    """As many open files as may be, for this process and those that it starts: each stream is one, on both sides."""
    if sys.platform == "win32":
        return  # has no such limit
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
