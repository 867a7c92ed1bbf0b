"""ACP-SGD under the Hugging Face Trainer: torchrun --nproc_per_node=2 compress_trainer.py (on CPUs or GPUs)."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from llmsys.compress import CompressConfig, load_state, register, save_state

shape = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4)
model = AutoModelForCausalLM.from_config(shape)  # yours: AutoModelForCausalLM.from_pretrained("...")


class Compress(TrainerCallback):
    def on_train_begin(self, args, state, *_, **__):
        scaler = trainer.accelerator.scaler  # with fp16=True
        scale = scaler.get_scale if scaler else None
        self.state = register(trainer.model_wrapped, CompressConfig(method="acpsgd", r=4), loss_scale=scale)
        if state.global_step:  # goes on from a checkpoint, with what has not been sent yet
            load_state(self.state, f"{args.output_dir}/checkpoint-{state.global_step}")

    def on_save(self, args, state, *_, **__):
        save_state(self.state, f"{args.output_dir}/checkpoint-{state.global_step}")  # on every rank


rows = (torch.arange(32) + torch.arange(256)[:, None]) % 256  # yours: tokenised text
data = [{"input_ids": row, "labels": row} for row in rows]
cpu = not torch.cuda.is_available()
settings = TrainingArguments(
    "out", max_steps=20, learning_rate=3e-3, logging_steps=5, save_steps=10, report_to=[], use_cpu=cpu
)
trainer = Trainer(model, settings, train_dataset=data, callbacks=[Compress()])
trainer.train(resume_from_checkpoint=get_last_checkpoint("out") if Path("out").is_dir() else None)
