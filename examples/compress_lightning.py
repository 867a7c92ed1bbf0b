"""ACP-SGD under Lightning (pip install lightning), on two processes: python compress_lightning.py."""

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from llmsys.compress import CompressConfig, HookState, compress_hook


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))

    def training_step(self, x):
        loss = (self.net(x) - x).square().mean()
        self.print(f"loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


if __name__ == "__main__":
    model = Model()
    state = HookState(CompressConfig(method="acpsgd", r=4), model)
    strategy = DDPStrategy(process_group_backend="gloo", ddp_comm_state=state, ddp_comm_hook=compress_hook)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=4, logger=False, enable_checkpointing=False
    )
    trainer.fit(model, DataLoader(torch.randn(256, 64), batch_size=16))
