"""Parameter counts: the published numbers, and the models that are really built."""

import subprocess
import sys
from pathlib import Path

import pytest

from llmsys import schema
from llmsys.cost import num_params
from llmsys.cost.shapes import parameters

CONF = Path(__file__).parents[2] / "conf" / "model"
PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "minilm_l6": 22_565_376,  # the encoder as used here; with the pooler that its file also carries 22,713,216
    "llama_6m": 5_701_376,
    "llama_85m": 85_445_376,
    "llama_tiny": 141_632,
}


def read(name: str) -> schema.Model:
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    assert isinstance(plain, dict)
    plain.pop("defaults")
    return schema.Model(**{str(key): value for key, value in plain.items()})


@pytest.mark.parametrize("name", PUBLISHED)
def test_count_is_the_published_one(name: str) -> None:
    assert num_params(read(name)) == PUBLISHED[name]


def test_every_model_is_listed_here() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(PUBLISHED)


def test_the_pooler_is_the_difference_to_minilms_other_published_count() -> None:
    minilm = read("minilm_l6")
    assert num_params(minilm) + minilm.hidden_size * (minilm.hidden_size + 1) == 22_713_216


@pytest.mark.parametrize("name", PUBLISHED)
def test_built_model_has_these_parameters_by_name(name: str) -> None:
    from llmsys.models.build import skeleton

    cfg = read(name)
    labels = 11 if cfg.family == "bert" else 0
    built = skeleton(cfg, num_labels=labels)
    assert {key: value.numel() for key, value in built.named_parameters()} == parameters(cfg, labels)
    assert {value.device.type for value in built.parameters()} == {"meta"}


def test_tied_embeddings_count_once() -> None:
    from llmsys.models.build import skeleton

    tied = schema.Model(tie_embeddings=True)
    assert num_params(schema.Model()) - num_params(tied) == tied.vocab_size * tied.hidden_size
    assert sum(value.numel() for value in skeleton(tied).parameters()) == num_params(tied)


def test_cost_imports_no_torch() -> None:
    # it answers before anything is loaded, in the parent process and in `--help`
    code = "import sys, llmsys.cost; sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
