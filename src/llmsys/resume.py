"""`train.resume`: go on from another run's checkpoint, with another number of ranks or another engine.

Its newest; of a run that has finished, its last, where it was to be saved, else its best one, if an earlier step than
the last was better. Damage is said here, before ranks and a model take their time to come to it; they verify what they
read again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

SAME = ("model", "method")
"""Groups that must be those of the run that is continued: what a checkpoint holds is their tensors."""
AT_ONCE_BYTES = 2**31
"""A larger checkpoint is not read whole here, for its sums: that would take long, and again for each job of a sweep. Of
that one the small files and the tensors' headers are read; the ranks compare its sums."""


def source(config: dict[str, Any]) -> tuple[Path, str] | None:
    """(the checkpoint's folder, what of it the new run's id depends on); None where nothing is asked for.

    ValueError where the folder holds no checkpoint, one that is damaged, or one of another model or method.
    """
    name = config["train"]["resume"]
    if not name:
        return None
    folder = Path(name).expanduser().resolve()
    places = ("checkpoint/step-*", "last/step-*", "best")
    states = next(filter(None, (sorted(folder.glob(f"{place}/state.json")) for place in places)), [])
    if not states:
        what = "it is a run's folder, results/<experiment>/<run id>"
        if (folder / "config.yaml").is_file():
            what = "a finished run keeps its last one where train.checkpoint_every and train.save_final are set"
        raise ValueError(f"train.resume={name}: no checkpoint there; {what}")
    step = _checked(name, states[-1].parent)
    theirs = _settings(name, folder / "config.yaml")
    for group in SAME:
        for key, value in config[group].items():
            if key not in ("weights", "attention") and theirs[group].get(key) != value:
                raise ValueError(
                    f"train.resume={name}: was made with {group}.{key}={theirs[group].get(key)}, not {value}"
                )
    if step >= config["train"]["steps"]:
        raise ValueError(f"train.steps={config['train']['steps']}: train.resume={name} has done {step} already")
    return states[-1].parent, f"{folder.name}/{step}"


def _checked(name: str, folder: Path) -> int:
    """The step of a checkpoint, which is whole as far as can be told quickly."""
    from llmsys.train import checkpoint  # torch

    try:
        reader = checkpoint.Reader(folder, 0)
        if sum(path.stat().st_size for path in folder.iterdir()) <= AT_ONCE_BYTES:
            reader.verify()
    except ValueError as error:
        raise checkpoint.not_gone_on_from(name, folder, error) from error
    return int(reader.shared["step"])


def _settings(name: str, path: Path) -> dict[str, Any]:
    """A run's settings, with the groups that matter here."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"train.resume={name}: {path} cannot be read, so its settings are not known: {text}") from None
    if not isinstance(found, dict) or not all(isinstance(found.get(group), dict) for group in SAME):
        raise ValueError(f"train.resume={name}: {path} is not a run's settings, which have {' and '.join(SAME)}")
    return found
