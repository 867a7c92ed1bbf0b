"""The task `lorafa_ledger`: measures the columns on a cut model, derives them, predicts the whole model.

Everything that a table shows is in the record's summary, under keys of parts joined by `/`:

    block/<heads>/<dropout>/<column>/<origin>             bytes over (batch x length x D) of an inner block, measured
    block/.../<origin>_closed, total, total_closed, cost  by formula; sums; the cost model's own (T5: both stacks' sum)
    live/<heads>/<dropout>/<column>/{hooks,live,backward} bytes of the measured model: saved, alive after the forward
                                                          pass, and the most that is alive in the backward pass
    shape/<heads>/<name>                                  of the measured model
    full/<heads>/<column>/total                           the formula at the asked model's own shape
    whole/<batch>x<length>/<column>/{saved,peak}_bytes    predicted on one GPU
    freezing/<lora|lorafa>/<what>, equal_rank/<what>      ours with A trained and frozen, policy none
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmsys import schema
from llmsys.files import write_atomic
from llmsys.lorafa.ledger import closed, predict, shapes, tables
from llmsys.lorafa.ledger.columns import Column, columns

if TYPE_CHECKING:
    from llmsys.context import Context

TOLERANCE = 0.01
"""Between the cost model's bytes of a block and those measured: beyond it there is no prediction. Between live bytes
and saved ones: beyond it there is a note."""


def ledger(config: schema.Config, context: Context) -> dict[str, Any]:
    """The record's summary, and `ledger.md` with its tables and what could not be made."""
    model, task, method = config.model, config.task, config.method
    assert isinstance(model, schema.Transformer)
    assert isinstance(task, schema.Ledger)
    assert isinstance(method, schema.LoRA), "`schema.coherence` has said so"
    train = predict.at(config.train, config.train.micro_batch, config.train.length)
    summary: dict[str, float] = {}
    notes: list[str] = []
    for heads, variant in shapes.variants(model).items():
        small, r = shapes.cut(variant, method.r, task.width)
        summary |= {f"shape/{heads}/{key}": value for key, value in _numbers(small, train, r).items()}
        for dropout in (0.0, task.dropout):
            # compiling takes longer than all else, so once: without dropout
            for column in _columns(task, method, r, dropout, compiled=task.backend != "none" and not dropout):
                context.beat()
                found = _measured(small, train, column, task.backend, notes, f"{heads}/{dropout:g}")
                summary |= found
        for column in _columns(task, method, method.r, 0.0, compiled=False):
            parts = _closed(variant, train, column)
            if parts is not None:
                summary[f"full/{heads}/{column.name}/total"] = sum(parts.values())
    asked = _columns(task, method, method.r, 0.0, compiled=task.backend != "none")
    predictable = _predictable(summary, asked, notes, model)
    summary |= _whole(config, task, predictable, notes)
    summary |= _freezing(config, task, predictable)
    text = tables.markdown(summary, model.name, notes)
    write_atomic(context.out / "ledger.md", text)
    return {"summary": summary, "files": {"tables": "ledger.md"}}


def _columns(task: schema.Ledger, method: schema.LoRA, r: int, dropout: float, *, compiled: bool) -> list[Column]:
    """Those that are asked for."""
    found = columns(r, dropout, compiled=compiled, share_a=method.share_a)
    return [column for column in found if not task.columns or column.name in task.columns]


def _numbers(small: schema.Transformer, train: schema.Train, r: int) -> dict[str, float]:
    return {
        "hidden_size": small.hidden_size,
        "intermediate_size": small.intermediate_size,
        "num_heads": small.num_heads,
        "num_kv_heads": small.num_kv_heads,
        "num_layers": small.num_layers,
        "r": r,
        "batch": train.micro_batch,
        "length": train.length,
        **({"stacks": 2} if small.family == "t5" else {}),
    }


