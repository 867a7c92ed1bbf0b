"""One model over many unequal machines: a job as a graph of operators, cut into stages that machines run.

(FusionAI, arXiv 2309.01172; FusionLLM, arXiv 2410.12707.)

    from llmsys.decentral import Fleet, Provider, Workload
    from llmsys.decentral.chain import chain
    from llmsys.decentral.plan import plan
    from llmsys.decentral.trace import trace

    found = plan(chain(trace(model, example).graph), Fleet(providers=(...)), Workload(micro_batches=64))

The names are resolved late (PEP 562); functions are where their files are, whose names they share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsys import lazy

if TYPE_CHECKING:
    from llmsys.decentral.chain import Chain
    from llmsys.decentral.cost import Costs, Workload
    from llmsys.decentral.fleet import Between, Fleet, Provider
    from llmsys.decentral.graph import Graph, Node
    from llmsys.decentral.plan import Plan, Planner

_HOMES = {
    "Between": "fleet",
    "Chain": "chain",
    "Costs": "cost",
    "Fleet": "fleet",
    "Graph": "graph",
    "Node": "graph",
    "Plan": "plan",
    "Planner": "plan",
    "Provider": "fleet",
    "Workload": "cost",
}
"""Name -> module."""

__all__ = ["Between", "Chain", "Costs", "Fleet", "Graph", "Node", "Plan", "Planner", "Provider", "Workload"]

__getattr__ = lazy.attributes(__name__, _HOMES)
