"""Architectures, and weights that are refused unless they are exactly what the card says."""

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from robbench.core.errors import ModelError
from robbench.models.architectures import Normalized, build
from robbench.models.card import DATASETS, Entry, Registry
from robbench.models.load import digest_module, load_model, locate_weights, save_weights

CARD = """\
version = 1
title = "A model"
dataset = "digits"

[architecture]
name = "linear"
"""
RECIPE = '[recipe]\niterations = 1\nbatch_size = 1\noptimizer = "adam"\nlr = 0.1\n'


def entry_for(root: Path, tables: str) -> Entry:
    path = root / "digits" / "a.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(CARD + tables)
    return Registry([root]).find("a")


def entry_with(root: Path, data: bytes, name: str = "a.safetensors", tables: str = "") -> Entry:
    """Store a weights file and a card that vouches for exactly these bytes."""
    (root / "weights").mkdir(exist_ok=True)
    (root / "weights" / name).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    return entry_for(root, f'{tables}[weights]\npath = "{name}"\nsha256 = "{digest}"\n')


def linear_state() -> dict[str, torch.Tensor]:
    return {"1.weight": torch.arange(640.0).reshape(10, 64) / 640, "1.bias": torch.arange(10.0)}


def torch_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "args", "dataset", "parameters"),
    [
        ("linear", {}, "digits", 650),
        ("digits_convnet", {}, "digits", 151_306),
        ("digits_convnet", {"width": 4, "hidden": 8}, "digits", 1_458),
        ("madry_mnist", {}, "mnist", 3_274_634),
        ("wide_resnet", {"depth": 10, "widen_factor": 1}, "cifar100", 83_700),
        ("wide_resnet", {}, "cifar10", 2_748_890),
        ("resnet18", {}, "cifar10", 11_173_962),
    ],
)
def test_output_shape_and_parameter_count(name: str, args: dict[str, int], dataset: str, parameters: int) -> None:
    facts = DATASETS[dataset]
    module = build(name, args, facts.num_classes, facts.in_shape).eval()
    assert sum(p.numel() for p in module.parameters()) == parameters
    assert module(torch.rand(2, *facts.in_shape)).shape == (2, facts.num_classes)


def test_the_papers_wide_resnet_has_its_size() -> None:
    module = build("wide_resnet", {"depth": 28, "widen_factor": 10}, 10, (3, 32, 32))
    assert sum(p.numel() for p in module.parameters()) == 36_479_194


