"""Load models with the code of others: packages with model zoos, the client of the hub, a user's function.

A package is imported only when the user names it. Any error in the code of others becomes a `ModelError` of one line.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import os
import sys
import traceback
import warnings
from base64 import urlsafe_b64encode
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from robbench.core.errors import ModelError, RobbenchError, unknown_name
from robbench.core.user_code import contain_exits, make_cwd_importable
from robbench.models.adapters import OnnxModel, adapt
from robbench.models.sources import ALLOWED

__all__ = [
    "call_model_function",
    "download_hub_file",
    "import_package",
    "load_onnx",
    "load_robustbench_model",
    "load_timm_model",
    "load_torchscript",
    "run_foreign_code",
]

_EXPECTED = (
    "a function without arguments that returns a torch.nn.Module, an estimator of scikit-learn or a function of arrays "
    "of images; or such a function of arrays itself"
)
# Names of classes, because the four libraries that have them may not be installed. TransportError is the base of
# httpx's errors.
_NO_NETWORK = {
    "ConnectionError", "TimeoutError", "gaierror", "URLError", "Timeout", "TransportError", "OfflineModeIsEnabled",
    "LocalEntryNotFoundError",
}  # fmt: skip
# The most specific class first: an error of the hub is often an instance of several of these classes.
_HUB_ERRORS = {
    "GatedRepoError": "the repository is gated: ask its owner for access, then log in with `hf auth login`",
    "RepositoryNotFoundError": "no such repository, or a private one (then log in with `hf auth login`)",
    "RevisionNotFoundError": "no such revision; give a branch, a tag or a commit of the repository",
    "EntryNotFoundError": "no such file there; name one with hf:OWNER/REPO:FILE.safetensors",
}


def download_hub_file(what: str, repo: str, revision: str, file: str) -> Path:
    """Download one file with huggingface_hub, or take it from the cache.

    Args:
        what: the source, for error messages.
        repo: OWNER/REPO.
        revision: a branch, a tag or a commit; "" for the default branch.
        file: path of the file in the repository.

    Returns:
        The path of the file in the cache, `.../snapshots/<commit>/<file>`.

    Raises:
        ModelError: the package, the network, the repository, the revision or the file is missing.
    """
    with run_foreign_code(what):
        hub = import_package("huggingface_hub", "hub", what)
        return Path(hub.hf_hub_download(repo, file, revision=revision or None))


def load_timm_model(
    what: str,
    name: str,
    in_shape: tuple[int, int, int],
    state: Mapping[str, Tensor] | None = None,
    num_classes: int | None = None,
) -> tuple[nn.Module, Sequence[float], Sequence[float]]:
    """Load a model of timm: a pretrained one, or one with initial weights for the state dict of a user.

    Args:
        what: the source, for error messages.
        name: as timm calls the model.
        in_shape: (C, H, W) of the images.
        state: the user's state dict, which tells the number of classes; None loads timm's weights.
        num_classes: of the images, where the state dict does not tell.

    Returns:
        The module, which takes normalized images, and the mean and std of that normalization.

    Raises:
        ModelError: the package, the network or a model of that name is missing, or the model needs images of another
            size than `in_shape` (C, H, W).
    """
    with run_foreign_code(what):
        timm = import_package("timm", "hub", what)
        if state is not None:
            if not timm.is_model(name):
                raise ModelError(_word_unknown("timm model", name, timm.list_models(), "timm.list_models()"))
            head = timm.get_pretrained_cfg(name).classifier
            bias = state.get(f"{head}.bias") if isinstance(head, str) else None
            count = num_classes if bias is None else len(bias)
            module = timm.create_model(name, pretrained=False, in_chans=in_shape[0], num_classes=count or 1000).eval()
            return module, module.pretrained_cfg["mean"], module.pretrained_cfg["std"]
        # create_model accepts more than timm's own names, for example any repository of a hub. Only timm's are allowed.
        if not timm.is_model_pretrained(name):
            known = [*timm.list_models(pretrained=True), *timm.list_pretrained()]
            raise ModelError(_word_unknown("pretrained timm model", name, known, "timm.list_pretrained()"))
        module = timm.create_model(name, pretrained=True).eval()
        facts = module.pretrained_cfg
        if facts.get("fixed_input_size") and tuple(facts["input_size"]) != in_shape:
            raise ModelError(f"{what} takes images of shape {tuple(facts['input_size'])}; these have {in_shape}.")
        return module, facts["mean"], facts["std"]


def load_robustbench_model(what: str, dataset: str, threat: str, name: str) -> nn.Module:
    """Load a model of robustbench's zoo (Croce et al. 2021, https://arxiv.org/abs/2010.09670).

    Raises:
        ModelError: robustbench or a package that it needs is missing, the installed robustbench is not the real one,
            the network is missing, or there is no model of that name.
    """
    _refuse_old_robustbench()
    with run_foreign_code(what):
        if importlib.util.find_spec("autoattack") is None:
            # robustbench imports the package pyautoattack under the name autoattack.
            sys.modules["autoattack"] = import_package("pyautoattack", "zoo", what)
        import_package("robustbench", "zoo", what)
        utils, zoo = importlib.import_module("robustbench.utils"), importlib.import_module("robustbench.model_zoo")
        table = {d.value: {t.value: models for t, models in threats.items()} for d, threats in zoo.model_dicts.items()}
        if name not in (known := table[dataset].get(threat, {})):
            kind = f"robustbench model for {dataset}, {threat}"
            raise ModelError(_word_unknown(kind, name, known, "robustbench.model_zoo.model_dicts"))
        # robustbench's default folder, ./models, holds the cards in a checkout of robbench.
        folder = Path(os.environ.get("ROBBENCH_ZOO") or "~/.cache/robbench/robustbench").expanduser()
        module: nn.Module = utils.load_model(name, model_dir=folder, dataset=dataset, threat_model=threat)
        return module.eval()


def _refuse_old_robustbench() -> None:
    """Refuse the old robustbench that torchattacks 3.5.1 installs over the real one. Its file list has the digests."""
    spec = importlib.util.find_spec("robustbench")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.distribution("torchattacks").files or ():
            place = Path(str(file.locate()))
            if str(file) != "robustbench/utils.py" or spec is None or not spec.origin or not place.is_file():
                continue
            digest = urlsafe_b64encode(hashlib.sha256(place.read_bytes()).digest()).decode().rstrip("=")
            if place.samefile(Path(spec.origin).with_name("utils.py")) and file.hash and file.hash.value == digest:
                raise ModelError(
                    f"The package robustbench in {place.parent} is not the real one: torchattacks installs an old "
                    "copy under the same name. Put the real one over it: pip install --force-reinstall --no-deps "
                    '"robustbench==1.1.1" (torchattacks itself goes on working), or use an environment without '
                    "torchattacks."
                )


def load_torchscript(what: str, content: bytes) -> nn.Module:
    """Load a TorchScript archive: its network and its weights.

    Raises:
        ModelError: it cannot be loaded.
    """
    with run_foreign_code(what):
        module: nn.Module = torch.jit.load(io.BytesIO(content), map_location="cpu")  # type: ignore[no-untyped-call]
        return module.eval()


def load_onnx(what: str, content: bytes) -> nn.Module:
    """Load an ONNX graph.

    Raises:
        ModelError: onnxruntime is not installed, or cannot load the graph, or the graph takes no images.
    """
    with run_foreign_code(what):
        import_package("onnxruntime", "onnx", what)
        try:
            return OnnxModel(content).eval()
        except ModelError as error:
            raise ModelError(f"{what}: {error}") from error


def call_model_function(what: str, where: str, name: str, x: Tensor) -> nn.Module:
    """Call a user's function and return the model that the function returns, as a module.

    Modules in the current directory can be imported, as under `python -m`. A function with one argument is the model
    itself: it is called with images.

    Args:
        what: the source, for error messages.
        where: the module.
        name: the function.
        x: images to try a model on that is no torch.nn.Module, [n, C, H, W].

    Raises:
        ModelError: there is no such module or function, or the function raises, needs several arguments, or does not
            return a model.
    """
    make_cwd_importable()
    with run_foreign_code(what, quiet=False):
        try:
            owner = importlib.import_module(where)
        except ModuleNotFoundError as error:
            if not f"{where}.".startswith(f"{error.name}."):
                raise  # the user's module imports something that is missing
            if where.endswith(".py"):
                raise ModelError(
                    f"{what}: the name of a module has no .py; give {where.removesuffix('.py')}:{name}."
                ) from None
            place = f"neither in {os.getcwd()} nor installed"
            raise ModelError(f"{what}: no module {error.name!r}, {place}. All sources: {ALLOWED}.") from None
        if not hasattr(owner, name):
            known = [key for key, value in vars(owner).items() if inspect.isfunction(value)]
            raise ModelError(f"{what}: {unknown_name(f'function of {where}', name, known)}")
        function = getattr(owner, name)
        if isinstance(function, nn.Module) or (hasattr(function, "predict") and not isinstance(function, type)):
            kind = type(function).__name__
            raise ModelError(f"{what}: {name} is a model itself, a {kind}; expected: a function that returns it.")
        try:
            inspect.signature(function).bind()
        except TypeError as error:
            if inspect.isfunction(function) and len(inspect.signature(function).parameters) == 1:
                return adapt(function, x)
            raise ModelError(
                f"{what}: {name} cannot be called without arguments ({error}); expected: {_EXPECTED}."
            ) from None
        model = function()
        if not isinstance(model, nn.Module) and (
            isinstance(model, type) or not (callable(model) or hasattr(model, "predict"))
        ):
            raise ModelError(f"{what} returned a {type(model).__name__}; expected: {_EXPECTED}.")
        return adapt(model, x)


@contextlib.contextmanager
def run_foreign_code(what: str, quiet: bool = True) -> Iterator[None]:
    """Run the code of a package or of the user.

    Its output goes to stderr, because stdout may be JSON. The state of the global generator is restored. Any exception
    becomes a `ModelError` of one line.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            if quiet:
                warnings.simplefilter("ignore")
            with contain_exits():
                yield
    except RobbenchError:
        raise
    except Exception as error:
        raise ModelError(f"{what}: {_explain(error)}") from error


