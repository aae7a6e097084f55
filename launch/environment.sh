# Makes the Python environment that quickstart.sh and tests/run.sh share; meant to be sourced from the repository root.
# Owns `.venv` and `.cache/torch_extensions`. Installs nothing outside the repository.
# shellcheck shell=bash

say() { printf '\n==> %s\n' "$*"; }

# make_environment: create `.venv` and install this checkout, unless both are as pyproject.toml and constraints.txt say.
make_environment() {
    local python=${PYTHON:-python3} stamp_file=.venv/athanor-stamp stamp
    if [ ! -x .venv/bin/python ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "found $("$python" --version 2>&1); allowed: Python 3.10 or newer; change: PYTHON=python3.11 bash $0" >&2
            return 1
        }
        say "Creating .venv with $("$python" --version)"
        "$python" -m venv .venv || return
    fi
    # Launchers start ninja, python and deepspeed by name; another ninja than .venv's would rebuild DeepSpeed's ops.
    export PATH="$PWD/.venv/bin:$PATH"
    export TORCH_EXTENSIONS_DIR="$PWD/.cache/torch_extensions"
    stamp=$({ .venv/bin/python --version; pwd; cat pyproject.toml constraints.txt; } | sha256sum)
    if [ "$(cat "$stamp_file" 2>/dev/null)" = "$stamp" ]; then
        say "Using .venv: pyproject.toml and constraints.txt have not changed since it was made"
        return
    fi
    say "Installing into .venv (a few minutes and about 2 GB the first time)"
    # The images' own steps, so that every fresh checkout tries them. The filter drops pip's remark on configured index
    # folders that this machine does not have.
    bash docker/install.sh --environment .venv --extras fast,tiktoken,curate,serve,eval,quantize,dev \
        2> >(grep -v 'is ignored: it is ' >&2) || return
    rm -rf .cache/torch_extensions # built against the torch of before
    printf '%s\n' "$stamp" >"$stamp_file"
}

# warm_deepspeed: build what DeepSpeed compiles at its first start on CPU, so that no training run waits.
warm_deepspeed() {
    say "DeepSpeed's CPU op (compiled once, about a minute)"
    .venv/bin/python -m launch.warm_deepspeed
}

# warm_deepspeed_for_nvme: the same, and what offload to NVMe compiles.
warm_deepspeed_for_nvme() {
    say "DeepSpeed's CPU ops (compiled once, about five minutes)"
    .venv/bin/python -m launch.warm_deepspeed async_io
}
