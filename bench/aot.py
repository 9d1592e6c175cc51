"""Compile every kernel ahead of time, for many GPUs and without one, and say what it takes of them.

What is compiled is not listed by hand: every operation's launchers run on meta tensors at the
shapes of ``bench/shapes.py``, and what they would launch is recorded, specialised by Triton itself
just as a launch would be. The results stand in ``bench/results/aot-triton-<version>.json`` (for
``--check``, and for what need not be compiled again) and ``.md`` (for people).

Exit status 1: something does not compile, spills, takes more shared memory than the chip has, or
uses no matrix instructions where tensor cores are promised; or, with ``--check``, the committed
table is not what comes out here.
"""

from __future__ import annotations

import os

# Read by Triton when it meets a kernel: an interpreted one cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)
# What a launch does by default up to Triton 3.9, which warns that 3.10 will not.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import argparse
import ast
import functools
import hashlib
import importlib
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import re
import resource
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from decoder_fast.backends import implementation
from decoder_fast.reference import count_nll, covariate_linear
from decoder_fast.reference.counts import Counts

from .shapes import SHAPES, Shape

RESULTS = Path(__file__).parent / "results"
#: Bytes of shared memory that one program may take, by target.
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx90a": 64 << 10,
    "gfx942": 64 << 10,
}
TARGETS = tuple(SHARED_LIMIT)
#: CPU seconds after which a compilation is given up: a configuration that is too large.
TIME_LIMIT = 120
PRECISIONS = ("highest", "high", "medium")
#: One letter for each attribute by which Triton specialises an argument, as Triton names them.
_ATTRIBUTES = {"D": ["tt.divisibility", 16], "S": ["tt.pointer_range", 32]}
_LETTERS = {name: letter for letter, (name, _) in _ATTRIBUTES.items()}

Configuration = dict[str, Any]
Result = dict[str, Any]


# What is launched
# ----------------


def _meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def layer(
    shape: Shape,
    n_in: int,
    n_cat: int,
    *,
    norm: str,
    training: bool,
    activation: str,
    soft: bool = False,
) -> covariate_linear.Inputs:
    """The inputs of a hidden layer, on no device."""
    category = _meta(shape.cells, n_cat) if soft else _meta(shape.cells, dtype=torch.int64)
    h = shape.hidden
    batch_norm = norm in ("batch", "both")
    return covariate_linear.Inputs(
        x=_meta(shape.samples, shape.cells, n_in),
        weight=_meta(h, n_in + n_cat),
        bias=_meta(h),
        categories=[category] if n_cat else [],
        n_cats=[n_cat] if n_cat else [],
        batch_norm_weight=_meta(h) if batch_norm else None,
        batch_norm_bias=_meta(h) if batch_norm else None,
        running_mean=_meta(h) if batch_norm else None,
        running_var=_meta(h) if batch_norm else None,
        use_batch_norm=batch_norm,
        batch_statistics=batch_norm and training,
        batch_norm_eps=1e-3,
        use_layer_norm=norm in ("layer", "both"),
        layer_norm_eps=1e-5,
        activation=activation,
        activation_parameter=shape.activation_parameter,
    )


def run_layer(
    inputs: covariate_linear.Inputs, *, backward: bool = True, options: bool = False
) -> None:
    """One hidden layer, forward and backward; with all ``options``: also frozen in part."""
    module = implementation("covariate_linear", "triton")
    moved = None
    if inputs.batch_statistics:
        moved = (inputs.running_mean, inputs.running_var)
    out, *kept = module.forward(inputs, moved, 0.01)
    wanted = {"x", "weight", "bias"}
    if inputs.use_batch_norm:
        wanted |= {"batch_norm_weight", "batch_norm_bias"}
    soft = {
        f"categories.{k}" for k, c in enumerate(inputs.categories) if c.is_floating_point()
    }
    every = [frozenset(wanted | soft)]
    if options:
        every += [frozenset(wanted), frozenset({"x"})]
    for names in every if backward else ():
        module.backward(inputs, torch.empty_like(out), out, *kept, names)


