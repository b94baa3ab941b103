"""Recipes by hand, and a loop that ends with the same weights however often it is killed."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from robbench.core import rng
from robbench.core.errors import CardError, ModelError, StorageError
from robbench.core.files import digest
from robbench.data.sets import load
from robbench.models.architectures import build
from robbench.models.card import Adversary, Recipe, Registry, parse_card
from robbench.models.load import load_model
from robbench.models.recipes import LargeBatch
from robbench.report.curve import draw_curve
from robbench.training import recipe as terms
from robbench.training import targets
from robbench.training import train as loop
from robbench.training.draws import Draws
from robbench.training.missing import list_missing, train_missing
from robbench.training.options import Options
from robbench.training.plan import Plan
from robbench.training.step import Step
from support.cards import SMALL

CARD = (
    SMALL
    + """[recipe]
iterations = 40
batch_size = 32
optimizer = "adam"
lr = 0.01
seed = 3
"""
)
ADVERSARY = '\n[recipe.adversary]\neps = "0.1"\nstep_size = "0.05"\nsteps = 2\n'


def train(entry, **options):
    return loop.train(entry, Options(**options))


def recipe(**given):
    return Recipe(iterations=100, batch_size=4, optimizer="sgd", lr=0.1, **given)


def draws(size=4):
    return Draws(load("digits", "train"), recipe().model_copy(update={"batch_size": size}), torch.device("cpu"))


def put(root, text=CARD, name="m"):
    path = root / "digits" / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return Registry([root]).find(f"digits/{name}")


def test_label_smoothing_by_hand():
    smooth = targets.smooth_labels(torch.tensor([1, 0]), 0.9, 3)
    assert smooth.tolist() == [pytest.approx([0.3, 0.4, 0.3]), pytest.approx([0.4, 0.3, 0.3])]
    assert targets.smooth_labels(torch.tensor([1]), 0.0, 3).tolist() == [[0, 1, 0]]


def test_squeezing_by_hand():
    assert float(terms.squeeze(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))) == pytest.approx(5 / 2)


@pytest.mark.parametrize(("beta", "stuck"), [(6.0, False), (7.5, True)])
def test_squeezing_collapses_where_table_5_does(beta, stuck):
    """All logits zero is a minimum exactly from β = 0.949 √N on: 6.7 for N = 50, between the paper's 5 and 10."""
    y = torch.arange(50) % 10
    towards_labels = 1e-3 * F.one_hot(y, 10).float()
    at_zero = float(terms.objective(torch.zeros(50, 10), y, recipe(beta=beta)))
    near = float(terms.objective(towards_labels - towards_labels.mean(1, keepdim=True), y, recipe(beta=beta)))
    assert (near > at_zero) is stuck


def test_the_objective_equals_values_by_hand():
    z, y = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]]), torch.tensor([0, 1])
    log_p = z.log_softmax(1)
    assert torch.equal(terms.objective(z, y, recipe()), F.cross_entropy(z, y))
    warm = torch.tensor([[0.7, 0.15, 0.15], [0.15, 0.7, 0.15]])
    expected = -(warm * log_p).sum(1).mean() + 0.5 * torch.tensor(6.0).sqrt() / 2
    assert float(terms.objective(z, y, recipe(alpha=0.45, beta=0.5))) == pytest.approx(float(expected))


def test_squeezing_by_another_norm():
    z = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    assert float(terms.squeeze(z, 1.0)) == pytest.approx(7 / 2)
    assert float(terms.objective(z, torch.tensor([0, 0]), recipe(beta=2.0, squeeze_norm=1.0))) == pytest.approx(
        float(F.cross_entropy(z, torch.tensor([0, 0]))) + 7
    )


def test_where_the_variants_of_smoothing_put_the_mass():
    z, y = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, 5.0]], requires_grad=True), torch.tensor([1, 0])
    assert targets.wrong_mass("adversarial", z, y).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert targets.wrong_mass("second_best", z, y).tolist() == [[0, 0, 1], [0, 0, 1]]
    q = targets.wrong_mass("boltzmann", z, y, temperature=2.0)
    weights = [np.exp(-0.5), np.exp(-1.5), np.exp(-1.0)]
    assert q[0].tolist() == pytest.approx([w / sum(weights) for w in weights])
    assert not q.requires_grad
    z = z.detach()
    warm = targets.smooth_labels(y, 0.4, targets.wrong_mass("second_best", z, y))
    assert warm.tolist() == [pytest.approx([0, 0.6, 0.4]), pytest.approx([0.6, 0, 0.4])]
    loss = terms.objective(z, y, recipe(alpha=0.4, smoothing="second_best"))
    assert float(loss) == pytest.approx(float(-(warm * z.log_softmax(1)).sum(1).mean()))


