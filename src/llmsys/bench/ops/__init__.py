"""The operators that a step is made of, at a model's own shapes, and what connects devices.

shapes.py        which products, softmaxes and norms a model has
clock.py         an operator repeated until its time is known
operators.py     products, attention, softmax and norms, with their backward pass
transfers.py     copies between host and device, and collectives between ranks
tables.py        a record as tables
task.py          the task bench_ops
"""
