"""A run before and after: `Job`, plain data that can be sent anywhere, and `Record`, what it left."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from llmsys import device, identity, read, schema, tasks, track, wiring
from llmsys.errors import Contradiction
from llmsys.files import write_atomic

STATUSES = ("ok", "oom", "failed", "crashed", "timeout", "hang", "unsupported", "skipped", "interrupted")
FINAL = ("ok", "oom", "unsupported")
"""Never rerun: the same code and config on the same machine would end the same way."""
UNFINISHED = "unfinished"
"""The reason in the record of an attempt that has begun and not ended."""
HARMLESS = (*FINAL, "skipped")
"""A sweep in which every run ended so has exit code 0."""
ASKED = (schema.Predicting, schema.Planning, schema.Serve, schema.ServeModules)
"""Tasks of which more can be said before they begin."""


@dataclass(kw_only=True, frozen=True)
class Job:
    """One run to be made. `config` is plain and resolved; `out` is the run's folder, absolute.

    `inputs` are folders that other runs left and this one reads: `run:<exp>` -> that run's folder.
    """

    config: dict[str, Any]
    run_id: str
    out: str
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What a person calls this run: experiment, method, compression, seed and id."""
        method, seed = self.config["method"]["kind"], self.config["train"]["seed"]
        compress = self.config.get("compress", {}).get("kind", "none")
        if self.config["task"]["kind"] in tasks.QUESTIONS:  # its method is one of the answers, or it has none
            about = (self.config["model"]["name"], self.config.get("techniques") or "")
            return f"{self.config['name']} · {' · '.join(part for part in about if part)} · {self.run_id}"
        parts = (self.config.get("techniques") or "", method, "" if compress == "none" else compress)
        what = " · ".join(part for part in parts if part)
        repeat = f" · repeat {self.config['repeat']}" if self.config.get("repeat") else ""
        return f"{self.config['name']} · {what} · seed {seed}{repeat} · {self.run_id}"


_NUMBER = (int, float)
_HOLDS: dict[str, tuple[Any, Any]] = {
    **dict.fromkeys(("name", "run_id", "task", "reason", "error"), (str, object)),
    **dict.fromkeys(("config", "env"), (dict, object)),
    **dict.fromkeys(("notes", "files"), (dict, str)),
    "summary": (dict, _NUMBER),
    "samples": (dict, list),
    "seconds": (_NUMBER, object),
}
"""What a record's fields are, and what each of their values is: a file from elsewhere may say anything."""


@dataclass(kw_only=True)
class Record:
    """What a run left, as `record.json`, schema 1. `summary` has the unit in each key; `samples` are raw repeats;
    `notes` say in words what a number of the summary is, or why there is none; written only where there are some."""

    schema: int = 1
    name: str
    run_id: str
    task: str
    status: str
    reason: str = ""
    error: str = ""
    attempts: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    code_hash: str = ""
    data_hash: str = ""
    kernel: str = ""
    started: str = ""
    seconds: float = 0.0
    world: int = 1
    resumed_from_step: int | None = None
    summary: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status={self.status}: must be one of {', '.join(STATUSES)}")

    @property
    def doubtful(self) -> bool:
        """Whether the run ran out of memory where its sweep had seen, or could not rule out, that others held some of
        it (`llmsys.sweep.memory`): alone it might have run."""
        return self.status == "oom" and not self.env.get("sweep", {}).get("clean", True)

    def to_json(self) -> str:
        """Readable JSON, in which a NaN or an infinity is an error: they are not JSON."""
        values = asdict(self)
        if not self.notes:  # as in records from before there were notes
            del values["notes"]
        return json.dumps(values, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """The record of `text`; ValueError says which field does not belong to schema 1."""
        return cls.from_values(json.loads(text))

    @classmethod
    def from_values(cls, values: Any) -> Record:
        """The record of what its JSON holds, which becomes its own; ValueError as of `from_json`."""
        if not isinstance(values, dict) or values.get("schema") != 1:
            raise ValueError("not a record of schema 1")
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)} in a record of schema 1")
        for name, (kind, inner) in _HOLDS.items():
            value = values.get(name, 0 if kind is _NUMBER else kind())
            types = set(map(type, value.values())) if isinstance(value, dict) and inner is not object else ()
            if not isinstance(value, kind) or not all(issubclass(each, inner) for each in types):
                raise ValueError(f"{name}: is not what a record of schema 1 has there")
        return cls(**values)

    def write(self, folder: Path) -> None:
        """Writes `record.json` into `folder`, atomically."""
        write_atomic(folder / "record.json", self.to_json() + "\n")

    def leave(self, root: Path) -> None:
        """Writes it where a run of its name and id has it below `root`."""
        folder = root / self.name / self.run_id
        folder.mkdir(parents=True, exist_ok=True)
        self.write(folder)

    @classmethod
    def begin(cls, job: Job) -> Record:
        """The record of an attempt that has just begun: what is true of it if nothing more is ever written."""
        return cls(
            name=job.config["name"],
            run_id=job.run_id,
            task=job.config["task"]["kind"],
            status="crashed",
            reason=UNFINISHED,
            error="this attempt ended without a word",
            attempts=previous_attempts(Path(job.out)) + 1,
            config=job.config,
            code_hash=code_hash(),
            started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            world=job.config["train"]["world"],
        )

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """The record in `folder`, or None where there is none. ValueError names a file that is none."""
        path = folder / "record.json"
        if not path.exists():
            return None
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


