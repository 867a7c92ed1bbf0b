"""A record's numbers as tables: what is kept, against whom, what is alive, whole models, and what freezing A buys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from llmsys.schema.task import COLUMNS as NAMES

Summary = Mapping[str, float]
ORIGINS = ("norm", "attention", "mlp", "adapter", "dropout", "input", "compiled")
PEERS = ("peft_lora", "peft_lora_bf16", "peft_lora_compiled", "peft_lora_bf16_compiled", "peft_lorafa")
OURS = ("lora/none", "lorafa/none", "lorafa/mlp", "lorafa/attn+mlp")
RATIOS = (
    ("peft_lora", "peft_lorafa"),
    ("peft_lora", "lorafa/none"),
    ("peft_lora_bf16", "lorafa/none"),
    ("peft_lorafa", "lorafa/none"),
    ("lora/none", "lorafa/none"),
    ("peft_lora", "lorafa/mlp"),
    ("peft_lora_bf16", "lorafa/mlp"),
)
"""Whose total peak is divided by whose."""
SHOWN = ("full", "peft_lora", "peft_lora_bf16", "peft_lorafa", *OURS, "lorafa/block")
FREEZING = (
    ("saved_bytes", "saved tensors", 1e6, "MB"),
    ("trainable_params", "trained parameters", 1e6, "M"),
    ("gradient_bytes", "gradients", 1e6, "MB"),
    ("optimizer_bytes", "optimizer state", 1e6, "MB"),
    ("all_reduce_bytes", "all-reduce a step", 1e6, "MB"),
    ("adapter_file_bytes", "adapter file", 1e6, "MB"),
    ("step_flops", "a step", 1e12, "TFLOP"),
    ("peak_bytes", "total peak", 1e9, "GB"),
)


def markdown(summary: Summary, model: str, notes: Sequence[str] = ()) -> str:
    """All tables that `summary` has numbers for, as Markdown, and the notes."""
    parts = [f"# LoRA-FA's ledger: {model}"]
    for where in _variants(summary):
        parts += [_block(summary, where), _ratios(summary, where), _live(summary, where)]
    parts += [_whole(summary, model), _freezing(summary)]
    if notes:
        parts.append("\n".join(f"- {note}" for note in dict.fromkeys(notes)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _variants(summary: Summary) -> list[str]:
    """`mha/0`, `mha/0.1`, `gqa/0`, ..."""
    return list(dict.fromkeys("/".join(key.split("/")[1:3]) for key in summary if key.startswith("block/")))


def _title(summary: Summary, where: str) -> str:
    heads, dropout = where.split("/")
    of = {key: round(summary[f"shape/{heads}/{key}"]) for key in SHAPE}
    return (
        f"{heads.upper()}, dropout {dropout} (measured: width {of['hidden_size']}, MLP {of['intermediate_size']}, "
        f"{of['num_heads']} heads, {of['num_kv_heads']} of keys, r {of['r']}, {of['batch']} x {of['length']} tokens)"
    )


SHAPE = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "r", "batch", "length")


def _block(summary: Summary, where: str) -> str:
    origins = [o for o in ORIGINS if any(f"block/{where}/{name}/{o}" in summary for name in NAMES)]
    heads, dropout = where.split("/")
    rows = []
    for name in NAMES:
        prefix = f"block/{where}/{name}"
        if f"{prefix}/total" not in summary:
            continue
        total, formula = summary[f"{prefix}/total"], summary.get(f"{prefix}/total_closed")
        cells = [name, *(_number(summary.get(f"{prefix}/{origin}")) for origin in origins), f"{total:.2f}"]
        cells += [_number(formula), "–" if formula is None else f"{total / formula:.4f}"]
        if dropout == "0":
            cells.append(_number(summary.get(f"full/{heads}/{name}/total")))
        rows.append(cells)
    both = " of the encoder and one of the decoder" if f"shape/{heads}/stacks" in summary else ""
    last = ["at the model's own shape"] if dropout == "0" else []
    return _table(
        f"## Saved by a block{both}, bytes over (batch x length x width): {_title(summary, where)}",
        ["", *origins, "total", "closed form", "measured / closed", *last],
        rows,
    )


def _ratios(summary: Summary, where: str) -> str:
    rows = []
    for peer in PEERS:
        if (theirs := summary.get(f"block/{where}/{peer}/total")) is None:
            continue
        mine = [summary.get(f"block/{where}/{name}/total") for name in OURS]
        rows.append([peer, f"{theirs:.2f}", *("–" if own is None else f"{theirs / own:.2f}x" for own in mine)])
    return _table(f"## Times fewer bytes a block: {where}", ["", "bytes", *OURS], rows)


def _live(summary: Summary, where: str) -> str:
    rows = []
    for name in NAMES:
        prefix = f"live/{where}/{name}"
        if f"{prefix}/hooks_bytes" in summary:
            hooks, live, back = (summary[f"{prefix}/{key}_bytes"] for key in ("hooks", "live", "backward"))
            rows.append([name, *(f"{size / 1e6:.2f}" for size in (hooks, live)), f"{live / hooks:.4f}"])
            rows[-1] += [f"{back / 1e6:.2f}", f"{(back - live) / 1e6:.2f}"]
    headers = ["", "saved MB", "alive after forward MB", "alive / saved", "peak of backward MB", "beyond the saved MB"]
    return _table(f"## The measured model whole: {where}", headers, rows)


def _whole(summary: Summary, model: str) -> str:
    cells = list(dict.fromkeys(key.split("/")[1] for key in summary if key.startswith("whole/")))
    if not cells:
        return ""
    peaks, saved, ratios = [], [], []
    for cell in cells:
        of = {name: summary.get(f"whole/{cell}/{name}/peak_bytes") for name in NAMES}
        kept = {name: summary.get(f"whole/{cell}/{name}/saved_bytes") for name in NAMES}
        peaks.append([cell, *(_number(_scaled(of[name])) for name in SHOWN)])
        saved.append([cell, *(_number(_scaled(kept[name])) for name in SHOWN)])
        ratios.append([cell, *(_ratio(of[above], of[below]) for above, below in RATIOS)])
    return "\n\n".join(
        [
            _table(f"## {model} whole, predicted: saved for the backward pass, GB", ["batch x length", *SHOWN], saved),
            _table(f"## {model} whole, predicted: total peak on one GPU, GB", ["batch x length", *SHOWN], peaks),
            _table("## Total peak, ratio", ["batch x length", *(f"{a} : {b}" for a, b in RATIOS)], ratios),
        ]
    )


def _freezing(summary: Summary) -> str:
    if "freezing/r" not in summary:
        return ""
    rows = []
    for key, name, scale, unit in FREEZING:
        lora, lorafa = (summary[f"freezing/{kind}/{key}"] for kind in ("lora", "lorafa"))
        fewer = "0" if lora == lorafa else f"{(lora - lorafa) / scale:,.3f}"
        rows.append([f"{name}, {unit}", f"{lora / scale:,.3f}", f"{lorafa / scale:,.3f}", fewer, _ratio(lora, lorafa)])
    r, batch, length = (round(summary[f"freezing/{key}"]) for key in ("r", "batch", "length"))
    table = _table(
        f"## What freezing A buys at equal fusion: ours, policy none, r = {r}, batch {batch} x {length}",
        ["", "lora", "lorafa", "less", "lora / lorafa"],
        rows,
    )
    params, peak = (round(summary[f"equal_rank/{key}"]) for key in ("params", "peak"))
    return (
        f"{table}\n\nA step's difference is dA's products. LoRA-FA trains as many parameters as LoRA of r = {r} at r = "
        f"{params}, and has its total peak at r = {peak}."
    )


def _scaled(nbytes: float | None) -> float | None:
    return None if nbytes is None else nbytes / 1e9


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _ratio(above: float | None, below: float | None) -> str:
    return "–" if above is None or below is None else f"{above / below:.2f}x"


def _table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(headers) - 1)]
    lines = "\n".join("| " + " | ".join(cells) + " |" for cells in [headers, rule, *rows])
    return f"{title}\n\n{lines}"
