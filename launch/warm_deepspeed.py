"""Builds DeepSpeed's CPU op into TORCH_EXTENSIONS_DIR ahead of time. Builds nothing that is already there.

A build that was killed leaves a lock file on which every later start waits for ever without a word; locks that no
living process holds are removed first. Run as `python -m launch.warm_deepspeed [DEADLINE_SECONDS] [async_io]`; with
async_io also what offload to NVMe needs, where libaio's header is installed (minutes).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pretrain.doctor.jit_locks import stale_locks

DEADLINE_SECONDS = 600  # the build takes about one minute on two idle cores
BUILD = "from pretrain import distributed as d; d.start(d.read_place()); " + (
    "from pretrain.engines.deepspeed_import import import_deepspeed; "
    "import_deepspeed().init_distributed('gloo'); d.stop()"
)
BUILD_ASYNC_IO = "; from deepspeed.ops.op_builder import AsyncIOBuilder as B; B().is_compatible() and B().load()"


def main() -> int:
    """Warm the cache; returns the exit code."""
    cache = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not cache:
        print("found: TORCH_EXTENSIONS_DIR is not set; allowed: a folder; change: source launch/environment.sh")
        return 64
    for lock in stale_locks(Path(cache)):
        print(f"removing the lock of a build that ended: {lock}")
        lock.unlink(missing_ok=True)
    numbers, wants_async_io = [word for word in sys.argv[1:] if word.isdigit()], "async_io" in sys.argv
    deadline_seconds = int(numbers[0]) if numbers else DEADLINE_SECONDS * (3 if wants_async_io else 1)
    began = time.monotonic()
    build = subprocess.Popen(
        [sys.executable, "-c", BUILD + (BUILD_ASYNC_IO if wants_async_io else "")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # compilers that it starts end with it
    )
    try:
        written, _ = build.communicate(timeout=deadline_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(build.pid, signal.SIGKILL)
        build.wait()
        print(f"the build did not end in {deadline_seconds} s: is another build running in {cache}?")
        return 1
    if build.returncode:
        print(written[-3000:], "the build failed: is a C++ compiler (g++) installed?", sep="\n")
        return 1
    print(f"ready after {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
