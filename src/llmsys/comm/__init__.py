"""What ranks say to each other: where they meet (`place`, `group`), collectives that become the identity on one process
(`collectives`), how much they exchange (`traffic`), flat buffers (`buckets`), and real links of a given speed (`link`).
"""
