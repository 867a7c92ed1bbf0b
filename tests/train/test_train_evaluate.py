"""Evaluation: what one rank finds, several find together, and each number is what its name says elsewhere too."""

from __future__ import annotations

import contextlib
import json
import math
import socket
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmsys.data import tokenizer
from llmsys.data.batches import Encoded
from llmsys.data.examples import Example, Pixels
from llmsys.data.pairs import pairs
from llmsys.data.pixels import Images
from llmsys.data.ragged import Ragged
from llmsys.errors import NotANumber
from llmsys.train import generation
from llmsys.train.evaluate import evaluate, label_count, scores, share, token_count

BYTES = tokenizer.load("bytes", None)
WORDS = ["the", "house", "of", "a", "matrix", "is", "its", "inverse", "and", "no", "ring", "has", "one"]


class Ranks:
    """The part of an engine that evaluation uses, over gloo where there is a process group."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.data_rank, self.data_world = rank, world

    def sum(self, values: Tensor) -> Tensor:
        assert values.dtype == torch.float64
        if self.data_world > 1:
            dist.all_reduce(values)
        return values


class Gathering(nn.Module):
    """A wrapper as ZeRO-3 and FSDP2 have it: every forward pass is a collective. This one is of the passes so far, so
    it also finds a rank that made another number of them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.passes = module, 0

    def forward(self, **batch: Any) -> Any:
        self.passes += 1
        most = torch.tensor([self.passes, -self.passes])
        dist.all_reduce(most, dist.ReduceOp.MAX)
        assert most.tolist() == [self.passes, -self.passes]
        return self.module(**batch)


class Gives:
    """What a forward returns."""

    def __init__(self, loss: Tensor | None, logits: Tensor, encoder_last_hidden_state: Tensor | None = None) -> None:
        self.loss, self.logits, self.encoder_last_hidden_state = loss, logits, encoder_last_hidden_state


class Classifier(nn.Module):
    """Linear on the pixels, with dropout, so that a forgotten `eval()` shows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 8 * 8, 4))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Gives:
        logits = self.linear(pixel_values)
        return Gives(nn.functional.cross_entropy(logits, labels), logits)


class Bigrams(nn.Module):
    """A causal LM in which a byte's successor depends on it alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(BYTES.vocab_size, BYTES.vocab_size)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Gives:
        logits = self.table(input_ids)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Gives(loss, logits)


class Copier(nn.Module):
    """An encoder-decoder whose t-th output is its t-th source token, for most of the bytes. Quick to import, and unlike
    a T5 at random it writes words."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(decoder_start_token_id=BYTES.pad_id)
        self.table = nn.Embedding(BYTES.vocab_size, BYTES.vocab_size)
        self.table.weight.data += 6 * torch.eye(BYTES.vocab_size)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_outputs: tuple[Tensor] | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = True,
    ) -> Gives:
        if encoder_outputs is None:
            hidden = self.table(input_ids) * attention_mask[..., None]  # [B, L, V]
        else:
            hidden = encoder_outputs[0]
        width = (decoder_input_ids if labels is None else labels).shape[1]
        logits = nn.functional.pad(hidden, (0, 0, 0, width))[:, :width]
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Gives(loss, logits, hidden)


def t5() -> Any:
    """Two layers at random; </s> made likely, so that some texts end early and others do not."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(3)
    config = T5Config(
        vocab_size=BYTES.vocab_size,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        pad_token_id=BYTES.pad_id,
        eos_token_id=BYTES.eos_id,
        decoder_start_token_id=BYTES.pad_id,
        tie_word_embeddings=False,
    )
    model = T5ForConditionalGeneration(config)
    torch.manual_seed(7)
    with torch.no_grad():
        model.lm_head.weight.normal_()
        model.lm_head.weight[BYTES.eos_id] *= 6
    return model


