"""Published numbers beside ours: `python -m llmsys.results compare --published published/FILE.csv [FOLDER...]`.

A file `published/<paper>_<table>.csv` has a line for each row of a table. Its columns are keys, which say what was run,
numbers, whose headers name quantity and unit, and `source`:

    hardware,model,techniques,batch,length,throughput [tokens/s],peak_memory [GB],source
    a800x8,llama2_7b,F+Z3,1,350,,,

Lines that begin with # are remarks. An empty key is not compared, an empty number is one that nobody has filled in; a
number needs a source: `paper`, or `third party: WHO` of one that was not read in the paper itself.

quantities.py  what a number can be, its units, and where it is in a record
table.py       a file, checked
compare.py     rows of a file and cells of ours
__main__.py    the command
"""
