"""Checks of one node without torch: versions, limits, shared memory, secrets, compiler cache, disk.

Accelerators are accelerators.py's, other nodes network.py's and access.py's.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from pretrain.doctor.finding import Finding, Level
from pretrain.doctor.jit_locks import stale_locks
from pretrain.doctor.secrets import is_secret

GIB = 2**30
DISTRIBUTION = "athanor-pretrain"
LEAST_SHARED_MEMORY = 1 * GIB  # data workers hand batches over in it; NCCL's rings take some as well
LEAST_OPEN_FILES = 4096
PROBE_BYTES = 256 * 2**20
PROBE_PIECE_BYTES = 32 * 2**20
PROBE_SECONDS = 5.0  # of writing, and of reading
SLOW_DISK = 200 * 2**20  # bytes/s
# Variables that DeepSpeed's launcher puts on command lines, whatever they hold (0.19: PYTHON, MLFLOW, MV2, UCX).
FORWARDED_BY_DEEPSPEED = ("PYTHON", "MLFLOW", "MV2", "UCX")


def check_versions() -> Iterator[Finding]:
    """Every package that the project asks for is there, at a version that it takes."""
    wrong, found = [], {}
    try:
        wanted = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        text = f"{DISTRIBUTION} is not installed, so nothing says which versions it asks for"
        yield Finding(name="versions", level="yellow", text=text, fix="pip install -c constraints.txt -e .")
        return
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found[requirement.name] = version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version}, wanted {requirement.specifier}")
    main = ", ".join(
        f"{name} {found[name]}" for name in ("torch", "deepspeed", "accelerate", "transformers") if name in found
    )
    python = ".".join(str(part) for part in sys.version_info[:3])
    if wrong:
        fix = "pip install -c constraints.txt -e ."
        yield Finding(name="versions", level="red", text="; ".join(wrong), fix=fix, values=found)
    else:
        yield Finding(name="versions", level="green", text=f"python {python}, {main}", values=found)


def check_limits() -> Iterator[Finding]:
    """Open files, locked memory, and shared memory."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < LEAST_OPEN_FILES:
        fix = f"ulimit -n {LEAST_OPEN_FILES}, or LimitNOFILE= of the service, or compose's ulimits"
        yield Finding(name="open files", level="yellow", text=f"at most {files}", fix=fix)
    else:
        yield Finding(name="open files", level="green", text=f"at most {files}")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    is_bound = locked != resource.RLIM_INFINITY and Path("/dev/infiniband").exists()
    text = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked / GIB:.2f} GiB"
    fix = "ulimit -l unlimited (containers: --ulimit memlock=-1): InfiniBand registers memory" if is_bound else ""
    yield Finding(name="locked memory", level="red" if is_bound else "green", text=text, fix=fix)
    shared = Path("/dev/shm")  # noqa: S108 - the mount is what is checked
    if not shared.is_dir():
        yield Finding(name="shared memory", level="skipped", text="no /dev/shm on this system")
        return
    size = shutil.disk_usage(shared)
    level: Level = "green" if size.total >= LEAST_SHARED_MEMORY else "red"
    fix = "" if level == "green" else "docker: --shm-size 16g; compose: shm_size; pods: an emptyDir of medium Memory"
    text = f"{size.total / GIB:.1f} GiB, {size.free / GIB:.1f} GiB free"
    yield Finding(name="shared memory", level=level, text=text, fix=fix)


def check_secrets(environment: Mapping[str, str], folder: Path) -> Iterator[Finding]:
    """Secrets that a launcher would hand on, and DeepSpeed's file of variables. Values are never shown."""
    names = sorted(name for name, value in environment.items() if is_secret(name, value))
    forwarded = [name for name in names if name.startswith(FORWARDED_BY_DEEPSPEED)]
    if forwarded:
        yield Finding(
            name="secrets",
            level="red",
            text=f"{', '.join(forwarded)} would be printed and put on command lines by a bare `deepspeed`",
            fix="start through `python -m launch`, with the secret in environment.secrets_file",
        )
    elif names:
        text = f"{', '.join(names)} in the environment"
        fix = "start through `python -m launch`: accelerate's pdsh launcher would write all of them into a file"
        yield Finding(name="secrets", level="yellow", text=text, fix=fix)
    else:
        yield Finding(name="secrets", level="green", text="none in the environment")
    left = [path for path in (folder / ".deepspeed_env", Path.home() / ".deepspeed_env") if path.is_file()]
    for path in left:
        fix = f"read it, then remove {path}: deepspeed sends every line of it to every node"
        yield Finding(name="secrets", level="yellow", text=f"{path} is there", fix=fix)


