"""Claims about what the runner writes when a task ends badly."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmsys import compose, job, runner
from llmsys.errors import MissingPackage, NotANumber, Refused
from llmsys.job import Record


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OutOfMemoryError("CUDA out of memory"), ("oom", "device memory")),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), ("oom", "host memory")),
        (MemoryError(), ("oom", "host memory")),
        (OSError(errno.ENOSPC, "No space left on device"), ("failed", "disk")),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ("oom", "host memory")),
        (NotANumber("loss is nan at step 3"), ("failed", "nan")),
        (Refused("needs 100 GiB", reason="memory"), ("skipped", "memory")),
        (RuntimeError("CUDA error: out of memory"), ("oom", "device memory")),
        (RuntimeError("can't start new thread"), ("oom", "host memory")),
        (KeyboardInterrupt(), ("interrupted", "signal")),
        (MissingPackage("needs bitsandbytes"), ("failed", "missing package")),
        (ModuleNotFoundError("No module named 'deepspeed'"), ("failed", "missing package")),
        (RuntimeError("shape mismatch"), ("failed", "RuntimeError")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_exception_becomes_a_status_with_a_reason(error: BaseException, expected: tuple[str, str]) -> None:
    assert runner.classify(error) == expected


def test_torch_itself_runs_out_of_memory_as_the_classifier_expects() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert runner.classify(caught.value) == ("oom", "host memory")


def test_a_failed_task_leaves_its_traceback_in_the_log(results: Path) -> None:
    made = job.make(compose.compose([f"results={results}", "train.lr_by_method.full=1e30", "train.clip=0"]))
    record = runner.run(made)
    assert (record.status, record.reason) == ("failed", "nan")
    assert "Traceback" in (Path(made.out) / "log.txt").read_text()
    assert record.summary == {}


def namespaces() -> bool:
    """Whether this machine lets a process mount a file system of its own."""
    return (
        shutil.which("unshare") is not None
        and subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode == 0
    )


@pytest.mark.skipif(
    not namespaces(),
    reason="a small file system needs user and mount namespaces, which this machine forbids",
)
def test_a_full_disk_is_recorded_and_what_was_written_stays(results: Path) -> None:
    """A real full disk: a file system of 4 MiB, mounted in a namespace of its own that ends with the process."""
    results.mkdir()
    code = (
        "import sys; from llmsys import compose, job, runner\n"
        "made = job.make(compose.compose(sys.argv[1:]))\n"
        "record = runner.run(made)\n"
        "print(record.status, record.reason)\n"
        "import pathlib; rows = (pathlib.Path(made.out) / 'metrics.jsonl').read_text().splitlines()\n"
        "print(len(rows) >= 2, job.Record.read(pathlib.Path(made.out)) == record)\n"
    )
    sizes = ("model.hidden_size=192", "model.intermediate_size=512", "train.length=32", "data.num_examples=40")
    script = f'mount -t tmpfs -o size=4m tmpfs "{results}" && exec "{sys.executable}" -c "$0" "$@"'
    overrides = (f"results={results}", *sizes, "train.checkpoint_every=2", "train.steps=6", "train.threads=1")
    command = ["unshare", "-rm", "sh", "-c", script, code, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.stdout.splitlines() == ["failed disk", "True True"], done.stderr[-2000:]


@pytest.mark.parametrize("bytes_left", [100_000, 10])
def test_a_disk_that_is_full_from_the_beginning_is_named(results: Path, bytes_left: int) -> None:
    """The file that does not fit: the reserve, in a record; or the record and the log, where not even these do. What
    the operating system says of a write has no name in it."""
    made = job.make(compose.compose([f"results={results}", "train.threads=1"]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        if bytes_left > 1000:
            assert str(Path(made.out) / ".reserve") in runner.run(made).error
        else:
            with pytest.raises(OSError, match=rf"{made.out}/(record\.json|log\.txt)"):
                runner.run(made)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_example_record_is_one_that_the_runner_made() -> None:
    record = Record.from_json((Path(__file__).parent / "record_schema_1.json").read_text())
    assert record.env["packages"]["torch"]
    assert record.summary["accounted_bytes"] > record.summary["saved_bytes"] > 0
