"""The agent of one node: starts its ranks with torchrun's variables, and is their init.

For back ends whose scheduler starts one process a node (srun, pods, containers). No rendezvous: ranks find the first
one at --address. Run as `python -m launch.node --nodes N --node-rank K --ranks R ... -- pretrain train ...`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from launch.outcome import judge
from launch.rank_status import forget
from launch.supervision import Supervision
from pretrain.errors import LaunchError, PretrainError, Problem

FROM = "from:"  # before the name of a variable that holds the value


def main() -> int:
    """Run the ranks of this node; returns the exit code of the one that failed first."""
    parser = argparse.ArgumentParser(prog="python -m launch.node", allow_abbrev=False)
    parser.add_argument("--nodes", type=int, required=True)
    rank = parser.add_mutually_exclusive_group(required=True)
    rank.add_argument("--node-rank", type=int)
    rank.add_argument("--node-rank-from", metavar="VARIABLE")
    parser.add_argument("--ranks", type=int, required=True, help="ranks of this node")
    parser.add_argument("--address", required=True, help="of the first node, or from:VARIABLE")
    parser.add_argument("--port", required=True, help="of the first rank, or from:VARIABLE")
    parser.add_argument("--status", type=Path, required=True)
    parser.add_argument("--grace", type=float, default=120.0)
    parser.add_argument("--silence", type=float)
    parser.add_argument("--secrets")
    parser.add_argument("words", nargs="+")
    options = parser.parse_args()
    try:
        return run_node(options, os.environ)
    except PretrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def run_node(options: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Start the ranks, wait for them, and tell how they ended.

    Raises:
        LaunchError: where a variable that holds the node's place is not there.
    """
    node_rank = options.node_rank
    if node_rank is None:
        node_rank = int(_value(FROM + options.node_rank_from, environment))
    if not 0 <= node_rank < options.nodes:
        raise LaunchError(Problem(f"node rank {node_rank} of {options.nodes}", "0 <= node rank < nodes", "check it"))
    first = node_rank * options.ranks
    forget(options.status, range(first, first + options.ranks))
    passed_on = ["--secrets", options.secrets] if options.secrets else []
    passed_on += ["--silence", f"{options.silence:g}"] if options.silence else []
    guardian = [sys.executable, "-m", "launch.rank", "--status", str(options.status)]
    guardian += ["--grace", f"{options.grace:g}", *passed_on, "--", *options.words]
    places = {
        "MASTER_ADDR": _value(options.address, environment),
        "MASTER_PORT": _value(options.port, environment),
        "WORLD_SIZE": str(options.nodes * options.ranks),
        "LOCAL_WORLD_SIZE": str(options.ranks),
        "GROUP_RANK": str(node_rank),
    }
    commands = [
        (guardian, {**environment, **places, "RANK": str(first + local), "LOCAL_RANK": str(local)})
        for local in range(options.ranks)
    ]
    supervision = Supervision(status=options.status, grace_seconds=options.grace, launcher="agent")
    code = supervision.run(commands)
    outcome = judge(options.status, code, asked_by=supervision.asked_by)
    if outcome.paragraph:
        print(f"node {node_rank}: {outcome.paragraph}", file=sys.stderr, flush=True)
    return outcome.code if code else 0


def _value(text: str, environment: Mapping[str, str]) -> str:
    if not text.startswith(FROM):
        return text
    name = text.removeprefix(FROM)
    if name not in environment:
        raise LaunchError(Problem(f"{name} is not set", "what the scheduler sets on every node", "start through it"))
    return environment[name]


if __name__ == "__main__":
    sys.exit(main())
