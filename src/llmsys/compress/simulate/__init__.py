"""What each way to exchange gradients would take on a cluster that is not at hand, by arithmetic.

    shapes and FLOPs      `compress.paper_models`
    bytes of messages     `cost.compressed`, the same sums that the tests hold against real buffers
    time of a message     latency and rate of links by their specifications (`clusters`), `cost.links`
    time to compress      passes over memory, FLOPs and kernels of the device (`compress.kernels_cost`)
    time of an iteration  wait-free back-propagation, one device and one link (`compress.timeline`)

Nothing is fitted to what the paper measured; its numbers are shown beside.

    python -m llmsys +exp=compress_simulate                              # the paper's models, networks and GPUs
    python -m llmsys +exp=compress_simulate hardware=a100 task.precision=tf32
    python -m llmsys.compress.simulate results                           # the tables of records
"""
