"""A training step taken apart into its modules, forward and backward.

arms.py      steps without clocks, with those of phases and with those of modules, in turns
figures.py   what a record says of them
tables.py    that in the paper's layout
task.py      the task bench_modules
"""