def photographs(n: int) -> Images:
    rng = np.random.default_rng(0)
    pixels = Pixels(rng.integers(0, 256, (n, 3, 8, 8), dtype=np.uint8), rng.integers(0, 4, n), (0.5,) * 3, (0.3,) * 3)
    return Images(pixels, size=8, channels=3, augment=False)


def texts(n: int) -> Encoded:
    """Rows of 2 to 30 bytes, the prompt's share from nothing to all of it."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(97, 123, length).tolist() for length in rng.integers(2, 30, n)]
    prompts = np.array([rng.integers(0, len(row) + 1) for row in rows])
    return Encoded(Ragged.of(rows), length=30, pad_id=BYTES.pad_id, prompts=prompts)


def translations(n: int) -> Any:
    """Of n lines each into itself, two words added."""
    rng = np.random.default_rng(0)
    lines = [[str(word) for word in rng.choice(WORDS, rng.integers(3, 9))] for _ in range(n)]
    examples = [Example(" ".join([*line, "of", "one"]), prompt=" ".join(line)) for line in lines]
    return pairs(examples, BYTES, 60, 60)


def case(objective: str) -> tuple[Any, Any, dict[str, Any]]:
    """(model, split, further arguments)."""
    if objective == "images":
        return Classifier(), photographs(23), {}
    if objective == "causal_lm":
        return Bigrams(), texts(23), {}
    return Copier(), translations(9), {"tokenizer": BYTES, "target_length": 30, "generate_max": 7}


def measure(objective: str, engine: Ranks, batch_size: int = 4, wrap: Any = None) -> dict[str, float]:
    model, split, more = case(objective)
    return evaluate(
        wrap(model) if wrap else model,
        split,
        batch_size,
        objective=objective,
        engine=engine,
        device=torch.device("cpu"),
        mixed=contextlib.nullcontext,
        beat=lambda: None,
        **more,
    )


OBJECTIVES = ("images", "causal_lm", "seq2seq")


def _rank(rank: int, port: int, out: str) -> None:
    """One of two processes: evaluates with every objective, each with an odd number of batches."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=limit)
    found = {name: measure(name, Ranks(rank, 2), wrap=Gathering) for name in OBJECTIVES}
    dist.destroy_process_group()
    Path(out, f"{rank}.json").write_text(json.dumps(found))


def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for objective in OBJECTIVES:
        assert first[objective] == pytest.approx(measure(objective, Ranks()), rel=1e-6), objective
    assert set(first["seq2seq"]) == {"val_loss", "perplexity", "bleu", "rouge1", "rouge2", "rougeL"}
    assert 0 < first["seq2seq"]["bleu"] < 100
    assert 0 < first["seq2seq"]["rouge2"] < first["seq2seq"]["rouge1"] < 1


@pytest.mark.parametrize("batches", [1, 2, 5, 6])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_batch_counts_once_and_every_rank_makes_as_many_passes(batches: int, world: int) -> None:
    rows = [[i] for i in range(batches)]
    shares = [list(share(rows, Ranks(rank, world))) for rank in range(world)]
    assert len({len(part) for part in shares}) == 1
    assert sorted(batch for part in shares for batch, counts in part if counts) == rows


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_batch_size_does_not_change_the_result(objective: str) -> None:
    """The mean over batches of their mean losses would change: their label positions differ in number."""
    assert measure(objective, Ranks(), 4) == pytest.approx(measure(objective, Ranks(), 64), rel=1e-5)


