"""Reports of brain MRI as facts and facts as reports, in English and Chinese, by lexicon and rules.

The parser finds what a report says of each disease (place, side, size, volume, signal, enhancement, negation, certainty), with the
places in the text. The writer states measured facts alone. The checker holds a text against the facts of a mask.
Words are in radiology_terms.yaml. Nothing here is learned.

* A text falls into sentences; what is said belongs to the disease named nearest in its sentence. A sentence without a disease
  ("It measures 23 mm.") speaks of the last one that is not negated.
* A negation reaches from its cue to the end of the sentence, or to a word that ends it (but, however, 但); in Chinese also to a
  comma after which a disease is affirmed by no cue of its own.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

import yaml

from brainfm_cli.config import Frozen
from brainfm_cli.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from brainfm_cli.signals.lesions import LesionFacts

Language = Literal["en", "zh"]
Certainty = Literal["certain", "probable", "possible"]
TOLERANCE = 0.05
"""Largest difference between a stated and a measured volume, as a share of the measured."""
_CHINESE = re.compile(r"[\u3400-\u9fff]")
_LETTERS = re.compile(r"[A-Za-z]{2,}")
_ENDS = re.compile(r"[。！？；!?;\n]+|\.(?!\d)")
_NUMBER = r"\d+(?:\.\d+)?"
_LENGTH = re.compile(rf"({_NUMBER}(?:\s*(?:mm|cm|毫米|厘米)?\s*[x×*]\s*{_NUMBER})*)\s*(mm|cm|毫米|厘米)(?![³3²2^])", re.IGNORECASE)
_VOLUME = re.compile(rf"({_NUMBER})\s*(?:ml|mls|cc|cm³|cm3|cm\^3|毫升|立方厘米)", re.IGNORECASE)
_ON = re.compile(r"\s*(?:signal\s+)?(?:on|in|at)\s", re.IGNORECASE)
_COMMA = 30
_CENTIMETRES = ("cm", "厘米")
_ASK = "Please talk to your doctor about what this means for you."
_ABOUT_A_LESION = {"mass effect", "oedema", "hydrocephalus", "atrophy"}  # findings that no lesion mask holds


class Finding(Frozen):
    """What a report says of one disease at one mention."""

    disease: str
    """Name in the lexicon."""
    start: int
    """First character of the mention."""
    end: int
    """Character after it."""
    negated: bool = False
    """The report says that it is absent."""
    certainty: Certainty = "certain"
    """How sure the report is."""
    places: tuple[str, ...] = ()
    """Parts of the brain, in the order of the text."""
    side: Literal["left", "right", "both"] | None = None
    """Hemisphere."""
    longest_mm: float | None = None
    """Largest stated length, millimetres."""
    volume_ml: float | None = None
    """Stated volume, millilitres."""
    signals: tuple[tuple[str, str], ...] = ()
    """Sequence (empty where none is named) and signal."""
    enhancing: bool | None = None
    """Whether it takes up contrast, where that is said."""


class Contradiction(Frozen):
    """Something that a text says and a mask does not bear out."""

    kind: Literal["presence", "side", "volume", "place", "signal"]
    """What it is about."""
    said: str
    """In the text."""
    measured: str
    """From the mask."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The two parts of a report."""

    findings: str
    """What is seen."""
    impression: str
    """What it means."""

    @property
    def text(self) -> str:
        """Both parts."""
        return f"{self.findings}\n{self.impression}"


@dataclass(frozen=True)
class _Match:
    kind: str
    name: str
    start: int
    end: int
    number: float = 0.0


def language_of(text: str) -> Language | Literal["mixed"]:
    """The language of a report; mixed where both have words (names of sequences and units do not count)."""
    chinese = len(_CHINESE.findall(text))
    neutral = {"mm", "cm", "ml", "cc", "flair", "dwi", "adc", "wi", "swi", "mri", "ct", "gbm", "ms", "mra"}
    english = sum(word.casefold() not in neutral for word in _LETTERS.findall(text))
    if not chinese:
        return "en"
    return "mixed" if english > 0.2 * chinese else "zh"


def parse_report(text: str) -> tuple[Finding, ...]:
    """Every mention of a disease, in the order of the text. Parts in either language are read by their own words."""
    found: list[Finding] = []
    start = 0
    for end, after in [*((match.start(), match.end()) for match in _ENDS.finditer(text)), (len(text), len(text))]:
        sentence = text[start:end]
        matches = _matches(sentence)
        if any(one.kind == "disease" for one in matches):
            found += _mentions(sentence, matches, start)
        else:
            _tell_more(sentence, matches, found)
        start = after
    return tuple(found)


