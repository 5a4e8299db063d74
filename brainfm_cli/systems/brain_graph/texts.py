"""Brain-graph and texts: which couplings a text states, and how much people show them.

Learnt on people whose disorders have texts; applied to any text, also of a disorder that nobody was labelled with. Two
ways (:mod:`brainfm_cli.models.text_conditioning`): *clauses* (default) matches what a text states with the atlas' networks,
*pooled* is the published design, one vector per text. Works with any system that offers :class:`Alignable`. The loss is the
pairwise sigmoid contrast of people and texts (Zhai et al. 2023): each (person, text) is a pair or is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from brainfm_cli.errors import CheckpointMismatchError, InputDatasetError, UsageError
from brainfm_cli.learning.alignment import AlignmentRecord, Condition, FitSettings
from brainfm_cli.learning.checkpoints import read_model_config, read_tensors
from brainfm_cli.learning.samples import Windows, list_scans, whole_scans
from brainfm_cli.learning.texts import read_networks
from brainfm_cli.models.graphs import correlate
from brainfm_cli.models.language import load_text_encoder
from brainfm_cli.models.readouts import network_couplings
from brainfm_cli.models.text_alignment import AtlasAlignment, sigmoid_contrast
from brainfm_cli.models.text_conditioning import (
    ClauseCondition,
    CouplingReader,
    NetworkNames,
    StatedCouplings,
    coupling_pairs,
    fit_probe,
    inverse_covariance,
)
from brainfm_cli.programs.assets import source_of

if TYPE_CHECKING:
    from pathlib import Path

    from brainfm_cli.bids.cohort import Cohort
    from brainfm_cli.learning.facts import NetworkWords
    from brainfm_cli.learning.texts import DisorderText
    from brainfm_cli.models.language import TextEncoder

CONTROL = 0
"""Code of people without a disorder; the disorder of text k has code k + 1."""
_SMALLEST_SPREAD = 1e-6
_SPACE = ":"  # between atlas and tensor in the file; no atlas label holds it


@runtime_checkable
class Alignable(Protocol):
    """What alignment needs of a system."""

    @property
    def module(self) -> nn.Module:
        """The backbone."""

    def graphs(self, windows: Windows) -> Any:  # noqa: ANN401
        """The frozen part of the input: a record of tensors with one row per window."""

    def region_vectors(self, graphs: Any) -> Tensor:  # noqa: ANN401
        """(rows, regions, width) vectors of regions."""

    def conditioned(self, graphs: Any, token: Tensor) -> Tensor:  # noqa: ANN401
        """(rows, width) readout of graphs whose prompts (rows, width) tokens of texts switch; gradients reach the tokens."""

    @property
    def token_width(self) -> int:
        """Length of such a token and of a region vector."""

    @property
    def readout_width(self) -> int:
        """Length of a readout."""


@dataclass(frozen=True, kw_only=True)
class TextVectors:
    """Texts as the conditions read them."""

    stated: tuple[StatedCouplings, ...]
    """What each text states."""
    pooled: Tensor
    """(texts, width) one unit vector per text."""


@dataclass(frozen=True, kw_only=True)
class AlignInputs:
    """Everything of some people in one atlas that does not depend on texts."""

    atlas: str
    """Atlas label."""
    participants: tuple[str, ...]
    """Participant keys, in the order of all rows."""
    couplings: Tensor
    """(people, couplings) not yet standardised, averaged over runs."""
    nodes: Tensor
    """(people, networks, width) mean region vectors of each network, averaged over runs."""
    graphs: tuple[tuple[Any, tuple[int, ...]], ...]
    """Frozen graphs of batches of runs, with the row of each run's person; only for the pooled condition, else empty."""


def alignable(system: object, model: Path) -> Alignable:
    """The system of ``model``, once it is known to offer what alignment needs.

    Raises
    ------
    UsageError
        It has no graphs of regions to match texts with.
    """
    if not isinstance(system, Alignable):
        raise UsageError("this model's system cannot be aligned with texts", where=model, fix="give a brain-graph model")
    return system


