"""`run(job)`: the only place that executes a task, and the only one that catches exceptions, to classify them.

Out of memory is a result, not a crash: torch raises its own class on CUDA and a plain RuntimeError on a CPU. What
the kernel kills leaves no exception at all; `dispatch.process` classifies that from outside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from llmsys import job as jobs
from llmsys import schema, tasks, track, wiring
from llmsys.comm.place import Place, log_name
from llmsys.context import Context, LightContext
from llmsys.errors import Contradiction, Interrupted, MissingPackage, NotANumber, Refused
from llmsys.files import named, write_atomic
from llmsys.job import Job, Record
from llmsys.profile import environment
from llmsys.track.jsonl import JsonLines

_NO_HOST_MEMORY = ("allocate memory", "not enough memory", "std::bad_alloc", "can't start new thread")
_NO_DEVICE_MEMORY = ("cuda error: out of memory", "cublas_status_alloc_failed")
_NO_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RESERVE_BYTES = 256 * 1024
"""Kept on disk during a run and freed before the record is written, so that a full disk can still be recorded."""


def classify(error: BaseException) -> tuple[str, str]:
    """(status, reason) of what a task raised."""
    text = str(error).lower()
    if isinstance(error, (KeyboardInterrupt, Interrupted)):
        return "interrupted", "signal"
    if isinstance(error, Refused):
        return "skipped", error.reason
    if isinstance(error, Contradiction):
        return "unsupported", "contradiction"
    if isinstance(error, NotANumber):
        return "failed", "nan"
    if isinstance(error, (MissingPackage, ModuleNotFoundError)):
        return "failed", "missing package"
    if type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and _says(text, _NO_DEVICE_MEMORY)
    ):
        return "oom", "device memory"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "oom", "host memory"
    if isinstance(error, RuntimeError) and _says(text, _NO_HOST_MEMORY):
        return "oom", "host memory"
    if (isinstance(error, OSError) and error.errno in _NO_DISK) or "no space left on device" in text:
        return "failed", "disk"
    return "failed", type(error).__name__


def _says(text: str, phrases: tuple[str, ...]) -> bool:
    return any(phrase in text for phrase in phrases)


def run(
    job: Job,
    listener: Callable[[dict[str, Any]], None] | None = None,
    on_context: Callable[[LightContext], None] = lambda _: None,
    *,
    place: Place | None = None,
    found: dict[str, Any] | None = None,
    ended: Callable[[Record], None] = lambda _: None,
) -> Record:
    """Runs `job`, or one rank of it, in this process and returns its record; raises only what it cannot record.

    `listener` hears progress. `on_context` is shown the context before the task starts (a heartbeat watches it).
    `place` is the rank (None: the only one), `found` what its environment in the record says besides. Rank 0 writes the
    run's files; the others leave a log. `ended` is told the record before other ranks can notice this one's end.
    """
    place = place or Place()
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    record = Record.begin(job)
    start = time.perf_counter()
    reserve = out / ".reserve"
    mirrors: list[track.Mirror] = []
    first = place.rank == 0
    context: LightContext | None = None
    with _logger(out, place) as log:
        try:
            if first:
                record.write(out)  # so that an earlier record never stands beside this attempt's files
                write_atomic(out / "config.yaml", yaml.safe_dump(job.config, sort_keys=False))
                with named(reserve), open(reserve, "wb") as file:
                    file.write(b"\0" * _RESERVE_BYTES)
            config = schema.build(job.config)
            record.env = environment.describe(config.hardware.device, config.train.threads)
            record.env |= found or {}
            for key, value in (found or {}).items():
                log.info("%s: %s", key, value)
            if first:
                mirrors.extend(track.mirrors(config.tracker, job, record.env))
            context = _context(job, config, log, mirrors, listener, place, record.env)
            on_context(context)
            with _group(config, context):
                result = tasks.find(config.task.kind)(config, context)
            _check(result)
            record = dataclasses.replace(record, **{"status": "ok", "reason": "", "error": "", **result})
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  the one place that catches all, to classify
            record.status, record.reason = classify(error)
            record.error = _first_line(error, context.kept if context else "")
            if isinstance(error, (Refused, Interrupted)):
                log.warning("%s", error)
            else:
                log.error("%s", "".join(traceback.format_exception(error)))
        record.seconds = round(time.perf_counter() - start, 3)
        if first:
            reserve.unlink(missing_ok=True)
            record.write(out)
        ended(record)
        if notes := track.close(mirrors, record):
            record.notes = {**record.notes, **notes}
            _note(record, out, log)
    return record


def _note(record: Record, out: Path, log: logging.Logger) -> None:
    """Writes a record again that has a word more of a mirror; without that word, where the disk is full, it stands."""
    try:
        record.write(out)
    except OSError as error:
        log.warning("the record does not say of the tracker what stands above: %s", error)


_RESULTS = {"summary", "samples", "notes", "files", "kernel", "data_hash", "resumed_from_step"}
_ENDED = {"status", "reason", "error"}
"""What a task may say of its run; the rest of a record is the runner's. How it ended only a task says that has figures,
though not all of it went well."""


def _check(result: dict[str, Any]) -> None:
    assert result.keys() <= _RESULTS | _ENDED, f"a task returned {sorted(result.keys() - _RESULTS - _ENDED)}"
    for key, value in result.get("summary", {}).items():
        if not math.isfinite(value):
            raise NotANumber(f"summary.{key} is {value}")


def _first_line(error: BaseException, kept: str) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "stopped at once, not between two steps" + (f"; {kept}" if kept else "")
    if isinstance(error, (Refused, Interrupted)):
        return str(error)  # several lines: what is needed, what was found, what would run
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _context(
    job: Job,
    config: schema.Config,
    log: logging.Logger,
    mirrors: list[track.Mirror],
    listener: Callable[[dict[str, Any]], None] | None,
    place: Place,
    env: dict[str, Any],
) -> LightContext:
    common: dict[str, Any] = {
        "out": Path(job.out),
        "place": place,
        "threads": config.train.threads,
        "code_hash": jobs.code_hash(),
        "log": log,
        "metrics": JsonLines(Path(job.out) / "metrics.jsonl"),
        "inputs": job.inputs,
        "mirrors": mirrors,
        "listener": listener,
    }
    if config.task.kind in tasks.LIGHT:
        return LightContext(**common)
    import torch

    torch.set_num_threads(config.train.threads)
    device = torch.device(config.hardware.device)
    if device.type == "cuda" and place.world > 1:
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    return Context(
        **common,
        device=device,
        method=wiring.method(config.method, config.train.seed),
        engine=wiring.engine(config, place, device),
        grad_sync=wiring.grad_sync(config),
        env=env,
    )


def _group(config: schema.Config, context: LightContext) -> contextlib.AbstractContextManager[Any]:
    """The process group of the run's ranks, for a task that has an engine with several."""
    if not isinstance(context, Context) or config.engine.kind == "local":
        return contextlib.nullcontext()
    from llmsys.comm import group

    return group.group(context.place, context.device)


@contextlib.contextmanager
def _logger(out: Path, place: Place) -> Iterator[logging.Logger]:
    """The package's logger, which writes to `log.txt` (rank 1: `log.1.txt`) in the run's folder while the run lasts."""
    log = logging.getLogger("llmsys")
    handler = logging.FileHandler(out / log_name(place.rank))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        log.info("run %s, rank %d of %d, process %d", out.name, place.rank, place.world, os.getpid())
        yield log
    finally:
        log.removeHandler(handler)
        with named(Path(handler.baseFilename)):
            handler.close()