def test_divergence_and_pairs_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.8, 0.2]])
    expected = 0.5 * np.log(0.5 / 0.8) + 0.5 * np.log(0.5 / 0.2)
    assert float(terms.divergence(q.log() + 3, p.log() - 1)) == pytest.approx(expected, rel=1e-5), "KL(p, q)"
    assert float(terms.pairing_penalty("trades", p.log(), q.log())) == pytest.approx(expected, rel=1e-5)
    z, other = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert float(terms.pairing_penalty("alp", z, other)) == pytest.approx((4 + 9) / 4)
    assert float(terms.pairing_penalty("clp", torch.cat([z, other, z[:1]]), None)) == pytest.approx((4 + 9) / 4)


def test_fix_k_by_hand():
    z, sample = torch.tensor([[5.0, 1.0, 4.0, 0.0, 2.0]]).repeat(2000, 1), torch.arange(2000)
    assert targets.fix(z[:1], 2, "average", sample[:1], (1, 2)).tolist() == [[5, 1, 4, 1, 1]]
    permuted = targets.fix(z, 2, "permute", sample, (1, 2))
    assert (permuted[:, [0, 2]] == z[:, [0, 2]]).all(), "the two largest stay"
    seen = {tuple(row) for row in permuted[:, [1, 3, 4]].tolist()}
    assert len(seen) == 6 and all(sorted(row) == [0, 1, 2] for row in seen), "every order of the others"
    share = float((permuted[:, 1] == 2).float().mean())
    assert abs(share - 1 / 3) < 0.04, "each as often"
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(targets.fix(z, 2, "permute", sample[order], (1, 2)), permuted[order])
    assert torch.equal(targets.fix(z, 5, "permute", sample, (1, 2)), z)
    assert torch.equal(targets.fix(z, 5, "average", sample, (1, 2)), z)


def test_corrected_and_hybrid_targets_by_hand():
    z = torch.tensor([[1.0, 7.0, 3.0], [9.0, 2.0, 4.0]])
    assert targets.correct(z, torch.tensor([0, 0])).tolist() == [[7, 1, 3], [9, 2, 4]]
    ranks = torch.tensor([[0.3, 0.1, 0.9], [0.0, 2.0, 1.0]])
    assert targets.hybrid(z, ranks).tolist() == [[3, 1, 7], [2, 9, 4]]
    assert float(terms.objective(z, torch.tensor([0, 0]), recipe(), target=z + 2)) == 2


def test_trades_attacks_the_divergence():
    reference = torch.tensor([[2.0, 0.0]])
    adversary = Adversary(eps=Fraction(1, 10), steps=3, step_size=Fraction(1, 20), loss="kl")
    attack = terms.build_inner_attack(adversary, reference)
    assert (attack.steps, attack.step_size, attack.random_start) == (3, 0.05, True)
    loss = attack.loss(torch.tensor([[0.0, 1.0]]), None, {})
    assert float(loss) == pytest.approx(float(terms.divergence(torch.tensor([[0.0, 1.0]]), reference)))


def test_any_attack_can_be_the_adversary():
    adversary = Adversary(attack="apgd", eps=Fraction(1, 10), steps=7, loss="dlr")
    attack = terms.build_inner_attack(adversary)
    assert (attack.kind, attack.steps, attack.objective) == ("apgd", 7, "dlr")
    with pytest.raises(CardError, match=r"parameter of apgd.*step_size"):
        terms.build_inner_attack(Adversary(attack="apgd", eps=Fraction(1, 10), steps=7, step_size=Fraction(1, 10)))
    with pytest.raises(CardError, match="pgdd"):
        terms.build_inner_attack(Adversary(attack="pgdd", eps=Fraction(1, 10), steps=7))


