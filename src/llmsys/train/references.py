"""What fine-tuning has to beat: two classifiers in closed form, without the loop.

`majority` always says the most frequent class of the training split. `probe` is a logistic regression on the frozen
model's mean-pooled features, which tells how much the pre-training alone already knows.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from llmsys import schema
from llmsys.profile.memory import num_bytes
from llmsys.train.evaluate import autocast, by_length, scores

if TYPE_CHECKING:
    from llmsys.context import Context
    from llmsys.data import Dataset, Source, Split


MAX_ITERATIONS = 10_000
STRENGTHS = [1.0, 0.1, 0.01, 0.001, 0.0001]
"""sklearn's C, the inverse of the L2 penalty."""
FOLDS = 3


class Reference:
    """A `Method` that trains no weight of the model, so there is nothing to checkpoint or to save."""

    def prepare(self, model: nn.Module) -> nn.Module:
        return model.requires_grad_(False)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        return {}

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        assert not state

    def save(self, state: dict[str, Tensor], folder: Path, meta: dict[str, Any]) -> None:
        pass


class Majority(Reference):
    """The most frequent class of the training split, always (the smallest number among equals)."""

    def record(self, source: Source) -> dict[str, Any]:
        """What goes into the record; looks at no model."""
        counts = Counter(example.label for example in source.train)
        guess = max(sorted(counts), key=lambda label: counts[label])
        truth = [example.label for example in source.val]
        sizes = {"trainable_params": 0, "total_params": 0, "accounted_bytes": 0}
        return _record({**scores(truth, [guess] * len(truth)), **sizes})


class Probe(Reference):
    """Logistic regression, D features -> C classes, on features standardised over the training split."""

    def record(
        self, config: schema.Config, context: Context, model: nn.Module, dataset: Dataset, source: Source
    ) -> dict[str, Any]:
        """Fits on the whole training split and scores on the whole validation split.

        How much to regularise is chosen by cross-validation inside the training split, with folds that share no module,
        as validation shares none: at sklearn's default MiniLM's probe is 7 points worse (53 against 60 % on 12
        sub-packages), and a baseline that was not tuned flatters what is compared with it.
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, GroupKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model = self.prepare(model)
        x_train, y_train = features(config, context, model, dataset.train)
        x_val, y_val = features(config, context, model, dataset.val)
        modules = [example.origin for example in source.train]
        search = GridSearchCV(
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS)),
            {"logisticregression__C": STRENGTHS},
            cv=GroupKFold(min(FOLDS, len(set(modules)))),
        ).fit(x_train, y_train, groups=modules)
        regression = search.best_estimator_["logisticregression"]
        context.log.info("probe: C=%g chosen of %s", regression.C, STRENGTHS)
        head = int(regression.coef_.size + regression.intercept_.size)
        body = [p for name, p in model.named_parameters() if not name.startswith("classifier.")]
        weights = sum(num_bytes(p) for p in body) + head * x_train.itemsize
        sizes = {
            "trainable_params": head,
            "total_params": sum(p.numel() for p in body) + head,
            "weights_bytes": weights,
            "accounted_bytes": weights,
        }
        return _record({**scores(y_val.tolist(), search.predict(x_val).tolist()), **sizes})


def _record(summary: dict[str, float]) -> dict[str, Any]:
    return {"summary": summary, "samples": {}, "files": {}, "kernel": "", "resumed_from_step": None}


@torch.no_grad()
def features(config: schema.Config, context: Context, model: Any, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """(features [n, D] in fp64, labels [n]) of a whole split in its order, without dropout.

    Leaves the model in evaluation mode.
    """
    model.eval()
    rows: list[int] = []
    found, labels = [], []
    for indices in by_length(split, config.train.eval_batch):
        rows += indices
        batch = split.batch(indices, pad_to=None)
        labels.append(batch["labels"].numpy())
        with autocast(context.device, config.train.precision, config.model.dtype):
            pooled = model.features(batch["input_ids"].to(context.device), batch["attention_mask"].to(context.device))
        found.append(pooled.double().cpu().numpy())
        context.beat()
    back = np.argsort(rows)
    return np.concatenate(found)[back], np.concatenate(labels)[back]
