"""The answer as text: the choice first, then why, then everything else that was looked at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llmsys import schema
from llmsys.bench.advise.cells import GIB, Cell
from llmsys.bench.advise.ranking import EVEN, Answer, Drop, worse_percent
from llmsys.table import piped

WANTED = {
    "throughput": "most tokens a second",
    "fit": "least memory of a device",
    "batch": "largest batch",
    "cost": "least cost for a token",
}
STAGES = {"pretrain": "pre-training", "finetune": "fine-tuning"}
MOST = 15
"""Lines of a table here; `advice.json` has all."""
EXAMPLES = 3
"""Combinations that are named beside a reason."""


def markdown(answer: Answer, config: schema.Config, machine: str, files: Sequence[str] = ()) -> str:
    """`machine` in words; `files`: what was written to be run."""
    return (
        "\n".join(
            [
                headline(answer, config, machine),
                "",
                *(f"- {line}" for line in _reasons(answer, files)),
                "",
                *_drops(answer),
                *_ranking(answer),
                *_short(answer),
                *_left_out(answer),
            ]
        ).rstrip()
        + "\n"
    )


def headline(answer: Answer, config: schema.Config, machine: str) -> str:
    """The answer in a line."""
    asked = f"{config.model.name} on {machine}, {STAGES[answer.stage]}, {WANTED[answer.goal]}"
    if answer.goal == "batch" and answer.bound:
        asked += f" (bounded by {answer.bound})"
    choice = answer.choice
    if not answer.ranking:
        over = choice.peak_bytes / GIB - choice.capacity_bytes / GIB
        need = (
            f"{over:,.2f} GiB more than a device has" if choice.lacks == "device" else f"host memory: {_host(choice)}"
        )
        return f"**Nothing fits.** {asked}: the nearest is {choice}, which needs {need}"
    return f"**{choice.techniques}, micro-batch {choice.micro_batch}**: {asked}; {_numbers(choice, answer.goal)}"


def _numbers(cell: Cell, goal: str) -> str:
    source = "measured" if cell.measured else "predicted"
    if cell.correction != 1:
        source += f", corrected by runs to {cell.correction:.2f} times the speed"
    parts = [f"{cell.tokens_per_s:,.0f} tokens/s on {_devices(cell)}", f"{cell.step_ms:,.1f} ms a step"]
    parts += [f"{_memory(cell)} GiB of each", *([f"{_host(cell)} of the host's"] if cell.host_bytes else [])]
    if goal == "cost":
        parts.insert(0, _cost(cell))
    if goal == "batch":
        parts.insert(0, f"{cell.examples} examples at once")
    return f"{', '.join(parts)} ({source})"


def _devices(cell: Cell) -> str:
    return f"{cell.world} devices" if cell.world > 1 else "1 device"


def _memory(cell: Cell) -> str:
    return f"{cell.peak_bytes / GIB:.2f} of {cell.capacity_bytes / GIB:.2f}"


def _host(cell: Cell) -> str:
    have = "" if cell.host_capacity_bytes is None else f" of {cell.host_capacity_bytes / GIB:,.1f}"
    return f"{cell.host_bytes / GIB:,.1f}{have} GiB"


def _cost(cell: Cell) -> str:
    hours = f"{cell.device_hours:.4g} device-hours for a million tokens"
    return hours if cell.usd is None else f"${cell.usd:.4g} for a million tokens, {hours}"


def _reasons(answer: Answer, files: Sequence[str]) -> Iterable[str]:
    choice, second = answer.choice, answer.runner_up
    if second is not None:
        worse = {"fit": "more memory", "cost": "more for a token", "batch": "fewer examples"}
        margin = worse_percent(answer.goal, choice, second)
        much = f"{margin:.1f} % {worse.get(answer.goal, 'fewer tokens a second')}"
        if margin <= 100 * EVEN:
            much = f"as good within {100 * EVEN:g} %"
            if len(second.techniques.letters) > len(choice.techniques.letters):
                much += ", with more letters"
        mixed = "; one is measured and the other predicted" if second.measured != choice.measured else ""
        yield f"runner-up: {second}{_on(second, choice)}: {much}{mixed}"
    if answer.ranking:
        yield f"binds: {choice.binds}{_shares(choice)}"
    if answer.next_size is not None:
        kind = {"device": "the device's memory", "host": "the host's memory"}[answer.next_size.lacks or "device"]
        yield f"the micro-batch is bound by {kind}: {answer.next_size.micro_batch} does not fit"
    if answer.bound:
        yield f"the micro-batch is bounded by {answer.bound}: larger ones were not looked at"
    simple = answer.simplest
    if simple is not None and simple.techniques != choice.techniques:
        worse_by = worse_percent(answer.goal, choice, simple)
        yield f"fewest letters that fit: {simple}, {worse_by:.1f} % worse"
    if choice.techniques.zero and choice.techniques.adapter and choice.world == 1:
        yield "ZeRO cuts nothing on one device; it casts adapters to the model's dtype, and with them what they keep"
    if choice.note:
        yield choice.note
    if choice.measured:
        yield f"measured in {', '.join(choice.runs)}"
    if answer.unlike:
        said = ", ".join(f"{number} {why}" for why, number in answer.unlike.items())
        yield f"runs of these combinations that do not count: {said}"
    yield from files


def _on(cell: Cell, choice: Cell) -> str:
    return "" if cell.world == choice.world else f" on {_devices(cell)}"


def _shares(cell: Cell) -> str:
    """Where the step's time goes, the largest first."""
    total = sum(cell.by_phase_ms.values())
    parts = sorted(cell.by_phase_ms.items(), key=lambda each: -each[1])
    said = [f"{name} {100 * ms / total:.0f} %" for name, ms in parts if total and ms >= 0.005 * total]
    return f" ({', '.join(said)} of the step)" if said else ""


