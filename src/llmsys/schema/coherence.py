"""What settings of different groups say to each other. Each rule is one line of error that names the key to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsys.errors import Contradiction
from llmsys.schema import recompute
from llmsys.schema.bench import Predicting
from llmsys.schema.data import OBJECTIVES
from llmsys.schema.decentral import Planning
from llmsys.schema.machine import OnRay
from llmsys.schema.measured import Iteration, Measured
from llmsys.schema.model import ConvNet, Transformer
from llmsys.schema.modules import Modules, Ops
from llmsys.schema.serve import HttpServer, Serve
from llmsys.schema.task import Ledger, Simulate
from llmsys.schema.together import DecentralAttack, DecentralGenerate, Together
from llmsys.schema.train import CLOSED_FORM, Adapter, DeepSpeed, LoRA, accumulation, data_world

if TYPE_CHECKING:
    from llmsys.schema import Config

WITH_VOCABULARY = ("causal_lm", "seq2seq")
TP_FAMILIES = ("llama", "bert", "roberta")
WHOLE_MODELS = ("local", "ddp")
"""Engines that leave each rank's modules as they are."""
CUT_FAMILIES = ("llama", "bert", "roberta", "t5")
"""Whose blocks can keep less than they do without keeping nothing: see `schema.recompute`."""


def check(config: Config) -> None:
    """Raises Contradiction, a ValueError, for the first pair of settings that cannot go together."""
    try:
        _check(config)
    except ValueError as error:
        raise Contradiction(str(error)) from None


def _check(config: Config) -> None:
    inline = config.dispatch.kind == "inline" and not isinstance(config.task, Predicting)
    if inline and config.dispatch.memory_gib is not None:
        raise ValueError("dispatch.memory_gib: needs dispatch=process; a living process cannot be limited for a time")
    if inline and config.train.world > 1:
        raise ValueError(f"train.world={config.train.world}: needs dispatch=process; dispatch=inline is one process")
    _placement(config)
    _model(config)
    _data(config)
    _method(config)
    _recompute(config)
    _engine(config)
    _compress(config)
    _network(config)
    _answered(config)
    _ledger(config)
    _simulate(config)
    _measured(config)
    _modules(config)
    _together(config)


def _placement(config: Config) -> None:
    dispatch, world = config.dispatch, config.train.world
    if isinstance(dispatch, OnRay) and dispatch.nodes and world % dispatch.nodes:
        raise ValueError(f"dispatch.nodes={dispatch.nodes}: must share the train.world={world} ranks evenly")


def _model(config: Config) -> None:
    model, train = config.model, config.train
    if model.dtype == "bf16" and train.precision == "fp32":
        raise ValueError("train.precision=fp32: with model.dtype=bf16 it must be bf16")
    if isinstance(model, Transformer) and train.length > model.max_length:
        raise ValueError(f"train.length={train.length}: model {model.name} takes at most {model.max_length}")
    if isinstance(model, Transformer) and not model.plain and not isinstance(config.task, Predicting):
        raise ValueError(f"model.name={model.name}: a shape that is not built here, only predicted: +exp=bench_predict")
    if isinstance(model, ConvNet) and train.recompute != "none":
        raise ValueError(f"train.recompute={train.recompute}: is for transformers, not for model {model.name}")
    if train.loss == "chunked" and model.objective not in WITH_VOCABULARY:
        raise ValueError(f"train.loss=chunked: is for a head over a vocabulary, and model {model.name} has classes")
    if train.loss == "chunked" and config.engine.kind == "tp":
        raise ValueError("train.loss=chunked: needs a head that is whole, and engine=tp cuts it: train.loss=whole")


def _data(config: Config) -> None:
    """Of tasks that read any."""
    model, data = config.model, config.data
    if isinstance(config.task, (Ledger, Ops, Planning, Predicting)):
        return
    if model.objective not in OBJECTIVES[data.kind]:
        fitting = [kind for kind, objectives in OBJECTIVES.items() if model.objective in objectives]
        raise ValueError(
            f"data.kind={data.kind}: model {model.name} ({model.family}) trains {model.objective}: "
            f"use data={' or data='.join(fitting)}"
        )
    if data.kind == "hub" and model.objective not in _served(data.columns):
        raise ValueError(f"data.columns={data.columns}: model {model.name} ({model.family}) trains {model.objective}")


def _served(columns: dict[str, str]) -> tuple[str, ...]:
    if "label" in columns:
        return ("classification",)
    return ("causal_lm",) if "text" in columns else ("causal_lm", "seq2seq")


