"""ACP-SGD between two replicas, each sharded by FSDP2 (HSDP): torchrun --nproc_per_node=4 compress_fsdp2.py."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig

from llmsys.compress import CompressConfig, ShardAggregator, save_state

dist.init_process_group()
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # replicas begin alike; nobody makes them so
device = "cuda" if torch.cuda.is_available() else "cpu"
mesh = init_device_mesh(device, (2, world // 2), mesh_dim_names=("replicate", "shard"))
shape = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4)
model = AutoModelForCausalLM.from_config(shape).to(device)  # yours: AutoModelForCausalLM.from_pretrained("...")
for block in (*model.model.layers, model):
    fully_shard(block, mesh=mesh["shard"])
replicas = ShardAggregator(model, CompressConfig(method="acpsgd", r=4), group=mesh["replicate"].get_group())
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
rows = (torch.arange(32) + torch.arange(256)[:, None]) % 256  # yours: tokenised text
for batch in rows[torch.randperm(256)][rank::world].to(device).split(4):
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    replicas.exchange()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"loss {loss.item():.3f}")
save_state(replicas, f"out/shard-{replicas.shard}")  # every rank
dist.destroy_process_group()
