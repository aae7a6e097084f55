"""A rank for tests of what is around ranks: does what its words say, in the time that an interpreter takes.

Words: `sleep`, `read` (its input), `fail-if=RANK:CODE`, `fail-once=PATH` (at the first start), `raise-if=RANK:TEXT`,
`say=VARIABLE`, `ready=PATH` and `child=PATH` (a process that would outlive it), which write PATH-RANK, `stubborn`
(ignores SIGTERM), `saves` (ends with 75 after SIGTERM), `signs` (gives signs of life, and stacks where asked, as
training does), `freeze-once=PATH` (stands still for ever at the first start).
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from pretrain.life_signs import STACKS_SIGNAL, give_sign, sign_file

SAVE_SECONDS = 0.5
SIGNS_BEFORE_A_FREEZE_SECONDS = 1.0


def give_signs(rank: int) -> None:
    file = sign_file(os.environ, rank)
    assert file is not None, "no launcher looks"
    while True:
        give_sign(file)
        time.sleep(0.1)


def main() -> None:
    rank = os.environ.get("RANK", "0")
    for word in sys.argv[1:]:
        name, _, value = word.partition("=")
        who, _, what = value.partition(":")
        if name == "say":
            print(f"{value} is {os.environ.get(value)}", flush=True)
        elif name == "read":
            print(f"read {sys.stdin.read()!r}", flush=True)
        elif name == "child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            Path(f"{value}-{rank}").write_text(str(child.pid), encoding="utf-8")
        elif name == "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif name == "saves":
            signal.signal(signal.SIGTERM, lambda *_: (time.sleep(SAVE_SECONDS), os._exit(75)))
        elif name == "ready":
            Path(f"{value}-{rank}").touch()
        elif name == "fail-if" and who == rank:
            sys.exit(int(what))
        elif name == "raise-if" and who == rank:
            raise RuntimeError(what)
        elif name == "fail-once" and not (mark := Path(f"{value}-{rank}")).exists():
            mark.touch()
            sys.exit(7)
        elif name == "signs":
            faulthandler.register(STACKS_SIGNAL)
            threading.Thread(target=give_signs, args=(int(rank),), daemon=True).start()
        elif name == "freeze-once" and not (mark := Path(f"{value}-{rank}")).exists():
            time.sleep(SIGNS_BEFORE_A_FREEZE_SECONDS)
            mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        elif name == "sleep":
            time.sleep(float(value or 600))


if __name__ == "__main__":
    main()
