"""Images of a user, from every kind of place: the robust accuracy is that of an independent loop, or a sentence."""

import functools
import hashlib
import io
import json
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import robbench
from robbench.attacks import FGSM
from robbench.core.errors import DataError, ModelError, RobbenchError
from robbench.data import rows
from robbench.data.encoded import Preparation
from robbench.data.own import digest_tensor, open_images
from robbench.evaluation.run import evaluate
from robbench.models.card import Registry
from robbench.models.load import load_model
from support.commands import run
from support.datasets import idx
from support.independent import loop_fgsm

EPS = 0.1
N = 40
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def net():
    return load_model(Registry.default().find("digits/at")).module


@pytest.fixture(scope="module")
def digits():
    """Pixel values [N, 8, 8] uint8, and labels [N]."""
    x, y = robbench.load_data("digits", N)
    return (x[:, 0] * 255).round().to(torch.uint8).numpy(), y.numpy()


@pytest.fixture(scope="module")
def expected(net, digits):
    x, y = digits
    return loop_fgsm(net, torch.from_numpy(x)[:, None] / 255, torch.from_numpy(y), EPS)


def png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_folder(root, digits, names=None):
    for i, (pixels, label) in enumerate(zip(*digits, strict=True)):
        place = root / (names[label] if names else f"{label}")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:03}.png").write_bytes(png(pixels))
    return root


def ask(net, **how):
    return evaluate(net, [FGSM()], eps=EPS, **how)


class Items(Dataset):
    def __init__(self, digits, change=lambda x: x):
        self.digits, self.change = digits, change

    def __len__(self):
        return len(self.digits[1])

    def __getitem__(self, i):
        return self.change(torch.from_numpy(self.digits[0][i])[None] / 255), int(self.digits[1][i])


class Stream(IterableDataset):
    def __init__(self, digits):
        self.items = Items(digits)

    def __iter__(self):
        return (self.items[i] for i in range(len(self.items)))


def make_folder(tmp, digits):
    return {"data": write_folder(tmp / "f", digits), "channels": 1}


def make_named_folder(tmp, digits):
    """The names are not in alphabetical order of the outputs, so a mapping says which is which."""
    root = write_folder(tmp / "f", digits, NAMES)
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return {"data": root, "channels": 1}


def make_json_mapping(tmp, digits):
    root = write_folder(tmp / "f", digits, NAMES)
    (tmp / "outputs.json").write_text(json.dumps({name: k for k, name in enumerate(NAMES)}))
    return {"data": root, "channels": 1, "classes": tmp / "outputs.json"}


def make_csv(tmp, digits):
    write_folder(tmp / "f", digits)
    lines = [f"f/{label}/{i:03}.png,{label}" for i, label in enumerate(digits[1])]
    (tmp / "t.csv").write_text("\n".join(["path,label", *lines]))
    return {"data": tmp / "t.csv", "channels": 1}


def make_path_table(tmp, digits):
    write_folder(tmp / "f", digits)
    paths = [f"f/{label}/{i:03}.png" for i, label in enumerate(digits[1])]
    pq.write_table(pa.table({"file_name": paths, "label": digits[1]}), tmp / "t.parquet")
    return {"data": tmp / "t.parquet", "channels": 1}


def make_hub_parquet(tmp, digits):
    """Two shards of the layout of public hubs, in small row groups."""
    for k, at in enumerate(np.array_split(np.arange(N), 2)):
        images = [{"bytes": png(digits[0][i]), "path": f"{i}.png"} for i in at]
        table = pa.table({"image": images, "label": digits[1][at]})
        (tmp / "p").mkdir(exist_ok=True)
        pq.write_table(table, tmp / "p" / f"test-{k}-of-2.parquet", row_group_size=7)
    return {"data": tmp / "p", "channels": 1}


def make_npz(tmp, digits):
    np.savez(tmp / "a.npz", x=digits[0][..., None], y=digits[1])  # [N, H, W, 1], as most tools write them
    return {"data": tmp / "a.npz"}


