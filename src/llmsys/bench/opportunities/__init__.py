"""Where a training step's time could be saved: each module against the least time that its work could take.

least.py      what a row of the table of modules has to read and write at least
ranking.py    measured time against the roofline, ranked by what the step could gain
changes.py    changes that are known, what they would take instead, measured by themselves
verify.py     a change applied, and its step beside the step before it
tables.py     the ranking as text
task.py       the task bench_opportunities
"""
