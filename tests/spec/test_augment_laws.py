"""`augment=` as a user sets it: what it changes of a run, and what cannot be augmented, each refused with a cure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.compose import compose
from selfguide.spec.config import AugmentConfig, Config
from selfguide.spec.config.augment import check_augmented
from selfguide.spec.identity import identity
from selfguide.spec.sizes import architecture, footprint
from selfguide.spec.validate import validate
from shards.errors import UserError
from shards.format.header import Header

ON = "augment.probability=0.12"


def config(*typed: str) -> Config:
    return compose(["experiment=digits_uncond", "cluster=local", *typed])


def test_it_is_off_unless_asked_for_and_leaves_no_trace_in_the_identity() -> None:
    off, on, other = config(), config("augment=edm"), config("augment.probability=0.15")
    assert off.augment == AugmentConfig(probability=None) and on.augment.probability == 0.12
    assert "augment" not in identity(off, "m") and architecture(off).augment == 0
    assert identity(on, "m")["augment"] == {"probability": 0.12} != identity(other, "m")["augment"]
    rest = {name: part for name, part in identity(on, "m").items() if name != "augment"}
    assert rest == identity(off, "m")
    assert config("augment=edm", "augment.probability=null") == off
    width = architecture(off).width  # type: ignore[attr-defined]
    assert footprint(on).parameters - footprint(off).parameters == 9 * width


@pytest.mark.parametrize(
    ("typed", "named", "cure"),
    [
        ((ON, "data.flip=true"), "data.flip=true", ("data.flip=false",)),
        (
            (ON, "guidance=sidecar", "guidance.layout=notes/boxes", "guidance.channels=1"),
            "guidance.layout=notes/boxes",
            ("augment.probability=null",),
        ),
        (
            (ON, "guidance=digits_patch"),
            "guidance.level=patch",
            ("guidance.level=image", "guidance.pooling=flat"),
        ),
        ((ON, "guidance=digits_patch"), "guidance.level=patch", ("augment.probability=null",)),
        (("augment.probability=0",), "augment.probability=0", ("augment.probability=0.12",)),
        (("augment.probability=1.5",), "augment.probability=1.5", ("augment.probability=1",)),
    ],
)
def test_what_cannot_be_augmented_is_refused_with_a_cure_that_works(
    typed: tuple[str, ...], named: str, cure: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as refused:
        validate(config(*typed))
    assert named in str(refused.value) and "augment.probability" in str(refused.value)
    assert cure[0].partition("=")[0] in str(refused.value)
    validate(config(*typed, *cure))


def test_groups_and_features_found_beforehand_go_with_it() -> None:
    validate(config(ON, "guidance=sidecar", "guidance.ids=notes/ids", "guidance.groups=10"))
    validate(config(ON, "guidance=digits_online"))
    validate(config(ON, "guidance=labels"))


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (Header(kind="latent", shift=0.0, scale=1.0, encoder="tiny"), "hold latents"),
        (Header(kind="image", shift=1.0, scale=1.0, flips=True), "mirror image"),
    ],
)
def test_shards_whose_images_cannot_be_moved_are_refused(header: Header, why: str) -> None:
    on = config(ON)
    with pytest.raises(UserError, match=why) as refused:
        check_augmented(on, header)
    assert "augment.probability=null" in str(refused.value)
    check_augmented(replace(on, augment=AugmentConfig()), header)
    check_augmented(on, Header(kind="image", shift=1.0, scale=1.0))
