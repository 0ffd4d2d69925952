"""A small text, a small protocol and hand-made runs."""

import pytest
import torch

from quotientopt.compare.data import Images, Labelled, load_corpus
from quotientopt.compare.protocol import Protocol, Run, Seconds, Timing, Trial


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    words = [b"alpha ", b"beta ", b"gamma\n", b"delta, "]
    chosen = torch.randint(len(words), (1500,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"".join(words[index] for index in chosen))
    return path


@pytest.fixture(scope="session")
def corpus(text_file):
    return load_corpus(str(text_file), 16)


@pytest.fixture(scope="session")
def stripes():
    """Images with horizontal (label 0) or vertical (label 1) stripes, and noise."""
    generator = torch.Generator().manual_seed(0)

    def part(count):
        labels = torch.arange(count) % 2
        rows = (torch.arange(28) // 2 % 2 * 180)[:, None].expand(28, 28)
        clean = torch.where(labels[:, None, None] == 0, rows, rows.T)
        pixels = clean + torch.randint(70, clean.shape, generator=generator)
        return Labelled(bytes(pixels.flatten().tolist()), bytes(labels.tolist()))

    return Images("stripes", part(32), part(8))


@pytest.fixture
def protocol():
    return Protocol(
        steps=10, batch=2, context=16, layers=2, width=32, evaluate_every=4, validation_batches=3
    )


@pytest.fixture
def make_run():
    def make(optimizer="adamw", rate=1e-3, losses=(3.0, 2.0), seed=0, seconds=0.5, **settings):
        curve = [[10 * k, 10 * k * seconds, loss] for k, loss in enumerate(losses, start=1)]
        return Run(
            trial=Trial(optimizer, rate, settings, seed),
            status="finished" if losses else "diverged",
            final_loss=losses[-1] if losses else None,
            curve=curve,
            training_losses=[4.0],
            timing=Timing(Seconds(0.1, 0.1), Seconds(0.4, 0.4)),
            state_bytes=8_000_000,
            parameters=1_000_000,
            hyperparameters={"AdamW": {"lr": rate}},
        )

    return make
