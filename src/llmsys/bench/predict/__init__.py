"""`bench_predict`: memory by phase and the time of a step, by arithmetic on a config, without torch.

    python -m llmsys +exp=bench_predict model=llama2_70b hardware=a800x8 techniques=Z3+O+R

    from llmsys import compose, schema
    from llmsys.bench.predict import predict

    predict(schema.build(compose.compose(["+exp=bench_predict", "hardware=h100x8", "techniques=F+Z3"]))).fits

`machine` says what a machine has, `speeds` how fast it runs operators, `lines` what joins its ranks, `steps` what a
step takes of all these, `prediction` what a config needs, `tables` prints it. `calibrate` measures the speeds of the
machine at hand. The public names are resolved late (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsys import lazy

if TYPE_CHECKING:
    from llmsys.bench.predict.machine import Machine
    from llmsys.bench.predict.prediction import Prediction, predict

_HOMES = {"Machine": "machine", "Prediction": "prediction", "predict": "prediction"}
"""Name -> module."""

__all__ = ["Machine", "Prediction", "predict"]

__getattr__ = lazy.attributes(__name__, _HOMES)
