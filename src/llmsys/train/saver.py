"""A run's checkpoints: what is in them, which are kept (the last and the best), and which one a run goes on from.

On the way they lie in `checkpoint/`, from where the same command goes on. A finished run has none there, or it would
not begin at its beginning when it is made again; where it is to be saved (`train.save_final`) and has taken any, its
state after the last step lies in `last/`, from where another run goes on (`train.resume`).

Tensors are stored whole, by name: `model/<name>` of what the method trains, and `optimizer/<key>/<name>`. So a
checkpoint of two ranks is read by one, and one of an engine by another (`train.resume`). Random streams are each
rank's own; on another number of ranks they begin anew, which changes dropout and nothing else. What gradient
compression keeps is each rank's own too: `compress/<rank>/<name>`; all ranks' go into those of another number.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from llmsys import schema
from llmsys.comm import collectives
from llmsys.train import checkpoint, reproducible
from llmsys.train.methods import copy_into, fit, trainable
from llmsys.train.watch import Watch

if TYPE_CHECKING:
    from llmsys.context import Context
    from llmsys.models.filling import Filler


LAST = "last"
"""The folder, in that of a finished run, of its last checkpoint."""


class Saver:
    """Finds, loads and writes the checkpoints of one run. Everything here is collective."""

    def __init__(self, config: schema.Config, context: Context, watch: Watch) -> None:
        self.config, self.context, self.watch = config, context, watch
        self.folder = context.out / "checkpoint"
        self.start = 0
        """The step that was done last when this attempt began; 0: none."""
        self.best_step, self.best_loss = 0, math.inf
        self._reader: checkpoint.Reader | None = None

    def find(self) -> None:
        """Looks for the newest checkpoint of this run, or, where there is none, takes the one of `train.resume`.

        One that is damaged is passed over for the one before. Where none serves, as all were made by other code, they
        are set aside with a warning, and training begins at step 0. Rank 0 decides for all.
        """
        context = self.context
        path = self._newest() if context.place.rank == 0 else None
        step = collectives.agree(int(path.name.removeprefix("step-")) if path else 0, context.device)
        own = self.folder / f"step-{step:08d}"
        if not step and not self.config.train.resume:
            return
        source = own if step else Path(context.inputs["resume"])
        self._reader = checkpoint.Reader(source, context.place.rank) if step else self._given(source)
        self.start = int(self._reader.shared["step"])
        self.watch.load_state(self._reader.shared["watch"])
        if step:
            self.best_step, loss = self._reader.shared["best"]
            self.best_loss = math.inf if loss is None else loss
        context.log.info("resuming from step %d of %s, written by %d ranks", self.start, source, self._reader.world)

    def _newest(self) -> Path | None:
        """The latest of this run's checkpoints that can be gone on from."""
        candidates = checkpoint.found(self.folder)
        for path in candidates:
            try:
                reader = checkpoint.Reader(path, 0)
                self._check(reader)
                reader.verify()
            except ValueError as error:
                self.context.log.warning("%s", error)
            else:
                return path
        if candidates:
            aside = checkpoint.set_aside(self.folder)
            self.context.log.warning("checkpoints set aside as %s; training begins at step 0", aside.name)
        return None

    def _given(self, source: Path) -> checkpoint.Reader:
        """Another run's checkpoint."""
        try:
            reader = checkpoint.Reader(source, self.context.place.rank)
            reader.verify()
        except ValueError as error:
            raise checkpoint.not_gone_on_from(str(self.config.train.resume), source, error) from error
        return reader

    @property
    def keeps_last(self) -> bool:
        """Whether the run's state after its last step is kept."""
        return bool(self.config.train.checkpoint_every) and self.config.train.save_final

    def load_model(self, model: nn.Module, fill: Filler | None = None) -> None:
        """Copies the checkpoint's weights into the model, in place, before an engine takes it over. Parameters that
        have no values yet will get theirs from it when `fill` fills them."""
        if self._reader is None:
            return
        wanted = self.context.method.state(model)
        later = {name for name, tensor in wanted.items() if tensor.is_meta}
        if not later:
            self.context.method.load_state(model, self._reader.all("model"))
            return
        assert fill is not None
        fit(wanted, self._reader.lazily({name: f"model/{name}" for name in self._reader.names("model")}))
        fill.prefer(self._reader.lazily({name: f"model/{name}" for name in later}))
        now = wanted.keys() - later
        copy_into({name: wanted[name] for name in now}, {name: self._reader.get(f"model/{name}") for name in now})

    def load_rest(self, model: nn.Module) -> None:
        """Puts back the optimizer's state and the random streams, when the engine has the model."""
        reader = self._reader
        if reader is None:
            return
        keys = {name.partition("/")[0] for name in reader.names("optimizer")}
        self.context.engine.set_moments(
            {
                parameter: reader.lazily({key: f"optimizer/{key}/{name}" for key in keys})
                for name, parameter in trainable(model).items()
                if f"optimizer/step/{name}" in reader
            }
        )
        rank = self.context.place.rank
        if reader.world == self.context.place.world:
            reproducible.set_streams(reader.all(f"random-{rank}"), reader.plain["random"])
        else:
            self.context.log.info("written by %d ranks: random streams (dropout) begin anew", reader.world)
        self._load_sync(reader)
        self._reader = None

    def _load_sync(self, reader: checkpoint.Reader) -> None:
        """Puts back what the gradient synchroniser keeps, where both the writer of the checkpoint and this run have
        some."""
        sync, log = self.context.grad_sync, self.context.log
        plain = [reader.plain_of(rank).get("compress", {}) for rank in range(reader.world)]
        _, keeps = sync.state()
        if keeps and all(plain):
            names = [reader.names(f"compress/{rank}") for rank in range(reader.world)]
            sync.load_state(
                [
                    (reader.lazily({name: f"compress/{rank}/{name}" for name in own}), values)
                    for rank, (own, values) in enumerate(zip(names, plain, strict=True))
                ]
            )
        elif keeps:
            log.warning("%s: made without gradient compression, whose memories begin empty", reader.path)
        elif any(plain):
            log.warning("%s: made with gradient compression; what was not sent yet is left out", reader.path)

    def _check(self, reader: checkpoint.Reader) -> None:
        """ValueError if a checkpoint is not of this code and run, or if rows of its metrics are gone."""
        wanted = {"code_hash": self.context.code_hash, "run_id": self.context.out.name}
        for key, value in wanted.items():
            if reader.shared.get(key) != value:
                raise ValueError(f"{reader.path}: of another {key}")
        found = self.context.metrics.count(reader.shared["step"])
        if found != reader.shared["metric_rows"]:
            rows = f"{found} rows up to the checkpoint, not {reader.shared['metric_rows']}"
            raise ValueError(f"{self.context.metrics.path}: {rows}")

    def better(self, step: int, loss: float) -> bool:
        """Whether this validation loss is the lowest so far; then it is remembered as the best step's."""
        if loss < self.best_loss:
            self.best_step, self.best_loss = step, loss
            return True
        return False

    def save(self, step: int, model: nn.Module) -> None:
        """Writes everything that the steps after `step` depend on; leaves this checkpoint and the best one's."""
        self._save(self.folder, step, model, keep=[self.best_step])

    def save_last(self, step: int, model: nn.Module) -> None:
        """The same after the last step, apart."""
        self._save(self.context.out / LAST, step, model, keep=[])

    def _save(self, folder: Path, step: int, model: nn.Module, keep: list[int]) -> None:
        context = self.context
        rank, world = context.place.rank, context.place.world
        share = {}
        for number, (name, tensor) in enumerate(self._tensors(model)):
            if number % world == rank:
                share[name] = tensor.cpu()
        sync_tensors, sync_plain = context.grad_sync.state()
        share |= {f"compress/{rank}/{name}": tensor.cpu() for name, tensor in sync_tensors.items()}
        random_tensors, random_plain = reproducible.streams()
        share |= {f"random-{rank}/{name}": tensor for name, tensor in random_tensors.items()}
        shared = {
            "code_hash": context.code_hash,
            "run_id": context.out.name,
            "metric_rows": context.metrics.count(step) if rank == 0 else 0,
            "watch": self.watch.state(),
            "best": [self.best_step, self.best_loss if self.best_step else None],
        }
        checkpoint.save(
            folder,
            step,
            share,
            {"random": random_plain, **({"compress": sync_plain} if sync_plain else {})},
            shared,
            device=context.device,
            keep=keep,
        )

    def _tensors(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of a checkpoint, whole, in the same order on all ranks."""
        engine = self.context.engine
        engine.settle()
        for name, tensor in self.context.method.state(model).items():
            yield f"model/{name}", engine.full(tensor)
        for name, parameter in trainable(model).items():
            for key, tensor in engine.moments(parameter).items():
                yield f"optimizer/{key}/{name}", tensor

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """What the method's run leaves, whole, on the host of rank 0; {} on the others."""
        found = {}
        self.context.engine.settle()
        for name, tensor in self.context.method.state(model).items():
            tensor = self.context.engine.full(tensor)
            if self.context.place.rank == 0:
                found[name] = tensor.cpu()
        return found

    def finish(self, steps: int) -> dict[str, str]:
        """Removes checkpoints at the end of a run; the best one, if an earlier step was better, becomes `best`."""
        out, best = self.context.out, self.folder / f"step-{self.best_step:08d}"
        kept = 0 < self.best_step < steps and best.is_dir()
        if self.context.place.rank == 0:
            if (out / "best").is_dir():
                shutil.rmtree(out / "best")  # an earlier attempt's
            if kept:
                best.rename(out / "best")  # elsewhere than what a run resumes from
            checkpoint.remove(self.folder)
        files = {"best_checkpoint": "best"} if kept else {}
        return {**files, "last_checkpoint": LAST} if self.keeps_last else files
