"""Where a model's weights lie, and how they are left for the next run. Safetensors only.

A folder of weights is what Hugging Face writes: `model.safetensors`, or `model.safetensors.index.json` and its shards,
with `config.json` beside it. A run of ours leaves the same file with `weights.json` (what made it) in place of
`config.json`. Nothing here unpickles anything: a folder that holds only `pytorch_model.bin` is refused.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmsys import schema
from llmsys import tensors as files
from llmsys.errors import MissingPackage
from llmsys.files import beside, sweep
from llmsys.models import stored
from llmsys.models.stored import FILE, INDEX

ADAPTERS = ("adapter_model.safetensors", "adapter.safetensors")
"""What runs of methods that train adapters leave: peft's format, or ours."""
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "vocab*", "*.model"]

log = logging.getLogger(__name__)


def find(cfg: schema.Model, results: str, run_folder: Callable[[str], Path] | None = None) -> Path | None:
    """The folder of `cfg.weights`, None for `random`. Loads nothing, but may download a hub id: check memory first.

    `run_folder(exp)` is the directory of that experiment's run under `results`. Raises ValueError for a folder that is
    not there or holds no safetensors; LookupError for a package, a run or a hub id that this machine does not have.
    Each message is one line and says what would help.
    """
    name = cfg.weights
    if name == "random":
        return None
    if name.startswith("package:"):
        module = name.removeprefix("package:")
        spec = importlib.util.find_spec(module) if module.isidentifier() else None
        if spec is None or spec.origin is None:
            raise MissingPackage(
                f"model.weights={name}: the package {module} is not installed; pip install 'llmsys[demo]'"
            )
        return _holds_weights(Path(spec.origin).parent / "model", name)
    if name.startswith("run:"):
        exp = name.removeprefix("run:")
        assert run_folder is not None, "run:<exp> needs a run_folder"
        folder = run_folder(exp) / "weights"
        if any((folder / file).is_file() for file in ADAPTERS):
            raise ValueError(
                f"model.weights={name}: that run left adapters, not a whole model; name one of method=full"
            )
        if not (folder / FILE).is_file():
            where = "" if results == "results" else f" results={results}"
            raise LookupError(
                f"model.weights={name}: that run has not finished here; make it with: "
                f"python -m llmsys +exp={exp}{where}"
            )
        return folder
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _holds_weights(folder, name)
    if HUB_ID.match(name) and not name.startswith("."):
        return _holds_weights(_hub(name), name)
    raise ValueError(f"model.weights={name}: no such folder (and a hub id has the form owner/name)")


def _holds_weights(folder: Path, name: str) -> Path:
    if not (folder / FILE).is_file() and not (folder / INDEX).is_file():
        raise ValueError(f"model.weights={name}: {folder} holds neither {FILE} nor {INDEX}")
    return folder


def _hub(name: str) -> Path:
    """The hub's snapshot: from the local cache when it is whole there, else downloaded where there is a network."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError:
        raise MissingPackage(
            f"model.weights={name}: a hub id needs transformers; pip install 'llmsys[train]'"
        ) from None
    try:
        cached = Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
        if (cached / FILE).is_file() or (cached / INDEX).is_file():
            stored.files(cached)  # a shard that is not there yet is a reason to go on downloading
            return cached
    except (errors.LocalEntryNotFoundError, ValueError):
        pass  # not (wholly) in the cache: the network decides
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    except errors.GatedRepoError:
        raise LookupError(
            f"model.weights={name}: the hub asks for an accepted licence and a login (hf auth login)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise LookupError(f"model.weights={name}: no folder here and no such repository on the hub") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise LookupError(
            f"model.weights={name}: not in the local Hugging Face cache, and the hub cannot be reached "
            f"({type(error).__name__}); give a local folder instead"
        ) from None


def save(model_state: dict[str, torch.Tensor], folder: Path, meta: dict[str, Any]) -> Path:
    """Writes `model_state` as `model.safetensors` and `meta` as `weights.json`; whole or not at all. Returns `folder`.

    Both are written and synced in a temporary folder beside it, which then takes its place by a rename; an earlier
    folder of that name is moved aside first, and removed when the new one is in place. Tensors that share their memory
    (tied embeddings) are stored once, under the first name in the state's order; `stored` ties them again. Raises
    OSError (disk full) and then leaves nothing behind.
    """
    seen: set[tuple[object, ...]] = set()
    state = {}
    for name, tensor in model_state.items():
        tensor = tensor.detach()
        view = (tensor.device, tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and view in seen:
            continue
        seen.add(view)
        # A copy that owns its memory: safetensors refuses tensors that overlap, e.g. slices of one buffer.
        state[name] = tensor.to("cpu", copy=True).contiguous()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(folder)
    earlier = temporary.with_name(temporary.name + ".earlier")
    try:
        temporary.mkdir()
        files.save(state, temporary / FILE)
        (temporary / "weights.json").write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        for path in (temporary / FILE, temporary / "weights.json", temporary):
            files.sync(path)
        temporary.chmod(0o755)  # to other users too, as what is in it
        if folder.exists():
            folder.rename(earlier)  # moved aside, not removed: until the new one is in place nothing is lost
        temporary.rename(folder)
    finally:
        if earlier.exists() and not folder.exists():
            earlier.rename(folder)
        for left in (temporary, earlier):
            if left.exists():
                shutil.rmtree(left)
    sweep(folder, ".earlier")  # until now a killed process's may have been the only ones
    files.sync(folder.parent)
    return folder
