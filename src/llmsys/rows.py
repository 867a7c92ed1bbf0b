"""One line of a table per record, and what is done with lines: means over seeds or repeats, the best of each method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from llmsys import tasks
from llmsys.flat import flat
from llmsys.job import Record
from llmsys.nearest import nearest
from llmsys.revisions import revisions
from llmsys.schema.compress import LOW_RANK, SPARSE, as_before
from llmsys.spread import LIMITS, spread

SHARED_KEYS = (
    *("accuracy", "accuracy_se", "macro_f1", "loss", "val_loss", "perplexity", "tokens_per_s", "samples_per_s"),
    *("bleu", "rouge1", "rouge2", "rougeL", "comm_bytes", "linear_weights_trained"),
    *("step_ms_p50", "peak_gib", "reserved_gib", "host_peak_gib", "saved_bytes", "accounted_bytes"),
    *("mfu", "hfu", "achieved_tflops", "peak_tflops"),
    *("trainable_params", "total_params", "predicted_peak_gib", "predicted_step_ms"),
)
"""Summary keys that tasks share, spelled once: the columns of tables, and what a test holds every experiment to."""

Row = dict[str, Any]
"""One line of a table: what identifies a run, its summary under the summary's own keys, and `config`, flattened."""

IDENTITY = (
    *(
        "experiment",
        "model",
        "data",
        "data_hash",
        "device",
        "engine",
        "network",
        "compress",
        "techniques",
        "recompute",
        "method",
        "r",
    ),
    *("lr", "seed", "repeat", "status", "reason"),
)


FIRST = ("run_id", *IDENTITY, "code_hash", "git_sha", "git_dirty", "resumed")
"""Keys that every row has, beside `config`."""


def row(record: Record) -> Row:
    """One record as a line of a table. `lr` is the rate that this run's method was trained at, None where none was; the
    method is empty where a run compares many."""
    given, group = record.config, record.config.get("compress")
    if isinstance(group, dict):
        if group.get("kind", "none") == "none":  # whatever else it says, and as in records that do not know it
            given = {key: value for key, value in given.items() if key != "compress"}
        else:
            given = {**given, "compress": as_before(group)}
    if record.task != "bench_serve":  # nobody else looks at it, and older records have none
        given = {key: value for key, value in given.items() if key != "server"}
    config: Row = flat(given)
    compressed = compress(config)
    method = "" if record.task in tasks.TABLES else config.get("method.kind")
    rate = config.get(f"train.lr_by_method.{method}")
    return {
        "run_id": record.run_id,
        "experiment": record.name,
        "model": config.get("model.name"),
        "data": config.get("data.kind"),
        "data_hash": record.data_hash,
        "device": record.env.get("device_name"),
        "engine": engine(config),
        "network": network(config, record.env.get("network", {})),
        "compress": compressed,
        "techniques": config.get("techniques"),
        "recompute": config.get("train.recompute"),
        "method": method,
        "r": config.get("method.r") if method else None,
        "lr": None if rate is None else rate * config.get("train.lr_scale", 1.0),
        "seed": config.get("train.seed"),
        "repeat": config.get("repeat", 0),
        "status": record.status,
        "reason": record.reason,
        "code_hash": record.code_hash,
        "git_sha": record.env.get("git_sha", ""),
        "git_dirty": bool(record.env.get("git_dirty", False)),
        "resumed": record.resumed_from_step,
        "config": config,
        **record.summary,
    }


def engine(config: Row) -> str:
    """An engine and, where there are several, its ranks: `local`, `ddp x 2`, `zero2 (offload: optimizer) x 2`."""
    kind = config.get("engine.kind")
    name = f"zero{config['engine.zero']}" if kind == "deepspeed" else str(kind)
    if config.get("engine.offload", "none") != "none":
        name += f" (offload: {config['engine.offload']})"
    world = config.get("train.world", 1)
    return name if world == 1 else f"{name} x {world}"


def network(config: Row, found: dict[str, Any]) -> str:
    """The links of a run in a word, and whether they were only asked for: `none`, `eth1g`, `20/100 Mbit (unshaped)`.

    `(not known)`: of a run that ended without a word nothing says whether they were shaped.
    """
    up, down = config.get("network.up_mbit"), config.get("network.down_mbit")
    if up is None or config.get("train.world", 1) == 1:
        return "none"
    name = str(config.get("network.name"))
    name = f"{up:g}/{down:g} Mbit" if name == "none" else name
    if "shaped" not in found:
        return f"{name} (not known)"
    return name if found["shaped"] else f"{name} (unshaped)"


def compress(config: Row) -> str:
    """How gradients travel, with the one number that matters most: `none`, `acpsgd r=4`, `topk 0.001`, `sign`."""
    kind = str(config.get("compress.kind", "none"))
    if kind in LOW_RANK:
        return f"{kind} r={config['compress.r']}"
    return f"{kind} {config['compress.density']:g}" if kind in SPARSE else kind


