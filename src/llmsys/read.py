"""What a run reads from this machine: files, and folders that other runs left. Their content is part of what a run is,
and where they lie is not."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from llmsys import resume, schema
from llmsys.schema.decentral import FLEETS


def content(config: dict[str, Any], typed: schema.Config, inputs: dict[str, str]) -> dict[str, str]:
    """Hashes of the local files and folders that a run reads, by what they are to it; `inputs` gets those that it is to
    be told the place of."""
    if isinstance(typed.task, schema.Predicting):
        served = isinstance(typed.task, schema.Advise) and typed.task.goal == "serve"
        kind = "bench_serve_modules" if served else "bench_calibrate"
        found = {} if typed.task.speeds is None else _of_run("speeds", typed.task.speeds, kind, inputs)
        return {**found, **_runs(typed, inputs)} if isinstance(typed.task, schema.Advise) else found
    if isinstance(typed.task, schema.Opportunities) and typed.task.modules is not None:
        return _of_run("modules", typed.task.modules, "bench_modules", inputs)
    if isinstance(typed.task, schema.Planning):
        return _fleet(typed.task, inputs)
    from llmsys import data
    from llmsys.models import fingerprint

    found = {"data": data.content_hash(typed.data), "weights": fingerprint.content_hash(typed.model, inputs)}
    if isinstance(typed.task, (schema.Serve, schema.ServeModules)):
        found |= _served(typed, inputs)
    if continued := resume.source(config):
        inputs["resume"], found["resume"] = str(continued[0]), continued[1]
    return found


def _served(typed: schema.Config, inputs: dict[str, str]) -> dict[str, str]:
    """Hashes of what a load, or passes, are asked by."""
    task, server, found = typed.task, typed.server, dict[str, str]()
    if isinstance(server, schema.ModelServer) and server.adapter_file:
        path = Path(server.adapter_file).expanduser()
        if not path.is_file():
            raise ValueError(f"server.adapter={server.adapter}: has no {path.name}, as llmsys.lorafa.save_adapter "
                             "leaves it; or a rank, of new ones: random:16")  # fmt: skip
        inputs["adapter"] = str(path.parent.resolve())
        found["adapter"] = hashlib.sha256(path.read_bytes()).hexdigest()
    if isinstance(task, schema.Serve):
        if task.speeds is not None:
            found |= _of_run("speeds", task.speeds, "bench_serve_modules", inputs)
        if task.served is not None:
            found |= _of_run("served", task.served, "bench_serve with task.speeds", inputs)
        if task.trace:
            path = Path(task.trace).expanduser()
            if not path.is_file():
                raise ValueError(f"task.trace={task.trace}: no such file; it is a CSV file of arrivals")
            inputs["trace"] = str(path.resolve())
            found["trace"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _fleet(task: schema.Planning, inputs: dict[str, str]) -> dict[str, str]:
    """The hash of the file with a fleet; {} where it is drawn, or there is none."""
    if not isinstance(task, schema.DecentralPlan) or task.fleet in FLEETS:
        return {}
    path = Path(task.fleet).expanduser()
    if not path.is_file():
        raise ValueError(
            f"task.fleet={task.fleet}: must be one of {', '.join(FLEETS)}, or a file; there is none of that name"
        )
    inputs["fleet"] = str(path.resolve())
    return {"fleet": hashlib.sha256(path.read_bytes()).hexdigest()}


def _of_run(key: str, name: str, task: str, inputs: dict[str, str]) -> dict[str, str]:
    """The hash of the record that `task.<key>` names, a run of `task`; its place goes into `inputs`."""
    path = Path(name).expanduser()
    path = path / "record.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"task.{key}={name}: no record.json there; it is a run of {task}")
    inputs[key] = str(path.resolve())
    return {key: hashlib.sha256(path.read_bytes()).hexdigest()}


def _runs(typed: schema.Config, inputs: dict[str, str]) -> dict[str, str]:
    """The hash of all records of training below the folder that advice may read; {} where there are none."""
    assert isinstance(typed.task, schema.Advise)
    root = Path(typed.task.records or typed.results).expanduser()
    if typed.task.records is not None and not root.is_dir():
        raise ValueError(f"task.records={typed.task.records}: no such folder; it has runs of the task train below it")
    texts = (path.read_bytes() for path in sorted(root.rglob("record.json")))
    trained = [hashlib.sha256(text).hexdigest() for text in texts if b'"task": "train"' in text]
    if not trained:
        return {}
    inputs["records"] = str(root.resolve())
    return {"records": hashlib.sha256("".join(trained).encode()).hexdigest()}
