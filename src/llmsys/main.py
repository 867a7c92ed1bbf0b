"""The command line: compose, check, make jobs, submit, print the table, exit code. Hydra stops here.

Hydra composes (and, with -m, lists a sweep's jobs through our launcher); every job is composed and checked before the
first one starts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from llmsys import compose, schema, tasks, wiring
from llmsys.errors import MissingPackage
from llmsys.job import HARMLESS, Job, Record

USAGE = """\
Usage: python -m llmsys [+exp=NAME] [GROUP=CHOICE] [KEY=VALUE] ...
       python -m llmsys -m +exp=NAME KEY=A,B ...       a sweep: every combination, and one table
       python -m llmsys sweep=NAME [KEY=VALUE] ...     a suite, or a paper's figure: a sweep by its name, see below
       python -m llmsys --cfg job +exp=NAME            show the settings, run nothing
       python -m llmsys.results [FOLDER]               the table of everything under a folder; --help for pictures
"""


def help_text() -> str:
    """Usage, experiments, suites and the choices of every group; made from `conf/` without Hydra or torch."""
    lines = [USAGE, "Experiments (+exp=NAME):"]
    width = max(map(len, compose.choices("exp")), default=0)
    lines += [f"  {name:{width}}  {purpose}" for name, purpose in compose.choices("exp").items()]
    suites = {name: purpose for name, purpose in compose.choices("sweep").items() if name != "none"}
    width = max(map(len, suites), default=0)
    lines += ["", "Suites, each a whole sweep (sweep=NAME):"]
    lines += [f"  {name:{width}}  {purpose}" for name, purpose in suites.items()]
    searches = compose.choices("search")
    lines += ["", "Searches for the best settings of an experiment (+search=NAME):"]
    lines += [f"  {name:{width}}  {purpose}" for name, purpose in searches.items()]
    lines += ["", "Groups and their choices:"]
    for group in compose.groups():
        if group not in ("exp", "sweep", "search"):
            lines.append(f"  {group}={' | '.join(compose.choices(group))}")
    lines += ["", "Every key of a group can be set: train.steps=20 model.num_layers=2. --cfg job shows them all."]
    lines += ["smoke=true: the experiment in seconds on a CPU, by its own list; other settings win over the list."]
    lines += [
        "tracker=wandb, tensorboard or both: mirrors beside the local record; W&B offline unless WANDB_MODE=online."
    ]
    lines += ["A finished run is not run again; reuse=never does. --hydra-help for Hydra's own flags."]
    return "\n".join(lines)


def make_jobs(configs: Sequence[dict[str, Any]]) -> list[Job]:
    """The jobs of composed configs, each once, in order. ValueError for the first setting that is wrong."""
    jobs: dict[str, Job] = {}
    for config in configs:
        made = make_job(config)
        jobs.setdefault(made.out, made)
    return list(jobs.values())


def make_job(config: dict[str, Any]) -> Job:
    """The job of a composed config. ValueError for the first setting that is wrong; Contradiction, which is one, for
    settings that cannot go together."""
    from llmsys import job

    schema.build(config)
    wiring.techniques().check(config)
    return job.make(config, _inputs(config))


def _inputs(config: dict[str, Any]) -> dict[str, str]:
    """The folders of the runs this one builds on, found by their recomputed ids (`model.weights=run:<exp>`)."""
    from llmsys import job

    kind, _, exp = config["model"]["weights"].partition(":")
    if kind != "run":
        return {}
    command = f"python -m llmsys +exp={exp}"
    if exp not in compose.choices("exp"):
        raise ValueError(f"model.weights=run:{exp}: no such experiment; there are {', '.join(compose.choices('exp'))}")
    wanted = make_jobs([compose.compose([f"+exp={exp}", f"results={config['results']}"])])[0]
    record = job.read_or_set_aside(Path(wanted.out))
    if record is None or record.status != "ok":
        raise ValueError(f"model.weights=run:{exp}: that run is not there yet; make it with: {command}")
    if not (Path(wanted.out) / "weights").is_dir():
        raise ValueError(f"model.weights=run:{exp}: its weights are gone; make them with: {command} reuse=never")
    return {f"run:{exp}": wanted.out}


def submit(configs: Sequence[dict[str, Any]]) -> int:
    """Runs the jobs, prints the table of their records, returns the exit code: 0, 130 (interrupted) or 1."""
    from llmsys.dispatch import cluster, torchrun

    torchrun.check(configs)
    with cluster.ready(configs), contextlib.ExitStack() as quiet:
        if torchrun.silent(configs[0]):
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        return _submit(configs)


def _submit(configs: Sequence[dict[str, Any]]) -> int:
    from llmsys import results
    from llmsys.dispatch.show import Show
    from llmsys.sweep import report

    if any(config.get("search", {}).get("trials") for config in configs):
        return _search(configs)
    from llmsys.sweep.course import Course

    course = Course(configs, make_job, Show())
    records: list[Record] = []
    interrupted = False
    try:
        for _, record in course.run():
            records.append(record)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        answers = [made for made in course.records.values() if made[1].task in tasks.LIGHT]
        for job, record in answers:
            _show_tables(job, record)
        results.show([record for record in records if record.task not in tasks.LIGHT or record.status != "ok"])
        for title, headers, lines in report.tables(course):
            print(f"\n{title}")
            results.print_lines(headers, lines)
        for line in report.lines(course):
            print(line)
        for job, record in course.records.values():
            if record.task not in tasks.LIGHT and not (course.settings.repeats > 1 and job.config.get("repeat")):
                _show_tables(job, record)  # of each cell the first: a table of all repeats together stands above
    if interrupted:
        return 130
    return 0 if all(record.status in HARMLESS for record in records) else 1


def _search(configs: Sequence[dict[str, Any]]) -> int:
    """Runs the trials of a search, prints their table and the command of the best, returns the exit code."""
    from llmsys import results
    from llmsys.dispatch.show import Show
    from llmsys.dispatch.stop import Stop
    from llmsys.sweep.course import room
    from llmsys.sweep.parallel import together

    if len(configs) > 1:
        raise ValueError("search: is of one run's settings, and a sweep lists them; leave -m or +search= out")
    try:
        from llmsys.search.study import Study
    except ModuleNotFoundError as error:
        raise MissingPackage(f"+search: needs {error.name}: pip install 'llmsys[search]'") from None
    study = Study(configs[0], make_job, Show())
    records: list[Record] = []
    interrupted = False
    try:
        units = study.units(room)
        several = configs[0]["dispatch"]["kind"] == "ray"
        for _, record in together(units) if several else (made for unit in units for made in unit.run(Stop())):
            records.append(record)
    except KeyboardInterrupt:
        interrupted = True
    results.print_lines(*study.lines())
    if best := study.best():
        print(f"the best: {best}")
    if interrupted:
        return 130
    return 0 if best and all(record.status in HARMLESS for record in records) else 1


def _show_tables(job: Job, record: Record) -> None:
    """The tables that a run has made itself: the file `tables` of its record, where it is still there."""
    file = Path(job.out) / record.files.get("tables", "")
    if file.is_file():
        print("\n" + file.read_text(encoding="utf-8"))


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """`python -m llmsys`; see USAGE."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text())
        return
    import yaml
    from hydra import main as hydra_main
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from llmsys import messages

    signal.signal(signal.SIGTERM, _stop)
    compose.register()
    configs: list[dict[str, Any]] = []
    wrong: list[ValueError] = []

    def collect(config: Any) -> None:
        try:
            configs.append(compose.plain(config, compose.typed()))
        except ValueError as error:  # raised in here Hydra would print words around it that nobody typed
            wrong.append(error)

    try:
        flags = [word for word in sys.argv[1:] if word in ("-m", "--multirun")]
        rest = [word for word in sys.argv[1:] if word not in flags]
        sys.argv[1:] = flags[:1] + rest  # Hydra wants it before the settings
        sys.argv[1:] = [f"sweep={word[7:]}" if word.startswith("+sweep=") else word for word in sys.argv[1:]]
        sys.argv[1:] = wiring.techniques().expanded(compose.smoked(sys.argv[1:]))
        hydra_main(config_path=str(compose.CONF), config_name="config", version_base="1.3")(collect)()
        if wrong:
            raise wrong[0]
        code = submit(configs) if configs else 0
    except (HydraException, OmegaConfBaseException, ValueError, OSError, MissingPackage) as error:
        print(f"llmsys: {messages.one_line(error) or error}", file=sys.stderr)
        code = 1
    except yaml.YAMLError as error:
        print(f"llmsys: a config file is not YAML: {' '.join(str(error).split())}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
