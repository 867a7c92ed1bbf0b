"""How gradients are compressed. Imports nothing but the standard library."""

from __future__ import annotations

from dataclasses import dataclass

from llmsys.schema.compress import Settings


@dataclass(frozen=True, kw_only=True)
class CompressConfig(Settings):
    """One way to exchange gradients, equal on all ranks: a `method` of `schema.compress.METHODS`, and the settings that
    `schema.compress.Settings` explains. ValueError for those that do not go together."""

    method: str = "acpsgd"