def _measured(
    small: schema.Transformer, train: schema.Train, column: Column, backend: str, notes: list[str], where: str
) -> dict[str, float]:
    from llmsys.lorafa.ledger.measure import NotCompiled, measure

    try:
        measured = measure(small, train, column, backend)
    except NotCompiled as error:
        notes.append(f"{where} {column.name}: not made: {error}")
        return {}
    unit = train.micro_batch * train.length * small.hidden_size
    found: dict[str, float] = {}
    prefix = f"block/{where}/{column.name}"
    for block in measured.blocks.values():
        for origin, nbytes in block.items():
            key = f"{prefix}/{origin}"
            found[key] = found.get(key, 0.0) + nbytes / unit
    found[f"{prefix}/total"] = sum(found.values())
    formula = _closed(small, train, column)
    if formula is not None:
        found |= {f"{prefix}/{origin}_closed": value for origin, value in formula.items()}
        found[f"{prefix}/total_closed"] = sum(formula.values())
    if not column.compiled:
        found[f"{prefix}/cost"] = predict.kept_a_block(small, train, column) / unit
        parts = {"hooks": measured.hooks, "live": measured.live, "backward": measured.backward}
        found |= {f"live/{where}/{column.name}/{key}_bytes": value for key, value in parts.items()}
        if abs(measured.live - measured.hooks) > TOLERANCE * measured.hooks:
            beyond = measured.live - measured.hooks
            notes.append(f"{where} {column.name}: {beyond} bytes are alive that hooks do not see")
        found |= {f"outside/{where}/{column.name}/{key}": value / unit for key, value in measured.outside.items()}
    return found


def _closed(model: schema.Transformer, train: schema.Train, column: Column) -> dict[str, float] | None:
    """By origin, of both stacks of T5 together."""
    found: dict[str, float] = {}
    for block in ("encoder", "decoder") if model.family == "t5" else ("",):
        parts = closed.coefficients(model, train, column, block)
        if parts is None:
            return None
        for origin, value in parts.items():
            found[origin] = found.get(origin, 0.0) + value
    return found


def _predictable(
    summary: dict[str, float], made: list[Column], notes: list[str], model: schema.Transformer
) -> list[Column]:
    """The columns whose bytes of a block the cost model has right."""
    found = []
    for column in made:
        if column.compiled:
            notes.append(f"{column.name}: measured alone, without dropout; the cost model knows no torch.compile")
            continue
        measured, cost = (summary[f"block/mha/0/{column.name}/{key}"] for key in ("total", "cost"))
        if abs(cost - measured) > TOLERANCE * measured:
            notes.append(
                f"{column.name}: not predicted: no estimate exists yet for {model.family} (the cost model keeps "
                f"{cost:.2f} a block, measured are {measured:.2f})"
            )
        else:
            found.append(column)
    return found


def _whole(config: schema.Config, task: schema.Ledger, predictable: list[Column], notes: list[str]) -> dict[str, float]:
    model = config.model
    assert isinstance(model, schema.Transformer)
    found: dict[str, float] = {}
    for length in task.lengths:
        if length > model.max_length:
            notes.append(f"length {length}: left out, {model.name} takes at most {model.max_length}")
            continue
        for batch in task.batches:
            train = predict.at(config.train, batch, length)
            for column in predictable:
                for what, nbytes in predict.whole(model, train, column).items():
                    found[f"whole/{batch}x{length}/{column.name}/{what}_bytes"] = nbytes
    return found


def _freezing(config: schema.Config, task: schema.Ledger, predictable: list[Column]) -> dict[str, float]:
    """In one cell of the grid: its second batch size and length, where it has two."""
    model = config.model
    assert isinstance(model, schema.Transformer)
    by_name = {column.name: column for column in predictable}
    if not {"lora/none", "lorafa/none"} <= by_name.keys():
        return {}
    length = min(task.lengths[:2][-1], model.max_length)
    train = predict.at(config.train, task.batches[:2][-1], length)
    pair = by_name["lora/none"], by_name["lorafa/none"]
    needs = predict.freezing(model, train, *pair)
    found = {f"freezing/{kind}/{key}": value for kind, parts in needs.items() for key, value in parts.items()}
    found |= {f"equal_rank/{key}": r for key, r in predict.equal_rank(model, train, *pair).items()}
    method = config.method
    assert isinstance(method, schema.LoRA)
    return {**found, "freezing/r": method.r, "freezing/batch": train.micro_batch, "freezing/length": train.length}
