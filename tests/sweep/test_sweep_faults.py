"""Claims about sweeps of real processes: however a cell ends it ends typed, and nothing that finished is made again."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console
from sweep_harness import Machine, course, written

from llmsys import compose, main
from llmsys.dispatch import child
from llmsys.dispatch.show import Show
from llmsys.job import FINAL, Job
from llmsys.sweep.course import Course

TINY = ("train.threads=1", "train.length=32", "data.num_examples=40", "profile.warmup=1", "profile.probe=false")
LONG = (*TINY, "train.steps=100000", "train.global_batch=2", "train.micro_batch=2")
FAULTS: dict[str, tuple[str, ...]] = {
    "none": (*TINY, "train.steps=3"),
    "oom": (*TINY, "train.steps=1", "model=llama_85m", "dispatch.memory_gib=1"),
    "oom, and more": (*TINY, "train.steps=1", "train.length=64", "model=llama_85m", "dispatch.memory_gib=1"),
    "nan": (*TINY, "train.steps=3", "train.lr_scale=1e30", "train.clip=0"),
    "package": (*TINY, "train.steps=3", "method=lora_peft", "model.quant=nf4"),
    "contradiction": (*TINY, "method=lorafa", "train.fp8=true"),
    "kill": (*LONG, "train.seed=1"),
    "stop": (*LONG, "train.seed=2", "dispatch.heartbeat_s=8"),
    "after all": (*TINY, "train.steps=3", "train.seed=3"),
}
EXPECTED = {
    "none": ("ok", ""),
    "oom": ("oom", "host memory"),
    "oom, and more": ("skipped", "witness"),
    "nan": ("failed", "nan"),
    "package": ("failed", "missing package"),
    "contradiction": ("unsupported", "contradiction"),
    "kill": ("crashed", "signal"),
    "stop": ("hang", "no heartbeat"),
    "after all": ("ok", ""),
}


class Injector(Show):
    """Sends a signal to the worker of the run whose seed is named, at its second step."""

    SIGNALS: ClassVar = {1: signal.SIGKILL, 2: signal.SIGSTOP}

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO()))

    def start(self, job: Job, number: int, total: int) -> None:
        super().start(job, number, total)
        self.signal = self.SIGNALS.get(job.config["train"]["seed"])

    def progress(self, values: dict[str, Any]) -> None:
        if self.signal and values.get("step", 0) >= 2:
            os.kill(_worker(), self.signal)
            self.signal = None


def _worker() -> int:
    children = child.descendants(os.getpid())
    return next(pid for pid in children if b"llmsys.dispatch.worker" in Path(f"/proc/{pid}/cmdline").read_bytes())


@pytest.mark.slow
def test_every_cell_ends_typed_and_a_second_start_makes_only_those_that_are_not_final(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is hidden from the children as if it had never been installed."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['bitsandbytes'] = None\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    wanted = [compose.compose([*words, "sweep.prune=true", f"results={results}"]) for words in FAULTS.values()]
    ended = {job.run_id: record for job, record in Course(wanted, main.make_job, Injector()).run()}
    cells = dict(zip(FAULTS, course(wanted).cells, strict=True))
    found = {name: (ended[each.job.run_id].status, ended[each.job.run_id].reason) for name, each in cells.items()}
    assert found == EXPECTED
    assert ended[cells["oom"].job.run_id].run_id in ended[cells["oom, and more"].job.run_id].error
    assert "pip install" in ended[cells["package"].job.run_id].error
    assert len(written(results)) == len(FAULTS)

    machine = Machine(monkeypatch)
    list(course(wanted).run())
    again = [name for name, each in cells.items() if each.job.config in machine.made]
    assert again == [name for name, (status, _) in EXPECTED.items() if status not in (*FINAL, "skipped")]


@pytest.mark.slow
def test_a_sweep_whose_parent_was_killed_outright_goes_on_with_the_same_command(results: Path) -> None:
    env = {**os.environ, "LLMSYS_RESULTS": str(results)}
    command = [sys.executable, "-m", "llmsys", "-m", *TINY, "train.steps=3", "train.seed=0,1"]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as sweep:
        assert sweep.stderr is not None
        for line in sweep.stderr:
            if line.startswith("[2/2]"):
                break
        sweep.kill()
    again = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "done before (ok)" in again.stderr
    found = sorted(written(results), key=lambda record: record.config["train"]["seed"])
    assert [(record.status, record.config["train"]["seed"]) for record in found] == [("ok", 0), ("ok", 1)]
    assert found[0].attempts == 1


def _namespaces() -> bool:
    command = ["unshare", "-rm", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(
    not _namespaces(), reason="a small file system needs user and mount namespaces, which are forbidden"
)
def test_a_full_disk_fails_its_cell_and_the_next_one_still_leaves_a_record(results: Path) -> None:
    """A file system of 6 MiB: the checkpoints of the first cell do not fit, the second has none."""
    results.mkdir()
    sizes = ("model.hidden_size=192", "model.intermediate_size=512", "train.save_final=false", "train.steps=6")
    code = (
        "import sys; from llmsys import main; from llmsys.results import read\n"
        "try: main.main()\n"
        "except SystemExit: pass\n"
        "found = sorted(read(sys.argv[-1].partition('=')[2]), key=lambda r: r.config['train']['checkpoint_every'])\n"
        "print(*(f'{r.status}/{r.reason}' for r in found), file=sys.stderr)\n"
    )
    script = f'mount -t tmpfs -o size=6m tmpfs "{results}" && exec "{sys.executable}" -c "$0" "$@"'
    words = ("-m", *TINY, *sizes, "train.checkpoint_every=2,0", f"results={results}")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, code, *words], capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1] == "ok/ failed/disk", done.stderr[-2000:]
