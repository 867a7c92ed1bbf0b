"""From `conf/` and overrides to plain configs: where Hydra and OmegaConf are used, and stop.

`conf/` lies at the top of the repository and is copied into the wheel as `llmsys/conf`; it is found by path, never
through importlib.resources, which in an editable install can see a stale copy.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from llmsys import expand, schema, wiring
from llmsys.words import key_of

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # its exceptions come as they are, for `messages` to put into one line

PACKAGED = Path(__file__).parent / "conf"
CONF = PACKAGED if PACKAGED.is_dir() else Path(__file__).resolve().parents[2] / "conf"


@cache
def register() -> None:
    """Puts the settings' classes into Hydra's store, as `<group>/<group or kind>_schema`, and teaches OmegaConf
    `${product:a,b}`: a global batch is so many micro-batches; and `${texts:length,tokens}`: so many texts of so many
    tokens fill more than a row of that length. Once in a process."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("product", _product, replace=True)
    OmegaConf.register_new_resolver("texts", _texts, replace=True)
    store = ConfigStore.instance()
    for group, kinds in schema.SCHEMAS.items():
        for kind, cls in kinds.items():
            node = OmegaConf.structured(cls)
            OmegaConf.set_readonly(node, None)  # of a frozen class it would be read-only: no choice and no override
            store.store(group=group, name=f"{group if kind == '*' else kind}_schema", node=node)


def _product(*factors: int) -> int:
    return math.prod(int(factor) for factor in factors)


def _texts(length: int, tokens: int) -> int:
    return 1 + math.ceil(int(length) / int(tokens))


def plain(config: Any, words: Sequence[str]) -> dict[str, Any]:
    """A composed config as nested dicts, resolved and without Hydra's own part; a missing value is an error.

    What stands for several settings is filled in (`expand`). `words` of the command line become its `command`. Where
    results lie is left out: a published record is not to name a folder of this machine.
    """
    from omegaconf import OmegaConf

    composed = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    values = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))
    expand.expand(values, words)
    return {**values, "command": [word for word in words if key_of(word) != "results"]}


def typed() -> list[str]:
    """The words that compose the job which Hydra hands over now, with the folder of the user's own experiments."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    own = [Path(source.path) for source in hydra.runtime.config_sources if source.provider == "command-line"]
    here = [path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path for path in own]
    return [*(f"--config-dir={path}" for path in here), *wiring.techniques().unexpanded(hydra.overrides.task)]


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """The plain config that `python -m llmsys <overrides>` would run, for notebooks, tests and `run:<exp>`.

    ValueError where it is not the `techniques` that were asked for.
    """
    import hydra

    register()
    with hydra.initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        made = plain(hydra.compose("config", wiring.techniques().expanded(overrides)), overrides)
    wiring.techniques().check(made)
    return made


def smoked(words: Sequence[str]) -> list[str]:
    """`words` of a command line with what `smoke=true` stands for: the list `smoke` of the experiment, under which it
    runs in seconds on a CPU. What else is said wins over the list. ValueError where there is no one such list."""
    said = [word.partition("=")[2].lower() for word in words if word.startswith("smoke=")]
    for value in said:
        if value not in ("true", "false"):
            raise ValueError(f"smoke={value}: must be true or false")
    rest = [word for word in words if not word.startswith("smoke=")]
    if "true" not in said:
        return rest
    names = [word.partition("=")[2] for word in rest if word.startswith("+exp=")]
    if len(names) != 1 or "," in names[0]:
        raise ValueError("smoke=true: is the list `smoke` of an experiment; say which one, +exp=NAME")
    own = [f"hydra.searchpath=[file://{folder}]" for folder in _own_folders(rest)]
    found = compose([f"+exp={names[0]}", *own])["smoke"]
    if not found:
        raise ValueError(f"smoke=true: +exp={names[0]} has no list `smoke`")
    given = {key_of(word) for word in rest}
    return [*rest, *(word for word in found if key_of(word) not in given)]


def _own_folders(words: Sequence[str]) -> list[Path]:
    """The user's folder of experiments, as Hydra's flag names it: `--config-dir=F`, `--config-dir F` or `-cd F`."""
    joined = [word.partition("=")[2] for word in words if word.startswith("--config-dir=")]
    apart = [after for word, after in pairwise(words) if word in ("--config-dir", "-cd")]
    return [Path(folder).resolve() for folder in (*joined, *apart)]


def choices(group: str) -> dict[str, str]:
    """The names in a config group with their one-line purpose: the first comment of the file."""
    found = {}
    for path in sorted((CONF / group).glob("*.yaml")):
        comments = (line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
        found[path.stem] = next((c for c in comments if c and not c.startswith("@package")), "")
    return found


def groups() -> list[str]:
    """The config groups there are."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir())
