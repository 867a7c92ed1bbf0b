"""Runs the fenced blocks of a page of docs/ in their order, as a reader would, in a folder of its own.

```bash                      is run by bash, with -e: a command that fails, fails the page
```python                    is a program of its own
```yaml title="a/file"       is that file, whatever the language
```diff title="a/file"       changes it: what stands without + and - has to be there once, word for word
```text                      is shown only; behind a line <!-- output --> each of its lines (but `...`) has to be in
                             what the block before it has printed
```

A line <!-- slow --> before a block says that it takes long: then it is left out unless asked for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"(?:<!-- (\w+) -->\n)?^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = ("bash", "python")


@dataclass(frozen=True)
class Block:
    """`mark`: `slow`, `output` or nothing; `title`: the file that it is or changes."""

    mark: str
    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    """Of a page, in their order. ValueError where a fence is none of these."""
    text = page.read_text(encoding="utf-8")
    found = [Block(*(part or "" for part in match.groups())) for match in FENCE.finditer(text)]
    if 2 * len(found) != len(re.findall(r"^ *```", text, re.MULTILINE)):
        raise ValueError(f"{page}: a block without a language, or with a fence that is not at the start of a line")
    return found


def follow(found: Iterable[Block], folder: Path, *, copy: bool, slow: bool) -> list[str]:
    """Does what the blocks say in `folder`, which is empty; returns what those that were run have printed.

    `copy`: with src/ and conf/ of this repository in it, which the blocks change; else they use the repository's own.
    AssertionError, with the block, for one that fails.
    """
    if copy:
        for name in ("src", "conf"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str((folder if copy else ROOT) / "src"), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    environment.pop("LLMSYS_RESULTS", None)
    printed: list[str] = []
    skipped = False
    for block in found:
        if block.title:
            _write(block, folder / block.title)
        elif block.language in RUN:
            skipped = block.mark == "slow" and not slow
            if not skipped:
                printed.append(_run(block, folder, environment))
        elif block.mark == "output" and not skipped:
            missing = [line for line in block.text.splitlines() if line != "..." and line not in printed[-1]]
            assert not missing, f"not printed: {missing}\n{printed[-1]}"
    return printed


def _write(block: Block, path: Path) -> None:
    if block.language != "diff":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
        return
    text = path.read_text(encoding="utf-8")
    lines = block.text.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if not line.startswith("+"))
    after = "".join(line[1:] for line in lines if not line.startswith("-"))
    assert text.count(before) == 1, f"{block.title} has these lines {text.count(before)} times:\n{before}"
    path.write_text(text.replace(before, after), encoding="utf-8")


def _run(block: Block, folder: Path, environment: dict[str, str]) -> str:
    command = ["bash", "-ec", block.text] if block.language == "bash" else [sys.executable, "-c", block.text]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
    return done.stdout