def _method(config: Config) -> None:
    model, method = config.model, config.method
    if isinstance(method, Adapter) and isinstance(model, ConvNet):
        raise ValueError(f"method.kind={method.kind}: adapters are for transformers, not for model {model.name}")
    if model.quant != "none" and method.kind in CLOSED_FORM:
        raise ValueError(f"model.quant={model.quant}: is for training, and method={method.kind} trains no weight of it")
    if model.quant != "none" and isinstance(model, ConvNet):
        raise ValueError(f"model.quant={model.quant}: is for transformers, not for model {model.name}")
    if model.quant != "none" and model.family == "gpt2":
        raise ValueError(f"model.quant={model.quant}: is for linear layers, and those of model {model.name} are Conv1D")
    if method.kind in CLOSED_FORM and (model.objective != "classification" or config.train.world != 1):
        raise ValueError(f"method.kind={method.kind}: is for classification on one rank")


def _recompute(config: Config) -> None:
    model, method, text = config.model, config.method, config.train.recompute
    within = [policy for policy in recompute.named(text) if policy in recompute.WITHIN]
    if within and not isinstance(method, LoRA):
        raise ValueError(
            f"train.recompute={text}: {within[0]} needs method=lora or lorafa, not {method.kind}; or block"
        )
    if within and model.family not in CUT_FAMILIES:
        raise ValueError(f"train.recompute={text}: {within[0]} is for {', '.join(CUT_FAMILIES)}, not for {model.name}")
    if isinstance(model, Transformer) and text != "auto":
        recompute.policies(text, model.num_layers * (2 if model.family == "t5" else 1))
    if isinstance(method, LoRA) and config.engine.kind == "tp":
        raise ValueError(
            f"method.kind={method.kind}: engine=tp cuts the matrices that it reads: use {method.kind}_peft"
        )


def _engine(config: Config) -> None:
    train, engine, model = config.train, config.engine, config.model
    if engine.kind == "local" and train.world != 1:
        raise ValueError(f"train.world={train.world}: engine=local runs on one rank")
    shares = data_world(train, engine)
    if train.global_batch % (train.micro_batch * shares) or not accumulation(train, engine):
        raise ValueError(
            f"train.global_batch={train.global_batch}: must be a multiple of "
            f"micro_batch x world = {train.micro_batch} x {shares}"
        )
    if engine.kind == "tp":
        if model.family not in TP_FAMILIES:
            raise ValueError(f"engine.kind=tp: is for {', '.join(TP_FAMILIES)}, not for model {model.name}")
        assert isinstance(model, Transformer)
        for key in ("num_heads", "num_kv_heads", "intermediate_size"):
            if getattr(model, key) % train.world:
                raise ValueError(f"train.world={train.world}: must divide model.{key}={getattr(model, key)}")
    if model.quant != "none" and engine.kind == "tp":
        raise ValueError(
            f"model.quant={model.quant}: engine=tp cuts matrices, and packed ones must stay whole: engine=ddp"
        )
    shares_bf16 = model.dtype == "bf16" and (engine.kind == "fsdp2" or (isinstance(engine, DeepSpeed) and engine.zero))
    cuts = engine.kind == "fsdp2" or (isinstance(engine, DeepSpeed) and engine.zero == 3)
    if model.quant == "int8" and cuts:
        raise ValueError("model.quant=int8: its kernel reads whole weights, and this engine cuts them: model.quant=nf4")
    if isinstance(model, ConvNet) and shares_bf16:
        raise ValueError(
            f"model.dtype=bf16: batch norm stays in fp32, and engine={engine.kind} needs one dtype: "
            "model.dtype=fp32 train.precision=bf16"
        )
    if isinstance(engine, DeepSpeed) and engine.optimizer == "cpu_adam":
        on_host = config.hardware.device == "cpu" or engine.offload != "none"
        if config.hardware.device != "auto" and not on_host:
            raise ValueError("engine.optimizer=cpu_adam: works in host memory: engine.offload=optimizer")
    _optimizer(config)


def _optimizer(config: Config) -> None:
    """What `train.optimizer` and `train.fp8` go with."""
    train, engine, model = config.train, config.engine, config.model
    if train.optimizer == "adamw_8bit" and isinstance(engine, DeepSpeed):
        if engine.offload != "none":
            raise ValueError(
                f"train.optimizer=adamw_8bit: with engine.offload={engine.offload} moments are on the host"
            )
        if engine.optimizer != "torch":
            raise ValueError(f"engine.optimizer={engine.optimizer}: is another one than train.optimizer=adamw_8bit")
    if not train.fp8:
        return
    if isinstance(model, ConvNet) or model.family == "gpt2":
        raise ValueError(f"train.fp8=true: is for a transformer's linear layers, and model {model.name} has none")
    if model.quant != "none":
        raise ValueError(
            f"train.fp8=true: weights of model.quant={model.quant} are read back in bf16: model.quant=none"
        )
    if isinstance(config.method, LoRA):
        raise ValueError(
            f"train.fp8=true: method={config.method.kind} has products of its own: {config.method.kind}_peft"
        )
    if engine.kind == "tp":
        raise ValueError("train.fp8=true: engine=tp cuts matrices after their layers are made: engine=ddp")


