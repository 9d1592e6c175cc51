"""The modules: constructor, ``state_dict`` and forward of scvi-tools' own."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .backends import BACKENDS, Choice, choose
from .functional import count_nll, covariate_linear, softmax_library
from .ops._common import check_labels, check_option, check_tensors, compute_dtype, no_autocast
from .ops.log_prob import nb_log_prob, poisson_log_prob, zinb_log_prob
from .ops.softmax_library import SCALE_ACTIVATIONS, log_sum_exp
from .reference.log_prob import LIKELIHOODS

__all__ = ["DecoderSCVI", "Explanation", "FCLayers"]

DISPERSIONS = ("gene", "gene-batch", "gene-label", "gene-cell")


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    """Return the method that a module is called by: its class's, unless it has one of its own."""
    return vars(module).get("forward", type(module).forward)


def _is_plain_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and _forward_of(module) is nn.Linear.forward


def _is_plain_batch_norm(module: _BatchNorm) -> bool:
    # Not by its class: Lightning's sync_batchnorm leaves a class of its own where BatchNorm1d was.
    return _forward_of(module) is _BatchNorm.forward and not isinstance(
        module, (nn.BatchNorm2d, nn.BatchNorm3d)
    )


@dataclass
class _Layer:
    """One hidden layer, taken apart at the time of the call: users may have changed its parts."""

    linear: nn.Linear
    batch_norm: _BatchNorm | None
    layer_norm: nn.LayerNorm | None
    activation: str
    activation_parameter: float
    then: list[nn.Module]  # what follows and is called as it stands


def _activation(module: nn.Module) -> tuple[str, float] | None:
    """Name and parameter by which ``covariate_linear`` knows an activation, or None."""
    kind = type(module)
    if kind is nn.ReLU:
        return "relu", 0.0
    if kind is nn.LeakyReLU:
        return "leaky_relu", float(module.negative_slope)  # type: ignore[arg-type]
    if kind is nn.ELU:
        return "elu", float(module.alpha)  # type: ignore[arg-type]
    if kind is nn.GELU and module.approximate == "none":
        return "gelu", 0.0
    if kind is nn.SiLU:
        return "silu", 0.0
    if kind is nn.Identity:
        return "identity", 0.0
    return None


def _take_apart(layer: nn.Module) -> _Layer | str:
    """Take one hidden layer apart, or say why it cannot be fused."""
    parts = [part for part in layer.children() if part is not None]
    for part in (layer, *parts):
        if _has_hooks(part):
            return f"{type(part).__name__} has hooks, which only its own forward calls"
    if not parts or not _is_plain_linear(parts[0]):
        return f"it starts with {type(parts[0]).__name__ if parts else 'nothing'}, not nn.Linear"
    out = _Layer(parts[0], None, None, "identity", 0.0, [])  # type: ignore[arg-type]
    for position, part in enumerate(parts[1:], start=1):
        if isinstance(part, nn.SyncBatchNorm):
            return f"{type(part).__name__} shares its statistics among devices, which only it can"
        if isinstance(part, _BatchNorm):
            if not _is_plain_batch_norm(part):
                return f"it has {type(part).__name__}, not nn.BatchNorm1d"
            if part.momentum is None:
                return "its batch norm averages cumulatively (momentum=None)"
            if not part.track_running_stats and part.running_mean is not None:
                return "its batch norm no longer tracks the statistics that it has"
            if out.layer_norm is not None or out.batch_norm is not None:
                return "its norms are not in the order batch norm, layer norm"
            out.batch_norm = part
        elif isinstance(part, nn.LayerNorm):
            if part.elementwise_affine or len(part.normalized_shape) != 1 or out.layer_norm:
                return "its layer norm is not the plain one over hidden units"
            out.layer_norm = part
        elif (known := _activation(part)) is not None:
            out.activation, out.activation_parameter = known
            out.then = parts[position + 1 :]
            break
        else:
            out.then = parts[position:]
            break
    if any(isinstance(m, (nn.Linear, _BatchNorm, nn.LayerNorm)) for m in out.then):
        return "its parts are not in the order linear, norms, activation"
    return out


