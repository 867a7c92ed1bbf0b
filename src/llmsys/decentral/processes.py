"""Providers as processes of this machine, none of which outlives whoever started them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmsys.decentral.fleet import Provider

PATIENCE_S = 20.0
"""How long one dials again a broker that has died."""
END_S = 10.0
"""For those that were let go to end: seconds, on a busy machine."""


class Processes:
    """`folder`: where what they say is kept, a file for each. `emulate`: their lines are made as slow as they are said
    to be, with `delay_ms` between any two. `direct`: they listen for each other. Close it, or leave its block, and all
    are gone; if this process dies their standard input ends, and so do they."""

    def __init__(self, folder: Path, token: str, threads: int = 1, certificate: Path | None = None, *,
                 emulate: bool = False, delay_ms: float = 0.0, direct: bool = False) -> None:  # fmt: skip
        self.folder, self.threads, self.certificate = folder, threads, certificate
        self.emulate, self.delay_ms, self.direct = emulate, delay_ms, direct
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.stopped: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        self._token = folder / "token"
        self._token.touch(mode=0o600)
        self._token.write_text(token, encoding="utf-8")

    def start(
        self,
        machine: Provider,
        address: str,
        *,
        python: Path | str = sys.executable,
        more: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Returns at once; what is wrong with it is in its file."""
        words = ["--join", address, "--token-file", str(self._token), "--patience", str(PATIENCE_S), "--stdin"]
        if self.certificate is not None:
            words += ["--certificate", str(self.certificate)]
        for key in ("name", "plane", "tflops", "efficiency", "mem_gib", "up_mbit", "down_mbit", "region"):
            words += [f"--{key.replace('_', '-')}={getattr(machine, key)}"]
        words += ["--capped", f"--delay-ms={self.delay_ms}"] if self.emulate else []
        words += ["--direct", "127.0.0.1:0"] if self.direct else []
        if not machine.trusted:
            words.append("--untrusted")
        threads = str(self.threads)
        env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **(environment or {})}
        with (self.folder / f"{machine.name}.log").open("ab") as log:
            self.processes[machine.name] = subprocess.Popen(
                [str(python), "-m", "llmsys.decentral", "provider", *words, *more],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=env,
            )

    def signal(self, name: str, what: str) -> None:
        """`what`: a signal's name. KeyError for somebody who was never started."""
        os.kill(self.processes[name].pid, getattr(signal, what))
        if what == "SIGSTOP":
            self.stopped.add(name)
        elif what == "SIGCONT":
            self.stopped.discard(name)

    def gone(self) -> list[str]:
        """Who has ended, or was stopped, and does not come back by itself."""
        return [name for name, each in self.processes.items() if each.poll() is not None or name in self.stopped]

    def wrong(self) -> dict[str, str]:
        """What was said by those that ended badly, and not by a signal, by name."""
        bad = [name for name, each in self.processes.items() if (each.poll() or 0) > 0]
        found = {}
        for name in bad:
            lines = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            found[name] = lines[-1] if lines else f"exit code {self.processes[name].returncode}"
        return found

    def close(self) -> None:
        """Waits a moment for those that were let go, and kills the others; at once those that are stopped."""
        for name in self.stopped:
            self.processes[name].kill()
        deadline = time.monotonic() + END_S
        for each in self.processes.values():
            try:
                each.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                each.kill()
                each.wait()
            if each.stdin is not None:
                with contextlib.suppress(OSError):
                    each.stdin.close()
        self._token.unlink(missing_ok=True)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
