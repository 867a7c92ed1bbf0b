"""Iterations with compressed gradients, measured: between real processes, over links of a given rate.

variants.py    a method with its buckets, with or without overlap, attached to a model
stack.py       what is trained: a stack of layers or one of the models
paced.py       what is trained: a paper's shapes, at the speed of a device that is not at hand
clock.py       how long compressing and decompressing take
turns.py       all variants in turns
rounds.py      finished rounds on disk, for the next attempt
fit.py         latency and rate of the links, and the speed of compression
predicted.py   an iteration from these
figures.py     what a record says of it
tables.py      that as tables
task.py        the tasks compress_iteration and compress_replay
"""
