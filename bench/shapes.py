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
    samples: int = 1  # Monte-Carlo samples of each cell
    training: bool = True
    inject_covariates: bool = True  # into every hidden layer, not the first alone
    activation: str = "relu"
    activation_parameter: float = 0.0

    @property
    def rows(self) -> int:
        """Cells times samples."""
        return self.samples * self.cells

    def layer_inputs(self) -> list[tuple[int, int]]:
        """Dense inputs of each hidden layer, and its covariate columns (0: no covariates)."""
        return [
            (
                self.hidden if i else self.latent,
                self.batches if self.batches > 1 and (i == 0 or self.inject_covariates) else 0,
            )
            for i in range(self.layers)
        ]


SHAPES = {
    shape.name: shape
    for shape in (
        # scvi-tools' defaults
        Shape("tutorial", 128, 2_000, 16, 128, 1, 10, "zinb", "batch"),
        # Human Lung Cell Atlas scANVI
        Shape("hlca", 1_024, 2_000, 14, 128, 2, 30, "nb", "layer", inject_covariates=False),
        # lung cancer atlas scANVI
        Shape("nsclc", 1_024, 6_000, 505, 128, 2, 10, "zinb", "layer"),
        # CELLxGENE Census human scVI
        Shape("census", 1_024, 8_000, 11_108, 128, 2, 50, "nb", "batch"),
        # the same model's published configuration
        Shape("census-wide", 1_024, 8_000, 11_108, 512, 1, 200, "nb", "batch"),
        # a 10x reference, every gene
        Shape("allgenes", 1_024, 36_601, 20, 128, 1, 10, "zinb", "batch"),
        # Tahoe-100M scVI
        Shape("tahoe", 4_096, 62_710, 1, 128, 1, 10, "nb", "batch"),
        # PoissonVI on chromatin accessibility
        Shape(
            "peaks",
            *(128, 115_554, 4, 340, 2, 18, "poisson", "layer"),
            activation="leaky_relu",
            activation_parameter=0.01,
        ),
        # posterior sampling
        Shape(
            "montecarlo",
            *(128, 2_000, 16, 128, 1, 10, "nb", "batch"),
            samples=25,
            training=False,
        ),
    )
}

#: Mini-batches of scvi-tools' default size and of those models', with few genes and with many.
COUNTS = tuple(
    Shape(
        f"{cells:,} x {genes:,} {likelihood}", cells, genes, 1, 128, 1, 10, likelihood, "batch"
    )
    for cells, genes, likelihood in (
        (128, 2_000, "zinb"),
        (128, 2_000, "nb"),
        (128, 20_000, "zinb"),
        (1_024, 8_000, "zinb"),
        (1_024, 8_000, "nb"),
        (512, 20_000, "zinb"),
        (512, 20_000, "nb"),
    )
)
