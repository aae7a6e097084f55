"""Stands between our init and another launcher's process: when the init is killed, it kills all that is below itself.

deepspeed's pdsh asks the kernel for nothing of the kind, and would go on with every node. Run as
`python -m launch.keeper WORD...`; returns the exit code of the command.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType

from launch.processes import adopt_orphans, die_with_parent, kill_descendants


def main() -> int:
    """Run the command to its end."""
    parent = os.getppid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getppid() != parent:
            kill_descendants(os.getpid())
            os._exit(128 + signal.SIGKILL)

    adopt_orphans()
    signal.signal(signal.SIGHUP, end)
    die_with_parent(signal.SIGHUP)
    process = subprocess.Popen(sys.argv[1:])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: process.send_signal(received))
    if os.getppid() != parent:  # it ended before the kernel was asked
        end(signal.SIGHUP, None)
    code = process.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