def load_encoder(name: str) -> TextEncoder:
    """A text encoder by asset name, folder or hub name; never another than the one asked for."""
    return load_text_encoder(source_of(name), name=name)


def read_text(text: DisorderText, words: NetworkWords, encoder: TextEncoder) -> StatedCouplings:
    """What a disorder's text states, as vectors; nothing where it states nothing."""
    facts = text.facts(words)
    if not facts:
        return StatedCouplings.none(encoder.width)
    ends = [place for fact in facts for place in ((fact.first, fact.second or fact.first) if fact.first else (None, None))]
    vectors = encoder.sentences([words.words_of(place.network) if place else "" for place in ends])
    return StatedCouplings(
        ends=vectors.reshape(len(facts), 2, -1),
        clauses=encoder.sentences([fact.clause or text.sentence for fact in facts]),
        placed=torch.tensor([fact.first is not None for fact in facts]),
        signs=torch.tensor([float(fact.sign) for fact in facts]),
    )


def read_texts(texts: Sequence[DisorderText], words: NetworkWords, encoder: TextEncoder) -> TextVectors:
    """Texts as vectors."""
    return TextVectors(
        stated=tuple(read_text(text, words, encoder) for text in texts), pooled=encoder.sentences([text.sentence for text in texts])
    )


def name_networks(networks: Sequence[str], words: NetworkWords, encoder: TextEncoder) -> NetworkNames:
    """What couplings between ``networks`` are called, as vectors."""
    called = [words.words_of(name) for name in networks]
    phrases = [
        f"coupling within the {called[first]}" if first == second else f"coupling between the {called[first]} and the {called[second]}"
        for first, second in coupling_pairs(len(called))
    ]
    return NetworkNames(networks=encoder.sentences(called), couplings=encoder.sentences(phrases))


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """An aligned model, ready to read texts."""

    system: Alignable
    """The backbone."""
    record: AlignmentRecord
    """What config.yaml says of the texts."""
    modules: Mapping[str, AtlasAlignment]
    """What was learnt, by atlas."""
    encoder: TextEncoder
    """The text encoder it was aligned with."""
    words: NetworkWords
    """Words for networks."""
    names: NetworkNames
    """The same as vectors."""

    @classmethod
    def load(cls, model_dir: Path, system: Alignable) -> Aligned:
        """The alignment of a ``models/<id>`` folder whose backbone is ``system``.

        Raises
        ------
        CheckpointMismatchError
            The text encoder is another one, or a file does not belong to the folder.
        """
        record = AlignmentRecord.from_values(read_model_config(model_dir).alignment, where=model_dir / "config.yaml")
        encoder = load_encoder(record.encoder)
        if encoder.fingerprint() != record.encoder_sha256:
            raise CheckpointMismatchError(
                f"the text encoder '{record.encoder}' has other weights than the one the model was aligned with",
                where=model_dir / "config.yaml",
                fix="install the same version of the encoder, or align again",
            )
        words = read_networks(model_dir / "networks.yaml")
        modules = modules_of(
            read_tensors(model_dir / "text.safetensors"),
            record,
            text_width=encoder.width,
            token_width=system.token_width,
            readout_width=system.readout_width,
        )
        names = name_networks(record.networks, words, encoder)
        return cls(system=system, record=record, modules=modules, encoder=encoder, words=words, names=names)

    def vectors(self, texts: Sequence[DisorderText]) -> TextVectors:
        """Texts as vectors of the model's own encoder."""
        return read_texts(texts, self.words, self.encoder)

    def inputs(self, cohort: Cohort, participants: Sequence[str]) -> dict[str, AlignInputs]:
        """Inputs of ``participants`` in every atlas that one of them has."""
        having = set(cohort.index.loc[cohort.index["participant"].isin(set(participants)), "atlas"])
        kept = [label for label in self.record.atlases if label in having]
        inputs = {
            label: prepare(
                self.system, cohort, participants, label, self.modules[label].get_buffer("shares").double().numpy(), self.record.condition
            )
            for label in kept
        }
        lacking = set(participants).difference(*(one.participants for one in inputs.values()))
        if lacking:
            raise InputDatasetError(
                f"{len(lacking)} people have no series in an atlas of the model, e.g. {min(lacking)}",
                where=cohort.root,
                fix=f"parcellate them with one of {', '.join(self.record.atlases)}, or leave them out ('where')",
            )
        return inputs

    def logits(
        self,
        inputs: Mapping[str, AlignInputs],
        participants: Sequence[str],
        texts: TextVectors,
        *,
        encoder: bool = True,
    ) -> NDArray[np.float64]:
        """(people, texts) logits, averaged over the atlases that each person has."""
        place = {name: row for row, name in enumerate(participants)}
        sums, counts = np.zeros((len(participants), len(texts.stated))), np.zeros((len(participants), 1))
        for label, one in inputs.items():
            module = self.modules[label]
            scored = scores(self.system, module, one, texts, self.names) if encoder else without_encoder(module, one, texts, self.names)
            rows = [place[name] for name in one.participants]
            np.add.at(sums, rows, scored)
            np.add.at(counts, rows, 1)
        return sums / counts