def affirmed(findings: Iterable[Finding]) -> list[Finding]:
    """What a report says is there."""
    return [one for one in findings if not one.negated]


def write_report(facts: LesionFacts, *, language: Language = "en", disease: str = "lesion") -> Report:
    """A report that states measured facts alone.

    Raises
    ------
    SettingsError
        The disease or a place is not in the lexicon.
    """
    kind = _say("diseases", disease, language)
    if facts.volume_ml == 0:
        return (
            Report(findings="No lesion is seen.", impression=f"No {kind}.")
            if language == "en"
            else Report(findings="未见病灶。", impression=f"未见{kind}。")
        )
    places = [name for name, share in facts.regions if share >= 0.1][:3]
    longest, volume, parts = facts.longest_mm, facts.volume_ml, facts.parts
    if language == "en":
        side = {"left": "left ", "right": "right ", "both": "bilateral ", None: ""}[facts.side]
        where = f" in the {side}{_listed([_spoken(name, 'en') for name in places], 'and')}" if places else f", {side}hemisphere"
        signals = "".join(f" It is {signal} on {name}." for name, signal in facts.signals)
        number = f" in {parts} parts" if parts > 1 else ""
        return Report(
            findings=f"There is {_article(kind)} {kind}{where}{number}. {'Together the parts span' if parts > 1 else 'It measures up to'} {longest:.0f} mm, with a volume of {volume:.2f} mL.{signals}",
            impression=f"{kind[0].upper()}{kind[1:]}{where}, {volume:.2f} mL.",
        )
    side = {"left": "左侧", "right": "右侧", "both": "双侧", None: ""}[facts.side]
    where = f"{side}{_listed([_spoken(name, 'zh') for name in places], '、')}" if places else f"{side}大脑半球"
    words = {"hyperintense": "高信号", "hypointense": "低信号", "isointense": "等信号"}
    signals = "".join(f"，{name}呈{words[signal]}" for name, signal in facts.signals)
    number = f"，共{parts}处" if parts > 1 else ""
    return Report(
        findings=f"{where}可见{kind}{number}{signals}，最长径约{longest:.0f} mm，体积约{volume:.2f} mL。",
        impression=f"{where}{kind}，体积约{volume:.2f} mL。",
    )


def said_of(group: Literal["diseases", "places"], name: str) -> str:
    """How English reports call a disease or a place of the lexicon; a place that it does not hold is called as it is."""
    return _spoken(name, "en") if group == "places" else _say(group, name, "en")


def known_diseases() -> tuple[str, ...]:
    """Diseases of the lexicon that a lesion mask could hold."""
    return tuple(name for name in _terms()["diseases"] if name not in _ABOUT_A_LESION)


def plain_words(finding: Finding | None) -> str:
    """A finding as it is explained to a patient."""
    if finding is None:
        return f"The images show nothing unusual. {_ASK}"
    where = {"left": " on the left side of the brain", "right": " on the right side of the brain", "both": " on both sides of the brain", None: ""}[finding.side]  # fmt: skip
    return f"The images show {_terms()['plain'][finding.disease]} ({_say('diseases', finding.disease, 'en')}){where}. {_ASK}"


def check_report(text: str, facts: LesionFacts, *, known_places: Sequence[str] = ()) -> tuple[Contradiction, ...]:
    """What a text says against the facts of a mask: whether there is a lesion, its side, volume, places and signals.

    ``known_places`` are the regions that the facts could have named: a place that the text names, that is among them and holds
    nothing of the lesion is a contradiction. Places are only checked where the facts name regions.
    """
    said = [one for one in parse_report(text) if one.disease not in _ABOUT_A_LESION]
    there = affirmed(said)
    found: list[Contradiction] = []
    if facts.volume_ml == 0:
        return tuple(Contradiction(kind="presence", said=f"{one.disease} present", measured="no lesion") for one in there)
    if said and not there:
        found.append(Contradiction(kind="presence", said="no lesion", measured=f"{facts.volume_ml:.2f} mL"))
    held, known = {_place(name) for name, _ in facts.regions}, {_place(name) for name in known_places}
    measured = dict(facts.signals)
    for one in there:
        if one.side is not None and one.side != facts.side:
            found.append(Contradiction(kind="side", said=one.side, measured=f"{facts.side} ({facts.left_share:.0%} left)"))
        if one.volume_ml is not None and abs(one.volume_ml - facts.volume_ml) > TOLERANCE * facts.volume_ml + 0.005:
            found.append(Contradiction(kind="volume", said=f"{one.volume_ml:g} mL", measured=f"{facts.volume_ml:.2f} mL"))
        found += [
            Contradiction(kind="place", said=place, measured=", ".join(sorted(held)))
            for place in one.places
            if held and place in known and place not in held
        ]
        found += [
            Contradiction(kind="signal", said=f"{signal} on {name}", measured=measured[name])
            for name, signal in one.signals
            if name in measured and measured[name] != signal
        ]
    return tuple(dict.fromkeys(found))


