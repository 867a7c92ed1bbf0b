"""How much of its memory's bandwidth a server reaches, in a load: what is read and written at least, over the time."""

from __future__ import annotations

from collections.abc import Sequence

from llmsys import schema
from llmsys.bench.serve import work
from llmsys.bench.serve.outcome import OK, Outcome


def share(outcomes: Sequence[Outcome], model: schema.Transformer) -> float:
    """Bytes a second that prefills and decoding steps need at least (`work`). Each prompt is read alone; decoding steps
    have as many sequences as were under way on average between their first and last tokens (Little's law), each behind
    as many tokens as were there on average. A lower bound: a server that batches less reads its weights more often."""
    good = [each for each in outcomes if each.status == OK and each.token_s]
    if not good:
        return 0.0
    span = max(each.end_s for each in good) - min(each.sent_s for each in good)
    total = sum(work.whole(work.by_row(model, 1, each.input)).nbytes for each in good)
    steps = sum(len(each.token_s) - 1 for each in good)
    if steps:
        decoding = max(each.token_s[-1] for each in good) - min(each.token_s[0] for each in good)
        under_way = sum(each.token_s[-1] - each.token_s[0] for each in good) / decoding if decoding else len(good)
        batch = max(1, round(under_way))
        before = round(sum(each.input + len(each.token_s) / 2 for each in good) / len(good))
        total += steps / batch * work.whole(work.by_row(model, batch, 1, before)).nbytes
    return total / span
