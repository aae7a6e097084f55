#!/usr/bin/env bash
# Makes the environment, then runs every check and test that this machine can run; people and CI use it alike.
#
#   bash tests/run.sh [--system] [--quick] [--slow] [--again] [-- PYTEST_ARGUMENT...]
#
#   --system  first install the system packages that some tests need, with apt-get (asks for root)
#   --quick   only what takes seconds: no process groups, command lines, launchers or faults
#   --slow    also the tests marked slow
#   --again   run what failed once more, by itself: tells a crowded machine from a fault
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=../launch/environment.sh
source launch/environment.sh

# DeepSpeed's CPU op and torch.compile; nodes over ssh, and a private Slurm, for tests/launch; a browser for pages
SYSTEM_PACKAGES=(g++ libaio-dev openssh-client openssh-server pdsh munge slurm-wlm shellcheck chromium)

wants_system=false
wants_again=false
selection='not slow'
while [ $# -gt 0 ]; do
    case $1 in
    --system) wants_system=true ;;
    --quick) selection='not slow and not ranks and not end_to_end and not launch and not chaos' ;;
    --slow) selection='' ;;
    --again) wants_again=true ;;
    --) shift && break ;;
    *)
        sed -n '2,10s/^# \{0,1\}//p' "$0"
        exit 64
        ;;
    esac
    shift
done

install_system_packages() {
    local missing=() package as_root=''
    for package in "${SYSTEM_PACKAGES[@]}"; do
        dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
    done
    say "System packages: ${#missing[@]} of ${#SYSTEM_PACKAGES[@]} missing ${missing[*]}"
    [ ${#missing[@]} -eq 0 ] && return
    [ "$(id -u)" -eq 0 ] || as_root=sudo
    $as_root apt-get update -qq && $as_root apt-get install -y --no-install-recommends "${missing[@]}"
}

summary=()
failed=0
stage() { # stage NAME COMMAND...: run, remember, go on
    local name=$1 began=$SECONDS result=passed
    shift
    say "$name: $*"
    "$@" </dev/null || { result=FAILED && failed=1; }
    summary+=("$(printf '%-13s %-7s %5d s' "$name" "$result" $((SECONDS - began)))")
}

# shellcheck disable=SC2329 # called by stage
run_tests() {
    .venv/bin/python -m pytest -m "$selection" "$@" && return
    $wants_again || return
    say 'What failed, once more by itself'
    .venv/bin/python -m pytest -m "$selection" --last-failed --last-failed-no-failures none "$@"
}

if $wants_system; then install_system_packages || exit 1; fi
make_environment || exit 1

export OMP_NUM_THREADS=1 # small tensors: more threads take twice the time
export HF_HUB_OFFLINE=1 MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true GLOO_SOCKET_IFNAME=lo
case $selection in *'not ranks'*) ;; *) stage 'DeepSpeed ops' warm_deepspeed_for_nvme ;; esac
stage format .venv/bin/ruff format --check
stage lint .venv/bin/ruff check
stage types .venv/bin/mypy
stage imports .venv/bin/lint-imports
stage tests run_tests "$@"

say 'Summary'
printf '%s\n' "${summary[@]}"
[ $failed -eq 0 ] && echo 'All stages passed.' || echo 'Some stages FAILED.'
exit $failed
