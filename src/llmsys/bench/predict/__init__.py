"""`bench_predict`: memory by phase and the time of a step, by arithmetic on a config, without torch.

    python -m llmsys +exp=bench_predict model=llama2_70b hardware=a800x8 engine=zero3_offload train.recompute=block

`machine` says what a machine has, `prediction` what a config needs of it, `tables` prints both.
"""