def _layers(shape: Shape) -> Iterator[Callable[[], None]]:
    for n_in, n_cat in shape.layer_inputs():
        for training in {True, shape.training, False}:
            inputs = layer(
                shape,
                n_in,
                n_cat,
                norm=shape.norm,
                training=training,
                activation=shape.activation,
            )
            yield lambda inputs=inputs: run_layer(inputs)
    if shape.name == "tutorial":  # every option, once
        for norm in ("none", "batch", "layer", "both"):
            for activation in covariate_linear.ACTIVATIONS:
                inputs = layer(
                    shape, n_in, n_cat, norm=norm, training=True, activation=activation, soft=True
                )
                yield lambda inputs=inputs: run_layer(
                    inputs, options=inputs.activation == shape.activation
                )


def _head(shape: Shape) -> tuple[Tensor, Tensor]:
    return _meta(shape.genes, shape.hidden), _meta(shape.genes)


def run_softmax(
    shape: Shape, activation: str = "softmax", *, backward: bool = True, options: bool = False
) -> None:
    """``softmax_library`` of logits, forward and backward; with all ``options``: also of hidden
    units, and the gradients from either output.
    """
    module = implementation("softmax_library", "triton")
    logits = _meta(*((shape.samples,) if shape.samples > 1 else ()), shape.cells, shape.genes)
    library = _meta(*logits.shape[:-1], 1)
    scale, rate = module.forward(logits, library, activation)
    if options:
        hidden = _meta(*logits.shape[:-1], shape.hidden)
        module.forward(hidden, library, activation, *_head(shape))
    if not backward:
        return
    gradient = torch.empty_like(rate)
    upstream = (gradient, None)
    for gradients in itertools.product(upstream, upstream) if options else [(gradient, gradient)]:
        for library_wanted in (False, True) if options else (False,):
            module.backward(*gradients, scale, library, activation, True, library_wanted)


def _softmax(shape: Shape) -> Iterator[Callable[[], None]]:
    activations = ("softmax", "softplus") if shape.name == "tutorial" else ("softmax",)
    for activation in activations:
        yield lambda activation=activation: run_softmax(shape, activation, options=True)


def _counts(shape: Shape, layout: str) -> Counts:
    n, genes = shape.cells, shape.genes
    signed = False
    if layout != "csr":
        dtype = torch.int64 if layout == "int64" else torch.float32
        return Counts(_meta(n, genes, dtype=dtype), None, None, None, genes, signed=signed)
    n_values = n * genes // 20 + 1  # not divisible by anything in particular
    index = torch.int32
    return Counts(
        None,
        _meta(n + 1, dtype=index),
        _meta(n_values, dtype=index),
        _meta(n_values),
        genes,
        signed=signed,
    )


def run_counts(
    shape: Shape,
    likelihood: str,
    dispersion: str,
    layout: str,
    activation: str = "softmax",
    *,
    backward: bool = True,
    frozen: bool = False,
    fused: bool = False,
) -> None:
    """``count_nll``, forward and backward, and backward with frozen heads too.

    With ``fused`` on the fused route as far as it goes, which smaller mini-batches take.
    """
    module = implementation("count_nll", "triton")
    if fused:
        with mock.patch.object(module, "FUSED_ELEMENTS", 1 << 62):
            options = {"backward": backward, "frozen": frozen}
            return run_counts(shape, likelihood, dispersion, layout, activation, **options)
    h, genes = shape.hidden, shape.genes
    zinb, counted = likelihood == "zinb", likelihood != "poisson"
    heads = counted and dispersion == "gene-cell"
    table = counted and dispersion == "gene-batch"
    inputs = count_nll.Inputs(
        hidden=_meta(shape.samples, shape.cells, h),
        library=_meta(shape.samples, shape.cells),
        scale_weight=_meta(genes, h),
        scale_bias=_meta(genes),
        dropout_weight=_meta(genes, h) if zinb else None,
        dropout_bias=_meta(genes) if zinb else None,
        r_weight=_meta(genes, h) if heads else None,
        r_bias=_meta(genes) if heads else None,
        px_r=(_meta(genes, max(2, shape.batches)) if table else _meta(genes))
        if counted and not heads
        else None,
        px_r_index=_meta(shape.cells, dtype=torch.int64) if table else None,
        counts=_counts(shape, layout),
        likelihood=likelihood,
        scale_activation=activation,
    )
    nll, shift, usum = module.forward(inputs)
    every = frozenset(
        name
        for name in (
            *("hidden", "library", "scale_weight", "scale_bias", "dropout_weight"),
            *("dropout_bias", "r_weight", "r_bias", "px_r"),
        )
        if getattr(inputs, name) is not None
    )
    gradients = [every] * backward + [frozenset({"hidden", "library"})] * frozen
    for wanted in gradients:
        module.backward(inputs, torch.empty_like(nll), shift, usum, wanted)


