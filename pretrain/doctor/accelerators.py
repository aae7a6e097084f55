"""Checks of this rank's device: driver, clocks, memory errors, links, attention kernels, speed of a matrix product.

Without GPUs it checks what the CPU has, and says what was left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from pretrain.doctor.finding import Finding
from pretrain.models.flops import peak_flops

GEMM_SIDE = {"cuda": 8192, "cpu": 1024}
GEMM_SECONDS = 0.5
GOOD_SHARE_OF_PEAK = 0.6  # of a dense bf16 product this large; below it clocks, power or heat hold the GPU back
ATTENTION_TOLERANCE = 2e-2  # bf16
OPTIMIZER_TOLERANCE = 1e-5  # of fp32 weights near 1, after OPTIMIZER_STEPS
OPTIMIZER_STEPS = 5
MOST_LINKS = 18  # of one GPU, H100


def check_devices() -> Iterator[Finding]:
    """GPUs as the driver sees them."""
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        yield Finding(name="GPUs", level="skipped", text=f"{reason}: driver, clocks, memory errors, links: not checked")
        return
    yield Finding(name="GPUs", level="green", text=f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    try:
        import pynvml
    except ImportError:
        fix = "pip install nvidia-ml-py"
        yield Finding(name="GPUs", level="yellow", text="clocks, memory errors and links need nvidia-ml-py", fix=fix)
        return
    pynvml.nvmlInit()
    yield from _driver(pynvml)
    yield from _health(pynvml, pynvml.nvmlDeviceGetCount())


def _driver(nvml: Any) -> Iterator[Finding]:
    version = nvml.nvmlSystemGetCudaDriverVersion_v2()
    driver, built = (
        (version // 1000, version % 1000 // 10),
        tuple(int(part) for part in str(torch.version.cuda).split(".")),
    )
    fits = driver[0] >= built[0]
    text = f"driver for CUDA {driver[0]}.{driver[1]}, torch built for {torch.version.cuda}"
    fix = "" if fits else "install a newer driver, or a torch built for an older CUDA"
    yield Finding(name="driver", level="green" if fits else "red", text=text, fix=fix)


def _health(nvml: Any, count: int) -> Iterator[Finding]:
    """What is wrong with each GPU, and what of all is right: no one must take silence for health."""
    faults, links, untold = [], 0, 0
    for number in range(count):
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
        errors = _uncorrected_errors(nvml, handle)
        untold += errors is None
        if errors:
            fix = "drain this node and reset or replace the GPU"
            text = f"GPU {number}: {errors} uncorrected errors"
            faults.append(Finding(name="ECC", level="red", text=text, fix=fix))
        now = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        most = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        if reasons & (nvml.nvmlClocksThrottleReasonHwSlowdown | nvml.nvmlClocksThrottleReasonSwThermalSlowdown):
            fix = "look at cooling and power: nvidia-smi -q -d PERFORMANCE"
            text = f"GPU {number}: held at {now} of {most} MHz"
            faults.append(Finding(name="clocks", level="red", text=text, fix=fix))
        up = _links_up(nvml, handle)
        links += sum(up)
        if not all(up):
            fix = "nvidia-smi nvlink --status; drain the node if links stay down"
            text = f"GPU {number}: {len(up) - sum(up)} of {len(up)} links are down"
            faults.append(Finding(name="NVLink", level="red", text=text, fix=fix))
    yield from faults
    wrong = {finding.name for finding in faults}
    right = {"clocks": "no clock held down", "ECC": "no uncorrected errors of memory", "NVLink": f"{links} NVLinks up"}
    if untold:
        right["ECC"] = f"errors of memory told by {count - untold} of {count}, none uncorrected"
    if told := [text for name, text in right.items() if name not in wrong]:
        yield Finding(name="health of GPUs", level="green", text=", ".join(told))


def _uncorrected_errors(nvml: Any, handle: Any) -> int | None:
    """Since the last reset; None where the GPU does not count them (ECC is off, or not there)."""
    try:
        kind, since = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        return int(nvml.nvmlDeviceGetTotalEccErrors(handle, kind, since))
    except nvml.NVMLError:
        return None


def _links_up(nvml: Any, handle: Any) -> list[bool]:
    """Of each NVLink that the GPU has."""
    up = []
    for link in range(MOST_LINKS):
        try:
            up.append(nvml.nvmlDeviceGetNvLinkState(handle, link) != 0)
        except nvml.NVMLError:
            break  # there are no more
    return up


def check_attention() -> Iterator[Finding]:
    """Attention kernels that are installed give what plain matrix products give."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 4, 64, 32, generator=generator).to(device, torch.bfloat16) for _ in range(3))
    scores = query.float() @ key.float().transpose(-1, -2) / 32**0.5
    mask = torch.ones(64, 64, dtype=torch.bool, device=device).tril()
    expected = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value.float()
    got = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    yield _compared("sdpa", got, expected, ATTENTION_TOLERANCE)
    if device.type == "cpu":
        yield Finding(name="flash-attn", level="skipped", text="no GPU; attention is torch's sdpa")
        return
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        fix = "bash docker/install.sh --flash-attn, or go on with torch's own kernels"
        yield Finding(name="flash-attn", level="yellow", text=f"not importable: {error}", fix=fix)
        return
    flash = flash_attn_func(*(part.transpose(1, 2) for part in (query, key, value)), causal=True)
    yield _compared("flash-attn", flash.transpose(1, 2), expected, ATTENTION_TOLERANCE)