def previous_attempts(out: Path) -> int:
    """How often this run has been begun before."""
    before = read_or_set_aside(out)
    return before.attempts if before else 0


def read_or_set_aside(out: Path) -> Record | None:
    """The record in a run's folder; one that cannot be read is renamed and reported: it must not block the run."""
    try:
        return Record.read(out)
    except ValueError as error:
        logging.getLogger("llmsys").warning("%s; set aside as record.json.bad", error)
        (out / "record.json").replace(out / "record.json.bad")
        return None


def make(config: dict[str, Any], inputs: dict[str, str] | None = None) -> Job:
    """The job of a composed config: checks it, resolves device and threads, hashes local inputs.

    `inputs` as in `Job`. Raises ValueError, in one line that names the key, for anything wrong with the settings or
    with the files they name; MissingPackage for a tracker that is not installed.
    """
    from llmsys.cost import hardware, pace, shapes

    tasks.check(config["task"]["kind"])
    schema.build(config)
    config, device_name = resolved(config)
    typed = schema.build(config)
    world, most = typed.train.world, 4 * device.threads_of_runs()
    here = typed.dispatch.kind not in ("ray", "torchrun") and typed.task.kind not in tasks.LIGHT
    if here and typed.hardware.device == "cuda" and world > device.gpus():
        raise Contradiction(f"train.world={world}: this machine has {device.gpus()} CUDA devices")
    if typed.train.threads > most:
        raise ValueError(f"train.threads={typed.train.threads}: at most {most}, four times the cores there are")
    if typed.dispatch.kind != "ray":  # whose nodes may have other packages
        track.check(typed.tracker)
    hardware.named(typed.hardware)  # an unknown name is said here
    if isinstance(typed.task, schema.Replay):
        pace.flops_per_s(typed.task, typed.hardware.device)  # and an unknown device or precision of its
    if not isinstance(typed.task, schema.Ledger):  # which makes a model of its own width
        try:
            shapes.check_adapters(typed.model, typed.method)
        except ValueError as error:
            raise Contradiction(str(error)) from None
    inputs = dict(inputs or {})
    content = read.content(config, typed, inputs)
    if isinstance(typed.task, ASKED):
        wiring.check_question(typed, inputs)
    identifier = identity.run_id(config, device_name=device_name, content=content)
    out = Path(typed.results).expanduser().resolve() / typed.name / identifier
    return Job(config=config, run_id=identifier, out=str(out), inputs=inputs)


def resolved(config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """(a copy of `config` with what depends on this machine in place of `auto` and 0, the device's name). ValueError
    where CUDA is asked for in vain."""
    config = copy.deepcopy(config)
    light, elsewhere = config["task"]["kind"] in tasks.LIGHT, _elsewhere(config)
    kind, device_name = ("cpu", "") if elsewhere else device.resolve(config["hardware"]["device"])
    config["hardware"]["device"] = kind
    if light:
        common = (each.name for each in dataclasses.fields(schema.Dispatch))
        config["dispatch"] = {key: config["dispatch"][key] for key in common} | {"kind": "inline"}
    if config["task"].get("emit"):
        config["reuse"] = "never"  # what it writes there no record has
    # of each rank: more would only wait for each other
    cpus = config["dispatch"].get("cpus")
    share = max(1, int(cpus) if cpus else device.threads_of_runs() // config["train"]["world"])
    config["train"]["threads"] = config["train"]["threads"] or (1 if elsewhere else share)
    _only_its_own_rate(config)
    return config, device_name


def _elsewhere(config: dict[str, Any]) -> bool:
    """Whether a run is about a machine that its config describes: then this one is no part of what it is."""
    given, task = config["hardware"], config["task"]
    described = given["name"] != "auto" or (given["mem_gib"] is not None and given["tflops"] is not None)
    cls = schema.SCHEMAS["task"][task["kind"]]
    if issubclass(cls, schema.Planning):
        return True
    return issubclass(cls, schema.Predicting) and (described or task["speeds"] is not None)


def _only_its_own_rate(config: dict[str, Any]) -> None:
    """Leaves, in place, the learning rate of this run's method alone: another method's rate, or any rate where nothing
    is trained by gradient, cannot change the result and must not make another run."""
    method, train = config["method"]["kind"], config["train"]
    train["lr_by_method"] = {key: value for key, value in train["lr_by_method"].items() if key == method}
    if method in schema.CLOSED_FORM:
        train["lr_by_method"], train["lr_scale"] = {}, 1.0


@cache
def code_hash() -> str:
    """Twelve hex digits over the source of this package: a record made by other code is not taken for this code's."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