def coupling_readers(model_dir: Path, text: DisorderText, system: Alignable) -> dict[str, CouplingReader]:
    """A text as an aligned model reads it, by atlas: what tuning and predicting need of it, without the language model.

    Raises
    ------
    UsageError
        The model was not aligned with texts clause by clause.
    InputDatasetError
        The text states nothing.
    """
    values = read_model_config(model_dir).alignment
    if not values or values["condition"] != "clauses":
        raise UsageError("the model cannot read texts", where=model_dir, fix="give a model of 'brainfm align' with fit.condition=clauses")
    aligned = Aligned.load(model_dir, system)
    stated = read_text(text, aligned.words, aligned.encoder)
    if not len(stated.signs):
        raise InputDatasetError("nothing could be read from the text", fix="say which networks are coupled more or less strongly")
    readers = {}
    with torch.no_grad():
        for label, module in aligned.modules.items():
            assert module.condition is not None  # noqa: S101  (clauses)
            own = module.condition.weights(module.condition.direction(stated, aligned.names), module.get_buffer("inverse"))
            weights = own / module.get_buffer("scale")
            offset = module.condition.shift - module.get_buffer("mean") @ weights
            readers[label] = CouplingReader(shares=module.get_buffer("shares"), weights=weights, offset=offset)
    return readers


def random_texts(texts: TextVectors, *, seed: int) -> TextVectors:
    """The same numbers of statements with random unit vectors and directions: the control that no text can be read from."""
    generator = torch.Generator().manual_seed(seed)

    def unit(like: Tensor) -> Tensor:
        return functional.normalize(torch.randn(like.shape, generator=generator), dim=-1)

    stated = tuple(
        StatedCouplings(
            ends=unit(text.ends),
            clauses=unit(text.clauses),
            placed=text.placed,
            signs=torch.randint(0, 2, text.signs.shape, generator=generator).float() * 2 - 1,
        )
        for text in texts.stated
    )
    return TextVectors(stated=stated, pooled=unit(texts.pooled))


