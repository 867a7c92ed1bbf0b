"""What each way to fine-tune keeps from the forward to the backward pass: measured, derived, and predicted.

Four numbers stand beside each other, which have to agree:

    measured     by saved-tensor hooks, each storage once and weights left out, in a model of two blocks on a CPU that
                 has the asked model's ratios; by origin, of an inner block, over (batch x length x width)
    closed form  of the same, as formulas of the shape (`closed`)
    live         bytes of all tensors that are alive after the forward pass, whoever holds them: what is kept as an
                 attribute of some context is invisible to hooks and visible here
    predicted    of the whole model, without building it: `llmsys.cost`, whose own bytes of a block must be those
                 measured, or there is no prediction

    python -m llmsys +exp=lorafa_ledger model=llama2_7b      # one model: measures, predicts, prints, leaves a record
    python -m llmsys.lorafa.ledger benchmarks/records        # the tables of records
"""
