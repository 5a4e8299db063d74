"""What a clinical text states about couplings between networks: which places, stronger or weaker, which side.

Sentence encoders do not tell direction and side apart, so both are read by rule. The grammar, in short:

* A text falls into sentences, a sentence into clauses at commas, ``and``, ``while``, ``but`` … A new clause begins where a
  chunk brings a direction of its own, or repeats ``within``/``between`` (then the direction is inherited).
* Places are the aliases of networks.yaml, longest first. Direction words are ``stronger``, ``reduced``, ``hyperconnected``
  …; a weakening word wins within a clause ("less strongly"); ``not`` before it voids the clause; weaker *segregation* is
  stronger coupling.
* Two places are a coupling between; three or more couple the first with each other one. One place is a coupling within
  where the clause says so ("within", "cohesion of", "among themselves"); with ``its`` or ``their`` it is coupled to the
  clause before's first place.
* A clause with a direction and a word for coupling but no known place is kept as it stands, for the encoder to place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from brainfm_cli.config import Frozen

if TYPE_CHECKING:
    from collections.abc import Iterable

Side = Literal["left", "right"]

_UP = (
    r"stronger|strongly|strong|strengthen\w*|increas\w*|higher|high|greater|elevat\w*|enhanc\w*|raised|rises?|heighten\w*|excess\w*|"
    r"exaggerat\w*|hyper-?(?:connect|coupl|synchron|correlat)\w*|over-?(?:connect|coupl|synchron|cohesive)\w*|overly|tight\w*|surplus|amplif\w*|intensif\w*|"
    r"augment\w*|more|gains?|abundant|pronounced"
)
_DOWN = (
    r"weak\w*|reduc\w*|decreas\w*|lower\w*|low|less|diminish\w*|declin\w*|attenuat\w*|dampen\w*|loss|losses|lost|loses?|losing|deficits?|deficient|"
    r"impair\w*|impoverish\w*|poor\w*|hypo-?(?:connect|coupl|synchron|correlat)\w*|under-?(?:connect|coupl)\w*|disconnect\w*|decoupl\w*|uncoupl\w*|"
    r"disrupt\w*|fragment\w*|disintegrat\w*|break\w*down|depressed|falls?|smaller|blunt\w*|absen\w*|lack\w*|fail\w*|fewer|sparse\w*"
)
_WITHIN = (
    r"within|among|amongst|inside|internal\w*|intra\w*|itself|themselves|cohesi\w*|coheren\w*|fragment\w*|integrity|synchron\w*|"
    r"hypo-?synchron\w*|hyper-?synchron\w*|disintegrat\w*|own"
)
_COUPLING = r"coupl\w*|connect\w*|\w*connectivity|synchron\w*|hyper\w+|coher\w*|cohesi\w*|communicat\w*|correlat\w*|link\w*"
_NEURAL = rf"{_COUPLING}|\w*connect\w*|\w*coupl\w*|interact\w*|integrat\w*|networks?|systems?|cort(?:ex|ices|ical)|areas?|regions?|structures?|nodes?"
_INVERTS = r"segregat\w*|separat\w*|anti-?correlat\w*|distinct\w*"
_NOT = r"not|no|never|neither|without"
_PRONOUN = r"its|their"
_HARD = r"while|whereas|but|yet|although|though|however"
_SPLIT = re.compile(rf"\s*(?:[,:()]|\b(?:and|{_HARD})\b)\s*", re.IGNORECASE)
_DIRECTIONS: dict[int, Literal["stronger", "weaker", "unstated"]] = {1: "stronger", -1: "weaker", 0: "unstated"}
# Words that say a coupling is changed, or is not, without saying which way.
_OPEN = re.compile(rf"\b(?:alter\w*|abnormal\w*|chang\w*|differ\w*|dysfunction\w*|normal|intact|unaffected|mixed|{_NOT})\b", re.IGNORECASE)
_ELSEWHERE = re.compile(rf"\b(?:{_COUPLING})\b.*\b(?:of|between|within|with|to|from|among)\b", re.IGNORECASE)
_OPENS = re.compile(r"\b(?:within|between|among|inside)\b", re.IGNORECASE)


class Network(Frozen):
    """A functional network and its words."""

    name: str
    """Name, as in atlas tables (Yeo 7 names where it is one of them)."""
    words: str
    """How texts call it."""
    labels: tuple[str, ...] = ()
    """Names that atlas tables give it."""
    aliases: tuple[str, ...] = ()
    """Further words that mean it, parts of the brain included."""


class Place(Frozen):
    """Where a coupling ends."""

    network: str
    """Name of the network."""
    side: Side | None = None
    """Hemisphere, where one is named."""


class Fact(Frozen):
    """One coupling that a text states to be stronger or weaker."""

    direction: Literal["stronger", "weaker", "unstated"]
    """Which way; unstated leaves it to a probe on the text's vectors."""
    first: Place | None = None
    """One end; none where the clause names no known place."""
    second: Place | None = None
    """The other end; none for the coupling within ``first``."""
    clause: str = ""
    """The words it was read from."""

    @model_validator(mode="before")
    @classmethod
    def _plain_names(cls, values: object) -> object:
        """Table rows may say ``first: Default`` for ``first: {network: Default}``."""
        if not isinstance(values, dict):
            return values
        named = {key: {"network": values[key]} for key in ("first", "second") if isinstance(values.get(key), str)}
        return values | named

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.first is None and (self.second is not None or not self.clause):
            raise ValueError("a fact needs a first place, or the clause it was read from")
        return self

    @property
    def sign(self) -> int:
        """+1, -1, or 0 where it is left to the probe."""
        return {"stronger": 1, "weaker": -1, "unstated": 0}[self.direction]


