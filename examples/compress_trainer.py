"""ACP-SGD under the Hugging Face Trainer: torchrun --nproc_per_node=2 compress_trainer.py (on CPUs or GPUs)."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments

from llmsys.compress import CompressConfig, register

shape = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4)
model = AutoModelForCausalLM.from_config(shape)  # yours: AutoModelForCausalLM.from_pretrained("...")


class Compress(TrainerCallback):
    def on_train_begin(self, *_, **__):
        self.state = register(trainer.model_wrapped, CompressConfig(method="acpsgd", r=4))


rows = (torch.arange(32) + torch.arange(256)[:, None]) % 256  # yours: tokenised text
data = [{"input_ids": row, "labels": row} for row in rows]
cpu = not torch.cuda.is_available()
settings = TrainingArguments(
    "out", max_steps=20, learning_rate=3e-3, logging_steps=5, save_strategy="no", report_to=[], use_cpu=cpu
)
trainer = Trainer(model, settings, train_dataset=data, callbacks=[Compress()])
trainer.train()