def check_compiler_cache(environment: Mapping[str, str]) -> Iterator[Finding]:
    """DeepSpeed's ops are built, and no lock of a dead build is in the way."""
    default = Path.home() / ".cache/torch_extensions"
    cache = Path(environment.get("TORCH_EXTENSIONS_DIR") or default)
    if locks := stale_locks(cache):
        shown = ", ".join(str(lock) for lock in locks)
        text = f"a build that ended left {shown}: every start would wait for it"
        yield Finding(name="compiler cache", level="red", text=text, fix="python -m launch.warm_deepspeed removes it")
        return
    built = sorted({path.parent.name for path in cache.glob("**/*.so")})
    if built:
        yield Finding(name="compiler cache", level="green", text=f"{cache}: {', '.join(built)}")
    else:
        fix = "python -m launch.warm_deepspeed builds them now"
        yield Finding(
            name="compiler cache",
            level="yellow",
            text=f"{cache}: nothing is built, so the first start compiles",
            fix=fix,
        )
    if shutil.which("g++", path=environment.get("PATH")) is None:
        fix = "install g++: torch.compile and DeepSpeed's ops need it"
        yield Finding(name="compiler cache", level="yellow", text="no C++ compiler", fix=fix)


def check_disk(folder: Path, needed_bytes: int | None, checkpoints: int) -> Iterator[Finding]:
    """The bandwidth of the run folder's disk, and room for the checkpoints that a run keeps."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if needed_bytes is None:
        yield Finding(name="disk space", level="green", text=f"{free / GIB:.1f} GiB free at {existing}")
    elif free < needed_bytes:
        yield Finding(
            name="disk space",
            level="red",
            text=f"{free / GIB:.1f} GiB free at {existing}, {needed_bytes / GIB:.1f} GiB for {checkpoints} checkpoints",
            fix="free space, lower checkpoint.keep_last, or set run_folder to a larger disk",
        )
    else:
        text = f"{free / GIB:.1f} GiB free at {existing}, {checkpoints} checkpoints take {needed_bytes / GIB:.1f}"
        yield Finding(name="disk space", level="green", text=text)
    if free < 2 * PROBE_BYTES:
        yield Finding(name="disk speed", level="skipped", text="too little room for the probe")
        return
    write, read = _disk_speed(existing)
    level: Level = "green" if min(write, read) >= SLOW_DISK else "yellow"
    fix = (
        "" if level == "green" else "saves and the first reading of data will be slow: use a faster disk for run_folder"
    )
    values = {"write_bytes_per_second": write, "read_bytes_per_second": read}
    text = f"writes {write / 2**20:,.0f} MiB/s, reads {read / 2**20:,.0f} MiB/s at {existing}"
    yield Finding(name="disk speed", level=level, text=text, fix=fix, values=values)


def _disk_speed(folder: Path) -> tuple[float, float]:
    """Bytes a second, written through to the disk, and read past the page cache where the system allows it.

    A slow disk is told by fewer bytes, not by a longer wait: each piece is on the disk before the clock is looked at.
    """
    piece = os.urandom(PROBE_PIECE_BYTES)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-", buffering=0) as probe:
        done, began = 0, time.monotonic()
        while done < PROBE_BYTES and time.monotonic() - began < PROBE_SECONDS:
            done += probe.write(piece)
            os.fdatasync(probe.fileno())
        write = done / (time.monotonic() - began)
        os.posix_fadvise(probe.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        probe.seek(0)
        done, began = 0, time.monotonic()
        while (data := probe.read(2**20)) and time.monotonic() - began < PROBE_SECONDS:
            done += len(data)
        return write, done / max(time.monotonic() - began, 1e-9)