def test_the_loss_is_the_mean_over_all_label_positions() -> None:
    model, split, _ = case("causal_lm")
    chances = model.table.weight.detach().log_softmax(-1)
    total, count = 0.0, 0
    for i in range(len(split)):
        row, start = split.rows.flat[split.rows.starts[i] : split.rows.starts[i + 1]], max(1, split.prompts[i])
        total -= sum(float(chances[row[j - 1], row[j]]) for j in range(start, len(row)))
        count += max(0, len(row) - start)
    found = measure("causal_lm", Ranks())
    assert found["val_loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_scores_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, f1_score

    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 5, 200), rng.choice([0, 1, 2, 6], 200)  # 3 and 4 never guessed, 6 never true
    found = scores(truth.tolist(), guess.tolist())
    assert found["macro_f1"] == pytest.approx(f1_score(truth, guess, average="macro", zero_division=0.0))
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, guess))
    assert found["accuracy_se"] == pytest.approx((truth == guess).std() / math.sqrt(200))


def test_images_are_scored_by_what_the_model_says() -> None:
    model, split, _ = case("images")
    batch = split.batch(list(range(len(split))))
    out = model.eval()(**batch)
    found = measure("images", Ranks())
    assert found["val_loss"] == pytest.approx(float(out.loss.detach()), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((out.logits.argmax(-1) == batch["labels"]).double().mean()))


def test_greedy_writes_what_transformers_generates() -> None:
    model, split = t5().eval(), translations(9)
    batch = split.batch(list(range(len(split))), pad_to=None)
    nothing = contextlib.nullcontext
    written = generation.greedy(model, batch, BYTES, 12, Ranks(), torch.device("cpu"), nothing, lambda: None)
    ids = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, max_new_tokens=12
    )
    expected = [row[1:] for row in ids.tolist()]
    ends = {row.index(BYTES.eos_id) if BYTES.eos_id in row else 12 for row in expected}
    assert len(ends) > 1, "the case is to have texts that end and texts that do not"
    cut = [row[: row.index(BYTES.eos_id)] if BYTES.eos_id in row else row for row in expected]
    assert written == [BYTES.decode(row) for row in cut]


def test_statistics_of_parts_add_up_to_corpus_bleu_and_mean_rouge() -> None:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    references = ["the inverse of a matrix is a matrix", "no ring has an inverse of its own", "a house is no ring"]
    texts = ["the inverse of the matrix is a matrix", "no rings have an inverse of their own", "a house is a ring"]
    parts = sum(generation.statistics([t], [r]) for t, r in zip(texts, references, strict=True))
    found = generation.scores(np.asarray(parts))
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [references]).score)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    each = [scorer.score(r, t)["rougeL"].fmeasure for t, r in zip(texts, references, strict=True)]
    assert found["rougeL"] == pytest.approx(sum(each) / 3)
    perfect = generation.scores(generation.statistics(references, references))
    assert perfect == pytest.approx({"bleu": 100.0, "rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0})


def test_positions_with_a_loss_are_counted_by_objective() -> None:
    labels = torch.tensor([[5, 6, -100], [-100, 8, -100]])
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": labels}
    assert (label_count(batch, "causal_lm"), label_count(batch, "seq2seq")) == (2, 3)
    assert (token_count(batch, "causal_lm"), token_count(batch, "seq2seq")) == (8, 11)
    masked = {**batch, "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])}
    assert (token_count(masked, "causal_lm"), token_count(masked, "seq2seq")) == (4, 7)
    pictures = photographs(5).batch([0, 1, 2])
    assert (label_count(pictures, "images"), token_count(pictures, "images")) == (3, 0)


def test_evaluation_leaves_the_model_and_the_random_stream_as_they_were() -> None:
    model, split, _ = case("images")
    model.train()
    before = torch.get_rng_state()
    arguments: dict[str, Any] = {"objective": "images", "engine": Ranks(), "device": torch.device("cpu")}
    evaluate(model, split, 4, mixed=contextlib.nullcontext, beat=lambda: None, **arguments)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_a_loss_that_is_no_number_ends_the_run() -> None:
    def spoil(model: Any) -> Any:
        model.table.weight.data[ord("e")] = math.nan
        return model

    with pytest.raises(NotANumber, match="the validation loss is nan"):
        measure("causal_lm", Ranks(), wrap=spoil)