def _likelihoods(shape: Shape) -> Iterator[Callable[[], None]]:
    dispersions = ("gene", "gene-batch", "gene-cell")
    if shape.likelihood == "poisson":
        dispersions = dispersions[:1]
    cases = {
        (shape.likelihood, dispersion, layout)
        for dispersion in dispersions
        for layout in ("dense", "csr")
    }
    if shape.name == "tutorial":  # every likelihood, and counts as integers
        cases |= {
            (likelihood, dispersion, "dense")
            for likelihood in ("nb", "zinb", "poisson")
            for dispersion in dispersions
        }
        cases.add((shape.likelihood, "gene", "int64"))
        yield lambda: run_counts(shape, shape.likelihood, "gene", "dense", "softplus")
    for case in sorted(cases):
        frozen = shape.name == "tutorial"
        yield lambda case=case: run_counts(shape, *case, frozen=frozen)
        yield lambda case=case: run_counts(shape, *case, frozen=frozen, fused=True)


CASES: dict[str, Callable[[Shape], Iterator[Callable[[], None]]]] = {
    "covariate_linear": _layers,
    "softmax_library": _softmax,
    "count_nll": _likelihoods,
}


# Recording
# ---------


class _Driver:
    """A driver of a GPU that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.target.backend  # what Triton keeps of a kernel it keeps by device

    def get_current_stream(self, device: object) -> int:
        return 0


class _Pointer:
    """A meta tensor's address, as if its storage began where an allocator would put it."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = tensor.storage_offset() * tensor.element_size()
        self._bytes = tensor.untyped_storage().nbytes()

    def key(self) -> tuple[Any, ...]:
        """All that a launch may depend on."""
        return self.dtype, self._address % 16, self._bytes >> 31

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return self._bytes


def gpu_target(target: str) -> GPUTarget:
    """Triton's description of a target."""
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target[3:]), 32)
    return GPUTarget("hip", target, 64)


@functools.cache
def source_hash(kernel: Any) -> str:
    """Hash of what a kernel computes: its code, and that of what it calls, less all comments."""
    texts: dict[str, str] = {}

    def visit(function: Any) -> None:
        name = f"{function.__module__}.{function.__name__}"
        if name in texts:
            return
        texts[name] = ""
        tree = function.parse()
        body = tree.body[0].body
        if ast.get_docstring(tree.body[0]) is not None:
            del body[0]
        lines = [ast.unparse(tree)]
        for used in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
            value = function.__globals__.get(used)
            if isinstance(value, triton.JITFunction):
                visit(value)
            elif isinstance(value, triton.language.constexpr):
                lines.append(f"{used} = {value.value!r}")
        texts[name] = "\n".join(lines)

    visit(kernel)
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]


def _kernel_name(kernel: Any) -> str:
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"


