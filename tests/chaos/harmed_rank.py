"""One rank that is harmed as planned: `python -m tests.chaos.harmed_rank TASK.json train RUN.yaml ...`.

For single runs; ranks of many cases are forked (fork_server.py).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pretrain.__main__ import main
from tests.chaos import faults

if __name__ == "__main__":
    faults.install(json.loads(Path(sys.argv.pop(1)).read_text(encoding="utf-8")))
    main()
