"""LoRA-FA in a loop of one's own under Accelerate: accelerate launch lorafa_accelerate.py (or python, or torchrun)."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from llmsys.lorafa import LoRAFAConfig, assert_same_across_ranks, inject, save_adapter

accelerator = Accelerator()
shape = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4)
model = AutoModelForCausalLM.from_config(shape)  # yours: AutoModelForCausalLM.from_pretrained("...")
inject(model, LoRAFAConfig(r=16, alpha=32, recompute="mlp"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
loader = DataLoader((torch.arange(32) + torch.arange(256)[:, None]) % 256, batch_size=16, shuffle=True)  # yours: text
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
assert_same_across_ranks(model)
for rows in loader:
    loss = model(input_ids=rows, labels=rows).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"loss {loss.item():.3f}")
if accelerator.is_main_process:
    save_adapter(model, "out/adapter")  # load_adapter(model, "out/adapter") brings it back
