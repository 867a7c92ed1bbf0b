"""What our DDP engine and loop cost over torch's DistributedDataParallel in a bare loop, two ranks on one machine.

    python benchmarks/ddp_overhead.py [--steps 200] [--warmup 10] [--out benchmarks/records] [llmsys overrides ...]

Ours is the whole run of `pretrain_llama_6m` on synthetic tokens with `engine=ddp train.world=2`, one process a rank,
gloo over the loopback. Beside DDP's own all-reduces a step of ours sums the label counts (and who was asked to stop)
and the loss over the ranks, so that the loss is the global batch's.

The peer takes its turns in the same processes and the same process group, with a model and a DDP of its own in the form
that is fastest (`gradient_as_bucket_view`, no broadcast of buffers): batches made beforehand, forward, `backward`,
`clip_grad_norm_`, fused AdamW, `zero_grad`, `loss.item()`, which is the rank's own loss. Times are rank 0's. That the
mean of the peer's losses over the ranks is ours, bit for bit, is asserted.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import side_by_side
from llmsys import schema
from loop_overhead import SETTINGS, Bare, Progress, arguments

WORLD = 2
SETTINGS_DDP = [*SETTINGS, "engine=ddp", f"train.world={WORLD}", "train.micro_batch=4"]


class BareDDP(Bare):
    """One rank of the loop that one would write by hand. Made within the run's process group."""

    def wrap(self, model: Any) -> Any:
        import inspect

        from torch.nn.parallel import DistributedDataParallel

        assert self.config.hardware.device == "cpu", "two ranks on one machine: hardware.device=cpu"
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # renamed in 2.13
        settings: dict[str, Any] = {"gradient_as_bucket_view": True, buffers: False}
        assert isinstance(self.config.engine, schema.DDP)
        return DistributedDataParallel(model, bucket_cap_mb=self.config.engine.bucket_mib, **settings)


def rank_main(rank: int, job: Any, pipe: Connection) -> None:
    """One rank: runs ours, with the peer in its pauses; sends [ours_ms, peer_ms, peer losses, record]."""
    import torch

    from llmsys import runner
    from llmsys.comm.place import LOOPBACK, Place, listen

    if rank == 0:
        listener, port = listen(LOOPBACK)
        pipe.send(port)
    else:
        listener, port = None, pipe.recv()
    place = Place(rank=rank, world=WORLD, store=(LOOPBACK, port), listener=listener)
    config = schema.build(job.config)
    torch.set_num_threads(config.train.threads)
    peer: list[BareDDP] = []

    def take_turn() -> None:
        if not peer:  # the process group is there only from our first step on; that pair is never counted
            peer.append(BareDDP(config, rank, WORLD))
        peer[0]()

    with Progress() as progress:
        turns = side_by_side.Turns(take_turn, told=progress)
        record = runner.run(job, turns, place=place)
    pipe.send((turns.ours_ms, turns.peer_ms, peer[0].losses if peer else [], record))


def main(words: Sequence[str]) -> Any:
    """Measures, writes the record, prints its table, and returns it."""
    from llmsys import compose, job
    from llmsys.track import jsonl

    asked = arguments(__doc__ or "", words)
    with tempfile.TemporaryDirectory() as folder:
        wanted = [*SETTINGS_DDP, f"train.steps={asked.steps}", f"results={folder}", *asked.overrides]
        run = job.make(compose.compose(wanted))
        answers = spawn(run)
        turns = side_by_side.Turns(lambda: None)
        turns.ours_ms, turns.peer_ms = answers[0][:2]
        result = side_by_side.finish(answers[0][3], "ddp_overhead", turns, asked.warmup, asked.out)
        ours = [row["loss"] for row in jsonl.read(Path(run.out) / "metrics.jsonl") if "loss" in row]
    assert ours == [sum(losses) / WORLD for losses in zip(*(answer[2] for answer in answers), strict=True)], (
        "the two do not compute the same thing"
    )
    print(side_by_side.show(result))
    return result


def spawn(run: Any) -> list[Any]:
    """What each rank of `run` sends, in their order; RuntimeError where one ends without a word."""
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(WORLD)]
    ranks = [context.Process(target=rank_main, args=(rank, run, ends[rank][1])) for rank in range(WORLD)]
    try:
        for rank, (_, theirs) in zip(ranks, ends, strict=True):
            rank.start()
            theirs.close()
        ends[1][0].send(ends[0][0].recv())  # rank 0's port
        return [ours.recv() for ours, _ in ends]
    except EOFError:
        raise RuntimeError("a rank ended without a word; its error is above") from None
    finally:
        for rank in ranks:
            rank.kill() if sys.exc_info()[0] else rank.join()


if __name__ == "__main__":
    main(sys.argv[1:])
