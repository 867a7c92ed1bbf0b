"""Tensors: packing loses nothing, losses fall where they should, and a step's batch depends on the step alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llmsys import compose, data, schema
from llmsys.data import tokenizer
from llmsys.data.batches import Dataset, fit, fit_two
from llmsys.data.examples import Example, Source
from llmsys.data.ragged import IGNORE

BYTES = tokenizer.load("bytes", None)


def source(*examples: Example, objective: str = "causal_lm", labels: tuple[str, ...] = ()) -> Source:
    return Source(objective, list(examples), list(examples), labels, "")


def encode(source: Source, length: int) -> Dataset:
    return data.encode(source, BYTES, schema.Train(length=length), schema.Transformer())


def test_bytes_lose_nothing() -> None:
    texts = ["def f(x):\n\treturn x", "naïve ∑ 𝔽 \x00", ""]
    assert [BYTES.decode(BYTES.wrap(ids)) for ids in BYTES.encode(texts)] == texts
    assert max(max(BYTES.wrap(ids)) for ids in BYTES.encode(texts)) < BYTES.vocab_size


def test_packed_sequences_reproduce_the_text() -> None:
    texts = ["first text", "second, longer text", "3"]
    encoded = encode(source(*map(Example, texts)), 5).train
    batch = encoded.batch(list(range(len(encoded))))
    stream = [i for ids in BYTES.encode(texts) for i in BYTES.wrap(ids)]
    assert batch["input_ids"].flatten().tolist() == stream[: len(stream) // 5 * 5]
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert "attention_mask" not in batch, "full sequences need none, and flash attention takes none"


def test_the_loss_is_on_the_response_alone() -> None:
    example = Example("yes", prompt="why? ")
    encoded = encode(source(example, Example("no, never", prompt="so? ")), 32).train
    batch = encoded.batch([0, 1])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, 32)
    row, labels = batch["input_ids"][0], batch["labels"][0]
    assert row[:10].tolist() == BYTES.wrap(list(b"why? yes"))
    assert labels[labels != IGNORE].tolist() == [*b"yes", BYTES.eos_id]
    assert batch["attention_mask"][0].tolist() == [1] * 10 + [0] * 22
    assert (labels[10:] == IGNORE).all()


def test_padding_to_the_longest_changes_nothing_but_the_width() -> None:
    encoded = encode(source(Example("yes", prompt="why? "), Example("no", prompt="so? ")), 32).train
    full, short = encoded.batch([0, 1]), encoded.batch([0, 1], pad_to=None)
    assert short["input_ids"].shape == (2, 10)
    for key in short:
        assert torch.equal(short[key], full[key][:, :10])
    assert "attention_mask" not in encoded.batch([0], pad_to=None), "one row alone has no padding"


@pytest.mark.parametrize(("prompt", "text"), [(0, 0), (3, 5), (500, 3), (500, 500), (3, 500), (60, 60)])
def test_a_cut_example_always_keeps_a_response(prompt: int, text: int) -> None:
    """A row without one label would make the mean over labels 0/0."""
    kept_prompt, kept_text = fit(list(range(prompt)), list(range(text + 1)), 64)
    assert len(kept_prompt) + len(kept_text) == min(64, prompt + text + 1)
    assert len(kept_text) >= min(text + 1, 32)
    assert kept_text == list(range(len(kept_text)))
    if len(kept_prompt) < prompt:
        assert kept_prompt[0] == 0
        assert kept_prompt[-1] == prompt - 1, "the words that ask for the response"


@pytest.mark.parametrize("length", [*(pytest.param(few, marks=pytest.mark.slow) for few in (4, 16)), 64, 1024])
def test_every_row_of_real_pairs_has_a_loss(length: int) -> None:
    cfg = schema.Data(kind="code_docstrings", max_train=300, max_val=100)
    encoded = encode(data.open(cfg), length).train
    labels = encoded.batch(list(range(len(encoded))))["labels"]
    assert (labels[:, 1:] != IGNORE).any(dim=1).all(), "after the model's shift by one, too"


def test_classes_have_one_label_and_a_mask() -> None:
    examples = [Example("short", label=1), Example("x" * 100, label=0)]
    encoded = encode(source(*examples, objective="classification", labels=("a", "b")), 16).train
    batch = encoded.batch([0, 1])
    assert batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].sum(dim=1).tolist() == [7, 16]
    assert batch["input_ids"][1, -1] == BYTES.eos_id, "a cut text is still closed"
    assert encoded.batch([1])["attention_mask"].all(), "always there: the model pools over it"


def test_a_split_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.length=512: the training split is shorter"):
        encode(source(Example("short")), 512)


@pytest.mark.parametrize("exp", ["bench_pretrain", "bench_calibrate"])
@pytest.mark.parametrize("length", [64, 512, 2048, 4096])
def test_a_benchmark_of_any_length_has_a_row_to_validate_on(exp: str, length: int) -> None:
    """A run ends with the loss of the validation split, which for a benchmark is as small as can be."""
    cfg = schema.build(compose.compose([f"+exp={exp}", f"train.length={length}", "model.max_length=4096"]))
    encoded = encode(data.open(cfg.data), length)
    assert 1 <= len(encoded.val) <= 2 + 1024 / length


def test_an_epoch_visits_every_index_once() -> None:
    n, batch = 23, 5
    stream = [i for step in range(n) for i in data.order(n, batch, 7, step)]  # n steps are `batch` whole epochs
    epochs = [stream[e * n : (e + 1) * n] for e in range(batch)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == batch, "each in an order of its own"


def test_order_is_a_pure_function_of_the_step() -> None:
    forwards = [data.order(1000, 16, 3, step) for step in range(200)]
    backwards = [data.order(1000, 16, 3, step) for step in reversed(range(200))]
    assert forwards == backwards[::-1]
    assert data.order(1000, 16, 4, 0) != forwards[0]
    assert len(data.order(3, 8, 0, 0)) == 8, "a batch may span epochs"
    assert data.order(10, 4, 0, 0) == [6, 1, 0, 5], "committed: the same on every machine and numpy"


def save_tokenizer(folder: Path, pair: str | None = None) -> None:
    """A word-piece tokenizer like the one beside MiniLM's weights, which also asks for padding and truncation."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "##b", "<s>", "</s>"]
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_truncation(4)
    made.enable_padding(length=4)
    made.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": "[PAD]", "eos_token": {"content": "</s>"}})
    )