def _stand_in(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(map(_stand_in, argument))
    return _Pointer(argument) if isinstance(argument, Tensor) else argument


def _configuration(backend: str, launched: Any, options: dict[str, Any]) -> Configuration:
    """Describe what Triton is about to compile, from what it tells its hook.

    An argument is a type and the letters of its attributes, or a constant; or a list of them.
    """
    kernel, details = launched["fn"].jit_function, launched["compile"]

    def argument(kind: Any, path: tuple[int, ...]) -> Any:
        if isinstance(kind, tuple):
            return [argument(part, (*path, i)) for i, part in enumerate(kind)]
        if kind == "constexpr":
            return details["constants"].get(path)
        attributes = details["configs"][0].get(path, ())
        return f"{kind}:" + "".join(sorted(_LETTERS[name] for name, _ in attributes))

    arguments = {
        name: argument(kind, (i,)) for i, (name, kind) in enumerate(details["signature"].items())
    }
    described = {
        "kernel": _kernel_name(kernel),
        "backend": backend,
        "arguments": arguments,
        "constexprs": [p.name for p in kernel.params if p.is_constexpr],
        "options": {k: v for k, v in sorted(options.items()) if k not in arguments},
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]
    return {"id": digest, "source": source_hash(kernel), **described, "shapes": []}


class _Recorder:
    """Takes the place of ``launch``."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.shape = ""
        self.configurations: dict[str, Configuration] = {}
        self.refused: set[str] = set()
        self._known: dict[tuple[Any, ...], Configuration] = {}

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if 0 in grid:
            return
        if self.backend == "hip":
            options.pop("maxnreg", None)  # as launch does
        stand_ins = [_stand_in(arg) for arg in args]
        leaves, tree = torch.utils._pytree.tree_flatten(stand_ins)
        numbers = (leaf.key() if isinstance(leaf, _Pointer) else repr(leaf) for leaf in leaves)
        key = (_kernel_name(kernel), repr(tree), *numbers, *sorted(options.items()))
        if key not in self._known:
            told: list[dict[str, Any]] = []

            def hook(**launched: Any) -> bool:
                told.append(launched)
                return True  # do not compile

            with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", hook):
                try:
                    kernel.warmup(*stand_ins, grid=grid, **options)
                except KeyError as error:  # an option that this backend has not
                    self.refused.add(f"{self.backend} refuses {_kernel_name(kernel)}: {error}")
                    return
            configuration = _configuration(self.backend, told[0], options)
            self._known[key] = self.configurations.setdefault(configuration["id"], configuration)
        shapes = self._known[key]["shapes"]
        if self.shape not in shapes:
            shapes.append(self.shape)


@contextmanager
def precision(setting: str) -> Iterator[None]:
    """Take float32 products as torch's setting says."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def record(backend: str) -> list[Configuration]:
    """Every configuration that the operations launch on GPUs of ``"cuda"`` or ``"hip"``."""
    recorder = _Recorder(backend)
    triton.runtime.driver.set_active(
        _Driver(gpu_target("sm_90" if backend == "cuda" else "gfx942"))
    )
    with ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(torch.version, "hip", "6.0" if backend == "hip" else None)
        )
        for operation in CASES:
            try:
                module = implementation(operation, "triton")
            except ModuleNotFoundError as error:
                print(f"skipped: {operation} has no Triton kernels here ({error})")
                continue
            stack.enter_context(mock.patch.object(module, "launch", recorder))
            # On AMD's GPUs "high" means what "highest" does.
            for setting in PRECISIONS if backend == "cuda" else PRECISIONS[::2]:
                with precision(setting):
                    for recorder.shape, shape in SHAPES.items():
                        for run in CASES[operation](shape):
                            run()
    print("\n".join(sorted(recorder.refused)), end="\n" * bool(recorder.refused))
    return sorted(recorder.configurations.values(), key=lambda c: (c["kernel"], c["id"]))


# Compiling
# ---------


def _kernel(configuration: Configuration) -> Any:
    operation, _, name = configuration["kernel"].partition(".")
    module = importlib.import_module(f"decoder_fast.triton_kernels.{operation}")
    return getattr(module, name)


def _first_number(pattern: str, text: str) -> int:
    found = re.search(pattern + r":?\s*(\d+)", text)
    if found is None:
        raise ValueError(f"the compiler's output has no {pattern!r}")
    return int(found[1])


def _nvidia(ptx: str, log: str) -> Result:
    """Read what ptxas says of the machine code that it made."""
    number = r"(\d+) bytes "
    stack, stored, loaded = map(
        int, re.findall(f"{number}stack frame, {number}spill stores, {number}spill loads", log)[0]
    )
    matrix = re.findall(r"\b(wgmma|mma\.sync|tcgen05)(?=\.mma|\.aligned)", ptx)
    return {
        "registers": _first_number(r"\bUsed", log),
        "stack": stack,
        "spills": stored + loaded,
        "matrix": " ".join(sorted(set(matrix))),
    }


def _amd(text: str) -> Result:
    """Read the assembler's directives."""
    return {
        "registers": _first_number(r"\.vgpr_count", text),
        "stack": _first_number(r"\.private_segment_fixed_size", text),
        "spills": _first_number(r"\.vgpr_spill_count", text)
        + _first_number(r"\.sgpr_spill_count", text),
        "matrix": "mfma" if "v_mfma_" in text else "",
    }