@torch.no_grad()
def prepare(
    system: Alignable,
    cohort: Cohort,
    participants: Sequence[str],
    atlas: str,
    shares: NDArray[np.float64],
    condition: Condition,
    *,
    batch_size: int = 64,
) -> AlignInputs:
    """Inputs of those ``participants`` that have runs in ``atlas``; ``shares`` is (regions, networks)."""
    device = next(system.module.parameters()).device
    system.module.eval()
    scans = list_scans(cohort, participants, [atlas])
    having = {scan.participant for scan in scans}
    kept = tuple(name for name in participants if name in having)
    place = {name: row for row, name in enumerate(kept)}
    membership = torch.from_numpy(shares).float().to(device)
    mean_of = membership / membership.sum(0).clamp_min(1e-9)
    owner = torch.tensor([place[scan.participant] for scan in scans])
    couplings, nodes, graphs = [], [], []
    for start in range(0, len(scans), batch_size):
        windows = whole_scans(cohort, scans[start : start + batch_size], atlas).to(device)
        correlation, present = correlate(windows.series, windows.frames)
        couplings.append(network_couplings(correlation, present, membership).cpu())
        graph = system.graphs(windows)
        if condition == "pooled":
            graphs.append((graph, tuple(owner[start : start + batch_size].tolist())))
        else:
            nodes.append(torch.einsum("brw,rn->bnw", system.region_vectors(graph).float(), mean_of).cpu())
    counts = torch.bincount(owner, minlength=len(kept)).float()

    def average(parts: list[Tensor]) -> Tensor:
        values = torch.cat(parts)
        sums = torch.zeros(len(kept), *values.shape[1:]).index_add_(0, owner, values)
        return sums / counts.reshape(-1, *[1] * (values.dim() - 1))

    return AlignInputs(
        atlas=atlas,
        participants=kept,
        couplings=average(couplings),
        nodes=average(nodes) if nodes else torch.zeros(len(kept), 0, 0),
        graphs=tuple(graphs),
    )


@dataclass(frozen=True, kw_only=True)
class FittedAtlas:
    """One atlas aligned, with what was found on the way."""

    module: AtlasAlignment
    """What is kept."""
    steps: int
    """Steps (clauses) or epochs (pooled) of the final fit."""
    left_out: dict[int, float]
    """clauses: mean AUROC of disorders left out with a share of the people, by number of steps; empty with fewer than four disorders."""
    losses: tuple[float, ...]
    """Training loss of the final fit."""


def fit(
    system: Alignable,
    inputs: AlignInputs,
    codes: NDArray[np.int64],
    groups: NDArray[np.int64],
    texts: TextVectors,
    names: NetworkNames,
    shares: NDArray[np.float64],
    settings: FitSettings,
    *,
    seed: int,
) -> FittedAtlas:
    """Align one atlas with the texts of the disorders that ``codes`` (people,) name: 0 none, k + 1 that of text k.

    ``groups`` (people,) are datasets, within which people are compared.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = AtlasAlignment(
            settings.condition,
            regions=len(shares),
            networks=shares.shape[1],
            text_width=names.networks.shape[1],
            token_width=system.token_width,
            readout_width=system.readout_width,
        )
    module.get_buffer("shares").copy_(torch.from_numpy(shares))
    control = torch.from_numpy(codes == CONTROL)
    module.get_buffer("mean").copy_(inputs.couplings[control].mean(0))
    spread = inputs.couplings[control].std(0)
    module.get_buffer("scale").copy_(torch.where(spread > _SMALLEST_SPREAD, spread, 1.0))
    cells = torch.from_numpy(np.unique(np.stack([groups, codes]), axis=1, return_inverse=True)[1].reshape(-1))
    module.get_buffer("inverse").copy_(inverse_covariance(module.standardised(inputs.couplings), cells))
    if module.condition is not None:
        _fit_probe(module.condition, texts.stated, names)
        return _fit_clauses(module, inputs, codes, texts, names, settings, seed=seed)
    return _fit_pooled(system, module, inputs, codes, texts, settings, seed=seed)


def scores(system: Alignable, module: AtlasAlignment, inputs: AlignInputs, texts: TextVectors, names: NetworkNames) -> NDArray[np.float64]:
    """(people, texts) logits."""
    with torch.no_grad():
        if module.condition is not None:
            return module.logits(inputs.couplings, inputs.nodes, texts.stated, names).double().numpy()
        sums = torch.zeros(len(inputs.participants), len(texts.pooled), dtype=torch.float64)
        counts = torch.zeros(len(inputs.participants), 1, dtype=torch.float64)
        for graph, owner in inputs.graphs:
            rows = torch.tensor(owner)
            read = [_read_pooled(system, module, graph, vector.expand(len(owner), -1)) for vector in texts.pooled]
            sums.index_add_(0, rows, torch.stack(read, dim=1).double().cpu())
            counts.index_add_(0, rows, torch.ones(len(owner), 1, dtype=torch.float64))
        return (sums / counts).numpy()


def without_encoder(module: AtlasAlignment, inputs: AlignInputs, texts: TextVectors, names: NetworkNames) -> NDArray[np.float64]:
    """(people, texts) logits of the clause condition from couplings alone, the backbone's region vectors left out."""
    with torch.no_grad():
        return module.logits(inputs.couplings, None, texts.stated, names).double().numpy()


