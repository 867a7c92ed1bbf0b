"""`train.resume`: go on from another run's checkpoint, with another number of ranks or another engine.

Its newest; of a run that has finished, its best one, if an earlier step than the last was better.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

SAME = ("model", "method")
"""Groups that must be those of the run that is continued: what a checkpoint holds is their tensors."""


def source(config: dict[str, Any]) -> tuple[Path, str] | None:
    """(the checkpoint's folder, what of it the new run's id depends on); None where nothing is asked for.

    ValueError where the folder holds no checkpoint, or one of another model or method.
    """
    name = config["train"]["resume"]
    if not name:
        return None
    folder = Path(name).expanduser().resolve()
    states = sorted(folder.glob("checkpoint/step-*/state.json")) or list(folder.glob("best/state.json"))
    if not states:
        raise ValueError(
            f"train.resume={name}: no checkpoint there; it is a run's folder, results/<experiment>/<run id>"
        )
    step: int = json.loads(states[-1].read_text(encoding="utf-8"))["step"]
    theirs = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    for group in SAME:
        for key, value in config[group].items():
            if key not in ("weights", "attention") and theirs[group].get(key) != value:
                raise ValueError(
                    f"train.resume={name}: was made with {group}.{key}={theirs[group].get(key)}, not {value}"
                )
    if step >= config["train"]["steps"]:
        raise ValueError(f"train.steps={config['train']['steps']}: train.resume={name} has done {step} already")
    return states[-1].parent, f"{folder.name}/{step}"
