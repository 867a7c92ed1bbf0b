"""MMLU and GSM8K of a tiny model from local files: the harness asks what it always asks, of the model with its adapter.

Needs lm-eval (`pip install 'llmsys[evals]'`), which CI's environment does not have.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
QUESTIONS = [{"question": f"What is {i}?", "choices": list("wxyz"), "answer": i % 4} for i in range(24)]


def test_scores_are_flattened() -> None:
    import lorafa_lm_eval

    found = {"mmlu_here": {"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": "mmlu", "sample_len": 4}}
    found["gsm8k_here"] = {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1, "alias": "gsm8k"}
    assert dict(lorafa_lm_eval.scores(found)) == {"mmlu/acc": 0.5, "gsm8k/exact_match/strict-match": 0.25}


def test_missing_data_is_named(tmp_path: Path) -> None:
    import lorafa_lm_eval

    (tmp_path / "gsm8k" / "main").mkdir(parents=True)
    (tmp_path / "gsm8k" / "main" / "train-0.parquet").touch()
    with pytest.raises(ValueError, match=r"gsm8k/main/test\*\.parquet: no such file"):
        lorafa_lm_eval.files(tmp_path / "gsm8k" / "main", ("train", "test"))


def _base(folder: Path) -> Any:
    """A random LLaMA with bytes as tokens, in Hugging Face's format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "</s>"])}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="</s>", pad_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=257, max_position_embeddings=1024, eos_token_id=256, pad_token_id=256, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    return bytes_


@pytest.mark.slow
def test_the_score_is_that_of_the_tuned_model(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from datasets import Dataset
    from transformers import LlamaForCausalLM

    import lorafa_lm_eval
    from llmsys import lorafa

    bytes_ = _base(tmp_path / "base")
    for subject, rows in (("anatomy", QUESTIONS[:8]), ("virology", QUESTIONS[8:])):
        (tmp_path / "mmlu" / subject).mkdir(parents=True)
        for split in ("dev", "test"):
            Dataset.from_list(rows).to_parquet(tmp_path / "mmlu" / subject / f"{split}-00000-of-00001.parquet")
    (tmp_path / "gsm8k" / "main").mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(8)]
        Dataset.from_list(rows).to_parquet(tmp_path / "gsm8k" / "main" / f"{split}-00000-of-00001.parquet")

    model = lorafa.inject(LlamaForCausalLM.from_pretrained(tmp_path / "base"), lorafa.LoRAFAConfig(r=4, alpha=8))
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter)
    lorafa.save_adapter(model, tmp_path / "adapter")

    def right(row: dict[str, Any], subject: str) -> bool:
        asked = f"The following are multiple choice questions (with answers) about {subject}.\n\n{row['question']}\n"
        asked += "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"], strict=True))
        ids = torch.tensor([bytes_.encode(asked + "Answer: ").ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1]
        return int(logits[[bytes_.encode(letter).ids[0] for letter in "ABCD"]].argmax()) == row["answer"]

    expected = [right(row, "anatomy") for row in QUESTIONS[:8]] + [right(row, "virology") for row in QUESTIONS[8:]]
    words = ["--base", str(tmp_path / "base"), "--data", str(tmp_path), "--dtype", "float32", "--device", "cpu"]
    words += ["--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), "--shots", "0"]
    record = lorafa_lm_eval.main([*words, "--tasks", "mmlu"])
    assert record.summary["mmlu/acc"] == pytest.approx(sum(expected) / 24)
    assert record.summary["mmlu_anatomy/acc"] == pytest.approx(sum(expected[:8]) / 8)
    asked = lorafa_lm_eval.main([*words, "--tasks", "gsm8k", "--limit", "2"])
    assert asked.summary["gsm8k/exact_match/strict-match"] == 0
