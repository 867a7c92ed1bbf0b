"""How ranks share the work: `local` (one rank), `ddp`, `zero` (DeepSpeed), `fsdp2` and `tp`, all of one protocol."""
