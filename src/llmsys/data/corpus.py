"""The pinned corpus: the Python source of sympy 1.14.0, which an installation of torch brings along anyway.

Real text without a network: 854 modules (tests left out), 16.6 MB. Every machine must see the same bytes, or results
would not compare, so version and content hash are asserted. The package is only located, never imported, and nothing
in it is executed.

The split is by *module*: functions of one file resemble each other (same authors, same helpers, same idioms), so that
a split by function would reward remembering files. Within each sub-package, modules are taken in the order of a hash
of their path until the validation split has its share of the bytes; so every sub-package is on both sides, and the
split is the same for every data set cut from the corpus.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "sympy"
VERSION = "1.14.0"
HASH = "f0253e754929067eff5060c9b045e93f5efd31c432df968803d2adbbdc2b6bff"
"""sha256 over the sorted (path, size, bytes) of all modules; see `digest`."""

_INSTALL = f"pip install {PACKAGE}=={VERSION}"


@dataclass(frozen=True)
class Module:
    """One file: its path below the package (`polys/rings.py`, `/` on every system) and its text."""

    path: str
    text: str

    @property
    def package(self) -> str:
        """The sub-package it belongs to, `polys`; "" for the few files at the top."""
        return package_of(self.path)


def package_of(path: str) -> str:
    """`polys/agca/ideals.py` -> `polys`."""
    return path.split("/", 1)[0] if "/" in path else ""


def modules() -> list[Module]:
    """All modules in the order of their paths. Raises ValueError, one line that says what to install, if the corpus is
    missing, has another version, or has other bytes."""
    root = _locate()
    contents = _read(root)
    found = digest(contents)
    if found != HASH:
        raise ValueError(
            f"{root}: the files differ from {PACKAGE} {VERSION} as released ({len(contents)} modules, hash "
            f"{found[:16]}, expected {HASH[:16]}): pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}"
        )
    return [Module(path, content.decode("utf-8").replace("\r\n", "\n")) for path, content in contents.items()]


def digest(contents: Mapping[str, bytes]) -> str:
    """One hash of files: path and size go in before each file's bytes, so that no two sets of files look alike."""
    sha = hashlib.sha256()
    for path in sorted(contents):
        sha.update(f"{path}\0{len(contents[path])}\0".encode())
        sha.update(contents[path])
    return sha.hexdigest()


def _locate() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(f"the corpus, {PACKAGE} {VERSION}, is not installed: {_INSTALL}")
    root = Path(spec.origin).parent
    release = root / "release.py"
    match = re.search(r'__version__ = "([^"]+)"', release.read_text("utf-8")) if release.is_file() else None
    version = match[1] if match else "of an unknown version"
    if version != VERSION:
        raise ValueError(f"{root}: {PACKAGE} {version} found, but the data sets are cut from {VERSION}: {_INSTALL}")
    return root


def _read(root: Path) -> dict[str, bytes]:
    contents = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in ("tests", "__pycache__")]
        for name in files:
            if name.endswith(".py"):
                path = Path(folder, name)
                contents[path.relative_to(root).as_posix()] = path.read_bytes()
    return dict(sorted(contents.items()))


def validation_modules(sizes: Mapping[str, int], percent: int) -> set[str]:
    """The paths of the validation split: `percent` of each sub-package's bytes, as nearly as whole files allow.

    `sizes` maps path to bytes. A sub-package of a single file stays in the training split.
    """
    groups: dict[str, dict[str, int]] = {}
    for path, size in sizes.items():
        groups.setdefault(package_of(path), {})[path] = size
    return set().union(*(choose(group, percent) for group in groups.values()))


def choose(weights: Mapping[str, int], percent: int) -> set[str]:
    """Keys that make up about `percent` of the total weight.

    Keys are taken in the order of their sha256 until the next would exceed the share by more than half of itself. One
    heavier than the whole share is passed over, so that a single large file does not become the validation split.
    At least one key is chosen if there are two.
    """
    if len(weights) < 2:
        return set()
    order = sorted(weights, key=lambda key: hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest())
    share = sum(weights.values()) * percent / 100
    chosen: set[str] = set()
    total = 0
    for key in order:
        if weights[key] > share:
            continue
        if total + weights[key] / 2 > share:
            break
        chosen.add(key)
        total += weights[key]
    return chosen or {min(order, key=lambda key: weights[key])}
