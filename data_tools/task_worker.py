"""The process of a worker: `python -m data_tools.task_worker DESCRIPTOR PARENT`; started by worker_pool.py alone.

It ends with its parent, however that ends, so that no orphan writes beside the next run.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys
from multiprocessing.connection import Connection

from data_tools.task_encoding import TaskEncoder
from data_tools.worker_pool import Failure, serve

_SET_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl


def main(descriptor: int, parent: int) -> int:
    """Serve one connection; return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what a Ctrl-C means
    faulthandler.register(signal.SIGUSR1)  # the parent asks where it hangs
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        return 0  # it was gone before the kernel was asked
    logging.basicConfig(format="%(message)s")
    connection = Connection(descriptor)
    try:
        options = connection.recv()
    except EOFError:
        return 0
    # for the libraries' own threads, which read it when they start
    os.putenv("RAYON_NUM_THREADS", str(options.threads))
    os.putenv("TOKENIZERS_PARALLELISM", "true" if options.threads > 1 else "false")
    try:
        encoder = TaskEncoder(options)
    except Exception as error:
        connection.send(Failure(error))
        return 0
    serve(connection, encoder)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