def tensors_of(modules: Mapping[str, AtlasAlignment]) -> dict[str, Tensor]:
    """Tensors of all atlases, for ``text.safetensors``."""
    return {f"{label}{_SPACE}{name}": value for label, module in modules.items() for name, value in module.state_dict().items()}


def modules_of(tensors: Mapping[str, Tensor], record: AlignmentRecord, *, text_width: int, token_width: int, readout_width: int) -> dict[str, AtlasAlignment]:  # fmt: skip
    """Alignments of a model folder, by atlas.

    Raises
    ------
    CheckpointMismatchError
        The tensors do not belong to the configuration.
    """
    found = {}
    for label in record.atlases:
        start = f"{label}{_SPACE}"
        own = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
        module = AtlasAlignment(
            record.condition,
            regions=len(own["shares"]) if "shares" in own else 0,
            networks=len(record.networks),
            text_width=text_width,
            token_width=token_width,
            readout_width=readout_width,
        )
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise CheckpointMismatchError(
                f"text.safetensors does not fit config.yaml in atlas {label}", fix="copy the model folder again"
            ) from error
        found[label] = module.eval()
    return found


def _fit_probe(condition: ClauseCondition, texts: Sequence[StatedCouplings], names: NetworkNames) -> None:
    """Teach stronger from weaker on the statements whose direction the rules could read."""
    clauses, matched, signs = [], [], []
    for text in texts:
        known = text.signs != 0
        if bool(known.any()):
            clauses.append(text.clauses[known])
            matched.append(condition.attention(text.clauses[known], names.couplings).detach() @ names.couplings)
            signs.append(text.signs[known])
    if signs:
        condition.get_buffer("probe").copy_(fit_probe(torch.cat(clauses), torch.cat(matched), torch.cat(signs)))


def _fit_clauses(
    module: AtlasAlignment,
    inputs: AlignInputs,
    codes: NDArray[np.int64],
    texts: TextVectors,
    names: NetworkNames,
    settings: FitSettings,
    *,
    seed: int,
) -> FittedAtlas:
    stops = tuple(sorted({round(settings.steps * part / settings.stops) for part in range(settings.stops + 1)}))
    first = {name: value.clone() for name, value in module.state_dict().items()}
    present = np.unique(codes[codes != CONTROL]) - 1
    left_out: dict[int, float] = {}
    if len(present) >= settings.folds:
        rng = np.random.default_rng([seed, len(codes)])
        fold_of_text = dict(zip(rng.permutation(present).tolist(), np.arange(len(present)) % settings.folds, strict=True))
        fold_of_person = rng.permutation(len(codes)) % settings.folds
        areas: dict[int, list[float]] = {stop: [] for stop in stops}
        for fold in range(settings.folds):
            away = [text for text, place in fold_of_text.items() if place == fold]
            train = (fold_of_person != fold) & ~np.isin(codes - 1, away)
            module.load_state_dict(first)
            kept = [text for text in present if text not in away]
            for stop, state in _train(module, inputs, codes, train, kept, texts, names, stops, settings)[0].items():
                module.load_state_dict(state)
                with torch.no_grad():
                    logits = module.logits(inputs.couplings, inputs.nodes, [texts.stated[text] for text in away], names).numpy()
                for column, text in enumerate(away):
                    tested = (codes == text + 1) | ((codes == CONTROL) & (fold_of_person == fold))
                    areas[stop].append(float(roc_auc_score(codes[tested] == text + 1, logits[tested, column])))
        left_out = {stop: round(float(np.mean(values)), 4) for stop, values in areas.items()}
    steps = max(left_out, key=lambda stop: (left_out[stop], -stop)) if left_out else 0
    module.load_state_dict(first)
    states, losses = _train(module, inputs, codes, np.ones(len(codes), bool), list(present), texts, names, (steps,), settings)
    module.load_state_dict(states[steps])
    return FittedAtlas(module=module.eval(), steps=steps, left_out=left_out, losses=losses)