def test_noise_has_its_sigma_and_depends_on_sample_and_iteration_alone():
    x, sample = torch.zeros(200, 1, 8, 8), torch.arange(200)

    def at(iteration):
        return torch.full_like(sample, iteration)

    noise = terms.draw_noise(x, sample, at(7), (1, 2))
    assert float(noise.std()) == pytest.approx(1, rel=0.03)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(terms.draw_noise(x, sample[order], at(7), (1, 2)), noise[order])
    assert not torch.equal(terms.draw_noise(x, sample, at(8), (1, 2)), noise)
    step = Step(build("linear", {}, 10, (1, 8, 8)), recipe(sigma="0.3"), draws())
    batch = step.draws.at(0, True)
    assert torch.allclose(step.add_noise(batch.x, batch), batch.x + 0.3 * batch.noise)
    assert float(step.add_noise(batch.x, batch).min()) < 0, "not clipped"


def test_augmentation_shifts_and_flips():
    x = torch.arange(1.0, 65).view(1, 1, 8, 8).expand(300, 1, 8, 8)
    moved = terms.augment(x, "crop_flip", torch.arange(300), torch.zeros(300).long(), (1, 2))
    padded = F.pad(x[0, 0], (1, 1, 1, 1))
    windows = [padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    allowed = {tuple(w.flatten().tolist()) for w in windows}
    flipped = {tuple(w.flip(1).flatten().tolist()) for w in windows}
    seen = [tuple(m.flatten().tolist()) for m in moved]
    assert set(seen) == allowed | flipped
    assert 100 < sum(s in flipped for s in seen) < 200
    assert (
        set(
            map(tuple, terms.augment(x, "crop", torch.arange(300), torch.zeros(300).long(), (1, 2)).flatten(1).tolist())
        )
        == allowed
    )


def test_learning_rates_follow_their_schedules():
    assert terms.learning_rate(recipe(), 0.99) == 0.1
    assert terms.learning_rate(recipe(schedule="cosine"), 0.5) == pytest.approx(0.05)
    steps = recipe(schedule="steps", milestones=(0.5, 0.75), gamma=0.1)
    assert [terms.learning_rate(steps, i) for i in (0.49, 0.5, 0.75)] == pytest.approx([0.1, 0.01, 0.001])


def test_the_inner_attack_is_the_cards():
    attack = terms.build_inner_attack(
        Adversary(eps=Fraction(3, 10), step_size=Fraction(1, 100), steps=40, random_start=False, loss="margin")
    )
    assert (attack.steps, attack.step_size, attack.random_start, attack.objective) == (40, 0.01, False, "margin")


@pytest.mark.whole
def test_without_terms_the_loop_is_plain_training(tmp_path):
    entry = put(tmp_path)
    train(entry, runs=tmp_path / "runs")
    data = load("digits", "train")
    torch.manual_seed(3)
    module = build("digits_convnet", {"width": 4, "hidden": 8}, 10, (1, 8, 8)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01, fused=True)
    key, n = rng.make_key(3, "train-order"), len(data)
    position = torch.arange(n)
    for i in range(40):
        epoch, place = divmod(i, n // 32)
        order = rng.bits(key, position, torch.full_like(position, epoch), 0, 1).squeeze(1).argsort(stable=True)
        batch = order[place * 32 : place * 32 + 32]
        x = (torch.from_numpy(data.x)[batch].float() / 16).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        F.cross_entropy(module(x), torch.from_numpy(data.y)[batch]).backward()
        optimizer.step()
    ours = load_model(Registry([tmp_path]).find("m")).module.state_dict()
    for name, value in module.state_dict().items():
        assert torch.equal(ours[name], value.half().float()), name


def test_every_epoch_sees_every_image_once():
    all_draws = draws(32)
    seen = [all_draws.positions(i) for i in range(2 * (898 // 32))]
    first, second = torch.cat(seen[:28]), torch.cat(seen[28:])
    assert len(first.unique()) == len(second.unique()) == 28 * 32
    assert not torch.equal(first, second)


@pytest.mark.whole
@pytest.mark.parametrize(
    "text", [CARD, CARD + ADVERSARY, CARD.replace("lr =", 'alpha = 0.5\nbeta = 0.1\nsigma = "0.2"\nlr =')]
)
def test_stopping_and_going_on_ends_with_the_same_weights(tmp_path, text):
    whole, parts = put(tmp_path / "a", text), put(tmp_path / "b", text)
    train(whole, runs=tmp_path / "runs-a")
    for _ in range(200):
        done = train(parts, runs=tmp_path / "runs-b", time_limit=1e-9)  # one iteration a call
        if done.table["iterations"] == 40:
            break
        assert Registry([tmp_path / "b"]).find("m").card.trained.iterations == done.table["iterations"]
    a, b = (Registry([tmp_path / d]).find("m").card for d in "ab")
    assert a.weights.sha256 == b.weights.sha256
    assert a.trained.iterations == b.trained.iterations == 40
    lines = [json.loads(line) for line in (tmp_path / "runs-b/digits/m/log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 41))


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from robbench.models.card import Registry
from robbench.training import options, run, train as t
run._CHECKPOINT_SECONDS = 0.0
root = Path(sys.argv[1])
report = lambda p: print(p.iteration, flush=True)
t.train(Registry([root]).find("m"), options.Options(runs=root / "runs", report=report))
"""


@pytest.mark.whole
def test_sigkill_in_the_middle_ends_with_the_same_weights(tmp_path):
    put(tmp_path / "a"), put(tmp_path / "b")
    train(Registry([tmp_path / "a"]).find("m"), runs=tmp_path / "runs-a")
    for stop in (5, 23, None):
        with subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "b")], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            first = None
            for line in child.stdout:
                first = first or int(line)
                if stop is not None and int(line) >= stop:
                    child.send_signal(signal.SIGKILL)
                    break
            child.wait()
        if stop == 23:
            assert first is not None and first >= 5, "the second call went on where the first was killed"
    a, b = (Registry([tmp_path / d]).find("m").card for d in "ab")
    assert a.weights.sha256 == b.weights.sha256


@pytest.mark.whole
def test_a_changed_recipe_does_not_continue_an_old_run(tmp_path):
    train(put(tmp_path), runs=tmp_path / "runs", time_limit=1e-9)
    changed = put(tmp_path, CARD.replace("0.01", "0.02"))
    with pytest.raises(ModelError, match="--restart"):
        train(changed, runs=tmp_path / "runs")
    assert train(changed, runs=tmp_path / "runs", restart=True).table["iterations"] == 40


def write_checkpoint(path, kind):
    whole = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(2**38)
    elif isinstance(kind, bytes):
        path.write_bytes(kind)
    elif kind == "packed":
        with zipfile.ZipFile(io.BytesIO(whole)) as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for member in stored.infolist():
                packed.writestr(member.filename, stored.read(member))
    else:
        torch.save(kind, path)


JUNK = [b"", b"junk", b"\x80\x02" + b"N0" * 400_000 + b"N.", [], {}, {"identity": 1}]


@pytest.mark.whole
@pytest.mark.usefixtures("limited_time")
@pytest.mark.parametrize("kind", ["pipe", "folder", "sparse", "packed", "own", *JUNK])
def test_a_damaged_checkpoint_is_named_at_once(tmp_path, kind):
    entry, path = put(tmp_path), tmp_path / "runs/digits/m/checkpoint.pt"
    train(entry, runs=tmp_path / "runs", time_limit=1e-9)
    write_checkpoint(path, {"identity": torch.load(path)["identity"], "module": {}} if kind == "own" else kind)
    begin = time.perf_counter()
    with pytest.raises(ModelError, match=r"checkpoint\.pt .*--restart"):
        train(entry, runs=tmp_path / "runs")
    assert time.perf_counter() - begin < 5


def test_a_checkpoint_goes_on_in_its_own_precision(tmp_path):
    """Or the card would name one precision for iterations in two."""
    entry = put(tmp_path)
    train(entry, runs=tmp_path / "runs", time_limit=1e-9, precision="float64")
    with pytest.raises(
        ModelError, match=r"begun in float64; this call trains in float32\. Go on with --precision float64"
    ):
        train(entry, runs=tmp_path / "runs")
    assert train(entry, runs=tmp_path / "runs", precision="float64").table["precision"] == "float64"


@pytest.mark.parametrize("content", ["[" * 10**5, "1", "{}", '{"iteration": "x"}'])
def test_a_damaged_log_is_set_aside(tmp_path, content):
    entry, folder = put(tmp_path), tmp_path / "runs/digits/m"
    train(entry, runs=tmp_path / "runs", time_limit=1e-9)
    (folder / "log.jsonl").write_text(content)
    train(entry, runs=tmp_path / "runs")
    assert (folder / "log.jsonl.damaged").read_text() == content
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["iteration"] == 40


@pytest.mark.parametrize("link", ["digits", "digits/m", "digits/m/log.jsonl"])
def test_nothing_is_written_through_a_link_in_the_folder_of_runs(tmp_path, link):
    entry, outside, place = put(tmp_path), tmp_path / "outside", tmp_path / "runs" / link
    outside.mkdir()
    (outside / "precious").write_text("precious")
    place.parent.mkdir(parents=True)
    place.symlink_to(outside / "precious" if link.endswith("jsonl") else outside)
    with pytest.raises(StorageError, match="is a link") if place.is_dir() else contextlib.nullcontext():
        train(entry, runs=tmp_path / "runs", time_limit=1e-9)
    assert [path.read_text() for path in outside.iterdir()] == ["precious"]


def test_what_cannot_be_trained_says_why(tmp_path):
    with pytest.raises(CardError, match="no recipe"):
        train(Registry.default().find("cifar10/natural_resnet18"), runs=tmp_path)
    with pytest.raises(ModelError, match="batch_size 1000 given; the training set has 898"):
        train(put(tmp_path, CARD.replace("32", "1000")), runs=tmp_path / "runs")
    diverging = CARD.replace('"adam"', '"sgd"').replace("0.01", "1e30")
    with pytest.raises(ModelError, match="diverges"):
        train(put(tmp_path, diverging, "d"), runs=tmp_path / "runs")
    assert Registry([tmp_path]).find("d").card.weights is None


TRADES = "\n[recipe.pairing]\nkind = 'trades'\nweight = 6.0\n" + ADVERSARY + "loss = 'kl'\nmix = 0.0\n"
ALP = "\n[recipe.pairing]\nkind = 'alp'\nweight = 0.5\n" + ADVERSARY
CLP = "\n[recipe.pairing]\nkind = 'clp'\nweight = 0.5\n"


def by_hand(text, loss_of):
    """Train as the loop is meant to: batches and starts by counter, the loss written out; state dict after 3 steps."""
    data = load("digits", "train")
    torch.manual_seed(3)
    module = build("digits_convnet", {"width": 4, "hidden": 8}, 10, (1, 8, 8)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01, fused=True)
    position = torch.arange(len(data))
    draw = rng.bits(rng.make_key(3, "train-order"), position, torch.zeros_like(position), 0, 1).squeeze(1)
    for i in range(3):
        batch = draw.argsort(stable=True)[i * 32 : i * 32 + 32]
        x = (torch.from_numpy(data.x)[batch].float() / 16).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        loss_of(module, x, torch.from_numpy(data.y)[batch], batch, i).backward()
        optimizer.step()
    return module.state_dict()


def start(x, batch, i):
    u = rng.uniform(rng.make_key(3, "train-attack"), batch, torch.full_like(batch, i), 0, 64).view_as(x)
    return (x + (2 * u - 1) * 0.1).clamp(0, 1)


def climb(module, x, point, loss_of):
    for _ in range(2):
        point = point.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(loss_of(module(point)), point)
        point = torch.minimum(torch.maximum(point + 0.05 * grad.sign(), x - 0.1), x + 0.1).clamp(0, 1)
    return point.detach()


def trades_loss(module, x, y, batch, i):
    clean = module(x).detach()
    x_adv = climb(module, x, start(x, batch, i), lambda z: terms.divergence(z, clean).sum())
    z_adv, z = module(x_adv), module(x)
    return F.cross_entropy(z, y) + 6 * F.kl_div(z_adv.log_softmax(1), z.softmax(1), reduction="batchmean")


def alp_loss(module, x, y, batch, i):
    x_adv = climb(module, x, start(x, batch, i), lambda z: F.cross_entropy(z, y, reduction="sum"))
    z_adv, z = module(x_adv), module(x)
    return F.cross_entropy(z_adv, y) + 0.5 * (z - z_adv).square().mean()


def mixed_loss(module, x, y, batch, i):
    x_adv = climb(module, x, start(x, batch, i), lambda z: F.cross_entropy(z, y, reduction="sum"))
    return 0.25 * F.cross_entropy(module(x_adv), y) + 0.75 * F.cross_entropy(module(x), y)


def clp_loss(module, x, y, batch, i):
    z = module(x)
    return F.cross_entropy(z, y) + 0.5 * (z[:16] - z[16:]).square().mean()


@pytest.mark.whole
@pytest.mark.parametrize(
    ("extra", "loss_of"),
    [
        pytest.param(TRADES, trades_loss, id="trades"),
        pytest.param(ALP, alp_loss, id="alp"),
        pytest.param(CLP, clp_loss, id="clp"),
        pytest.param(ADVERSARY + "mix = 0.25\n", mixed_loss, id="mixed"),
    ],
)
def test_the_loop_computes_the_loss_as_written_out(tmp_path, extra, loss_of):
    train(put(tmp_path, CARD.replace("iterations = 40", "iterations = 3") + extra), runs=tmp_path / "runs")
    ours = load_model(Registry([tmp_path]).find("m")).module.state_dict()
    for name, value in by_hand(CARD, loss_of).items():
        assert torch.allclose(ours[name], value, atol=2e-3), name  # float16 on disk; sums in another order


@pytest.mark.whole
def test_the_running_average_is_kept_and_survives_a_stop(tmp_path):
    text = CARD.replace("lr =", "ema = 0.9\nlr =").replace("iterations = 40", "iterations = 4")
    plain, whole, parts = (
        put(tmp_path / "p", CARD.replace("= 40", "= 4")),
        put(tmp_path / "a", text),
        put(tmp_path / "b", text),
    )
    states = []
    for iterations in (1, 2, 3, 4):
        short = put(tmp_path / str(iterations), CARD.replace("iterations = 40", f"iterations = {iterations}"))
        train(short, runs=tmp_path / "runs" / str(iterations))
        states.append(load_model(Registry([tmp_path / str(iterations)]).find("m")).module.state_dict())
    train(plain, runs=tmp_path / "runs-p"), train(whole, runs=tmp_path / "runs-a")
    for _ in range(4):
        train(parts, runs=tmp_path / "runs-b", time_limit=1e-9)
    a, b = (Registry([tmp_path / d]).find("m") for d in "ab")
    assert a.card.weights.sha256 == b.card.weights.sha256
    weights = np.array([0.9**3, 0.9**2, 0.9, 1.0])
    weights /= weights.sum()
    for name, value in load_model(a).module.state_dict().items():
        expected = sum(w * s[name] for w, s in zip(weights, states, strict=True))
        assert torch.allclose(value, expected.float(), atol=2e-3), name


BUDGET = """
[cpu_budget]
iterations = 5
"""


@pytest.mark.whole
def test_a_cpu_budget_is_trained_on_a_cpu_and_named(tmp_path):
    done = train(put(tmp_path, CARD + BUDGET), runs=tmp_path / "runs")
    trained = Registry([tmp_path]).find("m").card.trained
    assert (done.wanted, trained.iterations, trained.instead) == (5, 5, "iterations 5 instead of 40")
    assert (tmp_path / "runs/digits/m.cpu/checkpoint.pt").exists()
    again = train(Registry([tmp_path]).find("m"), runs=tmp_path / "runs", budget="full")
    assert again.table["iterations"] == again.wanted == 40
    assert Registry([tmp_path]).find("m").card.trained.instead == ""
    with pytest.raises(CardError, match=r"no \[cpu_budget\]"):
        train(put(tmp_path, CARD, "n"), runs=tmp_path / "runs", budget="cpu")


@pytest.mark.whole
def test_a_gpu_budget_is_as_many_epochs_of_larger_batches(tmp_path):
    entry = put(tmp_path, CARD + "[gpu_budget]\nfactor = 4\nwarmup = 0.5\n")
    assert list_missing(Registry([tmp_path]), budget="gpu") == [entry]
    train(entry, runs=tmp_path / "runs", budget="gpu")
    trained, recipe = Registry([tmp_path]).find("m").card.trained, entry.card.recipe
    assert trained.iterations == recipe.iterations / 4 == 10
    assert trained.instead == (
        f"iterations 10 instead of 40, batch_size {4 * recipe.batch_size} instead of {recipe.batch_size}, "
        f"lr {2 * recipe.lr:g} instead of {recipe.lr:g}, warmup 0.5 instead of 0"
    )
    assert (tmp_path / "runs/digits/m.gpu/checkpoint.pt").exists()
    rates = [json.loads(line)["lr"] for line in (tmp_path / "runs/digits/m.gpu/log.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([2 * recipe.lr * min(1, i / 5) for i in range(10)])
    # By number alone, ten iterations would do for the GPU budget, whatever their batch was.
    assert not list_missing(Registry([tmp_path]), budget="gpu")
    train(entry, runs=tmp_path / "few", budget="full", plan=Plan.parse("10"), restart=True)
    assert [e.name for e in list_missing(Registry([tmp_path]), budget="gpu")] == ["m"]
    with pytest.raises(CardError, match=r"no \[gpu_budget\]; allowed here: budget auto, full, cpu"):
        train(put(tmp_path, CARD + BUDGET, "n"), runs=tmp_path / "runs", budget="gpu")


def test_a_recipe_without_a_warm_up_is_named_as_before():
    plain = recipe()
    assert "warmup" not in plain.model_dump(mode="json")
    assert plain.model_copy(update={"warmup": 0.1}).model_dump(mode="json")["warmup"] == 0.1


def test_a_warm_up_of_zero_is_none_and_any_other_makes_another_training():
    def identify(line):
        found = parse_card(CARD.replace("[recipe]\n", f"[recipe]\n{line}\n"), "card").recipe
        return digest(found.model_dump(mode="json")), digest(Recipe.model_validate(found.model_dump()).model_dump())

    plain = identify("")
    assert plain[0] == plain[1]
    assert [identify(f"warmup = {zero}") for zero in ("0", "0.0", "-0.0", "0e5")] == [plain] * 4
    others = [identify(f"warmup = {share}") for share in ("0.05", "0.1", "1e-9")]
    assert len({*others, plain}) == 4


def test_sgd_scales_the_rate_by_the_factor_and_adam_by_its_root():
    sgd = Recipe(iterations=101, batch_size=8, optimizer="sgd", lr=0.1)
    large = LargeBatch(factor=4)
    changed = large.apply(sgd)
    assert (changed.iterations, changed.batch_size, changed.lr, changed.warmup) == (26, 32, 0.4, 0.05)
    assert large.apply(sgd.model_copy(update={"optimizer": "adam"})).lr == pytest.approx(0.2)


@pytest.mark.whole
def test_weights_that_have_seen_more_are_not_replaced(tmp_path):
    train(put(tmp_path), runs=tmp_path / "runs")
    before = Registry([tmp_path]).find("m").card
    short = train(Registry([tmp_path]).find("m"), runs=tmp_path / "elsewhere", time_limit=1e-9)
    assert not short.written and short.table["iterations"] == 1
    assert Registry([tmp_path]).find("m").card == before
    replaced = train(Registry([tmp_path]).find("m"), runs=tmp_path / "elsewhere", time_limit=1e-9, restart=True)
    assert replaced.written and Registry([tmp_path]).find("m").card.trained.iterations == 1


@pytest.mark.whole
def test_all_missing_goes_by_priority_and_picks_up_where_it_stopped(tmp_path):
    text = CARD.replace("iterations = 40", "iterations = 6")
    first = text.replace("dataset", "priority = 2\ndataset")
    put(tmp_path, text, "a"), put(tmp_path, first, "z"), put(tmp_path, text + BUDGET, "c")
    put(tmp_path, CARD[: CARD.index("[recipe]")], "without_recipe")
    names = [entry.name for entry in list_missing(Registry([tmp_path]))]
    assert names == ["z", "a", "c"]
    began = []
    for _ in range(30):
        train_missing(
            Registry([tmp_path]),
            Options(runs=tmp_path / "runs", time_limit=1e-9),
            begin=lambda e: began.append(e.name),
        )
        if not list_missing(Registry([tmp_path])):
            break
    assert began == ["z"] * 6 + ["a"] * 6 + ["c"] * 5
    assert [entry.name for entry in list_missing(Registry([tmp_path]), budget="full")] == ["c"], "partly trained"


@pytest.mark.whole
def test_a_student_learns_its_teachers_logits(tmp_path):
    train(put(tmp_path, CARD, "teacher"), runs=tmp_path / "runs")
    table = "\n[recipe.distillation]\nteacher = 'digits/teacher'\n"
    student = put(tmp_path, CARD.replace("= 40", "= 300") + table, "student")
    train(student, runs=tmp_path / "runs")
    data = load("digits", "train")
    x = torch.from_numpy(data.x).float() / data.scale
    registry = Registry([tmp_path])
    teacher = load_model(registry.find("teacher"))
    target = safetensors.torch.load_file(tmp_path / "runs/digits/student/targets.safetensors")["target"]
    assert torch.allclose(target, teacher.module(x), atol=1e-4)
    agree = load_model(registry.find("student")).module(x).argmax(1) == target.argmax(1)
    assert float(agree.float().mean()) > 0.8
    # A new teacher is another recipe: neither its old targets nor the old checkpoint are used.
    train(put(tmp_path, CARD.replace("seed = 3", "seed = 4"), "teacher"), runs=tmp_path / "runs", restart=True)
    with pytest.raises(ModelError, match="another recipe"):
        train(put(tmp_path, CARD.replace("= 40", "= 300") + table, "student"), runs=tmp_path / "runs")
    changed = "fix = 1\nrest = 'average'\ncorrect = true\nranks_from = 'digits/natural'\n"
    other = put(tmp_path, CARD.replace("= 40", "= 2") + table + changed, "other")
    train(other, runs=tmp_path / "runs")
    made = safetensors.torch.load_file(tmp_path / "runs/digits/other/targets.safetensors")["target"]
    assert torch.equal(made.argmax(1), torch.from_numpy(data.y)), "corrected"
    assert all(len(row.unique()) == 2 for row in made[:20]), "one kept, the others averaged"
    with pytest.raises(ModelError, match="not trained yet: robbench train digits/untrained"):
        put(tmp_path, CARD, "untrained")
        train(put(tmp_path, CARD + table.replace("teacher'", "untrained'"), "s"), runs=tmp_path / "runs")


@pytest.mark.whole
def test_looking_at_accuracies_changes_nothing(tmp_path, monkeypatch):
    train(put(tmp_path / "a"), runs=tmp_path / "runs-a")
    lines = [json.loads(line) for line in (tmp_path / "runs-a/digits/m/log.jsonl").read_text().splitlines()]
    seen = [line for line in lines if "clean" in line]
    assert 9 <= len(seen) <= 11 and all(0 <= line["robust"] <= line["clean"] <= 1 for line in seen)
    monkeypatch.setattr("robbench.training.run._PROBES", 1)
    train(put(tmp_path / "b"), runs=tmp_path / "runs-b")
    a, b = (Registry([tmp_path / d]).find("m").card for d in "ab")
    assert a.weights.sha256 == b.weights.sha256


@pytest.mark.whole
def test_the_curve_is_drawn_from_the_log(tmp_path):
    train(put(tmp_path), runs=tmp_path / "runs")
    draw_curve(tmp_path / "runs/digits/m/log.jsonl", tmp_path / "curve.png", "digits/m")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.whole
def test_training_on_digits_learns(tmp_path):
    entry = put(
        tmp_path, CARD.replace("iterations = 40", "iterations = 300").replace("= 4, hidden = 8", "= 16, hidden = 32")
    )
    begin = time.monotonic()
    train(entry, runs=tmp_path / "runs")
    loaded, data = load_model(Registry([tmp_path]).find("m")), load("digits")
    logits = loaded.module(torch.from_numpy(data.x).float() / data.scale)
    assert float((logits.argmax(1) == torch.from_numpy(data.y)).float().mean()) > 0.85
    assert time.monotonic() - begin < 60


def test_committed_weights_match_their_cards():
    entries = [e for e in Registry.default().entries() if not e.needs_training and e.card.weights.path]
    assert {"natural", "at", "ls095_sigma03", "lsq2_sigma03"} <= {e.name for e in entries if e.dataset == "digits"}
    for entry in entries:
        loaded = load_model(entry)
        data_free = torch.zeros(1, *loaded.in_shape)
        assert loaded.module(data_free).shape == (1, loaded.num_classes)
    folder = entries[0].root / "weights"
    files = [p for p in Path(folder).rglob("*") if p.is_file()]
    assert np.all([p.suffix == ".safetensors" for p in files])
