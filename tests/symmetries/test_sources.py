"""Copies of known classes: the same text is known, another is not, whatever the names are."""

import importlib.util
import sys
from pathlib import Path

import pytest

from quotientopt.symmetries import find_symmetries
from quotientopt.symmetries.classes import class_text, named_text
from tests.symmetries.double import KeepFloat64
from tests.symmetries.families import FAMILIES, randomize_, text, transformers
from tests.symmetries.test_families import TOLERANCE

LLAMA = "transformers.models.llama.modeling_llama"
ATTENTIONS = ("model.layers.0.self_attn", "model.layers.1.self_attn")


@pytest.fixture
def copied(tmp_path):
    """A function that writes a copy of Llama's file under other names, and builds its model."""
    package = transformers()
    source = Path(package.models.llama.modeling_llama.__file__).read_text(encoding="utf-8")
    source = source.replace("from ...", "from transformers.")
    source = source.replace("from .configuration_llama", f"from {LLAMA[:-15]}.configuration_llama")
    source = source.replace("Llama", "Mine").replace("MineConfig", "LlamaConfig")
    names = []

    def build(*changes):
        changed = source
        for old, new in changes:
            assert old in changed, old
            changed = changed.replace(old, new)
        name = f"modeling_mine_{len(names)}"
        path = tmp_path / f"{name}.py"
        path.write_text(changed, encoding="utf-8")
        specification = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module
        names.append(name)
        specification.loader.exec_module(module)
        return randomize_(module.MineForCausalLM(package.LlamaConfig(**FAMILIES["llama"].settings)))

    yield build
    for name in names:
        del sys.modules[name]


def test_a_copy_is_known(copied):
    model, original = copied(), FAMILIES["llama"].model()
    found, expected = find_symmetries(model), find_symmetries(original)
    assert [str(pair) for pair in found.pairs] == [str(pair) for pair in expected.pairs]
    assert found.residual.axes == expected.residual.axes
    assert found.unrecognized == ()
    with KeepFloat64():
        result = found.verify(model, cond=100.0, **text())
    assert max(result.values()) <= TOLERANCE


def test_comments_annotations_and_docstrings_do_not_matter(copied):
    model = copied(
        (
            "        query_states = self.q_proj",
            "        # Queries.\n        query_states = self.q_proj",
        ),
        ("class MineRMSNorm(nn.Module):", 'class MineRMSNorm(nn.Module):\n    """Another."""\n'),
        ("position_ids: torch.LongTensor | None = None", "position_ids=None"),
    )
    assert len(find_symmetries(model).heads) == 4


CHANGES = {
    "forward": (
        "attn_output = self.o_proj(attn_output)",
        "attn_output = self.o_proj(attn_output.tanh())",
    ),
    "rotation": ("return torch.cat((-x2, x1), dim=-1)", "return torch.cat((x2, x1), dim=-1)"),
    "angles": (
        "emb = torch.cat((freqs, freqs), dim=-1)",
        "emb = freqs.repeat_interleave(2, dim=-1)",
    ),
    "softmax": ("nn.functional.softmax(attn_weights", "nn.functional.softmax(attn_weights.tanh()"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_anywhere_in_what_an_attention_calls_is_felt(copied, change):
    symmetries = find_symmetries(copied(CHANGES[change]))
    assert symmetries.heads == ()
    assert symmetries.unrecognized == ATTENTIONS


def test_changed_norms_and_layers_break_the_stream(copied):
    skip = ("hidden_states = residual + hidden_states", "hidden_states = residual * hidden_states")
    symmetries = find_symmetries(copied(skip))
    assert len(symmetries.heads) == 4
    assert "model.layers.0, a layer that is not known" in symmetries.residual.broken_by
    power = ("hidden_states.pow(2).mean(-1", "hidden_states.pow(4).mean(-1")
    breakers = find_symmetries(copied(power)).residual.broken_by
    assert any("no known norm but a MineRMSNorm" in breaker for breaker in breakers)


def test_texts():
    package = transformers()
    modules = package.models.llama.modeling_llama
    for name in ("LlamaAttention", "LlamaRMSNorm", "LlamaModel"):
        assert class_text(getattr(modules, name)) == named_text(f"{LLAMA}.{name}") is not None
    assert named_text(f"{LLAMA}.Nothing") is None
    assert named_text("no_such_package.Class") is None
    assert class_text(int) is None

    class Local(modules.LlamaAttention):
        pass

    assert class_text(Local) is None
    # Both turn queries and keys, but other rows of them.
    helium = "transformers.models.helium.modeling_helium.HeliumAttention"
    assert named_text(f"{LLAMA}.LlamaAttention") != named_text(helium)
