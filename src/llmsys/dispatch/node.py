"""What a node says of itself before any run is sent there: `python -m llmsys.dispatch.node FILE`, one line of JSON.

The file is in the folder of results, and whoever asks has written it: a node that finds it, and can write beside it,
has the same folder.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

from llmsys import device
from llmsys.job import code_hash


def answer(asked: Path) -> dict[str, object]:
    """`fault`: why results cannot be left here; "" where they can. `code`, `python`, and `machine` as of a
    `device.Machine`."""
    fault = ""
    try:
        text = asked.read_text(encoding="utf-8")
        (asked.parent / f"{asked.name}.{platform.node()}").write_text(text, encoding="utf-8")
        (asked.parent / f"{asked.name}.{platform.node()}").unlink()
    except FileNotFoundError:
        fault = "is not the same folder there"
    except OSError as error:
        fault = f"cannot be written there: {error.strerror}"
    gpu = device.gpu_name()
    there = device.Machine(device.cpu_name(), gpu, device.gpus() if gpu else 0, device.threads())
    return {"fault": fault, "code": code_hash(), "python": platform.python_version(), "machine": asdict(there)}


if __name__ == "__main__":
    print(json.dumps(answer(Path(sys.argv[1]))))
