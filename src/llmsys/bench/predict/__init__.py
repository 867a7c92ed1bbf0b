"""`bench_predict`: memory by phase and the time of a step, by arithmetic on a config, without torch.

    python -m llmsys +exp=bench_predict model=llama2_70b hardware=a800x8 techniques=Z3+O+R

`machine` says what a machine has, `speeds` how fast it runs operators, `lines` what joins its ranks, `steps` what a step
takes of all these, `prediction` what a config needs, `tables` prints it. `calibrate` measures the speeds of the machine
at hand.
"""
