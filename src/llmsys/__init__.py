"""llmsys: run, compare and use four pieces of work on LLM systems; `python -m llmsys --help` lists the experiments."""

__version__ = "0.1.0"
