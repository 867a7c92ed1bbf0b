"""Which runs are the same: a hash of everything that can change a result, the full resolved config, the device's kind
and model, and the content of local inputs. Rerunning a sweep therefore skips what is finished, and a CPU record never
stands in for a GPU cell. Where a run is placed, who is told of it and how it may be reused are left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from llmsys import schema
from llmsys.schema.compress import as_before

NOT_IDENTITY = (
    "results",
    "reuse",
    "force",
    "smoke",
    "baselines",
    "command",
    "tracker",
    "techniques",
    "sweep",
    "search",
)
_READ = ("speeds", "served", "records", "modules", "emit")
"""Settings of a task that name what it reads, whose content counts instead, or where it writes."""
_PLACEMENT = {each.name for each in dataclasses.fields(schema.OnRay)} - {"memory_gib"}
_LATER: dict[str, dict[str, Any]] = {
    "train": {"optimizer": "adamw", "fp8": False},
    "model": {"head_dim": 0, "qkv_bias": False, "qk_norm": False},
    "hardware": {"mem_gbps": None, "host_gbps": None, "host_gib": None, "devices": 1, "nvlink": True},
}
"""Settings that came later, at which a run is what it was before there were any: records without them are of it."""


def run_id(config: dict[str, Any], *, device_name: str, content: dict[str, str]) -> str:
    """Twelve hex digits over what can change the result; `content` maps local inputs to hashes of what they hold."""
    identity = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    identity["train"] = {key: value for key, value in config["train"].items() if key != "resume"}
    identity["data"] = {key: value for key, value in config["data"].items() if key != "path"}  # its content counts
    if identity.get("compress", {}).get("kind") == "none":
        del identity["compress"]  # as it was before there was the group: records without it are of the same runs
    serves = config["task"]["kind"] == "bench_serve"
    if not serves and not (config["task"]["kind"] == "bench_serve_modules" and config["server"].get("adapter")):
        identity.pop("server", None)  # nobody else looks at it
    if "compress" in identity:
        identity["compress"] = as_before(identity["compress"])
    if not identity.get("repeat"):
        identity.pop("repeat", None)  # the first run of settings is the one that was made before there were repeats
    identity["dispatch"] = {key: value for key, value in config["dispatch"].items() if key not in _PLACEMENT}
    identity["model"] = {key: value for key, value in config["model"].items() if key != "config"}  # its shape counts
    identity["task"] = {key: value for key, value in config["task"].items() if key not in _READ}
    for group, key in (("task", "trace"), ("server", "adapter")):
        if key in content:
            identity[group] = {**identity[group], key: ""}  # its content counts, and not where it lies
    for group, plain in _LATER.items():
        identity[group] = {k: v for k, v in identity[group].items() if k not in plain or v != plain[k]}
    text = json.dumps([identity, device_name, content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
