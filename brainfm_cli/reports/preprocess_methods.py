"""Methods paragraph of the embedded preprocessing and what it cites, as text, Markdown and BibTeX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from brainfm_cli.provenance import brainfm_version

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True)
class Citation:
    """One work."""

    key: str
    """Of the BibTeX entry."""
    authors: str
    """As in BibTeX."""
    title: str
    """Title."""
    journal: str
    """Journal or proceedings."""
    year: int
    """Year."""
    doi: str
    """Digital object identifier."""

    @property
    def text(self) -> str:
        """One line for a list of references."""
        return f"{self.authors.replace(' and ', '; ')} ({self.year}). {self.title}. {self.journal}. doi:{self.doi}"

    @property
    def bibtex(self) -> str:
        """The BibTeX entry."""
        fields = {"author": self.authors, "title": f"{{{self.title}}}", "journal": self.journal, "year": self.year, "doi": self.doi}
        return f"@article{{{self.key},\n" + "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items()) + "}\n"


_WORKS = {
    work.key: work
    for work in (
        Citation(key="nipype", authors="Gorgolewski, K. and Burns, C. D. and Madison, C. and others", title="Nipype: a flexible, lightweight and extensible neuroimaging data processing framework in Python", journal="Frontiers in Neuroinformatics", year=2011, doi="10.3389/fninf.2011.00013"),
        Citation(key="n4", authors="Tustison, N. J. and Avants, B. B. and Cook, P. A. and others", title="N4ITK: improved N3 bias correction", journal="IEEE Transactions on Medical Imaging", year=2010, doi="10.1109/TMI.2010.2046908"),
        Citation(key="deepbet", authors="Fisch, L. and Zumdick, S. and Barkhau, C. and others", title="deepbet: fast brain extraction of T1-weighted MRI using convolutional neural networks", journal="Computers in Biology and Medicine", year=2024, doi="10.1016/j.compbiomed.2024.108845"),
        Citation(key="mixture", authors="Zhang, Y. and Brady, M. and Smith, S.", title="Segmentation of brain MR images through a hidden Markov random field model and the expectation-maximization algorithm", journal="IEEE Transactions on Medical Imaging", year=2001, doi="10.1109/42.906424"),
        Citation(key="syn", authors="Avants, B. B. and Epstein, C. L. and Grossman, M. and Gee, J. C.", title="Symmetric diffeomorphic image registration with cross-correlation", journal="Medical Image Analysis", year=2008, doi="10.1016/j.media.2007.06.004"),
        Citation(key="template", authors="Fonov, V. S. and Evans, A. C. and McKinstry, R. C. and Almli, C. R. and Collins, D. L.", title="Unbiased nonlinear average age-appropriate brain templates from birth to adulthood", journal="NeuroImage", year=2009, doi="10.1016/S1053-8119(09)70884-5"),
        Citation(key="realignment", authors="Baker, S. and Matthews, I.", title="Lucas-Kanade 20 years on: a unifying framework", journal="International Journal of Computer Vision", year=2004, doi="10.1023/B:VISI.0000011205.11775.fd"),
        Citation(key="information", authors="Mattes, D. and Haynor, D. R. and Vesselle, H. and Lewellen, T. K. and Eubank, W.", title="PET-CT image registration in the chest using free-form deformations", journal="IEEE Transactions on Medical Imaging", year=2003, doi="10.1109/TMI.2003.809072"),
        Citation(key="power", authors="Power, J. D. and Mitra, A. and Laumann, T. O. and others", title="Methods to detect, characterize, and remove motion artifact in resting state fMRI", journal="NeuroImage", year=2014, doi="10.1016/j.neuroimage.2013.08.048"),
        Citation(key="rmsd", authors="Jenkinson, M. and Bannister, P. and Brady, M. and Smith, S.", title="Improved optimization for the robust and accurate linear registration and motion correction of brain images", journal="NeuroImage", year=2002, doi="10.1006/nimg.2002.1132"),
        Citation(key="compcor", authors="Behzadi, Y. and Restom, K. and Liau, J. and Liu, T. T.", title="A component based noise correction method (CompCor) for BOLD and perfusion based fMRI", journal="NeuroImage", year=2007, doi="10.1016/j.neuroimage.2007.04.042"),
        Citation(key="fmriprep", authors="Esteban, O. and Markiewicz, C. J. and Blair, R. W. and others", title="fMRIPrep: a robust preprocessing pipeline for functional MRI", journal="Nature Methods", year=2019, doi="10.1038/s41592-018-0235-4"),
    )
}  # fmt: skip
_EXTRACTION = {
    "deepbet": "the brain was extracted with deepbet's network",
    "template": "the brain was extracted by carrying over the template's mask after affine and deformable registration",
    "stripped": "the image had been skull-stripped before",
}


def methods_paragraph(facts: Mapping[str, Any], *, bold: bool) -> str:
    """What was done, in the words of a methods section.

    Parameters
    ----------
    facts
        As in the result of the embedded engine.
    bold
        Whether BOLD runs were preprocessed too.
    """
    images = (
        f"the mean of {facts['averaged']} rigidly aligned {facts['reference']} images"
        if facts["averaged"] > 1
        else f"the {facts['reference']} image"
    )
    mixture = "Three tissue classes were found by a Gaussian mixture with a Markov random field. "
    tissues = mixture if facts["tissues"] else ""
    anatomy = (
        f"Preprocessing was done with the embedded engine of brainfm {brainfm_version()}, a Nipype workflow. Intensity bias of {images} was "
        f"removed by the algorithm of N4; {_EXTRACTION[facts['method']]}. {tissues}The brain was registered to {facts['template']} "
        f"({facts['template_source']}) by affine and SyN registration in antspyx."
    )
    if facts["others"]:
        named, several = " and ".join(facts["others"]), len(facts["others"]) > 1
        anatomy += (
            f" {named} {'were each' if several else 'was'} registered rigidly to it by mutual information, and resampled into its space and, "
            "through both transforms, the template's."
        )
    if not bold:
        return anatomy
    timing = "slices were moved to the middle of the acquisition by quintic splines, " if facts["slice_timing"] else ""
    return (
        f"{anatomy} For each BOLD run, frames before the steady state were found, head motion was estimated by inverse-compositional "
        f"Gauss-Newton registration to the mean of aligned frames, {timing}and the reference was registered to the structural image by "
        "maximising mutual information. Frames were resampled into template space once, by cubic splines, through all transforms together. "
        "Susceptibility distortion was not corrected. Confounds follow fMRIPrep's names and definitions: motion and its expansions, "
        "framewise displacement, RMS displacement, DVARS, mean signals of brain, CSF and white matter, aCompCor, and cosines of 128 s."
    )


def cited(facts: Mapping[str, Any], *, bold: bool) -> tuple[Citation, ...]:
    """Works that the paragraph rests on."""
    keys = ["nipype", "n4", *(["deepbet"] if facts["method"] == "deepbet" else [])]
    keys += [*(["mixture"] if facts["tissues"] else []), "syn", "template"]
    if bold or facts["others"]:
        keys += ["information"]
    if bold:
        keys += ["realignment", "power", "rmsd", "compcor", "fmriprep"]
    return tuple(_WORKS[key] for key in keys)


def as_markdown(facts: Mapping[str, Any], *, bold: bool) -> str:
    """Paragraph and references as Markdown."""
    references = "".join(f"* {work.text}\n" for work in cited(facts, bold=bold))
    return f"# Methods\n\n{methods_paragraph(facts, bold=bold)}\n\n# References\n\n{references}"


def as_bibtex(facts: Mapping[str, Any], *, bold: bool) -> str:
    """References as BibTeX."""
    return "\n".join(work.bibtex for work in cited(facts, bold=bold))
