"""A report of records as one HTML page that needs nothing else: `python -m llmsys.bench.report results -o report.html`.

choice.py     the best cell by each goal, the runner-up, and what its letters are good for
front.py      the Pareto front
ablation.py   what each letter does, by pairs that differ in nothing else
paper.py      the paper's tables out of our records
quality.py    predictions beside measurements, what clocks cost, what is noisy
html.py, svg.py, style.py   pieces of a page
answer.py, advised.py, charts.py, layout.py, trust.py, common.py   its parts
page.py       all of it
pictures.py   the same for notebooks, by matplotlib

All but `pictures` need neither torch nor matplotlib, and no display.
"""
