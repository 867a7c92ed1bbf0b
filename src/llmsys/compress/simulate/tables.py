"""A simulation's record as tables, with what the paper reports beside, and as advice in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmsys.compress.paper_models import MODELS
from llmsys.compress.simulate.clusters import NETWORKS
from llmsys.compress.simulate.predict import PACKED, RATES_GBIT
from llmsys.schema.compress import LOW_RANK
from llmsys.schema.task import SIMULATED

Summary = Mapping[str, float]
TITLES = {"none": "S-SGD", "powersgd": "Power-SGD*", PACKED: "Power-SGD", "acpsgd": "ACP-SGD"}
"""As the paper calls them: the star is the version whose buckets overlap with the backward pass."""
GPU = "rtx2080ti"
"""Of the paper's cluster, 4 in each machine."""
MAIN = ("eth10g", 32)
"""Network and GPUs of the paper's main table."""
RECALLED = {
    "resnet50": (266, 302, 286, 248),
    "resnet152": (500, 423, 404, 316),
    "bert_base": (805, 236, 292, 193),
    "bert_large": (2307, 392, 516, 245),
}
"""Its iteration ms of `TITLES`' methods, S-SGD, Power-SGD, Power-SGD*, ACP-SGD: from memory, not from its text."""
ORDER = ("none", PACKED, "powersgd", "acpsgd")
HEADLINES = (4.06, 1.43)
"""Its averages: S-SGD / ACP-SGD, and both versions of Power-SGD / ACP-SGD (arXiv 2306.08881, abstract)."""
ADVISED = ("none", "fp16", PACKED, "powersgd", "acpsgd")
"""What is recommended: the methods that send something of every direction of every matrix, or everything. Sparse and
sign methods have shorter messages at settings that are no substitute for these without a look at convergence."""
AVERAGES = ("none_over_acpsgd_x", "powersgd_over_acpsgd_x")
"""Keys of `averages`."""
WORTH = 1.05
"""How much faster than S-SGD a method has to be before it is recommended."""


@dataclass(frozen=True)
class Cell:
    """One model on one cluster: iteration ms of each method."""

    model: str
    network: str
    world: int
    ms: dict[str, float]


def cells(summary: Summary) -> list[Cell]:
    """In the order in which they were simulated."""
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for key, value in summary.items():
        parts = key.split("/")
        if parts[-1] == "iteration_ms":
            model, network, world, method = parts[:4]
            found.setdefault((model, network, int(world)), {})[method] = value
    return [Cell(*where, ms) for where, ms in found.items()]


def averages(summary: Summary) -> dict[str, float]:
    """S-SGD / ACP-SGD, and Power-SGD of both versions / ACP-SGD: means over the paper's models on its main cluster; {}
    unless all of them were simulated."""
    main = {cell.model: cell.ms for cell in cells(summary) if (cell.network, cell.world) == MAIN}
    if set(main) != set(RECALLED) or not all(set(ORDER) <= set(ms) for ms in main.values()):
        return {}
    plain = [ms["none"] / ms["acpsgd"] for ms in main.values()]
    power = [ms[name] / ms["acpsgd"] for ms in main.values() for name in (PACKED, "powersgd")]
    return dict(zip(AVERAGES, (sum(plain) / len(plain), sum(power) / len(power)), strict=True))


