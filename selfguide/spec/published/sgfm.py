"""Guided Diffusion from Self-Supervised Diffusion Features (Hu et al. 2023, arXiv 2312.08825)."""

from __future__ import annotations

from selfguide.spec.published.row import Row

PAPER = (
    "SGFM: Guided Diffusion from Self-Supervised Diffusion Features, Hu et al. 2023 (2312.08825)"
)
DIFFERS = (
    "Training begins, as in the paper, from U-ViT-L weights that were trained with ImageNet's labels "
    "(`init.path`), so none of its rows is label-free; snapshots, records and the board say so. "
    "`init=scratch` is label-free, and longer.",
    "bf16 stands for the paper's fp16 with loss scaling: its range is fp32's, so nothing is scaled.",
    "The paper scores the checkpoint that is best against training images; here every snapshot has its row on the "
    "board, and `python -m tools.best RUN` writes down which one that is, with the last one beside it.",
)


def _row(table: str, name: str, experiment: str | None, *overrides: str, **rest: object) -> Row:
    """A row whose numbers are fid= (clean-fid's definition) and is_=."""
    names = {"fid": "fid_clean", "is_": "inception_score"}
    numbers = {metric: rest.pop(short) for short, metric in names.items() if short in rest}
    source = f"SGFM, {table}, {name}" if numbers else ""
    return Row(
        paper="sgfm",
        table=table,
        name=name,
        experiment=experiment,
        overrides=overrides,
        numbers=numbers,  # type: ignore[arg-type]
        source=source,
        **rest,  # type: ignore[arg-type]
    )


_RUN = "RUN stands for the run of sgfm/in100_online"

ROWS = (
    # ImageNet-100 at 256 px, 10,000 samples
    _row("table1", "in100-none", "sgfm/in100_none", fid=45.1, is_=26.5),
    _row("table1", "in100-offline", "sgfm/in100_offline", fid=35.8, is_=34.8),
    _row("table1", "in100-online", "sgfm/in100_online", fid=36.0, is_=34.3),
    _row("table1", "in100-patch", "sgfm/in100_patch", fid=33.4, is_=45.3),
    _row("table1", "in100-labels", "sgfm/in100_labels", fid=34.4, is_=44.1),
    _row("table1", "in100-dino", "sgfm/in100_dino", fid=32.0, is_=48.7),
    # ImageNet and LSUN churches at 256 px
    _row("table3", "in256-none", "sgfm/in256_none", fid=42.5, is_=23.1),
    _row("table3", "in256-offline", "sgfm/in256_offline", fid=29.8, is_=38.1),
    _row("table3", "in256-online", "sgfm/in256_online", fid=30.9, is_=32.3),
    _row("table3", "in256-labels", "sgfm/in256_labels", fid=19.1, is_=61.2),
    _row("table3", "churches-none", "sgfm/churches_none", fid=13.10, is_=2.95),
    _row("table3", "churches-offline", "sgfm/churches_offline", fid=12.75, is_=3.03),
    _row("table3", "churches-online", "sgfm/churches_online", fid=12.38, is_=3.17),
    # the paper says that these matter and prints no numbers
    _row(
        "ablations",
        "gradient",
        "sgfm/in100_online",
        "guidance.stop_gradient=false",
        differs="L_SK trains the backbone too",
    ),
    _row(
        "ablations",
        "no-warmup",
        "sgfm/in100_online",
        "guidance.warmup=none",
        differs="lambda is whole from the beginning",
    ),
    _row("ablations", "mean-pooling", "sgfm/in100_online", "guidance.pooling=mean"),
    _row("ablations", "no-mask", "sgfm/in100_online", "guidance.mask=[0,1]"),
    _row("appendix7", "queue", "sgfm/in100_online", "guidance.queue=5120"),
    _row(
        "figure3",
        "layer-and-time",
        None,
        command="python -m tools.study data/in100-sd RUN --figure figure3.png",
        differs=f"{_RUN}; the figure shows NMI, its JSON ARI too",
    ),
    _row(
        "figure4",
        "nmi-over-training",
        "sgfm/in100_online",
        "evaluation.metrics=[inception_score,agreement]",
        differs="NMI of the prototypes with people's labels, which serve the score alone; over images: python -m "
        "launcher.board curve RUN --metric nmi",
    ),
    _row(
        "figure4",
        "one-noise-over-training",
        None,
        command="python -m tools.sample RUN --grid images=N,N,N --count 8 --out samples",
        differs=f"{_RUN}, N for the images seen of its snapshots",
    ),
    _row(
        "figure5",
        "like-a-photo",
        None,
        command="python -m tools.sample RUN --like PHOTO --count 16 --out samples",
        differs=_RUN,
    ),
    # FID over evaluations of the network, by sampler
    _row("figure6", "dopri5", "sgfm/in100_online"),
    *(
        _row(
            "figure6",
            name,
            None,
            command=f"python -m launcher.evaluate RUN sampler.name={sampler} sampler.steps=5,10,20,50,100",
            differs=_RUN,
        )
        for name, sampler in (
            ("euler", "euler"),
            ("euler-maruyama", "euler_maruyama"),
            ("dpm", "dpm2"),
        )
    ),
    _row(
        "figure6",
        "one-noise-over-steps",
        None,
        command="python -m tools.sample RUN --sampler euler --grid steps=5,10,20,50 --count 8 --out samples",
        differs=_RUN,
    ),
    _row(
        "figure6",
        "layout-of-a-photo",
        None,
        command="python -m tools.sample RUN --like PHOTO --beside --count 8 --out samples",
        differs="RUN stands for the run of sgfm/in100_patch, PHOTO for a validation image",
    ),
    _row(
        "figure11",
        "fid-over-strength",
        None,
        command="python -m launcher.evaluate RUN sampler.g=1,1.2,1.4,1.6,1.8,2",
        differs=_RUN,
    ),
    *(
        _row("figure15", name, f"sgfm/in100_{name}", differs="FID over images on the board")
        for name in ("online", "none", "labels")
    ),
    _row(
        "figure9",
        "cluster-pages",
        None,
        command="python -m tools.atlas RUN",
        differs=f"{_RUN}; groups of patches have no page, but figure16's histogram",
    ),
    _row(
        "figure13",
        "strength-in-one-noise",
        None,
        command="python -m tools.sample RUN --grid g=0,1,1.4,2,3 --count 8 --out samples",
        differs=_RUN,
    ),
    _row(
        "figure12",
        "losses-over-training",
        None,
        command="python -m launcher.board curve RUN --metric loss",
        differs=f"{_RUN}; L_SK over ln K by --metric code_loss; NMI as for figure4, FID over images on the board",
    ),
    _row(
        "figure16",
        "assignments",
        None,
        command="python -m tools.atlas RUN --figure figure16.png",
        differs=_RUN,
    ),
    _row(
        "figure19",
        "chain-of-estimates",
        None,
        command="python -m tools.sample RUN --chain --what x0 --out samples",
        differs=_RUN,
    ),
    # 4 x A5000
    *(
        _row("table5", name, f"sgfm/{name}_online", differs=f"{hours} h on four A5000 in the paper")
        for name, hours in (("in100", 48), ("churches", 96), ("in256", 290))
    ),
)