def compiled(configuration: Configuration, target: str) -> Result:
    """Compile one configuration: registers, stack, spills, shared memory, matrix instructions."""
    kernel = _kernel(configuration)
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}

    def kind(argument: Any, path: tuple[int, ...]) -> Any:
        if isinstance(argument, list):
            return tuple(kind(part, (*path, i)) for i, part in enumerate(argument))
        name = list(configuration["arguments"])[path[0]]
        if not isinstance(argument, str) or name in configuration["constexprs"]:
            constants[path] = argument
            return "constexpr"
        described, _, letters = argument.partition(":")
        attributes[path] = [_ATTRIBUTES[letter] for letter in letters]
        return described

    signature = {
        name: kind(argument, (i,))
        for i, (name, argument) in enumerate(configuration["arguments"].items())
    }
    source = ASTSource(kernel, signature, constants, attributes)
    knobs = triton.knobs
    with (
        mock.patch.object(knobs.nvidia, "dump_ptxas_log", True),
        mock.patch.object(knobs.compilation, "always_compile", True),
        redirect_stdout(io.StringIO()) as log,
    ):
        done = triton.compile(source, target=gpu_target(target), options=configuration["options"])
    if target.startswith("sm_"):
        found = _nvidia(done.asm["ptx"], log.getvalue())
    else:
        found = _amd(done.asm["amdgcn"])
    return {**found, "shared": done.metadata.shared}


def _child(pipe: Any, configuration: Configuration, target: str) -> None:
    # CPU seconds, as the machine may be busy; a compiler that it calls has as many of its own.
    resource.setrlimit(resource.RLIMIT_CPU, (TIME_LIMIT, TIME_LIMIT))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a compiler that fails prints pages
    try:
        result = compiled(configuration, target)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        result = {"error": f"{type(error).__name__}: {' | '.join(lines[-2:])}"[:300]}
    pipe.send(result)


def compile_all(
    jobs: list[tuple[Configuration, str]], processes: int
) -> Iterator[tuple[Configuration, str, Result]]:
    """Compile in forked processes, one a job: what hangs or dies takes nothing with it."""
    context = multiprocessing.get_context("fork")
    running: dict[Any, tuple[Any, Configuration, str]] = {}
    waiting = iter(jobs)
    triton.runtime.cache.triton_key()  # a hash of all of Triton, kept: once here, not in each child
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        while True:
            for configuration, target in waiting:
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(theirs, configuration, target))
                process.start()
                theirs.close()
                running[ours] = (process, configuration, target)
                if len(running) >= processes:
                    break
            if not running:
                return
            for ours in multiprocessing.connection.wait(list(running)):
                process, configuration, target = running.pop(ours)
                try:
                    result = ours.recv()
                except EOFError:
                    process.join()
                    code = -(process.exitcode or 0)
                    result = {
                        "error": f"took more than {TIME_LIMIT} CPU seconds"
                        if code in (signal.SIGXCPU, signal.SIGKILL)
                        else f"the compiler died of signal {code}"
                    }
                process.join()
                yield configuration, target, result


# Judging and writing
# -------------------


def promises_matrix_instructions(configuration: Configuration) -> bool:
    """Whether tensor cores take the products of a configuration."""
    return configuration["arguments"].get("PRECISION", "ieee") != "ieee"


def faults(configuration: Configuration, target: str, result: Result) -> list[str]:
    """What is wrong with a compiled kernel."""
    if "error" in result:
        return [result["error"]]
    found = []
    if result["spills"] or result["stack"]:
        found.append(f"spills: {result['spills']}, {result['stack']} bytes of stack")
    if result["shared"] > SHARED_LIMIT[target]:
        found.append(
            f"takes {result['shared']} bytes of shared memory, of which {target} has "
            f"{SHARED_LIMIT[target]}"
        )
    if promises_matrix_instructions(configuration) and not result["matrix"]:
        found.append("uses no matrix instructions, though its products are for tensor cores")
    return found


def described(configuration: Configuration) -> str:
    """A configuration's options, for people."""
    arguments, options = configuration["arguments"], configuration["options"]
    parts = [f"{name}={arguments[name]}" for name in configuration["constexprs"]]
    return " ".join([*parts, *(f"{name}={value}" for name, value in options.items())])


def path(version: str = triton.__version__) -> Path:
    """Where the table of a version of Triton is."""
    return RESULTS / f"aot-triton-{version}.json"


def load(file: Path) -> list[Configuration]:
    """Read a table."""
    return json.loads(file.read_text())["configurations"] if file.exists() else []


