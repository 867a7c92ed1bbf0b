"""What training a model under any combination of techniques costs: measured, predicted, and which one to choose.

The paper is arXiv 2311.03687. Each folder here is one question; nothing heavy is imported before it is asked.
"""