class FCLayers(nn.Module):
    """Fully-connected hidden layers with covariates: scvi-tools' ``FCLayers``, faster.

    Parameters
    ----------
    n_in
        Dimensionality of the input.
    n_out
        Dimensionality of the output.
    n_cat_list
        Number of categories of each covariate; a covariate with one category is ignored.
    n_cont
        Dimensionality of the continuous covariates.
    n_layers
        Number of hidden layers.
    n_hidden
        Number of units of each hidden layer.
    dropout_rate
        Dropout rate of each hidden layer.
    use_batch_norm
        Whether the layers have batch norm.
    use_layer_norm
        Whether the layers have layer norm, after batch norm if both are on.
    use_activation
        Whether the layers have an activation.
    bias
        Whether the linear maps learn a bias.
    inject_covariates
        Whether covariates enter every layer, or the first alone.
    activation_fn
        Class of the activation.
    use_fused
        Whether to take the fast path: covariates as lookups, fused kernels where they can run.
    """

    use_fused: bool = True
    _input_name = "x"  # in errors

    def __init__(
        self,
        n_in: int,
        n_out: int,
        n_cat_list: Iterable[int] | None = None,
        n_cont: int = 0,
        n_layers: int = 1,
        n_hidden: int = 128,
        dropout_rate: float = 0.1,
        use_batch_norm: bool = True,
        use_layer_norm: bool = False,
        use_activation: bool = True,
        bias: bool = True,
        inject_covariates: bool = True,
        activation_fn: Callable[[], nn.Module] = nn.ReLU,
        *,
        use_fused: bool = True,
    ) -> None:
        super().__init__()
        self.use_fused = use_fused
        self.inject_covariates = inject_covariates
        self.n_cat_list = [n_cat if n_cat > 1 else 0 for n_cat in n_cat_list or ()]
        self.n_cov = n_cont + sum(self.n_cat_list)
        dims = [n_in] + (n_layers - 1) * [n_hidden] + [n_out]
        layers: collections.OrderedDict[str, nn.Module] = collections.OrderedDict()
        for i, (n_from, n_to) in enumerate(itertools.pairwise(dims)):
            parts = [
                nn.Linear(n_from + self.n_cov * self.inject_into_layer(i), n_to, bias=bias),
                # momentum and eps as scvi-tools inherited them from its TensorFlow original
                nn.BatchNorm1d(n_to, momentum=0.01, eps=0.001) if use_batch_norm else None,
                nn.LayerNorm(n_to, elementwise_affine=False) if use_layer_norm else None,
                activation_fn() if use_activation else None,
                nn.Dropout(p=dropout_rate) if dropout_rate > 0 else None,
            ]
            # Absent parts keep their place: it is in the keys of the state_dict.
            layers[f"Layer {i}"] = nn.Sequential(*parts)  # type: ignore[arg-type]
        self.fc_layers = nn.Sequential(layers)

    def inject_into_layer(self, layer_num: int) -> bool:
        """Say whether covariates enter this layer."""
        return layer_num == 0 or self.inject_covariates

    def set_online_update_hooks(self, hook_first_layer: bool = True) -> None:
        """Let only the weights of categories learn (scArches surgery).

        Parameters
        ----------
        hook_first_layer
            Whether the first layer is restricted too.
        """
        self.hooks: list[Any] = []
        n_categories = sum(self.n_cat_list)

        def only_categories(grad: Tensor) -> Tensor:
            kept = torch.zeros_like(grad)
            if n_categories > 0:
                kept[..., -n_categories:] = grad[..., -n_categories:]
            return kept

        for i, layers in enumerate(self.fc_layers):
            if i == 0 and not hook_first_layer:
                continue
            for layer in layers:  # type: ignore[attr-defined]
                if isinstance(layer, nn.Linear):
                    hook = only_categories if self.inject_into_layer(i) else torch.zeros_like
                    self.hooks.append(layer.weight.register_hook(hook))
                    if layer.bias is not None:
                        self.hooks.append(layer.bias.register_hook(torch.zeros_like))

    def _check_input(self, x: Tensor) -> None:
        """Refuse what does not fit the first layer, in words that are not the layer's."""
        check_tensors(**{self._input_name: x})
        linear = next(self.fc_layers[0].children(), None)  # type: ignore[arg-type]
        if not isinstance(linear, nn.Linear):
            return
        n_in = linear.in_features - self.n_cov
        if x.dim() == 0 or x.shape[-1] != n_in:
            raise ValueError(
                f"{self._input_name} has shape {tuple(x.shape)}, expected (cells, {n_in}) or "
                f"(samples, cells, {n_in})"
            )

    def _categories(self, cat_list: tuple[Tensor | None, ...]) -> list[tuple[Tensor, int]]:
        """Pair the covariates that count with their numbers of categories."""
        if len(self.n_cat_list) > len(cat_list):
            raise ValueError(
                f"got {len(cat_list)} categorical covariates, but n_cat_list names "
                f"{len(self.n_cat_list)} of them"
            )
        out = []
        for k, (n_cat, cat) in enumerate(zip(self.n_cat_list, cat_list, strict=False)):
            if n_cat == 0:  # one category: nothing to inject
                continue
            if cat is None:
                raise ValueError(
                    f"categorical covariate {k} is None, but n_cat_list gives it {n_cat} categories"
                )
            out.append((cat, n_cat))
        return out

    def unfused_reason(self) -> str | None:
        """Say why the hidden layers run as plain eager PyTorch, or None if they are fused."""
        if not self.use_fused:
            return "use_fused=False"
        for name, layer in self.fc_layers.named_children():
            if isinstance(parts := _take_apart(layer), str):
                return f"{name} cannot be fused: {parts}"
        return None

    def forward(self, x: Tensor, *cat_list: Tensor | None, cont: Tensor | None = None) -> Tensor:
        """Compute the hidden layers.

        Parameters
        ----------
        x
            (N, n_in) or (S, N, n_in).
        *cat_list
            One tensor a covariate, in the order of ``n_cat_list``: integer labels (N, 1), or an
            (N, n_cat) one-hot or soft matrix. None where there is one category; extra ones are
            ignored.
        cont
            Continuous covariates (N, n_cont).

        Returns
        -------
        Tensor
            (N, n_out) or (S, N, n_out).

        Raises
        ------
        ValueError
            If a covariate is missing, has the wrong shape, or holds a label out of range.
        TypeError
            If a covariate has a dtype that does not fit.
        """
        categories = self._categories(cat_list)
        if not self.use_fused or not isinstance(x, Tensor) or x.dim() not in (2, 3):
            return self._forward_eager(x, categories, cont)
        layers = []
        for layer in self.fc_layers:
            if isinstance(parts := _take_apart(layer), str):
                return self._forward_eager(x, categories, cont)
            layers.append(parts)
        if layers and x.shape[-1] != layers[0].linear.in_features - self.n_cov:
            self._check_input(x)
        tensors = [cat for cat, _ in categories]
        n_cats = [n_cat for _, n_cat in categories]
        for i, parts in enumerate(layers):
            injected = self.inject_into_layer(i)
            if injected and cont is not None:
                extra = cont if x.dim() == 2 else cont.expand(x.shape[0], *cont.shape)
                x = torch.cat((x, extra), dim=-1)
            norm = parts.batch_norm
            training = norm is not None and norm.training
            if norm is not None and training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1 if x.dim() == 2 else x.shape[0])
            x = covariate_linear(
                x,
                parts.linear.weight,
                parts.linear.bias,
                tensors if injected else (),
                n_cats if injected else (),
                use_batch_norm=norm is not None,
                batch_norm_weight=None if norm is None else norm.weight,
                batch_norm_bias=None if norm is None else norm.bias,
                running_mean=None if norm is None else norm.running_mean,
                running_var=None if norm is None else norm.running_var,
                training=training,
                momentum=0.0 if norm is None else norm.momentum,  # type: ignore[arg-type]
                batch_norm_eps=1e-3 if norm is None else norm.eps,
                use_layer_norm=parts.layer_norm is not None,
                layer_norm_eps=1e-5 if parts.layer_norm is None else parts.layer_norm.eps,
                activation=parts.activation,
                activation_parameter=parts.activation_parameter,
            )
            for module in parts.then:
                x = module(x)
        return x

    def _forward_eager(
        self, x: Tensor, categories: list[tuple[Tensor, int]], cont: Tensor | None
    ) -> Tensor:
        """Run the modules one by one.

        Covariates are one-hot matrices, concatenated to the input of each layer; or lookups, where
        ``use_fused`` allows them and the linear maps do.
        """
        self._check_input(x)
        covariates = [] if cont is None else [cont]
        look_up = self.use_fused and x.dim() in (2, 3) and self._has_plain_linears()
        if not look_up:
            covariates += self._one_hots(categories)
        for i, layers in enumerate(self.fc_layers):
            injected = self.inject_into_layer(i)
            if covariates and injected:
                extra = covariates
                if x.dim() == 3:
                    extra = [c.expand(x.shape[0], *c.shape) for c in covariates]
                x = torch.cat((x, *extra), dim=-1)
            for position, layer in enumerate(layers):  # type: ignore[arg-type, var-annotated]
                if look_up and injected and categories and position == 0:
                    tensors, n_cats = zip(*categories, strict=True)
                    x = covariate_linear(
                        x, layer.weight, layer.bias, tensors, n_cats, activation="identity"
                    )
                elif isinstance(layer, _BatchNorm) and x.dim() == 3:
                    x = torch.stack([layer(sample) for sample in x])
                elif layer is not None:
                    x = layer(x)
        return x

    def _has_plain_linears(self) -> bool:
        """Whether every layer starts with an nn.Linear whose forward nobody changed or hooks."""
        first: list[Any] = [next(iter(layer), None) for layer in self.fc_layers]  # type: ignore[call-overload]
        return all(_is_plain_linear(part) and not _has_hooks(part) for part in first)

    def _one_hots(self, categories: list[tuple[Tensor, int]]) -> list[Tensor]:
        """Return covariates as one-hot (or soft) matrices."""
        matrices = []
        for k, (cat, n_cat) in enumerate(categories):
            if cat.dim() == 2 and cat.size(1) == n_cat:
                matrices.append(cat)
            elif cat.is_floating_point() or cat.dtype == torch.bool:
                raise TypeError(
                    f"category {k} has dtype {cat.dtype} and shape {tuple(cat.shape)}; expected "
                    f"integer labels (cells, 1), or a (cells, {n_cat}) one-hot matrix"
                )
            else:
                labels = cat.reshape(cat.shape[0]).long()
                if not torch.compiler.is_compiling():
                    check_labels(labels, n_cat, f"category {k}")
                matrices.append(F.one_hot(labels, n_cat))
        return matrices