def _save(file: Path, configurations: list[Configuration]) -> None:
    for row in configurations:  # jobs end in any order
        row["results"] = {t: row["results"][t] for t in TARGETS if t in row["results"]}
    rows = ",\n".join(json.dumps(row) for row in configurations)
    head = f'"triton": {json.dumps(triton.__version__)},\n"configurations": [\n'
    file.write_text(f"{{{head}{rows}\n]}}\n")


def _range(values: list[float]) -> str:
    """Smallest and largest; nothing where there are none."""
    ends = [f"{pick(values):.3g}" for pick in (min, max) if values]
    return " to ".join(dict.fromkeys(ends))


def markdown(configurations: list[Configuration]) -> str:
    """The table for people: a row for what differs in the kernel's options alone."""
    groups: dict[tuple[str, str, str], list[Configuration]] = {}
    for configuration in configurations:
        key = configuration["kernel"], described(configuration), configuration["backend"]
        groups.setdefault(key, []).append(configuration)
    parts = [
        f"# What the kernels take of a GPU, compiled by Triton {triton.__version__}\n",
        textwrap.fill(
            "Compiled, not run: `make aot` writes this without a GPU. A row is a kernel with its "
            "compile-time options; its variants differ in which tensors are given and how sizes "
            "and addresses are aligned, and numbers are ranges over them. `shared` is shared "
            "memory in KiB, `spills` the bytes stored and loaded for want of registers, and of "
            "stack (on AMD registers spilled), `matrix` names the matrix instructions: float32 "
            "products in IEEE arithmetic use none on NVIDIA GPUs. Shapes: `bench/shapes.py`.",
            100,
        )
        + "\n",
    ]
    for backend, targets in (
        ("cuda", [t for t in TARGETS if t.startswith("sm_")]),
        ("hip", [t for t in TARGETS if t.startswith("gfx")]),
    ):
        limits = ", ".join(f"{t} {SHARED_LIMIT[t] >> 10}" for t in targets)
        header = ["kernel", "options", "variants", "shapes"]
        header += [f"registers {t}" for t in targets] + ["shared", "spills", "matrix"]
        lines = [header, ["---"] * len(header)]
        for (kernel, options, of), rows in groups.items():
            if of != backend:
                continue
            used = {shape for row in rows for shape in row["shapes"]}
            shapes = [name for name in SHAPES if name in used]
            good = {
                t: [r for row in rows if "error" not in (r := row["results"][t])] for t in targets
            }
            every = [result for results in good.values() for result in results]
            matrix = sorted({r["matrix"] or "none" for r in every})
            failed = sum("error" in row["results"][t] for row in rows for t in targets)
            spills = sum(r["spills"] + r["stack"] for r in every)
            lines.append(
                [
                    f"`{kernel}`",
                    options,
                    str(len(rows)),
                    "all" if len(shapes) == len(SHAPES) else ", ".join(shapes),
                    *(_range([r["registers"] for r in good[t]]) for t in targets),
                    _range([r["shared"] / 1024 for r in every]),
                    str(spills) + (f", {failed} do not compile" if failed else ""),
                    ", ".join(matrix),
                ]
            )
        name = "NVIDIA" if backend == "cuda" else "AMD"
        parts.append(f"## {name}\n\nA program may take this many KiB of shared memory: {limits}.\n")
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(parts)


def _recorded() -> list[Configuration]:
    began = time.perf_counter()
    configurations = record("cuda") + record("hip")
    kernels = {configuration["kernel"] for configuration in configurations}
    print(
        f"Triton {triton.__version__}: {len(kernels)} kernels in {len(configurations)} "
        f"configurations, recorded in {time.perf_counter() - began:.0f} s"
    )
    return configurations


def _targets(configuration: Configuration, among: Iterable[str]) -> list[str]:
    return [t for t in among if gpu_target(t).backend == configuration["backend"]]


def _verdict(configurations: list[Configuration]) -> list[str]:
    """What is wrong on NVIDIA's GPUs; for AMD's, of which nothing is promised, it prints a line."""
    wrong, others = [], 0
    for configuration in configurations:
        for target, result in configuration["results"].items():
            for fault in faults(configuration, target, result):
                if configuration["backend"] == "hip":
                    others += 1
                    continue
                what = f"{configuration['kernel']} on {target} ({described(configuration)})"
                wrong.append(f"{what}: {fault}; shapes {', '.join(configuration['shapes'])}")
    if others:
        print(f"on AMD's GPUs {others} compilations spill or fail: see the table")
    return wrong