def _compress(config: Config) -> None:
    """Where each rank has the whole gradient of its own examples when it is to be exchanged."""
    kind, engine = config.compress.kind, config.engine
    if kind == "none" or engine.kind == "ddp" or (isinstance(engine, DeepSpeed) and engine.zero < 2):
        return
    name = f"engine=deepspeed engine.zero={engine.zero}" if isinstance(engine, DeepSpeed) else f"engine={engine.kind}"
    why = {
        "local": "engine=local is one rank",
        "tp": "with engine=tp all ranks see the same examples and there is nothing to average",
    }.get(engine.kind, f"with {name} a rank keeps a part of the gradients only and they are cut as they are made")
    raise ValueError(f"compress.kind={kind}: {why}; use engine=ddp, or engine=deepspeed with engine.zero=0 or 1")


def _ledger(config: Config) -> None:
    if not isinstance(config.task, Ledger):
        return
    model, method, train = config.model, config.method, config.train
    if not isinstance(model, Transformer) or model.family not in CUT_FAMILIES:
        raise ValueError(f"model.family={model.family}: the ledger is for {', '.join(CUT_FAMILIES)}")
    if method.kind != "lorafa" or not isinstance(method, LoRA):
        raise ValueError(f"method.kind={method.kind}: the ledger has all methods; method=lorafa says r and share_a")
    for key, value, only in (
        ("model.quant", model.quant, "none"),
        ("model.attention", model.attention, "sdpa"),
        ("method.targets", method.targets, []),
        ("train.recompute", train.recompute, "none"),
        ("engine.kind", config.engine.kind, "local"),
        ("train.precision", train.precision, model.dtype),
    ):
        if value != only:
            raise ValueError(f"{key}={value}: the ledger is for {key}={only}")
    if method.r > min(model.hidden_size, model.intermediate_size):
        raise ValueError(f"method.r={method.r}: exceeds the width of model {model.name}, {model.hidden_size}")


def _simulate(config: Config) -> None:
    if isinstance(config.task, Simulate) and config.hardware.name == "auto":
        raise ValueError("hardware.name=auto: a simulated cluster's device has a name, e.g. hardware=rtx2080ti")


def _measured(config: Config) -> None:
    """Both tasks attach what they compare to a DistributedDataParallel of their own."""
    task, model = config.task, config.model
    if not isinstance(task, Measured):
        return
    if config.engine.kind != "ddp":
        raise ValueError(f"engine.kind={config.engine.kind}: {task.kind} is for engine=ddp")
    if config.compress.kind != "none":
        raise ValueError(f"compress.kind={config.compress.kind}: what {task.kind} compares is task.methods")
    if isinstance(task, Iteration) and task.subject == "model" and model.objective != "causal_lm":
        raise ValueError(f"model.family={model.family}: task.subject=model is for causal language models")


def _modules(config: Config) -> None:
    task, engine = config.task, config.engine.kind
    if isinstance(task, Modules) and config.method.kind in CLOSED_FORM:
        raise ValueError(f"method.kind={config.method.kind}: takes no steps, and {task.kind} is about steps")
    if isinstance(task, (Modules, Ops)) and engine not in WHOLE_MODELS:
        raise ValueError(f"engine.kind={engine}: {task.kind} is for engine={' or engine='.join(WHOLE_MODELS)}")
    if isinstance(task, Ops) and not isinstance(config.model, Transformer):
        raise ValueError(
            f"model.family={config.model.family}: {task.kind} is for transformers, by whose shapes it goes"
        )


def _together(config: Config) -> None:
    """A traced graph of plain operators is what providers run, with the optimizer that they have."""
    model, train = config.model, config.train
    if isinstance(config.task, (DecentralGenerate, DecentralAttack)) and not (
        isinstance(model, Transformer) and model.objective == "causal_lm" and config.method.kind == "full"
    ):
        raise ValueError(f"{config.task.kind}: is for causal language models with method=full, e.g. model=llama_6m")
    if not isinstance(config.task, Together):
        return
    for key, value, only in (
        ("engine.kind", config.engine.kind, "local"),
        ("model.quant", model.quant, "none"),
        ("model.dtype", model.dtype, "fp32"),
        ("train.precision", train.precision, "fp32"),
        ("train.recompute", train.recompute, "none"),
        ("train.loss", train.loss, "whole"),
        ("train.optimizer", train.optimizer, "adamw"),
    ):
        if value != only:
            raise ValueError(f"{key}={value}: {config.task.kind} is for {key}={only}")
    if config.method.kind in CLOSED_FORM:
        raise ValueError(f"method.kind={config.method.kind}: takes no steps, and {config.task.kind} is about steps")


def _answered(config: Config) -> None:
    own = config.server
    if isinstance(config.task, Serve) and isinstance(own, HttpServer) and bool(own.url) == bool(own.command):
        raise ValueError("server: needs either server.url, of one that runs, or server.command, which starts one")


def _network(config: Config) -> None:
    shaped = config.network.up_mbit is not None and config.network.shape
    if shaped and config.dispatch.kind == "inline" and not isinstance(config.task, Predicting):
        raise ValueError("network.up_mbit: shaped links need dispatch=process; network.shape=false only predicts")
