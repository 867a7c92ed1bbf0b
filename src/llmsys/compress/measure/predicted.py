"""An iteration by the cost model: `timeline.play` with what `fit` has found.

The passes take what they take with `noop`, or by the pace; each parameter's share of them goes by its FLOPs. Buckets
are cut by DDP's rule. Without overlap all gradients are there before the first bucket is compressed, and from then on
compression and link overlap as they do with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from llmsys import schema
from llmsys.compress.kernels_cost import Rates
from llmsys.compress.measure.variants import DEFAULT_MIB, Variant
from llmsys.compress.paper_models import PaperModel
from llmsys.compress.simulate import predict
from llmsys.compress.timeline import Bucket, Timeline, play
from llmsys.cost.links import Line


def iteration(
    variant: Variant,
    task: schema.Measured,
    model: PaperModel,
    *,
    passes_s: float,
    rates: Rates,
    lines: Mapping[str, Line],
    world: int,
) -> Timeline:
    """`passes_s`: forward and backward."""
    flops = 3 * model.batch * sum(p.flops for p in model.parameters)
    machine = predict.Machine(compute_flops_per_s=flops / passes_s if passes_s else float("inf"), compress=rates)
    made = predict.plan(
        model,
        variant.config(task).method,
        variant.config(task),
        machine,
        world,
        bucket_mib=variant.bucket_mib,
        first_mib=predict.FIRST_MIB if variant.bucket_mib == DEFAULT_MIB else None,
    )
    steps = made.steps if variant.overlap else tuple(_late(step) for step in made.steps)
    seconds = lambda kind, nbytes: lines[kind].seconds(kind, nbytes, world) if world > 1 else 0.0  # noqa: E731
    found = [play(made.forward_s, step, seconds) for step in steps]
    keys = [field.name for field in dataclasses.fields(Timeline)]
    return Timeline(**{key: sum(getattr(each, key) for each in found) / len(found) for key in keys})


def _late(step: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """The same, all gradients of which are there at once."""
    whole = sum(bucket.backward_s for bucket in step)
    return tuple(dataclasses.replace(bucket, backward_s=0.0 if i else whole) for i, bucket in enumerate(step))