def _tell_more(sentence: str, matches: Sequence[_Match], found: list[Finding]) -> None:
    """A sentence without a disease speaks of the last finding that is there, unless it names a place of its own."""
    rest = [one for one in matches if one.kind in {"length", "volume", "signal", "enhancement"}]
    last = next((place for place in reversed(range(len(found))) if not found[place].negated), None)
    if last is not None and rest and not any(one.kind == "place" for one in matches):
        found[last] = _told(found[last], _pairs(matches, sentence), negated=_negated(matches, rest[0], sentence))


def _mentions(sentence: str, matches: Sequence[_Match], offset: int) -> list[Finding]:
    diseases = [one for one in matches if one.kind == "disease"]
    own: dict[int, list[_Match]] = {place: [] for place in range(len(diseases))}
    for one in matches:
        if one.kind in {"disease", "before", "after", "ends"}:
            continue
        nearest = min(range(len(diseases)), key=lambda place, one=one: (_distance(one, diseases[place], sentence), place))  # type: ignore[misc]
        own[nearest].append(one)
    found = []
    for place, disease in enumerate(diseases):
        mention = Finding(
            disease=disease.name,
            start=offset + disease.start,
            end=offset + disease.end,
            negated=_negated(matches, disease, sentence),
            certainty=_certainty(matches, disease),
        )
        given = own[place]
        # one place and one side can be said for several diseases: "left frontal glioma with oedema"
        if len(diseases) > 1 and not mention.negated:
            given = given or [one for one in matches if one.kind in {"side", "place"} and one.end <= diseases[0].start]
        found.append(_told(mention, _pairs(given, sentence), negated=mention.negated))
    return found


def _told(finding: Finding, given: Sequence[_Match], *, negated: bool) -> Finding:
    sides = {one.name for one in given if one.kind == "side"}
    side = None if not sides else sides.pop() if len(sides) == 1 else "both"
    lengths = [one.number for one in given if one.kind == "length"]
    volumes = [one.number for one in given if one.kind == "volume"]
    enhancement = [one for one in given if one.kind == "enhancement"]
    values: dict[str, Any] = {
        "places": tuple(dict.fromkeys(one.name for one in given if one.kind == "place")) or finding.places,
        "side": side or finding.side,
        "longest_mm": max(lengths) if lengths else finding.longest_mm,
        "volume_ml": volumes[0] if volumes else finding.volume_ml,
        "signals": tuple(dict.fromkeys((*finding.signals, *(_parted(one.name) for one in given if one.kind == "signal")))),
        "enhancing": (not negated) if enhancement else finding.enhancing,
    }
    return finding.model_copy(update=values)


def _pairs(matches: Sequence[_Match], sentence: str) -> list[_Match]:
    """The matches, every signal with the sequences it is said of: "high signal on T2 and FLAIR", else those named since the signal before."""
    out: list[_Match] = []
    waiting: list[str] = []
    ordered = sorted(matches, key=lambda one: one.start)
    taken: set[int] = set()
    for place, one in enumerate(ordered):
        if one.kind == "sequence" and place not in taken:
            waiting.append(one.name)
        elif one.kind == "signal":
            later = list(itertools.takewhile(lambda number: ordered[number].kind == "sequence", range(place + 1, len(ordered))))
            if later and _ON.match(sentence[one.end : ordered[later[0]].start]):
                waiting = [ordered[number].name for number in later]
                taken |= set(later)
            out += [_Match("signal", f"{name}:{one.name}", one.start, one.end) for name in waiting or [""]]
            waiting = []
        elif one.kind != "sequence":
            out.append(one)
    return out


def _negated(matches: Sequence[_Match], one: _Match, sentence: str) -> bool:
    for cue in matches:
        if cue.kind == "before" and cue.end <= one.start:
            between = [other for other in matches if other.kind == "ends" and cue.end <= other.start < one.start]
            if not between and not _affirmed_anew(sentence[cue.end : one.start]):
                return True
        if cue.kind == "after" and cue.start >= one.end and len(sentence[one.end : cue.start].strip()) <= 12:
            return True
    return False


def _affirmed_anew(between: str) -> bool:
    """A comma after which something is said to be there ends a negation."""
    tail = re.split(r"[,，]", between)[1:]
    return any(re.search(r"\b(?:there is|there are|acute|with|showing|seen)\b|可见|见|示|伴", part, re.IGNORECASE) for part in tail)


