"""Shapes that real models have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One model: cells a mini-batch, genes, batches, hidden units, layers, latent dimensions."""

    name: str
    cells: int
    genes: int
    batches: int
    hidden: int
    layers: int
    latent: int
    likelihood: str
    norm: str

    def scaled(self, cells: int) -> Shape:
        """The same model with smaller mini-batches, for machines that are small."""
        return Shape(**(self.__dict__ | {"cells": min(self.cells, cells)}))

    def __str__(self) -> str:
        return f"{self.name} ({self.cells} x {self.genes}, {self.likelihood})"


SHAPES = {
    shape.name: shape
    for shape in (
        # scvi-tools' defaults
        Shape("tutorial", 128, 2_000, 16, 128, 1, 10, "zinb", "batch"),
        # Human Lung Cell Atlas scANVI
        Shape("hlca", 1_024, 2_000, 14, 128, 2, 30, "nb", "layer"),
        # lung cancer atlas scANVI
        Shape("nsclc", 1_024, 6_000, 505, 128, 2, 10, "zinb", "layer"),
        # CELLxGENE Census human scVI
        Shape("census", 1_024, 8_000, 11_108, 128, 2, 50, "nb", "batch"),
        # a 10x reference, every gene
        Shape("allgenes", 1_024, 36_601, 20, 128, 1, 10, "zinb", "batch"),
    )
}