def check_fused_optimizer() -> Iterator[Finding]:
    """The optimizer step in one kernel gives what the step in many does."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights: dict[bool, torch.Tensor] = {}
    for is_fused in (True, False):
        generator = torch.Generator().manual_seed(1)
        weight = torch.nn.Parameter(torch.rand(4097, generator=generator).to(device))
        optimizer = torch.optim.AdamW([weight], lr=1e-2, fused=is_fused, foreach=False)
        for _ in range(OPTIMIZER_STEPS):
            weight.grad = torch.randn(4097, generator=generator).to(device)
            optimizer.step()
        weights[is_fused] = weight.detach()
    yield _compared("fused AdamW", weights[True], weights[False], OPTIMIZER_TOLERANCE)


def _compared(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> Finding:
    difference = float((got.float() - expected).abs().max())
    is_right = difference <= tolerance
    fix = "" if is_right else "build it again for this torch and GPU: its numbers are wrong here"
    text = f"differs from the same in plain operations by at most {difference:.1e}"
    return Finding(name=name, level="green" if is_right else "red", text=text, fix=fix)


def measure_gemm(device: torch.device) -> float:
    """FLOP/s of a square matrix product, bf16 on a GPU, fp32 on the CPU."""
    side = GEMM_SIDE[device.type]
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    for _ in range(2):
        left @ right
    _wait(device)
    began, products = time.monotonic(), 0
    while time.monotonic() - began < GEMM_SECONDS:
        for _ in range(4):
            left @ right
        _wait(device)
        products += 4
    return float(products * 2 * side**3 / (time.monotonic() - began))


def judged_gemm(device: torch.device, speed: float) -> Finding:
    """One rank's speed against what its device can do, where that is known."""
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    text = f"{speed / 1e12:.2f} TFLOP/s"
    if peak is None or speed >= GOOD_SHARE_OF_PEAK * peak:
        known = "" if peak is None else f", {speed / peak:.0%} of the peak"
        return Finding(name="matrix product", level="green", text=f"{text}{known}", values={"flops": speed})
    fix = "nvidia-smi -q -d CLOCK,POWER,PERFORMANCE: is the GPU shared, hot, or capped?"
    shown = f"{text}, {speed / peak:.0%} of the peak"
    return Finding(name="matrix product", level="yellow", text=shown, fix=fix, values={"flops": speed})


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
