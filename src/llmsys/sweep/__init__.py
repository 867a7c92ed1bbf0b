"""A sweep: many cells, each a run of its own with a typed status, of which one that fails takes no other along.

    settings   configs under dotted keys: one value changed, another run
    cells      a cell is a job, or a combination that cannot be
    order      which cell runs when; least predicted memory first, and why
    prune      what needs at least as much memory as a run that ran out of it
    search     the largest value that runs, by bisection
    memory     device memory back to its baseline between two runs
    drift      whether the machine was the same all along
    scaling    tokens a second of a rank among several
    course     all of this put together, over `llmsys.dispatch`
    report     what is printed at the end

Everything but `memory`, `course` and `report` is pure functions on frozen values. Each cell is an ordinary run: same
command, same folder, same record, and finished ones are not run again; so a sweep that was killed goes on with the same
command. `conf/sweep/*.yaml` are suites: an experiment with axes and these settings.

An estimate orders and seeds. In a sweep that prunes or searches it refuses no run for the device's memory, where
running out of that harms nobody: on a GPU, and on a CPU under `dispatch.memory_gib`. Without that limit a CPU's memory
is guarded as outside a sweep, `skipped (memory)`, for the kernel pages for minutes and then ends other processes; what
a search finds there may be the estimate's limit, and its table then says so.
"""

from __future__ import annotations
