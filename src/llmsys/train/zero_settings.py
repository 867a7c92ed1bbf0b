"""DeepSpeed's own settings of a run, as its JSON has them: those that our engine works with, and that advice writes.

Pure, and without torch. Sizes of batches stand there as numbers, not as `auto`, so that DeepSpeed reads it without
anybody's help.
"""

from __future__ import annotations

from typing import Any

from llmsys import schema

BUCKET = 50_000_000
"""The most elements of a bucket in which gradients are reduced; at the default size buckets are 2 GB each."""


def settings(
    model: schema.Model, train: schema.Train, engine: schema.DeepSpeed, *, trained: int, cuda: bool
) -> dict[str, Any]:
    """A new dict. `trained`: elements of what is trained; `cuda`: the device is a GPU, so that memory is pinned."""
    bucket = min(trained + trained % 2, BUCKET)  # DeepSpeed wants an even number
    zero: dict[str, Any] = {"stage": engine.zero, "reduce_bucket_size": bucket}
    zero["allgather_bucket_size" if engine.zero < 3 else "stage3_prefetch_bucket_size"] = bucket
    if engine.zero == 3:
        zero["stage3_param_persistence_threshold"] = 0  # small weights are cut too: what a rank holds is then exact
    pinned = {"device": "cpu", "pin_memory": cuda}
    if engine.offload != "none":
        zero["offload_optimizer"] = pinned
    if engine.offload == "optimizer+params":
        zero["offload_param"] = pinned
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": schema.accumulation(train, engine),
        "gradient_clipping": train.clip if engine.zero else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    # Stage 0 shares nothing: told of bf16, DeepSpeed would keep fp32 copies that our optimizer does not know
    if model.dtype == "bf16" and engine.zero:
        found["bf16"] = {"enabled": True, "check_grad_overflow": True}
    elif model.dtype == "fp32" and train.precision == "bf16":
        # no module's weights travel in bf16: the numbers are those of autocast on every other engine
        found["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return found