@pytest.mark.parametrize(("name", "dataset"), [("digits_convnet", "digits"), ("madry_mnist", "mnist")])
def test_pooling_before_the_activation_changes_no_bit(name: str, dataset: str) -> None:
    """As published it comes after; both are monotone, so neither values nor gradients know the difference."""
    facts = DATASETS[dataset]
    ours = build(name, {}, facts.num_classes, facts.in_shape)
    layers = list(ours)
    for i in range(len(layers) - 1):
        if isinstance(layers[i], nn.MaxPool2d) and isinstance(layers[i + 1], nn.ReLU):
            layers[i : i + 2] = [layers[i + 1], layers[i]]
    published = nn.Sequential(*layers)
    assert [type(a) for a in ours] != [type(b) for b in published]
    x = torch.rand(16, *facts.in_shape, generator=torch.Generator().manual_seed(0))
    answers = []
    for net in (ours, published):
        given = x.clone().requires_grad_(True)
        logits = net(given)
        answers.append((logits, *torch.autograd.grad(logits.logsumexp(1).sum(), [given, *net.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_madry_weights_start_as_the_authors_do() -> None:
    torch.manual_seed(0)
    for key, value in build("madry_mnist", {}, 10, (1, 28, 28)).state_dict().items():
        if key.endswith("bias"):
            assert torch.all(value == 0.1)
        else:
            assert value.abs().max() <= 0.2
            assert 0.08 < value.std() < 0.095  # a normal of std 0.1, cut at two of them, has std 0.088


def test_dropout_acts_in_training_only() -> None:
    module = build("wide_resnet", {"depth": 10, "widen_factor": 1, "dropout": 0.5}, 10, (3, 32, 32))
    x = torch.rand(2, 3, 32, 32)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("wide_resnt", {}, "Unknown architecture 'wide_resnt'. Did you mean wide_resnet"),
        ("digits_convnet", {"widht": 3}, "Unknown argument of architecture digits_convnet 'widht'. Did you mean width"),
        ("digits_convnet", {"num_classes": 3}, "Known: hidden, width."),
        ("resnet18", {"depth": 3}, "Known: none."),
        ("digits_convnet", {"width": "32"}, "width: '32' given; expected: int, such as 32"),
        ("digits_convnet", {"width": True}, "width: True given; expected: int"),
        ("digits_convnet", {"width": 0}, "width: 0 given; expected: at least 1"),
        ("wide_resnet", {"depth": 18}, "depth 18 given; allowed: 6n + 4"),
        ("wide_resnet", {"depth": 4}, "depth 4 given; allowed: 6n + 4"),
        ("wide_resnet", {"dropout": 1}, "dropout 1 given; allowed: in [0, 1)"),
    ],
)
def test_wrong_architectures_are_refused(name: str, args: dict[str, int], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        build(name, args, 10, (1, 8, 8))
    assert message in str(caught.value)


def test_normalized_equals_manual_normalization() -> None:
    inner = build("linear", {}, 10, (3, 32, 32))
    mean, std = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
    x = torch.rand(4, 3, 32, 32)
    manual = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    normalized = Normalized(inner, mean, std)
    assert torch.allclose(normalized(x), inner(manual), atol=1e-6)
    assert normalized.inner is inner
    assert not {"mean", "std"} & normalized.state_dict().keys()


def test_builtin_resnet18_loads() -> None:
    pytest.importorskip("pyautoattack")
    generator = torch.get_rng_state()
    loaded = load_model(Registry.default().find("cifar10/natural_resnet18"))
    assert torch.equal(generator, torch.get_rng_state())  # loading draws no random numbers
    assert loaded.weights_sha256 == loaded.card.weights.sha256  # type: ignore[union-attr]
    assert (loaded.num_classes, loaded.in_shape) == (10, (3, 32, 32))
    assert not loaded.module.training
    assert not any(p.requires_grad for p in loaded.module.parameters())
    assert torch.isfinite(loaded.module(torch.rand(2, 3, 32, 32))).all()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.safetensors", safetensors.torch.save),
        ("a.pt", torch_bytes),
        ("a.pth", lambda state: torch_bytes({"epoch": 3, "state_dict": state})),
        ("a.pt", lambda state: torch_bytes({"model": {f"module.{k}": v for k, v in state.items()}})),
        ("a.pt", lambda state: torch_bytes({f"_orig_mod.{k}": v.double() for k, v in state.items()})),
    ],
)
def test_weights_in_every_form(tmp_path: Path, name: str, write: Callable[[object], bytes]) -> None:
    loaded = load_model(entry_with(tmp_path, write(linear_state()), name))
    x = torch.rand(3, 1, 8, 8)
    expected = x.flatten(1) @ linear_state()["1.weight"].T + linear_state()["1.bias"]
    assert torch.allclose(loaded.module(x), expected, atol=1e-5)


def test_preprocessing_of_the_card_is_inside_the_module(tmp_path: Path) -> None:
    data = safetensors.torch.save(linear_state())
    plain = load_model(entry_with(tmp_path, data)).module
    entry = entry_with(tmp_path, data, tables="[preprocess]\nmean = [0.5]\nstd = [0.25]\n")
    x = torch.rand(3, 1, 8, 8)
    assert torch.allclose(load_model(entry).module(x), plain((x - 0.5) / 0.25), atol=1e-5)


def test_saved_weights_load_again_with_the_same_digest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = build("wide_resnet", {"depth": 10, "widen_factor": 1}, 10, (3, 32, 32))
    module(torch.rand(8, 3, 32, 32))  # moves the running statistics
    path = tmp_path / "weights" / "cifar10" / "a.safetensors"
    digest = save_weights(Normalized(module, [0.5] * 3, [0.2] * 3), path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert save_weights(module, path) == digest  # deterministic, and the wrapper leaves no trace
    assert os.listdir(path.parent) == ["a.safetensors"]
    card = CARD.replace("digits", "cifar10").replace(
        '"linear"', '"wide_resnet"\nargs.depth = 10\nargs.widen_factor = 1'
    )
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "a.toml").write_text(
        f'{card}[weights]\npath = "cifar10/a.safetensors"\nsha256 = "{digest}"\n'
    )
    loaded = load_model(Registry([tmp_path]).find("a")).module
    for key, value in module.state_dict().items():
        assert loaded.state_dict()[key].dtype == value.dtype
        assert torch.allclose(loaded.state_dict()[key], value, rtol=1e-3, atol=1e-7)


def test_save_refuses_what_float16_cannot_hold(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, 1e5)
    with pytest.raises(ModelError, match=r"infinite or NaN in float16: weight"):
        save_weights(module, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"file type '\.pt' given; allowed: '\.safetensors'"):
        save_weights(module, tmp_path / "a.pt")
    assert os.listdir(tmp_path) == []


def test_module_digest_sees_every_tensor() -> None:
    module = Normalized(build("linear", {}, 10, (1, 8, 8)), [0.5], [0.5])
    digest = digest_module(module)
    assert digest_module(module) == digest
    assert digest_module(Normalized(module.inner, [0.5], [0.25])) != digest
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1
    assert digest_module(module) != digest
    assert digest_module(nn.BatchNorm2d(2)) != digest_module(nn.BatchNorm2d(3))  # scalars and integers included


class Bomb:
    """A pickle of this object creates a file when it is loaded without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("dump", [torch_bytes, pickle.dumps])
@pytest.mark.parametrize("vouched", [True, False])
def test_malicious_pickle_is_not_executed(tmp_path: Path, dump: Callable[[object], bytes], vouched: bool) -> None:
    target = tmp_path / "executed"
    data = dump({"1.weight": Bomb(target)})
    entry = entry_with(tmp_path, data, "a.pt")
    if not vouched:
        locate_weights(entry).write_bytes(data + b"\0")
    with pytest.raises(ModelError, match="not a readable state dict" if vouched else "not the ones on the card"):
        load_model(entry)
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))  # the bomb is live
    assert target.exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_damaged_files_are_refused_by_their_digest(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = linear_state()
    data = safetensors.torch.save(state) if name == "a.safetensors" else torch_bytes(state)
    entry = entry_with(tmp_path, data, name)

    def parsed(*_: object, **__: object) -> None:
        pytest.fail("parsed before the digest was checked")

    monkeypatch.setattr(torch, "load", parsed)
    monkeypatch.setattr(safetensors.torch, "load", parsed)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for damaged in (bytes(flipped), data[:-1], data[: len(data) // 2], b""):
        locate_weights(entry).write_bytes(damaged)
        with pytest.raises(ModelError) as caught:
            load_model(entry)
        for fact in (hashlib.sha256(damaged).hexdigest(), hashlib.sha256(data).hexdigest(), str(locate_weights(entry))):
            assert fact in str(caught.value)


@pytest.mark.usefixtures("limited_time")
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_weights_that_are_a_pipe_are_not_read(tmp_path: Path, name: str) -> None:
    entry = entry_with(tmp_path, b"", name)
    locate_weights(entry).unlink()
    os.mkfifo(locate_weights(entry))
    with pytest.raises(ModelError, match="not a regular file"):
        load_model(entry)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_garbage_that_the_card_vouches_for(tmp_path: Path, name: str) -> None:
    whole = safetensors.torch.save(linear_state()) if name == "a.safetensors" else torch_bytes(linear_state())
    for data in (b"", b"\0" * 64, b"\xff" * 64, os.urandom(256), whole[:-9], whole[: len(whole) // 2]):
        with pytest.raises(ModelError, match=r"not a readable state dict: \w+"):
            load_model(entry_with(tmp_path, data, name))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"1.weight": torch.zeros(10, 64)}, "missing: 1.bias"),
        ({**linear_state(), "extra": torch.zeros(1)}, "unexpected: extra"),
        ({**linear_state(), "1.bias": torch.zeros(9)}, "wrong shape: 1.bias is (9,), expected (10,)"),
        ({**linear_state(), "1.bias": torch.zeros(10).long()}, "1.bias is torch.int64, expected torch.float32"),
        ({**linear_state(), "1.bias": torch.zeros(10).to(torch.complex64)}, "1.bias is torch.complex64, expected"),
        ({**linear_state(), "1.bias": torch.full((10,), torch.nan)}, "infinite or NaN weights in: 1.bias"),
        (
            {**linear_state(), "1.bias": torch.full((10,), 1e300, dtype=torch.float64)},
            "infinite or NaN weights in: 1.bias",
        ),
        ({str(i): torch.zeros(1) for i in range(20)}, "unexpected: 0, 1, 10, 11, 12, 13, 14, 15 and 12 more"),
        ({**linear_state(), "epoch": 3}, "not tensors: epoch"),
        ([torch.zeros(1)], "holds a list; expected: a state dict of tensors"),
        ({}, "expected: a state dict of tensors"),
    ],
)
def test_state_dicts_that_do_not_fit(tmp_path: Path, state: object, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(entry_with(tmp_path, torch_bytes(state), "a.pt"))
    assert message in str(caught.value)
    assert str(caught.value).startswith("digits/a: ")


def test_other_file_types_and_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"file type '\.pkl' given; allowed: '\.safetensors', '\.pt', '\.pth'"):
        load_model(entry_with(tmp_path, b"x", "a.pkl"))
    entry = entry_with(tmp_path, b"x", tables="args = { depth = 3 }\n")
    with pytest.raises(ModelError, match=r"a\.toml: architecture: Unknown argument of architecture linear 'depth'"):
        load_model(entry)


@pytest.mark.parametrize(("recipe", "remedy"), [(RECIPE, "robbench train digits/a"), ("", "put the file back")])
def test_missing_weights_say_what_to_do(tmp_path: Path, recipe: str, remedy: str) -> None:
    entry = entry_with(tmp_path, b"x", tables=recipe)
    path = locate_weights(entry)
    path.unlink()
    with pytest.raises(ModelError) as caught:
        load_model(entry)
    for fact in (str(path), hashlib.sha256(b"x").hexdigest(), remedy):
        assert fact in str(caught.value)


@pytest.mark.parametrize(("recipe", "remedy"), [(RECIPE, "robbench train digits/a"), ("", "add weights or a recipe")])
def test_untrained_models_say_so(tmp_path: Path, recipe: str, remedy: str) -> None:
    with pytest.raises(ModelError, match=f"digits/a is not trained yet: {remedy}"):
        load_model(entry_for(tmp_path, recipe))


@pytest.mark.parametrize(
    ("package", "resource", "message"),
    [
        ("no_such_package_here", "a.pt", "not installed: pip install no_such_package_here"),
        ("this", "a.pt", "not installed: pip install this"),  # a module, not a package; never imported
        ("__main__", "a.pt", "not installed: pip install __main__"),
        ("robbench", "no_such.pt", "pip install --force-reinstall robbench"),
    ],
)
def test_weights_in_a_missing_package_are_named(tmp_path: Path, package: str, resource: str, message: str) -> None:
    tables = f'[weights]\npackage = "{package}"\nresource = "{resource}"\nsha256 = "{"0" * 64}"\n'
    with pytest.raises(ModelError) as caught:
        load_model(entry_for(tmp_path, tables))
    assert message in str(caught.value)
