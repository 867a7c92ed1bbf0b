"""How much of its memory's bandwidth a server reaches, in a load: what is read and written at least, over the time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmsys import schema
from llmsys.bench.serve import work
from llmsys.bench.serve.outcome import OK, Outcome
from llmsys.bench.serve.predict import Batching


def share(outcomes: Sequence[Outcome], model: schema.Transformer, how: Batching | None) -> float:
    """Bytes a second that a load needs at least (`work`).

    Weights are read once in each pass. There are no fewer passes than prompts need by `how`, where that is known, and
    than there are steps of decoding, with as many sequences as were under way on average while any was between its
    first and last token (Little's law); a pass but the first may do both, unless batches are static. All else is read
    and written for each sequence. A lower bound: a server that batches less reads its weights more often.
    """
    good = [each for each in outcomes if each.status == OK]
    if not good:
        return 0.0
    weights = work.whole(work.by_row(model, 0, 1)).nbytes
    span = max(each.end_s for each in good) - min(each.sent_s for each in good)
    total = sum(work.whole(work.by_row(model, 1, each.tokens_in)).nbytes - weights for each in good)
    static = how is not None and how.static
    tokens = sum(each.tokens_in for each in good)
    reads = math.ceil(0 if how is None else len(good) / how.sequences if static else tokens / how.tokens)
    steps, decodes = sum(each.tokens_out - 1 for each in good), 0.0
    if steps:
        decoding = _covered([(each.token_s[0], each.token_s[-1]) for each in good])
        under_way = sum(each.token_s[-1] - each.token_s[0] for each in good) / decoding if decoding else len(good)
        decodes = steps / max(1.0, under_way)
        before = round(sum(each.tokens_in + each.tokens_out / 2 for each in good) / len(good))
        total += steps * (work.whole(work.by_row(model, 1, 1, before)).nbytes - weights)
    return (total + weights * (reads + decodes if static else max(reads, decodes + 1))) / span


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds in which at least one of them is."""
    total, until = 0.0, -math.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total
