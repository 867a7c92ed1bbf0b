"""Execution planes: how the operators of a stage are run."""
