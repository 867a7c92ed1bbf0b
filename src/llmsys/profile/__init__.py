"""Measures: how long each part of a step takes (`spans`), where its memory goes (`memory`), on what (`environment`)."""