class NetworkWords(Frozen):
    """The networks that texts and atlas tables are read with."""

    networks: tuple[Network, ...] = Field(min_length=1)
    """Networks, in the order that couplings keep."""
    parts: dict[str, str] = {}
    """Readable forms of abbreviations in region names."""

    @cached_property
    def _of_alias(self) -> dict[str, str]:
        return {alias.lower(): network.name for network in self.networks for alias in (*network.aliases, network.words, network.name)}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._of_alias, key=lambda alias: (-len(alias), alias))
        return re.compile(r"\b(?:(left|right)[- ]+)?(" + "|".join(map(re.escape, longest_first)) + r")\b")

    def of_label(self, label: str | None) -> str | None:
        """The network that an atlas table's label stands for; none where it is unknown."""
        if not label:
            return None
        known = {name.lower(): network.name for network in self.networks for name in (network.name, *network.labels)}
        return known.get(label.lower())

    def words_of(self, name: str) -> str:
        """How texts call a network."""
        return next(network.words for network in self.networks if network.name == name)

    def readable(self, region: str) -> str:
        """A region name with its abbreviations written out."""
        return " ".join(self.parts.get(part, part) for part in re.split(r"[_\s]+", region) if not part.isdigit())

    def places(self, text: str) -> list[Place]:
        """Networks that ``text`` names, each once, in order."""
        found: dict[str, Place] = {}
        for match in self._pattern.finditer(text.lower()):
            name = self._of_alias[match.group(2)]
            found.setdefault(name, Place.model_validate({"network": name, "side": match.group(1)}))
        return list(found.values())


@dataclass
class _Clause:
    """A clause while it is put together."""

    text: str = ""
    direction: int = 0
    places: tuple[Place, ...] = ()
    inherits: bool = False


def read_facts(text: str, words: NetworkWords) -> tuple[Fact, ...]:
    """The couplings that a text states, each once, in the order of the text; a contradicted one is left out."""
    found: dict[object, Fact] = {}
    void: set[object] = set()
    for sentence in re.split(r"(?<=[.!?;])\s+", " ".join(text.split())):
        if not re.search(rf"\b(?:{_NEURAL})\b", sentence, re.IGNORECASE):
            continue
        for fact in _facts_of(_clauses(sentence, words)):
            ends = frozenset(place for place in (fact.first, fact.second) if place is not None) or fact.clause
            if ends in found and found[ends].direction != fact.direction:
                void.add(ends)
            found.setdefault(ends, fact)
    return tuple(fact for key, fact in found.items() if key not in void)


def direction_of(clause: str) -> int:
    """+1, -1, or 0 where the words do not say."""
    down, up = (re.search(rf"\b(?:{words})\b", clause, re.IGNORECASE) for words in (_DOWN, _UP))
    match = down or up
    if match is None:
        return 0
    before = clause[: match.start()].lower().split()[-2:]
    if any(re.fullmatch(_NOT, word) for word in before):
        return 0
    sign = -1 if down else 1
    return -sign if re.search(rf"\b(?:{_INVERTS})\b", clause, re.IGNORECASE) else sign


def _clauses(sentence: str, words: NetworkWords) -> list[_Clause]:
    clauses = [_Clause()]
    start = 0
    for boundary in _SPLIT.finditer(sentence):
        _extend(clauses, sentence[start : boundary.start()].strip(" .;!?"), words)
        start = boundary.end()
        if re.search(rf"\b(?:{_HARD})\b", boundary.group(), re.IGNORECASE):
            clauses.append(_Clause())
    _extend(clauses, sentence[start:].strip(" .;!?"), words)
    return [clause for clause in clauses if clause.text]


def _extend(clauses: list[_Clause], chunk: str, words: NetworkWords) -> None:
    """Add a chunk to the last clause, or begin a new one with it."""
    last = clauses[-1]
    direction, places = direction_of(chunk), tuple(words.places(chunk))
    opens = bool(_OPENS.search(chunk)) and bool(places) and bool(last.places)
    if opens or (direction and last.direction and last.places and not last.inherits):
        clauses.append(_Clause(text=chunk, direction=direction or last.direction, places=places, inherits=not direction))
        return
    if direction and last.direction and not last.places:
        last.text = ""  # the earlier direction belonged to no place
    last.text = f"{last.text} and {chunk}" if last.text else chunk
    if direction and (not last.places or not last.direction or last.inherits):
        last.direction, last.inherits = direction, False
    known = {place.network for place in last.places}
    last.places = (*last.places, *(place for place in places if place.network not in known))


def _facts_of(clauses: Iterable[_Clause]) -> list[Fact]:
    facts: list[Fact] = []
    subject: Place | None = None
    for clause in clauses:
        ends = _ends(clause, subject)
        if clause.places:
            subject = clause.places[0]
        if clause.direction == 0 and _OPEN.search(clause.text):
            continue
        direction = _DIRECTIONS[clause.direction]
        facts += [Fact(direction=direction, first=first, second=second, clause=clause.text) for first, second in ends]
        if not ends and not clause.places and clause.direction and _ELSEWHERE.search(clause.text):
            facts.append(Fact(direction=direction, clause=clause.text))
    return facts


def _ends(clause: _Clause, subject: Place | None) -> list[tuple[Place, Place | None]]:
    text = clause.text.lower()
    within = bool(re.search(rf"\b(?:{_WITHIN})\b", text))
    refers = bool(re.search(rf"\b(?:{_PRONOUN})\b", text)) and subject is not None
    if len(clause.places) > 1:
        return [(clause.places[0], place) for place in clause.places[1:]]
    if len(clause.places) == 1:
        place = clause.places[0]
        if refers and subject is not None and subject.network != place.network and not within:
            return [(subject, place)]
        return [(place, None)] if within else []
    return [(subject, None)] if refers and within and subject is not None else []