def markdown(summary: Summary, notes: Sequence[str] = ()) -> str:
    """All tables that `summary` has numbers for, as Markdown, what they stand on, and advice."""
    parts = ["# Iterations with compressed gradients, predicted"]
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    parts += [_beside(summary), _sensitivity(summary), *_networks(summary), _break_even(summary), _advice(summary)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _beside(summary: Summary) -> str:
    """The paper's main table, as recalled, beside ours, where that is of the same cluster."""
    ours = [summary[f"average/{key}"] for key in AVERAGES if f"average/{key}" in summary]
    if not ours:
        return ""
    rows = []
    for cell in cells(summary):
        if (cell.network, cell.world) == MAIN and cell.model in RECALLED and set(ORDER) <= set(cell.ms):
            theirs = RECALLED[cell.model]
            both = (f"{cell.ms[name]:.0f} ({paper})" for name, paper in zip(ORDER, theirs, strict=True))
            ratio = f"{cell.ms['none'] / cell.ms['acpsgd']:.2f}x ({theirs[0] / theirs[-1]:.2f}x)"
            rows.append([MODELS[cell.model].title, *both, ratio])
    network, world = MAIN
    table = _table(
        f"## {NETWORKS[network].title}, {world} GPUs: iteration ms, ours (the paper's, recalled from memory)",
        ["", *(TITLES[name] for name in ORDER), "S-SGD / ACP-SGD"],
        rows,
    )
    return (
        f"{table}\n\nOn average S-SGD takes {ours[0]:.2f} times as long as ACP-SGD (the paper: {HEADLINES[0]:.2f}), "
        f"Power-SGD, of both versions, {ours[1]:.2f} times (the paper: {HEADLINES[1]:.2f}). The paper's are measured. "
        "Ours come from specifications of device and links, and from the assumed shares of them and least time of a "
        "kernel that are said above; what becomes of the averages under other assumptions stands below."
    )


def _sensitivity(summary: Summary) -> str:
    """The two averages under other assumptions."""
    rows: dict[str, dict[str, float]] = {}
    for key, value in summary.items():
        if key.startswith("sensitivity/"):
            _, assumption, which = key.split("/")
            rows.setdefault(assumption, {})[which] = value
    if not rows:
        return ""
    return _table(
        "## The averages under other assumptions, one at a time",
        ["", "S-SGD / ACP-SGD", "Power-SGD / ACP-SGD"],
        [[name, *(f"{row[which]:.2f}x" for which in AVERAGES)] for name, row in rows.items()],
    )


def _networks(summary: Summary) -> Iterable[str]:
    """For each network and number of GPUs: iteration ms of every method, and how many times faster than S-SGD and than
    the faster version of Power-SGD."""
    grouped: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells(summary):
        grouped.setdefault((cell.network, cell.world), []).append(cell)
    for (network, world), group in sorted(grouped.items(), key=lambda item: (_rank(item[0][0]), item[0][1])):
        names = [name for name in SIMULATED if any(name in cell.ms for cell in group)]
        rows = []
        for cell in group:
            power = min((cell.ms[name] for name in (PACKED, "powersgd") if name in cell.ms), default=None)
            cells_ = [_cell(cell.ms[name], cell.ms["none"], name) if name in cell.ms else "–" for name in names]
            acp = cell.ms.get("acpsgd")
            rows.append([_title(cell.model), *cells_, "–" if not (power and acp) else f"{power / acp:.2f}x"])
        yield _table(
            f"## {network_title(network)}, {world} GPUs: iteration ms (times faster than S-SGD)",
            ["", *names, "faster Power-SGD / ACP-SGD"],
            rows,
        )


def _cell(ms: float, plain: float, name: str) -> str:
    return f"{ms:.0f}" if name == "none" else f"{ms:.0f} ({plain / ms:.2f}x)"


def _break_even(summary: Summary) -> str:
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for key, value in summary.items():
        if key.startswith("break_even/"):
            _, model, world, method = key.removesuffix("_gbit").split("/")
            rows.setdefault((model, world), {})[method] = rate_text(value)
    names = [name for name in SIMULATED if any(name in row for row in rows.values())]
    if not rows:
        return ""
    table = _table(
        "## Break-even: up to which link rate, Gbit/s, a method is faster than S-SGD",
        ["", "GPUs", *names],
        [[_title(model), world, *(row.get(name, "–") for name in names)] for (model, world), row in rows.items()],
    )
    return (
        f"{table}\n\n`always`: at {RATES_GBIT[1]:g} Gbit/s too, where the bus inside a machine is what is slow; "
        f"`never`: at no rate from {RATES_GBIT[0]:g} Gbit/s on."
    )


def rate_text(gbit: float) -> str:
    """`never` and `always` at the ends of what was tried."""
    if not gbit:
        return "never"
    return "always" if gbit >= RATES_GBIT[1] else f"{gbit:.3g}"


def _advice(summary: Summary) -> str:
    found = [f"- {advice(cell)}" for cell in sorted(cells(summary), key=lambda cell: _rank(cell.network))]
    return "## What to use\n\n" + "\n".join(found) if found else ""


def advice(cell: Cell) -> str:
    """Which method, in a sentence."""
    plain = cell.ms["none"]
    advised = {name: ms for name, ms in cell.ms.items() if name in ADVISED}
    best = min(advised, key=lambda name: advised[name])
    gain = f"{_named(best, cell.model)}, {plain / advised[best]:.2f}x over S-SGD"
    if plain < WORTH * advised[best]:
        gain = "none, S-SGD itself" + (f" ({gain})" if best != "none" else "")
        best = "none"
    elif best == "acpsgd" and (power := [advised[name] for name in (PACKED, "powersgd") if name in advised]):
        gain += f" and {min(power) / advised[best]:.2f}x over Power-SGD"
    text = f"on {network_title(cell.network)} with {cell.world} GPUs and {_title(cell.model)}: {gain}"
    shortest = min(cell.ms, key=lambda name: cell.ms[name])
    if cell.ms[shortest] < cell.ms[best] / WORTH:
        text += f" ({shortest} is shorter still, {plain / cell.ms[shortest]:.1f}x, if its convergence is good enough)"
    return text


def _named(method: str, model: str) -> str:
    low_rank = method == PACKED or method in LOW_RANK
    return f"{method} r={MODELS[model].r}" if low_rank else method


def _title(model: str) -> str:
    return MODELS[model].title


def network_title(network: str) -> str:
    return NETWORKS[network].title if network in NETWORKS else f"the {network} network"


def _rank(network: str) -> int:
    return list(NETWORKS).index(network) if network in NETWORKS else len(NETWORKS)


def _table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(headers) - 1)]
    lines = "\n".join("| " + " | ".join(cells) + " |" for cells in [headers, rule, *rows])
    return f"{title}\n\n{lines}"
