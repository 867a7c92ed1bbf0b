"""ACP-SGD in a loop of one's own under Accelerate: torchrun --nproc_per_node=2 compress_accelerate.py."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from llmsys.compress import CompressConfig, register, save_state

accelerator = Accelerator(cpu=not torch.cuda.is_available())
shape = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4)
model = AutoModelForCausalLM.from_config(shape)  # yours: AutoModelForCausalLM.from_pretrained("...")
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
loader = DataLoader((torch.arange(32) + torch.arange(256)[:, None]) % 256, batch_size=8, shuffle=True)  # yours: text
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
scale = accelerator.scaler.get_scale if accelerator.scaler else None  # with mixed_precision="fp16"
state = register(model, CompressConfig(method="acpsgd", r=4), loss_scale=scale)
for rows in loader:
    loss = model(input_ids=rows, labels=rows).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"loss {loss.item():.3f}")
save_state(state, "out")  # every rank; load_state(state, "out") goes on with what has not been sent yet