PLACES = {
    "folder": make_folder,
    "folder with classes.txt": make_named_folder,
    "JSON mapping": make_json_mapping,
    "CSV": make_csv,
    "Parquet of paths": make_path_table,
    "Parquet of images": make_hub_parquet,
    "npz": make_npz,
    "uint8 tensors": lambda tmp, d: {"x": torch.from_numpy(d[0])[:, None], "y": torch.from_numpy(d[1])},
    "arrays": lambda tmp, d: {"x": np.float32(d[0][:, None]) / np.float32(255), "y": d[1]},
    "pair": lambda tmp, d: {"data": (d[0], d[1])},
    "Dataset": lambda tmp, d: {"data": Items(d)},
    "DataLoader": lambda tmp, d: {"data": DataLoader(Items(d), batch_size=7)},
    "shuffled DataLoader": lambda tmp, d: {"data": DataLoader(Items(d), batch_size=7, shuffle=True)},
    "DataLoader of a stream": lambda tmp, d: {"data": DataLoader(Stream(d), batch_size=7)},
    "DataLoader of tensors": lambda tmp, d: {
        "data": DataLoader(TensorDataset(torch.from_numpy(d[0])[:, None], torch.from_numpy(d[1])), batch_size=9)
    },
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_images_from_anywhere_give_the_robust_accuracy_of_an_independent_loop(place, net, digits, expected, tmp_path):
    result = ask(net, **PLACES[place](tmp_path, digits))
    assert result.n == N and 0 < expected < result.clean_accuracy.value
    assert result.robust_accuracy.value == expected


def test_the_first_images_of_a_folder_are_of_many_classes(digits, tmp_path):
    found = open_images(write_folder(tmp_path / "f", digits), channels=1)
    assert len(set(found.y[:10].tolist())) > 4
    assert torch.equal(open_images(tmp_path / "f", channels=1).y, found.y)


def test_a_mapping_is_not_ignored(net, digits, tmp_path):
    """In alphabetical order of the names the labels are wrong, so next to no image is right."""
    result = ask(net, data=write_folder(tmp_path / "f", digits, NAMES), channels=1)
    assert result.clean_accuracy.value < 0.5
    assert result.identity["images"]["classes"] == {name: k for k, name in enumerate(sorted(NAMES))}


def test_how_images_are_read_is_part_of_the_identity(net, digits, tmp_path):
    root = write_folder(tmp_path / "f", digits)
    plain = ask(net, data=root, channels=1)
    resized = ask(net, data=root, channels=1, resize=10, crop=8)
    assert resized.identity["images"]["resize"] == 10 and resized.identity["images"]["crop"] == 8
    assert plain.run_id != resized.run_id and plain.identity["data"] != resized.identity["data"]
    (root / "3" / "new.png").write_bytes(png(digits[0][0]))
    assert ask(net, data=root, channels=1).identity["data"] != plain.identity["data"]


@pytest.mark.parametrize("size", [(37, 61), (61, 37), (50, 50), (41, 40)])
def test_resize_and_crop_are_those_of_torchvision(size):
    from torchvision.transforms import v2

    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    image = Image.fromarray(pixels)
    steps = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(27), v2.PILToTensor()])
    assert torch.equal(Preparation(32, 27).apply(png(pixels)), steps(image))
    assert Preparation(32).compute_size(*image.size) == v2.Resize(32)(image).size


def test_few_images_are_in_memory_at_once(net, digits, tmp_path, monkeypatch):
    from robbench.data import encoded
    from robbench.evaluation import inputs

    asked = []
    call = encoded.StreamedImages.__call__
    monkeypatch.setattr(inputs, "_MOST_BYTES", 6 * 64 * 4)
    monkeypatch.setattr(encoded.StreamedImages, "__call__", lambda self, at: (asked.append(len(at)), call(self, at))[1])
    result = ask(net, **make_folder(tmp_path, digits), lanes=4)
    assert result.n == N and sum(asked) > 2 * N
    assert max(asked) <= 16, "16 images are compared with the model's own answers, 6 are attacked at once"
    assert result.robust_accuracy.value == ask(net, data=tmp_path / "f", channels=1).robust_accuracy.value


