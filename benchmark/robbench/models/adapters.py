"""Models that are no torch networks, as modules: functions of arrays, estimators of scikit-learn, ONNX graphs.

None of them has a gradient, so only attacks by queries run on them (`Adapter`). Before a run believes a number, what an
adapter answers is compared with what the model itself says on a few images (`evaluation.own_answers`).
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.core.errors import ModelError
from robbench.core.user_code import contain_exits

__all__ = ["Adapter", "EstimatorModel", "FunctionModel", "OnnxModel", "adapt", "digest_object", "find_adapter"]


class Adapter(nn.Module, ABC):
    """A model that is no torch network: images [N, C, H, W] in [0, 1] -> scores [N, K]."""

    def predict(self, x: Tensor) -> Tensor | None:
        """Return what the model itself predicts, [N] int64, by another way than `forward`; None if there is none."""
        return None

    @abstractmethod
    def digest(self) -> str:
        """Return a SHA-256 of what the model consists of, as far as it can be read."""


class FunctionModel(Adapter):
    """A function of a NumPy array of images [N, C, H, W] that returns scores [N, K]."""

    def __init__(self, function: Callable[[NDArray[Any]], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Compute the scores."""
        return _as_scores(self.function(_as_array(x)), x)

    def digest(self) -> str:
        """Return the digest of the function's code and of what it closes over."""
        return digest_object(self.function)

    def extra_repr(self) -> str:
        """Print the name of the function."""
        return _name_object(self.function)