def _explain(error: BaseException) -> str:
    first = (str(error).splitlines() or [""])[0]
    said = f"{type(error).__name__}: {first[:300]}"
    if not isinstance(error, SyntaxError):  # a SyntaxError names its place itself
        last = traceback.extract_tb(error.__traceback__)[-1]
        said += f" ({Path(last.filename).name}, line {last.lineno})"
    own = {cls.__name__ for cls in type(error).__mro__}
    classes, link = set(own), error.__cause__ or error.__context__
    while link is not None:  # packages wrap network errors in their own errors
        classes |= {cls.__name__ for cls in type(link).__mro__}
        link = link.__cause__ or link.__context__
    for name, meaning in _HUB_ERRORS.items():
        if name in own and "LocalEntryNotFoundError" not in own:
            return f"{meaning} [{said}]"
    if classes & _NO_NETWORK:
        return f"it could not be downloaded: no network, or the server does not answer. Try again later. [{said}]"
    return f"loading failed: {said}"


def import_package(name: str, extra: str, what: str) -> ModuleType:
    """Import an optional package."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == "pkg_resources":
            raise ModelError(
                f"{what}: {name} imports pkg_resources, which setuptools no longer has from release 81 on: "
                'pip install "setuptools<81"'
            ) from None
        missing = f"the package {error.name!r}, which is not installed"
        raise ModelError(f'{what} needs {missing}: pip install "robbench[{extra}]"') from None


def _word_unknown(kind: str, given: str, known: Collection[str], where: str) -> str:
    """Return the message for an unknown name if there are too many known names to list."""
    names = {name.lower(): name for name in known}
    close = [names[n] for n in difflib.get_close_matches(given.lower(), names, n=3, cutoff=0.4)]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"Unknown {kind} {given!r}.{hint} {len(names)} are known; {where} lists them."