def test_a_parquet_file_in_random_order_reads_each_row_group_once(net, digits, expected, tmp_path, monkeypatch):
    given = make_hub_parquet(tmp_path, digits)
    read = []

    def read_group(path, group, column, through=rows._read_group.__wrapped__):
        read.append((path, group))
        return through(path, group, column)

    images = open_images(given["data"], channels=1).read
    in_order = images(np.arange(N))
    monkeypatch.setattr(rows, "_read_group", functools.lru_cache(maxsize=1)(read_group))
    mixed = np.random.default_rng(0).permutation(N)
    assert torch.equal(images(mixed), in_order[torch.from_numpy(mixed)])
    assert len(read) == len(set(read)) > 2
    assert ask(net, **given, sample_seed=5).robust_accuracy.value == expected


def test_a_tensor_is_hashed_without_a_copy():
    for dtype in (torch.uint8, torch.float16, torch.float32, torch.float64):
        t = torch.arange(24).reshape(2, 3, 4).to(dtype)
        for view in (t, t.permute(2, 0, 1)):
            assert digest_tensor(view) == hashlib.sha256(view.contiguous().numpy().tobytes()).hexdigest()


# What is broken.


def break_folder(tmp, digits):
    root = write_folder(tmp / "f", digits)
    (root / "3" / "text.jpg").write_text("this is no image")
    whole = (root / "4").glob("*.png")
    first = next(whole)
    (root / "4" / "half.png").write_bytes(first.read_bytes()[:60])
    (root / "5" / "gone.png").symlink_to(tmp / "nowhere")
    return root


def test_a_broken_file_stops_the_run_and_is_named(net, digits, tmp_path):
    with pytest.raises(DataError, match=r"^(3/text.jpg|4/half.png|5/gone.png): .*--on-broken skip"):
        ask(net, data=break_folder(tmp_path, digits), channels=1)


def test_broken_files_are_skipped_as_asked_and_listed(net, digits, expected, tmp_path):
    result = ask(net, data=break_folder(tmp_path, digits), channels=1, on_broken="skip")
    assert result.n == N and result.robust_accuracy.value == expected
    listed = result.identity["images"]["skipped"]
    assert {entry.split(":")[0] for entry in listed} == {"3/text.jpg", "4/half.png", "5/gone.png"}
    assert "3 of 43 images" in result.flags["skipped_images"] and "3/text.jpg" in result.flags["skipped_images"]


