"""The methods by name, each one class with one method of its own (`method.Method`)."""

from __future__ import annotations

from llmsys.compress.config import CompressConfig
from llmsys.compress.methods.dense import Dense
from llmsys.compress.methods.efsign import EFSign
from llmsys.compress.methods.lowrank import ACPSGD, PowerSGD
from llmsys.compress.methods.method import Method
from llmsys.compress.methods.sign import Sign
from llmsys.compress.methods.sparse import RandomK, TopK

_CLASSES: dict[str, type[Method]] = {
    "none": Dense,
    "fp16": Dense,
    "bf16": Dense,
    "sign": Sign,
    "efsign": EFSign,
    "topk": TopK,
    "randomk": RandomK,
    "powersgd": PowerSGD,
    "acpsgd": ACPSGD,
}


def method(config: CompressConfig) -> Method:
    made: Method = _CLASSES[config.method](config)  # type: ignore[call-arg]
    return made
