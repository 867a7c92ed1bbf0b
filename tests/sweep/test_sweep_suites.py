"""Claims about conf/sweep: each suite is a whole sweep by its name alone, over an experiment, and says what it is."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml

from llmsys import compose, schema
from rank_pool import briefly

NAMES = [name for name in compose.choices("sweep") if name != "none"]
SUITES = [name for name in NAMES if name.startswith("bench_")]
FIGURES = [name for name in NAMES if name not in SUITES]
"""Those that need neither pruning nor repeats: they make each run once."""
CELLS = {
    "bench_pretrain_grid": 40,
    "bench_pretrain_maxbatch": 4,
    "bench_scaling": 6,
    "bench_finetune_grid": 24,
    "bench_modules": 4,
    "bench_ops": 4,
    "lorafa_rank_rate": 16,
    "lorafa_glue": 21,
    "lorafa_wmt16": 3,
    "lorafa_convergence": 9,
    "lorafa_memory": 5,
    "compress_networks": 3,
    "compress_settings": 3,
    "compress_scaling": 3,
    "compress_clusters": 2,
    "compress_curves": 12,
    "decentral_fifty_vs_four": 6,
    "decentral_fleets": 6,
    "decentral_churn": 2,
}
ELSEWHERE = ("lorafa_glue", "lorafa_wmt16", "lorafa_convergence")
"""Those that need data or runs that are not here: they are composed alone."""
REPEATED = ("bench_scaling", "bench_modules", "bench_ops")
"""Those that leave time for it within a quarter of an hour; the headers of the others say how."""


@pytest.mark.parametrize("suite", NAMES)
def test_a_suite_opens_with_its_header_and_brings_its_experiment(suite: str) -> None:
    lines = (compose.CONF / "sweep" / f"{suite}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    for field in ("# Paper:", "# Expected:", "# Hardware:", f"# Command: python -m llmsys sweep={suite}"):
        assert any(line.startswith(field) for line in lines), field
    assert any("Time: " in line for line in lines), "how long it takes"
    (exp,) = (each["/exp"] for each in yaml.safe_load("\n".join(lines))["defaults"] if "/exp" in each)
    config = compose.compose([f"sweep={suite}", "sweep.repeats=1"])
    assert config["name"] == exp
    schema.build(config)


@pytest.mark.parametrize("suite", SUITES)
def test_what_a_suite_s_header_says_of_gpus_can_be_typed(suite: str) -> None:
    """The words in brackets behind its command, of lists the last, as the paper's eight ranks."""
    text = (compose.CONF / "sweep" / f"{suite}.yaml").read_text()
    found = re.search(rf"# Command: python -m llmsys sweep={suite} \[(.*)\]", text)
    assert found
    words = [f"{word.partition('=')[0]}={word.partition('=')[2].rpartition(',')[2]}" for word in found[1].split()]
    config = schema.build(compose.compose([f"sweep={suite}", *words]))
    assert config.train.world == 8
    assert isinstance(config.model, schema.Transformer)
    assert config.model.name.startswith("llama2_")


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_repeats_its_cells_or_says_how(suite: str) -> None:
    settings = schema.build(compose.compose([f"sweep={suite}"])).sweep
    text = (compose.CONF / "sweep" / f"{suite}.yaml").read_text()
    assert settings.repeats == (3 if suite in REPEATED else 1)
    assert settings.repeats > 1 or settings.search == "max" or "sweep.repeats=5" in text


def test_the_command_line_beats_the_suite() -> None:
    config = compose.compose(["sweep=bench_pretrain_grid", "sweep.order=shuffled", "train.steps=7", "train.world=1"])
    assert (config["sweep"]["order"], config["sweep"]["prune"]) == ("shuffled", True)
    assert (config["train"]["steps"], config["train"]["global_batch"]) == (7, 1)


@pytest.mark.parametrize("suite", briefly(NAMES, "bench_ops"))
def test_every_cell_of_a_suite_can_be(suite: str) -> None:
    """Of the real launcher: as many cells as are promised, of which each is another run."""
    made = "len(configs)" if suite in ELSEWHERE else "len(main.make_jobs(configs))"
    code = (
        "import sys; from llmsys import main, schema\n"
        "def show(configs):\n"
        "    for config in configs: schema.build(config)\n"
        f"    print(len(configs), {made})\n"
        "    return 0\n"
        "main.submit = show\n"
        f"sys.argv = ['llmsys', '{'+' if suite in FIGURES else ''}sweep={suite}']\n"
        "main.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    listed, found = map(int, done.stdout.split() or [0, 0])
    assert listed == found == CELLS[suite], done.stderr


def test_two_experiments_at_once_are_a_mistake_in_one_line(llmsys) -> None:  # type: ignore[no-untyped-def]
    done = llmsys("sweep=bench_scaling", "+exp=bench_engines")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "exp=bench_engines" in line
