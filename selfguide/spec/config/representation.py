"""What a run may train beside denoising and guidance: settings of `selfguide.representation`, each off by default."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from selfguide.spec.architecture import Architecture
    from selfguide.spec.config import Config


class ComponentSettings:
    """What the rest of the project asks of the settings of such a component."""

    # whether a teacher exists for it
    wants_teacher: ClassVar[bool] = False

    @property
    def on(self) -> bool:
        """Whether the run has the component; settings of one that it does not have are no part of its identity."""
        raise NotImplementedError

    def check(self, config: Config, net: Architecture) -> None:
        """Raises UserError where the component cannot be trained with the rest of `config` on the network `net`."""

    def reads(self, net: Architecture) -> int | None:
        """The layer of `net`, from 1, whose tokens its branch beside the backbone reads; None without a branch."""
        return None

    def parameters(self, net: Architecture) -> int:
        """Trainable ones of its branch beside the backbone."""
        return 0

    def identity(self, config: Config) -> dict[str, Any]:
        """What changes a run's result beside the fields, or says one of them by another name."""
        return {}
