"""Which figures there are: of each paper the questions, where the numbers are, and what draws them. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A figure.

    `experiments`: folders of records that it is drawn from, with wildcards. `draw`: `module:function`, of a list of
    records, that returns the figure and the records it has used; ValueError where they have nothing to draw.
    `measured`: whether the numbers were measured on the machine of the records, or computed there for another one.
    """

    question: str
    experiments: tuple[str, ...]
    draw: str
    measured: bool = True


def _of(paper: str, name: str) -> str:
    return f"llmsys.figures.{paper}:{name}"


BENCH = ("bench_pretrain", "bench_finetune", "bench_engines", "bench_modules", "bench_calibrate")
SERVED = ("bench_serve_compare",)
QUALITY = ("lorafa_quality", "lorafa_minilm_lr", "lorafa_minilm_seeds")
PAPERS: dict[str, dict[str, Entry]] = {
    "bench": {
        "pareto": Entry(
            question="Which combination of techniques is fastest in each amount of memory?",
            experiments=BENCH,
            draw=_of("bench", "pareto"),
        ),
        "letters": Entry(
            question="What does each technique alone do to speed and memory?",
            experiments=BENCH,
            draw=_of("bench", "letters"),
        ),
        "phases": Entry(
            question="Where does the time of a step go, by phase?", experiments=BENCH, draw=_of("bench", "phases")
        ),
        "predicted": Entry(
            question="How far are predicted memory and time from what is measured?",
            experiments=BENCH,
            draw=_of("bench", "predicted"),
        ),
        "modules": Entry(
            question="Where does the time of a step go, by module?",
            experiments=("bench_modules",),
            draw=_of("bench", "modules"),
        ),
        "latencies": Entry(
            question="How long do requests wait for their tokens, by server?",
            experiments=SERVED,
            draw=_of("bench", "latencies"),
        ),
        "throughput": Entry(
            question="How many tokens a second does each server make, and how many could it?",
            experiments=SERVED,
            draw=_of("bench", "throughput"),
        ),
    },
    "decentral": {
        "over_lines": Entry(
            question="On which lines are fifty small cards as fast as four large ones?",
            experiments=("decentral_3080_vs_h100",),
            draw=_of("decentral", "over_lines"),
            measured=False,
        ),
        "timeline": Entry(
            question="Who computes and who waits in a planned pipeline?",
            experiments=("decentral_plan",),
            draw=_of("decentral", "timeline"),
            measured=False,
        ),
        "against": Entry(
            question="How much faster are the plans than other ways to lay a model out?",
            experiments=("decentral_plans",),
            draw=_of("decentral", "against"),
            measured=False,
        ),
        "goodput": Entry(
            question="How much of a plan's throughput is left when providers come and go?",
            experiments=("decentral_simulate_churn",),
            draw=_of("decentral", "goodput"),
            measured=False,
        ),
    },
    "lorafa": {
        "blocks": Entry(
            question="What does a block keep for the backward pass, and why?",
            experiments=("lorafa_ledger",),
            draw=_of("lorafa", "blocks"),
        ),
        "saved": Entry(
            question="What do whole models keep for the backward pass, over batch and length?",
            experiments=("lorafa_ledger",),
            draw=_of("lorafa", "saved"),
            measured=False,
        ),
        "peak": Entry(
            question="What has to fit into one GPU's memory, over batch and length?",
            experiments=("lorafa_ledger",),
            draw=_of("lorafa", "peak"),
            measured=False,
        ),
        "quality": Entry(
            question="Which accuracy or loss does each method reach, and in how much memory?",
            experiments=QUALITY,
            draw=_of("lorafa", "quality"),
        ),
        "rates": Entry(
            question="How much does each method's result depend on the learning rate?",
            experiments=QUALITY,
            draw=_of("lorafa", "rates"),
        ),
    },
    "compress": {
        "iterations": Entry(
            question="What does an iteration consist of under each method, on links of each rate?",
            experiments=("compress_iteration",),
            draw=_of("compress", "iterations"),
        ),
        "ablation": Entry(
            question="What do overlap and tensor fusion bring each method?",
            experiments=("compress_ablation",),
            draw=_of("compress", "ablation"),
        ),
        "rates": Entry(
            question="Up to which link rate does each method pay?",
            experiments=("compress_simulate",),
            draw=_of("compress", "rates"),
            measured=False,
        ),
        "convergence": Entry(
            question="What does compression cost in loss, at equal steps and at equal bytes?",
            experiments=("compress_convergence",),
            draw=_of("compress", "convergence"),
        ),
    },
}
"""Paper -> name -> figure, in the order of the notebook."""
