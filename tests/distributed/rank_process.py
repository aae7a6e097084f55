"""One rank of ranks.py: joins the process group, then calls what it is sent until the pipe closes.

Started as `python -m tests.distributed.rank_process FILE_DESCRIPTOR`. Decides nothing about deadlines or failures.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import importlib
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from pretrain import distributed

# Closed engines that wait for the collector of cycles have groups, whose threads look for messages all the time.
MOST_THREADS = 30


def main(file_descriptor: int) -> None:
    """Serve tasks. Ends when the parent closes the pipe or dies."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    connection = Connection(file_descriptor)
    started = False
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            break
        try:
            if not started:
                distributed.start(distributed.read_place())
                started = True
            answer = pickle.dumps((True, _call(task)))
        except BaseException:  # the traceback travels to the test, whatever it is
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)
        if len(os.listdir("/proc/self/task")) > MOST_THREADS:
            gc.collect()
    distributed.stop()


def _call(task: bytes) -> Any:
    module, name, arguments = pickle.loads(task)
    function = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    return function(*arguments)  # type: ignore[operator]


def _die_with_parent(parent: int) -> None:
    """A rank that waits in a collective does not notice that its test was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
