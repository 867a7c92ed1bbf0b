"""MMLU and GSM8K of a base model with an adapter, by EleutherAI's lm-eval harness, from files on this machine.

    pip install 'llmsys[evals]'
    python benchmarks/lorafa_lm_eval.py --base /models/Llama-2-7b-hf --data /data --tasks mmlu gsm8k \\
        --adapter results/lorafa_llama7b/<run id>/weights

The paper (arXiv 2308.03303) tunes LLaMA-7B on Alpaca and FLAN and asks MMLU, 5 examples before each question; its
second version tunes LLaMA-2-7B on MetaMath and asks GSM8K too. A run of `lorafa_llama7b` leaves the adapter.

`--adapter` is a folder with our `adapter.safetensors`, or with peft's `adapter_model.safetensors`; it is merged into
the base before the questions. Without it the base is asked. Prompts, examples and metrics are those that the harness
has for the task; only where the questions come from is replaced: by the parquet files of the published data sets,

    <data>/gsm8k/main/{train,test}*.parquet       hf download --repo-type dataset openai/gsm8k --local-dir <data>/gsm8k
    <data>/mmlu/<subject>/{dev,test}*.parquet     hf download --repo-type dataset cais/mmlu --local-dir <data>/mmlu

Nothing is fetched while it runs. The scores go into a record, `<out>/lorafa_lm_eval/<id>/record.json`.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsys.job import Record, code_hash

if TYPE_CHECKING:
    from torch import nn

NAME = "lorafa_lm_eval"
OURS, PEFTS = "adapter.safetensors", "adapter_model.safetensors"
SUFFIX = "_here"
"""Ends the names of tasks whose questions are local."""
SUBTASKS = "mmlu_{}"
DTYPES = ("bfloat16", "float32", "auto")


def files(folder: Path, splits: Sequence[str]) -> dict[str, list[str]]:
    """Split -> its parquet files in `folder`. ValueError names the split that has none."""
    found = {split: sorted(map(str, folder.glob(f"{split}*.parquet"))) for split in splits}
    for split, paths in found.items():
        if not paths:
            raise ValueError(f"--data: {folder}/{split}*.parquet: no such file; --help has the command that gets it")
    return found


def local(task: str, base: str, folder: Path, splits: Sequence[str]) -> dict[str, Any]:
    """The harness's own task of the file `base`, under a new name and with its questions from `folder`."""
    return {
        "include": base,
        "task": task + SUFFIX,
        "task_alias": task,
        "tag": [],
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files(folder, splits)},
    }


def tasks(name: str, data: Path) -> list[dict[str, Any]]:
    """The tasks of `name` (gsm8k or mmlu), each as its YAML file holds it; MMLU's with the group that joins them."""
    import lm_eval.tasks

    known = Path(lm_eval.tasks.__file__).parent
    if name == "gsm8k":
        return [local(name, str(known / "gsm8k" / "gsm8k.yaml"), data / name / "main", ("train", "test"))]
    there = {path.stem.removeprefix("mmlu_"): path for path in sorted((known / "mmlu" / "default").glob("mmlu_*.yaml"))}
    subjects = sorted(path.name for path in (data / name).glob("*") if path.name in there)
    if not subjects:
        raise ValueError(f"--data: {data / name}: no folder of a subject; --help has the command that gets them")
    made = [local(SUBTASKS.format(s), str(there[s]), data / name / s, ("dev", "test")) for s in subjects]
    whole = {"group": name + SUFFIX, "task": [each["task"] for each in made]}
    return [*made, {**whole, "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}]


def load(base: str, adapter: str | None, dtype: str, device: str) -> nn.Module:
    """The base, an adapter of ours or of peft's merged into it. ValueError for a folder that has neither."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, local_files_only=True).to(device)
    if adapter is None:
        return model.eval()
    from llmsys import lorafa

    if (Path(adapter) / OURS).is_file():
        lorafa.load_adapter(model, adapter)
    elif (Path(adapter) / PEFTS).is_file():
        lorafa.from_peft(model, adapter)
    else:
        raise ValueError(f"--adapter={adapter}: holds neither {OURS} nor {PEFTS}")
    lorafa.merge(model)
    return lorafa.unload(model).eval()


def evaluate(model: nn.Module, tokenizer: Any, names: Sequence[str], asked: argparse.Namespace) -> dict[str, float]:
    """`<task>/<metric>` -> score, those of MMLU's subjects too."""
    import lm_eval
    import yaml
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    wrapped = HFLM(model, tokenizer=tokenizer, batch_size=asked.batch, max_length=asked.length)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for each in tasks(name, Path(asked.data).resolve()):
                path = Path(folder) / f"{each.get('group', each['task'])}.yaml"
                path.write_text(yaml.safe_dump(each))
        found = lm_eval.simple_evaluate(
            wrapped,
            tasks=[name + SUFFIX for name in names],
            num_fewshot=asked.shots,
            limit=asked.limit,
            bootstrap_iters=0,
            log_samples=False,
            task_manager=TaskManager(include_path=folder),
        )
    return dict(scores({**found.get("groups", {}), **found["results"]}))


def scores(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The harness's `{task: {"acc,none": 0.5, "acc_stderr,none": ...}}` flattened: `{"mmlu/acc": 0.5}`. A filter other
    than `none` stays in the name."""
    flat = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, name = key.partition(",")
            if isinstance(value, int | float) and name and "stderr" not in metric:
                flat[f"{task.removesuffix(SUFFIX)}/{metric}" + ("" if name == "none" else f"/{name}")] = float(value)
    return flat


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a folder in Hugging Face's format, tokenizer included")
    parser.add_argument("--adapter", help="a folder with an adapter, ours or peft's")
    parser.add_argument("--tasks", nargs="+", choices=("mmlu", "gsm8k"), default=["mmlu", "gsm8k"])
    parser.add_argument("--data", required=True, help="the folder with gsm8k/ and mmlu/")
    parser.add_argument("--shots", type=int, default=5, help="worked examples before each question (the paper: 5)")
    parser.add_argument("--limit", type=int, help="only so many questions of a task, to try things")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, help="of a prompt, in tokens (default: the model's own)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("LLMSYS_RESULTS", "results")))
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> Record:
    """Asks, writes the record, prints its scores, and returns it."""
    asked = arguments(argv)
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # before the libraries read them
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError:
        raise LookupError("lm_eval is missing: pip install 'llmsys[evals]'") from None
    from transformers import AutoTokenizer

    from llmsys.profile import environment

    for name in asked.tasks:  # what is missing is said before anything is loaded
        tasks(name, Path(asked.data).resolve())
    began, start = datetime.datetime.now(datetime.UTC), time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(asked.base, local_files_only=True)
    found = evaluate(load(asked.base, asked.adapter, asked.dtype, asked.device), tokenizer, asked.tasks, asked)
    config = {key: value for key, value in vars(asked).items() if key not in ("out", "device", "data")}
    record = Record(
        name=NAME,
        run_id=hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12],
        task="benchmark",
        status="ok",
        config=config,
        env=environment.describe(asked.device.partition(":")[0], 1),
        code_hash=code_hash(),
        started=began.isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - start, 1),
        summary=found,
    )
    record.leave(asked.out)
    for key, value in found.items():
        print(f"{key:40} {100 * value:6.2f} %")
    return record


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, LookupError) as error:
        sys.exit(f"lorafa_lm_eval: {error}")
