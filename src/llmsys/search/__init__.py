"""The best settings by a metric of the record, found by Optuna: its samplers, its pruners, its storage.

    python -m llmsys +exp=lorafa_minilm +search=lorafa_width method=lorafa

    space    settings in Hydra's words, as Optuna's distributions
    study    the trials: asked for, run as ordinary runs, told of; those of an earlier session count

Each trial is a run like any other, with a record, in the same folder as if it had been typed, and runs where `dispatch`
says: on a cluster several at once. A trial that the pruner gives up ends between two steps and is `skipped (pruned)`.
The study lies in `<results>/<experiment>/search-<id>.journal`; the same command goes on with it, and begins again what
was under way when an earlier session was killed.
"""

from __future__ import annotations