def _train(
    module: AtlasAlignment,
    inputs: AlignInputs,
    codes: NDArray[np.int64],
    people: NDArray[np.bool_],
    kept: Sequence[int],
    texts: TextVectors,
    names: NetworkNames,
    stops: Sequence[int],
    settings: FitSettings,
) -> tuple[dict[int, dict[str, Tensor]], tuple[float, ...]]:
    """States at each of ``stops`` steps, and the loss of every step."""
    states = {0: _state(module)} if 0 in stops else {}
    losses: list[float] = []
    rows = torch.from_numpy(np.flatnonzero(people))
    couplings, nodes = inputs.couplings[rows], inputs.nodes[rows]
    pairs = torch.from_numpy(codes[people][:, None] == np.asarray(kept)[None] + 1)
    stated = [texts.stated[text] for text in kept]
    optimiser = torch.optim.AdamW(module.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    for step in range(1, max(stops) + 1):
        loss = sigmoid_contrast(module.logits(couplings, nodes, stated, names), pairs)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        if step in stops:
            states[step] = _state(module)
    return states, tuple(losses)


def _fit_pooled(
    system: Alignable,
    module: AtlasAlignment,
    inputs: AlignInputs,
    codes: NDArray[np.int64],
    texts: TextVectors,
    settings: FitSettings,
    *,
    seed: int,
) -> FittedAtlas:
    """Projection and head through the frozen backbone; half of the cases see their own text, everybody else another one."""
    device = next(system.module.parameters()).device
    module.to(device)
    system.module.requires_grad_(False)  # noqa: FBT003
    optimiser = torch.optim.AdamW(module.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    rng = np.random.default_rng([seed, len(codes)])
    pooled = texts.pooled.to(device)
    present = np.unique(codes[codes != CONTROL]) - 1
    losses = []
    for _ in range(settings.epochs):
        total = 0.0
        for batch in rng.permutation(len(inputs.graphs)):
            graph, owner = inputs.graphs[batch]
            own = codes[list(owner)] - 1
            seen = np.where((own >= 0) & (rng.random(len(own)) < 0.5), own, rng.choice(present, len(own)))
            logits = _read_pooled(system, module, graph, pooled[torch.from_numpy(seen).to(device)])
            loss = sigmoid_contrast(logits[:, None], torch.from_numpy(seen == own)[:, None].to(device))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            total += float(loss.detach())
        losses.append(total / len(inputs.graphs))
    return FittedAtlas(module=module.cpu().eval(), steps=settings.epochs, left_out={}, losses=tuple(losses))


def _read_pooled(system: Alignable, module: AtlasAlignment, graph: Any, vectors: Tensor) -> Tensor:  # noqa: ANN401
    assert module.pooled is not None and module.head is not None  # noqa: S101, PT018  (the condition is pooled)
    module.to(next(system.module.parameters()).device)
    return module.head(system.conditioned(graph, module.pooled(vectors)))[:, 0]


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
