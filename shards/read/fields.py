"""What is read of samples: fields by name, `batch["x"]` or `batch.x`."""

from __future__ import annotations

from typing import Any


class Fields(dict[str, Any]):
    """A dict whose keys are attributes, too: `x`, `y` if there are labels, `key`, `ordinal`, `position`, `mask`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no field {name!r}: there are {', '.join(self)}") from None