class EstimatorModel(Adapter):
    """A fitted classifier of scikit-learn. It is given rows of pixels [N, C · H · W].

    Args:
        estimator: with `predict`, and `decision_function` or `predict_proba`.
        x: images to find out with which of the two has its largest score at the predicted class.

    Raises:
        ModelError: neither has, or the classes are numbers other than 0, 1, 2, ...
    """

    def __init__(self, estimator: Any, x: Tensor) -> None:
        super().__init__()
        self.estimator = estimator
        classes = getattr(estimator, "classes_", None)
        if classes is None:
            raise ModelError(f"{type(estimator).__name__} has no classes_; expected: a fitted classifier.")
        self.classes = np.asarray(classes)
        if self.classes.dtype.kind in "iuf" and self.classes.tolist() != list(range(len(self.classes))):
            raise ModelError(
                f"{type(estimator).__name__} has the classes {self.classes.tolist()[:5]} ...; expected: 0, 1, 2, ..., "
                "because a label is the place of a class among them. Fit it to such labels."
            )
        ways = [name for name in ("decision_function", "predict_proba") if hasattr(estimator, name)]
        for self.way in ways:
            if torch.equal(self(x).argmax(1).cpu(), self.predict(x)):
                return
        raise ModelError(
            f"{type(estimator).__name__}: {' and '.join(ways) or 'no decision_function or predict_proba'} given; "
            "expected: one whose largest score is at the class that predict returns."
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the scores. A single score, of the second of two classes, becomes two."""
        scores = np.asarray(getattr(self.estimator, self.way)(_as_rows(x)))
        if scores.ndim == 1:
            scores = np.stack([np.zeros_like(scores), scores], axis=1)
        return _as_scores(scores, x)

    def predict(self, x: Tensor) -> Tensor:
        """Return the places of the predicted classes."""
        predicted = np.asarray(self.estimator.predict(_as_rows(x)))
        return torch.from_numpy(np.argmax(predicted[:, None] == self.classes, axis=1))

    def digest(self) -> str:
        """Return the digest of all fitted values."""
        return digest_object(self.estimator)

    def extra_repr(self) -> str:
        """Print the estimator with its parameters."""
        return f"{self.way} of {self.estimator!r}"


# How an ONNX graph names a file of weights: the key of an entry is `location`. Lengths may be padded.
_OTHER_FILES = re.compile(rb"(?:\x0a|\x8a\x80{0,8}\x00)(?:\x08|\x88\x80{0,8}\x00)location")


class OnnxModel(Adapter):
    """An ONNX graph that onnxruntime runs on the CPU.

    Args:
        content: the bytes of the .onnx file.

    Raises:
        ModelError: the graph has several inputs, or its input is no batch of images.
    """

    _TYPES: ClassVar[dict[str, Any]] = {
        "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16
    }  # fmt: skip

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.content = content
        self.session: Any = None
        self._start()

    def _start(self) -> None:
        import onnxruntime

        if _OTHER_FILES.search(self.content):
            raise ModelError(
                "its weights are in other files, which no digest covers. Save them in the graph: "
                "onnx.save(onnx.load(PATH), PATH)."
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(self.content, options, providers=["CPUExecutionProvider"])
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in self._TYPES:
            about = "; ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
            raise ModelError(f"inputs {about}; expected: one input of floating-point images [N, C, H, W].")
        self.input, self.element = inputs[0].name, self._TYPES[inputs[0].type]
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.batch = inputs[0].shape[0] if isinstance(inputs[0].shape[0], int) else 0

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxModel:
        return self  # a session has no state that a query changes

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "session": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """Compute the outputs: the only one, or name -> output."""
        images, n = _as_array(x).astype(self.element), len(x)
        width = self.batch or n
        if n % width:  # a graph of a fixed batch size
            images = np.concatenate([images, np.zeros((width - n % width, *images.shape[1:]), self.element)])
        parts = [self.session.run(None, {self.input: images[k : k + width]}) for k in range(0, len(images), width)]
        found = {
            name: _as_scores(np.concatenate(column)[:n], x)
            for name, column in zip(self.outputs, zip(*parts, strict=True), strict=True)
            if all(isinstance(part, np.ndarray) for part in column)
        }
        return found[self.outputs[0]] if len(self.outputs) == 1 else found

    def digest(self) -> str:
        """Return the digest of the file."""
        return hashlib.sha256(self.content).hexdigest()

    def extra_repr(self) -> str:
        """Print the input and the outputs."""
        return f"{self.input} -> {', '.join(self.outputs)}"


class TensorFunction(nn.Module):
    """A function of torch tensors, which may have a gradient."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Call the function."""
        return self.function(x)

    def extra_repr(self) -> str:
        """Print the name of the function."""
        return _name_object(self.function)


def adapt(model: Any, x: Tensor) -> nn.Module:
    """Make a module of a function or an estimator. A module stays as it is.

    A function that returns a tensor for a tensor is asked with tensors, any other one with NumPy arrays.

    Args:
        model: the model.
        x: images [n, C, H, W] to try it on.

    Raises:
        ModelError: it is no classifier of images.
    """
    if isinstance(model, nn.Module):
        return model
    if hasattr(model, "predict"):
        try:
            with contain_exits():
                return EstimatorModel(model, x).eval()
        except ModelError:
            raise
        except Exception as error:  # an estimator may raise anything about its input
            raise ModelError(_word_refused_rows(model, x, error)) from error
    try:
        with contain_exits():
            if isinstance(model(x.clone()), Tensor):
                return TensorFunction(model).eval()
    except Exception:  # a function of arrays may raise anything about a tensor
        pass
    try:
        with contain_exits():
            scores = np.asarray(model(_as_array(x).copy()))
        if scores.dtype.kind not in "fiub":
            raise TypeError(f"it returns values of {scores.dtype}; expected scores [N, K]")
    except Exception as error:  # a user's function may raise anything
        raise ModelError(
            f"The function {_name_object(model)} cannot be called with images, an array of shape {tuple(x.shape)}: "
            f"{type(error).__name__}: {error}. A function that makes the model takes no arguments."
        ) from error
    return FunctionModel(model).eval()


def find_adapter(module: nn.Module) -> Adapter | None:
    """Return the adapter in a module; None if the module is a torch network."""
    return next((part for part in module.modules() if isinstance(part, Adapter)), None)


def _name_object(value: Any) -> str:
    name = getattr(value, "__qualname__", None) or type(value).__qualname__
    return f"{getattr(value, '__module__', '')}.{name}"


def _word_refused_rows(estimator: object, x: Tensor, error: Exception) -> str:
    """Say why an estimator of scikit-learn cannot be given these images."""
    given, fitted = x[0].numel(), getattr(estimator, "n_features_in_", None)
    if fitted in (None, given):
        return f"{type(estimator).__name__} cannot be asked about {given} pixels an image: {error}"
    return (
        f"{type(estimator).__name__} was fitted to {fitted} numbers an image, and an image of shape "
        f"{tuple(x.shape[1:])} has {given}. Give images of the size and channels that the model was fitted to. With "
        "--data, --resize and --crop change the size, and --channels 1 makes gray images (in Python resize=, crop= "
        "and channels=)."
    )


def _as_array(x: Tensor) -> NDArray[Any]:
    return x.detach().cpu().numpy()


def _as_rows(x: Tensor) -> NDArray[Any]:
    return _as_array(x.flatten(1))


def _as_scores(scores: Any, x: Tensor) -> Tensor:
    return torch.from_numpy(np.array(scores)).to(x.device)


def digest_object(value: object) -> str:
    """Return a SHA-256 of the values that an object consists of, in the order in which pickle would store them."""
    hasher = hashlib.sha256()
    _feed(hasher.update, value, {})
    return hasher.hexdigest()


def _feed(update: Callable[[Any], None], value: Any, seen: dict[int, Any]) -> None:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        update(f"{type(value).__name__}:{value!r}\0".encode())
        return
    if id(value) in seen:
        update(f"again:{list(seen).index(id(value))}\0".encode())
        return
    seen[id(value)] = value  # kept alive, so that no other object gets its number
    update(f"{type(value).__module__}.{type(value).__qualname__}(".encode())
    for part in _list_parts(value):
        if isinstance(part, memoryview):
            update(part)
        else:
            _feed(update, part, seen)
    update(b")")


def _list_parts(value: Any) -> list[Any]:
    """List what an object consists of."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.dtype.hasobject is False:
        return [str(value.dtype), str(value.shape), np.ascontiguousarray(value).reshape(-1).view(np.uint8).data]
    if isinstance(value, Mapping):
        return [part for item in value.items() for part in item]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, type):
        return [_name_object(value)]
    if code := getattr(value, "__code__", None):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [_name_object(value), code.co_code, repr(code.co_names), value.__defaults__, *cells]
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:  # locks, handles, generators
        return []
    if isinstance(reduced, str):
        return [reduced]
    return [part if index < 3 else list(part or ()) for index, part in enumerate(reduced)]