_SPOKEN_FOR = (
    *("name", "results", "reuse", "force", "smoke", "baselines", "command", "tracker.", "dispatch.", "train.lr_"),
    *("data.make", "engine.kind", "engine.zero", "engine.offload", "train.world", "train.resume", "network."),
    *("compress.kind", "techniques", "repeat", "sweep.", "search."),
)
"""Settings that change no result, or that have a column of their own; by how their keys begin."""


def settings(each: Row, *, seed: bool) -> dict[str, str]:
    """What was asked of a run, as text by key, but for `_SPOKEN_FOR` and, unless wanted, the seed."""
    drop = _SPOKEN_FOR if seed else (*_SPOKEN_FOR, "train.seed")
    return {key: str(value) for key, value in each["config"].items() if not key.startswith(drop)}


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """Runs that differ in the seed and in nothing else, as one row: means, deviations as `<key>_sd`, `seeds`."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for each in rows:
        identity = tuple(each[key] for key in IDENTITY if key != "seed")
        groups.setdefault((*identity, *sorted(settings(each, seed=False).items())), []).append(each)
    merged = []
    for members in groups.values():
        config = {key: value for key, value in members[0]["config"].items() if key != "train.seed"}
        mean: Row = {key: members[0][key] for key in IDENTITY}
        codes = {member.get("code_hash", "") for member in members}
        mean |= {"run_id": "", "seed": None, "seeds": len(members), "resumed": None, "config": config}
        mean["code_hash"] = codes.pop() if len(codes) == 1 else ""
        mean |= _git(members)
        for key in set.intersection(*(set(member) for member in members)) - set(mean):
            values = [member[key] for member in members]
            mean[key] = statistics.fmean(values)
            mean[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
        merged.append(mean)
    return merged


def over_repeats(rows: Sequence[Row]) -> list[Row]:
    """Runs of the same settings, seed included, and the same code, in fresh processes, as one row: of each number the
    mean, the deviation `<key>_sd`, half the 95 % interval of the mean `<key>_ci95` and the coefficient of variation
    `<key>_cv`, and `repeats`. `noisy`: the time of a step varies more than it should on this kind of device
    (`spread.LIMITS`). Runs of other code measured something else, and are another row."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for each in rows:
        identity = (each.get("code_hash", ""), *(each[key] for key in IDENTITY if key != "repeat"))
        groups.setdefault((*identity, *sorted(settings(each, seed=True).items())), []).append(each)
    merged = []
    for members in groups.values():
        config = {key: value for key, value in members[0]["config"].items() if key != "repeat"}
        mean: Row = {key: members[0][key] for key in IDENTITY}
        mean |= {"run_id": "", "repeat": None, "repeats": len(members), "resumed": None, "config": config}
        mean["code_hash"] = members[0].get("code_hash", "")
        mean |= _git(members)
        for key in set.intersection(*(set(member) for member in members)) - set(mean):
            found = spread([member[key] for member in members])
            mean |= {key: found.mean, f"{key}_sd": found.sd, f"{key}_ci95": found.half, f"{key}_cv": found.cv}
        limit = LIMITS.get(str(config.get("hardware.device")), min(LIMITS.values()))
        mean["noisy"] = mean.get("step_ms_p50_cv", 0.0) > limit
        merged.append(mean)
    return merged


def _git(members: Sequence[Row]) -> Row:
    """Of several rows as one: of which revisions they are."""
    shas = {member.get("git_sha", "") for member in members}
    return {
        "git_sha": shas.pop() if len(shas) == 1 else "",
        "git_dirty": any(member.get("git_dirty", False) for member in members),
        "revisions": revisions(members),
    }


def best(rows: Sequence[Row], key: str, *, option: str = "--best") -> list[Row]:
    """For each experiment and method the row with the best `key`: the largest, for losses and times the smallest. A NaN
    is never the best. ValueError, which names the `option` of a command line that gave `key`, if no row has it."""
    sign = -1 if any(word in key for word in ("loss", "_ms", "bytes", "gib", "perplexity")) else 1
    chosen: dict[tuple[Any, ...], Row] = {}
    for each in rows:
        names = ("experiment", "model", "data", "data_hash", "device", "method", "compress")
        place = tuple(each[name] for name in names)
        if each.get(key) is None or math.isnan(each[key]):
            continue
        if place not in chosen or sign * each[key] > sign * chosen[place][key]:
            chosen[place] = each
    if not chosen:
        raise ValueError(f"{option} {key}: no record has it; {nearest(key, numbers(rows))}")
    return list(chosen.values())


_WORDS = ("config", "resumed", "run_id", "code_hash", "git_sha", "git_dirty", "revisions", "noisy")
"""Keys of a row that are no numbers, beside `IDENTITY`."""


def numbers(rows: Iterable[Row]) -> list[str]:
    return sorted({key for each in rows for key in each} - {*IDENTITY, *_WORDS})
