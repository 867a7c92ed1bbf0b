"""What a run ran on, for its record: code version, packages, device, and the variables that change speed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from llmsys import device

PACKAGES = (
    "llmsys",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "nvidia-ml-py",
    "numpy",
    "scikit-learn",
    "safetensors",
    "sympy",
    "flash-attn",
    "triton",
)
_PREFIXES = (
    *("NCCL_", "TORCH_NCCL_", "TORCH_GLOO_", "TORCH_ALLOW_TF32", "PYTORCH_", "GLOO_", "UCX_", "FI_", "DS_"),
    *("CUDA_VISIBLE", "CUDA_LAUNCH", "CUDA_DEVICE_", "CUDA_MODULE", "CUBLAS_", "NVIDIA_TF32"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_", "TRITON_", "LLMSYS_KERNELS"),
)
"""Of environment variables that change how fast something runs, or over which link; not of those that only name a
folder, which a published record has no use for."""


def describe(device_kind: str, threads: int) -> dict[str, Any]:
    """The `env` block of a record."""
    kind, name = device.resolve(device_kind)
    return {
        **_git(),
        "python": platform.python_version(),
        "packages": _versions(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "host": platform.node(),
        "device": kind,
        "device_name": name,
        "device_count": _device_count(kind),
        **_device_memory(kind),
        "driver": _driver() if kind == "cuda" else "",
        "cpu": device.cpu_name(),
        "cores": device.threads(),
        **_governor(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 2),
        "variables": {key: value for key, value in sorted(os.environ.items()) if key.startswith(_PREFIXES)},
    }


def describe_here(config: dict[str, Any]) -> dict[str, Any]:
    """The block of a record that this process writes of a run that did not get to write it; where the run is to be made
    on another machine, of which this one says nothing, the commit alone."""
    if config["dispatch"]["kind"] == "ray":
        return _git()
    return describe(config["hardware"]["device"], config["train"]["threads"])


def _git() -> dict[str, Any]:
    """Commit and whether the tree differs from it; empty outside a checkout of this project."""
    here = Path(__file__).resolve().parents[1]
    if not (here.parents[1] / ".git").exists():
        sent = os.environ.get("LLMSYS_REVISION", "").split()  # by jobs/submit.sh, beside the files of a checkout
        return {"git_sha": sent[0] if sent else "", "git_dirty": sent[1:] == ["dirty"]}

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        return {"git_sha": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain", "--", str(here)))}
    except FileNotFoundError:  # a checkout on a machine without git
        return {"git_sha": "", "git_dirty": False}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "torch" in sys.modules:
        found["torch"] = sys.modules["torch"].__version__  # with the build: +cpu or +cu130
    return found


def _device_count(kind: str) -> int:
    if kind == "cpu":
        return 1
    import torch

    return torch.cuda.device_count()


def _device_memory(kind: str) -> dict[str, float]:
    """Of one GPU; a CPU's is the host's, `memory_gib`."""
    if kind == "cpu":
        return {}
    import torch

    return {"device_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 2)}


def _governor() -> dict[str, str]:
    """How the kernel chooses the CPU's frequency (`performance`, `powersave`), of each way once; {} where it does not
    say, as in most virtual machines."""
    files = sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor"))
    found = dict.fromkeys(file.read_text().strip() for file in files)
    return {"cpu_governor": ", ".join(found)} if found else {}


def _driver() -> str:
    version = Path("/sys/module/nvidia/version")
    return version.read_text().strip() if version.exists() else ""