def _certainty(matches: Sequence[_Match], disease: _Match) -> Certainty:
    near = [one for one in matches if one.kind in {"possible", "probable"} and _gap(one, disease) <= 24]
    kinds = {one.kind for one in near}
    return "possible" if "possible" in kinds else "probable" if "probable" in kinds else "certain"


def _parted(name: str) -> tuple[str, str]:
    sequence, _, signal = name.partition(":")
    return sequence, signal


def _distance(one: _Match, other: _Match, sentence: str) -> int:
    """Characters between two matches; a comma counts as many, because clauses speak of one thing each."""
    between = sentence[min(one.end, other.end) : max(one.start, other.start)]
    return _gap(one, other) + _COMMA * sum(between.count(mark) for mark in ",，")


def _gap(one: _Match, other: _Match) -> int:
    return max(one.start - other.end, other.start - one.end, 0)


def _matches(sentence: str) -> list[_Match]:
    """Matches of the lexicon that do not overlap, the longest first, and numbers with units."""
    found: list[_Match] = []
    taken = [False] * len(sentence)
    for length in _LENGTH.finditer(sentence):
        factor = 10.0 if length[2].casefold() in _CENTIMETRES else 1.0
        largest = max(float(number) for number in re.findall(_NUMBER, length[1]))
        found.append(_Match("length", "", *length.span(), number=factor * largest))
    found += [_Match("volume", "", *one.span(), number=float(one[1])) for one in _VOLUME.finditer(sentence)]
    for kind, name, pattern in _patterns():
        for match in pattern.finditer(sentence):
            if not any(taken[match.start() : match.end()]):
                taken[match.start() : match.end()] = [True] * (match.end() - match.start())
                found.append(_Match(kind, name, *match.span()))
    return sorted(found, key=lambda one: one.start)


@cache
def _terms() -> dict[str, Any]:
    text = (resources.files(__package__) / "radiology_terms.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    return values


@cache
def _patterns() -> tuple[tuple[str, str, re.Pattern[str]], ...]:
    """(kind, name, pattern) of every word, the longest first; Chinese ones match anywhere, English ones whole words."""
    terms, words = _terms(), []
    for group, kind in (("diseases", "disease"), ("places", "place")):
        for name, languages in terms[group].items():
            words += [(kind, name, word, code) for code, one in languages.items() for word in (one["says"], *one["reads"])]
    for group, kind in (("sides", "side"), ("sequences", "sequence"), ("signals", "signal")):
        words += [(kind, name, word, code) for name, one in terms[group].items() for code, listed in one.items() for word in listed]
    words += [("enhancement", "", word, code) for code, listed in terms["enhancement"].items() for word in listed]
    for kind in ("before", "after", "ends"):
        words += [(kind, "", word, code) for code, listed in terms["negation"][kind].items() for word in listed]
    words += [(kind, "", word, code) for kind, one in terms["certainty"].items() for code, listed in one.items() for word in listed]
    ordered = sorted(words, key=lambda word: (-len(word[2]), word[2]))
    return tuple((kind, name, _pattern(word, code)) for kind, name, word, code in ordered)


def _pattern(word: str, code: str) -> re.Pattern[str]:
    if code == "zh" or not word[0].isalnum():
        return re.compile(re.escape(word), re.IGNORECASE)
    return re.compile(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", re.IGNORECASE)


def _say(group: str, name: str, language: Language) -> str:
    known: Mapping[str, Any] = _terms()[group]
    if name not in known:
        raise SettingsError(f"'{name}' is not among the {group} of the lexicon", fix=f"use one of: {', '.join(known)}")
    said: str = known[name][language]["says"]
    return said


def _place(name: str) -> str:
    """The lexicon's name of a region, whatever an atlas calls it; the name itself where the lexicon has none."""
    found = [one.name for one in _matches(name.replace("_", " ")) if one.kind == "place"]
    return found[0] if found else name


def _by_place(facts: LesionFacts) -> list[tuple[str, float]]:
    """Shares of the places of the lexicon (and of regions that it does not hold), largest first."""
    shares: dict[str, float] = {}
    for name, share in facts.regions:
        shares[_place(name)] = shares.get(_place(name), 0.0) + share
    return sorted(shares.items(), key=lambda pair: (-pair[1], pair[0]))


def _spoken(name: str, language: Language) -> str:
    place = _place(name)
    return _say("places", place, language) if place in _terms()["places"] else name


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _listed(names: Sequence[str], last: str) -> str:
    names = list(dict.fromkeys(names))
    if last == "、" or len(names) == 1:
        return "、".join(names) if last == "、" else names[0]
    return f"{', '.join(names[:-1])} {last} {names[-1]}"
