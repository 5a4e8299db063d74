"""A frozen system with a second one beside it, the donor, whose untuned embedding is one more block of the head.

So a series encoder may stand beside a graph encoder, though systems never import one another: a stage loads both and joins them here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.errors import CheckpointMismatchError
from brainfm_cli.learning.checkpoints import DONOR
from brainfm_cli.learning.samples import Windows


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Two systems that are tuned as one: prompts reach the first, the head reads both."""

    system: Any
    """The system that is prompted."""
    donor: Any
    """The system that gives its embedding."""
    module: nn.Module
    """Both backbones."""

    @property
    def settings(self) -> Any:  # noqa: ANN401
        """Of the system that is prompted."""
        return self.system.settings

    @property
    def atlases(self) -> dict[str, Any]:
        """Atlases that both know, by label."""
        return {label: record for label, record in self.system.atlases.items() if label in self.donor.atlases}

    def usable_atlases(self, cohort: Cohort) -> list[str]:
        """The cohort's atlases that both know, each checked; sorted.

        Raises
        ------
        CheckpointMismatchError
            There is none.
        """
        shared = sorted(set(self.system.usable_atlases(cohort)) & set(self.donor.usable_atlases(cohort)))
        if not shared:
            raise CheckpointMismatchError(
                f"model and donor share no atlas: {', '.join(sorted(self.system.atlases))} and {', '.join(sorted(self.donor.atlases))}",
                fix="pretrain both with one atlas",
            )
        return shared

    def graphs(self, windows: Windows) -> Any:  # noqa: ANN401
        """The frozen part of the prompted system's input."""
        return self.system.graphs(windows)

    def new_prompt(self, atlas: str) -> nn.Module:
        """The prompted system's prompt."""
        prompt: nn.Module = self.system.new_prompt(atlas)
        return prompt

    def read(self, graphs: Any, prompt: Any) -> Tensor:  # noqa: ANN401
        """The prompted system's embedding; gradients reach the prompt."""
        embedding: Tensor = self.system.read(graphs, prompt)
        return embedding

    @torch.no_grad()
    def connectivity_blocks(self, windows: Windows) -> dict[str, Tensor]:
        """The prompted system's blocks and the donor's embedding."""
        own: dict[str, Tensor] = self.system.connectivity_blocks(windows)
        return own | {DONOR: self.donor.read(self.donor.graphs(windows), self.donor.new_prompt(windows.atlas)).float()}

    def randomised(self, seed: int) -> Joined:
        """Both with random weights."""
        return join(self.system.randomised(seed), self.donor.randomised(seed))


def join(system: Any, donor: Any) -> Joined:  # noqa: ANN401  (two systems)
    """The two as one."""
    donor.module.eval()
    return Joined(system=system, donor=donor, module=nn.ModuleDict({"system": system.module, "donor": donor.module}))
