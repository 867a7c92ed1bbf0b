"""Tokens a second of generation over slow lines, against two ways to hand a batch on; and failover in mid-stream.

    python benchmarks/decentral_generation.py [--runs 5] [--new 24] [--lines home,far] [--out benchmarks/records]

Four provider processes have a stage of `llama_6m` each, and generate 8 sequences greedily. In turns:

    streams   4 streams of 2 rows, one behind the other; the broker relays
    push      one batch of 8 rows; each stage sends its result to the next, as Petals' servers do by default
    client    one batch of 8 rows; each result goes to the client's home and from there to the next stage, as Petals'
              client does without that

All three are this package, with the same model, cuts, frames and lines, and the same word of the owner, once a step,
that begins the next one. Of a hop both lines' shares of the delay are paid, the sender's line out and, where it is the
slower one, the receiver's line in. The broker's place in the network has no slow line, so that a relayed hop costs what
a direct one would, and tokens, which go from the last stage to the owner there and back to the first, pay half a delay
each way in all three. `client` pays the home's line in, its line out and the delays of both for each of the three
results between stages, and nothing for tokens that the others do not. Petals' client has the embedding and the head,
and would send and get hidden states for tokens: that is left out, in favour of both.

Lines are those of a real case, made slower as much as this model's results are smaller: of 8 rows LLaMA-7B sends
8 x 4096 x 2 bytes (fp16) from stage to stage, `llama_6m` 8 x 256 x 4, an eighth. So at an eighth of the rates, and the
same delays, a hop takes as long as it would there. Frames' headers are not made smaller: 308 bytes of 2,356 with 2 rows
and of 8,500 with 8, so that they weigh on `streams` more than they would there.

    home      20 Mbit/s out, 100 in, 10 ms from one to another: a result of 8 rows is sent for 26 ms
    far       1 Gbit/s both ways, 30 ms: for 0.5 ms; what is left is the delay, and there is nothing to overlap

Then, on lines that are not slow, with a spare, the owner of a stage is killed (SIGKILL) or stopped (SIGSTOP) in
mid-stream: seconds to the next token of all sequences, and whether the text is the undisturbed one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmsys import main as command_line
from llmsys.decentral import running
from llmsys.decentral.event_log import read
from llmsys.decentral.events import Planned
from llmsys.decentral.pieces import Direction, Slow
from llmsys.decentral.serve import Serving
from llmsys.decentral.wire import BROKER, header
from llmsys.job import Record
from llmsys.table import piped
from script_record import RECORDS, Script

REAL_BYTES, OWN_BYTES = 8 * 4096 * 2, 8 * 256 * 4
"""What 8 rows of LLaMA-7B, and of `llama_6m`, are from one stage to the next."""
LINES = {
    "home": Slow(up_mbit=20, down_mbit=100, delay_ms=10),
    "far": Slow(up_mbit=1000, down_mbit=1000, delay_ms=30),
}
WAYS = {"streams": (4, 2), "push": (1, 8), "client": (1, 8)}
FAULTS = ("SIGKILL", "SIGSTOP")
MODEL = ("model.weights=random", "data.max_train=40", "data.max_val=8", "train.length=64", "dispatch=inline")
STAGES = (
    *("task.providers=4", "task.stages=4", "task.reserve=0", "task.faults=[]", "task.emulate=true"),
    *("task.mem_gib=0.0071", "task.prompt_tokens=4"),  # as much as two layers, with caches for 28 tokens
    "task.copies=0",  # made once, before the first step, and minutes on such lines; the owner's own are
)


class ThroughClient(Serving):
    """A broker that has what stages say to each other carried to a client's home, over its `line`, and back."""

    line: Slow

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.down = Direction(self.line.down_mbit, self.line.delay_ms / 2e3)
        self.up = Direction(self.line.up_mbit, self.line.delay_ms / 2e3)

    def _send(self) -> None:
        own = [each for each in self.coordinator.out if header(each[1])["sender"] == BROKER]
        others = [each for each in self.coordinator.out if header(each[1])["sender"] != BROKER]
        self.coordinator.out = own
        super()._send()
        loop = asyncio.get_running_loop()
        for name, data in others:
            arrives = self.down.received_at(len(data), loop.time()) + self.down.delay_s
            loop.call_at(arrives, self._back, name, data)

    def _back(self, name: str, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        loop.call_at(self.up.busy_until(len(data), loop.time()) + self.up.delay_s, self.hub.send, name, data)


def scaled(line: Slow) -> Slow:
    """As much slower as this model's results are smaller."""
    share = OWN_BYTES / REAL_BYTES
    return Slow(up_mbit=line.up_mbit * share, down_mbit=line.down_mbit * share, delay_ms=line.delay_ms)


def ran(words: Sequence[str], through: Slow | None = None) -> tuple[dict[str, Any], list[list[int]], tuple[int, ...]]:
    """A run's record, the tokens of each sequence, and where the model was cut at first."""
    with tempfile.TemporaryDirectory() as folder:
        client = json.dumps(vars(through)) if through else ""
        command = [sys.executable, __file__, "--run", client, "+exp=decentral_generate", *MODEL, *words]
        env = {**os.environ, "LLMSYS_RESULTS": folder}
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(folder).glob("*/*/record.json")
        lines = (path.parent / "generated.jsonl").read_text().splitlines()
        plans = (event.plan for event, _ in read(path.parent / "events.jsonl") if isinstance(event, Planned))
        cuts = next(plan.pipelines[0].cuts for plan in plans if plan is not None)
        return json.loads(path.read_text()), [json.loads(line)["tokens"] for line in lines], cuts


def one_run(client: str, words: Sequence[str]) -> None:
    """The command that a user gives; with a client's line, by way of it."""
    if client:
        ThroughClient.line = Slow(**json.loads(client))
        running.Serving = ThroughClient  # type: ignore[misc]
    sys.argv = ["llmsys", *words]
    command_line.main()


def over(name: str, way: str, new: int) -> tuple[float, tuple[int, ...]]:
    """Tokens/s of one run of one way over lines of a name, and where the model was cut."""
    line, (streams, rows) = scaled(LINES[name]), WAYS[way]
    words = [*STAGES, f"task.streams={streams}", f"task.rows={rows}", f"task.new_tokens={new}"]
    words += [f"task.{key}={value}" for key, value in vars(line).items()]
    record, _, cuts = ran(words, line if way == "client" else None)
    return record["summary"]["tokens_per_s"], cuts


def show(record: Record) -> str:
    """One record as Markdown."""
    rows, s = [], record.summary
    for key, values in record.samples.items():
        if key.endswith("tokens_per_s"):
            line, way, _ = key.split("/")
            found = [line, way, f"{s[key]:.1f}", f"{min(values):.1f} to {max(values):.1f}"]
            rows.append([*found, "" if way == "streams" else f"{s[f'{line}/over_{way}']:.2f}x"])
    lines = piped(("lines", "way", "tokens/s", "least to most", "streams are"), rows)
    failed = [[what, *(f"{each:.2f}" for each in (statistics.median(took), min(took), max(took)))]
              for what in FAULTS if (took := record.samples.get(f"{what}/next_token_s"))]  # fmt: skip
    lines += ["", *piped(("to the next token, seconds", "median", "least", "most"), failed)]
    lines += ["", f"{s['same']:.0f} of {s['runs']:.0f} runs that were hit have the undisturbed text."]
    return "\n".join(lines)


def main(given: Sequence[str]) -> Record:
    """Measures, writes the record, prints its table, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--new", type=int, default=24, help="tokens to each sequence")
    parser.add_argument("--lines", default=",".join(LINES))
    parser.add_argument("--out", type=Path, default=RECORDS)
    asked = parser.parse_args(given)
    script = Script("decentral_generation")
    lines = asked.lines.split(",")
    samples = dict[str, list[float]]()
    faulty = (f"task.new_tokens={asked.new}", "task.prompt_tokens=4", "task.temperature=1")
    _, undisturbed, _ = ran([*faulty, "task.faults=[]"])
    same, cut = 0, dict[str, tuple[int, ...]]()
    for turn in range(asked.runs):
        for line in lines:
            for way in [*WAYS][:: -1 if turn % 2 else 1]:
                per_s, cuts = over(line, way, asked.new)
                samples.setdefault(f"{line}/{way}/tokens_per_s", []).append(per_s)
                assert cut.setdefault(line, cuts) == cuts, f"{line}, {way}: the model is not cut as for the others"
        for what in FAULTS:
            record, found, _ = ran([*faulty, f"task.faults=[stage1 {what} {asked.new // 2}]"])
            samples.setdefault(f"{what}/next_token_s", []).extend(record["samples"]["recovery_s"])
            same += found == undisturbed
    summary: dict[str, float] = {key: statistics.median(values) for key, values in samples.items()}
    for line in lines:
        for way in ("push", "client"):
            ours, peer = (summary[f"{line}/{each}/tokens_per_s"] for each in ("streams", way))
            summary[f"{line}/over_{way}"] = ours / peer
    summary |= {"runs": len(FAULTS) * asked.runs, "same": same}
    config = {"runs": asked.runs, "new": asked.new, "model": list(MODEL), "stages": list(STAGES), "ways": WAYS}
    config["lines"] = {line: {"real": vars(LINES[line]), "scaled": vars(scaled(LINES[line]))} for line in lines}
    name = f"{'-'.join(lines)}-{asked.runs}x{asked.new}"
    left = script.left(asked.out, name, config=config, summary=summary, samples=samples)
    print(show(left))
    return left


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        one_run(sys.argv[2], sys.argv[3:])
    else:
        main(sys.argv[1:])