def _compile(jobs: list[tuple[Configuration, str]], processes: int) -> None:
    """Compile, and say at once what is wrong."""
    with tqdm(total=len(jobs), desc="compiled", disable=not jobs, mininterval=1) as bar:
        for configuration, target, result in compile_all(jobs, processes):
            configuration["results"][target] = result
            for fault in faults(configuration, target, result):
                bar.write(
                    f"{configuration['kernel']} on {target} ({described(configuration)}): {fault}"
                )
            bar.update()


def compile_some(part: str, processes: int) -> list[str]:
    """Compile the kernels whose name contains ``part``, and write nothing: while one is written."""
    configurations = [c for c in _recorded() if part in c["kernel"]]
    for configuration in configurations:
        configuration["results"] = {}
    jobs = [(c, target) for c in configurations for target in _targets(c, TARGETS)]
    _compile(jobs, processes)
    return _verdict(configurations)


def make(processes: int, fresh: bool) -> list[str]:
    """Write the table; compile what it does not hold yet. Returns what is wrong."""
    configurations, file = _recorded(), path()
    known = {row["id"]: row for row in load(file)} if not fresh else {}
    jobs = []
    for configuration in configurations:
        old = known.get(configuration["id"], {})
        same = old.get("source") == configuration["source"]
        results = old.get("results", {}) if same else {}
        configuration["results"] = {t: r for t, r in results.items() if "error" not in r}
        jobs += [
            (configuration, target)
            for target in _targets(configuration, TARGETS)
            if target not in configuration["results"]
        ]
    try:
        _compile(jobs, processes)
    finally:  # what was compiled until an interruption need not be again
        _save(file, configurations)
    file.with_suffix(".md").write_text(markdown(configurations))
    print(f"written: {file}, {file.with_suffix('.md')} ({len(jobs)} compilations)")
    return _verdict(configurations)


def check(processes: int, sample: int, targets: Iterable[str]) -> list[str]:
    """Hold the committed table against what is launched, and a sample of it against the compiler.

    Returns what differs and what is wrong.
    """
    file = path()
    table = {row["id"]: row for row in load(file)}
    if not table:
        return [f"there is no table for this version of Triton ({file}): run `make aot`"]
    recorded = {configuration["id"]: configuration for configuration in _recorded()}
    wrong = []
    for id_, configuration in recorded.items():
        if id_ not in table:
            what = "is launched, but not in the table"
        elif table[id_]["source"] != configuration["source"]:
            what = "has changed since the table was written"
        elif table[id_]["shapes"] != configuration["shapes"]:
            what = "is launched at other shapes than the table says"
        else:
            continue
        wrong.append(f"{configuration['kernel']} ({described(configuration)}) {what}")
    for id_ in table.keys() - recorded.keys():
        row = table[id_]
        wrong.append(f"{row['kernel']} ({described(row)}) is in the table, but not launched")
    if wrong:
        return [*wrong, f"{file} is out of date: run `make aot`"]
    by_hash = sorted(recorded, key=lambda id_: hashlib.sha256(id_.encode()).digest())
    jobs = [(recorded[id_], t) for id_ in by_hash for t in _targets(recorded[id_], targets)]
    for configuration, target, result in tqdm(
        compile_all(jobs[:sample], processes), total=len(jobs[:sample]), desc="compiled"
    ):
        expected = table[configuration["id"]]["results"][target]
        if result != expected:
            wrong.append(
                f"{configuration['kernel']} on {target} ({described(configuration)}): "
                f"{result}, but the table says {expected}"
            )
    return wrong + _verdict(list(table.values()))


def main() -> None:
    """Run what the command line asks for."""
    from . import costs  # which takes its cases from here

    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--only", help="compile kernels whose name has this; write no table")
    parser.add_argument("--fresh", action="store_true", help="compile everything anew")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--sample", type=int, default=40, help="compilations that --check repeats")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["sm_80", "sm_90"])
    args = parser.parse_args()
    if args.only:
        wrong = compile_some(args.only, args.jobs)
    elif args.check:
        wrong = check(args.jobs, args.sample, args.targets) + costs.check()
    else:
        wrong = make(args.jobs, args.fresh)
        costs.make()
    print("\n".join(wrong))
    verdict = f"{len(wrong)} faults" if wrong else "no spills, no errors"
    print(f"Triton {triton.__version__}: {verdict}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
