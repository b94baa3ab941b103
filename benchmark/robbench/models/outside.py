"""Code of others that hands us a model: packages with model zoos, the hub's client, a function of the user's.

Nothing here is imported before the user names it. What goes wrong in there becomes one sentence.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
import traceback
import warnings
from base64 import urlsafe_b64encode
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from robbench.core.errors import ModelError, RobbenchError, unknown_name
from robbench.core.user_code import make_cwd_importable
from robbench.models.sources import ALLOWED

__all__ = ["call_model_function", "download_hub_file", "load_robustbench_model", "load_timm_model"]

_EXPECTED = "a function without arguments that returns a torch.nn.Module"
# By name, because they come from four libraries that may not be here; TransportError is httpx's for all of them.
_NO_NETWORK = {
    "ConnectionError", "TimeoutError", "gaierror", "URLError", "Timeout", "TransportError", "OfflineModeIsEnabled",
    "LocalEntryNotFoundError",
}  # fmt: skip
# The most telling first: an error of the hub is often of several of these classes.
_HUB_ERRORS = {
    "GatedRepoError": "the repository is gated: ask its owner for access, then log in with `hf auth login`",
    "RepositoryNotFoundError": "no such repository, or a private one (then log in with `hf auth login`)",
    "RevisionNotFoundError": "no such revision; give a branch, a tag or a commit of the repository",
    "EntryNotFoundError": "no such file there; name one with hf:OWNER/REPO:FILE.safetensors",
}


def download_hub_file(what: str, repo: str, revision: str, file: str) -> Path:
    """Download one file with huggingface_hub, or take it from its cache.

    Args:
        what: the source, for errors.
        repo: OWNER/REPO.
        revision: a branch, a tag or a commit; "" for the default branch.
        file: its path in the repository.

    Returns:
        Its path in the cache, `.../snapshots/<commit>/<file>`.

    Raises:
        ModelError: the package, the network, the repository, the revision or the file is missing.
    """
    with _others_code(what):
        hub = _package("huggingface_hub", "hub", what)
        return Path(hub.hf_hub_download(repo, file, revision=revision or None))


def load_timm_model(
    what: str, name: str, in_shape: tuple[int, int, int]
) -> tuple[nn.Module, Sequence[float], Sequence[float]]:
    """Load a pretrained model of timm.

    Returns:
        The module, which takes normalized images, and the mean and std that it wants.

    Raises:
        ModelError: the package, the network or a model of that name is missing, or the model is for images of one
            size and these, of shape (C, H, W), have another.
    """
    with _others_code(what):
        timm = _package("timm", "hub", what)
        # Checked here, because timm takes more than its own names, among them any repository of a hub.
        if not timm.is_model_pretrained(name):
            known = [*timm.list_models(pretrained=True), *timm.list_pretrained()]
            raise ModelError(_unlisted("pretrained timm model", name, known, "timm.list_pretrained()"))
        module = timm.create_model(name, pretrained=True).eval()
        facts = module.pretrained_cfg
        if facts.get("fixed_input_size") and tuple(facts["input_size"]) != in_shape:
            raise ModelError(f"{what} takes images of shape {tuple(facts['input_size'])}; these have {in_shape}.")
        return module, facts["mean"], facts["std"]


def load_robustbench_model(what: str, dataset: str, threat: str, name: str) -> nn.Module:
    """Load a model of robustbench's zoo (Croce et al. 2021, https://arxiv.org/abs/2010.09670).

    Raises:
        ModelError: the package or one that it needs is missing, it is not the real one, or there is no network or
            no model of that name.
    """
    _refuse_other_robustbench()
    with _others_code(what):
        if importlib.util.find_spec("autoattack") is None:
            # The name under which robustbench imports what its own requirements call pyautoattack.
            sys.modules["autoattack"] = _package("pyautoattack", "zoo", what)
        _package("robustbench", "zoo", what)
        utils, zoo = importlib.import_module("robustbench.utils"), importlib.import_module("robustbench.model_zoo")
        table = {d.value: {t.value: models for t, models in threats.items()} for d, threats in zoo.model_dicts.items()}
        if name not in (known := table[dataset].get(threat, {})):
            kind = f"robustbench model for {dataset}, {threat}"
            raise ModelError(_unlisted(kind, name, known, "robustbench.model_zoo.model_dicts"))
        # Its default, ./models, is where a checkout of robbench has its cards.
        folder = Path(os.environ.get("ROBBENCH_ZOO") or "~/.cache/robbench/robustbench").expanduser()
        module: nn.Module = utils.load_model(name, model_dir=folder, dataset=dataset, threat_model=threat)
        return module.eval()


def _refuse_other_robustbench() -> None:
    """Torchattacks 3.5.1 unpacks an old robustbench over the real one; its own file list tells whose is here."""
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


def call_model_function(what: str, where: str, name: str) -> nn.Module:
    """Call a function of the user's and return the module that it returns.

    The current directory is importable, as under `python -m`.

    Raises:
        ModelError: no such module or function, it raises, it takes arguments, or it returns something else.
    """
    make_cwd_importable()
    with _others_code(what, quiet=False):
        try:
            owner = importlib.import_module(where)
        except ModuleNotFoundError as error:
            if not f"{where}.".startswith(f"{error.name}."):
                raise  # something that the user's module imports
            place = f"neither in {os.getcwd()} nor installed"
            raise ModelError(f"{what}: no module {error.name!r}, {place}. All sources: {ALLOWED}.") from None
        if not hasattr(owner, name):
            known = [key for key, value in vars(owner).items() if inspect.isfunction(value)]
            raise ModelError(f"{what}: {unknown_name(f'function of {where}', name, known)}")
        function = getattr(owner, name)
        try:
            inspect.signature(function).bind()
        except TypeError as error:
            raise ModelError(f"{what}: {name} cannot be called so ({error}); expected: {_EXPECTED}.") from None
        module = function()
        if not isinstance(module, nn.Module):
            raise ModelError(f"{what} returned a {type(module).__name__}; expected: {_EXPECTED}.")
        return module


@contextlib.contextmanager
def _others_code(what: str, quiet: bool = True) -> Iterator[None]:
    """Run a package's or the user's code.

    What it prints goes to stderr (stdout may be JSON), the global generator stays where it was, and whatever it
    raises becomes one sentence.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            if quiet:
                warnings.simplefilter("ignore")
            yield
    except RobbenchError:
        raise
    except Exception as error:
        raise ModelError(f"{what}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    first = (str(error).splitlines() or [""])[0]
    said = f"{type(error).__name__}: {first[:300]}"
    if not isinstance(error, SyntaxError):  # which says itself where it is
        last = traceback.extract_tb(error.__traceback__)[-1]
        said += f" ({Path(last.filename).name}, line {last.lineno})"
    own = {cls.__name__ for cls in type(error).__mro__}
    classes, link = set(own), error.__cause__ or error.__context__
    while link is not None:  # packages wrap what the network did in errors of their own
        classes |= {cls.__name__ for cls in type(link).__mro__}
        link = link.__cause__ or link.__context__
    for name, meaning in _HUB_ERRORS.items():
        if name in own and "LocalEntryNotFoundError" not in own:
            return f"{meaning} [{said}]"
    if classes & _NO_NETWORK:
        return f"it could not be downloaded: no network, or the server does not answer. Try again with one. [{said}]"
    return f"loading failed: {said}"


def _package(name: str, extra: str, what: str) -> ModuleType:
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


def _unlisted(kind: str, given: str, known: Collection[str], where: str) -> str:
    """Word the answer to an unknown name among too many to list."""
    names = {name.lower(): name for name in known}
    close = [names[n] for n in difflib.get_close_matches(given.lower(), names, n=3, cutoff=0.4)]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"Unknown {kind} {given!r}.{hint} {len(names)} are known; {where} lists them."
