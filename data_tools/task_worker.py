"""The processes that encode: `python -m data_tools.task_worker PARENT CONTROL [CONNECTION LOG]...`, descriptors.

Started by worker_host.py alone. It loads the tokenizer, then forks a worker for each pair, and tells how they end.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import os
import signal
import sys
from multiprocessing.connection import Connection

from data_tools.document_tokenizer import DocumentTokenizer
from data_tools.encoding import Encoder, build_encoder
from data_tools.task_encoding import EncodingOptions, TaskEncoder
from data_tools.tokenizer import load_tokenizer
from data_tools.worker_host import Failure, Renewed, ToLoad

_SET_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl
_HAD_ENOUGH = 3  # exit code of a worker that is to be replaced


def main(parent: int, control: Connection, pairs: list[tuple[int, int]]) -> int:
    """Be the host; return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what a Ctrl-C means
    faulthandler.register(signal.SIGUSR1)  # the parent asks where it hangs
    if not _end_with(parent):
        return 0
    logging.basicConfig(format="%(message)s")
    try:
        load: ToLoad = control.recv()
        os.putenv("TOKENIZERS_PARALLELISM", "false")  # this process must have no second thread when it is forked
        try:
            tokenizer = load_tokenizer(load.tokenizer, load.eos_token)
            encoder = build_encoder(tokenizer, load.backend)
        except Exception as error:
            control.send(Failure(error))
            return 0
        options, count = control.recv()
    except EOFError:
        return 0
    gc.collect()
    gc.freeze()  # or the first collection in each worker would copy all pages
    host, living = os.getpid(), dict(enumerate(pairs[:count]))
    for connection, log in pairs[count:]:
        os.close(connection)
        os.close(log)

    def fork(place: int) -> int:
        number = os.fork()
        if number == 0:
            os._exit(_work(host, control, living, place, options, tokenizer, encoder))
        return number

    numbers = [fork(place) for place in range(count)]
    control.send(numbers)
    while living:
        number, status = os.wait()
        place, code = numbers.index(number), os.waitstatus_to_exitcode(status)
        if code == _HAD_ENOUGH:
            numbers[place] = fork(place)  # it goes on with the same connection
            control.send(Renewed(number=place, process=numbers[place]))
            continue
        for descriptor in living.pop(place):
            os.close(descriptor)  # the last one of the connection: its other side learns that the worker is gone
        control.send((place, code))
    return 0


def _work(
    host: int,
    control: Connection,
    pairs: dict[int, tuple[int, int]],
    place: int,
    options: EncodingOptions,
    tokenizer: DocumentTokenizer,
    encoder: Encoder,
) -> int:
    """Be a worker; return the exit code."""
    if not _end_with(host):
        return 0
    control.close()
    for number, (connection, log) in pairs.items():
        if number == place:
            os.dup2(log, 1)
            os.dup2(log, 2)
        else:
            os.close(connection)
        os.close(log)
    try:
        # for the libraries' own threads, which read it when they start; without any of its own, the tokenizers library
        # takes a fifth more of the processor than with a single one
        os.putenv("RAYON_NUM_THREADS", str(options.threads))
        os.putenv("TOKENIZERS_PARALLELISM", "true")
        if options.threads > 1:
            encoder = build_encoder(tokenizer, options.backend, threads=options.threads)
        had_enough = serve(Connection(pairs[place][0]), TaskEncoder(options, tokenizer, encoder))
    except BaseException:
        logging.getLogger(__name__).exception("the worker failed")
        return 1
    return _HAD_ENOUGH if had_enough else 0


def serve(connection: Connection, encoder: TaskEncoder) -> bool:
    """Encode the tasks that come through a connection until it is closed, or until this process has had enough.

    The libraries remember words, and what they free is not all given back: a new process begins without either.
    """
    tokens = 0
    while tokens < encoder.options.worker_tokens:
        try:
            task = connection.recv()
        except EOFError:
            return False
        try:
            result = encoder.encode(task, lambda *progress: connection.send(progress))
            tokens += sum(result.tokens)
            connection.send(result)
        except ConnectionError:
            return False  # the parent is gone: nobody wants the result
        except Exception as error:
            connection.send(Failure(error))
    return True


def _end_with(parent: int) -> bool:
    """Have the kernel end this process with its parent; return whether that is still there."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    return os.getppid() == parent  # it may have gone before the kernel was asked


if __name__ == "__main__":
    descriptors = [int(word) for word in sys.argv[3:]]
    both = list(zip(descriptors[::2], descriptors[1::2], strict=True))
    sys.exit(main(int(sys.argv[1]), Connection(int(sys.argv[2])), both))
