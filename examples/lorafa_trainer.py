"""LoRA-FA under the Hugging Face Trainer: python lorafa_trainer.py (on CPUs, a GPU, or several under torchrun)."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from llmsys.lorafa import LoRAFAConfig, inject, save_adapter

shape = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4)
model = AutoModelForCausalLM.from_config(shape)  # yours: AutoModelForCausalLM.from_pretrained("...")
inject(model, LoRAFAConfig(r=16, alpha=32, recompute="mlp"))  # about four times LoRA's rank, three times its rate

rows = (torch.arange(32) + torch.arange(256)[:, None]) % 256  # yours: tokenised text
data = [{"input_ids": row, "labels": row} for row in rows]
settings = TrainingArguments("out", max_steps=20, learning_rate=3e-2, logging_steps=5, save_strategy="no", report_to=[])
trainer = Trainer(model, settings, train_dataset=data)
trainer.train()
if trainer.is_world_process_zero():
    save_adapter(model, "out/adapter")  # load_adapter(model, "out/adapter") brings it back
