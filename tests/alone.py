"""Runs code in a process that finds torch, numpy, safetensors and what they require, and nothing else: what a user has
who takes one subsystem into a project of his own.
"""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

ONLY = """
import sys
from importlib.machinery import PathFinder
class Bare:
    allowed = {*sys.argv[1].split(), *sys.stdlib_module_names}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.allowed or name.startswith("_sysconfigdata"):
            return PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [*(finder for finder in sys.meta_path if "frozen" in finder.__module__), Bare()]
sys.meta_path.remove(PathFinder)
"""
LOADED = """
print(*sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)))
"""


def run(code: str, cwd: Path) -> list[str]:
    """Which packages the code has loaded. AssertionError where it fails."""
    wanted = requirements("torch", "numpy", "safetensors")
    modules = {top for top, owners in metadata.packages_distributions().items() if wanted & set(map(normal, owners))}
    modules |= {"llmsys", "torch", "torchgen", "functorch"}
    assert not {"transformers", "peft", "accelerate", "hydra", "omegaconf", "bitsandbytes"} & modules
    command = [sys.executable, "-c", ONLY + code + LOADED, " ".join(modules)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def requirements(*names: str) -> set[str]:
    """Distributions and all that they require on this platform."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = normal(re.split(r"[^\w.-]", left.pop())[0])
        if name in found:
            continue
        found.add(name)
        try:
            asked = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        left += [one for one in asked if "extra ==" not in one]
    return found


def check_names(package: ModuleType) -> None:
    """Every public name is found late, where it is said to be, and none is hidden by a module: importing p.x sets the
    package's attribute x to the module, whatever x was."""
    homes, public = package._HOMES, package.__all__
    assert not {module.name for module in pkgutil.iter_modules(package.__path__)} & set(public)
    assert sorted(homes) == public
    for name in public:
        assert getattr(package, name).__module__ == f"{package.__name__}.{homes[name]}"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing
