"""One model over many unequal machines: a job as a graph of operators, cut into stages that machines run.

(FusionAI, arXiv 2309.01172; FusionLLM, arXiv 2410.12707.)
"""