def _drops(answer: Answer) -> list[str]:
    if not answer.drops:
        return []
    rows = [[drop.letter, drop.techniques, *_dropped(answer, drop)] for drop in answer.drops]
    head = ["without", "leaves", "micro-batch", "tokens/s", "GiB of a device", f"for {answer.goal}"]
    return ["## What dropping a letter would cost", "", *piped(head, rows), ""]


def _dropped(answer: Answer, drop: Drop) -> list[str]:
    cell, choice = drop.cell, answer.choice
    if cell is None:
        return ["", "", "", f"not allowed: {drop.why}"]
    if not cell.fits:
        lack = {"device": f"needs {_memory(cell)} GiB", "host": f"host: {_host(cell)}"}[cell.lacks]
        return [str(cell.micro_batch), "", _memory(cell), f"does not fit: {lack}"]
    worse = worse_percent(answer.goal, choice, cell) if answer.ranking else 0.0
    said = f"{worse:.1f} % worse" if worse >= 0 else f"{-worse:.1f} % better"
    return [str(cell.micro_batch), f"{cell.tokens_per_s:,.0f}", _memory(cell), said]


def _ranking(answer: Answer) -> list[str]:
    if not answer.ranking:
        return []
    head = ["techniques", "devices", "micro-batch", "tokens/s", "ms a step", "GiB of a device", "host GiB", "binds"]
    head += ["cost" if answer.goal == "cost" else "worse %", "from"]
    rows = []
    for cell in answer.ranking[:MOST]:
        worse = f"{worse_percent(answer.goal, answer.choice, cell):.1f}"
        host = f"{cell.host_bytes / GIB:,.1f}" if cell.host_bytes else ""
        numbers = [f"{cell.tokens_per_s:,.0f}", f"{cell.step_ms:,.1f}", f"{cell.peak_bytes / GIB:.2f}", host]
        price = f"{cell.device_hours:.4g} h" if cell.usd is None else f"${cell.usd:.4g}"
        last = [price if answer.goal == "cost" else worse, _source(cell)]
        rows.append([str(cell.techniques), str(cell.world), str(cell.micro_batch), *numbers, cell.binds, *last])
    more = len(answer.ranking) - len(rows)
    title = f"## All that fit, the best first ({len(answer.ranking)})"
    return [title, "", *piped(head, rows), *([f"\n{more} more in `advice.json`."] if more > 0 else []), ""]


def _source(cell: Cell) -> str:
    if cell.measured:
        return "runs"
    return "prediction" if cell.correction == 1 else f"prediction x {cell.correction:.2f}"


def _short(answer: Answer) -> list[str]:
    if not answer.short:
        return []
    rows = [
        [str(cell.techniques), str(cell.world), str(cell.micro_batch), _memory(cell), _host(cell), cell.lacks]
        for cell in answer.short[:MOST]
    ]
    head = ["techniques", "devices", "micro-batch", "GiB of a device", "of the host", "lacks memory of the"]
    title = f"## What does not fit, the nearest first ({len(answer.short)})"
    more = len(answer.short) - len(rows)
    return [title, "", *piped(head, rows), *([f"\n{more} more in `advice.json`."] if more > 0 else []), ""]


def _left_out(answer: Answer) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for line in answer.left_out:
        name, _, why = line.removeprefix("techniques=").partition(": ")
        by_reason.setdefault(why, []).append(name)
    rows = []
    for why, names in sorted(by_reason.items(), key=lambda each: -len(each[1])):
        few = sorted(names, key=lambda name: (name.count("+"), len(name), name))[:EXAMPLES]
        rows.append([why, str(len(names)), ", ".join(few)])
    if not rows:
        return []
    title = f"## Left out ({len(answer.left_out)})"
    return [title, "", *piped(["why", "combinations", "for example"], rows), ""]
