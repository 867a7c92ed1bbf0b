"""What training a model under any combination of techniques costs: measured, predicted, and which one to choose.

    from llmsys import compose, schema
    from llmsys.bench import Techniques
    from llmsys.bench.advise import answer
    from llmsys.bench.predict import predict

    asked = schema.build(compose.compose(["+exp=bench_advise", "model=llama2_13b", "hardware=rtx4090x8"]))
    answer(asked, predict).choice

The paper is arXiv 2311.03687. Each folder here is one question; nothing heavy is imported before it is asked, and the
names are resolved late (PEP 562). `predict` itself is the name of a folder, and of what that folder is for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsys import lazy

if TYPE_CHECKING:
    from llmsys.bench.advise.ranking import Answer, answer
    from llmsys.bench.predict.machine import Machine
    from llmsys.bench.predict.prediction import Prediction
    from llmsys.bench.techniques import Techniques

_HOMES = {
    "Answer": "advise.ranking",
    "Machine": "predict.machine",
    "Prediction": "predict.prediction",
    "Techniques": "techniques",
    "answer": "advise.ranking",
}
"""Name -> module."""

__all__ = ["Answer", "Machine", "Prediction", "Techniques", "answer"]

__getattr__ = lazy.attributes(__name__, _HOMES)