class Explanation(list[tuple[str, Choice]]):
    """Which implementation each step of a decoder takes, and why not a faster one.

    A list of ``(step, Choice)`` that prints as a text for people.
    """

    def __repr__(self) -> str:
        return "\n".join(f"{step}\n    " + str(c).replace("\n", "\n    ") for step, c in self)


class DecoderSCVI(nn.Module):
    """Decode latent space and covariates to the parameters of a (zero-inflated) negative binomial.

    A drop-in for ``scvi.nn.DecoderSCVI``: same constructor, forward, ``state_dict``, random
    initialisation and gradients.

    Parameters
    ----------
    n_input
        Dimensionality of the latent space (plus continuous covariates).
    n_output
        Number of genes ``G``.
    n_cat_list
        Number of categories of each categorical covariate; one category is ignored.
    n_layers
        Number of hidden layers.
    n_hidden
        Number of units of each hidden layer.
    inject_covariates
        Whether covariates enter every hidden layer, or the first alone.
    use_batch_norm
        Whether the hidden layers have batch norm.
    use_layer_norm
        Whether the hidden layers have layer norm, after batch norm if both are on.
    scale_activation
        ``"softmax"`` over the genes, or ``"softplus"``.
    **kwargs
        Further arguments of :class:`FCLayers` (``n_cont``, ``bias``, ``use_activation``,
        ``activation_fn``).
    use_fused
        Whether to take the fast path. False runs plain eager PyTorch.

    Raises
    ------
    ValueError
        If ``scale_activation`` is unknown.
    """

    use_fused: bool = True

    def __init__(
        self,
        n_input: int,
        n_output: int,
        n_cat_list: Iterable[int] | None = None,
        n_layers: int = 1,
        n_hidden: int = 128,
        inject_covariates: bool = True,
        use_batch_norm: bool = False,
        use_layer_norm: bool = False,
        scale_activation: str = "softmax",
        *,
        use_fused: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_option("scale_activation", scale_activation, SCALE_ACTIVATIONS)
        self.use_fused = use_fused
        # The order in which parameters are created decides what a seed gives.
        self.px_decoder = FCLayers(
            n_in=n_input,
            n_out=n_hidden,
            n_cat_list=n_cat_list,
            n_layers=n_layers,
            n_hidden=n_hidden,
            dropout_rate=0,
            inject_covariates=inject_covariates,
            use_batch_norm=use_batch_norm,
            use_layer_norm=use_layer_norm,
            use_fused=use_fused,
            **kwargs,
        )
        self.px_decoder._input_name = "z"
        self.px_scale_decoder = nn.Sequential(
            nn.Linear(n_hidden, n_output),
            nn.Softmax(dim=-1) if scale_activation == "softmax" else nn.Softplus(),
        )
        self.px_r_decoder = nn.Linear(n_hidden, n_output)
        self.px_dropout_decoder = nn.Linear(n_hidden, n_output)

    def _scale_activation(self) -> str | None:
        """Name of the scale head's activation, or None if it is neither of the known ones."""
        activation = self.px_scale_decoder[-1]
        if type(activation) is nn.Softmax and activation.dim == -1:
            return "softmax"
        if type(activation) is nn.Softplus and activation.beta == 1 and activation.threshold == 20:
            return "softplus"
        return None

    def _unfused_heads(self) -> str | None:
        """Say why the heads run as plain eager PyTorch, or None if they are fused."""
        if not self.use_fused:
            return "use_fused=False"
        if self._scale_activation() is None or len(self.px_scale_decoder) != 2:
            return "px_scale_decoder is not a linear map and softmax or softplus"
        heads = (self.px_scale_decoder[0], self.px_r_decoder, self.px_dropout_decoder)
        if not all(_is_plain_linear(head) for head in heads):
            return "a head is not nn.Linear"
        for module in (self.px_scale_decoder, self.px_scale_decoder[1], *heads):
            if _has_hooks(module):
                return f"{type(module).__name__} has hooks, which only its own forward calls"
        return None

    def forward(
        self, dispersion: str, z: Tensor, library: Tensor, *cat_list: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Decode.

        Parameters
        ----------
        dispersion
            ``"gene"``, ``"gene-batch"``, ``"gene-label"`` or ``"gene-cell"``.
        z
            Latent representation, (N, n_input) or (S, N, n_input).
        library
            Natural logarithm of the library size, (N, 1), (S, N, 1) or (1, 1).
        *cat_list
            Categorical covariates, as in :meth:`FCLayers.forward`; extra ones are ignored.

        Returns
        -------
        tuple
            ``px_scale`` (normalised expression), ``px_r`` (log inverse dispersion; None unless
            ``dispersion`` is ``"gene-cell"``), ``px_rate`` (expected counts) and ``px_dropout``
            (dropout logits), each (N, G) or (S, N, G).

        Raises
        ------
        ValueError
            If ``dispersion`` is unknown, a shape does not fit, or a label is out of range.
        TypeError
            If ``z`` is not a tensor, or a covariate has a dtype that does not fit.
        """
        check_option("dispersion", dispersion, DISPERSIONS)
        px = self.px_decoder(z, *cat_list)
        px_scale, px_rate = self._scale_and_rate(px, library)
        px_dropout = self.px_dropout_decoder(px)
        px_r = self.px_r_decoder(px) if dispersion == "gene-cell" else None
        return px_scale, px_r, px_rate, px_dropout

    def _scale_and_rate(self, px: Tensor, library: Tensor) -> tuple[Tensor, Tensor]:
        if (
            self._unfused_heads() is not None
            or library.dim() not in (2, 3)
            or library.shape[-1] != 1
            or library.dim() > px.dim()
        ):
            px_scale = self.px_scale_decoder(px)
            return px_scale, torch.exp(library) * px_scale
        activation = self._scale_activation()
        assert activation is not None
        head = self.px_scale_decoder[0]
        return softmax_library(
            px,
            library,
            weight=head.weight,  # type: ignore[arg-type]
            bias=head.bias,  # type: ignore[arg-type]
            scale_activation=activation,
        )

    def reconstruction_loss(
        self,
        x: Tensor,
        z: Tensor,
        library: Tensor,
        *cat_list: Tensor | None,
        likelihood: str = "zinb",
        dispersion: str = "gene",
        px_r: Tensor | None = None,
        px_r_index: Tensor | None = None,
    ) -> Tensor:
        """Compute the negative log-likelihood of each cell, without a cells x genes tensor.

        The value of ``-Distribution(*decoder(...)).log_prob(x).sum(-1)`` with scvi-tools'
        distributions. Heads that the likelihood does not use are not computed and get no gradient.

        Parameters
        ----------
        x
            Counts (N, G): dense of any real dtype, or ``torch.sparse_csr``. Not differentiated.
        z, library, *cat_list
            As in :meth:`forward`.
        likelihood
            ``"nb"``, ``"zinb"``, ``"poisson"`` or ``"normal"``.
        dispersion
            ``"gene"``, ``"gene-batch"``, ``"gene-label"`` or ``"gene-cell"``.
        px_r
            Log inverse dispersion: (G,) for ``"gene"``; (G, n) with ``px_r_index`` for
            ``"gene-batch"`` and ``"gene-label"``; None for ``"gene-cell"`` and for ``"poisson"``.
        px_r_index
            Batch or label of each cell, integer (N,) or (N, 1).

        Returns
        -------
        Tensor
            Nats, (N,) or (S, N); a fresh tensor.

        Raises
        ------
        ValueError
            If an option is unknown or contradicts another, a shape or device does not fit, a label
            is out of range, or a count is negative or not a number.
        TypeError
            If an input has a dtype or layout that does not fit.
        """
        check_option("likelihood", likelihood, LIKELIHOODS)
        check_option("dispersion", dispersion, DISPERSIONS)
        if likelihood != "poisson":
            _check_px_r(dispersion, px_r, px_r_index)
        hidden = self.px_decoder(z, *cat_list)
        return self._hidden_loss(
            x,
            hidden,
            library,
            likelihood=likelihood,
            dispersion=dispersion,
            px_r=px_r,
            px_r_index=px_r_index,
        )

    def _hidden_loss(
        self,
        x: Tensor,
        hidden: Tensor,
        library: Tensor,
        *,
        likelihood: str,
        dispersion: str,
        px_r: Tensor | None,
        px_r_index: Tensor | None,
    ) -> Tensor:
        """:meth:`reconstruction_loss` from hidden units (N, H) or (S, N, H) instead of ``z``."""
        gene_cell = dispersion == "gene-cell" and likelihood != "poisson"
        if self._unfused_heads() is not None:
            return self._loss_eager(x, hidden, library, likelihood, gene_cell, px_r, px_r_index)
        activation = self._scale_activation()
        assert activation is not None
        scale, r, dropout = self.px_scale_decoder[0], self.px_r_decoder, self.px_dropout_decoder
        return count_nll(
            x,
            hidden,
            library,
            scale.weight,  # type: ignore[arg-type]
            scale.bias,  # type: ignore[arg-type]
            likelihood=likelihood,
            scale_activation=activation,
            dropout_weight=dropout.weight,  # only zinb takes it
            dropout_bias=dropout.bias,
            px_r=px_r,
            px_r_index=px_r_index,
            r_weight=r.weight if gene_cell else None,
            r_bias=r.bias if gene_cell else None,
        )

    def _hidden_normaliser(self, hidden: Tensor) -> Tensor | None:
        """Log of each cell's softmax normaliser, (..., 1), from hidden units; None with softplus.

        Not differentiable; the heads must be the fused ones.
        """
        if self._scale_activation() == "softplus":
            return None
        head: Any = self.px_scale_decoder[0]
        with no_autocast(hidden.device):
            hidden = hidden.to(head.weight.dtype)
            return log_sum_exp(hidden, head.weight, head.bias).unsqueeze(-1)

    def _hidden_scale(
        self, hidden: Tensor, genes: Tensor | None = None, normaliser: Tensor | None = None
    ) -> Tensor:
        """``px_scale`` of some genes (indices; default: all) from hidden units, fresh.

        A softmax is over all genes, whichever are asked for: ``normaliser`` is then what
        :meth:`_hidden_normaliser` returns. Not differentiable where ``genes`` is given; the heads
        must be the fused ones.
        """
        head: Any = self.px_scale_decoder[0]
        weight, bias = head.weight, head.bias
        hidden = hidden.to(weight.dtype)
        with no_autocast(hidden.device):
            if genes is not None:
                weight, bias = weight[genes], None if bias is None else bias[genes]
            logits = F.linear(hidden, weight, bias)
            if self._scale_activation() == "softplus":
                return F.softplus(logits)
            if genes is None:
                return torch.softmax(logits, -1)
            assert normaliser is not None
            return logits.sub_(normaliser).exp_()

    def _loss_eager(
        self,
        x: Tensor,
        hidden: Tensor,
        library: Tensor,
        likelihood: str,
        gene_cell: bool,
        px_r: Tensor | None,
        px_r_index: Tensor | None,
    ) -> Tensor:
        """Compute the loss from whole cells x genes tensors."""
        if x.layout != torch.strided:
            x = x.to_dense()
        px_scale = self.px_scale_decoder(hidden)
        mu = torch.exp(library) * px_scale
        if likelihood == "poisson":
            return -poisson_log_prob(x, mu).sum(-1)
        if gene_cell:
            px_r = self.px_r_decoder(hidden)
        elif px_r_index is not None:
            assert px_r is not None
            labels = px_r_index.reshape(-1).long()
            check_labels(labels, px_r.shape[1], "px_r_index")
            px_r = px_r.t()[labels]
        assert px_r is not None
        theta = px_r.exp()
        if likelihood == "normal":
            return -torch.distributions.Normal(mu, theta, validate_args=False).log_prob(x).sum(-1)
        if likelihood == "nb":
            return -nb_log_prob(x, mu, theta).sum(-1)
        return -zinb_log_prob(x, mu, theta, self.px_dropout_decoder(hidden)).sum(-1)

    def explain(self, z: Tensor, likelihood: str = "zinb") -> Explanation:
        """Say which implementation each step takes for this input, and why not a faster one.

        Parameters
        ----------
        z
            A latent representation, (N, n_input) or (S, N, n_input): its device and dtype decide.
        likelihood
            The likelihood of :meth:`reconstruction_loss`.

        Returns
        -------
        Explanation
            A list of ``(step, Choice)``; print it. A step with backend ``"eager"`` runs the modules
            one by one.

        Raises
        ------
        ValueError
            If ``likelihood`` is unknown, or ``z`` has a width that does not fit.
        TypeError
            If ``z`` is not a tensor.
        """
        check_option("likelihood", likelihood, LIKELIHOODS)
        if isinstance(self.px_decoder, FCLayers):
            self.px_decoder._check_input(z)
        dtype = compute_dtype(z, self.px_r_decoder.weight)

        def step(operation: str, reason: str | None, likelihood: str | None = None) -> Choice:
            if reason is None:
                return choose(operation, device=z.device, dtype=dtype, likelihood=likelihood)
            return Choice(operation, "eager", dict.fromkeys(BACKENDS, reason))

        heads = self._unfused_heads()
        return Explanation(
            [
                ("hidden layers", step("covariate_linear", self.px_decoder.unfused_reason())),
                ("px_scale, px_rate", step("softmax_library", heads)),
                (f"reconstruction_loss, {likelihood}", step("count_nll", heads, likelihood)),
            ]
        )


def _check_px_r(dispersion: str, px_r: Tensor | None, px_r_index: Tensor | None) -> None:
    """Refuse a px_r that does not go with the dispersion."""
    if dispersion == "gene-cell":
        if px_r is not None or px_r_index is not None:
            raise ValueError(
                "dispersion='gene-cell' takes its dispersion from px_r_decoder: "
                "px_r and px_r_index must be None"
            )
        return
    if px_r is None:
        raise ValueError(
            f"dispersion={dispersion!r} needs px_r, the log inverse dispersion "
            + ("(genes,)" if dispersion == "gene" else "(genes, categories)")
        )
    if (px_r_index is None) != (dispersion == "gene"):
        raise ValueError(
            f"dispersion={dispersion!r} "
            + (
                "has one px_r for all cells: px_r_index must be None"
                if dispersion == "gene"
                else "needs px_r_index, the batch or label of each cell"
            )
        )
