"""Gauge directions that no symmetry of the map acts along.

Beside the groups of heads, biases, hidden units and the residual stream a Transformer has numbers
that can move from one parameter into another around its norms. Let a norm give
``y = γ ∘ n + β`` to readers ``W y + c``; what a reader computes depends on ``W diag(γ)`` and
``W β + c`` alone, with centring on the part of ``W diag(γ)`` orthogonal to 1 alone:

- gains: ``γ_i ↦ s γ_i, β_i ↦ s β_i, W_{:,i} ↦ W_{:,i} / s``, d directions;
- biases of norms: ``β ↦ β + δ, c ↦ c − W δ``, d directions;
- means of readers, where the norm centres: ``W ↦ W + t (1/γ)ᵀ, c ↦ c − t (1/γ)·β``, one for every
  row of a reader;
- means of writers, where every norm centres: ``W ↦ W + 1 uᵀ``, one for every vector that is added
  to the stream;
- sums of embeddings: ``E_1 ↦ E_1 + 1 uᵀ, E_2 ↦ E_2 − 1 uᵀ`` for tables that are always added, d for
  every table but one; likewise biases of branches that a layer adds at once;
- gains of queries and keys behind norms of their own: ``γ_q ↦ s γ_q, γ_k ↦ γ_k / s`` for every
  row that passes and every rotary plane;
- biases of keys on the rows of a head that partial rotary positions do not rotate;
- biases of scores: a table of relative positions may gain a constant for every head;
- values never used: T5's bucket of later keys at a distance of zero.

Counts hold at weights in general position; of shared parameters, and of norms whose output
something unknown reads, nothing is claimed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from quotientopt.groups import GL
from quotientopt.symmetries.exactness import Ownership
from quotientopt.symmetries.head import HeadSymmetry
from quotientopt.symmetries.registry import Contribution
from quotientopt.symmetries.residual import Norm, Reader, Stream, norm_breakers

HEADS, TRANSLATIONS, UNITS, LENGTHS, ROTATIONS = (
    "heads",
    "translations of biases",
    "scales of hidden units",
    "lengths of normalised queries and keys",
    "rotations of the residual stream",
)
GAINS, BIASES, READERS, WRITERS, SUMS, BRANCHES, SCORE_GAINS, KEYS, SCORES, UNUSED = (
    "gains of norms",
    "biases of norms",
    "means of readers",
    "means of writers",
    "sums of embeddings",
    "sums of biases",
    "gains of queries and keys",
    "biases of unrotated keys",
    "biases of scores",
    "values never used",
)
# Kinds that elements of the map's groups act along.
ACTING = (HEADS, TRANSLATIONS, UNITS, LENGTHS, ROTATIONS)
KINDS = (
    *ACTING,
    *(GAINS, BIASES, READERS, WRITERS, SUMS, BRANCHES),
    *(SCORE_GAINS, KEYS, SCORES, UNUSED),
)


@dataclass(frozen=True)
class Direction:
    """Gauge directions of one kind at one place.

    Attributes
    ----------
    kind : str
        ``GAINS``, …
    name : str
        Of the symmetry, or of the parameter.
    count : int
    parameters : tuple of Tensor
        Those along which the mean over the stream is free (kinds ``READERS`` and ``WRITERS``).
    """

    kind: str
    name: str
    count: int
    parameters: tuple[Tensor, ...] = ()

    @property
    def key(self) -> str:
        """Name in counts: that of the symmetry, or ``"<parameter> (<kind>)"`` where none acts."""
        return self.name if self.kind in ACTING else f"{self.name} ({self.kind})"


@dataclass(frozen=True)
class Further:
    """What :func:`further_directions` finds.

    Attributes
    ----------
    directions : tuple of Direction
    rotations : int
        Dimension of the group that turns the residual stream if readers turn behind the gains of
        their norms, ``W ↦ W diag(γ) Qᵀ diag(γ)^{-1}``; zero where it is broken otherwise.
    centred : bool
        Whether it leaves the all-ones vector.
    uncounted : tuple of str
        Why directions of the stream may be missing.
    """

    directions: tuple[Direction, ...] = ()
    rotations: int = 0
    centred: bool = False
    uncounted: tuple[str, ...] = ()


def further_directions(
    model: nn.Module,
    stream: Stream | None,
    reason: str,
    contributions: Mapping[str, Contribution],
    ownership: Ownership,
    heads: Sequence[HeadSymmetry],
) -> Further:
    """Gauge directions around the norms, the embeddings and the scores of a model.

    Parameters
    ----------
    model : Module
    stream : Stream, optional
        As :func:`~quotientopt.symmetries.residual.add_up` gives it; None with the reason.
    reason : str
    contributions : mapping of str to Contribution
        What the adapters said, by module name.
    ownership : Ownership
    heads : sequence of HeadSymmetry
    """
    found = _score_biases(model)
    for contribution in contributions.values():
        counts = ((SCORE_GAINS, contribution.score_gains), (KEYS, contribution.silent_keys))
        found += [
            Direction(kind, name, count)
            for kind, own in counts
            for name, count in own.items()
            if not ownership.used_elsewhere([ownership.parameter(name)], [name])
        ]
    if stream is None:
        return Further(tuple(found), uncounted=(reason,))
    books = _Books(model, stream, contributions, ownership, heads)
    for norm in stream.norms:
        found += books.around(norm)
    found += books.readers_behind_norms_that_write()
    means = books.means_of_writers()
    found += [*means, *books.sums_of_embeddings(bool(means)), *books.sums_of_biases(bool(means))]
    centred = any(norm.centres for norm in stream.norms)
    width = next(iter(stream.widths), 0) - centred
    rotations = width * (width - 1) // 2 if books.turns() else 0
    return Further(tuple(found), rotations, centred, tuple(books.unknown))


@dataclass
class _Books:
    """The stream of a model, and who else uses the parameters on it."""

    model: nn.Module
    stream: Stream
    contributions: Mapping[str, Contribution]
    ownership: Ownership
    heads: Sequence[HeadSymmetry]
    unknown: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        self._tables = {
            self.ownership.first_name(module.weight)
            for module in self.model.modules()
            if isinstance(module, nn.Embedding)
        }
        uses: Counter[str] = Counter()
        for norm in self.stream.norms:
            uses.update({self._first(reader.weight) for reader in norm.readers or ()})
        self._shared = {name for name, count in uses.items() if count > 1}
        self._declared: set[str] = set()
        for contribution in self.contributions.values():
            self._declared |= set(contribution.residual_axes)
        # Hidden states that leave the model are behind a norm or not, which is known; a parameter
        # with another use stays where it is, and the stream does not notice.
        harmless = ("hidden states that", "another use of")
        self.unknown = [b for b in self.stream.breakers if not b.startswith(harmless)]
        self._returns_raw = any(
            norm is None for c in self.contributions.values() for norm in c.outputs.values()
        )

    # ---- around one norm -----------------------------------------------------------------------

    def around(self, norm: Norm) -> list[Direction]:
        """Gains, biases and means of readers of a norm whose readers are all known."""
        if norm.readers is None:
            return []
        readers = list({self._first(r.weight): r for r in norm.readers}.values())
        width = next(iter(self.stream.widths))
        pinned = [reader for reader in readers if self._pinned(reader)]
        found = []
        if norm.gain is not None and not pinned and self._only(norm.gain):
            found.append(Direction(GAINS, norm.gain, width))
        if norm.bias is not None and self._only(norm.bias):
            takes = [self._takes_constants(reader) for reader in readers]
            # A reader without a bias takes β's share by its mean, which centring makes free.
            if all(takes) or (
                norm.centres
                and all(
                    taken or not self._pinned(reader)
                    for reader, taken in zip(readers, takes, strict=True)
                )
            ):
                found.append(Direction(BIASES, norm.bias, width))
        if norm.centres:
            found += self._means_of(readers, norm.bias is not None)
        return found

    def _means_of(self, readers: Iterable[Reader], with_bias: bool) -> list[Direction]:
        found = []
        for reader in readers:
            if self._pinned(reader):
                continue
            weight = self.ownership.parameter(reader.weight)
            rows = weight.numel() // weight.shape[reader.axis]
            if with_bias and not self._takes_constants(reader):
                rows = self._rows_of_keys(weight)
            if rows:
                found.append(Direction(READERS, self._first(reader.weight), rows, (weight,)))
        return found

    # ---- the stream as a whole -----------------------------------------------------------------

    def _writes_through_norms(self) -> bool:
        """Whether every sum goes through a centring norm whose output is the stream (post-norm).

        As in BERT, where one stands behind the embeddings too.
        """
        norms = self.stream.norms
        embedded = any(
            c.norms and any(self._is_table(name) for name in c.writers)
            for c in self.contributions.values()
        )
        pure = all(norm.readers is None and norm.centres for norm in norms)
        return bool(norms) and embedded and pure and not self.unknown

    def readers_behind_norms_that_write(self) -> list[Direction]:
        """Of a post-norm model, in which all that reads the stream reads a norm's output."""
        if not self._writes_through_norms():
            return []
        norms = {norm.bias for norm in self.stream.norms}
        width = next(iter(self.stream.widths))
        returned = any(b.startswith("hidden states that") for b in self.stream.breakers)
        readers = [
            Reader(name, axis, self._bias_beside(name))
            for name, axis in self.stream.axes.items()
            if name not in self.stream.writers and name not in norms
        ]
        found = self._means_of(readers, any(bias is not None for bias in norms))
        # β moves on into the readers' biases, and into that of the next branch.
        ends = {name for name in self.stream.writers if self._is_matrix(name)}
        takes = all(self._takes_constants(reader) for reader in readers)
        if takes and all(self._bias_beside(name) is not None for name in ends):
            counted = [norm for norm in self.stream.norms if norm.bias is not None]
            # The last one's output is what the model returns, unless all that reads it is known.
            for norm in counted[:-1] if returned else counted:
                found.append(Direction(BIASES, norm.bias or "", width))
        # No branch goes around the last one: its gain moves into what reads it.
        last = self.stream.norms[-1].gain
        ends_here = [
            r for c in self.contributions.values() for k in c.consumers.values() for r in k
        ]
        if last is not None and not returned and not any(map(self._pinned, ends_here)):
            found.append(Direction(GAINS, last, width))
        return found

    def means_of_writers(self) -> list[Direction]:
        """One for every vector that is added to a stream that only centring norms see."""
        norms = self.stream.norms
        post = self._writes_through_norms()
        if not norms or self.unknown or not all(norm.centres for norm in norms):
            return []
        if not post and (self._returns_raw or any(self._written(norm) for norm in norms)):
            return []
        biases = {self._first(norm.bias) for norm in norms if norm.bias is not None}
        found = []
        for name in sorted(self.stream.writers - biases):
            parameter = self.ownership.parameter(name)
            if not self._read(name):
                count = parameter.numel() // parameter.shape[self.stream.axes[name]]
                found.append(Direction(WRITERS, name, count, (parameter,)))
        return found

    def sums_of_embeddings(self, means: bool) -> list[Direction]:
        """For tables of one module: they are added at every position."""
        if self.unknown:
            return []
        tables: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self.stream.writers):
            if self._is_table(name):
                tables[name.rpartition(".")[0].rpartition(".")[0]].append(name)
        width = next(iter(self.stream.widths)) - means
        found = []
        for names in tables.values():
            free = [name for name in names if not self._read(name)]
            # A table that is the head too may move by c (1/γ)ᵀ in all rows: the head's norm is
            # centred, and a free table takes c / γ back.
            heads = sum(self._is_centred_head(name) for name in names)
            count = (max(len(free) - 1, 0)) * width + (heads if free else 0)
            if count:
                found.append(Direction(SUMS, free[0], count))
        return found

    def sums_of_biases(self, means: bool) -> list[Direction]:
        """For branches that are added at once: what one bias gives another can take."""
        width = next(iter(self.stream.widths)) - means
        found = []
        for contribution in self.contributions.values():
            for names in contribution.added_at_once:
                free = [name for name in names if self._only(name)]
                if len(free) > 1:
                    found.append(Direction(BRANCHES, free[0], (len(free) - 1) * width))
        return found

    def _is_centred_head(self, name: str) -> bool:
        """Whether a table is read once, behind a centring norm, and constants are not seen."""
        found = [
            (norm, reader)
            for norm in self.stream.norms
            for reader in norm.readers or ()
            if self._first(reader.weight) == name
        ]
        parameter = self.ownership.parameter(name)
        if len(found) != 1 or self.ownership.used_elsewhere([parameter], self._declared):
            return False
        norm, reader = found[0]
        return norm.centres and (norm.bias is None or self._takes_constants(reader))

    def turns(self) -> bool:
        """Whether nothing but gains that their readers can take up breaks the rotations."""
        if self.unknown or self.stream.breakers or not self.stream.norms:
            return False
        for norm in self.stream.norms:
            gain = any("gain" in breaker for breaker in norm_breakers(norm, self.ownership))
            if gain and (norm.readers is None or any(map(self._pinned, norm.readers))):
                return False
        return True

    # ---- parameters ----------------------------------------------------------------------------

    def _first(self, name: str) -> str:
        return self.ownership.first_name(name)

    def _only(self, name: str) -> bool:
        """Whether a parameter is used nowhere else."""
        return not self.ownership.used_elsewhere([self.ownership.parameter(name)], [name])

    def _pinned(self, reader: Reader) -> bool:
        """Whether another use forbids a reader to move: a tied embedding, a second norm."""
        name = self._first(reader.weight)
        parameter = self.ownership.parameter(reader.weight)
        elsewhere = self.ownership.used_elsewhere([parameter], self._declared)
        return bool(elsewhere) or name in self.stream.writers or name in self._shared

    def _read(self, name: str) -> bool:
        """Whether something reads the stream with a writer: a head tied to an embedding."""
        readers = {
            self._first(reader.weight)
            for contribution in self.contributions.values()
            for known in contribution.consumers.values()
            for reader in known
        }
        readers |= {self._first(r.weight) for norm in self.stream.norms for r in norm.readers or ()}
        parameter = self.ownership.parameter(name)
        return name in readers or bool(self.ownership.used_elsewhere([parameter], self._declared))

    def _written(self, norm: Norm) -> bool:
        """Whether a norm's output may be part of the stream."""
        returned = {name for c in self.contributions.values() for name in c.outputs.values()}
        return norm.readers is None and norm.name not in returned

    def _takes_constants(self, reader: Reader) -> bool:
        """Whether a constant added to what is read can be taken back by a bias, or is not seen."""
        if reader.bias is not None:
            return self._only(reader.bias)
        weight = self.ownership.parameter(reader.weight)
        return self._rows_of_keys(weight) * weight.shape[reader.axis] == weight.numel()

    def _rows_of_keys(self, weight: Tensor) -> int:
        """Rows of a matrix that are keys without positions: softmax does not see constants."""
        rows = 0
        for symmetry in self.heads:
            if symmetry.name.endswith("qk") and isinstance(symmetry.group, GL):
                for block in symmetry.right_blocks:
                    if block.parameter is weight and block.size[2] > 1:
                        rows += block.size[0] * block.size[1]
        return rows

    def _bias_beside(self, name: str) -> str | None:
        bias = name.removesuffix("weight") + "bias"
        return bias if bias in self._names else None

    def _is_table(self, name: str) -> bool:
        """Whether a writer is a table of embeddings."""
        return self._first(name) in self._tables

    def _is_matrix(self, name: str) -> bool:
        return self.ownership.parameter(name).ndim > 1 and not self._is_table(name)


def _score_biases(model: nn.Module) -> list[Direction]:
    """Tables of relative positions whose values are added to the scores, one column per head."""
    found = []
    for name, module in model.named_modules():
        path, _, last = name.rpartition(".")
        if last == "relative_attention_bias" and isinstance(module, nn.Embedding):
            found.append(Direction(SCORES, f"{name}.weight", module.embedding_dim))
            # T5's buckets of later keys start at a distance of one: that of zero is never used.
            if getattr(model.get_submodule(path), "is_decoder", None) is False:
                found.append(Direction(UNUSED, f"{name}.weight", module.embedding_dim))
    return found
