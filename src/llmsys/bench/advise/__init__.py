"""`bench_advise`: of all combinations of techniques the one to choose on a machine, by prediction or measurement.

    python -m llmsys +exp=bench_advise model=llama2_13b hardware=rtx4090x8 goal=throughput

    from llmsys.bench.advise import answer
    from llmsys.bench.predict import predict

    answer(config, predict).choice

space.py      which combinations there are to choose among, and why not the others
cells.py      one combination at one micro-batch: what it takes, predicted or measured
search.py     the micro-batch of a combination
measured.py   which records are of the model and the machine that are asked about
trials.py     all of these together: the cells of a combination
ranking.py    the answer: the ranking by a goal, its margin, and what dropping a letter would cost
tables.py     that as text
emit.py       the choice as something to run
task.py       the task

The public names are resolved late (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsys import lazy

if TYPE_CHECKING:
    from llmsys.bench.advise.cells import Cell
    from llmsys.bench.advise.ranking import Answer, answer

_HOMES = {"Answer": "ranking", "Cell": "cells", "answer": "ranking"}
"""Name -> module."""

__all__ = ["Answer", "Cell", "answer"]

__getattr__ = lazy.attributes(__name__, _HOMES)
