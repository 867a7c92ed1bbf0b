"""Parameter counts: the published numbers, and the models that are really built."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmsys import schema
from llmsys.cost import Case, num_params, shapes

TRAIN, LOCAL = schema.Train(), schema.Engine()
CONF = Path(__file__).parents[2] / "conf" / "model"
PUBLISHED = {
    "bert_base": 109_482_240,  # transformers' BertModel; as pre-trained, with its two heads, 110.1 M
    "bert_large": 335_141_888,
    "bert_tiny": 157_632,
    "gpt2": 124_439_808,
    "gpt2_tiny": 153_344,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "gpt3_175b": 174_604_259_328,
    "llama3_8b": 8_030_261_248,
    "llama_6m": 5_701_376,
    "llama_85m": 85_445_376,
    "llama_tiny": 141_632,
    "minilm_l6": 22_565_376,  # the encoder as used here; with the pooler that its file also carries 22,713,216
    "resnet18_cifar": 11_173_962,
    "resnet50": 25_557_032,
    "resnet152": 60_192_808,
    "resnet_tiny": 19_994,
    "roberta_base": 124_055_040,  # the encoder without a pooler, which its own head does without
    "roberta_large": 354_310_144,
    "roberta_tiny": 153_536,
    "t5_small": 60_506_624,
    "t5_4m": 4_194_816,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_tiny": 250_880,
    "vgg16_cifar": 14_728_266,
    "vgg_tiny": 14_826,
}


def read(name: str) -> Any:
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    assert isinstance(plain, dict)
    plain.pop("defaults")
    return schema.SCHEMAS["model"][plain["kind"]](**{str(key): value for key, value in plain.items()})


@pytest.mark.parametrize("name", PUBLISHED)
def test_count_is_the_published_one(name: str) -> None:
    assert num_params(read(name)) == PUBLISHED[name]


def test_every_model_is_listed_here() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(PUBLISHED)


def test_the_pooler_is_the_difference_to_minilms_other_published_count() -> None:
    minilm = read("minilm_l6")
    assert num_params(minilm) + minilm.hidden_size * (minilm.hidden_size + 1) == 22_713_216


@pytest.mark.parametrize("name", PUBLISHED)
def test_built_model_has_these_parameters_blocks_and_linear_layers_by_name(name: str) -> None:
    """Also with an adapter's choice among the layers; buffers by their bytes."""
    from llmsys.models import linear_names, surgery
    from llmsys.models.build import skeleton

    cfg = read(name)
    labels = 11 if cfg.objective == "classification" else 0
    built = skeleton(cfg, num_labels=labels)
    table = shapes.parameters(cfg, labels)
    assert {key: tuple(value.shape) for key, value in built.named_parameters()} == table
    assert {value.device.type for value in built.parameters()} == {"meta"}
    assert shapes.blocks(cfg) == [block for block, _ in surgery.blocks(built)]
    plain = Case(cfg, TRAIN, schema.Method(), LOCAL)
    assert shapes.buffer_bytes(plain) == sum(buffer.nbytes for buffer in built.buffers())
    if cfg.objective != "images":
        assert [layer.name for layer in shapes.linears(cfg)] == linear_names(built, [])
        target = shapes.linears(cfg)[-1].name.rsplit(".", 1)[-1]
        adapters = shapes.adapted(Case(cfg, TRAIN, schema.Adapter(kind="lora_peft", targets=[target]), LOCAL))
        assert [layer.name for layer in adapters] == linear_names(built, [target])


def test_tied_embeddings_count_once() -> None:
    from llmsys.models.build import skeleton

    tied = schema.Transformer(tie_embeddings=True)
    assert num_params(schema.Transformer()) - num_params(tied) == tied.vocab_size * tied.hidden_size
    assert sum(value.numel() for value in skeleton(tied).parameters()) == num_params(tied)


def test_cost_imports_no_torch() -> None:
    # it answers before anything is loaded, in the parent process and in `--help`
    code = "import sys, llmsys.cost; sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