def test_a_folders_tokenizer_neither_pads_nor_cuts(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    made = tokenizer.load("weights", tmp_path)
    assert made.encode(["a", "a b ab a b a"]) == [[4], [4, 5, 4, 6, 4, 5, 4]]
    assert made.wrap([4, 5]) == [2, 4, 5, 3]
    assert (made.vocab_size, made.pad_id, made.bos_id, made.eos_id) == (9, 0, None, 8)


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        tokenizer.load("weights", tmp_path)
    with pytest.raises(ValueError, match=r"model\.tokenizer=bytes"):
        tokenizer.load("weights", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer file"):
        tokenizer.load("weights", tmp_path)


def test_synthetic_text_can_be_learned() -> None:
    """A count of letter pairs on the training split already predicts the validation split better than chance."""
    encoded = encode(data.open(schema.Data(kind="synthetic")), 128)
    pairs = np.ones((259, 259))
    np.add.at(pairs, (encoded.train.rows.flat[:-1], encoded.train.rows.flat[1:]), 1)
    chances = pairs / pairs.sum(axis=1, keepdims=True)
    loss = -np.log(chances[encoded.val.rows.flat[:-1], encoded.val.rows.flat[1:]]).mean()
    assert loss < 1.4 < np.log(28)


def seq2seq(*examples: Example, length: int, target_length: int) -> Dataset:
    train = schema.Train(length=length, target_length=target_length)
    return data.encode(source(*examples, objective="seq2seq"), BYTES, train, schema.Transformer(family="t5"))


def test_source_and_target_each_end_and_are_padded_by_themselves() -> None:
    split = seq2seq(Example("yes", prompt="why?"), Example("no, no", prompt="so"), length=8, target_length=10).val
    batch = split.batch([0, 1])
    pad, eos = BYTES.pad_id, BYTES.eos_id
    assert batch["input_ids"].tolist() == [[*b"why?", eos, pad, pad, pad], [*b"so", eos, pad, pad, pad, pad, pad]]
    assert batch["attention_mask"].sum(1).tolist() == [5, 3]
    assert batch["labels"].tolist() == [[*b"yes", eos, *[IGNORE] * 6], [*b"no, no", eos, *[IGNORE] * 3]]
    short = split.batch([0, 1], pad_to=None)
    assert (short["input_ids"].shape, short["labels"].shape) == ((2, 5), (2, 7))
    for key in short:
        assert torch.equal(short[key], batch[key][:, : short[key].shape[1]])


def test_a_cut_source_is_closed_and_a_cut_target_is_not() -> None:
    """The reference stays whole: what is generated is compared with what was written."""
    split = seq2seq(Example("a long answer", prompt="a long question"), length=5, target_length=4).val
    batch = split.batch([0])
    assert batch["input_ids"][0].tolist() == [*b"a lo", BYTES.eos_id]
    assert batch["labels"][0].tolist() == [*b"a lo"]
    assert split.references == ["a long answer"]


def test_docstrings_serve_both_objectives() -> None:
    cfg = schema.Data(kind="code_docstrings", prefix="document: ", max_train=50, max_val=50)
    causal, pairs = data.open(cfg, "causal_lm"), data.open(cfg, "seq2seq")
    assert causal.hash != pairs.hash
    for one, other in zip(causal.train, pairs.train, strict=True):
        assert one.text == other.text
        function = other.prompt.removeprefix("document: ")
        assert len(function) < len(other.prompt)
        assert function in one.prompt


@pytest.mark.parametrize(
    ("a", "b", "kept"), [(3, 4, (3, 4)), (3, 40, (3, 7)), (40, 3, (7, 3)), (40, 40, (5, 5)), (5, 6, (5, 5))]
)
def test_of_two_texts_the_longer_is_cut(a: int, b: int, kept: tuple[int, int]) -> None:
    assert tuple(map(len, fit_two([1] * a, [2] * b, 10))) == kept


def test_two_texts_are_joined_as_the_model_knows_it(tmp_path: Path) -> None:
    examples = [Example("ab", pair="c", label=1), Example("x" * 50, pair="y" * 50, label=0)]
    batch = encode(source(*examples, objective="classification", labels=("a", "b")), 13).train.batch([0, 1])
    bos, eos = BYTES.bos_id, BYTES.eos_id
    assert batch["input_ids"][0, :6].tolist() == [bos, *b"ab", eos, *b"c", eos]
    assert batch["input_ids"][1].tolist() == [bos, *b"xxxxx", eos, *b"yyyyy", eos]
    save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no template for two texts"):
        tokenizer.load("weights", tmp_path).wrap([4], [5])
    save_tokenizer(tmp_path, pair="[CLS] $A [SEP] [SEP] $B [SEP]")  # RoBERTa's
    made = tokenizer.load("weights", tmp_path)
    assert (made.wrap([4, 5], [4]), made.wrap([4])) == ([2, 4, 5, 3, 3, 4, 3], [2, 4, 3])