def test_all_images_broken_is_an_error(net, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_text("no")
    with pytest.raises(DataError, match=r"None of 1 images can be read; the first: a/x\.jpg"):
        ask(net, data=tmp_path, on_broken="skip")


def extra_class(tmp, digits):
    root = write_folder(tmp / "f", digits)
    (root / "x").mkdir()
    (root / "x" / "a.png").write_bytes(png(digits[0][0]))
    return root


def lacking_class(tmp, digits):
    keep = digits[1] < 8
    return write_folder(tmp / "f", (digits[0][keep], digits[1][keep]))


def empty_class(tmp, digits):
    root = write_folder(tmp / "f", digits)
    (root / "9b").mkdir()
    return root


def sizes(tmp, digits):
    root = write_folder(tmp / "f", digits)
    (root / "0" / "large.png").write_bytes(png(np.zeros((9, 12), np.uint8)))
    return root


def deep_pixels(tmp, digits):
    root = write_folder(tmp / "f", digits)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(root / "0" / "deep.png")
    return root


def write(path, text):
    path.write_text(text)
    return path


def hub(tmp, **columns):
    pq.write_table(pa.table(columns), tmp / "t.parquet")
    return tmp / "t.parquet"


def labelled(tmp, digits, labels):
    np.savez(tmp / "a.npz", x=digits[0], y=labels)
    return tmp / "a.npz"


MAPPED = {"classes": "m.txt", "channels": 1}
WRONG = {  # what is given, and words of the sentence
    "a class too many": (
        extra_class,
        {"channels": 1},
        ModelError,
        "The model has 10 classes; the data set has 11.*--cl",
    ),
    "a class too few": (lacking_class, {"channels": 1}, ModelError, "10 classes; the data set has 8.*--classes FILE"),
    "an empty class": (empty_class, {"channels": 1}, DataError, "9b holds no images; allowed: .jpg"),
    "an empty folder": (lambda tmp, d: tmp, {}, DataError, "holds no folders of classes and no .parquet files"),
    "no folder": (lambda tmp, d: tmp / "no", {}, DataError, "--data: no .*no; expected: a folder of class folders"),
    "another file": (lambda tmp, d: write(tmp / "a.txt", "x"), {}, DataError, "a.txt given; expected: a folder"),
    "sizes that differ": (
        sizes,
        {"channels": 1},
        DataError,
        r"have different sizes.*12 × 9 \(0/large.png\).*--resize N",
    ),
    "a crop that is too large": (
        make_folder,
        {"channels": 1, "crop": 9},
        DataError,
        "8 × 8 pixels are too few for --crop 9",
    ),
    "16 bits": (deep_pixels, {"channels": 1}, DataError, "0/deep.png: mode I;16 given; allowed: 8 bits a channel"),
    "a size that the model refuses": (
        make_folder,
        {"channels": 1, "resize": 12},
        ModelError,
        r"images of shape \(1, 12, 12\)",
    ),
    "colours that the model refuses": (make_folder, {}, ModelError, r"images of shape \(3, 8, 8\)"),
    "a mapping without a class": (
        make_folder,
        MAPPED,
        DataError,
        r"class 2, 3, 4 … is not in the mapping of 2 classes",
    ),
    "labels out of range": (
        lambda t, d: labelled(t, d, d[1] + 1),
        {},
        ModelError,
        "10 classes; the labels go up to 10",
    ),
    "negative labels": (lambda t, d: labelled(t, d, d[1] - 1), {}, DataError, "y holds the label -1"),
    "too few labels": (lambda t, d: labelled(t, d, d[1][1:]), {}, DataError, "expected 40 integer labels"),
    "float labels": (lambda t, d: labelled(t, d, d[1] / 2), {}, DataError, "y is torch.float64"),
    "pickled arrays": (lambda t, d: labelled(t, d, d[1].astype(object)), {}, DataError, "not an .npz file of images"),
    "an .npz of text": (lambda t, d: write(t / "a.npz", "x"), {}, DataError, "not an .npz file of images"),
    "an .npz without y": (lambda t, d: np.savez(t / "a.npz", x=d[0]) or t / "a.npz", {}, DataError, "lacking: y"),
    "resize of arrays": (make_npz, {"resize": 8}, DataError, "resize given with images that are decoded already"),
    "a table without labels": (
        lambda t, d: write(t / "a.csv", "path,size\nx,3\n"),
        {},
        DataError,
        "none of its 2 columns is one of labels: label",
    ),
    "a table without rows": (lambda t, d: write(t / "a.csv", "path,label\n"), {}, DataError, "holds no images"),
    "a table of no table": (
        lambda t, d: write(t / "a.csv", ""),
        {},
        DataError,
        "none of its 0 columns is one of images",
    ),
    "a short line": (
        lambda t, d: write(t / "a.csv", "path,label\nx\n"),
        {},
        DataError,
        "line 2 has 1 fields; expected: 2",
    ),
    "a negative label in a table": (
        lambda t, d: write(t / "a.csv", "path,label\nx,-1\n"),
        {},
        DataError,
        "the label -1",
    ),
    "a path to nothing": (lambda t, d: write(t / "a.csv", "path,label\nx.png,1\n"), {}, DataError, "^x.png: "),
    "half labels": (
        lambda t, d: hub(t, image=[b"x"], label=[0.5]),
        {},
        DataError,
        "label of image 1 is neither a whole",
    ),
    "no bytes": (
        lambda t, d: hub(t, image=[3], label=[1]),
        {},
        DataError,
        "column image holds neither paths nor bytes",
    ),
    "a Parquet of text": (lambda t, d: write(t / "a.parquet", "x" * 99), {}, DataError, "not a Parquet file of images"),
    "normalized items": (lambda t, d: Items(d, lambda x: x * 4 - 2), {}, DataError, r"data\[0\] spans .*normalization"),
    "random items": (
        lambda t, d: Items(d, lambda x: torch.rand(1, 8, 8)),
        {},
        DataError,
        r"data\[0\] .*transform is random",
    ),
    "items that raise": (
        lambda t, d: Items(d, lambda x: 1 / 0),
        {},
        DataError,
        r"data\[0\] of the Dataset: division by zero",
    ),
    "a list": (lambda t, d: [1, 2, 3], {}, DataError, "data: builtins.list given; allowed: a path, a pair"),
    "a stream": (lambda t, d: Stream(d), {}, DataError, "Stream given; allowed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_images_are_a_sentence_before_any_attack(case, net, digits, tmp_path, monkeypatch):
    make, how, kind, words = WRONG[case]
    data = make(tmp_path, digits)
    data = data["data"] if isinstance(data, dict) else data
    if how.get("classes"):
        how = {**how, "classes": write(tmp_path / "m.txt", "0\n1\n")}
    monkeypatch.setattr("robbench.engine.engine.attack_samples", None)
    with warnings.catch_warnings(), pytest.raises(kind, match=words) as caught:
        warnings.simplefilter("ignore", DeprecationWarning)
        ask(net, data=data, **how)
    assert isinstance(caught.value, RobbenchError) and "\n" not in str(caught.value)


def test_a_mapping_beyond_the_outputs_of_the_model_is_refused(net, digits, tmp_path, monkeypatch):
    root = write_folder(tmp_path / "f", digits)
    outputs = write(tmp_path / "m.json", json.dumps({str(k): k + 5 for k in range(10)}))
    monkeypatch.setattr("robbench.engine.engine.attack_samples", None)
    with pytest.raises(ModelError, match="The model has 10 classes; the labels go up to 14"):
        ask(net, data=root, channels=1, classes=outputs)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.txt", "a\nb\na\n", "names 1 and 3 are equal"),
        ("m.json", '{"a": -1}', "the output of class 1 is no whole number"),
        ("m.json", '{"a": true}', "the output of class 1 is no whole number"),
        ("m.json", "{}", "expected: a list of names"),
        ("m.json", "{", "not a mapping of classes"),
        ("m.txt", "", "expected: a list of names"),
    ],
)
def test_a_wrong_mapping_is_refused(name, text, words, digits, tmp_path):
    root = write_folder(tmp_path / "f", digits)
    with pytest.raises(DataError, match=words):
        open_images(root, classes=write(tmp_path / name, text))


# The commands.


@pytest.fixture
def mine(tmp_path, digits):
    (tmp_path / "mine.py").write_text("import robbench\ndef net():\n    return robbench.load_model('digits/at')\n")
    write_folder(tmp_path / "images", digits)
    return tmp_path


OWN = ("--data", "images", "--channels", "1")


@pytest.mark.whole
def test_every_command_takes_images_of_ones_own(mine, expected):
    (mine / "f.toml").write_text(
        "version = 1\ntitle = 't'\ndescription = ''\njudge = 'any'\nmode = 'full'\n"
        "[[attack]]\nname = 'F'\nkind = 'fgsm'\n"
    )
    how = ("-m", "mine:net", "-s", "f.toml", "--eps", EPS, *OWN)
    done = json.loads(run("eval", *how, "--save-adversarials", "--json", cwd=mine).stdout)
    assert done["robust_accuracy"]["value"] == expected and done["dataset"] == "custom"
    (place,) = (mine / "results").glob("custom/mine-net/f*")
    # How images were read is known from the result: only their place is given again.
    assert "0 mismatches" in run("verify", place, "-m", "mine:net", "--data", "images", cwd=mine).stdout
    again = run("reproduce", place, "-m", "mine:net", "-s", "f.toml", "--data", "images", cwd=mine).stdout
    assert "the record holds, equal record by record" in again
    assert "40 images" in run("plan", *how, cwd=mine).stdout
    assert "Linf 0.1: " in run("sanity", "mine:net", *OWN, "--eps", EPS, "--samples", 5, cwd=mine).stdout
    written = run("baseline", *how, "--out", "b.json", cwd=mine).stdout
    command = written.splitlines()[-1].partition("robbench ")[2].split()
    assert run(*command, cwd=mine).code == 0
    (mine / "images").rename(mine / "moved")
    assert run(*command, "--data", "moved", cwd=mine).code == 0
    (mine / "moved" / "3" / "more.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    said = run(*command, "--data", "moved", cwd=mine, code=2).stderr
    assert "images and labels: " in said and "cannot be compared image by image" in said


def test_images_without_a_radius_are_refused_before_they_are_read(mine):
    said = run("eval", "-m", "mine:net", "--data", "nowhere", cwd=mine, code=2).stderr
    assert "eps: no radius given" in said
    assert "go with a source" in run("eval", "-m", "digits/at", *OWN, cwd=mine, code=2).stderr


def test_only_image_formats_are_decoded(tmp_path):
    """A text of PostScript would start Ghostscript. The message is in the identity, so it is the same each time."""
    folder = tmp_path / "images/cat"
    folder.mkdir(parents=True)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    for content in (postscript, b"a text"):
        (folder / "0.png").write_bytes(content)
        with pytest.raises(DataError, match=r"0\.png: no image; allowed: JPEG, PNG"):
            open_images(tmp_path / "images")


def test_a_thin_image_is_not_resized_to_a_vast_one(tmp_path):
    folder = tmp_path / "images/cat"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(png(np.zeros((1, 65000), np.uint8)))
    with pytest.raises(DataError, match="--resize makes"):
        open_images(tmp_path / "images", resize=2000)


@pytest.mark.parametrize("label", ["--5", "9" * 20, "1" * 5000])
def test_labels_that_are_no_numbers_end_in_a_sentence(tmp_path, label):
    (tmp_path / "0.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    (tmp_path / "table.csv").write_text(f"path,label\n0.png,{label}\n")
    with pytest.raises(DataError, match=r"table\.csv"):
        open_images(tmp_path / "table.csv")


def test_images_of_your_own_have_no_name_of_a_known_test_set(net, digits, tmp_path):
    pictures, labels = digits
    np.savez(tmp_path / "a.npz", x=pictures[:4], y=labels[:4])
    given = [make_folder(tmp_path, digits), {"data": tmp_path / "a.npz"}, {"data": (pictures[:4], labels[:4])}]
    x, y = torch.from_numpy(pictures[:4])[:, None], torch.from_numpy(labels[:4])
    given += [{"x": x, "y": y}, {"data": TensorDataset(x, y)}]
    for images in given:
        for name in ("digits", "mnist", "cifar10", "imagenet", "MNIST", "Fashion-MNIST", "cifar 100", "ｍｎｉｓｔ"):
            with pytest.raises(DataError, match=r"the name of a known test set\. Give another name, such as my-"):
                evaluate(net, "quick", **images, dataset=name)
        assert evaluate(net, "quick", **images, dataset="my-digits", norm="Linf", eps=0.1, samples=2).n == 2


def test_files_of_a_known_test_set_hold_its_images(net, tmp_path):
    """Any files can lie in the data directory; those of MNIST are known by their digest."""
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist/t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((10_000, 28, 28), np.uint8)))
    (tmp_path / "mnist/t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(10_000, np.uint8)))
    with pytest.raises(DataError, match="not those of the test set mnist"):
        evaluate(net, "quick", dataset="mnist", data_dir=tmp_path, samples=2)


def test_an_image_of_many_pixels_is_not_decoded(tmp_path):
    """A file of kilobytes can hold them. Each is counted alone here: a folder has no limit for all of them."""
    for name, size in (("wide", (8193, 8192)), ("small", (8, 8))):
        (tmp_path / name).mkdir()
        Image.new("1", size).save(tmp_path / name / "0.png")
    with pytest.raises(DataError, match="8193 × 8192 pixels given; allowed: 67,108,864"):
        open_images(tmp_path)
