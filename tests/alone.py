"""Runs code in a virtual environment of its own that has torch, numpy, safetensors and what they require, and nothing
else: what a user has who takes one subsystem into a project of his own.

Nothing is installed: the environment's packages are links to those that are there, and this package is found by a path
file, as an editable installation has it.
"""

from __future__ import annotations

import pkgutil
import re
import subprocess
import tomllib
import venv
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import llmsys

LOADED = """
import sys
print(*sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)))
"""
THERE = """
from importlib import metadata
print(*(each.name for each in metadata.distributions()))
"""


def run(code: str, cwd: Path) -> list[str]:
    """Which packages the code has loaded. AssertionError where it fails."""
    wanted = {name for name in requirements("torch", "numpy", "safetensors") if _there(name)}
    python = _environment(cwd / "bare", wanted)
    assert {normal(name) for name in _said(python, THERE, cwd)} == wanted
    assert not {"transformers", "peft", "accelerate", "hydra-core", "omegaconf", "bitsandbytes"} & wanted
    return _said(python, "import sys\n" + code + LOADED, cwd)


def with_extra(extra: str, folder: Path) -> Path:
    """The interpreter of an environment as `pip install llmsys[extra]` makes it, of which no torch is part."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"][extra]]
    wanted = {name for name in requirements(*asked) if _there(name)}
    assert not {"torch", "transformers"} & wanted
    return _environment(folder, wanted)


def _said(python: Path, code: str, cwd: Path) -> list[str]:
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def _environment(folder: Path, wanted: set[str]) -> Path:
    """The interpreter of a new environment with these distributions."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    (site,) = folder.glob("lib/python3*/site-packages")
    for name in wanted:
        found = metadata.distribution(name)
        tops = {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (site / top).exists():  # several may share a folder
                (site / top).symlink_to(Path(str(found.locate_file(top))).resolve())
    assert llmsys.__file__ is not None
    (site / "llmsys.pth").write_text(f"{Path(llmsys.__file__).parents[1]}\n")
    return folder / "bin" / "python"


def _there(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


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
